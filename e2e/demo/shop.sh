# The shop and its warehouse: two databases in a namespace, rows, writers, and the comparison of every row.
# Shared by the demo and the end-to-end tests. Sourced; expects lib.sh and a function or program `kubectl`.
# shellcheck shell=bash

DEMO=$REPO/e2e/demo
SAMPLES=$REPO/config/samples/demo
MIRRORED=(customers orders order_items)

# new_namespace NAME: where nothing but restricted pods may run
new_namespace() {
  kubectl apply -f - >/dev/null <<YAML
apiVersion: v1
kind: Namespace
metadata: {name: $1, labels: {pod-security.kubernetes.io/enforce: restricted}}
YAML
}

# with_images FILE: with the PostgreSQL image of this run, if it is not the one made here
with_images() {
  if [ -n "${POSTGRES_IMAGE:-}" ]; then sed -E "s|image: localhost/postgres:[0-9]+|image: $POSTGRES_IMAGE|" "$1"; else cat "$1"; fi
}

# psql on either side, as superuser; arguments and input go to psql
source_psql() { kubectl exec -i -n "${SHOP_NAMESPACE:-shop}" shop-db-0 -c postgres -- psql -qXAt -U postgres -d shop -v ON_ERROR_STOP=1 "$@"; }
target_psql() { kubectl exec -i -n "${SHOP_NAMESPACE:-shop}" warehouse-db-0 -c postgres -- psql -qXAt -U postgres -d warehouse -v ON_ERROR_STOP=1 "$@"; }
# one or more statements, as text
source_sql() { source_psql -f - <<< "$1"; }
target_sql() { target_psql -f - <<< "$1"; }

start_databases() {   # in namespace SHOP_NAMESPACE
  local ns=${SHOP_NAMESPACE:-shop}
  new_namespace "$ns"
  with_images "$DEMO/databases.yaml" | kubectl apply -n "$ns" -f - >/dev/null
  kubectl rollout status -n "$ns" statefulset/shop-db --timeout=120s >/dev/null
  kubectl rollout status -n "$ns" statefulset/warehouse-db --timeout=60s >/dev/null
}
database_password() { sed -n 's/^ *password: *//p' "$SAMPLES/1-credentials.yaml" | head -1; }
fill_shop() {   # CUSTOMERS
  source_psql -v "password=$(database_password)" -v "customers=$1" -f - < "$DEMO/source.sql"
  target_psql -v "password=$(database_password)" -f - < "$DEMO/target.sql"
}

start_writer() {
  local ns=${SHOP_NAMESPACE:-shop}
  source_sql 'UPDATE writer_control SET stop = false'
  kubectl delete job writer -n "$ns" --ignore-not-found >/dev/null
  with_images "$DEMO/writer.yaml" | kubectl apply -n "$ns" -f - >/dev/null
  wait_until 60 "the writers write" is_true source_sql "SELECT max(id) > (SELECT count(*) FROM customers WHERE email LIKE 'customer%') FROM customers"
}
stop_writer() {
  source_sql 'UPDATE writer_control SET stop = true'
  kubectl wait -n "${SHOP_NAMESPACE:-shop}" job/writer --for=condition=Complete --timeout=120s >/dev/null
}
# is_true SQL_FUNCTION QUERY: does it answer true?
is_true() { [ "$("$1" "$2")" = t ]; }

# ---------------------------------------------------------------- the Mirror
mirror_field() {   # NAME JSONPATH
  kubectl get mirror "$1" -n "${SHOP_NAMESPACE:-shop}" -o "jsonpath={$2}"
}
mirror_condition() { mirror_field "$1" ".status.conditions[?(@.type==\"$2\")].status"; }
worker_pod() {   # of Mirror NAME: the pod that runs
  kubectl get pods -n "${SHOP_NAMESPACE:-shop}" -l "sluice.dev/mirror=$1,app.kubernetes.io/managed-by=sluice" \
    --field-selector=status.phase=Running -o 'jsonpath={.items[*].metadata.name}' | cut -d' ' -f1
}

# lsn_at_least A B: is log position A not before B?
lsn_at_least() {
  [ -n "$1" ] && [ -n "$2" ] && [ $(((16#${1%/*} << 32) + 16#${1#*/})) -ge $(((16#${2%/*} << 32) + 16#${2#*/})) ]
}
applied_reached() { lsn_at_least "$(mirror_field "$1" .status.position.applied)" "$2"; }
# wait_for_mirror NAME SECONDS: until everything that the source has committed by now is on the target
wait_for_mirror() {
  local position
  position=$(source_sql 'SELECT pg_current_wal_insert_lsn()')
  # one more commit after that position, which changes no content: the stream has something to pass it with
  source_sql 'UPDATE customers SET name = name WHERE id = (SELECT max(id) FROM customers)'
  wait_until "$2" "Mirror $1 applied everything up to $position" applied_reached "$1" "$position"
}

# The epoch counts the workers that took the stream over: a worker that came after another has a higher one.
streams_in_epoch_after() { [ "$(mirror_field "$1" .status.worker.epoch)" -gt "$2" ] && [ "$(mirror_condition "$1" Streaming)" = True ]; }

# kill_worker NAME: signal 9, no chance to tidy up. On our own node that is the process; elsewhere the pod, at once.
kill_worker() {
  local ns=${SHOP_NAMESPACE:-shop} pod uid process killed=
  pod=$(worker_pod "$1")
  [ -n "$pod" ] || return 1
  if [ "${CLUSTER:-local}" != local ]; then
    kubectl delete pod "$pod" -n "$ns" --grace-period=0 --force >/dev/null 2>&1
    return
  fi
  uid=$(kubectl get pod "$pod" -n "$ns" -o 'jsonpath={.metadata.uid}')
  for process in /proc/[0-9]*; do
    if grep -qs "/pod$uid/" "$process/cgroup" && tr '\0' ' ' 2>/dev/null < "$process/cmdline" | grep -q 'sluice worker'; then
      kill -KILL "${process#/proc/}" && killed=yes
    fi
  done
  [ -n "$killed" ]
}

# ---------------------------------------------------------------- every row, both sides
# row_queries TABLE: two queries, a line each. The first adds up hashes of whole rows, in any order: the number of rows, and a
# digest of the sums of two 64-bit hashes. The second is a COPY of one line per row, its key and its MD5, in the order of the
# key. Columns and key are the source's. (Adding up MD5s would take three times as long: halves of them become numbers slowly.
# Hashes of text are the same in all versions of PostgreSQL: its hash partitions rest on them.)
row_queries() {
  source_psql -v "table=$1" -f - <<'SQL'
WITH shape AS (
  SELECT (SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute
          WHERE attrelid = :'table'::regclass AND attnum > 0 AND NOT attisdropped) AS columns,
         (SELECT string_agg(quote_ident(attname), ', ' ORDER BY array_position(indkey::int2[], attnum)) FROM pg_index
          JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey) WHERE indrelid = :'table'::regclass AND indisprimary) AS key)
SELECT format('SELECT count(*), md5(concat_ws('' '', sum(hashtextextended(line, 0)), sum(hashtextextended(line, 1)))) '
              'FROM (SELECT ROW(%s)::text AS line FROM %s OFFSET 0) AS rows', columns, :'table') FROM shape
UNION ALL
SELECT format('COPY (SELECT concat_ws('':'', %s), md5(ROW(%s)::text) FROM %s ORDER BY %1$s) TO STDOUT', key, columns, :'table') FROM shape
SQL
}
# answer PSQL QUERY: text forms depend on the session, so the session is fixed
answer() {
  printf '%s\n' "SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; SET IntervalStyle = 'postgres'; SET extra_float_digits = 1; SET bytea_output = 'hex';" "$2;" | "$1" -f -
}
# ask_both QUERY FOLDER: what each side answers, asked at the same time, into FOLDER
ask_both() {
  local rc=0 source
  answer source_psql "$1" > "$2/source" & source=$!
  answer target_psql "$1" > "$2/target" || rc=1
  wait "$source" || rc=1
  return $rc
}
# compare_table TABLE: prints rows and digest; when the sides differ, the first rows that do, and fails
compare_table() {
  local table=$1 queries rows digest dir rc=1
  dir=$(mktemp -d)
  # each step is checked by hand: two sides that could not be read are not equal
  if ! queries=$(row_queries "$table") || ! ask_both "${queries%%$'\n'*}" "$dir"; then
    echo "$table could not be read"
  else
    IFS='|' read -r rows digest < "$dir/source" || true
    if ! [ "${rows:-0}" -gt 0 ]; then
      echo "$table is empty in the source: that proves nothing"
    elif cmp -s "$dir/source" "$dir/target"; then
      printf '%-12s %9d rows  digest %s\n' "$table" "$rows" "$digest"
      rc=0
    else
      printf '%-12s DIFFERS: %d rows in the source, %d in the target; first differences (< source, > target):\n' \
        "$table" "$rows" "$(cut -d'|' -f1 "$dir/target")"
      # now every row's digest is worth the way here
      ask_both "${queries#*$'\n'}" "$dir" || echo "its rows could not be read"
      diff "$dir/source" "$dir/target" | head -20 || true
    fi
  fi
  rm -rf "$dir"
  return $rc
}
compare_all() {
  local table rc=0
  for table in "${MIRRORED[@]}"; do compare_table "$table" || rc=1; done
  return $rc
}

#!/usr/bin/env bash
# e2e.sh - the end-to-end suite: chart, manifests, crashes, upgrade and removal on a one-node cluster of its own.
# Prints one line per check, PASS or FAIL, and stops at the first FAIL with the state of things.
#
#   E2E_SEED=n      repeats the random moments of an earlier run
#   E2E_KEEP=1      leaves the cluster up, to look around
#   CUSTOMERS=n     size of the shop (orders are twice, order items four times as many)
#
# Every namespace enforces the restricted pod security standard; the operator has the rights of its chart, no more.
set -euo pipefail
# shellcheck source=e2e/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=e2e/demo/install.sh
. "$REPO/e2e/demo/install.sh"
# shellcheck source=e2e/demo/shop.sh
. "$REPO/e2e/demo/shop.sh"

CUSTOMERS=${CUSTOMERS:-400000}
SEED=${E2E_SEED:-$(date +%s)}
MIRROR=shop-to-warehouse
export SHOP_NAMESPACE=shop
SECOND=shop-two

# ---------------------------------------------------------------- checks
# check WHAT CMD...: CMD in a shell of its own that ends at the first error
check() {
  local what=$1 begin=$SECONDS log rc; shift
  log=$(mktemp)
  set +e
  (set -e; "$@") >"$log" 2>&1
  rc=$?
  set -e
  if [ $rc = 0 ]; then
    echo "PASS $what ($((SECONDS - begin)) s)"
    rm -f "$log"
  else
    cat "$log" >&2
    rm -f "$log"
    diagnose
    echo "FAIL $what ($((SECONDS - begin)) s, exit $rc, E2E_SEED=$SEED)"
    exit 1
  fi
}
expect() {   # WHAT GOT WANTED
  [ "$2" = "$3" ] || { echo "$1: got '$2', expected '$3'"; return 1; }
}

# ---------------------------------------------------------------- the cluster
# A number that no other run holds: runs of two checkouts do not meet.
take_cluster() {
  local id
  for id in {41..49}; do
    exec 8>"$SLUICE_CACHE/cluster-$id.lock"
    if flock -n 8; then export K8S_ID=$id; return; fi
  done
  die "clusters 41 to 49 are all in use"
}
release_cluster() {
  local rc=$?
  if [ -n "${E2E_KEEP:-}" ]; then say "cluster $K8S_ID is left up: eval \"\$(K8S_ID=$K8S_ID e2e/cluster/cluster.sh env)\""
  else local_cluster wipe; fi
  exit $rc
}
load_images() {
  TAG=$(binary_tag)
  # shellcheck disable=SC2046  # one path per line, without spaces
  local_cluster load $(sluice_archive "$TAG") $(sluice_archive "$TAG-next") $(postgres_archives)
}
# Every object of the cluster but those that come and go by themselves.
all_objects() {
  local kind
  for kind in $(kubectl api-resources --verbs=list -o name | grep -vE '^(events|leases|endpoints|componentstatuses)(\.|$)|metrics.k8s.io'); do
    kubectl get "$kind" -A --ignore-not-found -o 'jsonpath={range .items[*]}{.kind}{" "}{.metadata.namespace}{" "}{.metadata.name}{"\n"}{end}' 2>/dev/null || true
  done | sort -u
}

# ---------------------------------------------------------------- installation
chart_is_valid() {   # strictly: the API server refuses fields it does not know
  helm template sluice "$REPO/charts/sluice" -n "$SYSTEM_NAMESPACE" --kube-version 1.34.0 |
    kubectl apply --server-side --dry-run=server --validate=strict -f -
}
operator_is_up() {
  install_sluice localhost/sluice "$TAG"
  expect "ready replicas" "$(kubectl get deployment sluice-operator -n $SYSTEM_NAMESPACE -o 'jsonpath={.status.readyReplicas}')" 2
}
operator_answers() {
  local pod path
  pod=$(kubectl get pods -n $SYSTEM_NAMESPACE -l app.kubernetes.io/name=sluice -o 'jsonpath={.items[0].metadata.name}')
  for path in livez readyz metrics; do kubectl get --raw "/api/v1/namespaces/$SYSTEM_NAMESPACE/pods/$pod:8080/proxy/$path" > /dev/null; done
  kubectl get --raw "/api/v1/namespaces/$SYSTEM_NAMESPACE/pods/$pod:8080/proxy/metrics" | grep -q '^sluice_operator_'
}

# ---------------------------------------------------------------- crashes
# The copy is slowed down by little CPU and small ranges, so that a kill can hit it.
apply_mirror() {
  kubectl apply -f "$SAMPLES"
  kubectl patch mirror $MIRROR -n shop --type merge -p '{"spec": {
    "snapshot": {"rowsPerPartition": 20000, "tablesInParallel": 1, "workersPerTable": 1},
    "worker": {"resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"cpu": "400m", "memory": "512Mi"}}}}}'
}
claimed_after() { [ "$(mirror_field $MIRROR .status.worker.epoch)" -gt "$1" ] 2>/dev/null; }
is_streaming() { [ "$(mirror_condition $MIRROR Streaming)" = True ]; }
is_copying() { [ "$(mirror_field $MIRROR .status.rowsCopied)" -gt 0 ] 2>/dev/null && [ "$(mirror_condition $MIRROR SnapshotCompleted)" != True ]; }
epoch() { local e; e=$(mirror_field $MIRROR .status.worker.epoch); echo "${e:-0}"; }
a_moment() { sleep "$(($1 / 1000)).$(printf %03d $(($1 % 1000)))"; }   # so many milliseconds

kill_while_copying() {   # that many milliseconds after it began
  local before
  wait_until 120 "rows are being copied" is_copying
  before=$(epoch)
  a_moment "$1"
  if ! is_copying; then echo "the copy was done before it could be killed: more CUSTOMERS or less CPU"; return 1; fi
  kill_worker $MIRROR
  wait_until 120 "another worker has taken over" claimed_after "$before"
}
kill_while_streaming() {   # that many milliseconds from now
  local before
  before=$(epoch)
  a_moment "$1"
  kill_worker $MIRROR
  wait_until 120 "another worker streams" streams_in_epoch_after $MIRROR "$before"
}
has_streamed() { [ "$(mirror_field $MIRROR .status.rowsStreamed)" -gt "$1" ] 2>/dev/null; }
streams_on() {   # rows arrive that were not there before
  local rows
  rows=$(target_sql 'SELECT max(id) FROM customers')
  wait_until 60 "rows newer than customer $rows arrive" is_true target_sql "SELECT max(id) > $rows FROM customers"
}
contents_are_equal() {
  stop_writer
  wait_for_mirror $MIRROR 180
  compare_all
}
# Another pod made of the worker's own: the later claim wins, the other one's commits fail.
a_second_worker_is_fenced() {
  local pod before
  pod=$(worker_pod $MIRROR)
  before=$(epoch)
  kubectl get pod "$pod" -n shop -o json |
    jq '{apiVersion, kind, metadata: {name: "impostor", labels: {app: "impostor"}}, spec: (.spec | del(.nodeName) | .restartPolicy = "Never")}' |
    kubectl apply -n shop -f -
  wait_until 60 "the impostor has ended" impostor_ended
  kubectl delete pod impostor -n shop --wait=false
  wait_until 120 "the worker has taken the stream back" streams_in_epoch_after $MIRROR "$before"
  streams_on
}
impostor_ended() { case $(kubectl get pod impostor -n shop -o 'jsonpath={.status.phase}') in Failed | Succeeded) ;; *) return 1;; esac; }

# ---------------------------------------------------------------- a life without restarts
worker_identity() {
  kubectl get pods -n "$SHOP_NAMESPACE" -l "sluice.dev/mirror=$MIRROR" -o 'jsonpath={range .items[*]}{.metadata.uid}{" "}{.status.containerStatuses[0].restartCount}{" "}{end}'
}
is_suspended() { [ "$(mirror_condition $MIRROR Suspended)" = True ] && [ "$(mirror_condition $MIRROR Streaming)" = False ]; }
suspend_holds_and_resume_goes_on() {
  local worker rows written
  worker=$(worker_identity)
  kubectl patch mirror $MIRROR -n shop --type merge -p '{"spec": {"suspend": true}}'
  wait_until 30 "suspended" is_suspended
  expect "Ready of a suspended Mirror" "$(mirror_condition $MIRROR Ready)" True
  rows=$(target_sql 'SELECT max(id) FROM customers')
  written=$(source_sql 'SELECT max(id) FROM customers')
  wait_until 60 "the shop goes on" is_true source_sql "SELECT max(id) > $written + 50 FROM customers"
  expect "newest customer in the target while suspended" "$(target_sql 'SELECT max(id) FROM customers')" "$rows"
  kubectl patch mirror $MIRROR -n shop --type merge -p '{"spec": {"suspend": null}}'
  wait_until 30 "streaming" is_streaming
  streams_on
  expect "worker (uid, restarts)" "$(worker_identity)" "$worker"
}
# Wrong rows go, the worker stays, and the Mirror is ready all the time.
request_state() { mirror_field $MIRROR .status.request.state; }
has_succeeded() { [ "$(request_state)" = Succeeded ]; }
a_table_is_copied_again() {
  local worker
  worker=$(worker_identity)
  target_sql 'INSERT INTO orders SELECT -id, customer_id, status, total, weight, placed_at, due FROM orders ORDER BY id LIMIT 100'
  kubectl patch mirror $MIRROR -n shop --type merge -p '{"spec": {"request": {"id": "e2e-1", "action": "Resync", "tables": ["public.orders"]}}}'
  wait_until 180 "the request has succeeded" has_succeeded
  expect "Ready" "$(mirror_condition $MIRROR Ready)" True
  expect "orders that are not in the shop" "$(target_sql 'SELECT count(*) FROM orders WHERE id < 0')" 0
  streams_on
  expect "worker (uid, restarts)" "$(worker_identity)" "$worker"
}
# The old password must be of no use any more: sessions are ended, so that the worker has to sign in again.
password_is_rotated() {
  local worker side end="SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'sluice'"
  worker=$(worker_identity)
  for side in source_sql target_sql; do $side "ALTER ROLE sluice PASSWORD 'rotated'"; done
  for side in shop-db warehouse-db; do kubectl patch secret $side -n shop --type merge -p '{"stringData": {"password": "rotated"}}'; done
  for side in source_sql target_sql; do $side "$end"; done
  wait_until 150 "streaming with the new password" streams_on
  wait_until 60 "the Mirror says so" is_streaming
  expect "worker (uid, restarts)" "$(worker_identity)" "$worker"
}
generation_is_observed() {
  local pair
  pair=$(mirror_field $MIRROR '.metadata.generation}{" "}{.status.observedGeneration')
  [ "${pair% *}" = "${pair#* }" ]
}
# A new image and a new rendering of everything: workers are left alone, and a hot change still reaches them.
upgrade_restarts_no_worker() {
  local worker
  worker=$(worker_identity)
  install_sluice localhost/sluice "$TAG-next" --set operator.release=next --set operator.log.level=debug \
    --set worker.imagePullPolicy=Never --set operator.podAnnotations.e2e=next
  expect "image of the operator" "$(kubectl get pods -n $SYSTEM_NAMESPACE -l app.kubernetes.io/name=sluice --field-selector=status.phase=Running \
    -o 'jsonpath={.items[*].spec.containers[0].image}' | tr ' ' '\n' | sort -u)" "localhost/sluice:$TAG-next"
  kubectl patch mirror $MIRROR -n shop --type merge -p '{"spec": {"stream": {"maxDelayMilliseconds": 20}}}'
  wait_until 60 "the new operator has seen the change" generation_is_observed
  streams_on
  expect "worker (uid, restarts)" "$(worker_identity)" "$worker"
  expect "image of the worker" "$(kubectl get pod "$(worker_pod $MIRROR)" -n shop -o 'jsonpath={.spec.containers[0].image}')" "localhost/sluice:$TAG"
}
new_resources_restart_once_with_the_new_image() {
  local before
  before=$(epoch)
  kubectl patch mirror $MIRROR -n shop --type merge -p '{"spec": {"worker": {"resources": {"limits": {"cpu": "1", "memory": "600Mi"}}}}}'
  wait_until 120 "another worker streams" streams_in_epoch_after $MIRROR "$before"
  expect "image of the worker" "$(kubectl get pod "$(worker_pod $MIRROR)" -n shop -o 'jsonpath={.spec.containers[0].image}')" "localhost/sluice:$TAG-next"
}

# Under a real Deployment controller, which writes to the same Deployment: nobody fights.
edits_are_put_right() {
  local worker before generation
  worker=$(worker_identity)
  kubectl patch configmap $MIRROR-worker -n shop --type merge -p '{"data": {"desired.json": "{}"}}'
  wait_until 10 "the document is back" document_is_whole
  streams_on
  expect "worker (uid, restarts)" "$(worker_identity)" "$worker"
  before=$(epoch)
  kubectl scale deployment $MIRROR-worker -n shop --replicas=0
  wait_until 120 "another worker streams" streams_in_epoch_after $MIRROR "$before"
  generation=$(deployment_generation)
  streams_on
  expect "generation of the Deployment" "$(deployment_generation)" "$generation"
}
document_is_whole() { kubectl get configmap $MIRROR-worker -n shop -o 'jsonpath={.data.desired\.json}' | jq -e .mirror.uid; }
deployment_generation() { kubectl get deployment $MIRROR-worker -n shop -o 'jsonpath={.metadata.generation}'; }

# ---------------------------------------------------------------- the end
nothing_is_left_on_the_source() {   # of slot $1 and publication $2
  expect slots "$(source_sql "SELECT count(*) FROM pg_replication_slots WHERE slot_name = '$1'")" 0
  expect publications "$(source_sql "SELECT count(*) FROM pg_publication WHERE pubname = '$2'")" 0
}
mirror_is_deleted() {
  local slot publication rows
  slot=$(mirror_field $MIRROR .status.slot) publication=$(mirror_field $MIRROR .status.publication)
  expect "slots before" "$(source_sql "SELECT count(*) FROM pg_replication_slots WHERE slot_name = '$slot'")" 1
  rows=$(target_sql 'SELECT count(*) FROM customers')
  kubectl delete mirror $MIRROR -n shop --timeout=90s
  nothing_is_left_on_the_source "$slot" "$publication"
  wait_until 60 "its children are gone" no_children shop
  expect "rows in the target" "$(target_sql 'SELECT count(*) FROM customers')" "$rows"
  kubectl delete source,target --all -n shop --timeout=60s
}
no_children() { [ -z "$(kubectl get deployments,replicasets,pods,configmaps,networkpolicies -n "$1" -l app.kubernetes.io/managed-by=sluice -o name)" ]; }
# The same shop, mirrored once more from a namespace of its own into a database of its own.
second_mirror_streams() {
  target_sql 'CREATE DATABASE warehouse_two OWNER sluice'
  new_namespace $SECOND
  sed -e "s/namespace: shop/namespace: $SECOND/; s/password: .*/password: rotated/; s/database: warehouse/database: warehouse_two/" \
    -e 's/host: \(.*\)/host: \1.shop/' "$SAMPLES"/*.yaml | sed 's/^apiVersion:/---\n&/' | kubectl apply -f -
  SHOP_NAMESPACE=$SECOND wait_until 180 "the second Mirror streams" is_streaming_in_second
}
is_streaming_in_second() { [ "$(SHOP_NAMESPACE=$SECOND mirror_condition $MIRROR Streaming)" = True ]; }
# With rights in two namespaces only: those in the second go with it, and must not go first.
operator_is_narrowed() {
  local worker
  worker=$(SHOP_NAMESPACE=$SECOND worker_identity)
  install_sluice localhost/sluice "$TAG-next" --set "watchNamespaces={shop,$SECOND}"
  wait_until 60 "the rights in $SECOND are held" rights_are_held
  expect "worker (uid, restarts)" "$(SHOP_NAMESPACE=$SECOND worker_identity)" "$worker"
}
rights_are_held() { [ "$(kubectl get rolebinding sluice-operator-namespaced -n $SECOND -o 'jsonpath={.metadata.finalizers[0]}')" = sluice.dev/in-use ]; }
namespace_is_deleted_whole() {
  local slot publication
  slot=$(SHOP_NAMESPACE=$SECOND mirror_field $MIRROR .status.slot) publication=$(SHOP_NAMESPACE=$SECOND mirror_field $MIRROR .status.publication)
  expect "slots before" "$(source_sql "SELECT count(*) FROM pg_replication_slots WHERE slot_name = '$slot'")" 1
  kubectl delete namespace $SECOND --timeout=120s
  nothing_is_left_on_the_source "$slot" "$publication"
}
uninstall_leaves_nothing() {
  kubectl delete namespace shop --timeout=120s
  helm uninstall sluice -n $SYSTEM_NAMESPACE --wait
  remove_crds                                  # kept by the chart on purpose: with them would go every Mirror
  kubectl delete namespace $SYSTEM_NAMESPACE --timeout=120s
  all_objects > "$STATE/after"
  diff "$STATE/before" "$STATE/after"
}

main() {
  local i
  take_cluster
  STATE=$(mktemp -d)
  RANDOM=$((SEED % 32768))
  say "cluster $K8S_ID, E2E_SEED=$SEED"
  timed "release binary" build_binary
  trap release_cluster EXIT
  local_cluster wipe
  timed "one-node cluster" local_cluster up
  use_local_cluster
  TAG=$(binary_tag)
  step "images" load_images
  all_objects > "$STATE/before"
  new_namespace $SYSTEM_NAMESPACE

  check "the API server takes the chart, strictly" chart_is_valid
  check "the chart installs; two operators are ready" operator_is_up
  check "the operator answers livez, readyz and metrics" operator_answers
  check "two databases start, restricted" start_databases
  check "the shop is filled" fill_shop "$CUSTOMERS"
  check "writers write" start_writer
  check "the manifests of the demo are taken" apply_mirror
  for i in 1 2; do check "kill -9 while copying, $i of 2" kill_while_copying $((RANDOM % 1000)); done
  check "the copy completes and streaming begins" wait_until 300 "streaming" is_streaming
  for i in 1 2 3; do check "kill -9 while streaming, $i of 3" kill_while_streaming $((RANDOM % 3000)); done
  check "after five kills every row is equal" contents_are_equal
  check "writers write again" start_writer
  check "suspend holds, resume goes on, no restart" suspend_holds_and_resume_goes_on
  check "a table is copied again by request, no restart" a_table_is_copied_again
  check "a rotated password leads to a reconnect, no restart" password_is_rotated
  check "helm upgrade to another image and template restarts no worker" upgrade_restarts_no_worker
  check "a change of resources restarts it once, with the new image" new_resources_restart_once_with_the_new_image
  check "what somebody edits by hand is put right" edits_are_put_right
  check "of two workers with one identity one writes" a_second_worker_is_fenced
  check "after all that every row is equal" contents_are_equal
  check "a deleted Mirror leaves no slot, no publication, no child" mirror_is_deleted
  check "a second Mirror streams from a namespace of its own" second_mirror_streams
  check "helm upgrade narrows the operator's rights to two namespaces" operator_is_narrowed
  check "its namespace deleted whole leaves no slot" namespace_is_deleted_whole
  check "uninstall leaves nothing" uninstall_leaves_nothing
}
main "$@"

#!/usr/bin/env bash
# demo.sh up|down - a mirror between two PostgreSQL databases on a real cluster, from nothing to "identical".
#
#   CLUSTER=local     a one-node cluster made here (default; needs root)
#   CLUSTER=kind      a kind cluster named sluice-demo (needs kind and Docker)
#   CLUSTER=current   the current kube context; IMAGE=repository/sluice:tag names an image it can pull
#   CUSTOMERS=100000  how many customers the shop has; orders are twice, order items four times as many
#   POSTGRES_IMAGE    another PostgreSQL image for both databases, such as postgres:17
#   K8S_ID=11         number of the local cluster
set -euo pipefail
# shellcheck source=e2e/lib.sh
. "$(dirname "$0")/../lib.sh"
# shellcheck source=e2e/demo/install.sh
. "$REPO/e2e/demo/install.sh"
# shellcheck source=e2e/demo/shop.sh
. "$REPO/e2e/demo/shop.sh"

CLUSTER=${CLUSTER:-local}
CUSTOMERS=${CUSTOMERS:-100000}
MIRROR=shop-to-warehouse
export SHOP_NAMESPACE=shop K8S_ID=${K8S_ID:-11}
# what it takes: a cluster and images made here, images alone, or only helm
case $CLUSTER in
  local) NEEDS=();;
  kind) NEEDS=(packages postgres tools);;
  current) NEEDS=(tools) POSTGRES_IMAGE=${POSTGRES_IMAGE:-postgres:17};;
  *) die "CLUSTER is '$CLUSTER': local, kind or current";;
esac

# ---------------------------------------------------------------- a cluster with Sluice's image
prepare_local() {
  REPOSITORY=localhost/sluice
  build
  timed "one-node cluster" local_cluster up
  use_local_cluster
  # shellcheck disable=SC2046  # one path per line, without spaces
  step "images into the node" local_cluster load $(sluice_archive "$TAG") $(postgres_archives)
}
prepare_kind() {
  REPOSITORY=localhost/sluice
  if ! command -v kind >/dev/null || ! docker info >/dev/null 2>&1; then die "CLUSTER=kind needs kind and a running Docker"; fi
  build
  kind get clusters 2>/dev/null | grep -qx sluice-demo || timed "kind cluster" kind create cluster --name sluice-demo
  kubectl config use-context kind-sluice-demo >/dev/null
  local archive
  for archive in $(sluice_archive "$TAG") $(postgres_archives); do
    step "image into the node" kind load image-archive "$archive" --name sluice-demo
  done
}
prepare_current() {
  command -v kubectl >/dev/null || die "CLUSTER=current needs kubectl and a context that it uses"
  [[ ${IMAGE:-} =~ ^[^@]+:[^:/@]+$ ]] || die "CLUSTER=current needs IMAGE=repository/sluice:tag, an image that the cluster can pull"
  REPOSITORY=${IMAGE%:*} TAG=${IMAGE##*:}
  say "using the context $(kubectl config current-context)"
}
build() {
  timed "release binary" build_binary
  TAG=$(binary_tag)
  step "image localhost/sluice:$TAG" sluice_archive "$TAG"
  step "images of PostgreSQL" postgres_archives
}

# What an earlier run left is removed first; what is not the demo's is left alone.
start_over() {
  local namespace
  for namespace in "$SHOP_NAMESPACE" "$SYSTEM_NAMESPACE"; do
    if kubectl get namespace "$namespace" >/dev/null 2>&1 && ! is_ours "$namespace"; then
      die "namespace $namespace is there already and is not the demo's: nothing was changed"
    fi
  done
  if ! crds_are_ours; then die "Sluice is installed in this cluster already, in another namespace: nothing was changed"; fi
  if kubectl get namespace "$SHOP_NAMESPACE" >/dev/null 2>&1; then step "removing the last demo" remove_shop; fi
  for namespace in "$SHOP_NAMESPACE" "$SYSTEM_NAMESPACE"; do
    new_namespace "$namespace"
    kubectl label namespace "$namespace" sluice.dev/demo=true --overwrite >/dev/null
  done
}
is_ours() { [ "$(kubectl get namespace "$1" -o 'jsonpath={.metadata.labels.sluice\.dev/demo}' 2>/dev/null)" = true ]; }
# The chart leaves them in place; what says so is the release that they belong to.
crds_are_ours() {
  [ -z "$(kubectl get crd mirrors.sluice.dev --ignore-not-found -o name)" ] ||
    [ "$(kubectl get crd mirrors.sluice.dev -o 'jsonpath={.metadata.annotations.meta\.helm\.sh/release-namespace}')" = "$SYSTEM_NAMESPACE" ]
}
remove_shop() {
  kubectl delete mirrors --all -n "$SHOP_NAMESPACE" --timeout=120s
  kubectl delete namespace "$SHOP_NAMESPACE" --timeout=120s
}

# ---------------------------------------------------------------- the show
# show_until SECONDS CMD...: prints `kubectl get cdc` each time it changes, until CMD succeeds
show_until() {
  local deadline=$((SECONDS + $1)) view last=; shift
  while true; do
    view=$(kubectl get cdc -n "$SHOP_NAMESPACE" 2>/dev/null | sed -E 's/ +[0-9hms]+$//' || true)
    view+=$'\n'"rows copied: $(mirror_field $MIRROR .status.rowsCopied)   rows streamed: $(mirror_field $MIRROR .status.rowsStreamed)"
    if [ "$view" != "$last" ]; then printf '\n[%3d s]\n%s\n' "$SECONDS" "$view"; last=$view; fi
    ! "$@" || return 0
    [ $SECONDS -lt $deadline ] || { say "not in time: $*"; return 1; }
    sleep 0.5
  done
}
is_streaming() { [ "$(mirror_condition $MIRROR Streaming)" = True ]; }
has_streamed() { [ "$(mirror_field $MIRROR .status.rowsStreamed)" -gt "$1" ] 2>/dev/null; }

show_crash() {
  local epoch streamed
  streamed=$(mirror_field $MIRROR .status.rowsStreamed)
  show_until 60 has_streamed "$((${streamed:-0} + 100))"
  epoch=$(mirror_field $MIRROR .status.worker.epoch)
  printf '\n'
  say "kill -9 of the worker in mid-stream (pod $(worker_pod $MIRROR), epoch $epoch)"
  kill_worker $MIRROR
  show_until 120 streams_in_epoch_after $MIRROR "$epoch"
}

look_around() {
  local environment=''
  [ "$CLUSTER" != local ] || environment="  eval \"\$(K8S_ID=$K8S_ID e2e/cluster/cluster.sh env)\"    # kubectl for this cluster"$'\n'
  cat <<TEXT

Look around:
$environment  kubectl get cdc -n shop
  kubectl describe mirror $MIRROR -n shop
  kubectl logs -n shop deploy/$MIRROR-worker
  kubectl logs -n $SYSTEM_NAMESPACE deploy/sluice-operator
  kubectl exec -it -n shop shop-db-0 -- psql -U postgres shop              # the source
  kubectl exec -it -n shop warehouse-db-0 -- psql -U postgres warehouse    # the target
Remove everything:
  make demo-down$([ "$CLUSTER" = local ] || echo " CLUSTER=$CLUSTER")
TEXT
}

up() {
  timed "what the demo needs" "$REPO/e2e/deps.sh" "${NEEDS[@]}"
  "prepare_$CLUSTER"
  start_over
  trap '[ $? = 0 ] || diagnose' EXIT
  timed "Sluice $TAG from its chart" install_sluice "$REPOSITORY" "$TAG"
  step "two PostgreSQL databases" start_databases
  step "$((7 * CUSTOMERS)) rows in the shop" fill_shop "$CUSTOMERS"
  step "writers that insert, update and delete from now on" start_writer
  say "kubectl apply -f config/samples/demo/"
  kubectl apply -f "$SAMPLES"
  show_until 600 is_streaming
  show_crash
  step "the writers stop" stop_writer
  timed "everything they wrote reaches the target" wait_for_mirror $MIRROR 180
  timed "comparison of every row" compare_all
  say "they made $(source_sql 'SELECT sum(rounds) FROM writer_log') transactions; the whole demo took $SECONDS s"
  printf '\nsource and target are identical\n'
  look_around
}

down() {
  case $CLUSTER in
    local) local_cluster wipe; say "cluster $K8S_ID is gone; the cache stays in $SLUICE_CACHE";;
    kind) kind delete cluster --name sluice-demo;;
    current)
      if is_ours "$SHOP_NAMESPACE"; then timed "databases and Mirror" remove_shop; fi
      if is_ours "$SYSTEM_NAMESPACE"; then
        helm uninstall sluice -n "$SYSTEM_NAMESPACE" --ignore-not-found --wait
        if [ -z "$(kubectl get cdc -A -o name)" ]; then remove_crds; else say "other namespaces hold resources of Sluice: its CRDs stay"; fi
        kubectl delete namespace "$SYSTEM_NAMESPACE" --timeout=120s
      fi;;
  esac
}

case ${1:-} in
  up | down) "$1";;
  *) sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2;;
esac

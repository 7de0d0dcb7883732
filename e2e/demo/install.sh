# Where Sluice runs and how it gets there: the cluster, the images, the chart. Shared by the demo and the end-to-end
# tests. Sourced; expects lib.sh.
# shellcheck shell=bash

SYSTEM_NAMESPACE=sluice-system
KINDS=(mirrors sources targets)

# Cargo's profile of the binary: the end-to-end tests take the one that the other tests have built already.
SLUICE_PROFILE=${SLUICE_PROFILE:-release}
BINARY=$CARGO_TARGET_DIR/${SLUICE_PROFILE/#dev/debug}/sluice
build_binary() { cd "$REPO" && cargo build --profile "$SLUICE_PROFILE" --locked; }
# A tag that changes with the binary: a pod never runs an older image of the same name.
binary_tag() { echo "dev-$(sha256sum < "$BINARY" | cut -c1-10)"; }
sluice_archive() { "$REPO/e2e/images/build.sh" sluice "$1" "$BINARY"; }
postgres_archives() { "$REPO/e2e/images/build.sh" postgres 15 && "$REPO/e2e/images/build.sh" postgres 17; }

local_cluster() { "$REPO/e2e/cluster/cluster.sh" "$@"; }
use_local_cluster() { eval "$(local_cluster env)"; }

helm() { "$SLUICE_CACHE/bin/helm" "$@"; }
# install_sluice REPOSITORY TAG [HELM ARGS...]
install_sluice() {
  local repository=$1 tag=$2; shift 2
  helm upgrade --install sluice "$REPO/charts/sluice" -n "$SYSTEM_NAMESPACE" --create-namespace --wait --timeout 3m \
    --set "image.repository=$repository" --set "image.tag=$tag" --set image.pullPolicy=IfNotPresent "$@"
  kubectl api-resources --cached=false >/dev/null         # kubectl would not know the category cdc for ten minutes
}
remove_crds() {
  local kind
  for kind in "${KINDS[@]}"; do kubectl delete crd "$kind.sluice.dev" --ignore-not-found --timeout=60s; done
}

# what a person would look at first
diagnose() {
  local ns pod
  {
    echo "---------------------------------------- what went wrong: the state of things"
    kubectl get cdc,pods -A -o wide
    for ns in "${SHOP_NAMESPACE:-shop}" "$SYSTEM_NAMESPACE"; do
      kubectl get events -n "$ns" --sort-by=.lastTimestamp | tail -40
      for pod in $(kubectl get pods -n "$ns" -o name); do
        kubectl describe -n "$ns" "$pod" | sed -n '/^Containers:/,$p' | head -60
        echo "--- $ns $pod: log"; kubectl logs -n "$ns" "$pod" --tail=60
        echo "--- $ns $pod: log before its last restart"; kubectl logs -n "$ns" "$pod" --tail=40 --previous
      done
    done
    kubectl describe cdc -A
  } >&2 2>&1 || true
}

#!/usr/bin/env bash
# Checks the chart without a cluster: lint, render in several shapes, assertions on what was rendered.
# Needs helm, promtool and python3 with PyYAML. Whether an API server takes it all is tested end to end.
set -euo pipefail
cd "$(dirname "$0")"

helm="${HELM:-$(command -v helm || true)}"
[ -n "$helm" ] || helm="${SLUICE_CACHE:-/var/cache/sluice}/bin/helm"
[ -x "$helm" ] || { echo "helm not found: set HELM or run make deps" >&2; exit 1; }
promtool="${SLUICE_CACHE:-/var/cache/sluice}/bin/promtool"
[ -x "$promtool" ] || promtool="$(command -v promtool)" || { echo "promtool not found: run make deps" >&2; exit 1; }

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# A helm built without version stamps thinks of an old Kubernetes: say which one is meant.
render() { # name, arguments…
  local name="$1"; shift
  "$helm" template sluice sluice --namespace sluice-system --kube-version 1.33.0 "$@" >"$work/$name.yaml"
}

refuse() { # what, arguments…
  local what="$1"; shift
  if "$helm" template sluice sluice --namespace sluice-system --kube-version 1.33.0 "$@" >/dev/null 2>&1; then
    echo "accepted, but should be refused: $what" >&2; exit 1
  fi
}

"$helm" lint --quiet --strict --kube-version 1.33.0 sluice

render default
render scoped --set 'watchNamespaces={shop,dw}'
render minimal --set crds.enabled=false,rbac.aggregate=false,networkPolicy.enabled=false,podDisruptionBudget.enabled=false \
  --set deletionProtection.enabled=false,protectSecrets=false,worker.networkPolicies=false,operator.replicas=1,operator.leaderElection.enabled=false
render openshift --set podSecurityContext.runAsUser=null,podSecurityContext.runAsGroup=null
render boards --set monitoring.podMonitor.operator=true,monitoring.podMonitor.workers=true \
  --set monitoring.prometheusRule.enabled=true,monitoring.prometheusRule.labels.release=prometheus \
  --set monitoring.prometheusRule.thresholds.suspendedFor=2h --set monitoring.dashboard.enabled=true
render all --set monitoring.podMonitor.operator=true,monitoring.podMonitor.workers=true,monitoring.podMonitor.labels.team=data \
  --set image.repository=example/sluice,image.digest="sha256:$(printf '0%.0s' {1..64})",worker.image=example/worker:1,worker.imagePullPolicy=Always \
  --set 'imagePullSecrets[0].name=pull,operator.nodeSelector.disk=ssd,operator.priorityClassName=high,operator.release=r1' \
  --set 'operator.extraEnv[0].name=RUST_BACKTRACE,operator.extraEnv[0].value=1' \
  --set 'serviceAccount.annotations.a=b,operator.podAnnotations.a=b,operator.podLabels.a=b,fullnameOverride=cdc,crds.keep=false' \
  --set-json 'operator.tolerations=[{"operator":"Exists"}]' \
  --set-json 'operator.topologySpreadConstraints=[{"maxSkew":1,"topologyKey":"zone","whenUnsatisfiable":"ScheduleAnyway","labelSelector":{"matchLabels":{"app.kubernetes.io/name":"sluice"}}}]' \
  --set-json 'networkPolicy.metricsFrom=[]'

refuse "an unknown value" --set nonsense=true
refuse "an unknown value inside operator" --set operator.nonsense=true
refuse "a log format that does not exist" --set operator.log.format=xml
refuse "two replicas without leader election" --set operator.leaderElection.enabled=false
refuse "root" --set podSecurityContext.runAsUser=0
refuse "a namespace that is no name" --set 'watchNamespaces={*}'
refuse "a ServiceAccount of no name" --set serviceAccount.create=false
refuse "a threshold that does not exist" --set monitoring.prometheusRule.thresholds.nonsense=1
refuse "a threshold that is no duration" --set monitoring.prometheusRule.thresholds.notReadyFor=soon
refuse "a rule without its threshold" --set monitoring.prometheusRule.thresholds.lagSeconds=null
refuse "a label that is no text" --set monitoring.dashboard.labels.grafana_dashboard=1
refuse "a runbook URL without the alert's name" --set monitoring.prometheusRule.runbookUrl=https://example.com/runbooks

python3 check.py "$work"
mkdir "$work/monitoring"
python3 -B monitoring/check.py "$work/boards.yaml" "$work/monitoring" "$promtool"
if [ -d ../crds ]; then diff -r --exclude=.gitkeep ../crds sluice/crd-files || { echo "crds/ and charts/sluice/crd-files/ differ: run make crds" >&2; exit 1; }; fi
echo "chart: ok"

# The kustomize bases are rendered from the chart; they may not lag behind it.
HELM="$helm" ../config/check.sh

#!/usr/bin/env bash
# Renders the kustomize bases from the Helm chart, so that there is one source of truth:
#   config/crd, config/rbac, config/manager; config/default puts them together;
#   config/monitoring is a component to add to it. config/argocd is made from its health.lua.
# Usage: render.sh [folder to write to, this one by default]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
out="${1:-$here}"

helm="${HELM:-$(command -v helm || true)}"
[ -n "$helm" ] || helm="${SLUICE_CACHE:-/var/cache/sluice}/bin/helm"
[ -x "$helm" ] || { echo "helm not found: set HELM or run make deps" >&2; exit 1; }

# Without what is Helm's own: labels, annotation, source comments.
render() { # file to write, templates…
  local file="$1"; shift
  local shows=() template
  for template in "$@"; do shows+=(--show-only "templates/$template.yaml"); done
  mkdir -p "$(dirname "$file")"
  {
    echo "# Rendered from charts/sluice by config/render.sh; do not edit."
    "$helm" template sluice "$here/../charts/sluice" --namespace sluice-system --kube-version 1.33.0 \
      --set crds.keep=false,monitoring.podMonitor.operator=true,monitoring.podMonitor.workers=true \
      --set monitoring.prometheusRule.enabled=true,monitoring.dashboard.enabled=true "${shows[@]}" |
      sed -E -e '/^ *helm\.sh\/chart:/d' -e '/^ *app\.kubernetes\.io\/managed-by: Helm$/d' -e '/^# Source: /d'
  } >"$file"
}

render "$out/crd/crds.yaml" crds
render "$out/rbac/rbac.yaml" serviceaccount rbac
render "$out/manager/manager.yaml" deployment poddisruptionbudget networkpolicy deletion-protection
render "$out/monitoring/monitoring.yaml" podmonitor prometheusrule dashboard

mkdir -p "$out/argocd"
{
  echo "# Rendered from health.lua by config/render.sh; do not edit."
  printf '%s\n' "apiVersion: v1" "kind: ConfigMap" "metadata:" "  name: argocd-cm" "  namespace: argocd" "data:"
  for kind in Source Target Mirror; do
    echo "  resource.customizations.health.sluice.dev_$kind: |"
    sed -e 's/^/    /' -e 's/ *$//' "$here/argocd/health.lua"
  done
} >"$out/argocd/argocd-cm.yaml"

#!/usr/bin/env bash
# Fails when the kustomize bases differ from what the chart renders. With kubectl at hand, also builds them.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

"$here/render.sh" "$work"
for file in crd/crds.yaml rbac/rbac.yaml manager/manager.yaml monitoring/monitoring.yaml; do
  diff -u "$here/$file" "$work/$file" || { echo "config/$file is stale: run config/render.sh" >&2; exit 1; }
done
if command -v kubectl >/dev/null; then
  kubectl kustomize "$here/default" >"$work/all.yaml"
  grep -q '^kind: Deployment$' "$work/all.yaml"
  # As the book says it: the component is added to the base by a kustomization of one's own.
  mkdir "$work/mine"
  cat >"$work/mine/kustomization.yaml" <<END
resources: [$(realpath --relative-to "$work/mine" "$here/default")]
components: [$(realpath --relative-to "$work/mine" "$here/monitoring")]
END
  kubectl kustomize "$work/mine" >"$work/mine.yaml"
  grep -q '^kind: PrometheusRule$' "$work/mine.yaml"
fi
echo "config: ok"

#!/usr/bin/env bash
# Fails when the kustomize bases differ from what the chart renders, or when Argo CD's health script judges wrongly.
# With kubectl at hand, also builds the bases.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

"$here/render.sh" "$work"
for file in crd/crds.yaml rbac/rbac.yaml manager/manager.yaml monitoring/monitoring.yaml argocd/argocd-cm.yaml; do
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
  mkdir "$work/cd"
  cat >"$work/cd/kustomization.yaml" <<END
namespace: argocd
resources: [install.yaml]
components: [$(realpath --relative-to "$work/cd" "$here/argocd")]
END
  cat >"$work/cd/install.yaml" <<END
{apiVersion: v1, kind: ConfigMap, metadata: {name: argocd-cm, labels: {app.kubernetes.io/part-of: argocd}}, data: {url: "https://argocd.example"}}
END
  kubectl kustomize "$work/cd" >"$work/cd.yaml"
  python3 - "$work/cd.yaml" "$here/argocd/health.lua" <<'END'
import sys, yaml
made, script = yaml.safe_load(open(sys.argv[1])), open(sys.argv[2]).read()
health = {f"resource.customizations.health.sluice.dev_{kind}": script for kind in ("Source", "Target", "Mirror")}
assert made["data"] == {"url": "https://argocd.example"} | health, made["data"]
assert made["metadata"] == {"name": "argocd-cm", "namespace": "argocd", "labels": {"app.kubernetes.io/part-of": "argocd"}}, made["metadata"]
END
fi
python3 -B "$here/argocd/health_test.py"
echo "config: ok"

#!/usr/bin/env bash
# crds.sh - write what `sluice crds` prints into crds/, one file per kind, the same files into the chart, and render
# the kustomize bases from the chart again.
set -euo pipefail
cd "$(dirname "$0")/.."
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
cargo run --quiet --locked -- crds > "$new/all"
awk -v dir="$new" '
  function flush() { if (name != "") { printf "%s", text > (dir "/" name ".yaml"); close(dir "/" name ".yaml") } text = ""; name = "" }
  /^---$/ { flush(); next }
  { text = text $0 "\n" }
  name == "" && /^  name: / { name = $2 }
  END { flush() }' "$new/all"
for folder in crds charts/sluice/crd-files; do
  mkdir -p "$folder"
  rm -f "$folder"/*.yaml
  cp "$new"/*.yaml "$folder/"
done
config/render.sh
ls crds

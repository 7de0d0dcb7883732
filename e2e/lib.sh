# Shared by the scripts of e2e/: where things are kept, how progress is shown. Sourced, not run.
# shellcheck shell=bash

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# Everything downloaded or built for tests lies outside the checkout, so that a fresh clone starts warm. PostgreSQL
# refuses to run as root: tests run as root start it as `nobody`, who cannot enter root's home.
if [ -z "${SLUICE_CACHE:-}" ]; then
  if [ "$(id -u)" = 0 ]; then SLUICE_CACHE=/var/cache/sluice; else SLUICE_CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/sluice; fi
fi
export SLUICE_CACHE

# A fresh clone starts with the dependencies built. Incremental state would only grow there.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$SLUICE_CACHE/target} CARGO_INCREMENTAL=0

NODE_SOURCES=$REPO/e2e/cluster/node
# The node's binaries depend on its sources and on the Go release alone.
node_dir() {
  local key
  key=$({ cat "$NODE_SOURCES"/*; (cd "$NODE_SOURCES" && go env GOVERSION); } | sha256sum | cut -c1-12)
  echo "$SLUICE_CACHE/node-$key"
}

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; }
die() { say "$*"; exit 1; }

# step WHAT CMD...: run CMD and say how long it took; its output is shown only when it fails.
# CMD runs in a shell of its own that ends at the first error: behind `if` or `||` bash would go on after it.
step() {
  local what=$1 begin=$SECONDS log rc; shift
  log=$(mktemp)
  say "$what ..."
  set +e
  (set -e; "$@") >"$log" 2>&1
  rc=$?
  set -e
  if [ $rc != 0 ]; then cat "$log" >&2; rm -f "$log"; die "$what: failed (exit $rc) after $((SECONDS - begin)) s"; fi
  rm -f "$log"
  say "$what: done in $((SECONDS - begin)) s"
}

# timed WHAT CMD...: the same, with its output shown as it comes
timed() {
  local what=$1 begin=$SECONDS rc; shift
  say "$what ..."
  set +e
  (set -e; "$@")
  rc=$?
  set -e
  [ $rc = 0 ] || die "$what: failed (exit $rc) after $((SECONDS - begin)) s"
  say "$what: done in $((SECONDS - begin)) s"
}

# wait_until SECONDS WHAT CMD...: try CMD until it succeeds; past the deadline it is an error
wait_until() {
  local deadline=$((SECONDS + $1)) limit=$1 what=$2; shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt "$deadline" ] || { say "after $limit s still not: $what"; return 1; }
    sleep 0.5
  done
}

#!/usr/bin/env bash
# test.sh [TIER...] - run tiers of tests, all of them by default, and end with one line: N passed, M failed.
#   lint    formatting, clippy, shell scripts
#   rust    cargo test: unit, schema, connectors, control plane
#   chart   the Helm chart and the kustomize bases, without a cluster
#   e2e     the end-to-end suite on a one-node cluster of its own
# A tier that cannot run is a failure. All tiers run even when an earlier one failed.
set -euo pipefail
# shellcheck source=e2e/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$REPO"

passed=0 failed=0 summary=()
count() {   # TIER PASSED FAILED
  passed=$((passed + $2)) failed=$((failed + $3))
  summary+=("$(printf '%-8s %5d passed, %d failed' "$1" "$2" "$3")")
}
# check WHAT CMD...: one pass or one failure
check() {
  local what=$1 begin=$SECONDS; shift
  say "$what ..."
  if "$@"; then say "$what: passed in $((SECONDS - begin)) s"; good=$((good + 1))
  else say "$what: FAILED after $((SECONDS - begin)) s"; bad=$((bad + 1)); fi
}

run_lint() {
  local good=0 bad=0
  check "cargo fmt" cargo fmt --check
  check "cargo clippy" cargo clippy --quiet --locked --all-targets -- -D warnings
  check "shell scripts" shell_scripts_are_clean
  count lint $good $bad
}
shell_scripts_are_clean() {
  git ls-files '*.sh' .ci/run | xargs shellcheck -x -P SCRIPTDIR -s bash -S warning
}

# Test binaries that take longest: they begin first, so that none is left to run alone.
LONG=(ledger mirror simulation memory postgres_wire structure)
# Many binaries wait more than they work, so some run side by side. The output of each is shown when it has ended.
SIDE_BY_SIDE=2
run_rust() {
  local folder ok=0 bad=0 log binaries=() name
  folder=$(mktemp -d)
  if ! cargo test --locked --no-run --message-format=json-render-diagnostics >"$folder/built"; then
    rm -rf "$folder"
    count rust 0 1
    return
  fi
  # the program itself is built as well, for the tests that start it
  mapfile -t binaries < <(jq -r 'select(.profile.test == true) | .executable // empty' "$folder/built")
  for name in "${LONG[@]}"; do printf '%s\n' "${binaries[@]}" | grep -E "/$name-[0-9a-f]+$" || true; done >"$folder/order"
  printf '%s\n' "${binaries[@]}" doc >>"$folder/order"
  awk '!seen[$0]++' "$folder/order" | xargs -P "$SIDE_BY_SIDE" -I '{}' "$REPO/e2e/test.sh" one-binary '{}' "$folder" || true
  for log in "$folder"/*.log; do
    # an ignored test tests nothing
    ok=$((ok + $(sum_of passed "$log"))) bad=$((bad + $(sum_of failed "$log") + $(sum_of ignored "$log")))
  done
  bad=$((bad + $(find "$folder" -name '*.broken' | wc -l)))
  rm -rf "$folder"
  count rust "$ok" "$bad"
}
# run_one BINARY|doc FOLDER: leaves a log, and a mark where the log does not say that anything has failed and something has
run_one() {
  local name log rc=0 begin=$SECONDS command=("$1")
  name=$(basename "$1") log=$2/$(basename "$1").log
  if [ "$1" = doc ]; then command=(cargo test --quiet --locked --doc); fi
  "${command[@]}" >"$log" 2>&1 || rc=$?
  if ! grep -q '^test result: ' "$log" || { [ $rc != 0 ] && [ "$(sum_of failed "$log")" = 0 ]; }; then touch "$log.broken"; fi
  flock "$2/built" cat <(say "${name%-*}: exit $rc after $((SECONDS - begin)) s" 2>&1) "$log"
}
sum_of() { sed -nE "s/^test result: .* ([0-9]+) $1[;.].*/\1/p" "$2" | awk '{ n += $1 } END { print n + 0 }'; }

run_chart() {
  local good=0 bad=0
  check "chart and kustomize bases: lint, shapes, refusals, drift" charts/check.sh
  count chart $good $bad
}

run_e2e() {
  local log rc=0 ok bad
  log=$(mktemp)
  SLUICE_PROFILE=${SLUICE_PROFILE:-dev} e2e/e2e.sh | tee "$log" || rc=$?
  ok=$(grep -c '^PASS ' "$log" || true) bad=$(grep -c '^FAIL ' "$log" || true)
  if [ "$rc" != 0 ] && [ "$bad" = 0 ]; then bad=1; fi
  if [ "$ok" = 0 ] && [ "$bad" = 0 ]; then bad=1; fi
  rm -f "$log"
  count e2e "$ok" "$bad"
}

main() {
  local tier
  if [ "${1:-}" = one-binary ]; then run_one "$2" "$3"; return; fi
  [ $# -gt 0 ] || set -- lint rust chart e2e
  e2e/deps.sh
  PATH=$SLUICE_CACHE/bin:$(node_dir):$PATH              # our helm and kubectl first
  for tier in "$@"; do
    case $tier in
      lint | rust | chart | e2e) say "== $tier"; "run_$tier";;
      *) die "unknown tier '$tier': lint, rust, chart, e2e";;
    esac
  done
  say "all tiers took $SECONDS s"
  printf '%s\n' "${summary[@]}"
  echo "$passed passed, $failed failed"
  [ "$failed" = 0 ]
}
main "$@"

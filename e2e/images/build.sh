#!/usr/bin/env bash
# build.sh NAME... - make an image archive without a daemon or a registry, and print its path.
#
#   build.sh pause                 localhost/pause:1, the sandbox of every pod
#   build.sh postgres MAJOR        localhost/postgres:MAJOR, a small PostgreSQL server with psql (see postgres/entrypoint.sh)
#   build.sh sluice TAG BINARY     localhost/sluice:TAG, the same contents as the last stage of the Containerfile
#
# An archive is kept in the cache under the hash of its inputs and is not made again while they are the same.
set -euo pipefail
# shellcheck source=e2e/lib.sh
. "$(dirname "$0")/../lib.sh"
HERE=$REPO/e2e/images
STORE=$SLUICE_CACHE/images
KEPT=6                                   # archives of one name that stay in the cache

hash_of() { cat "$@" "$HERE/mkimage.py" "$HERE/build.sh" | sha256sum | cut -c1-16; }

# archive NAME KEY MAKER ARGS...: MAKER ARGS... FILE writes the archive
archive() {
  local file=$STORE/$1-$2.tar name=$1 maker=$3; shift 3
  if [ ! -f "$file" ]; then
    new=$(mktemp -d "$STORE/new.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    "$maker" "$@" "$new/image.tar" >&2
    mv "$new/image.tar" "$file"
    find "$STORE" -maxdepth 1 -name "$name-*.tar" -printf '%T@ %p\n' | sort -rn | sed "1,${KEPT}d; s/^[^ ]* //" | xargs -r rm -f
  else
    touch "$file"
  fi
  echo "$file"
}

make_pause() { "$HERE/mkimage.py" --pause --out "$1"; }

make_sluice() {
  "$HERE/mkimage.py" --name "localhost/sluice:$1" --bin "$2=/usr/local/bin/sluice" --ca --users \
    --user 65532:65532 --entrypoint '["/usr/local/bin/sluice"]' --out "$3"
}

make_postgres() {
  local major=$1 out=$2 server=$SLUICE_CACHE/pg/$1 client=/usr/lib/postgresql/15/bin tree=$new/tree program library files=()
  mkdir -p "$tree/usr/local"
  cp -a "$server" "$tree/usr/local/pgsql"
  # the server brings libraries of its own; what it takes from the system is put beside it
  while read -r library; do files+=(--file "$library=$library"); done < <(
    find "$server" -type f \( -perm -u+x -o -name '*.so*' \) -exec ldd {} + 2>/dev/null |
      sed -nE 's/.* => (\/(usr\/)?lib[^ ]*) .*/\1/p; s/^\s*(\/lib64\/[^ ]*) .*/\1/p' | sort -u)
  for program in /bin/mkdir /bin/mv /bin/rm /bin/cat /bin/sleep "$client/psql" "$client/pg_isready"; do
    files+=(--bin "$(readlink -f "$program")=/usr/bin/${program##*/}")
  done
  files+=(--bin "$(readlink -f /bin/sh)=/bin/sh")      # where libc looks for it: initdb starts programs through it
  "$HERE/mkimage.py" --name "localhost/postgres:$major" --layer-dir "$tree" "${files[@]}" --dir /data --dir /tmp \
    --file "$HERE/postgres/entrypoint.sh=/entrypoint.sh" --file "$HERE/postgres/passwd=/etc/passwd" \
    --env PATH=/usr/local/pgsql/bin:/usr/bin:/bin --env PGDATA=/data/pgdata --env PGHOST=/tmp --env PGUSER=postgres --env LANG=C.UTF-8 \
    --user 999:999 --entrypoint '["/bin/sh", "/entrypoint.sh"]' --stop-signal SIGINT --out "$out"
}

main() {
  umask 022
  mkdir -p "$STORE"
  case ${1:-} in
    pause) archive pause "$(hash_of /dev/null)" make_pause;;
    sluice)
      local tag=${2:?tag} binary=${3:?binary}
      archive sluice "$(hash_of "$binary" <(echo "$tag"))" make_sluice "$tag" "$binary";;
    postgres)
      local major=${2:?major version}
      archive "postgres$major" "$(hash_of "$HERE"/postgres/* "$SLUICE_CACHE/pg/$major/version" /usr/lib/postgresql/15/bin/psql)" make_postgres "$major";;
    *) sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2;;
  esac
}
main "$@"

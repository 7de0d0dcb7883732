#!/bin/sh
# PostgreSQL in a pod, as an unprivileged user. Arguments go to the server, such as: -c fsync=off
#   POSTGRES_PASSWORD   password of the superuser `postgres`, used when the data folder is first made  (required)
#   POSTGRES_DB         a database to make then                                                        (none)
#   /tls/tls.crt, /tls/tls.key   switch TLS on when they are mounted
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  # made beside its place and renamed: a pod killed in the middle starts over
  rm -rf "$PGDATA.new"
  mkdir -p "$PGDATA.new"
  printf '%s' "${POSTGRES_PASSWORD:?}" > /tmp/password
  initdb -D "$PGDATA.new" -U postgres --pwfile=/tmp/password --auth-local=trust --auth-host=scram-sha-256 -E UTF8 --no-locale --no-sync
  rm /tmp/password
  printf '%s\n' "host all all all scram-sha-256" "host replication all all scram-sha-256" >> "$PGDATA.new/pg_hba.conf"
  printf '%s\n' "listen_addresses = '*'" "unix_socket_directories = '/tmp'" "wal_level = logical" \
    "max_wal_senders = 20" "max_replication_slots = 20" >> "$PGDATA.new/postgresql.conf"
  if [ -n "${POSTGRES_DB:-}" ]; then
    printf 'CREATE DATABASE "%s"\n' "$POSTGRES_DB" | postgres --single -D "$PGDATA.new" postgres >/dev/null
  fi
  mv "$PGDATA.new" "$PGDATA"
fi
unset POSTGRES_PASSWORD
if [ -e /tls/tls.crt ]; then set -- -c ssl=on -c ssl_cert_file=/tls/tls.crt -c ssl_key_file=/tls/tls.key "$@"; fi
exec postgres -D "$PGDATA" "$@"

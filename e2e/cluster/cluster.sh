#!/usr/bin/env bash
# cluster.sh - a real one-node Kubernetes from binaries built here: no registry, no Docker, no init system. Needs root.
#
#   cluster.sh up [api]         start (or complete) the cluster and wait until it serves; `api`: etcd, API server and
#                               controller manager only, for tests that need no pods
#   cluster.sh load FILE.tar... import OCI image archives into the node
#   cluster.sh images           the images it has
#   cluster.sh kubectl ARGS...  kubectl as cluster admin
#   cluster.sh env              shell lines that point kubectl and clients at it
#   cluster.sh status           what runs, and with how much memory
#   cluster.sh logs NAME [N]    last lines of one part's log
#   cluster.sh node CMD...      run CMD inside the node (its mount and network namespaces)
#   cluster.sh down             stop everything that `up` started; the data stays
#   cluster.sh wipe             down, then remove the data
#
# Settings (environment):
#   K8S_ID       1..63, the cluster's number: two clusters side by side need two of them (1)
#   K8S_STATE    folder for certificates, data, logs; keep the path short              (/var/lib/sluice-k8s/K8S_ID)
#   K8S_VERBOSE  klog verbosity                                                        (1)
#   K8S_APISERVER_ARGS, K8S_KCM_ARGS, K8S_KUBELET_ARGS   more flags, split at spaces
#
# The node lives in its own network and mount namespaces and in its own cgroup: ports and paths never clash, and
# removing it removes every rule, mount and process with it. Its address is 10.127.ID.2, this machine's end 10.127.ID.1.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd -P)
# shellcheck source=e2e/lib.sh
. "$HERE/../lib.sh"

usage() { sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//'; }
command=${1:-}
[ $# -eq 0 ] || shift
case $command in
  up | load | images | kubectl | env | status | logs | node | down | wipe) ;;
  *) usage; exit 2;;
esac

K8S_ID=${K8S_ID:-1}
if ! [[ $K8S_ID =~ ^[0-9]+$ ]] || [ "$K8S_ID" -lt 1 ] || [ "$K8S_ID" -gt 63 ]; then die "K8S_ID is '$K8S_ID', not a number from 1 to 63"; fi
[ "$(id -u)" = 0 ] || die "a node needs root"
K8S_STATE=${K8S_STATE:-/var/lib/sluice-k8s/$K8S_ID}
K8S_VERBOSE=${K8S_VERBOSE:-1}
[ ${#K8S_STATE} -le 60 ] || die "K8S_STATE has ${#K8S_STATE} characters; 60 is the limit, for the sockets inside it"
if [ "$command" != up ] && [ ! -d "$K8S_STATE/run" ]; then
  case $command in down | wipe) ;; *) die "cluster $K8S_ID is not there: cluster.sh up";; esac
fi
mkdir -p "$K8S_STATE"
K8S_STATE=$(cd "$K8S_STATE" && pwd -P)

NODE=node-$K8S_ID
DOMAIN=cluster.local
POD_CIDR=10.$((128 + K8S_ID)).0.0/24
SVC_NET=10.$((192 + K8S_ID)).0
SVC_CIDR=$SVC_NET.0/16
API_SVC_IP=$SVC_NET.1
DNS_IP=$SVC_NET.10
HOST_IP=10.127.$K8S_ID.1
NODE_IP=10.127.$K8S_ID.2
API=https://$NODE_IP:6443
CGROUP=/sluice-k8s-$K8S_ID
PKI=$K8S_STATE/pki KUBECONFIGS=$K8S_STATE/kubeconfig ETC=$K8S_STATE/etc LOG=$K8S_STATE/log RUN=$K8S_STATE/run
SOCK=$RUN/containerd.sock
mkdir -p "$PKI" "$KUBECONFIGS" "$ETC" "$LOG" "$RUN"
# A cluster that runs keeps the binaries it was started with, whatever the checkout says by now.
BIN=$(cat "$RUN/bin" 2>/dev/null || true)

# shellcheck source=e2e/cluster/process.sh
. "$HERE/process.sh"
# shellcheck source=e2e/cluster/pki.sh
. "$HERE/pki.sh"
# shellcheck source=e2e/cluster/control-plane.sh
. "$HERE/control-plane.sh"
# shellcheck source=e2e/cluster/node.sh
. "$HERE/node.sh"

kc() { "$BIN/kubectl" --kubeconfig "$KUBECONFIGS/admin.conf" "$@"; }
ctr_() { in_node ctr -a "$SOCK" -n k8s.io "$@"; }

up() {
  local mode=${1:-full} begin=$SECONDS
  case $mode in full | api) ;; *) die "up $mode: only 'api' may follow";; esac
  alive holder || down                       # what a crash or a reboot left
  BIN=$(node_dir)
  [ -x "$BIN/node" ] || "$HERE/../deps.sh" packages node
  echo "$BIN" > "$RUN/bin"
  make_certificates
  make_cgroup
  namespaces_up
  etcd_up; apiserver_up; controllers_up
  if [ "$mode" = full ]; then
    check_machine
    scheduler_up; containerd_up; kubelet_up; proxy_up; dns_up
    default_storage_class
  fi
  wait_for - 30 "the default service account exists" kc get serviceaccount default -n default
  say "cluster $K8S_ID is up after $((SECONDS - begin)) s; KUBECONFIG=$KUBECONFIGS/admin.conf"
}

check_machine() {
  local program missing=()
  for program in containerd containerd-shim-runc-v2 ctr runc iptables conntrack; do command -v $program >/dev/null || missing+=("$program"); done
  for program in bridge host-local loopback portmap; do [ -x "$(cni_plugins)/$program" ] || missing+=("CNI plugin $program"); done
  grep -qw overlay /proc/filesystems || missing+=("overlayfs in this kernel")
  [ -r /dev/kmsg ] || missing+=(/dev/kmsg)
  [ ${#missing[@]} = 0 ] || die "this machine lacks: ${missing[*]} (make deps)"
}

status() {
  local part
  for part in "${PARTS[@]}"; do
    if alive "$part"; then
      printf '%-11s pid %-7s %5s MiB\n' "$part" "$(pid_of "$part")" "$(awk '/VmRSS/ {print int($2/1024)}' "/proc/$(pid_of "$part")/status")"
    else
      printf '%-11s not running\n' "$part"
    fi
  done
}

down() {
  local pid left
  stop dns proxy kubelet scheduler controllers apiserver
  for pid in $(cgroup_pids kubepods); do kill -KILL "$pid" 2>/dev/null || true; done
  stop containerd etcd
  for _ in 1 2 3 4 5; do                     # shims, and whatever else still lives in this cluster's own cgroup
    left=$(cgroup_pids | grep -vx "$(pid_of holder)" || true)
    [ -n "$left" ] || break
    for pid in $left; do kill -KILL "$pid" 2>/dev/null || true; done
    sleep 0.2
  done
  stop holder
  remove_cgroup
  ip link del "k8s$K8S_ID" 2>/dev/null || true
  restore_sysctls
  rm -rf "$RUN/containerd" "$RUN/priv" "$K8S_STATE/ipam"
  rm -f "$SOCK" "$SOCK.ttrpc"
}

wipe() {
  down
  local mountpoint
  while read -r mountpoint; do umount -l "$mountpoint" 2>/dev/null || true
  done < <(awk -v s="$K8S_STATE/" 'index($2, s) == 1 { print $2 }' /proc/mounts | sort -r)
  rm -rf --one-file-system "$K8S_STATE"
}

print_env() {
  # shellcheck disable=SC2016  # the reader's shell expands them
  printf 'export KUBECONFIG=%s\nexport PATH=%s:$PATH\nexport NO_PROXY=${NO_PROXY:+$NO_PROXY,}%s\n' \
    "$KUBECONFIGS/admin.conf" "$BIN" "$NODE_IP,$SVC_CIDR,$POD_CIDR"
}

load() {
  local file
  for file in "$@"; do ctr_ images import "$(readlink -f "$file")" | tail -n 1; done
}

case $command in
  up | status | down | wipe | load) "$command" "$@";;
  images) ctr_ images ls -q | grep -v '^sha256:';;
  kubectl) kc "$@";;
  env) print_env;;
  logs) tail -n "${2:-60}" "$LOG/${1:?name of a part: ${PARTS[*]}}.log";;
  node) in_node "$@";;
esac

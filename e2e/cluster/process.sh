# Processes of the cluster: started into its cgroup and namespaces, remembered by pid and start time. Sourced by cluster.sh.
# shellcheck shell=bash

# shellcheck disable=SC2034  # used by cluster.sh
PARTS=(holder etcd apiserver controllers scheduler containerd kubelet proxy dns)

# A pid file holds "PID STARTTIME": a recycled pid is never taken for ours.
starttime() { awk '{ sub(/^.*\) /, ""); print $20 }' "/proc/$1/stat" 2>/dev/null; }
alive() {
  local pid started
  [ -s "$RUN/$1.pid" ] || return 1
  read -r pid started < "$RUN/$1.pid"
  [ "$(starttime "$pid")" = "$started" ]
}
pid_of() { cut -d' ' -f1 "$RUN/$1.pid" 2>/dev/null || true; }

# start NAME CMD...: in the background, inside the node's namespaces once their holder runs
start() {
  local name=$1 prefix=(); shift
  if alive "$name"; then return; fi
  if [ "$name" != holder ]; then prefix=("${ENTER_NODE[@]}" --wd=/); fi
  (
    local hierarchy fd
    while read -r hierarchy; do echo "$BASHPID" > "$hierarchy$CGROUP/sys/cgroup.procs"; done < <(cgroup_hierarchies)
    for fd in /proc/"$BASHPID"/fd/*; do      # a lock held by the caller must not live on in a daemon
      fd=${fd##*/}; [ "$fd" -le 2 ] || eval "exec $fd>&-"
    done
    cd /
    exec setsid "${prefix[@]}" "$@" </dev/null >>"$LOG/$name.log" 2>&1
  ) &
  local pid=$!
  disown "$pid"
  echo "$pid $(starttime "$pid")" > "$RUN/$name.pid"
  if [ "$name" = holder ]; then enter_node_through "$pid"; fi
}

ENTER_NODE=()
enter_node_through() { ENTER_NODE=(nsenter "--mount=/proc/$1/ns/mnt" "--net=/proc/$1/ns/net"); }
if alive holder; then enter_node_through "$(pid_of holder)"; fi
in_node() {
  [ ${#ENTER_NODE[@]} -gt 0 ] || die "cluster $K8S_ID does not run"
  "${ENTER_NODE[@]}" -- "$@"
}

# wait_for NAME SECONDS WHAT CMD...: until CMD succeeds; the end of part NAME (or -) or of the time is an error, with its log
wait_for() {
  local name=$1 deadline=$((SECONDS + $2)) limit=$2 what=$3; shift 3
  until "$@" >/dev/null 2>&1; do
    if [ "$name" != - ] && ! alive "$name"; then tail -n 15 "$LOG/$name.log" >&2 || true; die "$name ended before: $what"; fi
    if [ $SECONDS -ge $deadline ]; then
      [ "$name" = - ] || tail -n 15 "$LOG/$name.log" >&2 || true
      die "after $limit s still not: $what"
    fi
    sleep 0.1
  done
}

# stop NAME...: TERM to all of them at once, KILL for those still there after 4 s
stop() {
  local name left
  for name in "$@"; do if alive "$name"; then kill -TERM "$(pid_of "$name")" 2>/dev/null || true; fi; done
  for _ in {1..40}; do
    left=()
    for name in "$@"; do if alive "$name"; then left+=("$name"); fi; done
    [ ${#left[@]} -gt 0 ] || break
    sleep 0.1
  done
  for name in "${left[@]}"; do kill -KILL "$(pid_of "$name")" 2>/dev/null || true; done
  for name in "$@"; do rm -f "$RUN/$name.pid"; done
}

# ---------------------------------------------------------------- cgroup: daemons in `sys`, pods in `kubepods`
cgroup_hierarchies() {
  if [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ]; then echo /sys/fs/cgroup
  else awk '$3 == "cgroup" { print $2 }' /proc/mounts | sort -u; fi
}
make_cgroup() {
  local hierarchy group parent file
  while read -r hierarchy; do
    parent=$hierarchy
    for group in "$hierarchy$CGROUP" "$hierarchy$CGROUP/sys"; do
      mkdir -p "$group"
      for file in cpuset.cpus cpuset.mems; do            # v1: a new cpuset is empty and takes no process
        if [ -e "$group/$file" ] && [ -z "$(cat "$group/$file")" ]; then
          cat "$parent/$file" > "$group/$file"
        fi
      done
      if [ -e "$parent/cgroup.subtree_control" ]; then   # v2 (not tried)
        for file in cpuset cpu memory pids; do echo "+$file" > "$parent/cgroup.subtree_control" 2>/dev/null || true; done
      fi
      parent=$group
    done
  done < <(cgroup_hierarchies)
}
cgroup_pids() {   # [kubepods]: processes in this cluster's cgroup, or in that part of it
  local hierarchy
  while read -r hierarchy; do
    if [ -d "$hierarchy$CGROUP/${1:-}" ]; then find "$hierarchy$CGROUP/${1:-}" -name cgroup.procs -exec cat {} + 2>/dev/null || true; fi
  done < <(cgroup_hierarchies) | sort -un
}
remove_cgroup() {
  local hierarchy
  while read -r hierarchy; do
    [ ! -d "$hierarchy$CGROUP" ] || find "$hierarchy$CGROUP" -depth -type d -exec rmdir {} \; 2>/dev/null || true
  done < <(cgroup_hierarchies; awk '$3 == "cgroup2" { print $2 }' /proc/mounts)   # runc also makes it in a hybrid v2 mount
}

# The node: its namespaces and address, containerd, kubelet, kube-proxy, CoreDNS. Sourced by cluster.sh.
# shellcheck shell=bash

# kubelet changes these for the whole machine; `down` puts them back
save_sysctls() {
  [ -f "$ETC/sysctl.before" ] || [ "$(sysctl -n kernel.panic)" = 10 ] ||
    sysctl vm.overcommit_memory kernel.panic kernel.panic_on_oops > "$ETC/sysctl.before"
}
restore_sysctls() {
  [ -f "$ETC/sysctl.before" ] || return 0
  sysctl -q -p "$ETC/sysctl.before" || true
  rm -f "$ETC/sysctl.before"
}

# One process holds the node's network namespace and its mount namespace, in which / is shared: kubelet and containerd
# need that for mount propagation, and nothing outside sees those mounts.
namespaces_up() {
  if ! alive holder; then
    mkdir -p "$K8S_STATE/pv"
    rm -f "$RUN/holder.ready"
    # shellcheck disable=SC2016
    start holder unshare --mount --net --propagation unchanged -- bash -c '
      set -e; mount --make-rprivate /; mount --make-rshared /
      private() { mkdir -p "$1" "$2"; mount --bind "$2" "$1"; mount --make-rshared "$1"; }
      # fixed paths that kubelet, containerd, runc and CNI write to: inside the node they lie in the state folder
      for d in /run/netns /run/containerd /var/lib/cni /var/lib/kubelet /var/log/containers; do private $d "$1/run/priv$d"; done
      private /tmp/hostpath_pv "$1/pv"          # where the built-in hostPath provisioner writes
      touch "$1/run/holder.ready"; exec sleep infinity' holder "$K8S_STATE"
    wait_for holder 20 "the namespaces of the node exist" test -e "$RUN/holder.ready"
  fi
  if ! ip link show "k8s$K8S_ID" >/dev/null 2>&1; then
    ip link add "k8s$K8S_ID" type veth peer name eth0 netns "$(pid_of holder)"
    ip addr add "$HOST_IP/30" dev "k8s$K8S_ID"
    ip link set "k8s$K8S_ID" up
    in_node ip addr add "$NODE_IP/30" dev eth0
    in_node ip link set eth0 up
    in_node ip link set lo up
    in_node ip route add default via "$HOST_IP"
    in_node sysctl -qw net.ipv4.ip_forward=1
    in_node sh -c '[ ! -e /proc/sys/net/bridge/bridge-nf-call-iptables ] || sysctl -qw net.bridge.bridge-nf-call-iptables=1'
  fi
  # from this machine straight to pods and services, through the node
  ip route replace "$POD_CIDR" via "$NODE_IP"
  ip route replace "$SVC_CIDR" via "$NODE_IP"
}

cni_plugins() {
  local folder
  for folder in /usr/lib/cni /opt/cni/bin; do if [ -x "$folder/bridge" ]; then echo "$folder"; return; fi; done
  echo /usr/lib/cni
}
# restrict_oom_score_adj: where root lacks CAP_SYS_RESOURCE, runc may not lower oom_score_adj, and every sandbox would
# fail with "can't get final child's PID from pipe: EOF"
containerd_config() {
  if containerd --version | grep -qE ' v?2\.'; then
    cat <<TOML
version = 3
root = "$K8S_STATE/containerd"
state = "$RUN/containerd"
[grpc]
  address = "$SOCK"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "localhost/pause:1"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = false
[plugins.'io.containerd.cri.v1.runtime'.cni]
  $(if containerd --version | grep -qE ' v?2\.0'; then echo "bin_dir = \"$(cni_plugins)\""; else echo "bin_dirs = [\"$(cni_plugins)\"]"; fi)
  conf_dir = "$ETC/cni"
TOML
  else
    cat <<TOML
version = 2
root = "$K8S_STATE/containerd"
state = "$RUN/containerd"
[grpc]
  address = "$SOCK"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$(cni_plugins)"
    conf_dir = "$ETC/cni"
TOML
  fi
}
containerd_up() {
  if alive containerd; then return; fi
  mkdir -p "$ETC/cni"
  cat > "$ETC/cni/10-bridge.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "sluice-k8s-$K8S_ID", "plugins": [
  {"type": "bridge", "bridge": "cni$K8S_ID", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$K8S_STATE/ipam", "ranges": [[{"subnet": "$POD_CIDR"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
  containerd_config > "$ETC/containerd.toml"
  start containerd containerd --config "$ETC/containerd.toml"
  wait_for containerd 60 "containerd answers" ctr_ version
  ctr_ images import "$("$HERE/../images/build.sh" pause)" >/dev/null
}

kubelet_up() {
  if alive kubelet; then return; fi
  save_sysctls
  mkdir -p "$K8S_STATE/kubelet" "$K8S_STATE/podlogs" "$K8S_STATE/volplugins"
  printf '# no resolver outside the cluster\n' > "$ETC/resolv.conf"
  # syncFrequency is the default that users have: mounted ConfigMaps and Secrets take as long to arrive here as there.
  # A container that was killed often comes back after 10 s, not after up to 5 minutes: tests kill many.
  cat > "$ETC/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $NODE_IP
healthzBindAddress: 127.0.0.1
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $PKI/kubelet-serving.crt
tlsPrivateKeyFile: $PKI/kubelet-serving.key
containerRuntimeEndpoint: unix://$SOCK
cgroupDriver: cgroupfs
cgroupRoot: $CGROUP
failCgroupV1: false
failSwapOn: false
clusterDNS: [$DNS_IP]
clusterDomain: $DOMAIN
resolvConf: $ETC/resolv.conf
podLogsDir: $K8S_STATE/podlogs
volumePluginDir: $K8S_STATE/volplugins
maxPods: 110
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, nodefs.inodesFree: 1%, imagefs.available: 1%, imagefs.inodesFree: 1%}
evictionPressureTransitionPeriod: 10s
imageMinimumGCAge: 24h
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
nodeStatusUpdateFrequency: 5s
syncFrequency: 60s
featureGates: {KubeletCrashLoopBackOffMax: true}
crashLoopBackOff: {maxContainerRestartPeriod: 3s}
YAML
  # shellcheck disable=SC2086  # extra flags are split at spaces
  start kubelet env "PATH=$PATH:/usr/sbin:/sbin" "$BIN/kubelet" --v="$K8S_VERBOSE" --config="$ETC/kubelet.yaml" \
    --kubeconfig="$KUBECONFIGS/kubelet.conf" --root-dir="$K8S_STATE/kubelet" --cert-dir="$PKI" \
    --hostname-override="$NODE" --node-ip="$NODE_IP" ${K8S_KUBELET_ARGS:-}
  wait_for kubelet 90 "kubelet is healthy" in_node curl -fsS --noproxy '*' http://127.0.0.1:10248/healthz
  wait_for kubelet 90 "node $NODE is Ready" node_is_ready
}
node_is_ready() {
  [ "$(kc get node "$NODE" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ]
}

proxy_up() {   # after kubelet: it waits for its node. It ends itself when its configuration is rewritten under it.
  if alive proxy; then return; fi
  # conntrack limits are machine-wide: 0 leaves them alone
  cat > "$ETC/proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clusterCIDR: $POD_CIDR
hostnameOverride: $NODE
bindAddress: $NODE_IP
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
clientConnection: {kubeconfig: $KUBECONFIGS/proxy.conf}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
YAML
  start proxy env "PATH=$PATH:/usr/sbin:/sbin" "$BIN/kube-proxy" --v="$K8S_VERBOSE" --config="$ETC/proxy.yaml"
  wait_for proxy 60 "kube-proxy is healthy" in_node curl -fsS --noproxy '*' http://127.0.0.1:10256/livez
}

dns_up() {   # CoreDNS runs as a process of the node, behind the usual Service address
  cat > "$ETC/Corefile" <<CONF
.:53 {
  bind $NODE_IP
  errors
  kubernetes $DOMAIN in-addr.arpa {
    kubeconfig $KUBECONFIGS/dns.conf
    pods insecure
    ttl 5
  }
  cache 5
}
CONF
  kc apply -f - >/dev/null <<YAML
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: system:coredns}
rules:
- {apiGroups: [""], resources: [endpoints, services, pods, namespaces], verbs: [list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: system:coredns}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: system:coredns}
subjects: [{kind: User, name: system:coredns, apiGroup: rbac.authorization.k8s.io}]
---
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec: {clusterIP: $DNS_IP, ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kube-dns-node, namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}
addressType: IPv4
ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
endpoints: [{addresses: [$NODE_IP], conditions: {ready: true}}]
YAML
  start dns "$BIN/coredns" -conf "$ETC/Corefile"
  wait_for dns 60 "CoreDNS listens" in_node sh -c "ss -lnu | grep -q '$NODE_IP:53 '"
}

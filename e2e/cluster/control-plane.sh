# etcd, API server, controller manager, scheduler. Sourced by cluster.sh.
# shellcheck shell=bash

etcd_up() {
  mkdir -p "$K8S_STATE/etcd"
  chmod 700 "$K8S_STATE/etcd"
  # no fsync: the data lives as long as the tests
  start etcd "$BIN/etcd" --name "$NODE" --data-dir "$K8S_STATE/etcd" --log-level warn --unsafe-no-fsync \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
    --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
    --initial-cluster "$NODE=http://127.0.0.1:2380"
  wait_for etcd 60 "etcd answers" in_node curl -fsS --noproxy '*' http://127.0.0.1:2379/health
}
apiserver_up() {
  # shellcheck disable=SC2086  # extra flags are split at spaces
  start apiserver "$BIN/kube-apiserver" --v="$K8S_VERBOSE" \
    --etcd-servers=http://127.0.0.1:2379 --storage-media-type=application/vnd.kubernetes.protobuf \
    --bind-address=0.0.0.0 --secure-port=6443 --advertise-address="$NODE_IP" \
    --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" --client-ca-file="$PKI/ca.crt" \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
    --service-account-issuer="https://kubernetes.default.svc.$DOMAIN" \
    --service-account-signing-key-file="$PKI/sa.key" --service-account-key-file="$PKI/sa.pub" \
    --service-cluster-ip-range="$SVC_CIDR" \
    --kubelet-client-certificate="$PKI/apiserver-kubelet.crt" --kubelet-client-key="$PKI/apiserver-kubelet.key" \
    --kubelet-certificate-authority="$PKI/ca.crt" --kubelet-preferred-address-types=InternalIP \
    --requestheader-client-ca-file="$PKI/front-ca.crt" --requestheader-allowed-names=front-proxy \
    --requestheader-extra-headers-prefix=X-Remote-Extra- --requestheader-group-headers=X-Remote-Group \
    --requestheader-username-headers=X-Remote-User \
    --proxy-client-cert-file="$PKI/front.crt" --proxy-client-key-file="$PKI/front.key" --enable-aggregator-routing=true \
    ${K8S_APISERVER_ARGS:-}
  wait_for apiserver 120 "the API server is ready" \
    curl -fsS --noproxy '*' --cacert "$PKI/ca.crt" --cert "$PKI/admin.crt" --key "$PKI/admin.key" "$API/readyz"
}
controllers_up() {
  # shellcheck disable=SC2086  # extra flags are split at spaces
  start controllers "$BIN/kube-controller-manager" --v="$K8S_VERBOSE" --kubeconfig="$KUBECONFIGS/controllers.conf" \
    --authentication-kubeconfig="$KUBECONFIGS/controllers.conf" --authorization-kubeconfig="$KUBECONFIGS/controllers.conf" \
    --bind-address=127.0.0.1 --leader-elect=false --use-service-account-credentials=true \
    --service-account-private-key-file="$PKI/sa.key" --root-ca-file="$PKI/ca.crt" \
    --cluster-signing-cert-file="$PKI/ca.crt" --cluster-signing-key-file="$PKI/ca.key" \
    --cluster-cidr="$POD_CIDR" --allocate-node-cidrs=false --service-cluster-ip-range="$SVC_CIDR" \
    --enable-hostpath-provisioner=true ${K8S_KCM_ARGS:-}
  wait_for controllers 90 "the controller manager is healthy" in_node curl -fsSk --noproxy '*' https://127.0.0.1:10257/healthz
}
scheduler_up() {
  start scheduler "$BIN/kube-scheduler" --v="$K8S_VERBOSE" --kubeconfig="$KUBECONFIGS/scheduler.conf" \
    --authentication-kubeconfig="$KUBECONFIGS/scheduler.conf" --authorization-kubeconfig="$KUBECONFIGS/scheduler.conf" \
    --bind-address=127.0.0.1 --leader-elect=false
  wait_for scheduler 90 "the scheduler is healthy" in_node curl -fsSk --noproxy '*' https://127.0.0.1:10259/healthz
}
default_storage_class() {   # the provisioner is built into the controller manager
  kc apply -f - >/dev/null <<'YAML'
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: local, annotations: {storageclass.kubernetes.io/is-default-class: "true"}}
provisioner: kubernetes.io/host-path
reclaimPolicy: Delete
volumeBindingMode: Immediate
YAML
}

# Certificates and kubeconfigs: one CA, and a second for the aggregation layer. Sourced by cluster.sh.
# shellcheck shell=bash

new_ca() {   # NAME COMMON_NAME
  [ ! -f "$PKI/$1.crt" ] || return 0
  openssl ecparam -name prime256v1 -genkey -noout -out "$PKI/$1.key"
  openssl req -x509 -new -key "$PKI/$1.key" -sha256 -days 3650 -subj "/CN=$2" -out "$PKI/$1.crt" \
    -addext "keyUsage=critical,keyCertSign,cRLSign,digitalSignature" 2>/dev/null
}
new_certificate() {   # NAME SUBJECT USAGE [ALTERNATIVE_NAMES [CA]]
  local name=$1 subject=$2 usage=$3 names=${4:-} ca=${5:-ca}
  [ ! -f "$PKI/$name.crt" ] || return 0
  openssl ecparam -name prime256v1 -genkey -noout -out "$PKI/$name.key"
  openssl req -new -key "$PKI/$name.key" -subj "$subject" |
    openssl x509 -req -sha256 -days 3650 -CA "$PKI/$ca.crt" -CAkey "$PKI/$ca.key" -CAcreateserial -out "$PKI/$name.crt.new" 2>/dev/null \
      -extfile <(printf 'keyUsage=critical,digitalSignature\nextendedKeyUsage=%s\nbasicConstraints=critical,CA:false\n%s\n' \
        "$usage" "${names:+subjectAltName=$names}")
  mv "$PKI/$name.crt.new" "$PKI/$name.crt"
}
new_kubeconfig() {   # NAME SERVER
  cat > "$KUBECONFIGS/$1.conf" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: sluice-$K8S_ID, cluster: {server: "$2", certificate-authority-data: $(base64 -w0 < "$PKI/ca.crt")}}]
users: [{name: $1, user: {client-certificate-data: $(base64 -w0 < "$PKI/$1.crt"), client-key-data: $(base64 -w0 < "$PKI/$1.key")}}]
contexts: [{name: sluice-$K8S_ID, context: {cluster: sluice-$K8S_ID, user: $1}}]
current-context: sluice-$K8S_ID
YAML
}
make_certificates() {
  umask 077
  new_ca ca sluice-k8s-ca
  # its own CA, so that a client certificate can never claim to be the front proxy
  new_ca front-ca sluice-k8s-front-ca
  new_certificate front /CN=front-proxy clientAuth "" front-ca
  new_certificate apiserver /CN=kube-apiserver serverAuth \
    "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.$DOMAIN,DNS:$NODE,IP:127.0.0.1,IP:$NODE_IP,IP:$API_SVC_IP"
  new_certificate apiserver-kubelet "/O=system:masters/CN=kube-apiserver-kubelet" clientAuth
  new_certificate admin "/O=system:masters/CN=admin" clientAuth
  new_certificate controllers /CN=system:kube-controller-manager clientAuth
  new_certificate scheduler /CN=system:kube-scheduler clientAuth
  new_certificate proxy /CN=system:kube-proxy clientAuth
  new_certificate dns /CN=system:coredns clientAuth
  new_certificate kubelet "/O=system:nodes/CN=system:node:$NODE" clientAuth
  new_certificate kubelet-serving "/O=system:nodes/CN=system:node:$NODE" serverAuth "DNS:$NODE,IP:$NODE_IP,IP:127.0.0.1"
  if [ ! -f "$PKI/sa.pub" ]; then
    openssl genrsa -out "$PKI/sa.key" 2048 2>/dev/null
    openssl rsa -in "$PKI/sa.key" -pubout -out "$PKI/sa.pub" 2>/dev/null
  fi
  new_kubeconfig admin "$API"
  local name
  for name in controllers scheduler proxy kubelet dns; do new_kubeconfig "$name" https://127.0.0.1:6443; done
  umask 022
}

"""Assertions on the rendered chart. Called by check.sh with the folder of rendered files."""
import pathlib
import re
import sys

import yaml

folder = pathlib.Path(sys.argv[1])
text = {p.stem: p.read_text() for p in folder.glob("*.yaml")}
docs = {name: [d for d in yaml.safe_load_all(t) if d] for name, t in text.items()}
checks = 0


def check(ok, what):
    global checks
    checks += 1
    if not ok:
        sys.exit(f"chart: {what}")


def of(name, kind):
    return [d for d in docs[name] if d["kind"] == kind]


def one(name, kind):
    found = of(name, kind)
    check(len(found) == 1, f"{name}: {len(found)} of kind {kind}, expected 1")
    return found[0]


def rules(name, namespace=None):
    """Rules of the operator's own roles (not the aggregated ones)."""
    for role in of(name, "ClusterRole") + of(name, "Role"):
        if role["metadata"]["name"].endswith(("-view", "-edit")):
            continue
        if namespace is not None and role["metadata"].get("namespace") != namespace:
            continue
        yield from role["rules"]


def verbs(name, group, resource, namespace=None, resource_name=None):
    """Verbs on a resource; of unrestricted rules, or those for one resource name."""
    got = set()
    for rule in rules(name, namespace):
        names = rule.get("resourceNames", [])
        if group in rule["apiGroups"] and resource in rule["resources"]:
            if (resource_name is None and not names) or resource_name in names:
                got |= set(rule["verbs"])
    return got


for name, items in docs.items():
    check(len({(d["apiVersion"], d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in items}) == len(items), f"{name}: two objects of one name")

    # RBAC: nothing by wildcard; each rule says why in a comment.
    for role in of(name, "ClusterRole") + of(name, "Role"):
        for rule in role["rules"]:
            for key in ("verbs", "resources", "apiGroups", "nonResourceURLs"):
                check("*" not in rule.get(key, []), f"{name}: wildcard in {key} of {role['metadata']['name']}")
            check(rule["verbs"], f"{name}: a rule without verbs")
    lines = text[name].splitlines()
    for number, line in enumerate(lines):
        if re.match(r"- apiGroups:", line):
            check(lines[number - 1].startswith("# "), f"{name}: a rule without a comment at line {number + 1}")
    check(not {"list", "watch"} & verbs(name, "", "secrets"), f"{name}: Secrets may be listed")

    # The pod fits the restricted standard and holds a token only in the operator container.
    pod = one(name, "Deployment")["spec"]["template"]["spec"]
    context = pod["securityContext"]
    check(context["runAsNonRoot"] is True, f"{name}: runAsNonRoot")
    check(context["seccompProfile"] == {"type": "RuntimeDefault"}, f"{name}: seccompProfile")
    check(pod["automountServiceAccountToken"] is False, f"{name}: the pod mounts a token")
    check(len(pod["containers"]) == 1, f"{name}: more than one container")
    for container in pod["containers"]:
        security = container["securityContext"]
        check(security["allowPrivilegeEscalation"] is False, f"{name}: allowPrivilegeEscalation")
        check(security["readOnlyRootFilesystem"] is True, f"{name}: readOnlyRootFilesystem")
        check(security["capabilities"] == {"drop": ["ALL"]}, f"{name}: capabilities")
        check(container["resources"]["requests"] and container["resources"]["limits"], f"{name}: resources")
        check(container["livenessProbe"]["httpGet"]["path"] == "/livez", f"{name}: livenessProbe")
        check(container["readinessProbe"]["httpGet"]["path"] == "/readyz", f"{name}: readinessProbe")
        check([p["containerPort"] for p in container["ports"]] == [8080], f"{name}: ports")
        check([m["mountPath"] for m in container["volumeMounts"]] == ["/var/run/secrets/kubernetes.io/serviceaccount"], f"{name}: mounts")
    sources = [key for s in pod["volumes"][0]["projected"]["sources"] for key in s]
    check(sources == ["serviceAccountToken", "configMap", "downwardAPI"], f"{name}: token volume")
    check(one(name, "ServiceAccount")["automountServiceAccountToken"] is False, f"{name}: the account mounts tokens")

    # Selectors find the pod.
    labels = one(name, "Deployment")["spec"]["template"]["metadata"]["labels"]
    check(labels["app.kubernetes.io/name"] == "sluice" and labels["app.kubernetes.io/component"] == "operator", f"{name}: pod labels")
    selectors = [one(name, "Deployment")["spec"]["selector"]["matchLabels"]]
    selectors += [d["spec"]["selector"]["matchLabels"] for d in of(name, "PodDisruptionBudget")]
    selectors += [d["spec"]["podSelector"]["matchLabels"] for d in of(name, "NetworkPolicy")]
    for selector in selectors:
        check(selector.items() <= labels.items(), f"{name}: a selector misses the pod")

# What each shape is about.
operator = {name: one(name, "Deployment")["spec"]["template"]["spec"]["containers"][0] for name in docs}
check(one("default", "Deployment")["spec"]["replicas"] == 2, "two replicas by default")
check(one("default", "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1, "maxUnavailable")
check(one("default", "Deployment")["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == 65532, "uid")
check("runAsUser" not in one("openshift", "Deployment")["spec"]["template"]["spec"]["securityContext"], "the uid can be unset")
check(not any(a.startswith("--watch-namespaces") for a in operator["default"]["args"]), "all namespaces by default")
check("--watch-namespaces=shop,dw" in operator["scoped"]["args"], "the list of namespaces is passed on")

check(verbs("default", "", "secrets") == {"get", "patch", "create"}, "verbs on Secrets")
check("patch" not in verbs("minimal", "", "secrets"), "patch on Secrets only with protectSecrets")
check(not verbs("minimal", "networking.k8s.io", "networkpolicies"), "NetworkPolicies only with the switch")
check(verbs("default", "sluice.dev", "mirrors") == {"get", "list", "watch", "patch"}, "verbs on Mirrors")
check(verbs("default", "coordination.k8s.io", "leases", resource_name="sluice-operator") == {"get", "update"}, "verbs on the lease")

# Scoped: nothing but two cluster-wide rights; the others are bound in each namespace.
cluster = [r for r in of("scoped", "ClusterRole") if r["metadata"]["name"] == "sluice-operator"][0]
check({r for rule in cluster["rules"] for r in rule["resources"]} == {"selfsubjectaccessreviews", "validatingadmissionpolicies", "validatingadmissionpolicybindings"}, "scoped: cluster-wide rights")
bound = "sluice-operator-namespaced"
check({b["roleRef"]["name"] for b in of("scoped", "ClusterRoleBinding")} == {"sluice-operator"}, "scoped: only those are bound cluster-wide")
bindings = {b["metadata"]["namespace"]: b["roleRef"] for b in of("scoped", "RoleBinding") if b["metadata"]["name"] == bound}
check(set(bindings) == {"shop", "dw"} and all(r == {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": bound} for r in bindings.values()), "scoped: RoleBindings")
namespaced = [r for r in of("scoped", "ClusterRole") if r["metadata"]["name"] == bound][0]["rules"]
wide = [r for r in of("default", "ClusterRole") if r["metadata"]["name"] == "sluice-operator"][0]["rules"]
check(wide == cluster["rules"] + namespaced[:-1], "scoped and cluster-wide rights are the same, but for the binding")
check(namespaced[-1] == {"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["rolebindings"], "resourceNames": [bound], "verbs": ["get", "patch"]}, "scoped: the binding is held")
check(f"--role-binding={bound}" in operator["scoped"]["args"], "scoped: the operator knows the binding")
check(not any(a.startswith("--role-binding") for a in operator["default"]["args"]), "no binding to hold by default")
check(not any("rolebindings" in rule["resources"] for rule in wide), "no right on RoleBindings by default")
for binding in of("scoped", "RoleBinding") + of("scoped", "ClusterRoleBinding"):
    check(binding["subjects"][0]["namespace"] == "sluice-system", "scoped: subject")

policy = one("default", "ValidatingAdmissionPolicy")
check(policy["metadata"]["name"] == "sluice-deletion-protection", "name of the policy")
check(one("default", "ValidatingAdmissionPolicyBinding")["spec"]["policyName"] == policy["metadata"]["name"], "the policy is bound")
check(not of("minimal", "ValidatingAdmissionPolicy"), "the policy can be switched off")

names = {d["metadata"]["name"] for d in of("default", "CustomResourceDefinition")}
check(names == {f"{k}.sluice.dev" for k in ("sources", "targets", "mirrors")}, f"CRDs: {sorted(names)}")
for crd in of("default", "CustomResourceDefinition"):
    check(crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep", "CRDs are kept")
for crd in of("all", "CustomResourceDefinition"):
    check("helm.sh/resource-policy" not in crd["metadata"].get("annotations", {}), "CRDs can be let go")
check(not of("minimal", "CustomResourceDefinition"), "CRDs can be left out")
check(len(of("all", "PodMonitor")) == 2 and not of("default", "PodMonitor"), "PodMonitors")
check("from" not in one("all", "NetworkPolicy")["spec"]["ingress"][0], "metrics for everyone")
check("--worker-image=example/worker:1" in operator["all"]["args"], "worker image")
check(operator["all"]["image"].startswith("example/sluice@sha256:"), "digest")
print(f"chart: {checks} assertions passed")

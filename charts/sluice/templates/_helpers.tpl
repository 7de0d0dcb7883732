{{- define "sluice.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "sluice.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "sluice.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Pods are found by these; the name is fixed because worker NetworkPolicies rely on it. */ -}}
{{- define "sluice.selectorLabels" -}}
app.kubernetes.io/name: sluice
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "sluice.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/name: sluice
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: sluice
{{- end -}}

{{- define "sluice.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (printf "%s-operator" (include "sluice.fullname" .)) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is needed when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "sluice.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- /* With watchNamespaces: the RoleBinding in each, and the ClusterRole that it binds. */ -}}
{{- define "sluice.roleBinding" -}}
{{- include "sluice.fullname" . }}-operator-namespaced
{{- end -}}

{{- /* Rights in the namespaces that are served, bound in the whole cluster or in each of them. */ -}}
{{- define "sluice.workloadRules" -}}
# Read the resources that say what is wanted; patch sets and removes our finalizers on them.
- apiGroups: [sluice.dev]
  resources: [sources, targets, mirrors]
  verbs: [get, list, watch, patch]
# Report what was observed.
- apiGroups: [sluice.dev]
  resources: [sources/status, targets/status, mirrors/status]
  verbs: [patch]
# Mirrors own their children with blockOwnerDeletion, where OwnerReferencesPermissionEnforcement is on.
- apiGroups: [sluice.dev]
  resources: [mirrors/finalizers]
  verbs: [update]
{{- if .Values.protectSecrets }}
# Read the credentials that Sources and Targets name, one by one (no list, no watch);
# patch keeps them with a finalizer while a Mirror uses them (protectSecrets).
- apiGroups: [""]
  resources: [secrets]
  verbs: [get, patch]
{{- else }}
# Read the credentials that Sources and Targets name, one by one (no list, no watch).
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
{{- end }}
# A worker's configuration; server-side apply needs create and patch, and what somebody edits by hand is put right at once.
# Of those that are watched only the operator's own are selected, and nothing but their metadata is sent.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch, delete]
# The worker itself.
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
# Find a worker's address and state; patch makes the kubelet refresh the mounted configuration at once,
# delete ends a pod that is stuck on a lost node.
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, patch, delete]
{{- if .Values.worker.networkPolicies }}
# Let only the operator and Prometheus reach a worker's port (worker.networkPolicies).
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
{{- end }}
# Tell of transitions beside the resource.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end -}}

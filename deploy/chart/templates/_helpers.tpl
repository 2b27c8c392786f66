{{/* A replica's name is <this>-<number>: at most 63 characters of [a-z0-9-], as server.replica requires. */}}
{{- define "adytum.name" -}}
{{- $name := .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $name) -}}
{{- fail "the release's name must begin with a letter and have only a to z, 0 to 9 and hyphens: it is part of the replicas' names" -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "adytum.selector" -}}
app.kubernetes.io/name: adytum
app.kubernetes.io/instance: {{ include "adytum.name" . }}
{{- end -}}

{{- define "adytum.labels" -}}
{{ include "adytum.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "adytum.hardened" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

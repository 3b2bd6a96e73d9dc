{{- define "bestroute.name" -}}
{{- .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-bestroute" .Release.Name) (contains "bestroute" .Release.Name)) | trunc 52 | trimSuffix "-" -}}
{{- end }}

{{- define "bestroute.selector" -}}
app.kubernetes.io/name: bestroute
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "bestroute.labels" -}}
{{ include "bestroute.selector" . }}
{{ include "bestroute.about" . }}
{{- end }}

{{- define "bestroute.about" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "bestroute.image" -}}
{{- with .Values.image }}{{ .repository }}{{ ternary (printf "@%s" .digest) (printf ":%s" .tag) (ne .digest "") }}{{ end -}}
{{- end }}

{{- define "bestroute.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "bestroute.name" .) -}}
{{- end }}

{{- define "bestroute.workers" -}}
{{- dig "server" "workers" 1 .Values.config | int -}}
{{- end }}

{{/* What Pod Security's level "restricted" asks of a container, and more. */}}
{{- define "bestroute.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "bestroute.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
# Secrets and volumes are read by group, so that no file has to be readable by all.
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/*
How a probe asks for a health name. Kubernetes' own gRPC probes know no TLS; health needs no token.
*/}}
{{- define "bestroute.probe" -}}
{{- $ := .root -}}
{{- if $.Values.tls.secretName -}}
exec:
  command:
    - bestroute
    - health
    - {{ .name }}
    - --address=127.0.0.1:{{ $.Values.ports.grpc }}
    - --tls-ca=/etc/bestroute/tls/ca.crt
    - --tls-server-name={{ required "tls.serverName: name one that the certificate has; the probes ask for it" $.Values.tls.serverName }}
    {{- if $.Values.tls.clientCertificates }}
    - --tls-cert=/etc/bestroute/tls/tls.crt
    - --tls-key=/etc/bestroute/tls/tls.key
    {{- end }}
{{- else -}}
grpc:
  port: {{ $.Values.ports.grpc }}
  service: {{ .name }}
{{- end }}
{{- with .timing.timeoutSeconds }}
{{- /* Python's start is part of a probe that is a command. */}}
timeoutSeconds: {{ ternary (max 5 .) . (ne $.Values.tls.secretName "") }}
{{- end }}
periodSeconds: {{ .timing.periodSeconds }}
failureThreshold: {{ .timing.failureThreshold }}
{{- end }}

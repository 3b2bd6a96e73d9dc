{{/*
bestroute.toml as a YAML mapping: the values' `config`, and what the chart knows better.
*/}}
{{- define "bestroute.settings" -}}
{{- $settings := deepCopy .Values.config -}}
{{- include "bestroute.refuseOwn" . -}}
{{- $workers := include "bestroute.workers" . | int -}}
{{- $cpu := dig "requests" "cpu" "" .Values.resources | toString -}}
{{- if and $cpu (not (dig "limits" "cpu" "" .Values.resources)) (ne (dig "engine" "provider" "" $settings) "kserve") -}}
  {{- $cores := ternary (divf (trimSuffix "m" $cpu) 1000) (float64 $cpu) (hasSuffix "m" $cpu) -}}
  {{- $threads := max 1 (div (floor $cores | int) $workers) -}}
  {{- $settings = mergeOverwrite (dict "engine" (dict "threads" $threads)) $settings -}}
{{- end -}}
{{- with .Values.bundle -}}
  {{- if ne .source "embedded" -}}
    {{- $_ := set $settings "bundle" (printf "/var/lib/bestroute/bundle/%s" .path | trimSuffix "/") -}}
  {{- end -}}
  {{- with .sha256 }}{{- $_ := set $settings "bundle_sha256" . -}}{{ end -}}
{{- end -}}
{{- if .Values.canary.enabled -}}
  {{- $canary := include "bestroute.canaryBundle" . | fromYaml -}}
  {{- $section := dict "share" .Values.canary.share "bundle" (printf "/var/lib/bestroute/canary/%s" $canary.path | trimSuffix "/") -}}
  {{- with $canary.sha256 }}{{- $_ := set $section "bundle_sha256" . -}}{{ end -}}
  {{- $_ := set $settings "canary" $section -}}
{{- end -}}
{{- if .Values.tls.secretName -}}
  {{- $files := dict "certificate" "/etc/bestroute/tls/tls.crt" "private_key" "/etc/bestroute/tls/tls.key" -}}
  {{- if .Values.tls.clientCertificates -}}
    {{- $_ := set $files "client_ca" "/etc/bestroute/tls/ca.crt" -}}
  {{- end -}}
  {{- $settings = mergeOverwrite $settings (dict "security" $files) -}}
{{- end -}}
{{- range $provider, $key := .Values.apiKeys -}}
  {{- if not (hasKey ($settings.providers | default dict) $provider) -}}
    {{- fail (printf "apiKeys.%s: there is no config.providers.%s" $provider $provider) -}}
  {{- end -}}
  {{- $where := dict "api_key_file" (printf "/etc/bestroute/keys/%s" $provider) -}}
  {{- if eq ($key.as | default "file") "env" -}}
    {{- $where = dict "api_key_env" (include "bestroute.keyVariable" $provider) -}}
  {{- end -}}
  {{- $settings = mergeOverwrite $settings (dict "providers" (dict $provider $where)) -}}
{{- end -}}
{{- toYaml $settings -}}
{{- end }}

{{- define "bestroute.keyVariable" -}}
{{- printf "API_KEY_%s" (regexReplaceAll "[^A-Z0-9]" (upper .) "_") -}}
{{- end }}

{{/* TOML, with integers that YAML's way through Helm has made 4.0 of as integers again. */}}
{{- define "bestroute.toml" -}}
{{- regexReplaceAll "(?m)^(\\s*\\S+ = -?[0-9]+)\\.0$" (include "bestroute.settings" . | fromYaml | toToml) "${1}" -}}
{{- end }}

{{/*
What a running server doesn't take over: when that changes, pods are replaced. The rest reaches
them as the changed file, which they watch.
*/}}
{{- define "bestroute.atStart" -}}
{{- $settings := include "bestroute.settings" . | fromYaml -}}
{{- if $settings.watch_config -}}
  {{- $settings = omit $settings "batching" "bundle" "bundle_sha256" "callers" "canary" "engine" "log_level" "models" "operations" "providers" "routing" "sessions" -}}
{{- end -}}
{{- toJson $settings | sha256sum -}}
{{- end }}

{{/* Settings that the chart makes from other values; given twice, they could differ. */}}
{{- define "bestroute.refuseOwn" -}}
{{- $config := .Values.config -}}
{{- range $key, $instead := dict
  "server.listen" "ports.grpc"
  "metrics.listen" "ports.metrics"
  "gateway.listen" "gateway.enabled and ports.gateway"
  "engine.cache" "engineCache"
  "bundle" "bundle"
  "bundle_sha256" "bundle.sha256"
  "canary" "canary"
  "security.certificate" "tls.secretName"
  "security.private_key" "tls.secretName"
  "security.client_ca" "tls.clientCertificates" -}}
  {{- $path := splitList "." $key -}}
  {{- $section := $config -}}
  {{- if gt (len $path) 1 -}}{{- $section = index $config (first $path) | default dict -}}{{- end -}}
  {{- if hasKey $section (last $path) -}}
    {{- fail (printf "config.%s: the chart sets it; give the value %s instead" $key $instead) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* The keys of providers that are files, as sources of a projected volume. */}}
{{- define "bestroute.keyFiles" -}}
{{- range $provider, $key := .Values.apiKeys }}
{{- if eq ($key.as | default "file") "file" }}
- secret:
    name: {{ $key.secretName }}
    items:
      - key: {{ $key.secretKey }}
        path: {{ $provider }}
{{- end }}
{{- end }}
{{- end }}

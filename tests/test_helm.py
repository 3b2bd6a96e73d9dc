"""The Helm chart: what it gives for many values, by the real helm.

There is no cluster here. Manifests are held against Kubernetes' own schemas; what they tell a
container to do is done by a real server in `test_helm_running`.
"""

import ipaddress
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

import bestroute
from bestroute.config import Settings
from bestroute.reloading import unchangeable
from deploy import generate
from tests.charts import (
    CUSTOM,
    PINNED,
    ROOT,
    SETS,
    SHA,
    VERSIONS,
    Manifest,
    Release,
    Values,
    every_set,
    helm,
    needs_helm,
    released,
)

pytestmark = needs_helm


# The manifests


@every_set
def test_it_is_good_helm_and_good_kubernetes(values: Values) -> None:
    linted = helm("lint", "--strict", str(generate.CHART), values=values)
    assert linted.returncode == 0, linted.stdout

    for manifest in released(values).manifests:
        if manifest["kind"] not in CUSTOM:
            for version in VERSIONS:
                kubernetes_validate.validate(manifest, version, strict=True)


def test_kubernetes_schemas_do_find_faults() -> None:
    broken = json.loads(json.dumps(released({}).one("Deployment")))
    broken["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["grpc"]["prot"] = 1

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


@every_set
def test_every_pod_is_as_the_restricted_level_wants_it(values: Values) -> None:
    release = released(values)
    for pod in (release.pod, release.one("Pod")["spec"]):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 65532
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not any("hostPath" in volume for volume in pod.get("volumes", ()))
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]
    for account in release.all("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


@every_set
def test_names_and_labels_lead_to_each_other(values: Values) -> None:
    release = released(values)
    deployment = release.one("Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    selector = deployment["selector"]["matchLabels"]
    ports = {port["name"]: port["containerPort"] for port in release.container["ports"]}
    volumes = {volume["name"] for volume in release.pod["volumes"]}

    assert selector.items() <= labels.items()
    assert not selector.items() <= release.one("Pod")["metadata"]["labels"].items(), "its own test"
    for service in release.all("Service"):
        assert service["spec"]["selector"] == selector
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()
    for kind, path in (("NetworkPolicy", "podSelector"), ("PodDisruptionBudget", "selector")):
        for manifest in release.all(kind):
            assert manifest["spec"][path] == {"matchLabels": selector}
    for container in (release.container, *release.pod.get("initContainers", ())):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert all(len(name) <= 15 for name in ports), "Kubernetes takes no longer names of ports"
    for monitor in release.all("PodMonitor"):
        endpoints = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        assert endpoints == {name for name in ports if name.startswith("metrics")}
    mounted = {m["mountPath"] for m in release.container["volumeMounts"] if not m.get("readOnly")}
    assert mounted == {"/var/cache/bestroute", "/tmp"}, "nothing else can be written"


# Settings


def every_setting() -> dict[str, Any]:
    """Each that examples/bestroute.toml shows, with the value that it shows."""
    text = (ROOT / "examples" / "bestroute.toml").read_text()
    return tomllib.loads(re.sub(r"(?m)^#(?=\[|\w+ = )", "", text))


OWN = [
    ("server", "listen"),
    ("metrics", "listen"),
    ("gateway", "listen"),
    ("engine", "cache"),
    ("security", "certificate"),
    ("security", "private_key"),
    ("security", "client_ca"),
    ("bundle",),
    ("bundle_sha256",),
    ("canary",),
]
"""What the chart sets itself."""


def without_own(settings: dict[str, Any]) -> dict[str, Any]:
    for *section, key in OWN:
        (settings.get(section[0], {}) if section else settings).pop(key, None)
    return settings


def of_image(target: str) -> dict[str, str]:
    """The settings that an image's environment has, which win over the file."""
    stages = re.split(r"(?m)^FROM .* AS (\w+)$", (ROOT / "Dockerfile").read_text())
    stage = dict(zip(stages[1::2], stages[2::2], strict=True))
    return dict(re.findall(r"\b(BESTROUTE_\w+)=(\S+)", stage["base"] + stage[target]))


@every_set
def test_the_server_takes_the_settings_in_its_container(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = released(values)
    tag = values.get("image", {}).get("tag", "cpu")
    for name, value in {**of_image(tag), **release.environment}.items():
        monkeypatch.setenv(name, value)

    settings = release.settings(tmp_path)

    assert settings.watch_config
    assert settings.server.drain_delay > 0
    ports = {p["name"]: p["containerPort"] for p in release.container["ports"]}
    assert settings.server.listen == f"0.0.0.0:{ports['grpc']}"
    assert settings.metrics.listen == f"0.0.0.0:{ports['metrics']}"
    asked = f"0.0.0.0:{ports['http']}" if "http" in ports else None
    assert settings.gateway.listen == asked, "off unless it is asked for"
    for key, value in values.get("config", {}).get("engine", {}).items():
        assert getattr(settings.engine, key) == value


def test_any_setting_can_be_given(tmp_path: Path) -> None:
    wanted = {**without_own(every_setting()), "watch_config": False}
    # A remote engine has none of the settings of one here, and is tried by itself.
    wanted["engine"] = {k: v for k, v in wanted["engine"].items() if not k.startswith("endpoint")}
    assert len(wanted) > 10

    settings = released({"config": wanted}).settings(tmp_path)

    assert settings == Settings.model_validate(wanted)
    assert "workers = 1\n" in released({"config": wanted}).toml, "not 1.0"


@pytest.mark.parametrize("path", OWN, ids=".".join)
def test_what_the_chart_sets_cannot_be_set_past_it(path: tuple[str, ...]) -> None:
    value: Any = {"share": 0.1} if path == ("canary",) else "0.0.0.0:1"
    if path == ("bundle_sha256",):
        value = SHA
    config: dict[str, Any] = {path[-1]: value}
    for section in path[:-1]:
        config = {section: config}

    done = helm("template", "x", str(generate.CHART), values={"config": config})

    assert done.returncode != 0
    assert f"config.{'.'.join(path)}: the chart sets it" in done.stderr


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replica": 3}, "replica"),
        ({"probes": {"readiness": {"period": 1}}}, "period"),
        ({"bundle": {"source": "s3"}}, "/bundle/source"),
        ({"bundle": {"oci": {"reference": "registry.example/bundles:latest"}}}, "reference"),
        ({"bundle": {"sha256": "abc"}}, "/bundle/sha256"),
        ({"canary": {"share": 1.5}}, "/canary/share"),
        ({"config": {"server": {"drain_dealy": 3}}}, "drain_dealy"),
        ({"config": {"server": {"workers": 0}}}, "/config/server/workers"),
        ({"config": {"providers": {"openai": {"api_key": "sk-1"}}}}, "api_key"),
        ({"apiKeys": {"openai": {"secretName": "s"}}}, "secretKey"),
        ({"apiKeys": {"opnai": {"secretName": "s", "secretKey": "k"}}}, "config.providers.opnai"),
        ({"bundle": {"source": "oci"}}, "bundle.oci.reference"),
        ({"bundle": {"source": "image"}}, "bundle.image.reference"),
        ({"bundle": {"source": "pvc"}}, "bundle.pvc.claimName"),
        ({"canary": {"enabled": True}}, "canary.bundle.source"),
        ({"tls": {"secretName": "s"}}, "tls.serverName"),
    ],
    ids=str,
)
def test_mistakes_are_named(values: Values, named: str) -> None:
    done = helm("template", "x", str(generate.CHART), values=values)

    assert done.returncode != 0
    assert named in done.stderr
    assert "sk-1" not in done.stderr


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        (SETS["claim"], ("NOT PINNED", "NOBODY IS ASKED")),
        (SETS["artifact"], ("NOBODY IS ASKED",)),
        ({**SETS["artifact"], **SETS["mtls"]}, ()),
    ],
    ids=("not pinned", "open to all", "neither"),
)
def test_whoever_installs_it_is_told_what_is_open(values: Values, warned: tuple[str, ...]) -> None:
    done = helm("install", "bestroute", str(generate.CHART), "--dry-run=client", values=values)
    assert done.returncode == 0, done.stderr

    notes = done.stdout.partition("NOTES:")[2]
    assert "gRPC at bestroute.default.svc:50051" in notes
    assert tuple(w for w in ("NOT PINNED", "NOBODY IS ASKED") if w in notes) == warned


def test_pods_are_replaced_for_what_they_cannot_take_over_and_for_nothing_else() -> None:
    different = SimpleNamespace(**{key: object() for key in Settings.model_fields})
    at_start = set(unchangeable(Settings(), cast(Settings, different)))
    template = (generate.CHART / "templates" / "_settings.tpl").read_text()
    [omitted] = re.findall(r"omit \$settings (.*) -", template)
    assert {key.strip('"') for key in omitted.split()} == set(Settings.model_fields) - at_start

    def release(**config: Any) -> Release:
        return released({"config": config})

    before, live = release(), release(routing={"cache_entries": 0}, operations={"shadow": True})
    assert live.toml != before.toml
    assert live.one("Deployment") == before.one("Deployment")
    assert release(server={"max_streams": 5}).annotations != before.annotations
    unwatched = [
        release(watch_config=False, routing={"cache_entries": n}).annotations for n in (0, 1)
    ]
    assert unwatched[0] != unwatched[1]


@pytest.mark.parametrize(
    ("resources", "config", "threads"),
    [
        ({}, {}, 1),
        ({"requests": {"cpu": "4"}}, {}, 4),
        ({"requests": {"cpu": 6}}, {"server": {"workers": 3}}, 2),
        ({"requests": {"cpu": "2500m"}}, {}, 2),
        ({"requests": {"cpu": "100m"}}, {}, 1),
        # The server sees a limit by itself.
        ({"limits": {"cpu": "4"}}, {}, None),
        ({}, {"engine": {"threads": 7}}, 7),
    ],
    ids=str,
)
def test_threads_are_those_that_were_asked_for(
    resources: Values, config: Values, threads: int | None, tmp_path: Path
) -> None:
    settings = released({"resources": resources, "config": config}).settings(tmp_path)

    assert settings.engine.threads == threads


def test_no_key_is_in_a_manifest_and_each_gets_where_the_server_reads_it(tmp_path: Path) -> None:
    release = released(SETS["keys"])
    providers = release.settings(tmp_path).providers
    [volume] = [v for v in release.pod["volumes"] if v["name"] == "keys"]
    [source] = volume["projected"]["sources"]
    [mount] = [m for m in release.container["volumeMounts"] if m["name"] == "keys"]
    [variable] = [e for e in release.container["env"] if "valueFrom" in e]

    assert not release.all("Secret")
    assert source["secret"] == {
        "name": "llm-keys",
        "items": [{"key": "openai", "path": "openai"}],
    }
    assert volume["projected"]["defaultMode"] == 0o440, "for the pod's group, and no others"
    assert str(providers["openai"].api_key_file) == f"{mount['mountPath']}/openai"
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "llm-keys", "key": "local"}}
    assert providers["in-house"].api_key_env == variable["name"]


# Start, probes and end


def test_probes_ask_for_the_health_names_that_the_server_has() -> None:
    container = released({}).container
    asked = {
        kind: container[f"{kind}Probe"]["grpc"] for kind in ("startup", "readiness", "liveness")
    }

    assert asked["startup"] == asked["readiness"] == {"port": 50051, "service": "readiness"}
    assert asked["liveness"] == {"port": 50051, "service": "liveness"}


@pytest.mark.parametrize(
    ("pre_stop", "server", "needed"),
    [
        (5, {}, 5 + 5 + 30),
        (0, {"drain_delay": 15, "drain_timeout": 120}, 135),
        (3, {"drain_delay": 0.5, "drain_timeout": 2.25}, 5.75),
        (20, {"drain_delay": None, "drain_timeout": None}, 50),  # the server's own defaults
    ],
)
def test_a_pod_has_the_time_to_drain(
    pre_stop: int, server: dict[str, float | None], needed: float, tmp_path: Path
) -> None:
    release = released({"preStopSeconds": pre_stop, "config": {"server": server}})
    limits = release.settings(tmp_path).server

    assert pre_stop + limits.drain_delay + limits.drain_timeout == needed
    assert needed + 5 < release.pod["terminationGracePeriodSeconds"] <= needed + 11
    assert (release.container.get("lifecycle") is None) == (pre_stop == 0)


def test_a_rollout_never_has_fewer_pods_and_waits_for_slow_starts() -> None:
    deployment = released({}).one("Deployment")["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}

    compiling = released(SETS["gpu"])
    probe = compiling.container["startupProbe"]
    start = probe["periodSeconds"] * probe["failureThreshold"]
    assert start >= 1800
    assert compiling.one("Deployment")["spec"]["progressDeadlineSeconds"] > start


def test_a_gpu_pod_gets_a_gpu_its_cache_and_the_engine(tmp_path: Path) -> None:
    release = released(SETS["gpu"])
    settings = release.settings(tmp_path)

    assert release.container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert release.pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    # The image sets `cuda` in its environment, which wins over the file.
    assert release.environment["BESTROUTE_ENGINE__PROVIDER"] == settings.engine.provider
    assert settings.engine.provider == "tensorrt"
    claim = release.one("PersistentVolumeClaim")
    [cache] = [v for v in release.pod["volumes"] if v["name"] == "engine-cache"]
    assert cache["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_image_and_chart_fit_each_other() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    release = released(SETS["gateway"])
    [exposed] = re.findall(r"^EXPOSE (.+)$", dockerfile, re.MULTILINE)
    chart = yaml.safe_load((generate.CHART / "Chart.yaml").read_text())

    assert chart["appVersion"] == bestroute.__version__
    assert f"USER {release.pod['securityContext']['runAsUser']}" in dockerfile
    assert of_image("gpu")["BESTROUTE_ENGINE__CACHE"] in {
        mount["mountPath"] for mount in release.container["volumeMounts"]
    }
    assert {int(port) for port in exposed.split()} == {
        port["containerPort"] for port in release.container["ports"]
    }
    # Whatever else an image's environment sets would win over `config` without a word.
    given = released(SETS["gpu"]).environment
    assert of_image("gpu").keys() - {"BESTROUTE_ENGINE__CACHE"} == given.keys()


# Bundles


@pytest.mark.parametrize("name", ["image volume", "artifact", "object store", "claim", "canary"])
def test_a_bundle_is_mounted_where_the_server_reads_it_and_pinned(
    name: str, tmp_path: Path
) -> None:
    values = SETS[name]
    release = released(values)
    settings = release.settings(tmp_path)
    mounts = {m["name"]: m for m in release.container["volumeMounts"]}

    assert settings.bundle is not None
    assert settings.bundle.is_relative_to(mounts["bundle"]["mountPath"])
    assert mounts["bundle"]["readOnly"] is True
    assert str(settings.bundle).endswith(values["bundle"].get("path", ""))
    assert settings.bundle_sha256 == values["bundle"].get("sha256")
    if name == "canary":
        assert settings.canary.bundle is not None
        assert settings.canary.bundle.is_relative_to(mounts["canary"]["mountPath"])
        assert (settings.canary.bundle_sha256, settings.canary.share) == (64 * "c", 0.1)
        assert "v3" not in str(settings.canary.bundle), "whose path is that of the first"


def test_a_bundle_is_pulled_into_the_volume_that_is_mounted() -> None:
    def pull(name: str) -> Manifest:
        release = released(SETS[name])
        [container] = release.pod["initContainers"]
        [volume] = [v for v in release.pod["volumes"] if v["name"] == "bundle"]
        assert "emptyDir" in volume
        assert {"name": "bundle", "mountPath": "/bundle"} in container["volumeMounts"]
        return cast(Manifest, container)

    artifact, store = pull("artifact"), pull("object store")

    assert artifact["args"][0] == "pull"
    assert artifact["args"][-1] == PINNED
    assert "--registry-config=/etc/registry/.dockerconfigjson" in artifact["args"]
    assert store["args"][-2:] == ["store:bundles/v3", "/bundle"]
    assert store["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert [c["name"] for c in released(SETS["canary"]).pod["initContainers"]] == [
        "pull-bundle",
        "pull-canary",
    ]
    [volume] = [v for v in released(SETS["image volume"]).pod["volumes"] if v["name"] == "bundle"]
    assert volume["image"] == {"reference": PINNED, "pullPolicy": "IfNotPresent"}


def test_the_share_of_a_canary_changes_without_new_pods() -> None:
    more = {**SETS["canary"], "canary": {**SETS["canary"]["canary"], "share": 0.5}}

    assert released(more).one("Deployment") == released(SETS["canary"]).one("Deployment")
    assert released(more).toml != released(SETS["canary"]).toml


# Network


def reachable(rule: Manifest, address: str) -> bool:
    """Whether a rule for egress lets packets to an address of no pod."""
    where = ipaddress.ip_address(address)

    def within(network: str) -> bool:
        return where in ipaddress.ip_network(network)

    return any(
        within(peer["ipBlock"]["cidr"]) and not any(map(within, peer["ipBlock"]["except"]))
        for peer in rule.get("to", ())
        if "ipBlock" in peer
    )


def test_only_callers_and_prometheus_get_in() -> None:
    release = released({**SETS["workers"], **SETS["gateway"]})
    calls, scrapes = release.one("NetworkPolicy")["spec"]["ingress"]
    [peer] = calls["from"]
    test = release.one("Pod")["metadata"]["labels"]
    ports = {p["name"]: p["containerPort"] for p in release.container["ports"]}
    metrics = {port for name, port in ports.items() if name.startswith("metrics")}

    assert peer["podSelector"]["matchLabels"].items() <= test.items(), "`helm test` may call"
    assert {p["port"] for p in calls["ports"]} == {ports["grpc"], ports["http"]}
    [allowed] = scrapes["ports"]
    assert set(range(allowed["port"], allowed["endPort"] + 1)) == metrics
    assert len(metrics) == 3
    assert scrapes["from"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    ]


def test_pods_reach_names_and_providers_and_nothing_inside() -> None:
    names, providers = released({}).one("NetworkPolicy")["spec"]["egress"]

    assert {(p["port"], p["protocol"]) for p in names["ports"]} == {(53, "UDP"), (53, "TCP")}
    assert providers["ports"] == [{"port": 443}]
    assert reachable(providers, "104.18.7.192")
    assert reachable(providers, "2606:4700::6812:7c0")
    for inside in ("10.0.0.1", "172.20.1.1", "192.168.1.1", "169.254.169.254", "fd00:ec2::254"):
        assert not reachable(providers, inside)
    alone = released({"networkPolicy": {"providersHttps": False}})
    assert len(alone.one("NetworkPolicy")["spec"]["egress"]) == 1

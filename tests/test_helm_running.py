"""What the Helm chart tells a container to do, done by a real server.

Files are where and as a kubelet mounts them, below a directory of the test's.
"""

import asyncio
import re
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest
import yaml  # type: ignore[import-untyped]
from cryptography import x509
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from bestroute.app import serving
from bestroute.cli import main
from bestroute.config import Metrics, Security, Settings
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests import tiny
from tests.certificates import Authority
from tests.charts import (
    SETS,
    SHA,
    TLS,
    needs_helm,
    of_file,
    released,
)
from tests.scrapes import text_at
from tests.test_server import process

pytestmark = needs_helm


class Mounted:
    """A directory with the ConfigMap's files, as a kubelet mounts and changes them."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "bestroute.toml"
        self._directory, self._written = directory, 0
        directory.mkdir()

    def write(self, text: str) -> None:
        """All files at once: by a link to another directory."""
        self._written += 1
        data = self._directory / f"..{self._written}"
        data.mkdir()
        (data / self.file.name).write_text(text)
        new = self._directory / "..data_tmp"
        new.symlink_to(data.name)
        new.replace(self._directory / "..data")
        if self._written == 1:
            self.file.symlink_to(f"..data/{self.file.name}")
        else:
            shutil.rmtree(self._directory / f"..{self._written - 1}")


def here(text: str, directory: Path) -> str:
    """Text of a manifest with the paths of a pod as paths below a directory."""
    for path in ("/var/lib/bestroute", "/etc/bestroute"):
        text = text.replace(path, str(directory))
    return text


async def test_a_changed_config_map_reaches_the_pod_it_is_mounted_in(tmp_path: Path) -> None:
    """Another bundle of a volume with several, as `helm upgrade --set bundle.path=v2` has it."""
    for version in ("v1", "v2"):
        (tmp_path / "bundle" / version).mkdir(parents=True)
        tiny.write(tmp_path / "bundle" / version, version=f"tiny-{version}")
    first = released(SETS["claim"])
    second = released({"bundle": {**SETS["claim"]["bundle"], "path": "v2"}})
    assert first.one("Deployment") == second.one("Deployment"), "or pods would be replaced"
    config = Mounted(tmp_path / "config")
    config.write(here(first.toml, tmp_path))
    container = first.container
    assert container["args"][:2] == ["serve", "--config"]
    assert here(container["args"][2], tmp_path) == str(config.file)
    [mount] = [m for m in container["volumeMounts"] if m["name"] == "config"]
    assert container["args"][2] == f"{mount['mountPath']}/{config.file.name}"
    assert "subPath" not in mount, "what is mounted so is never changed"
    environment = {
        name: value.replace("0.0.0.0:50051", "127.0.0.1:0").replace("0.0.0.0:9464", "127.0.0.1:0")
        for name, value in first.environment.items()
    }

    with process("--config", str(config.file), **environment) as (started, address):
        async with grpc.aio.insecure_channel(address) as channel:
            healths = health_pb2_grpc.HealthStub(channel)
            for kind in ("startup", "readiness", "liveness"):
                name = container[f"{kind}Probe"]["grpc"]["service"]
                answer = await healths.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            stub = routing_pb2_grpc.RoutingServiceStub(channel)
            assert (await stub.ListArms(pb.ListArmsRequest())).bundle_version == "tiny-v1"

            config.write(here(second.toml, tmp_path))

            async def serves() -> str:
                return (await stub.ListArms(pb.ListArmsRequest())).bundle_version

            while await serves() != "tiny-v2":  # noqa: ASYNC110
                await asyncio.sleep(0.1)  # what another process does has no event
        assert started.poll() is None


@pytest.mark.parametrize("name", ["tls", "mtls"])
async def test_probes_of_a_server_with_tls_need_no_token(
    name: str, settings: Settings, tmp_path: Path
) -> None:
    release = released(SETS[name])
    secret = tmp_path / "tls"
    secret.mkdir()
    authority = Authority()
    names = x509.DNSName(TLS["serverName"])
    authority.issue("bestroute", names).write(secret / "tls.crt", secret / "tls.key")
    (secret / "ca.crt").write_bytes(authority.certificate)
    (tmp_path / "keys.toml").write_text(f'someone = "sha256:{SHA}"\n')
    (tmp_path / "bestroute.toml").write_text(here(release.toml, tmp_path))
    security = {
        **Settings.load(tmp_path / "bestroute.toml").security.model_dump(exclude_defaults=True),
        "api_keys_file": tmp_path / "keys.toml",
    }
    settings = settings.model_copy(update={"security": Security.model_validate(security)})
    assert settings.security.certificate is not None
    assert (settings.security.client_ca is not None) == (name == "mtls")

    async with serving(settings) as server:
        port = server.address.rpartition(":")[2]

        async def probe(kind: str, *, port: str = port) -> int:
            command, *arguments = release.container[f"{kind}Probe"]["exec"]["command"]
            assert command == "bestroute"
            arguments = [here(a, tmp_path).replace("50051", port) for a in arguments]
            return await asyncio.to_thread(main, arguments)

        assert [await probe(kind) for kind in ("startup", "readiness", "liveness")] == [0, 0, 0]
        assert await probe("readiness", port="1") == 1


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("readiness", 1, "not serving as readiness"),
        ("liveness", 0, ""),
        ("nobody", 1, "NOT_FOUND"),
    ],
)
async def test_a_probe_by_command_fails_where_the_service_does_not_serve(
    name: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As while it drains."""
    healths = health.aio.HealthServicer()
    await healths.set("readiness", health_pb2.HealthCheckResponse.NOT_SERVING)
    await healths.set("liveness", health_pb2.HealthCheckResponse.SERVING)
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        ended = await asyncio.to_thread(main, ["health", name, "--address", f"127.0.0.1:{port}"])
    finally:
        await server.stop(0)

    assert ended == code
    assert said in capsys.readouterr().err


# Scaling


def scaling_queries() -> dict[str, str]:
    """All of KEDA's and of prometheus-adapter's, as Prometheus gets them."""
    keda = released(SETS["keda"]).one("ScaledObject")["spec"]["triggers"]
    adapter = of_file("kubernetes/prometheus-adapter.yaml")["rules"]["custom"]
    queries = {f"keda_{n}": trigger["metadata"]["query"] for n, trigger in enumerate(keda)}
    for rule in adapter:
        query = rule["metricsQuery"].replace("<<.Series>>", rule["seriesQuery"].split("{")[0])
        query = query.replace("<<.LabelMatchers>>", 'namespace="llm",pod=~"bestroute-a-b"')
        queries[rule["name"]["as"]] = query.replace("<<.GroupBy>>", "pod")
    return queries


def test_scaled_objects_and_autoscalers_say_what_is_aimed_at() -> None:
    keda = released(SETS["keda"])
    spec = keda.one("ScaledObject")["spec"]
    assert spec["scaleTargetRef"] == {"name": keda.one("Deployment")["metadata"]["name"]}
    assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
    assert "replicas" not in keda.one("Deployment")["spec"], "or each upgrade would set it back"
    for trigger in spec["triggers"]:
        assert trigger["type"] == "prometheus"
        assert trigger["metricType"] == "Value", "a wait is not to be divided by the pods"
        assert trigger["metadata"].keys() == {"serverAddress", "query", "threshold"}
        assert all(isinstance(value, str) for value in trigger["metadata"].values())

    hpa = released(SETS["hpa"])
    spec = hpa.one("HorizontalPodAutoscaler")["spec"]
    assert spec["scaleTargetRef"]["name"] == hpa.one("Deployment")["metadata"]["name"]
    rules = of_file("kubernetes/prometheus-adapter.yaml")["rules"]["custom"]
    assert {m["pods"]["metric"]["name"] for m in spec["metrics"]} == {
        rule["name"]["as"] for rule in rules
    }
    assert {m["pods"]["target"]["averageValue"] for m in spec["metrics"]} == {"0.02"}


async def test_what_is_scaled_on_is_what_a_server_tells(settings: Settings) -> None:
    settings = settings.model_copy(update={"metrics": Metrics(listen="127.0.0.1:0")})
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        await routing_pb2_grpc.RoutingServiceStub(channel).Route(pb.RouteRequest(prompt="easy"))
        assert server.metrics is not None
        told = await asyncio.to_thread(text_at, server.metrics, "text/plain")

    named = {
        name
        for q in scaling_queries().values()
        for name in re.findall(r"\b(bestroute_\w+_bucket)", q)
    }
    assert named == {
        "bestroute_stage_duration_seconds_bucket",
        "bestroute_event_loop_lag_seconds_bucket",
    }
    for name in named:
        assert re.search(rf"^{name}{{", told, re.MULTILINE), name
    stage = r'^bestroute_stage_duration_seconds_bucket{.*network="(\w+)".*stage="queue"'
    assert set(re.findall(stage, told, re.MULTILINE)) == {"router", "reward"}


@pytest.mark.skipif(
    not shutil.which("promtool"), reason="Prometheus is not installed (apt install prometheus)"
)
@pytest.mark.parametrize(("wait", "lag", "found"), [(0.2, 0.0004, 0.2), (0, 0, 0)])
def test_the_queries_find_the_longest_wait_and_zero_where_nothing_waits(
    wait: float, lag: float, found: float, tmp_path: Path
) -> None:
    """Every input waits 0.1 to 0.2 s for the router and hardly for the reward model."""

    def series(name: str, low: str, labels: str, value: float) -> list[dict[str, str]]:
        of_pod = f'namespace="llm",pod="bestroute-a-b"{labels}'
        counts = {low: "0+0x20", "0.2": "0+60x20", "+Inf": "0+60x20"}
        if value < 0.1:
            counts = dict.fromkeys(counts, "0+60x20" if value else "5+0x20")
        return [
            {"series": f'{name}{{{of_pod},le="{le}"}}', "values": values}
            for le, values in counts.items()
        ]

    queue = "bestroute_stage_duration_seconds_bucket"
    router, reward = (f',network="{n}",stage="queue"' for n in ("router", "reward"))
    queries = scaling_queries()
    rules = [{"record": name, "expr": query} for name, query in queries.items()]
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "g", "interval": "15s", "rules": rules}]})
    )
    inputs = [
        *series(queue, "0.1", router, wait),
        *series(queue, "0.1", reward, lag),
        *series("bestroute_event_loop_lag_seconds_bucket", "0.1", "", lag),
        # Of another deployment, whose inputs wait for seconds.
        *(
            {
                "series": f'{queue}{{namespace="llm",pod="bestroute-2-a-b"{router},le="{le}"}}',
                "values": values,
            }
            for le, values in (("1", "0+0x20"), ("9", "0+9x20"), ("+Inf", "0+9x20"))
        ),
    ]
    tests = []
    for name in queries:
        waits = found if name in ("keda_0", "bestroute_queue_wait_p95_seconds") else None
        bounds = (0.19, 0.2) if waits else (0, 0 if not lag else 0.1)
        query = f"count({name} >= {bounds[0]} and {name} <= {bounds[1]})"
        expected = [{"labels": "{}", "value": 1}]
        tests.append({"expr": query, "eval_time": "5m", "exp_samples": expected})
    (tmp_path / "test.yml").write_text(
        yaml.safe_dump(
            {
                "rule_files": ["rules.yml"],
                "evaluation_interval": "15s",
                "tests": [{"interval": "15s", "input_series": inputs, "promql_expr_test": tests}],
            }
        )
    )

    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stdout + done.stderr

"""Dashboard and alert rules: sound in themselves, and about metrics that a real server has."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml  # type: ignore[import-untyped]

from bestroute.app import Running
from bestroute.config import Metrics, Settings
from bestroute.v1 import routing_pb2 as pb
from tests.scrapes import text_at
from tests.upstreams import Upstream, says, served_at

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "bestroute.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
TARGETS: list[dict[str, Any]] = [t for panel in PANELS for t in panel.get("targets", ())]
GROUPS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
RECORDED = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}

ROUTED = 20
_VARIABLES = {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*"}

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="Prometheus is not installed (apt install prometheus)",
)


@pytest.fixture
def settings(settings: Settings, upstream: Upstream) -> Settings:
    """A server that has something to tell in every part."""
    served = served_at(upstream.url, "small", "medium", "large")
    return settings.model_copy(
        update={
            "metrics": Metrics(listen="127.0.0.1:0"),
            "providers": served.providers,
            "models": served.models,
        }
    )


async def put_to_use(stub: "RoutingServiceAsyncStub", upstream: Upstream) -> None:
    upstream.scripts = [says("good", tokens=3)]
    for number in range(ROUTED):
        await stub.Route(pb.RouteRequest(prompt=f"word{number}"))
    await stub.Score(pb.ScoreRequest(prompt="easy", responses=["good"]))
    async for _ in stub.Generate(pb.GenerateRequest(request=pb.RouteRequest(prompt="easy"))):
        pass


def series(text: str) -> set[str]:
    """Names that the families of a scrape have in queries, whether or not any is there by now."""
    names = set[str]()
    for family, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        suffixes = ("_bucket", "_sum", "_count") if kind in ("histogram", "summary") else ("",)
        names |= {family + suffix for suffix in suffixes}
    return names


def named(query: str) -> Iterator[str]:
    """The metrics that a query names; a pattern of names as each that it stands for."""
    pattern = r"\b(?:bestroute|gen_ai|process|job:bestroute)_(?:[\w:]|\([\w|]+\))+"
    for name in re.findall(pattern, query):
        choice = re.search(r"\((.+)\)", name)
        for each in choice[1].split("|") if choice else ("",):
            yield name.replace(choice[0], each) if choice else name


async def test_every_metric_in_dashboard_and_rules_is_one_that_a_server_has(
    server: Running,
) -> None:
    assert server.metrics is not None
    there = series(await asyncio.to_thread(text_at, server.metrics, "text/plain")) | RECORDED
    labels = {"gen_ai_request_model", "gen_ai_token_type"}

    queries = [target["expr"] for target in TARGETS]
    queries += [rule["expr"] for group in GROUPS for rule in group["rules"]]
    queries += [v["definition"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    names = {name for query in queries for name in named(query)} - labels

    assert len(names) > 30
    assert names - there == set()


def test_grafana_can_show_the_dashboard() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    assert {v["name"] for v in DASHBOARD["templating"]["list"]} >= {"datasource", "instance"}
    identities = [panel["id"] for panel in PANELS]
    assert len(set(identities)) == len(identities)
    for panel in PANELS:
        assert panel["title"]
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
        references = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(references)) == len(references)
    for target in TARGETS:
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert '=~"$instance"' in target["expr"] or "job:" in target["expr"]
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_every_alert_says_what_to_do_and_is_tried() -> None:
    tried = (DEPLOY / "prometheus" / "rules_test.yml").read_text()
    for alert in ALERTS:
        assert alert["annotations"]["summary"]
        assert len(alert["annotations"]["description"]) > 80
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert f'alertname="{alert["alert"]}", alertstate="firing"' in tried, alert["alert"]


@needs_prometheus
@pytest.mark.parametrize(
    "command", [("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")]
)
def test_promtool_finds_nothing_wrong(command: Sequence[str]) -> None:
    checked = subprocess.run(
        ["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, timeout=60
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr


class Prometheus:
    """A Prometheus that runs."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def get(self, path: str, **parameters: str) -> Any:
        """The data that it answers with."""
        url = f"http://{self._address}{path}?{urllib.parse.urlencode(parameters)}"

        def read() -> Any:
            with urllib.request.urlopen(url, timeout=20) as response:
                return json.load(response)["data"]

        return await asyncio.to_thread(read)

    async def query(self, query: str) -> list[dict[str, Any]]:
        """The series that a query gives."""
        found: list[dict[str, Any]] = (await self.get("/api/v1/query", query=query))["result"]
        return found

    async def rule_states(self) -> set[str]:
        """How evaluating the rules went: ok, err, or unknown where it is still to come."""
        groups = (await self.get("/api/v1/rules"))["groups"]
        return {rule["health"] for group in groups for rule in group["rules"]}


@pytest.fixture
async def prometheus(server: Running, tmp_path: Path) -> AsyncIterator[Prometheus]:
    """A real Prometheus with our rules, that scrapes the server."""
    configuration = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "250ms", "evaluation_interval": "500ms"}
    configuration["rule_files"] = [str(RULES)]
    [job] = configuration["scrape_configs"]
    [targets] = job["static_configs"]
    targets["targets"] = [server.metrics]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=error",
    )
    try:
        yield Prometheus(address)
    finally:
        process.terminate()
        await process.wait()


@needs_prometheus
async def test_a_real_prometheus_scrapes_and_answers_every_query(
    stub: "RoutingServiceAsyncStub", upstream: Upstream, prometheus: Prometheus
) -> None:
    await put_to_use(stub, upstream)
    counted = 'bestroute_rpc_duration_seconds_count{method="Route",code="OK",job="bestroute"}'
    async with asyncio.timeout(60):
        while True:
            with suppress(OSError):
                if [s["value"][1] for s in await prometheus.query(counted)] == [str(ROUTED)]:
                    break
            await asyncio.sleep(0.1)
    # Rates need two scrapes between which something has happened.
    await put_to_use(stub, upstream)
    await asyncio.sleep(1)

    answered = 0
    for target in TARGETS:
        query = target["expr"]
        for variable, value in _VARIABLES.items():
            query = query.replace(variable, value)
        found = await prometheus.query(query)
        answered += bool(found)
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert all(label in one["metric"] for one in found), (query, label)
    async with asyncio.timeout(60):
        while "unknown" in (states := await prometheus.rule_states()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    firing = await prometheus.query('ALERTS{alertstate="firing"}')

    assert answered >= 35, f"{answered} of {len(TARGETS)} panels show something"
    assert states == {"ok"}, "each was evaluated, without an error"
    assert firing == [], "nothing is wrong"

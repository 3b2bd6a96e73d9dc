"""The load generator, and real servers under a little of it."""

import asyncio
import json
import math
import os
import time
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest

from benchmarks import page, synthetic
from benchmarks.compare import setup_of
from benchmarks.latencies import Call, figures, medians, poisson_arrivals, quantile
from benchmarks.load import closed_loop, open_loop
from benchmarks.peers import clients
from benchmarks.peers.environment import HERE, dependencies
from benchmarks.peers.model import TYPICAL, Cost
from benchmarks.peers.registry import PEERS, Peer
from benchmarks.peers.running import Setup, processes, started
from benchmarks.turns import Load, Plan, compare, largest_difference
from bestroute import networks, router
from bestroute.app import serving
from bestroute.bundle import Bundle
from bestroute.config import Settings
from tests import tiny

PROMPTS = ["easy", "hard hard", "word1 easy", "good bad word2"]
LOGITS = [4.0, -8.0, 4.0, 0.0]


def test_a_quantile_is_one_of_the_values() -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert quantile(range(1, 101), 0.99) == 99
    assert quantile([5.0], 0.99) == 5.0
    assert quantile([1.0, 2.0, math.inf], 0.99) == math.inf


def test_arrivals_are_poisson() -> None:
    arrivals = poisson_arrivals(200, 50, seed=1)
    gaps = np.diff(arrivals)
    assert arrivals == poisson_arrivals(200, 50, seed=1) != poisson_arrivals(200, 50, seed=2)
    assert all(a < b for a, b in pairwise(arrivals))
    assert 0 < arrivals[0] < arrivals[-1] < 50
    assert len(arrivals) == pytest.approx(10_000, rel=0.05)
    # Of an exponential distribution, and of few others, the deviation is the mean.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)


def test_figures_count_calls_without_an_answer_as_infinitely_late() -> None:
    calls = [Call(i, i + 0.1, i + 0.5) for i in range(8)] + [Call(8, 8.0, None), Call(9, 9, 9.25)]
    found = figures(calls)
    assert (found["calls"], found["answered"]) == (10, 9)
    assert found["per_second"] == pytest.approx(9 / 9.25)
    assert found["p50_ms"] == pytest.approx(500)
    assert found["p99_ms"] is None
    assert found["late_ms"] == pytest.approx(100)
    nobody = figures([Call(0, 0, None)])
    assert (nobody["per_second"], nobody["p50_ms"]) == (0.0, None)


def test_medians_take_a_missing_quantile_for_the_largest() -> None:
    runs = [{"p99_ms": value, "answered": 3} for value in (2.0, None, 1.0)]
    assert medians(runs) == {"p99_ms": 2.0, "answered": 3}
    assert medians([{"p99_ms": None}, {"p99_ms": None}, {"p99_ms": 1.0}]) == {"p99_ms": None}


async def test_a_stall_shows_in_every_call_that_was_due_meanwhile() -> None:
    """Also in those that it kept the generator from making (coordinated omission)."""
    asked = 0

    async def ask(_: str) -> None:
        nonlocal asked
        asked += 1
        if asked == 10:
            time.sleep(0.4)  # noqa: ASYNC251

    arrivals = [i / 100 for i in range(100)]
    calls = await open_loop(ask, PROMPTS, arrivals)
    waited = [call.latency for call in calls]
    from_begun = [call.ended - call.begun for call in calls if call.ended is not None]
    assert len(calls) == 100
    assert sum(latency > 0.1 for latency in waited) >= 25
    assert sum(latency > 0.1 for latency in from_begun) == 1
    closed = await closed_loop(ask, PROMPTS, 1, 0.01)
    assert max(call.latency for call in closed) < 0.4


async def test_overload_shows_in_an_open_loop_only() -> None:
    busy = asyncio.Lock()

    async def ask(_: str) -> None:
        async with busy:
            await asyncio.sleep(0.02)

    opened = figures(await open_loop(ask, PROMPTS, poisson_arrivals(150, 0.8, seed=0)))
    closed = figures(await closed_loop(ask, PROMPTS, 2, 0.4))
    assert opened["p99_ms"] is not None
    assert closed["p99_ms"] is not None
    assert opened["p99_ms"] > 4 * closed["p99_ms"]


async def test_a_closed_loop_has_as_many_calls_under_way_as_callers() -> None:
    under_way, seen, asked = 0, set(), []

    async def ask(prompt: str) -> None:
        nonlocal under_way
        under_way += 1
        seen.add(under_way)
        asked.append(prompt)
        await asyncio.sleep(0.01)
        under_way -= 1

    calls = await closed_loop(ask, PROMPTS, 3, 0.15)
    assert max(seen) == 3
    assert asked[:5] == [*PROMPTS, PROMPTS[0]]
    assert len(calls) == len(asked)
    assert all(call.due == call.begun or call.begun - call.due < 0.1 for call in calls)


async def test_refused_and_endless_calls_have_no_answer() -> None:
    async def refuse(_: str) -> None:
        await asyncio.sleep(0.01)
        raise ConnectionError

    async def hang(_: str) -> None:
        await asyncio.Event().wait()

    for ask in (refuse, hang):
        for calls in (
            await open_loop(ask, PROMPTS, [0.0, 0.01], grace=0.1),
            await closed_loop(ask, PROMPTS, 2, 0.02, grace=0.1),
        ):
            assert len(calls) >= 2
            assert all(call.ended is None for call in calls)


def test_what_a_peer_needs_stands_in_its_file() -> None:
    assert dependencies("plain") == []
    assert dependencies("mosec")[0].startswith("mosec==")
    for peer in PEERS.values():
        assert (HERE / f"{peer.server}.py").exists()
        assert all("==" in each or each == "numpy<2" for each in dependencies(peer.server))


def _setup(bundle: Path) -> Setup:
    loaded = Bundle.load(bundle)
    return setup_of(loaded, loaded.network_path(loaded.manifest.router, ("fp32",)), threads=1)


def _plan(logits: list[float]) -> Plan:
    rows = [np.array(tiny.probabilities(logit), dtype=np.float32) for logit in logits]
    loads = [Load(callers=2), Load(rate=40)]
    return Plan(PROMPTS, rows, loads, seconds=0.4, repeats=2)


@pytest.mark.timeout(120)
async def test_servers_are_compared_in_turn_and_drawn(tiny_bundle: Path, tmp_path: Path) -> None:
    peers = [PEERS["plain"], Peer("mosec", "its twin", "plain", clients.unary)]
    turns: list[str] = []
    compared = await compare(
        peers,
        _setup(tiny_bundle),
        _plan(LOGITS),
        lambda peer, load, _=1: turns.append(peer.name) if load is None else None,
    )
    assert turns == 2 * ["plain", "mosec"]
    assert compared["could_not_run"] == {}
    for found in compared["runs"].values():
        assert found["difference"] <= 1e-5
        assert list(found["loads"]) == ["2 callers", "40 per second"]
        for runs in found["loads"].values():
            assert len(runs) == 2
            for run in runs:
                assert run["answered"] == run["calls"] > 0
                assert run["load_cores"] > 0
        assert sum(run["server_cores"] for run in found["loads"]["2 callers"]) > 0

    record = {
        "benchmark": "peers-minilm",
        "date": "2026-01-01T00:00:00",
        "commit": "0000000",
        "uncommitted_changes": False,
        "machine": {"cpu": "a CPU"},
        "settings": {
            "shape": "minilm",
            "stock": False,
            "synthetic": None,
            "engine_threads": 1,
            "server_cores": [0],
            "load_cores": None,
            "seconds": 0.4,
            "repeats": 2,
            "callers": [2],
            "rates": [40.0],
        },
        "figures": json.loads(json.dumps(compared)),
    }
    readme = tmp_path / "README.md"
    readme.write_text("What it is.\n\n## Results\n\nold\n")
    page.write({record["benchmark"]: record}, readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("What it is.\n\n## Results\n")
    assert "old" not in text
    assert "| its twin |" in text
    assert "(./peers-minilm.svg)" in text
    assert "its twin" in (tmp_path / "peers-minilm.svg").read_text()


@pytest.mark.timeout(120)
async def test_wrong_rows_and_failed_starts_are_reported(tiny_bundle: Path) -> None:
    setup = _setup(tiny_bundle)
    wrong = await compare([PEERS["plain"]], setup, _plan([4.0, -8.0, 4.0, 0.1]))
    assert "differ from the bare session's by 0.0" in wrong["could_not_run"]["plain"]
    assert wrong["runs"] == {}

    nothing = Setup({**setup.environment, "PEER_MODEL": "/nowhere.onnx"}, setup.cores)
    missing = await compare([PEERS["plain"]], nothing, _plan(LOGITS))
    reason = missing["could_not_run"]["plain"]
    assert reason.startswith("turn 1: it ended with exit code 1")
    assert "/nowhere.onnx" in reason


@pytest.mark.timeout(120)
async def test_bestroute_is_called_by_single_calls_and_by_streams(tiny_bundle: Path) -> None:
    rows = _plan(LOGITS).rows
    async with started(PEERS["bestroute"], _setup(tiny_bundle)) as server:
        for name in ("bestroute", "bestroute-stream"):
            async with PEERS[name].connect(server.address) as client:
                assert await largest_difference(client, PROMPTS, rows) <= 1e-5
                assert await largest_difference(client, PROMPTS, rows[1:]) > 0.1
                calls = await closed_loop(client.ask, PROMPTS, 4, 0.2)
                assert all(call.ended is not None for call in calls)
                with pytest.raises((grpc.aio.AioRpcError, RuntimeError), match="prompt"):
                    await client.ask("")


@pytest.mark.timeout(60)
async def test_without_an_engine_a_run_takes_what_was_said(
    tiny_bundle: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = Cost.parse("200,100")
    assert cost == Cost(a_ms=200, b_us=100)
    for module, replaced in ((networks, "load_text_model"), (router, "check_golden")):
        monkeypatch.setattr(module, replaced, None)  # to be put back
    synthetic.install(cost)
    async with serving(settings) as server, clients.route(server.address) as client:
        await _check_that_it_waits(client)

    setup = _setup(tiny_bundle)
    waiting = Setup({**setup.environment, "BESTROUTE_SYNTHETIC": "200,100"}, setup.cores)
    async with started(PEERS["plain"], waiting) as plain, clients.unary(plain.address) as client:
        await _check_that_it_waits(client)


async def _check_that_it_waits(client: clients.Client) -> None:
    typical, start = await client.row(TYPICAL), time.perf_counter()
    row = await client.row("hard " * 28)
    assert time.perf_counter() - start >= 0.203
    assert row.tolist() == typical.tolist()


@pytest.mark.timeout(60)
async def test_no_process_of_a_server_is_left(tiny_bundle: Path) -> None:
    async with started(PEERS["plain"], _setup(tiny_bundle)) as server:
        assert server.pid in {process.pid for process in processes()}
        assert server.cpu_seconds() > 0
    assert server.pid not in {process.session for process in processes()}
    assert os.getpid() in {process.pid for process in processes()}

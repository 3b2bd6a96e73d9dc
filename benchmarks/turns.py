"""Servers taking turns: each started, checked, put under every load, and ended; then all again."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.latencies import figures, poisson_arrivals
from benchmarks.load import Ask, closed_loop, open_loop
from benchmarks.peers.clients import Client
from benchmarks.peers.environment import HERE, Unavailable
from benchmarks.peers.registry import Peer
from benchmarks.peers.running import Running, Setup, started

TOLERANCE = 1e-4
"""How far a row may be from the bare session's; the golden outputs of a bundle get as much."""
Rows = list[npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Load:
    """Callers in a closed loop, or arrivals in an open one.

    Attributes:
        callers: of a closed loop; 0 in an open one.
        rate: arrivals per second of an open loop; 0 in a closed one.
    """

    callers: int = 0
    rate: float = 0.0

    @property
    def name(self) -> str:
        """In tables and in the JSON."""
        return f"{self.callers} callers" if self.callers else f"{self.rate:g} per second"

    async def put_on(self, ask: Ask, prompts: Sequence[str], seconds: float) -> dict[str, Any]:
        """Put it on a server for some seconds; see `figures`."""
        if self.callers:
            return figures(await closed_loop(ask, prompts, self.callers, seconds))
        arrivals = poisson_arrivals(self.rate, seconds, seed=0)
        return figures(await open_loop(ask, prompts, arrivals))


@dataclass(frozen=True)
class Plan:
    """What is done with every server.

    Attributes:
        prompts: what callers send.
        rows: what the bare session gives for the first of them, float32 [A] each.
        loads: in this order.
        seconds: of each load.
        repeats: of every server's turn.
    """

    prompts: Sequence[str]
    rows: Rows
    loads: Sequence[Load]
    seconds: float
    repeats: int


async def compare(
    peers: Sequence[Peer], setup: Setup, plan: Plan, report: Callable[..., None] = lambda *_: None
) -> dict[str, Any]:
    """Measure servers, taking turns: all once, then all again, and so on.

    Args:
        peers: in this order.
        setup: what they serve, on what.
        plan: what is done with each.
        report: see `Report`.

    Returns:
        `runs`: per peer its title, the largest difference of a row, and per load a list with the
        figures of each turn. `could_not_run`: per peer that failed, and has no further turns, why,
        in the words of what failed.
    """
    runs: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for turn in range(1, plan.repeats + 1):
        for peer in peers:
            if peer.name in failed:
                continue
            report(peer, None, 0)
            try:
                async with started(peer, setup) as server, peer.connect(server.address) as client:
                    measured, difference = await _turn(peer, server, client, plan, report)
            except Unavailable as error:
                failed[peer.name] = f"turn {turn}: {_without_places(str(error))}"
                report(peer, None, len(plan.loads))
                continue
            found = runs.setdefault(
                peer.name, {"title": peer.title, "difference": 0.0, "loads": {}}
            )
            found["difference"] = max(found["difference"], difference)
            for name, figure in measured.items():
                found["loads"].setdefault(name, []).append(figure)
    return {"runs": runs, "could_not_run": failed}


def _without_places(text: str) -> str:
    """What failed, without where on this machine it lies."""
    return text.replace(f"{HERE.parents[1]}{os.sep}", "").replace(str(Path.home()), "~")


async def _turn(
    peer: Peer, server: Running, client: Client, plan: Plan, report: Callable[..., None]
) -> tuple[dict[str, Any], float]:
    """Check a server and put it under each load; gives figures by load, and the difference."""
    difference = await largest_difference(client, plan.prompts, plan.rows)
    if not difference <= TOLERANCE:
        raise Unavailable(f"its rows differ from the bare session's by {difference:.2g}")
    most = max(load.callers for load in (*plan.loads, Load(callers=8)))
    await closed_loop(client.ask, plan.prompts, most, plan.seconds / 4)
    turn = {}
    for load in plan.loads:
        report(peer, load, 0)
        turn[load.name] = await _accounted(
            server, load.put_on(client.ask, plan.prompts, plan.seconds)
        )
        await _settled(client, plan.prompts[0])
        report(peer, load)
    return turn, difference


async def largest_difference(client: Client, prompts: Sequence[str], rows: Rows) -> float:
    """Send prompts all at once, and compare what comes back with rows float32 [A]."""
    given = await asyncio.gather(*(client.row(p) for p, _ in zip(prompts, rows, strict=False)))
    return max(
        float(np.abs(got[: len(row)] - row).max()) for got, row in zip(given, rows, strict=True)
    )


async def _accounted(server: Running, run: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """A run's figures, with the cores that the server and this process kept busy meanwhile."""
    start, served, own = time.perf_counter(), server.cpu_seconds(), time.process_time()
    found = await run
    served, own = server.cpu_seconds() - served, time.process_time() - own
    seconds = time.perf_counter() - start
    return {**found, "server_cores": served / seconds, "load_cores": own / seconds}


async def _settled(client: Client, prompt: str) -> None:
    """Wait until what a run has left in the server's queue is done.

    Raises:
        Unavailable: it takes a minute.
    """
    end = time.monotonic() + 60
    while True:
        try:
            async with asyncio.timeout(60):
                await client.ask(prompt)
                return
        except Exception as error:  # whatever the peer's client raises
            if time.monotonic() > end:
                raise Unavailable(f"no answer any more after a run: {error!r}") from error
        await asyncio.sleep(0.1)

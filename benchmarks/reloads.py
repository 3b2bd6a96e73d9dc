"""Hundreds of reloads under load: not one failed call, and no answer of a version that wasn't live.

    python -m benchmarks.reloads [--reloads 400] [--pause 0.25] [--short]

`bestroute serve` in a process of its own, with a link as its bundle, asked all the time by Route,
RouteStream, Score and Generate (from an LLM's API in this process). First nothing is changed; then,
one after the other, the bundle by its link (`bundle activate` and `rollback`) and by the
configuration, a canary with two shares, its promotion and its withdrawal, an arm that is switched
off, shadow mode, and a bundle that can't be loaded. After each the log has to say that it is in
force before the next is made.

Two bundles whose numbers differ say by every number of an answer which of them computed it. The
ledger holds what was in force when: from the write of a change until the log tells of it, either
is. An answer is right if version, probabilities, arm and rewards are all those of one state that
was in force between its call's beginning and its end. Latencies are counted from when a call was
due, with and without reloads side by side. The exit code is 1 if a call failed, an answer was
wrong or the memory grew. `--short` takes some seconds and keeps nothing.
"""

import argparse
import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from aiohttp import web
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.latencies import Call, figures, quantile
from benchmarks.process import served
from bestroute.links import point
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub
from tests import tiny

A, B = "a", "b"
SHIFTS = {A: 0.0, B: 1.0}
CHOSEN = {
    (A, False): ("small", 3),
    (A, True): ("medium", 1),
    (B, False): ("small", 1),
    (B, True): ("medium", 1),
}
"""What each bundle decides about a word that doesn't steer, by whether "small" is off."""
RATES = {"Route": 100.0, "RouteStream": 50.0, "Score": 30.0, "Generate": 10.0}
PATIENCE = 30.0
SLACK = 1.1
"""How much more memory the last fifth of the reloads may hold than the second."""


@dataclass(frozen=True)
class State:
    """What is in force.

    Attributes:
        stable: version of the bundle.
        canary: version of the canary; None: there is none.
        share: of the canary.
        off: whether "small" is switched off.
        shadow: whether the reference answers.
        linked: whether the bundle is named by the link, and not by its directory.
    """

    stable: str = A
    canary: str | None = None
    share: float = 0.2
    off: bool = False
    shadow: bool = False
    linked: bool = True

    def said(self) -> str:
        """How the log tells of it, as a pattern."""
        parts = [f"reloaded: serves bundle tiny {self.stable}"]
        if self.canary:
            parts.append(f"canary tiny {self.canary} with {self.share:.4g} of the traffic")
        parts += ["in shadow mode"] * self.shadow + ["disabled: small"] * self.off
        return re.escape("; ".join(parts)) + "$"

    def gives(self, answer: "Answer") -> bool:
        """Whether an answer is one that can come of it, all of it."""
        if answer.version not in (self.stable, self.canary):
            return False
        shift = SHIFTS[answer.version]
        if answer.rewards and answer.rewards != [round(1.0 + shift, 3)] * len(answer.rewards):
            return False
        if answer.arm is None:
            return True
        would = CHOSEN[answer.version, self.off]
        told = [round(each, 3) for each in tiny.probabilities(shift)]
        return (
            answer.arm == (("large", 1) if self.shadow else would)
            and answer.shadow == (would if self.shadow else None)
            and answer.probabilities in ([], told)
        )


@dataclass
class Answer:
    """What an answer says of where it comes from.

    Attributes:
        arm: that was chosen; None of a Score.
        shadow: arm that would have been.
        probabilities: of all arms; empty where it was not asked for them.
        rewards: of all answers, each of which is "good".
    """

    version: str
    arm: tuple[str, int] | None = None
    shadow: tuple[str, int] | None = None
    probabilities: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, response: pb.RouteResponse) -> "Answer":
        """What a decision says."""
        shadow = response.shadow_arm
        return cls(
            response.bundle_version,
            (response.arm.model, response.arm.samples),
            (shadow.model, shadow.samples) if response.HasField("shadow_arm") else None,
            [round(arm.match_probability, 3) for arm in response.arms],
        )


class Ledger:
    """What was in force when, and what calls said that came meanwhile.

    Attributes:
        calls: by method and by whether something was being changed.
        wrong: answers that nothing explains, in words.
        failed: calls that failed, in words.
    """

    def __init__(self, state: State) -> None:
        self._spans: list[tuple[State, float, float]] = [(state, 0.0, float("inf"))]
        self.changing = False
        self.calls: dict[tuple[str, bool], list[Call]] = {}
        self.wrong: list[str] = []
        self.failed: list[str] = []

    def wanted(self, state: State) -> None:
        """It may come into force from now on."""
        self._spans.append((state, time.monotonic(), float("inf")))

    def confirmed(self) -> None:
        """The last one is in force, and no other any more."""
        now = time.monotonic()
        *former, last = self._spans
        # One that no call can have seen any more need not be kept.
        self._spans = [
            (state, begin, min(end, now)) for state, begin, end in former if end > now - PATIENCE
        ] + [last]

    def refused(self) -> None:
        """The last one has not come into force."""
        self._spans.pop()

    def answered(self, method: str, due: float, begun: float, answer: Answer) -> None:
        """A call has its answer."""
        now = time.monotonic()
        self.calls.setdefault((method, self.changing), []).append(Call(due, begun, now))
        live = [state for state, begin, end in self._spans if begin <= now and end >= begun]
        if not any(state.gives(answer) for state in live):
            self.wrong.append(f"{method}: {answer} in {live}")


class Server:
    """The server's process and its log."""

    def __init__(self, process: "subprocess.Popen[str]", log: list[str]) -> None:
        self._process, self.log = process, log

    async def says(self, pattern: str, since: int) -> None:
        """Wait for a line after the first so many."""
        async with asyncio.timeout(PATIENCE):
            while not any(re.search(pattern, line) for line in self.log[since:]):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def hang_up(self) -> None:
        """Have it read its configuration."""
        self._process.send_signal(signal.SIGHUP)

    def resident_mb(self) -> float:
        """What it holds in memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) / 1024


class Operator:
    """Changes the server's configuration and its bundle, one thing at a time.

    Args:
        directory: of the bundles "a", "b" and "broken", the link and the configuration.
        url: of the LLM's API.
    """

    def __init__(self, directory: Path, url: str) -> None:
        self.directory, self._url = directory, url
        self.link, self.config = directory / "bundle", directory / "bestroute.toml"
        self.state = State()
        for version, shift in SHIFTS.items():
            (directory / version).mkdir()
            tiny.write(directory / version, version=version, shift=shift)
        shutil.copytree(directory / A, directory / "broken")
        (directory / "broken" / "router.onnx").write_bytes(b"")
        point(self.link, directory / A)
        self._write(self.state)

    def _write(self, state: State) -> None:
        bundle = self.link if state.linked else self.directory / state.stable
        canary = f'bundle = "{self.directory / state.canary}"' if state.canary else ""
        text = f"""bundle = "{bundle}"
[routing]
cache_entries = 0
[operations]
shadow = {str(state.shadow).lower()}
disabled_arms = {["small"] if state.off else []}
[canary]
{canary}
share = {state.share}
[providers.api]
base_url = "{self._url}"
""" + "".join(f'[models.{name}]\nprovider = "api"\n' for name in ("small", "medium", "large"))
        other = self.config.with_name("other")
        other.write_text(text)
        other.replace(self.config)

    async def change(self, server: Server, ledger: Ledger, state: State) -> None:
        """Bring a state into force, and wait until it is."""
        since = len(server.log)
        ledger.wanted(state)
        if state.linked and state.stable != self.state.stable:
            point(self.link, self.directory / state.stable)
        self._write(state)
        server.hang_up()
        await server.says(state.said(), since)
        ledger.confirmed()
        self.state = state

    async def fail(self, server: Server) -> None:
        """Point the link at a bundle that can't be loaded, and back."""
        since = len(server.log)
        point(self.link, self.directory / "broken")
        server.hang_up()
        await server.says("not reloaded, the former goes on: .*router.onnx", since)
        point(self.link, self.directory / self.state.stable)


def changes() -> Iterator[State | None]:
    """One round of what operators do; None is a bundle that can't be loaded."""
    first = State()
    yield replace(first, stable=B)
    yield first  # rolled back
    yield replace(first, off=True)
    yield first
    yield replace(first, shadow=True)
    yield first
    yield None
    trial = replace(first, canary=B)
    yield trial
    yield replace(trial, share=0.6)
    yield replace(trial, share=0.6, off=True)
    yield replace(trial, share=0.6)
    promoted = replace(first, stable=B, linked=False)
    yield promoted
    yield replace(promoted, canary=A)
    yield promoted  # withdrawn
    yield replace(promoted, shadow=True)
    yield promoted
    yield first


class Callers:
    """Ask at steady rates over connections of their own, until they are told to stop."""

    def __init__(self, address: str, ledger: Ledger) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(address, options)
        self._stub, self._ledger = RoutingServiceStub(self._channel), ledger
        self._over = asyncio.Event()
        self._count = 0

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """While the block lasts; then every call is waited for."""
        async with self._channel, asyncio.TaskGroup() as tasks:
            for method, ask in (
                ("Route", self._route),
                ("Score", self._score),
                ("Generate", self._generate),
            ):
                tasks.create_task(self._steadily(method, ask))
            tasks.create_task(self._stream())
            try:
                yield
            finally:
                self._over.set()

    async def _paced(self, rate: float) -> AsyncIterator[float]:
        """Gives when each call is due."""
        due = time.monotonic()
        while not self._over.is_set():
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            yield due
            due += 1 / rate

    async def _steadily(self, method: str, ask: Any) -> None:
        async def one(due: float) -> None:
            begun = time.monotonic()
            try:
                answer = await ask()
            except grpc.aio.AioRpcError as error:
                self._ledger.failed.append(f"{method}: {error.code().name} {error.details()}")
            else:
                self._ledger.answered(method, due, begun, answer)

        async with asyncio.TaskGroup() as calls:
            async for due in self._paced(RATES[method]):
                calls.create_task(one(due))

    def _request(self) -> pb.RouteRequest:
        self._count += 1
        return pb.RouteRequest(
            request_id=str(self._count), prompt=f"word{self._count % 100}", explain=True
        )

    async def _route(self) -> Answer:
        return Answer.of(await self._stub.Route(self._request(), timeout=PATIENCE))

    async def _score(self) -> Answer:
        request = pb.ScoreRequest(prompt="word1", responses=["good", "good"])
        scored = await self._stub.Score(request, timeout=PATIENCE)
        return Answer(scored.bundle_version, rewards=[round(r, 3) for r in scored.rewards])

    async def _generate(self) -> Answer:
        request = pb.GenerateRequest(request=self._request())
        events = [event async for event in self._stub.Generate(request, timeout=PATIENCE)]
        answer = Answer.of(events[0].decision)
        drawn = [event.candidate for event in events if event.HasField("candidate")]
        assert answer.arm is not None
        if {each.model for each in drawn} | {events[-1].result.model} != {answer.arm[0]}:
            answer.version = f"{answer.version}, but drawn from another model"
        answer.rewards = [round(each.reward, 3) for each in drawn if each.HasField("reward")]
        return answer

    async def _stream(self) -> None:
        method, asked = "RouteStream", dict[str, tuple[float, float]]()
        stream = self._stub.RouteStream()

        async def ask() -> None:
            async for due in self._paced(RATES[method]):
                request = self._request()
                asked[request.request_id] = due, time.monotonic()
                await stream.write(pb.RouteStreamRequest(request=request))
            await stream.done_writing()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask())
            try:
                async for answer in stream:
                    times = asked.pop(answer.request_id)
                    if answer.HasField("error"):
                        self._ledger.failed.append(f"{method}: {answer.error.message}")
                    else:
                        self._ledger.answered(method, *times, Answer.of(answer.response))
            except grpc.aio.AioRpcError as error:
                self._ledger.failed.append(f"{method}: {error.code().name} {error.details()}")
        self._ledger.failed += [f"{method}: {each} was not answered" for each in asked]


@asynccontextmanager
async def api() -> AsyncIterator[str]:
    """An LLM's API whose every answer is "good", while the block lasts; gives its URL."""

    async def complete(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for delta, reason in (({"content": "good"}, None), ({}, "stop")):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}/v1"
    finally:
        await runner.cleanup()


@dataclass
class Found:
    """What a run has shown."""

    ledger: Ledger
    reloads: int
    seconds: tuple[float, float]
    resident_mb: Sequence[float]

    @property
    def flat(self) -> bool:
        """Whether memory has not grown; the first fifth doesn't count, since caches fill."""
        fifth = max(1, len(self.resident_mb) // 5)
        second, last = self.resident_mb[fifth : 2 * fifth], self.resident_mb[-fifth:]
        return quantile(last, 0.5) <= SLACK * quantile(second or last, 0.5)


async def run(reloads: int, quiet_seconds: float, pause: float) -> Found:
    """Ask a server, first in peace and then while it is reloaded so many times, after pauses."""
    with TemporaryDirectory() as directory:
        async with api() as url:
            operator = Operator(Path(directory), url)
            log = list[str]()
            with served("--config", operator.config, read=log.append) as (process, address):
                server, ledger = Server(process, log), Ledger(operator.state)
                async with Callers(address, ledger).asking():
                    await asyncio.sleep(quiet_seconds)
                    ledger.changing, began = True, time.monotonic()
                    resident = []
                    rounds = (state for _ in cycle((0,)) for state in changes())
                    for state in islice(rounds, reloads):
                        if state is None:
                            await operator.fail(server)
                        else:
                            await operator.change(server, ledger, state)
                        resident.append(server.resident_mb())
                        await asyncio.sleep(pause)
                    took = time.monotonic() - began
    return Found(ledger, reloads, (quiet_seconds, took), resident)


def main() -> int:
    """Run it, print a table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reloads", type=int, default=400)
    parser.add_argument("--pause", type=float, default=0.25, help="seconds after each")
    parser.add_argument("--short", action="store_true", help="some seconds; keeps nothing")
    args = parser.parse_args()
    reloads, quiet = (34, 2.0) if args.short else (args.reloads, 30.0)
    found = asyncio.run(run(reloads, quiet, args.pause))
    ledger = found.ledger
    out = Console()
    table = Table("method", "", "calls", "p50 ms", "p99 ms", "longest ms", box=None)
    kept: dict[str, Any] = {}
    for (method, changing), calls in sorted(ledger.calls.items()):
        own = figures(calls)
        own["longest_ms"] = 1e3 * max(call.latency for call in calls)
        when = "reloads" if changing else "quiet"
        kept[f"{method}, {when}"] = own
        numbers = (f"{own[name]:.2f}" for name in ("p50_ms", "p99_ms", "longest_ms"))
        table.add_row(method, when, str(own["calls"]), *numbers)
    out.print(table)
    for title, faults in (("failed", ledger.failed), ("wrong", ledger.wrong)):
        out.print(f"{title}: {len(faults)}")
        for fault, times in Counter(faults).most_common(5):
            out.print(f"  {times} x {fault}", markup=False)
    out.print(
        f"{found.reloads} reloads in {found.seconds[1]:.1f} s; resident memory "
        f"{found.resident_mb[0]:.0f} MB, then {found.resident_mb[-1]:.0f} MB"
        f"{'' if found.flat else ': it has grown'}"
    )
    if not args.short:
        kept |= {
            "failed": len(ledger.failed),
            "wrong": len(ledger.wrong),
            "reloads": found.reloads,
            "reload_seconds": found.seconds[1],
            "resident_mb": [round(each, 1) for each in found.resident_mb],
        }
        print(
            record.write(
                "reloads", {"rates": RATES, "quiet_seconds": quiet, "pause": args.pause}, kept
            )
        )
    return int(bool(ledger.failed or ledger.wrong) or not found.flat)


if __name__ == "__main__":
    sys.exit(main())

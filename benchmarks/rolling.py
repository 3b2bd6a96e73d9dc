"""Rolling restarts under load through a real Envoy, and what load reports (ORCA) are good for.

    python -m benchmarks.rolling [--rounds 10] [--rate 150] [--short]

Two replicas, `bestroute serve` with the default bundle, behind an Envoy with the configuration of
deploy/envoy (health checks five times a second, so that a round takes seconds). Poisson arrivals of
Route, Score, RouteStream's decisions and Generate come when they would anyway, from clients that
repeat nothing themselves; but a RouteStream that its replica ends is opened anew by our client, and
what was under way on it asked once more.

1. Steady: nobody is restarted.
2. Rolling: one replica is drained (SIGTERM), ended, started, waited for, and then the other, again
   and again. failed: calls without a good answer, by their codes; 0 is what is promised.
3. Shares: callers ask one of the two directly, one after the other, as much as it can do. What part
   of Envoy's calls does the other one get, and how long do they take, if Envoy gives them by turns,
   and if by load reports?

Latencies count from when a call was due. The exit code is 1 if a call failed.
"""

import argparse
import asyncio
import itertools
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.latencies import Call, figures, milliseconds, poisson_arrivals
from benchmarks.load import Ask, closed_loop, open_loop
from benchmarks.soaking.upstream import upstream
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.client import Client
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub
from tests import mesh

SHARES = {"Route": 0.6, "Score": 0.15, "RouteStream": 0.2, "Generate": 0.05}
"""Of the calls."""
PATIENCE = 30.0
"""Seconds that a call may take."""
PROMPTS = 500
_CONFIG = """
[mesh]
load_reports = true
[routing]
cache_entries = 0
[providers.test]
base_url = "{url}"
[models."llama-4-maverick"]
provider = "test"
[models."claude-sonnet-4"]
provider = "test"
"""

_console = Console()


class Failures:
    """How calls failed, by their codes."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def noting(self, method: str, ask: Ask) -> Ask:
        """What asks, and notes how it failed."""

        async def noted(prompt: str) -> object:
            try:
                return await ask(prompt)
            except grpc.aio.AioRpcError as error:
                self.seen[f"{method}: {error.code().name}: {error.details()}"] += 1
                raise
            except Exception as error:
                self.seen[f"{method}: {error!r}"] += 1
                raise

        return noted


@asynccontextmanager
async def asking(address: str) -> AsyncIterator[dict[str, Ask]]:
    """What asks each method, over connections of its own."""
    options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(address, options=options)
        )
        client = await stack.enter_async_context(Client(address, timeout=PATIENCE))
        streams = [await stack.enter_async_context(client.stream()) for _ in range(4)]
        stub, turn = RoutingServiceStub(channel), itertools.cycle(streams)

        async def generate(prompt: str) -> object:
            request = pb.GenerateRequest(request=pb.RouteRequest(prompt=prompt))
            async for event in stub.Generate(request, timeout=PATIENCE):
                if event.HasField("result"):
                    return event
            raise RuntimeError("no result")

        async def score(prompt: str) -> object:
            request = pb.ScoreRequest(prompt=prompt, responses=["yes", "no, it is not"])
            return await stub.Score(request, timeout=PATIENCE)

        async def route(prompt: str) -> object:
            return await stub.Route(pb.RouteRequest(prompt=prompt), timeout=PATIENCE)

        async def stream(prompt: str) -> object:
            return await next(turn).route(prompt)

        yield {"Route": route, "Score": score, "RouteStream": stream, "Generate": generate}


async def load(
    address: str, prompts: Sequence[str], rate: float, during: Callable[[], Awaitable[object]]
) -> tuple[dict[str, list[Call]], Counter[str]]:
    """Have calls arrive for as long as something lasts; gives them by method, and their failures.

    They arrive in pieces of a second, since it isn't known how long that will be.
    """
    failures, over = Failures(), asyncio.Event()
    async with asking(address) as asks:

        async def arrive(method: str, seed: int) -> list[Call]:
            calls, ask = [], failures.noting(method, asks[method])
            under_way: list[asyncio.Task[list[Call]]] = []
            for piece in itertools.count():
                if over.is_set():
                    break
                arrivals = poisson_arrivals(rate * SHARES[method], 1.0, 1000 * seed + piece)
                piece_of = prompts[piece % len(prompts) :]
                if arrivals:
                    going = open_loop(ask, piece_of, arrivals, PATIENCE)
                    under_way.append(asyncio.create_task(going))
                await asyncio.sleep(1.0)
            for task in under_way:
                calls += await task
            return calls

        async with asyncio.TaskGroup() as tasks:
            made = {
                method: tasks.create_task(arrive(method, seed))
                for seed, method in enumerate(SHARES)
            }
            try:
                await during()
            finally:
                over.set()
    return {method: task.result() for method, task in made.items()}, failures.seen


async def _restarts(pair: Sequence[mesh.Replica], envoy: mesh.Envoy, rounds: int) -> None:
    for number in range(rounds):
        for replica in pair:
            await asyncio.to_thread(replica.drain)
            await asyncio.to_thread(replica.start)
            await envoy.wait_until(healthy={replica.port: True})
            await asyncio.sleep(1)
        _console.print(f"round {number + 1} of {rounds}: both restarted")


async def _shares(
    pair: Sequence[mesh.Replica],
    envoys: dict[str, mesh.Envoy],
    prompts: Sequence[str],
    rate: float,
    seconds: float,
) -> dict[str, Any]:
    """What part of Envoy's calls the idler replica gets, by how Envoy gives them."""
    busy, idler = pair
    found: dict[str, Any] = {}
    for name, envoy in envoys.items():
        async with asking(envoy.address) as asks, asking(busy.address) as direct:
            extra = asyncio.create_task(
                closed_loop(direct["Route"], prompts, 16, 2 * seconds, PATIENCE)
            )
            await asyncio.sleep(seconds)  # until the weights are those of this load
            before = envoy.answered()
            arrivals = poisson_arrivals(rate, seconds * 0.8, seed=1)
            calls = await open_loop(asks["Route"], prompts, arrivals, PATIENCE)
            after = envoy.answered()
            await extra
        more = {port: after[port] - before[port] for port in after}
        found[name] = {"idler": more[idler.port] / sum(more.values()), **figures(calls)}
        _console.print(f"{name}: {100 * found[name]['idler']:.0f} % to the idler")
    return found


def _by_turns(cluster: dict[str, Any]) -> None:
    name = "round_robin"
    kind = "type.googleapis.com/envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin"
    cluster["load_balancing_policy"]["policies"] = [
        {
            "typed_extension_config": {
                "name": f"envoy.load_balancing_policies.{name}",
                "typed_config": {"@type": kind},
            }
        }
    ]


async def _measured(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    bundle = Bundle.load(DEFAULT_BUNDLE)
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=bundle.manifest.router.max_tokens)
    prompts = record.mixed_prompts(tokenizer, PROMPTS)
    with ExitStack() as stack:
        url = stack.enter_context(upstream(1, 0.0))
        config = _CONFIG.format(url=url)
        pair = stack.enter_context(mesh.replicas(directory, DEFAULT_BUNDLE, config))
        ports = [each.port for each in pair]
        envoys = {
            "by load reports": stack.enter_context(mesh.envoy(directory, mesh.in_front_of(ports))),
            "by turns": stack.enter_context(
                mesh.envoy(directory, mesh.in_front_of(ports, _by_turns))
            ),
        }
        for envoy in envoys.values():
            await envoy.wait_until(healthy=dict.fromkeys(ports, True))
        envoy = envoys["by load reports"]
        await load(envoy.address, prompts, options.rate, lambda: asyncio.sleep(2))  # warm
        before = envoy.answered()
        runs = {
            "steady": await load(
                envoy.address, prompts, options.rate, lambda: asyncio.sleep(options.seconds)
            )
        }
        even = {port: n - before[port] for port, n in envoy.answered().items()}
        _console.print(f"steady: {list(even.values())} calls to the two")
        runs["rolling"] = await load(
            envoy.address, prompts, options.rate, lambda: _restarts(pair, envoy, options.rounds)
        )
        shares = await _shares(pair, envoys, prompts, options.rate, options.seconds / 2)
    return {
        "runs": {
            name: {
                "failed": dict(failed),
                "methods": {method: figures(calls) for method, calls in made.items()},
            }
            for name, (made, failed) in runs.items()
        },
        "steady_calls": list(even.values()),
        "shares": shares,
    }


def _show(found: dict[str, Any]) -> None:
    table = Table(title="p50 / p99 ms from when a call was due", padding=(0, 0))
    for column in ("", *SHARES, "calls", "failed"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, run in found["runs"].items():
        calls = sum(each["calls"] for each in run["methods"].values())
        latencies = [milliseconds(run["methods"][method]) for method in SHARES]
        table.add_row(name, *latencies, str(calls), str(sum(run["failed"].values())))
    _console.print(table)
    for name, run in found["runs"].items():
        for what, count in run["failed"].items():
            _console.print(f"{name}: {count} x {what}")
    table = Table(title="one of two replicas is kept busy from elsewhere")
    for column in ("calls given", "to the idler", "p50 / p99 ms"):
        table.add_column(column, justify="right" if table.columns else "left")
    for name, share in found["shares"].items():
        table.add_row(name, f"{100 * share['idler']:.0f} %", milliseconds(share))
    _console.print(table)


def main() -> int:
    """Restart, print the tables, keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="restarts of both; default: 10")
    parser.add_argument("--rate", type=float, default=150.0, help="calls per second; default: 150")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the steady load")
    parser.add_argument("--short", action="store_true", help="one round; keeps nothing")
    options = parser.parse_args()
    if options.short:
        options.rounds, options.rate, options.seconds = 1, 60.0, 8.0
    with TemporaryDirectory() as directory:
        found = asyncio.run(_measured(options, Path(directory)))
    _show(found)
    if not options.short:
        settings = {"rounds": options.rounds, "rate": options.rate, "seconds": options.seconds}
        print(record.write("rolling", settings, found))
    return 1 if any(run["failed"] for run in found["runs"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())

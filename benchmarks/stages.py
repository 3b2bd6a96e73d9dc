"""Where the time of one Route goes, stage by stage, from the client's call to the client's answer.

    python -m benchmarks.stages [--shape minilm] [--callers 1,8,64] [--seconds 5] [--flame]

Two servers, each a process of its own, without the decision cache. In one of them the functions
that a Route goes through are wrapped from outside; the other is as it is, and shows what the
wrapping costs: both are put under the same load in turn, several times. Load is callers in a closed
loop with prompts of mixed lengths, in the parent.

All of a call runs in one task of the event loop, so a context variable says whose time it is, and
client and server read the same clock (Linux only). `STAGES` says where one stage ends and the next
begins: their means add up to the mean round trip, their medians needn't. The client is one Python
process, which with many callers is as busy as the server: what calls and answers wait for it is in
"receive" and in "send". The time of a batch counts in full for each call in it.

`--flame` draws a flame graph of the server that isn't wrapped, at the largest number of callers. It
needs py-spy (`pip install py-spy`), which has to be allowed to trace another process. Not all that
it shows is work: it may take threads that wait for some to be busy.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import grpc
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import record
from benchmarks.children import child, profiled, py_spy, serve_until_signal
from benchmarks.compare import RATES, written
from benchmarks.load import closed_loop
from benchmarks.peers.running import Running
from bestroute import app, service
from bestroute.config import Routing, Server, Settings
from bestroute.decision import Rules
from bestroute.option import Decision
from bestroute.order import Routed
from bestroute.router import Router
from bestroute.service import RoutingService
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb
from bestroute_export.evaluation.plots import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, STYLE

STAGES = {
    "receive": "from the client's call until decoding begins: client, gRPC, waiting for the loop",
    "decode": "bytes to message",
    "validate": "the handler until Router.decide: checks, prompt and policy",
    "tokenize": "text to tokens",
    "queue": "waiting for a batch",
    "inference": "the run of that batch",
    "resume": "the rest of Router.decide: mostly waiting for the loop",
    "policy": "Rules.decide",
    "respond": "the handler after that: building the message",
    "serialise": "message to bytes",
    "send": "until the client has the answer: gRPC, waiting for the client's loop",
}
COLOURS = {
    "receive": "#bbbbbb",
    "decode": SKY,
    "validate": BLUE,
    "tokenize": GREEN,
    "queue": "#F0E442",
    "inference": ORANGE,
    "resume": RED,
    "policy": PURPLE,
    "respond": BLUE,
    "serialise": SKY,
    "send": "#dddddd",
}
"""Colours of a stage and of its counterpart on the way back are the same, or greys."""
ROUNDS = 3
ADDS_UP_WITHIN = 0.01
"""Share by which the sum of the stages' means may be off the mean round trip."""
_CLOCK = 1e-6
"""Seconds by which a stage may seem to end before it begins, by rounding."""

Marks = dict[str, float]
"""Times of one call in the server, in seconds on the clock of `time.perf_counter`, and how long
tokenize, queue and inference took; by names as `instrument` gives them."""


@dataclass(frozen=True)
class Trip:
    """A call as the client saw it, in seconds on the clock of `time.perf_counter`."""

    sent: float
    received: float


def main() -> int:
    """Measure, print the tables, keep the JSON and the pictures."""
    options = _options()
    with TemporaryDirectory() as directory, Progress(transient=True) as progress:
        pictures = Path(directory) if options.short else record.RESULTS
        bundle, _ = written(options.shape, Path(directory), stock=False)
        network = bundle.manifest.router
        tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
        prompts = record.mixed_prompts(tokenizer, 512)
        task = progress.add_task("measuring", total=2 * ROUNDS * len(options.callers))
        found = measured(
            bundle.directory,
            prompts,
            options.callers,
            options.seconds,
            partial(progress.advance, task),
        )
        draw(found, pictures / f"stages-{options.shape}.svg")
        if options.flame:
            graph = pictures / f"flame-{options.shape}.svg"
            draw_flame(bundle.directory, prompts, options.callers[-1], options.seconds, graph)
    for load, figures in found.items():
        Console().print(_table(load, figures))
    if options.short:
        return 0
    settings = {
        "shape": options.shape,
        "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
        "prompts": len(prompts),
        "callers": options.callers,
        "seconds": options.seconds,
        "rounds": ROUNDS,
    }
    kept = record.write(f"stages-{options.shape}", settings, found)
    print(f"kept in {kept.relative_to(Path.cwd())}")
    return 0


# The server's side.


def serve(bundle: str, wrapped: str) -> None:
    """Serve until SIGTERM.

    Args:
        bundle: its directory.
        wrapped: "wrapped" has the times of calls printed at the end, as JSON by request_id.
    """
    calls = instrument() if wrapped == "wrapped" else {}
    settings = Settings(
        bundle=Path(bundle),
        server=Server(listen="127.0.0.1:0"),
        routing=Routing(cache_entries=0),
    )
    serve_until_signal(app.serving(settings))
    # Not by print: an unbuffered sys.stdout loses what a pipe doesn't take at once.
    with open(sys.stdout.fileno(), "w", encoding="utf-8", closefd=False) as output:
        json.dump(calls, output)


def instrument() -> dict[str, Marks]:
    """Wrap what a Route goes through, in this process.

    Returns:
        The times of calls by request_id, as calls come.
    """
    calls: dict[str, Marks] = {}
    current: ContextVar[Marks] = ContextVar("current")
    now = time.perf_counter
    route, decide, rule = RoutingService.route, Router.decide, Rules.decide

    def handler(
        behaviour: Any, decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]
    ) -> Any:
        def timed_decode(data: bytes) -> Any:
            begun = now()
            request = decode(data)
            current.set({"decoding": begun, "decoded": now()})
            return request

        def timed_encode(response: Any) -> bytes:
            marks = current.get()
            marks["encoding"] = now()
            data = encode(response)
            marks["encoded"] = now()
            return data

        return grpc.unary_unary_rpc_method_handler(behaviour, timed_decode, timed_encode)

    async def timed_route(
        self: RoutingService, request: pb.RouteRequest, context: Any
    ) -> pb.RouteResponse:
        calls[request.request_id] = current.get()
        return await route(self, request, context)

    async def timed_decide(self: Router, *given: Any, **named: Any) -> Routed:
        marks = current.get()
        marks["deciding"] = now()
        routed = await decide(self, *given, **named)
        assert routed.timing is not None, "the router model failed"
        marks["tokenize"], marks["queue"], marks["inference"], _ = routed.timing
        return routed

    def timed_rule(self: Rules, *given: Any) -> Decision:
        marks = current.get()
        marks["ruling"] = now()
        decision = rule(self, *given)
        marks["ruled"] = now()
        return decision

    # Not in grpc itself: the health service makes its handlers by it, too.
    made_by = SimpleNamespace(**{**vars(grpc), "unary_unary_rpc_method_handler": handler})
    for owner, name, replacement in (
        (service, "grpc", made_by),
        (RoutingService, "route", timed_route),
        (Router, "decide", timed_decide),
        (Rules, "decide", timed_rule),
    ):
        setattr(owner, name, replacement)
    return calls


# The account.


def stages_of(trip: Trip, marks: Marks) -> dict[str, float]:
    """Seconds of each of `STAGES` in one call; together they are the round trip."""
    model = {stage: marks[stage] for stage in ("tokenize", "queue", "inference")}
    return {
        "receive": marks["decoding"] - trip.sent,
        "decode": marks["decoded"] - marks["decoding"],
        "validate": marks["deciding"] - marks["decoded"],
        **model,
        "resume": marks["ruling"] - marks["deciding"] - sum(model.values()),
        "policy": marks["ruled"] - marks["ruling"],
        "respond": marks["encoding"] - marks["ruled"],
        "serialise": marks["encoded"] - marks["encoding"],
        "send": trip.received - marks["encoded"],
    }


def account(trips: Mapping[str, Trip], calls: Mapping[str, Marks]) -> dict[str, Any]:
    """What the stages took, in microseconds.

    Args:
        trips: by request_id, at least one.
        calls: what the server recorded, of these calls and maybe of others.

    Returns:
        `round_trip`, and `stages` by name: each the `mean_us` and `median_us` of all calls, and a
        stage its `share` of the round trips.

    Raises:
        KeyError: the server hasn't recorded a call.
        ValueError: the stages of a call overlap, or don't add up to the round trips.
    """
    each = [stages_of(trip, calls[request_id]) for request_id, trip in trips.items()]
    if (least := min(min(stages.values()) for stages in each)) < -_CLOCK:
        raise ValueError(f"stages overlap, by {-1e6 * least:.1f} us")
    whole = _typical([trip.received - trip.sent for trip in trips.values()])
    stages = {stage: _typical([times[stage] for times in each]) for stage in STAGES}
    total = sum(times["mean_us"] for times in stages.values())
    if abs(total - whole["mean_us"]) > ADDS_UP_WITHIN * whole["mean_us"]:
        raise ValueError(f"the stages add up to {total:.1f} us, not to {whole['mean_us']:.1f} us")
    shares = {stage: times["mean_us"] / whole["mean_us"] for stage, times in stages.items()}
    return {
        "round_trip": whole,
        "stages": {stage: {**times, "share": shares[stage]} for stage, times in stages.items()},
    }


def _typical(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "mean_us": 1e6 * statistics.fmean(seconds),
        "median_us": 1e6 * statistics.median(seconds),
    }


# The parent's side.


@dataclass
class _Window:
    """What one server did at one number of callers: a value per round, and the calls of all."""

    trips: dict[str, Trip]
    per_second: list[float]
    cpu_us: list[float]

    def figures(self) -> dict[str, float]:
        return {
            "calls": len(self.trips),
            "per_second": statistics.median(self.per_second),
            "cpu_us_per_call": statistics.median(self.cpu_us),
        }


def measured(
    bundle: Path,
    prompts: Sequence[str],
    callers: Sequence[int],
    seconds: float,
    report: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Put load on both servers, in turn.

    Args:
        bundle: what they serve.
        prompts: taken in turn.
        callers: numbers of callers, one after the other.
        seconds: of each number on each server, over all rounds.
        report: called after each round of each.

    Returns:
        By load ("8 callers") what `account` gives; and of either server, `wrapped` and `plain`, how
        many calls it answered, how many `per_second`, and the CPU time that one took
        (`cpu_us_per_call`), these two as medians over rounds.

    Raises:
        RuntimeError: a call failed.
    """
    windows: dict[int, dict[str, _Window]] = {}
    ids = map(str, itertools.count())
    run = partial(child, "benchmarks.stages.serve", str(bundle))
    with run("wrapped") as wrapped, run("plain") as plain:
        servers = {"wrapped": wrapped.running, "plain": plain.running}
        for server in servers.values():  # warm
            asyncio.run(_trips(server.address, prompts, ids, max(callers), seconds / 10))
        for number in callers:
            windows[number] = {name: _Window({}, [], []) for name in servers}
            for _ in range(ROUNDS):
                for name, server in servers.items():
                    _round(windows[number][name], server, prompts, ids, number, seconds)
                    report()
    calls: dict[str, Marks] = json.loads(wrapped.printed)
    return {
        f"{number} callers": {
            **account(found["wrapped"].trips, calls),
            **{name: window.figures() for name, window in found.items()},
        }
        for number, found in windows.items()
    }


def _round(
    window: _Window,
    server: Running,
    prompts: Sequence[str],
    ids: Iterator[str],
    callers: int,
    seconds: float,
) -> None:
    cpu, start = server.cpu_seconds(), time.perf_counter()
    trips = asyncio.run(_trips(server.address, prompts, ids, callers, seconds / ROUNDS))
    end = max(trip.received for trip in trips.values())
    window.per_second.append(len(trips) / (end - start))
    window.cpu_us.append(1e6 * (server.cpu_seconds() - cpu) / len(trips))
    window.trips.update(trips)


async def _trips(
    address: str, prompts: Sequence[str], ids: Iterator[str], callers: int, seconds: float
) -> dict[str, Trip]:
    """Calls in a closed loop, by request_id."""
    trips = {}
    async with grpc.aio.insecure_channel(address) as channel:
        route: Any = channel.unary_unary(
            "/bestroute.v1.RoutingService/Route",
            request_serializer=pb.RouteRequest.SerializeToString,
            response_deserializer=pb.RouteResponse.FromString,
        )

        async def ask(prompt: str) -> None:
            request_id = next(ids)
            sent = time.perf_counter()
            await route(pb.RouteRequest(request_id=request_id, prompt=prompt))
            trips[request_id] = Trip(sent, time.perf_counter())

        calls = await closed_loop(ask, prompts, callers, seconds)
    if failed := len(calls) - len(trips):
        raise RuntimeError(f"{failed} of {len(calls)} calls failed")
    return trips


# Profiles.


def draw_flame(
    bundle: Path, prompts: Sequence[str], callers: int, seconds: float, path: Path
) -> None:
    """Write the flame graph of a server that isn't wrapped, as SVG."""
    ids = map(str, itertools.count())
    with child("benchmarks.stages.serve", str(bundle), "plain") as server:
        address, pid = server.running.address, server.running.pid
        asyncio.run(_trips(address, prompts, ids, callers, seconds / 10))  # warm
        with profiled(pid, "flamegraph", path):
            asyncio.run(_trips(address, prompts, ids, callers, seconds))


# What is shown.


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write an SVG with a bar per number of callers: the stages' shares of the mean round trip."""
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(7.2, 1.6 + 0.45 * len(found)), layout="constrained")
        axes = figure.subplots()
        names = [
            f"{load}\n{figures['round_trip']['mean_us']:,.0f} us" for load, figures in found.items()
        ]
        left = [0.0] * len(found)
        for stage in STAGES:
            shares = [figures["stages"][stage]["share"] for figures in found.values()]
            axes.barh(
                names,
                shares,
                left=left,
                label=stage,
                color=COLOURS[stage],
                edgecolor="white",
                linewidth=0.5,
            )
            for row, (start, share) in enumerate(zip(left, shares, strict=True)):
                if share > 0.07:  # wide enough for its name
                    axes.text(start + share / 2, row, stage, ha="center", va="center", fontsize=7)
            left = [start + share for start, share in zip(left, shares, strict=True)]
        axes.set(xlim=(0, 1), xlabel="share of the mean round trip")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=6, fontsize=7)
        figure.savefig(path, metadata={"Date": None})


def _table(load: str, figures: Mapping[str, Any]) -> Table:
    plain, wrapped = figures["plain"], figures["wrapped"]
    table = Table(
        title=f"{load}: {plain['per_second']:.0f} Routes per second, "
        f"{plain['cpu_us_per_call']:.0f} us of the server's CPU each\n"
        f"wrapped, as below: {wrapped['per_second']:.0f} and {wrapped['cpu_us_per_call']:.0f} us",
        title_justify="left",
    )
    for column in ("stage", "mean us", "median us", "share", ""):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    for stage, what in STAGES.items():
        times = figures["stages"][stage]
        table.add_row(
            stage,
            f"{times['mean_us']:.1f}",
            f"{times['median_us']:.1f}",
            f"{times['share']:.1%}",
            what,
        )
    whole = figures["round_trip"]
    table.add_section()
    table.add_row(
        "round trip",
        f"{whole['mean_us']:.1f}",
        f"{whole['median_us']:.1f}",
        "100%",
        "by the client",
    )
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        choices=RATES,
        default="ngrams",
        help="the router: of the default bundle (ngrams), MiniLM-L6 (minilm), or one in the shape "
        "of DeBERTa-v3-small with random weights (deberta); default: %(default)s",
    )
    parser.add_argument(
        "--callers",
        type=lambda text: sorted(map(int, text.split(","))),
        default=[1, 8, 64],
        help="calls under way at once; default: 1,8,64",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="of each number of callers on each server; default: %(default)s",
    )
    parser.add_argument("--flame", action="store_true", help="draw a flame graph, too")
    parser.add_argument(
        "--short",
        action="store_true",
        help="half a second each, 1 and 8 callers, to see that it works; keeps nothing",
    )
    options = parser.parse_args()
    if options.short:
        options.seconds, options.callers = 0.5, [1, 8]
    if options.flame and not py_spy():
        parser.error("--flame needs py-spy: pip install py-spy")
    return options


if __name__ == "__main__":
    sys.exit(main())

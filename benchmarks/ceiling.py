"""What one core of the server takes if the router costs nothing, beside what gRPC itself takes.

    python -m benchmarks.ceiling [--short] [--profile]

bestroute runs with an engine that gives every prompt the same row at once (`benchmarks.synthetic`),
without the decision cache, and with it in one more row, where every prompt was asked before. Beside
it runs the floor that it stands on: a server of a few lines on grpcio, on the same event loop, that
gives back the bytes it got. Both get the same: Routes, or RouteStreams of 1,000 messages each, with
prompts that are short, or as long as real ones.

A server has one core and the load generator another. That is h2load, written in C (Debian: `apt-get
install nghttp2-client`), since a Python client costs as much per call as the server. It sends the
same message, or the same stream, over and over; for the message the prompt is short or of median
length. It knows nothing of gRPC's statuses, so a gRPC client sends the same bytes first and reads
the answers, and under load as many bytes must come back as that got.

Figures are medians over repeats, which take turns: messages per second, and per second of the CPU
time that the server used, which is what a core takes that is kept busy.

`--profile` shows where bestroute's event loop spends its time instead, and keeps nothing. It needs
py-spy (`pip install py-spy`), which has to be allowed to trace another process. What isn't Python,
such as gRPC's core, counts for the Python function that called it, mostly for the loop's `run`.
"""

import argparse
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import record, synthetic
from benchmarks.children import child, on_core, profiled, py_spy, serve_until_signal
from benchmarks.peers.model import Cost
from benchmarks.peers.running import Running
from bestroute import app
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.config import Routing, Server, Settings
from bestroute.live import Live
from bestroute.service import NAME
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb

REPEATS = 3
PER_STREAM = 1_000
TARGETS = {"Route": 5_000, "RouteStream": 15_000}
"""Messages per second that a core should take."""
SIZE_WITHIN = 0.05
"""Share by which the bytes that come back may be off those of the checked answers: an answer says
how long it took, and longer times take more bytes."""


@dataclass(frozen=True)
class Load:
    """Calls to make.

    Attributes:
        name: in tables and in the JSON.
        method: "Route" or "RouteStream".
        messages: of one call.
        calls: how many in a run.
        cached: whether the server has the decision cache.
    """

    name: str
    method: str
    messages: Sequence[bytes]
    calls: int
    cached: bool = False

    @property
    def body(self) -> bytes:
        """What one call sends."""
        return b"".join(map(framed, self.messages))

    @property
    def servers(self) -> dict[str, str]:
        """Which server takes it, on either side of the comparison."""
        return {"echo": "echo", "bestroute": "cached" if self.cached else "bestroute"}


def main() -> int:
    """Measure or profile, print the table, keep the JSON."""
    options = _options()
    cores = sorted(os.sched_getaffinity(0))
    if not shutil.which("h2load"):
        raise SystemExit("this needs h2load; Debian: apt-get install nghttp2-client")
    if len(cores) < 2:
        raise SystemExit("this needs two cores: one for the server, one for the load")
    server_core, load_core, *_ = cores
    calls = (
        {"Route": 500, "RouteStream": 8} if options.short else {"Route": 8000, "RouteStream": 24}
    )
    loads = planned(calls)
    if options.profile:
        profile(loads, server_core, load_core)
        return 0
    repeats = 1 if options.short else REPEATS
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=2 * repeats * len(loads))
        found = measured(loads, repeats, server_core, load_core, partial(progress.advance, task))
    Console().print(_table(found))
    if options.short:
        return 0
    bundle = Bundle.load(DEFAULT_BUNDLE)
    settings = {
        "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
        "repeats": repeats,
        "calls": calls,
        "messages_per_stream": PER_STREAM,
        "server_core": server_core,
        "load_core": load_core,
        "targets_per_second": TARGETS,
    }
    print(f"kept in {record.write('ceiling', settings, found).relative_to(Path.cwd())}")
    return 0


def planned(calls: Mapping[str, int]) -> list[Load]:
    """The loads, with so many calls to a method in a run."""
    bundle = Bundle.load(DEFAULT_BUNDLE)
    limit = bundle.manifest.router.max_tokens
    mixed = record.mixed_prompts(Tokenizer(bundle.tokenizer_path, max_tokens=limit), PER_STREAM)
    short = [f"What is the sum of {i} and 30?" for i in range(PER_STREAM)]
    median = sorted(mixed, key=len)[len(mixed) // 2]

    def unary(name: str, prompt: str) -> Load:
        message = pb.RouteRequest(prompt=prompt, request_id="0").SerializeToString()
        return Load(f"Route, {name}", "Route", [message], calls["Route"])

    def stream(name: str, prompts: Sequence[str], *, cached: bool = False) -> Load:
        requests = (
            pb.RouteRequest(prompt=prompt, request_id=str(i)) for i, prompt in enumerate(prompts)
        )
        messages = [pb.RouteStreamRequest(request=r).SerializeToString() for r in requests]
        return Load(f"RouteStream, {name}", "RouteStream", messages, calls["RouteStream"], cached)

    return [
        unary("short", short[0]),
        unary("median", median),
        stream("short", short),
        stream("mixed", mixed),
        stream("cached", short, cached=True),
    ]


def framed(message: bytes) -> bytes:
    """A message as gRPC sends it, uncompressed."""
    return struct.pack(">BI", 0, len(message)) + message


# The servers.


def serve_bestroute(cache_entries: str) -> None:
    """Serve the default bundle until SIGTERM, with an engine that takes no time."""
    synthetic.install(Cost(0.0, 0.0))
    settings = Settings(
        server=Server(listen="127.0.0.1:0"), routing=Routing(cache_entries=int(cache_entries))
    )
    serve_until_signal(app.serving(settings))


def serve_echo() -> None:
    """Give back what comes until SIGTERM."""
    serve_until_signal(_echoing())


@asynccontextmanager
async def _echoing() -> AsyncIterator[app.Running]:
    async def route(request: bytes, context: Any) -> bytes:
        return request

    async def route_stream(requests: AsyncIterator[bytes], context: Any) -> None:
        async for request in requests:
            await context.write(request)

    handlers: dict[str, Any] = {
        "Route": grpc.unary_unary_rpc_method_handler(route),
        "RouteStream": grpc.stream_stream_rpc_method_handler(route_stream),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        # What serves here is no router.
        yield app.Running(f"127.0.0.1:{port}", Live())
    finally:
        await server.stop(None)


def _started(stack: ExitStack, core: int) -> dict[str, Running]:
    """One of each; those that aren't asked cost nothing."""
    module = "benchmarks.ceiling"
    started = {
        "echo": child(f"{module}.serve_echo", core=core),
        "bestroute": child(f"{module}.serve_bestroute", "0", core=core),
        "cached": child(f"{module}.serve_bestroute", str(8 * PER_STREAM), core=core),
    }
    return {name: stack.enter_context(server).running for name, server in started.items()}


# Measuring.


def measured(
    loads: Sequence[Load],
    repeats: int,
    server_core: int,
    load_core: int,
    report: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Put every load on the echo and on bestroute, in turn, and all again.

    Args:
        loads: in this order.
        repeats: how many times.
        server_core: the CPU that servers share, one of which is asked at a time.
        load_core: the CPU of the load generator.
        report: called after each run.

    Returns:
        By load, of `echo` and `bestroute` each: messages `per_second`, and `per_core_second`, per
        second of the server's CPU, as medians and of every run (`runs`); and the `ratio` of
        bestroute to echo in the latter median.

    Raises:
        ValueError: an answer is wrong, or some didn't come.
    """
    runs: dict[str, dict[str, list[dict[str, float]]]] = {
        load.name: {"echo": [], "bestroute": []} for load in loads
    }
    with ExitStack() as stack, TemporaryDirectory() as directory:
        servers = _started(stack, server_core)
        checks = {"echo": check_echoed, "bestroute": check_decided}
        sizes = {
            (load.name, side): answer_bytes(servers[server], load, checks[side])
            for load in loads
            for side, server in load.servers.items()
        }
        body = Path(directory) / "body"
        for _ in range(repeats):
            for load in loads:
                body.write_bytes(load.body)
                for side, server in load.servers.items():
                    size = sizes[load.name, side]
                    run = _run(servers[server], load, body, size, load_core)
                    runs[load.name][side].append(run)
                    report()
    return {name: _figures(sides) for name, sides in runs.items()}


def _figures(sides: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        side: {
            **{name: statistics.median(run[name] for run in runs) for name in runs[0]},
            "runs": runs,
        }
        for side, runs in sides.items()
    }
    ratio = found["bestroute"]["per_core_second"] / found["echo"]["per_core_second"]
    return {**found, "ratio": ratio}


def answer_bytes(
    server: Running, load: Load, check: Callable[[Load, Sequence[bytes]], None]
) -> int:
    """Have one call answered and check it; gives the size of its answers as gRPC sends them.

    Raises:
        ValueError: an answer is wrong.
    """
    with grpc.insecure_channel(server.address) as channel:
        for _ in range(2):  # the second time a cache knows the prompts
            if load.method == "Route":
                unary: Any = channel.unary_unary(f"/{NAME}/{load.method}")
                answers = [unary(load.messages[0])]
            else:
                stream: Any = channel.stream_stream(f"/{NAME}/{load.method}")
                answers = list(stream(iter(load.messages)))
            check(load, answers)
    return sum(len(framed(answer)) for answer in answers)


def check_echoed(load: Load, answers: Sequence[bytes]) -> None:
    """See that answers are what was sent.

    Raises:
        ValueError: they aren't.
    """
    if list(answers) != list(load.messages):
        raise ValueError(f"{load.name}: the echo gives something else")


def check_decided(load: Load, answers: Sequence[bytes]) -> None:
    """See that every message was decided on, by the router.

    Raises:
        ValueError: some weren't.
        DecodeError: an answer is no message of ours.
    """
    if load.method == "Route":
        responses = [pb.RouteResponse.FromString(answer) for answer in answers]
    else:
        responses = [pb.RouteStreamResponse.FromString(answer).response for answer in answers]
    asked = sorted(map(str, range(len(load.messages))))
    decided = sorted(
        response.request_id
        for response in responses
        if response.arm.model and response.fallback_reason != pb.FALLBACK_REASON_ROUTER_FAILED
    )
    if decided != asked:
        raise ValueError(f"{load.name}: {len(decided)} of {len(asked)} messages were decided on")


def _run(server: Running, load: Load, body: Path, answer: int, core: int) -> dict[str, float]:
    """One run of h2load; `answer` is how many bytes a call should give."""
    before = server.cpu_seconds()
    said = subprocess.run(
        _h2load(server, load, body, core), capture_output=True, text=True, check=True
    ).stdout
    cpu = server.cpu_seconds() - before
    per_second, succeeded, data = read_h2load(said)
    if succeeded != load.calls or abs(data / (load.calls * answer) - 1) > SIZE_WITHIN:
        raise ValueError(
            f"{load.name}: {succeeded} of {load.calls} calls answered, "
            f"{data} bytes instead of {load.calls * answer}:\n{said}"
        )
    messages = len(load.messages)
    return {
        "per_second": messages * per_second,
        "per_core_second": messages * load.calls / cpu,
    }


def _h2load(server: Running, load: Load, body: Path, core: int) -> list[str]:
    clients, at_once = (8, 8) if load.method == "Route" else (4, 2)
    return [
        *on_core(core),
        "h2load",
        *("-n", str(load.calls), "-c", str(clients), "-m", str(at_once), "-t", "1"),
        *("-d", str(body)),
        *("-H", "content-type: application/grpc", "-H", "te: trailers"),
        f"http://{server.address}/{NAME}/{load.method}",
    ]


def read_h2load(said: str) -> tuple[float, int, int]:
    """Requests per second, requests that succeeded and bytes of their answers, as h2load says."""
    found = [
        re.search(pattern, said)
        for pattern in (r"([\d.]+) req/s,", r"(\d+) succeeded", r"\((\d+)\) data")
    ]
    if not all(found):
        raise ValueError(f"h2load says nothing of it:\n{said}")
    per_second, succeeded, data = (each[1] for each in found if each)
    return float(per_second), int(succeeded), int(data)


# The profile.


def profile(loads: Sequence[Load], server_core: int, load_core: int) -> None:
    """Print in which functions bestroute's event loop is under each load."""
    with ExitStack() as stack, TemporaryDirectory() as directory:
        servers = _started(stack, server_core)
        body, raw = Path(directory) / "body", Path(directory) / "raw"
        for load in loads:
            server = servers[load.servers["bestroute"]]
            body.write_bytes(load.body)
            size = answer_bytes(server, load, check_decided)
            with profiled(server.pid, "raw", raw):
                _run(server, load, body, size, load_core)
            samples = own_samples(raw.read_text(encoding="utf-8"))
            table = Table(title=f"{load.name}: {samples.total()} samples", title_justify="left")
            table.add_column("share", justify="right")
            table.add_column("function, without what it calls in Python")
            for function, count in samples.most_common(20):
                table.add_row(f"{count / samples.total():.1%}", function)
            Console().print(table)


def own_samples(raw: str) -> Counter[str]:
    """Samples by the function that ran, of the main thread.

    Args:
        raw: a line per stack, "thread;function;function count", as py-spy writes it.
    """
    samples: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        thread, *functions = stack.split(";")
        if "MainThread" in thread:
            samples[functions[-1]] += int(count)
    return samples


# What is shown.


def _table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(
        title="Messages per second, and per CPU second of the server", title_justify="left"
    )
    for column in ("", "echo", "CPU s", "bestroute", "CPU s", "ratio", "target"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for name, each in found.items():
        sides = [each[side] for side in ("echo", "bestroute")]
        rates = [side[figure] for side in sides for figure in ("per_second", "per_core_second")]
        target = f"{TARGETS[name.partition(',')[0]]:,}"
        table.add_row(name, *(f"{rate:,.0f}" for rate in rates), f"{each['ratio']:.2f}", target)
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--profile", action="store_true", help="show where bestroute's time goes instead"
    )
    parser.add_argument(
        "--short", action="store_true", help="few calls, to see that it works; keeps nothing"
    )
    options = parser.parse_args()
    if options.profile and not py_spy():
        parser.error("--profile needs py-spy: pip install py-spy")
    return options


if __name__ == "__main__":
    sys.exit(main())

"""How late the server's event loop runs while its engine is kept busy.

    python -m benchmarks.lag [--shape minilm] [--callers 64] [--seconds 10] [--short]

The server is a process of its own whose loop has one more thing to do: a tick every 2 ms. How long
after it was due a tick ran is the lag, which everything on that loop waits for: each call, each
health check. A tick that comes late counts for all that were due since the last, or a long stall
would be one value like any other.

Three loads, one after the other, with prompts of mixed lengths, none of them sent twice: no load,
callers who wait for their answers (Route), and as many messages under way on one RouteStream. A
timer of the loop ends with epoll, whose resolution is 1 ms, so an idle loop has a lag, too: read
the others beside it. The load runs on the same cores as the server.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.compare import RATES, written
from benchmarks.latencies import quantile
from benchmarks.load import closed_loop
from benchmarks.overload import PROMPTS, distinct
from benchmarks.peers import clients
from bestroute import app
from bestroute.config import Server, Settings
from bestroute.process import new_event_loop, spare_what_is_loaded
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb

PERIOD = 0.002
"""Seconds between ticks."""
Tick = tuple[float, float]
"""When it was due, on the clock of `time.perf_counter`, and its lag; in seconds."""
Load = Callable[[str, Iterator[str], int, float], Coroutine[Any, Any, int]]
"""Takes address, prompts, calls under way at once and seconds; gives how many were answered."""


def main() -> int:
    """Measure, print the table, keep the JSON."""
    options = _options()
    with TemporaryDirectory() as directory:
        bundle, _ = written(options.shape, Path(directory), stock=False)
        network = bundle.manifest.router
        tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
        prompts = distinct(record.mixed_prompts(tokenizer, PROMPTS))
        found = _measured(bundle.directory, prompts, options.callers, options.seconds)
    _show(found, options)
    if options.short:
        return 0
    settings = {
        "shape": options.shape,
        "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
        "prompts": PROMPTS,
        "callers": options.callers,
        "seconds": options.seconds,
        "period_ms": 1e3 * PERIOD,
    }
    kept = record.write(f"lag-{options.shape}", settings, found)
    print(f"kept in {kept.relative_to(Path.cwd())}")
    return 0


def serve(bundle: str) -> None:
    """Serve until SIGTERM, with ticks; prints the address when ready, and the ticks at the end."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        ticks = runner.run(_serve(Path(bundle)))
    # Not printed: where Python's output is unbuffered, print may lose what a full pipe didn't take.
    with open(sys.stdout.fileno(), "w", encoding="utf-8", closefd=False) as output:
        json.dump(ticks, output)


async def _serve(bundle: Path) -> list[Tick]:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    settings = Settings(bundle=bundle, server=Server(listen="127.0.0.1:0"))
    async with app.serving(settings) as server:
        spare_what_is_loaded()
        with _ticking() as ticks:
            print(server.address, flush=True)
            await stop.wait()
    return ticks


@contextmanager
def _ticking() -> Iterator[list[Tick]]:
    """Ticks of the running loop, as they come while the block lasts."""
    loop = asyncio.get_running_loop()
    ticks: list[Tick] = []
    due = time.perf_counter()
    timer: asyncio.TimerHandle

    def tick() -> None:
        nonlocal due, timer
        now = time.perf_counter()
        while due <= now:
            ticks.append((due, now - due))
            due += PERIOD
        timer = loop.call_at(loop.time() + due - now, tick)

    timer = loop.call_at(loop.time(), tick)
    try:
        yield ticks
    finally:
        timer.cancel()


async def _none(address: str, prompts: Iterator[str], callers: int, seconds: float) -> int:
    await asyncio.sleep(seconds)
    return 0


async def _unary(address: str, prompts: Iterator[str], callers: int, seconds: float) -> int:
    async with clients.route(address) as client:
        calls = await closed_loop(lambda _: client.ask(next(prompts)), [""], callers, seconds)
    return sum(call.ended is not None for call in calls)


async def _stream(address: str, prompts: Iterator[str], callers: int, seconds: float) -> int:
    """A message for each that is answered, so that always as many are under way."""
    requests = (pb.RouteStreamRequest(request=pb.RouteRequest(prompt=prompt)) for prompt in prompts)
    answered = 0
    async with grpc.aio.insecure_channel(address) as channel:
        method: Any = channel.stream_stream(
            "/bestroute.v1.RoutingService/RouteStream",
            request_serializer=pb.RouteStreamRequest.SerializeToString,
            response_deserializer=pb.RouteStreamResponse.FromString,
        )
        stream, end = method(), time.perf_counter() + seconds
        for _ in range(callers):
            await stream.write(next(requests))
        while time.perf_counter() < end:
            answered += (await stream.read()).HasField("response")
            await stream.write(next(requests))
        await stream.done_writing()
        while (answer := await stream.read()) is not grpc.aio.EOF:
            answered += answer.HasField("response")
    return answered


LOADS: dict[str, Load] = {"no load": _none, "Route": _unary, "RouteStream": _stream}


def _measured(
    bundle: Path, prompts: Iterator[str], callers: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Answers per second and the lag under each load."""
    code = "import sys; from benchmarks.lag import serve; serve(sys.argv[1])"
    command = [sys.executable, "-c", code, str(bundle)]
    windows = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            if not (address := server.stdout.readline().strip()):
                raise SystemExit("the server ended before it was ready")
            asyncio.run(_unary(address, prompts, callers, seconds / 4))  # warm
            for name, load in LOADS.items():
                start = time.perf_counter()
                answered = asyncio.run(load(address, prompts, callers, seconds))
                windows[name] = (start, time.perf_counter(), answered)
        finally:
            server.terminate()
        ticks: list[Tick] = json.loads(server.stdout.read())
    return {
        name: {
            "answers_per_second": answered / (end - start),
            **lags([lag for due, lag in ticks if start <= due < start + seconds]),
        }
        for name, (start, end, answered) in windows.items()
    }


def lags(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum in milliseconds of lags in seconds."""
    shares = {"p50_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}
    return {name: 1e3 * quantile(values, share) for name, share in shares.items()}


def _show(found: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    table = Table(title=f"Lag of the event loop, {options.shape}, {options.callers} under way")
    for column in ("load", "answers/s", "p50 ms", "p99 ms", "max ms"):
        table.add_column(column, justify="left" if column == "load" else "right")
    for name, each in found.items():
        table.add_row(
            name,
            f"{each['answers_per_second']:.0f}",
            *(f"{each[figure]:.2f}" for figure in ("p50_ms", "p99_ms", "max_ms")),
        )
    Console().print(table)


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
        "--callers", type=int, default=64, help="calls under way at once; default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of each load; default: %(default)s"
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="one second each, 8 callers, to see that it works; keeps nothing",
    )
    options = parser.parse_args()
    if options.short:
        options.seconds, options.callers = 1.0, 8
    return options


if __name__ == "__main__":
    sys.exit(main())

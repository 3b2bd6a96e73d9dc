"""Route beside the bare ONNX Runtime session, on the same prompts in the same run.

    make bench        (or: python -m benchmarks.route --help)

Two questions. One caller: how much longer is the server's own time (tokenize + queue + inference)
than the bare session's on the same ids? 32 callers: which share of the bare session's best batched
throughput is left, with gRPC, tokenizing and the load generator on the same cores? Both sides are
interleaved, and medians over repeats are quoted, because machines are noisy.

A share of the session's time says something of a router that takes milliseconds, such as MiniLM-L6
(`--encoder`). The default bundle's n-grams take a tenth of one, less than any call: there the
absolute times matter.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import record
from benchmarks.process import READ_ANEW, served
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.config import Engine as EngineSettings
from bestroute.engine import Engine, cpus, preferred_precisions
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb

Ids = Sequence[int]
_BUDGETS = (0, 256, 512, 1024, 2048)
"""Padded tokens per batch that the bare session is tried with; 0 runs every prompt alone. It is
tried on all cores and on one thread, and then measured the way that was fastest: once with one
batch at a time, and once with two at once, which no single caller of a session would get."""


_TRIED = 128
"""Prompts with which the ways are compared."""


def main() -> int:
    """Run the benchmark, print its table, keep its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="bundle to serve")
    parser.add_argument(
        "--encoder", action="store_true", help="serve the default bundle with MiniLM-L6 as router"
    )
    parser.add_argument("--prompts", type=int, default=384, help="how many (default: 384)")
    parser.add_argument("--callers", type=int, default=32, help="at saturation (default: 32)")
    parser.add_argument("--repeats", type=int, default=5, help="of each side (default: 5)")
    options = parser.parse_args()
    with TemporaryDirectory() as directory:
        if options.encoder:
            from benchmarks.encoder import write_encoder_bundle  # torch, only where it is needed

            options.bundle = write_encoder_bundle(Path(directory) / "encoder")
        return measure(options)


def measure(options: argparse.Namespace) -> int:
    """Measure the bundle that the options name."""
    bundle = Bundle.load(options.bundle)
    network, engine = bundle.manifest.router, EngineSettings()
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
    prompts = record.mixed_prompts(tokenizer, options.prompts)
    ids = [tokenizer.prompt(prompt).ids for prompt in prompts]
    path = bundle.network_path(network, preferred_precisions(engine))
    limits = {"max_items": options.prompts, "max_tokens": network.max_tokens}
    bare = Engine(path, engine, **limits)
    one_thread = Engine(path, EngineSettings(threads=1), **limits)

    with (
        served("--bundle", options.bundle, environment=READ_ANEW) as (server, address),
        Progress(transient=True) as progress,
    ):
        report = _steps(progress, 2 * options.repeats + 1)
        one = asyncio.run(_one_caller(address, prompts, ids, bare))
        report()
        saturated = _saturation(
            address, server.pid, prompts, ids, bare, one_thread, options, report
        )

    figures = {"one_caller": one, "saturation": saturated}
    settings = {
        "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
        "prompts": options.prompts,
        "callers": options.callers,
        "repeats": options.repeats,
        "median_tokens": statistics.median(map(len, ids)),
    }
    _show(one, saturated, options.callers)
    print(f"kept in {record.write('route', settings, figures).relative_to(Path.cwd())}")
    return 0


async def _one_caller(
    address: str, prompts: Sequence[str], ids: Sequence[Ids], bare: Engine
) -> dict[str, float]:
    """Ask the server and the bare session in turn, prompt by prompt; times in milliseconds."""
    server, session, round_trip = [], [], []
    async with grpc.aio.insecure_channel(address) as channel:
        route = _route(channel)
        for prompt in prompts[:16]:
            await route(pb.RouteRequest(prompt=prompt))
        for prompt, each in zip(prompts, ids, strict=True):
            start = time.perf_counter()
            response = await route(pb.RouteRequest(prompt=prompt))
            round_trip.append(time.perf_counter() - start)
            timing = response.timing
            parts = (timing.tokenize, timing.queue, timing.inference)
            server.append(sum(part.ToNanoseconds() for part in parts) / 1e9)
            start = time.perf_counter()
            bare.run([each])
            session.append(time.perf_counter() - start)
    return {
        "server_ms_median": 1e3 * statistics.median(server),
        "bare_session_ms_median": 1e3 * statistics.median(session),
        "round_trip_ms_median": 1e3 * statistics.median(round_trip),
        "server_over_bare_session": statistics.median(server) / statistics.median(session),
    }


def _saturation(
    address: str,
    pid: int,
    prompts: Sequence[str],
    ids: Sequence[Ids],
    bare: Engine,
    one_thread: Engine,
    options: argparse.Namespace,
    report: Callable[[], None],
) -> dict[str, Any]:
    """Throughput of the server and of the bare session, in turn; prompts per second."""
    sample = ids[:_TRIED]
    best: dict[int, tuple[Engine, int]] = {}
    for callers in (1, 2):
        ways = list(itertools.product((bare, one_thread), _BUDGETS))
        tried = {w: max(bare_rate(*w, sample, callers) for _ in range(2)) for w in ways}
        best[callers] = max(ways, key=lambda way: tried[way])
    asyncio.run(_closed_loop(address, prompts, options.callers))  # warm
    rates: list[float] = []
    bares: dict[int, list[float]] = {1: [], 2: []}
    cpu, sizes = [], []
    for _ in range(options.repeats):
        for callers, way in best.items():
            bares[callers].append(bare_rate(*way, ids, callers))
        report()
        before = _cpu_seconds(pid), time.process_time()
        rate, seen = asyncio.run(_closed_loop(address, prompts, options.callers))
        after = _cpu_seconds(pid), time.process_time()
        cpu.append((after[0] - before[0], after[1] - before[1]))
        rates.append(rate)
        sizes += seen
        report()
    figures: dict[str, Any] = {
        "server_per_second_median": statistics.median(rates),
        "server_per_second": rates,
        "server_cpu_share": sum(s for s, _ in cpu) / sum(s + c for s, c in cpu),
        "batch_size_mean": statistics.mean(sizes),
    }
    for callers, each in bares.items():
        session, budget = best[callers]
        median = statistics.median(each)
        figures[f"bare_session_{callers}_callers"] = {
            "per_second_median": median,
            "per_second": each,
            "padded_tokens": budget,
            "threads": cpus() if session is bare else 1,
            "server_share": statistics.median(rates) / median,
        }
    return figures


def bare_rate(bare: Engine, budget: int, ids: Sequence[Ids], callers: int = 1) -> float:
    """Prompts per second of the session alone, sorted by length, in batches up to the budget.

    Args:
        bare: the session.
        budget: padded tokens per batch; 0 runs every prompt alone.
        ids: the prompts.
        callers: threads that run batches at once.
    """
    batches: list[list[Ids]] = []
    for each in sorted(ids, key=len):
        if batches and (len(batches[-1]) + 1) * len(each) <= budget:
            batches[-1].append(each)
        else:
            batches.append([each])
    with ThreadPoolExecutor(callers) as threads:
        start = time.perf_counter()
        for _ in threads.map(bare.run, batches):
            pass
        return len(ids) / (time.perf_counter() - start)


async def _closed_loop(
    address: str, prompts: Sequence[str], callers: int
) -> tuple[float, list[int]]:
    """Prompts per second of the server in a closed loop, and the batch sizes it reports."""
    todo = itertools.chain(prompts)
    sizes = []
    async with grpc.aio.insecure_channel(address) as channel:
        route = _route(channel)
        await route(pb.RouteRequest(prompt="connect"))

        async def caller() -> None:
            for prompt in todo:
                response = await route(pb.RouteRequest(prompt=prompt))
                sizes.append(response.timing.batch_size)

        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(callers):
                tasks.create_task(caller())
        return len(prompts) / (time.perf_counter() - start), sizes


def _route(
    channel: grpc.aio.Channel,
) -> grpc.aio.UnaryUnaryMultiCallable[pb.RouteRequest, pb.RouteResponse]:
    return channel.unary_unary(
        "/bestroute.v1.RoutingService/Route",
        request_serializer=pb.RouteRequest.SerializeToString,
        response_deserializer=pb.RouteResponse.FromString,
    )


def _cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, in all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _steps(progress: Progress, total: int) -> Callable[[], None]:
    task = progress.add_task("measuring", total=total)
    return lambda: progress.advance(task)


def _show(one: dict[str, float], saturated: dict[str, Any], callers: int) -> None:
    table = Table(title="Route beside the bare ONNX Runtime session", title_justify="left")
    for column in ("", "server", "bare session", "ratio", "target"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        "1 caller: median time",
        f"{one['server_ms_median']:.2f} ms",
        f"{one['bare_session_ms_median']:.2f} ms",
        f"{one['server_over_bare_session']:.3f}",
        "<= 1.3, encoder",
    )
    for at_once, name in ((1, "one batch at a time"), (2, "two batches at once")):
        side = saturated[f"bare_session_{at_once}_callers"]
        table.add_row(
            f"{callers} callers, prompts per second; bare: {name}",
            f"{saturated['server_per_second_median']:.1f}",
            f"{side['per_second_median']:.1f}",
            f"{side['server_share']:.3f}",
            ">= 0.85, encoder" if at_once == 1 else "",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())

"""What it costs to be watched: Route with metrics, logs and traces, beside Route with none of them.

    python -m benchmarks.telemetry [--short]

Three servers with the default bundle run side by side on one core, and one at a time is asked, in
turns that are a few seconds long, so that what else happens on the machine happens to all:

- off: nothing is taken note of.
- metrics: Prometheus metrics, scraped every five seconds, which is more often than most would.
- all: as well as logs in JSON, and traces of 1 % of the requests, sent to a collector.

The load is 32 callers who wait for their answers, on another core, where the collector runs, too.
No prompt is sent twice, so that each goes through the network.

A Python client costs about as much as the server, so answers per second may be the client's limit.
What counts is answers per second of the server's CPU time, which is what a core gives that is kept
busy. Each turn is compared with that of `off` in the same round; the figures are the median and the
quartiles of these ratios.
"""

import argparse
import asyncio
import os
import statistics
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import record
from benchmarks.children import child, serve_until_signal
from benchmarks.latencies import figures
from benchmarks.load import closed_loop
from benchmarks.overload import PROMPTS, distinct
from benchmarks.peers import clients
from benchmarks.peers.running import Running, free_ports
from bestroute import app
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.config import Metrics, Server, Settings, Tracing
from bestroute.observe.logs import log_to_stderr
from bestroute.tokenizer import Tokenizer

CALLERS = 32
MODES = ("off", "metrics", "all")
SCRAPE_PERIOD = 5.0
SAMPLE_RATIO = 0.01
MOST = 0.03
"""Share of the throughput that all of it may cost."""


def main() -> int:
    """Measure, print the table, keep the JSON."""
    options = _options()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this needs two cores: one for the servers, one for the load")
    server_core, load_core, *_ = cores
    network = Bundle.load(DEFAULT_BUNDLE).manifest.router
    tokenizer = Tokenizer(Bundle.load(DEFAULT_BUNDLE).tokenizer_path, max_tokens=network.max_tokens)
    prompts = distinct(record.mixed_prompts(tokenizer, PROMPTS))
    os.sched_setaffinity(0, {load_core})
    runs = measured(prompts, options.rounds, options.seconds, server_core, load_core)
    os.sched_setaffinity(0, cores)  # which the record names
    found = compared(runs)
    Console().print(_table(found))
    if options.short:
        return 0
    settings = {
        "callers": CALLERS,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "scrape_period": SCRAPE_PERIOD,
        "sample_ratio": SAMPLE_RATIO,
        "server_core": server_core,
        "load_core": load_core,
        "most": MOST,
    }
    kept = record.write("telemetry", settings, {**found, "runs": runs})
    print(f"kept in {kept.relative_to(Path.cwd())}")
    return 0


def settings_of(mode: str, metrics: str, collector: str) -> Settings:
    """What the server of a mode is told.

    Args:
        mode: one of `MODES`.
        metrics: host:port for its metrics.
        collector: host:port that takes traces.
    """
    server = Server(listen="127.0.0.1:0")
    if mode == "off":
        return Settings(server=server)
    watched = Metrics(listen=metrics)
    if mode == "metrics":
        return Settings(server=server, metrics=watched)
    traced = Tracing(endpoint=f"http://{collector}", sample_ratio=SAMPLE_RATIO)
    return Settings(server=server, metrics=watched, tracing=traced, log_format="json")


def serve(mode: str, metrics: str, collector: str) -> None:
    """Serve until SIGTERM; prints the address when ready."""
    settings = settings_of(mode, metrics, collector)
    log_to_stderr("WARNING", settings.log_format)
    serve_until_signal(app.serving(settings))


def collect(address: str) -> None:
    """Take traces at an address, and forget them, until SIGTERM."""
    asyncio.run(_collect(address))


async def _collect(address: str) -> None:
    async def export(request: bytes, context: Any) -> bytes:
        return b""  # an empty response says that all spans were taken

    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    handlers: dict[str, Any] = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(address)
    await server.start()
    print(address, flush=True)
    await server.wait_for_termination()


def measured(
    prompts: Iterator[str], rounds: int, seconds: float, server_core: int, load_core: int
) -> list[dict[str, Any]]:
    """Put every server under load, in turns.

    Returns:
        Per round and mode: what `figures` says, and `per_cpu_second`, answers per second of the
        server's CPU time.
    """
    module = "benchmarks.telemetry"
    ports = free_ports(len(MODES) + 1)
    addresses = [f"127.0.0.1:{port}" for port in ports]
    *metrics, collector = addresses
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack, Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=rounds * len(MODES))
        stack.enter_context(child(f"{module}.collect", collector, core=load_core))
        servers = {
            mode: stack.enter_context(
                child(f"{module}.serve", mode, own, collector, core=server_core)
            ).running
            for mode, own in zip(MODES, metrics, strict=True)
        }
        for server in servers.values():
            asyncio.run(_turn(server, prompts, seconds / 4))  # warm
        for number in range(rounds):
            run = {}
            # Nobody is always first.
            for place in range(len(MODES)):
                mode = MODES[(number + place) % len(MODES)]
                own = metrics[MODES.index(mode)] if mode != "off" else None
                with _scraping(own):
                    run[mode] = asyncio.run(_turn(servers[mode], prompts, seconds))
                progress.advance(task)
            runs.append(run)
    return runs


async def _turn(server: Running, prompts: Iterator[str], seconds: float) -> dict[str, Any]:
    used = server.cpu_seconds()
    async with clients.route(server.address) as client:
        calls = await closed_loop(lambda _: client.ask(next(prompts)), [""], CALLERS, seconds)
    used = server.cpu_seconds() - used
    found = figures(calls)
    if found["answered"] != found["calls"]:
        raise SystemExit(f"{found['calls']} calls, but {found['answered']} answers")
    return {**found, "per_cpu_second": len(calls) / used}


@contextmanager
def _scraping(address: str | None) -> Iterator[None]:
    """Scrape an address while the block lasts, as Prometheus does; None: nothing."""
    stop = threading.Event()

    def scrape() -> None:
        accept = "application/openmetrics-text;version=1.0.0"
        request = urllib.request.Request(
            f"http://{address}/metrics", headers={"Accept": accept, "Accept-Encoding": "gzip"}
        )
        wait = SCRAPE_PERIOD / 2  # so that a turn that is a period long has one
        while not stop.wait(wait):
            wait = SCRAPE_PERIOD
            with urllib.request.urlopen(request, timeout=10) as response:
                response.read()

    if address is None:
        yield
        return
    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def compared(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Every mode beside `off` in the same round.

    Returns:
        Per mode the medians of its figures and, of `per_cpu_second` and `per_second` in relation to
        `off`, the median (`ratio`, `ratio_per_second`) and the quartiles (`ratio_quartiles`).
    """
    found: dict[str, Any] = {}
    for mode in MODES:
        ratios = [run[mode]["per_cpu_second"] / run["off"]["per_cpu_second"] for run in runs]
        wall = [run[mode]["per_second"] / run["off"]["per_second"] for run in runs]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        found[mode] = {
            "per_second": statistics.median(run[mode]["per_second"] for run in runs),
            "per_cpu_second": statistics.median(run[mode]["per_cpu_second"] for run in runs),
            "p50_ms": statistics.median(run[mode]["p50_ms"] for run in runs),
            "p99_ms": statistics.median(run[mode]["p99_ms"] for run in runs),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [low, high],
            "ratio_per_second": statistics.median(wall),
        }
    return found


def _table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=f"Route, {CALLERS} callers, one core; beside off")
    for column in ("", "answers/s", "per CPU s", "p50 / p99 ms", "cost", "quartiles"):
        table.add_column(column, justify="right" if column else "left")
    for mode, each in found.items():
        low, high = each["ratio_quartiles"]
        table.add_row(
            mode,
            f"{each['per_second']:.0f}",
            f"{each['per_cpu_second']:.0f}",
            f"{each['p50_ms']:.1f} / {each['p99_ms']:.1f}",
            f"{1 - each['ratio']:.1%}",
            f"{1 - high:.1%} to {1 - low:.1%}",
        )
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="turns of each server; default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=float, default=SCRAPE_PERIOD, help="of each turn; default: %(default)s"
    )
    parser.add_argument(
        "--short", action="store_true", help="one second each, to see that it works; keeps nothing"
    )
    options = parser.parse_args()
    if options.short:
        options.rounds, options.seconds = 1, 1.0
    return options


if __name__ == "__main__":
    sys.exit(main())

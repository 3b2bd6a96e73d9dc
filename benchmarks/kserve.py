"""Route with its networks on a Triton, beside Route with its own engine.

    python -m benchmarks.kserve [--shape minilm] [--short]

Two servers with the same bundle, one with ONNX Runtime in its process, one that calls a Triton on
the same machine (the build in nvidia-pytriton, whose Python backend runs ONNX Runtime). One at a
time is asked, in turns, so that what else happens on the machine happens to both. All share all
cores: what is compared is what it costs to go over a wire, not what a GPU behind it would gain.

- per_second, p50_ms, p99_ms: callers who wait for their answers; no prompt is sent twice.
- front_ms: CPU time of the server that was asked, per answer, in milliseconds: what a front end
  needs where the networks' computing is not its own.
- items_per_run: mean inputs of a batch that Triton ran.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.children import child, serve_until_signal
from benchmarks.compare import RATES, written
from benchmarks.latencies import figures
from benchmarks.load import closed_loop
from benchmarks.overload import PROMPTS, distinct
from benchmarks.peers import clients
from benchmarks.peers.running import Running
from bestroute import app
from bestroute.bundle import digest, served_name
from bestroute.config import Engine, Server, Settings
from bestroute.observe.logs import log_to_stderr
from bestroute.tokenizer import Tokenizer
from tests.triton import Triton, export, running

CALLERS = (1, 32)
LOCAL, REMOTE = "local", "kserve"


def main() -> int:
    """Measure, print the table, keep the JSON."""
    options = _options()
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        bundle, _ = written(options.shape, directory, stock=False)
        network = bundle.manifest.router
        tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
        prompts = distinct(record.mixed_prompts(tokenizer, PROMPTS))
        export(bundle.directory, directory / "models")
        with running(directory / "models", directory) as triton:
            runs = measured(bundle.directory, triton, prompts, options.rounds, options.seconds)
    found = medians(runs)
    Console().print(_table(found, options.shape))
    if options.short:
        return 0
    settings = {"shape": options.shape, "rounds": options.rounds, "seconds": options.seconds}
    kept = record.write(f"kserve-{options.shape}", settings, {**found, "runs": runs})
    print(f"kept in {kept.relative_to(Path.cwd())}")
    return 0


def serve(bundle: str, endpoint: str) -> None:
    """Serve until SIGTERM; prints the address when ready.

    Args:
        bundle: its directory.
        endpoint: where the networks are; "": in this process.
    """
    log_to_stderr("WARNING", "text")
    engine = Engine(provider="kserve", endpoint=endpoint) if endpoint else Engine()
    server = Server(listen="127.0.0.1:0")
    serve_until_signal(app.serving(Settings(bundle=Path(bundle), server=server, engine=engine)))


def measured(
    bundle: Path, triton: Triton, prompts: Iterator[str], rounds: int, seconds: float
) -> list[dict[str, dict[str, Any]]]:
    """Put both servers under load, in turns.

    Returns:
        Per round, by "local-1", "kserve-1" and so on, the number being that of the callers: what
        `figures` says, `front_ms`, and of Triton `items_per_run`.
    """
    router = served_name("router", digest(bundle))
    endpoints = {LOCAL: "", REMOTE: f"grpc://{triton.address}"}
    runs: list[dict[str, dict[str, Any]]] = []
    with ExitStack() as stack:
        servers = {
            mode: stack.enter_context(child("benchmarks.kserve.serve", str(bundle), at)).running
            for mode, at in endpoints.items()
        }
        for server in servers.values():
            asyncio.run(_turn(server, prompts, max(CALLERS), seconds / 4))  # warm
        for _ in range(rounds):
            run: dict[str, dict[str, Any]] = {}
            for callers in CALLERS:
                for mode, server in servers.items():
                    inputs, batches = triton.batches(router)
                    turn = asyncio.run(_turn(server, prompts, callers, seconds))
                    more, further = triton.batches(router)
                    if mode == REMOTE:
                        turn["items_per_run"] = (more - inputs) / (further - batches)
                    run[f"{mode}-{callers}"] = turn
            runs.append(run)
    return runs


async def _turn(
    server: Running, prompts: Iterator[str], callers: int, seconds: float
) -> dict[str, Any]:
    used = server.cpu_seconds()
    async with clients.route(server.address) as client:
        calls = await closed_loop(lambda _: client.ask(next(prompts)), [""], callers, seconds)
    used = server.cpu_seconds() - used
    found = figures(calls)
    if found["answered"] != found["calls"]:
        raise SystemExit(f"{found['calls']} calls, but {found['answered']} answers")
    return {**found, "front_ms": 1e3 * used / len(calls)}


def medians(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """The median over rounds of every figure of a mode."""
    return {
        mode: {name: statistics.median(run[mode][name] for run in runs) for name in runs[0][mode]}
        for mode in runs[0]
    }


def _table(found: Mapping[str, Mapping[str, float]], shape: str) -> Table:
    table = Table(title=f"Route, router {shape}; networks here, and on a Triton on the same cores")
    for column in ("", "answers/s", "p50 / p99 ms", "front end's CPU ms", "items per run"):
        table.add_column(column, justify="right" if column else "left")
    for mode, each in found.items():
        table.add_row(
            mode,
            f"{each['per_second']:.0f}",
            f"{each['p50_ms']:.1f} / {each['p99_ms']:.1f}",
            f"{each['front_ms']:.2f}",
            f"{each['items_per_run']:.1f}" if "items_per_run" in each else "",
        )
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=RATES, default="minilm", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=8, help="of a turn; default: %(default)s")
    parser.add_argument(
        "--short", action="store_true", help="one second each, to see that it works; keeps nothing"
    )
    options = parser.parse_args()
    if options.short:
        options.rounds, options.seconds = 1, 1.0
    return options


if __name__ == "__main__":
    sys.exit(main())

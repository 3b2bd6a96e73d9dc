"""bestroute beside the servers that one would use instead, with the same network on the same cores.

    python -m benchmarks.compare [--shape minilm] [--stock] [--peers bestroute,triton] [--short]

Every server runs alone, in turn, and each turn is repeated: started, warmed up, checked to give the
bare session's rows, put under each load, ended. Each peer is installed on first use, into an
environment of its own. See benchmarks/peers for what they are and how they are set up, and
benchmarks/README.md for what is measured.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from benchmarks import record
from benchmarks.latencies import medians, milliseconds
from benchmarks.peers.environment import dependencies
from benchmarks.peers.model import SYNTHETIC, TYPICAL, Cost
from benchmarks.peers.registry import PEERS, Peer
from benchmarks.peers.running import Setup
from benchmarks.turns import Load, Plan, compare
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.config import Engine as EngineSettings
from bestroute.engine import Engine, cpus, preferred_precisions
from bestroute.tokenizer import Tokenizer

CHECKED = 32
"""Prompts whose rows are compared, all sent at once so that batches are among them."""
CALLERS = (1, 4, 16, 32, 128)
RATES: Mapping[str, tuple[float, ...]] = {
    "ngrams": (100, 300, 600, 1000, 1500),
    "minilm": (10, 25, 50, 75, 100),
    "deberta": (2, 5, 10, 15, 20),
}
"""Arrivals per second that are tried with each router; the last ones are too many for two cores."""


def main() -> int:
    """Compare, print the tables, keep the JSON."""
    options = _options()
    # So that being ended, too, unwinds the stack and ends the server of the moment.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.load_cores:
        os.sched_setaffinity(0, options.load_cores)
    with tempfile.TemporaryDirectory() as directory:
        bundle, model = written(options.shape, Path(directory), stock=options.stock)
        threads = len(options.server_cores) if options.server_cores else cpus()
        setup = setup_of(bundle, model, threads, options.server_cores, options.synthetic)
        plan = plan_of(bundle, options)
        peers = [PEERS[name] for name in options.peers]
        with Progress(transient=True) as progress:
            task = progress.add_task("", total=plan.repeats * len(peers) * len(plan.loads))
            compared = asyncio.run(compare(peers, setup, plan, Report(progress, task)))
    show(compared, plan.loads)
    if options.short:
        return 0
    settings = {
        "shape": options.shape,
        "stock": options.stock,
        "synthetic": options.synthetic,
        "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
        "engine_threads": threads,
        "server_cores": options.server_cores,
        "load_cores": options.load_cores,
        "seconds": plan.seconds,
        "repeats": plan.repeats,
        "prompts": len(plan.prompts),
        "callers": [load.callers for load in plan.loads if load.callers],
        "rates": [load.rate for load in plan.loads if load.rate],
        "installed": {peer.name: dependencies(peer.server) for peer in peers},
    }
    suffix = ("-stock" if options.stock else "") + ("-synthetic" if options.synthetic else "")
    if len(peers) < len(PEERS):
        suffix += "-some"
    kept = record.write(f"peers-{options.shape}{suffix}", settings, compared)
    print(f"kept in {kept.relative_to(Path.cwd())}; draw it with python -m benchmarks.page")
    return 0


def written(shape: str, directory: Path, *, stock: bool) -> tuple[Bundle, Path]:
    """A bundle with a router of a shape, and the ONNX file that peers serve instead.

    Args:
        shape: one of `RATES`.
        directory: where to write them.
        stock: whether that file is the stock export of the same weights.
    """
    if shape == "ngrams":
        bundle = Bundle.load(DEFAULT_BUNDLE)
    else:
        from benchmarks.encoder import write_encoder_bundle  # torch, only where it is needed

        exported = directory / "stock.onnx" if stock else None
        bundle = Bundle.load(write_encoder_bundle(directory / shape, shape, stock=exported))
        if exported:
            return bundle, exported
    return bundle, bundle.network_path(bundle.manifest.router, ("fp32",))


def setup_of(
    bundle: Bundle,
    model: Path,
    threads: int,
    cores: Sequence[int] | None = None,
    synthetic: str | None = None,
) -> Setup:
    """What servers are told.

    Args:
        bundle: that bestroute serves.
        model: the ONNX file that the others serve. One that isn't the bundle's is a stock export,
            and run with ONNX Runtime's defaults.
        threads: of a run.
        cores: CPUs that servers may use; None: all that this process may use.
        synthetic: "a,b" of `Cost`, for no engine at all.
    """
    environment = {
        "PEER_BUNDLE": str(bundle.directory),
        "PEER_MODEL": str(model),
        "PEER_TOKENIZER": str(bundle.tokenizer_path),
        "PEER_MAX_TOKENS": str(bundle.manifest.router.max_tokens),
        "PEER_THREADS": str(threads),
        "PEER_MAX_BATCH": "128" if synthetic else "32",  # bestroute's defaults, on a GPU and a CPU
        "PEER_TUNED": str(int(model.is_relative_to(bundle.directory))),
        **({SYNTHETIC: synthetic} if synthetic else {}),
    }
    return Setup(environment, cores or os.sched_getaffinity(0))


def plan_of(bundle: Bundle, options: argparse.Namespace) -> Plan:
    """The plan that the options ask for, with what the bare session says to its prompts."""
    network, settings = bundle.manifest.router, EngineSettings()
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
    prompts = record.mixed_prompts(tokenizer, options.prompts)
    bare = Engine(
        bundle.network_path(network, preferred_precisions(settings)),
        settings,
        max_items=1,
        max_tokens=network.max_tokens,
    )
    checked = [TYPICAL] * CHECKED if options.synthetic else prompts[:CHECKED]
    rows = [bare.run([tokenizer.prompt(prompt).ids])[0] for prompt in checked]
    arms = len(bundle.manifest.arms)
    return Plan(
        prompts,
        [row[:arms] for row in rows],
        [
            *(Load(callers=callers) for callers in options.callers),
            *(Load(rate=rate) for rate in options.rates),
        ],
        options.seconds,
        options.repeats,
    )


class Report:
    """Tells how far a comparison is.

    Args:
        progress: where.
        task: which.
    """

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def __call__(self, peer: Peer, load: Load | None, loads: int = 1) -> None:
        """A server begins with a load, and so is through with some others."""
        doing = f"{peer.title}: {load.name if load else 'starting'}"
        self._progress.update(self._task, description=doing, advance=loads)


def show(compared: Mapping[str, Any], loads: Sequence[Load]) -> None:
    """Print medians over the repeats, and what could not run."""
    console = Console()
    for title, some in (
        ("Closed loop", [load for load in loads if load.callers]),
        ("Open loop, Poisson arrivals", [load for load in loads if load.rate]),
    ):
        table = Table("server", *(load.name for load in some), title=title, title_justify="left")
        for found in compared["runs"].values():
            table.add_row(found["title"], *(_cell(found["loads"][load.name]) for load in some))
        console.print(table)
    console.print("answers per second; median / 99th percentile of the latency")
    for name, reason in compared["could_not_run"].items():
        console.print(f"{PEERS[name].title} could not run: {reason}", markup=False)


def _cell(runs: Sequence[Mapping[str, Any]]) -> str:
    found = medians(runs)
    return f"{found['per_second']:.0f}/s; {milliseconds(found)} ms"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        choices=RATES,
        default="minilm",
        help="the router: of the default bundle (ngrams), MiniLM-L6 (minilm), or one in the shape "
        "of DeBERTa-v3-small with random weights (deberta); default: minilm",
    )
    parser.add_argument(
        "--stock",
        action="store_true",
        help="give the others the stock export of the same weights, run with ONNX Runtime's "
        "defaults, as one would deploy it; bestroute keeps its bundle",
    )
    parser.add_argument(
        "--synthetic",
        metavar="A,B",
        help="no engine: a run takes A ms + B us per padded token; 0.4,2.3 is about an A100's",
    )
    parser.add_argument(
        "--peers",
        type=_names,
        default=list(PEERS),
        metavar="NAMES",
        help=f"which, in which order; default: {','.join(PEERS)}",
    )
    parser.add_argument(
        "--callers",
        type=_numbers,
        default=CALLERS,
        metavar="N,N",
        help="of the closed loops; default: %(default)s",
    )
    parser.add_argument(
        "--rates",
        type=_rates,
        metavar="R,R",
        help="arrivals per second of the open loops; default: by shape, up to too many",
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of each load; default: %(default)s"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="of every server's turn; default: %(default)s"
    )
    parser.add_argument(
        "--prompts", type=int, default=512, help="different ones; default: %(default)s"
    )
    parser.add_argument(
        "--server-cores",
        type=_numbers,
        metavar="C,C",
        help="CPUs that servers run on, a thread of the engine on each; default: any",
    )
    parser.add_argument(
        "--load-cores", type=_numbers, metavar="C,C", help="CPUs of the load; default: any"
    )
    parser.add_argument(
        "--short", action="store_true", help="one second each, to see that all works; keeps nothing"
    )
    options = parser.parse_args()
    if options.stock and options.shape == "ngrams":
        parser.error("--stock: the router of n-grams has no stock export; choose another --shape")
    if bool(options.server_cores) != bool(options.load_cores):
        parser.error("--server-cores and --load-cores: name both, or neither")
    if options.synthetic:
        Cost.parse(options.synthetic)
    options.rates = options.rates or RATES[options.shape]
    if options.short:
        options.seconds, options.repeats = 1.0, 1
        options.callers, options.rates = (1, 8), options.rates[1:2]
    return options


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := sorted(set(names) - set(PEERS)):
        raise argparse.ArgumentTypeError(
            f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}"
        )
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _rates(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())

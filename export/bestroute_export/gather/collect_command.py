"""The command `collect`: arguments, progress, signals, and what is told at the end."""

import argparse
import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from math import inf
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn
from rich.table import Table

from bestroute.upstream.providers import Sampling
from bestroute_export.gather import on_ray
from bestroute_export.gather.collect import Collector, known_prices
from bestroute_export.gather.collection import Collection
from bestroute_export.gather.command_line import (
    INCOMPLETE,
    add_common,
    at_least_one,
    check_format,
    journal_of,
    positive,
    progress_bars,
    served,
    shared,
)
from bestroute_export.gather.journal import Entry
from bestroute_export.gather.limits import Limits
from bestroute_export.rows import write_rows

INTERRUPTED = 130
"""Exit status, as a shell reports it of a command that Ctrl-C ended."""

_PROMPTS_PER_BATCH = 16
"""Of a worker on Ray: what comes back, and can be lost, together."""


def add_collect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; `alone` of its options runs it."""
    command = commands.add_parser(
        "collect",
        help="sample answers of LLMs to prompts",
        description="Samples answers from OpenAI-compatible providers. What is done is kept in "
        "OUT.journal, so the same command goes on where it was stopped, however it was.",
    )
    command.set_defaults(alone=collect)
    command.add_argument(
        "--prompts", type=Path, required=True, help="rows with id and prompt, or .txt lines"
    )
    command.add_argument(
        "--models",
        type=Path,
        required=True,
        help="TOML file with [providers] and [models] as `bestroute serve` has them",
    )
    command.add_argument(
        "--samples", type=at_least_one, required=True, help="answers per prompt and model"
    )
    command.add_argument(
        "--max-output-tokens", type=at_least_one, default=2048, help="per answer (%(default)s)"
    )
    command.add_argument("--temperature", type=float, help="of the sampling (the provider's own)")
    command.add_argument(
        "--max-cost-usd",
        type=positive,
        default=inf,
        metavar="USD",
        help="money that all runs into OUT may cost together (no limit)",
    )
    add_common(command)


def collect(options: argparse.Namespace, console: Console) -> None:
    """Sample answers, write what there is, and say what is missing.

    Raises:
        SystemExit: 1 where answers are missing, 130 after Ctrl-C.
    """
    settings = served(options.models)
    check_format(options.out)
    sampling = Sampling(options.max_output_tokens, options.temperature)
    with journal_of(options.out, {"sampling": asdict(sampling)}) as journal:
        collection = Collection(options.prompts, journal, [*settings.models], options.samples)
        limits = Limits(options.max_cost_usd - collection.spent, dict(options.requests_per_minute))
        with progress_bars(console, TextColumn("${task.fields[usd]:.4f}")) as progress:
            bars = {
                model: progress.add_task(
                    model, total=collection.wanted_per_model, completed=count, usd=0.0
                )
                for model, count in collection.done().items()
            }
            costs = dict.fromkeys(bars, 0.0)

            def record(entry: Entry) -> None:
                collection.record(entry)
                if "model" in entry:
                    model = entry["model"]
                    costs[model] += entry["cost_usd"] or 0.0
                    progress.update(bars[model], advance="text" in entry, usd=costs[model])

            if options.ray is None:
                make = partial(Collector, settings, sampling, limits)
                interrupted = asyncio.run(_collect(make, collection, record, progress.console))
            else:
                workers = on_ray.connect(options.ray)
                make = partial(
                    Collector, shared(settings, workers), sampling, limits.share(workers)
                )
                interrupted = _collect_on_ray(make, collection, record, workers)
        write_rows(options.out, collection.rows())
        complete = _tell_collected(collection, options, console)
    if unpriced := [name for name, price in known_prices(settings).items() if price is None]:
        console.print(
            f"not counted, their prices are not known: {', '.join(unpriced)}", markup=False
        )
    if interrupted or not complete:
        raise SystemExit(INTERRUPTED if interrupted else INCOMPLETE)


async def _collect(
    make: Callable[[], Collector],
    collection: Collection,
    record: Callable[[Entry], None],
    console: Console,
) -> bool:
    """Collect until all is there or a signal comes; whether one came."""
    interrupted = False
    async with aclosing(make()) as collector:
        run = asyncio.create_task(collector.run(collection.wanted, record))

        def interrupt() -> None:
            nonlocal interrupted
            if interrupted:
                run.cancel()
            else:
                console.print("answers under way are waited for; Ctrl-C again drops them")
                collector.stop()
            interrupted = True

        with _on_signals(interrupt), suppress(asyncio.CancelledError):
            await run
    return interrupted


def _collect_on_ray(
    make: Callable[[], Collector],
    collection: Collection,
    record: Callable[[Entry], None],
    workers: int,
) -> bool:
    """Collect on a cluster; whether Ctrl-C ended it, which drops what is under way."""
    wanted = map(asdict, collection.wanted())
    try:
        for entry in on_ray.spread(wanted, make, workers=workers, batch=_PROMPTS_PER_BATCH):
            record(entry)
    except KeyboardInterrupt:
        return True
    return False


def _tell_collected(collection: Collection, options: argparse.Namespace, console: Console) -> bool:
    """Say what there is and what is missing; whether nothing is."""
    table = Table("model", "answers", "failed calls", "said last")
    left = 0
    for model, count in collection.done().items():
        wanted = collection.wanted_per_model
        left += wanted - count
        table.add_row(
            escape(model),
            f"{count:,} of {wanted:,}",
            f"{collection.failures[model]:,}",
            escape(collection.words.get(model, "")),
        )
    console.print(table)
    for note in dict.fromkeys(collection.notes):
        console.print(f"[yellow]{escape(note)}[/]", highlight=False)
    cap = "" if options.max_cost_usd == inf else f" of at most ${options.max_cost_usd:.4f}"
    console.print(
        f"spent ${collection.spent:.4f}{cap}, in all runs; written to {options.out}",
        markup=False,
    )
    if left:
        console.print(f"{left:,} answers left to do; run the same again to go on")
    return not left


@contextmanager
def _on_signals(call: Callable[[], None]) -> Iterator[None]:
    """Call this for SIGINT and SIGTERM, on the running loop, instead of what they else do."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, call)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

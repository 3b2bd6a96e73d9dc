"""The command `label`: arguments, progress, and what is told at the end."""

import argparse
import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bestroute_export.gather import on_ray
from bestroute_export.gather.command_line import (
    INCOMPLETE,
    add_common,
    check_format,
    journal_of,
    progress_bars,
    served,
    shared,
)
from bestroute_export.gather.graders import Exact, Grader, GraderInvalid, Verifier
from bestroute_export.gather.journal import Entry
from bestroute_export.gather.judge import Judge
from bestroute_export.gather.label import Labeller, Labels
from bestroute_export.gather.limits import Limits
from bestroute_export.gather.prompts import read_references
from bestroute_export.rows import write_rows

_ANSWERS_PER_BATCH = 256
"""Of a worker on Ray: what comes back, and can be lost, together."""

_SHOWN = 5
"""Different errors that are printed."""


def add_label(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; `alone` of its options runs it."""
    command = commands.add_parser(
        "label",
        help="grade answers",
        description="Grades answers that have no score. What is done is kept in OUT.journal, so "
        "the same command goes on where it was stopped, however it was.",
    )
    command.set_defaults(alone=label)
    command.add_argument("--data", type=Path, required=True, help="rows with answers")
    command.add_argument(
        "--grader", choices=("exact", "verifier", "judge", "reward"), required=True
    )
    command.add_argument(
        "--answers",
        type=Path,
        help="rows with id and reference_answer (the field of that name in DATA)",
    )
    command.add_argument(
        "--verifier", metavar="MODULE:FUNCTION", help="called with a row and a text, gives [0, 1]"
    )
    command.add_argument("--judge", metavar="MODEL", help="one of the models of --models")
    command.add_argument("--models", type=Path, help="TOML file, as for collect")
    command.add_argument(
        "--reward-model", type=Path, metavar="DIR", help="local Hugging Face directory"
    )
    command.add_argument(
        "--reward-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="rewards that become 0 and 1, linear between (the logistic function instead)",
    )
    command.add_argument(
        "--trust-model-code", action="store_true", help="run Python code that lies in DIR"
    )
    add_common(command)


def label(options: argparse.Namespace, console: Console) -> None:
    """Grade answers, write them, and say what could not be graded.

    Raises:
        SystemExit: 1 where answers could not be graded.
    """
    check_format(options.out)
    workers = None if options.ray is None else on_ray.connect(options.ray)
    kind, make, identity = _grader(options, workers or 1)
    references = read_references(options.answers) if options.answers else {}
    with journal_of(options.out, {"grader": options.grader, **identity}) as journal:
        labels = Labels(options.data, journal, references)
        missing = sum(len(piece["answers"]) for piece in labels.ungraded(kind.answers_at_once))
        with progress_bars(console) as progress:
            bar = progress.add_task(options.grader, total=missing)

            def record(entry: Entry) -> None:
                labels.record(entry)
                progress.advance(bar)

            pieces = labels.ungraded(kind.answers_at_once)
            if workers is None:
                asyncio.run(_label(make, pieces, record))
            else:
                batch = max(1, _ANSWERS_PER_BATCH // kind.answers_at_once)
                gpu = options.grader == "reward"
                for entry in on_ray.spread(
                    pieces, partial(Labeller, make), workers=workers, batch=batch, gpu=gpu
                ):
                    record(entry)
        write_rows(options.out, labels.rows())
    for error, count in labels.errors.most_common(_SHOWN):
        console.print(f"[red]{count:,} not graded:[/] {escape(error)}", highlight=False)
    graded = missing - labels.errors.total()
    console.print(f"{graded:,} of {missing:,} answers graded; written to {options.out}")
    if labels.errors:
        console.print("run the same again to try once more those that were not graded")
        raise SystemExit(INCOMPLETE)


async def _label(
    make: Callable[[], Grader], pieces: Iterator[on_ray.Piece], record: Callable[[Entry], None]
) -> None:
    async with aclosing(Labeller(make)) as labeller:
        await labeller.work(pieces, record)


def _grader(
    options: argparse.Namespace, workers: int
) -> tuple[type[Grader], Callable[[], Grader], dict[str, object]]:
    """The grader's class, what makes one in each worker, and what its grades depend on."""
    match options.grader:
        case "verifier":
            name = _needed(options, "verifier")
            return Verifier, partial(Verifier, name), {"verifier": name}
        case "judge":
            settings = served(_needed(options, "models"))
            model = _needed(options, "judge")
            limits = Limits(inf, dict(options.requests_per_minute)).share(workers)
            return (
                Judge,
                partial(Judge, shared(settings, workers), model, limits),
                {"judge": model},
            )
        case "reward":
            # Imported where it is needed: it brings torch.
            from bestroute_export.gather.reward_model import RewardModel

            directory = _needed(options, "reward_model").resolve()
            bounds = options.reward_range and tuple(options.reward_range)
            identity = {"reward_model": str(directory), "range": bounds}
            trust = options.trust_model_code
            make = partial(RewardModel, directory, bounds, trust_code=trust)
            return RewardModel, make, identity
        case _:
            return Exact, Exact, {}


def _needed(options: argparse.Namespace, name: str) -> Any:
    value = getattr(options, name)
    if value is None:
        flag = name.replace("_", "-")
        raise GraderInvalid(f"--grader {options.grader} needs --{flag}; see --help")
    return value

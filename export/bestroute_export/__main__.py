"""`bestroute-export`: from graded answers to a bundle that `bestroute serve` loads."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from bestroute.bundle import DEFAULT_BUNDLE
from bestroute.errors import BundleInvalid
from bestroute_export.bundling import write_bundle
from bestroute_export.data import DataError
from bestroute_export.pipeline import Pipeline
from bestroute_export.recipe import Recipe, installed_backbone
from bestroute_export.verify import verify
from bestroute_export.work import WorkInvalid

SOURCES = {
    "prompts and pairs": "open-thought/reasoning-gym-eval, easy; Apache-2.0",
    "prices": "list prices at release, from public price pages",
    "backbone": "sentence-transformers/all-MiniLM-L6-v2; Apache-2.0",
}


def train_reward(pipeline: Pipeline, options: argparse.Namespace, console: Console) -> None:
    """Train the reward model and its folds, and score the answers."""
    console.print(f"rewards of {len(pipeline.rewards):,} groups of answers")


def train_router(pipeline: Pipeline, options: argparse.Namespace, console: Console) -> None:
    """Train the router, its folds and the one that skips the held-out tasks."""
    pipeline.fold_logits, pipeline.router, pipeline.unseen_router  # noqa: B018
    console.print(f"routers in {pipeline.work.directory}")


def calibrate(pipeline: Pipeline, options: argparse.Namespace, console: Console) -> None:
    """Print the calibration curve."""
    table = Table("threshold", "saving", "quality drop", "upper bound", title="out of fold")
    for point in pipeline.curve:
        chosen = " *" if point.match_threshold == pipeline.threshold else ""
        table.add_row(
            f"{point.match_threshold:.3f}{chosen}",
            f"{point.cost_saving:.1%}",
            f"{point.quality_drop:+.2%}",
            f"{point.quality_drop_upper:+.2%}",
        )
    console.print(table)


def export(pipeline: Pipeline, options: argparse.Namespace, console: Console) -> None:
    """Write the bundle, its figures measured on the exported files, and check it."""
    manifest = write_bundle(pipeline, options.out, options.name, options.version, SOURCES)
    table = Table("figure", "value", title=f"{manifest.name} {manifest.version}")
    for name, value in manifest.metrics.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    check(options.out, console)


def check(directory: Path, console: Console) -> None:
    """Print what `verify` finds; exit with 1 if anything is off."""
    checks = verify(directory)
    for result in checks:
        mark = "[green]ok[/]" if result.passed else "[red]FAILED[/]"
        console.print(f"{mark} {result.name}: {result.difference:.2g} (limit {result.limit:.2g})")
    if not all(result.passed for result in checks):
        raise SystemExit(1)


Step = Callable[[Pipeline, argparse.Namespace, Console], None]
STEPS: dict[str, tuple[Step, str]] = {
    "train-reward": (train_reward, "train the reward model and score the answers with it"),
    "train-router": (train_router, "train the router on exact labels"),
    "calibrate": (calibrate, "calibrate probabilities and print what each threshold gives"),
    "export": (export, "write the bundle, with figures measured on its files"),
    "run": (export, "all of the above"),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="bestroute-export",
        description="Trains, calibrates, measures and exports a bundle for `bestroute serve`. "
        "A step runs whatever it needs first; finished steps are kept in the work directory.",
    )
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for name, (step, text) in STEPS.items():
        command = commands.add_parser(name, help=text, description=step.__doc__)
        command.set_defaults(step=step)
        command.add_argument("--data", type=Path, required=True, help="folder with the data")
        command.add_argument(
            "--work",
            type=Path,
            default=Path("work"),
            help="results of finished steps (%(default)s)",
        )
        command.add_argument(
            "--backbone", type=Path, help="local BERT directory (the installed MiniLM-L6)"
        )
        command.add_argument(
            "--reference", default=Recipe.reference, help="LLM to match (%(default)s)"
        )
        command.add_argument(
            "--max-samples", type=int, default=Recipe.max_samples, help="largest n (%(default)s)"
        )
        if step is export:
            command.add_argument("--out", type=Path, required=True, help="directory of the bundle")
            command.add_argument("--name", default="default", help="its name (%(default)s)")
            command.add_argument("--version", default="1", help="its version (%(default)s)")
    command = commands.add_parser("verify", help="check a bundle against its manifest")
    command.add_argument("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE)
    command.set_defaults(step=None)
    return root


def main(arguments: list[str] | None = None) -> None:
    """Run one command; errors of the user end in one line and exit status 2."""
    options = parser().parse_args(arguments)
    console = Console()
    # The exporter reports every optional package that it does without.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        if options.step is None:
            check(options.bundle, console)
            return
        recipe = Recipe(
            backbone=options.backbone or installed_backbone(),
            reference=options.reference,
            max_samples=options.max_samples,
        )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            pipeline = Pipeline(options.data, options.work, recipe, progress)
            options.step(pipeline, options, console)
    except (BundleInvalid, DataError, FileNotFoundError, WorkInvalid) as error:
        console.print(f"[red]{error}[/]", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()

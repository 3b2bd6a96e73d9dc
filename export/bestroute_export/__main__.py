"""`bestroute-export`: from graded answers to a bundle that `bestroute serve` loads."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.config import ConfigInvalid
from bestroute.errors import BundleInvalid
from bestroute.promise import Point, least_promise, promises
from bestroute_export.bundling import write_bundle
from bestroute_export.data import DataError, read_prices
from bestroute_export.encoders import BackboneUnsupported
from bestroute_export.evaluate import calibration_error
from bestroute_export.evaluation.command import add_evaluate
from bestroute_export.evaluation.experiment import ExperimentInvalid
from bestroute_export.gather.collect_command import add_collect
from bestroute_export.gather.graders import GraderInvalid
from bestroute_export.gather.label_command import add_label
from bestroute_export.gather.on_ray import RayFailed
from bestroute_export.graph import GraphUnsupported
from bestroute_export.importing import import_reward
from bestroute_export.pipeline import QUALITY_DROP, Pipeline
from bestroute_export.recipe import ENCODER_ROUTER, Recipe, installed_backbone
from bestroute_export.traffic_command import add_import_log
from bestroute_export.triton import BACKENDS, PREFERRED, write_repository
from bestroute_export.validate.check import check_file
from bestroute_export.validate.view import show
from bestroute_export.values import ValueConfig
from bestroute_export.verify import Disagreement, verify
from bestroute_export.work import WorkInvalid

USER_ERRORS = (
    BackboneUnsupported,
    BundleInvalid,
    ConfigInvalid,
    DataError,
    Disagreement,
    ExperimentInvalid,
    FileExistsError,
    FileNotFoundError,
    GraderInvalid,
    GraphUnsupported,
    RayFailed,
    WorkInvalid,
)

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
    pipeline.fold_outputs, pipeline.router, pipeline.unseen_router  # noqa: B018
    console.print(f"routers in {pipeline.work.directory}")


def calibrate(pipeline: Pipeline, options: argparse.Namespace, console: Console) -> None:
    """Print how far the probabilities are off, and what each setting gives and promises."""
    labels = pipeline.outcomes.labels
    fitted = pipeline.fold_outputs[:, : labels.shape[1]]
    errors = Table("arm", "error", title="expected calibration error, out of fold")
    for column, arm in enumerate(pipeline.pool.arms):
        error = calibration_error(fitted[:, column], labels[:, column])
        errors.add_row(f"{arm.model} x {arm.samples}", f"{error:.2%}")
    errors.add_section()
    errors.add_row("all", f"{calibration_error(fitted, labels):.2%}")
    console.print(errors)
    if (trade_offs := pipeline.trade_offs) is not None:
        default = trade_offs.default_quality_per_usd
        print_curve(
            trade_offs.curve, lambda p: p.quality_per_usd, "quality per USD", default, console
        )
    else:
        default = pipeline.threshold
        print_curve(pipeline.curve, lambda p: p.match_threshold, "threshold", default, console)


def print_curve(
    curve: Sequence[Point],
    setting: Callable[[Point], float],
    name: str,
    default: float,
    console: Console,
) -> None:
    """Print what each setting of the rule was measured to give, and what can be promised."""
    table = Table(name, "saving", "quality drop", "upper bound", "promised", title="measured")
    for promise, point in reversed(promises(curve)):
        table.add_row(
            f"{setting(point):.4g}{' *' if setting(point) == default else ''}",
            f"{point.cost_saving:.1%}",
            f"{point.quality_drop:+.2%}",
            f"{point.quality_drop_upper:+.2%}",
            f"{promise:+.2%}",
        )
    console.print(table)
    least = least_promise(curve)
    if least is None:
        console.print("No setting saves anything: the reference is the cheapest LLM here.")
        return
    if least.quality_drop > QUALITY_DROP:
        console.print(
            "These prompts don't show that any saving comes at a drop of at most "
            f"{QUALITY_DROP:.1%}: by default the reference answers everything."
        )
    console.print(
        f"The smallest drop that can be promised (95 %) is {least.quality_drop:.2%}; "
        f"it saves {least.point.cost_saving:.1%} at a {name} of {setting(least.point):.4g}."
    )


def export(pipeline: Pipeline, options: argparse.Namespace, console: Console) -> None:
    """Write the bundle, its figures measured on the exported files, and check it."""
    manifest = write_bundle(
        pipeline, options.out, options.name, options.version, SOURCES, options.precision
    )
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


def validate(options: argparse.Namespace, console: Console) -> None:
    """Print what is wrong with a data file and what it can train; exit with 2 if anything is."""
    prices = read_prices(options.prices) if options.prices else None
    report = check_file(options.file, prices, options.reference)
    show(report, str(options.file), console)
    if report.wrong:
        raise SystemExit(2)


def take_in(options: argparse.Namespace, console: Console) -> None:
    """Copy a bundle with a Hugging Face reward model in place of its own, and check it."""
    import_reward(options.directory, options.bundle, options.out, options.version)
    check(options.out, console)


def convert(options: argparse.Namespace, console: Console) -> None:
    """Write a bundle's networks in another server's form."""
    names = write_repository(
        Bundle.load(options.bundle),
        options.triton,
        backend=options.backend,
        precision=options.precision,
    )
    console.print(f"models {' and '.join(names)} in {options.triton}", highlight=False)


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
    add_collect(commands)
    add_label(commands)
    add_import_log(commands)
    add_evaluate(commands)
    for name, (step, text) in STEPS.items():
        command = commands.add_parser(name, help=text, description=step.__doc__)
        command.set_defaults(step=step)
        command.add_argument(
            "--data", type=Path, required=True, help="graded answers: a file, or a folder"
        )
        command.add_argument(
            "--prices",
            type=Path,
            help="USD per million tokens by LLM (prices.json beside the data)",
        )
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
            "--router",
            choices=("ngrams", "encoder"),
            default="ngrams",
            help="fit a router to n-grams, or fine-tune the backbone to one (%(default)s)",
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
            command.add_argument(
                "--precision",
                action="append",
                default=[],
                choices=("fp16", "int8"),
                help="export in this one as well, if it decides the same; may be repeated",
            )
    command = commands.add_parser("verify", help="check a bundle against its manifest")
    command.add_argument("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE)
    command.set_defaults(alone=lambda options, console: check(options.bundle, console))
    command = commands.add_parser(
        "bundle",
        help="write a bundle in another server's form",
        description=convert.__doc__,
    )
    command.add_argument("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE)
    command.add_argument(
        "--triton", type=Path, required=True, metavar="DIR", help="as a Triton model repository"
    )
    command.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="what runs them there; python: where Triton was built without ONNX Runtime, which its "
        "Python then needs (default: onnxruntime)",
    )
    command.add_argument(
        "--precision",
        choices=PREFERRED,
        help="which of the bundle's files (default: the first it has of fp16, fp32, int8)",
    )
    command.set_defaults(alone=convert)
    command = commands.add_parser(
        "import",
        help="put a Hugging Face reward model into a bundle",
        description=take_in.__doc__,
    )
    command.add_argument("directory", type=Path, help="the model: BERT or DeBERTa-v2, one label")
    command.add_argument("--as", choices=("reward",), required=True, help="what it is used as")
    command.add_argument(
        "--bundle", type=Path, default=DEFAULT_BUNDLE, help="what to copy (the embedded bundle)"
    )
    command.add_argument("--out", type=Path, required=True, help="directory of the new bundle")
    command.add_argument("--version", default="1", help="its version (%(default)s)")
    command.set_defaults(alone=take_in)
    command = commands.add_parser(
        "validate",
        help="say what is wrong with a data file, and what it can train",
        description=validate.__doc__,
    )
    command.add_argument("file", type=Path, help="prompts or pairs: .jsonl, .jsonl.gz or .parquet")
    command.add_argument("--reference", help="LLM to match (the best of those with most prompts)")
    command.add_argument("--prices", type=Path, help="USD per million tokens by LLM, as JSON")
    command.set_defaults(alone=validate)
    return root


def main(arguments: list[str] | None = None) -> None:
    """Run one command; errors of the user end in one line and exit status 2."""
    options = parser().parse_args(arguments)
    console = Console()
    # The exporter reports every optional package that it does without.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        if alone := getattr(options, "alone", None):
            alone(options, console)
            return
        recipe = Recipe(
            backbone=options.backbone or installed_backbone(),
            reference=options.reference,
            max_samples=options.max_samples,
            router=ENCODER_ROUTER if options.router == "encoder" else ValueConfig(),
        )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            pipeline = Pipeline(options.data, options.work, recipe, progress, options.prices)
            options.step(pipeline, options, console)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        sys.exit(130)
    except USER_ERRORS as error:
        console.print(f"[red]{escape(str(error))}[/]", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()

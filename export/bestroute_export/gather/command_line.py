"""What the commands `collect` and `label` share: their files, limits, progress bars, arguments."""

import argparse
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

from bestroute.config import ConfigInvalid, Settings
from bestroute_export.gather.journal import Journal
from bestroute_export.rows import DataError

INCOMPLETE = 1
"""Exit status where something could not be done."""

FORMATS = (".jsonl", ".jsonl.gz", ".parquet")


def served(file: Path) -> Settings:
    """Read where models are served.

    Raises:
        ConfigInvalid: the file can't be used, or lists no model.
    """
    settings = Settings.load(file)
    if not settings.models:
        raise ConfigInvalid(f'{file} lists no [models."NAME"]; see examples/bestroute.toml')
    return settings


def shared(settings: Settings, workers: int) -> Settings:
    """The settings of each of several workers, so that all together keep the providers' limits.

    Raises:
        ConfigInvalid: there are more workers than a provider takes calls at once.
    """
    used = {served.provider for served in settings.models.values()}
    providers = {name: settings.providers[name] for name in used}
    for name, provider in providers.items():
        if workers > provider.max_concurrency:
            raise ConfigInvalid(
                f"{workers} workers, but [providers.{name}] takes {provider.max_concurrency} calls "
                f"at once; ask for --ray {provider.max_concurrency} at most"
            )
    shares = {
        name: provider.model_copy(update={"max_concurrency": provider.max_concurrency // workers})
        for name, provider in providers.items()
    }
    return settings.model_copy(update={"providers": shares})


def journal_of(out: Path, settings: dict[str, object]) -> Journal:
    """The journal beside an output file."""
    return Journal(out.with_name(f"{out.name}.journal"), settings)


def check_format(out: Path) -> None:
    """Refuse at once what could not be written at the end."""
    if not out.name.endswith(FORMATS):
        raise DataError(f"--out {out}: unknown format; name it {', '.join(FORMATS)}")


def progress_bars(console: Console, *columns: TextColumn) -> Progress:
    """Bars that say what is done, of how much, and how long the rest will take."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def add_common(command: argparse.ArgumentParser) -> None:
    """Add the arguments that both commands take."""
    command.add_argument(
        "--out", type=Path, required=True, help="file to write: .jsonl, .jsonl.gz or .parquet"
    )
    command.add_argument(
        "--requests-per-minute",
        type=_per_minute,
        action="append",
        default=[],
        metavar="PROVIDER=N",
        help="repeatable (no limit)",
    )
    command.add_argument(
        "--ray",
        type=at_least_one,
        nargs="?",
        const=0,
        metavar="WORKERS",
        help="run on the Ray cluster that RAY_ADDRESS names, or a local one (one worker per node)",
    )


def at_least_one(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def positive(text: str) -> float:
    """An argument that is a number above 0."""
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return number


def _per_minute(text: str) -> tuple[str, float]:
    provider, separator, number = text.rpartition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text}: write it as PROVIDER=N")
    return provider, positive(number)

"""The command `import-log`: what a decision log holds, and its prompts and answers as data."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bestroute_export.gather.command_line import check_format
from bestroute_export.rows import write_rows

if TYPE_CHECKING:
    from bestroute_export.traffic import Summary


def add_import_log(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; `alone` of its options runs it."""
    command = commands.add_parser(
        "import-log",
        help="turn a server's decision log into data",
        description="Prints what a decision log holds and how its answers turned out; writes its "
        "prompts and answers as rows that validate, collect, label and run read.",
    )
    command.set_defaults(alone=import_log)
    command.add_argument("directory", type=Path, help="decision_log.directory of the server")
    command.add_argument("--out", type=Path, help=".jsonl, .jsonl.gz or .parquet (write nothing)")
    command.add_argument(
        "--graded", action="store_true", help="only answers that feedback is on, and their prompts"
    )


def import_log(options: argparse.Namespace, console: Console) -> None:
    """Print a summary, and write the rows."""
    # Imported where it is needed: pyarrow is slow to load.
    from bestroute_export.traffic import graded_rows, summarize

    if options.out:
        check_format(options.out)
    show(summarize(options.directory), console)
    if options.out:
        write_rows(options.out, graded_rows(options.directory, graded_only=options.graded))
        console.print(f"written to {options.out}", highlight=False)


def show(summary: "Summary", console: Console) -> None:
    """Print what a log holds."""
    bundles = ", ".join(f"{name}: {count:,}" for name, count in sorted(summary.bundles.items()))
    console.print(
        f"{summary.decisions:,} decisions on {summary.different:,} different prompts "
        f"(by bundle {bundles}), {summary.with_text:,} with the prompt's text, "
        f"{summary.with_answers:,} with answers, {summary.with_feedback:,} with feedback",
        highlight=False,
    )
    if summary.calibration_error is None:
        return
    table = Table("arm", "outcomes", "expected", "observed", title="quality of answers")
    for arm in summary.arms:
        table.add_row(
            f"{arm.model} x {arm.samples}",
            f"{arm.outcomes:,}",
            f"{arm.expected:.1%}",
            f"{arm.observed:.1%}",
        )
    console.print(table)
    console.print(f"expected calibration error: {summary.calibration_error:.1%}", highlight=False)

"""A report on a data file as text for a terminal."""

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bestroute_export.validate.check import Report
from bestroute_export.validate.findings import Problem
from bestroute_export.validate.tally import Model


def show(report: Report, title: str, console: Console) -> None:
    """Print problems, LLMs and verdicts."""
    splits = ", ".join(f"{count:,} {split}" for split, count in sorted(report.splits.items()))
    held = f" ({splits})" if splits else ""
    console.print(
        f"{escape(title)}: {report.sound:,} of {report.rows:,} rows can be read{held}",
        soft_wrap=True,
    )
    for problem in report.problems:
        _show_problem(problem, console)
    if report.models:
        console.print(_table(report))
    for verdict in report.verdicts:
        mark = "[green]can[/]" if verdict.possible else "[yellow]can't[/]"
        text = f"{mark} serve for {verdict.purpose}: {escape(verdict.reason)}"
        console.print(text, highlight=False, soft_wrap=True)
    count = sum(problem.count for problem in report.problems if problem.wrong)
    console.print(f"{'[red]' if count else '[green]'}to mend: {count:,}[/]")


def _show_problem(problem: Problem, console: Console) -> None:
    mark = "[red]wrong[/]" if problem.wrong else "[yellow]note[/]"
    console.print(f"{mark} {escape(problem.kind)}: {problem.count:,}")
    for example in problem.examples:
        console.print(f"  {escape(example)}", highlight=False, soft_wrap=True)
    if (more := problem.count - len(problem.examples)) > 0:
        console.print(f"  and {more:,} more")


def _table(report: Report) -> Table:
    table = Table(
        box=SIMPLE, collapse_padding=True, pad_edge=False, title="answers (* the reference)"
    )
    table.add_column("LLM", overflow="fold")
    for name in (
        "prompts",
        "samples\nmin/med",
        "graded",
        "mean\nscore",
        "mean\ntokens",
        "USD/Mtok\nin/out",
        "pairs\ndiffer",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for model in report.models:
        table.add_row(*_cells(model, model == report.reference))
    return table


def _cells(model: Model, reference: bool) -> tuple[str, ...]:
    price = model.price
    return (
        escape(model.name) + (" *" if reference else ""),
        f"{model.prompts:,}",
        f"{model.samples}/{model.median_samples:g}",
        f"{model.graded / model.answers:.0%}",
        "" if model.score is None else f"{model.score:.3f}",
        f"{model.tokens:,.0f}",
        f"{price.input_usd_per_mtok:g}/{price.output_usd_per_mtok:g}" if price else "",
        f"{model.pairs:,}",
    )

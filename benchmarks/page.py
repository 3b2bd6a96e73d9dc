"""Writes what the benchmarks have kept into benchmarks/README.md, and draws the comparisons.

    python -m benchmarks.page

Of each kind the newest is shown. Colours are those of Okabe and Ito (2008), which
most colour-blind readers can tell apart; markers tell the servers apart without colour.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import mesh_sections, sections
from benchmarks.latencies import medians, milliseconds
from benchmarks.peers.registry import PEERS
from benchmarks.record import RESULTS
from benchmarks.sections import SHAPES
from bestroute_export.evaluation.plots import STYLE

PAGE = Path(__file__).parent / "README.md"
LINES = {
    "bestroute": ("#0072B2", "o", 2.2),
    "bestroute-stream": ("#56B4E9", "s", 2.2),
    "plain": ("#000000", "x", 1.2),
    "triton": ("#009E73", "^", 1.2),
    "mlserver": ("#E69F00", "v", 1.2),
    "rayserve": ("#D55E00", "D", 1.2),
    "mosec": ("#CC79A7", "P", 1.2),
    "litserve": ("#999999", "*", 1.2),
}
"""Colour, marker and width of each server's line."""
Record = Mapping[str, Any]

RESULTS_HEADING = "\n## Results\n"


def main() -> int:
    """Draw the newest comparisons and write the page."""
    write(newest(RESULTS), PAGE, RESULTS)
    print(f"wrote {PAGE.relative_to(Path.cwd())}")
    return 0


def newest(directory: Path) -> dict[str, Record]:
    """The last record of each benchmark that is kept in a directory."""
    records: dict[str, Record] = {}
    for path in sorted(directory.glob("*.json")):  # names end with the time
        record = json.loads(path.read_text(encoding="utf-8"))
        records[record["benchmark"]] = record
    return records


def write(records: Mapping[str, Record], page: Path, pictures: Path) -> None:
    """Replace the last section of a page by the results, with pictures in a directory below it."""
    text, _, _ = page.read_text(encoding="utf-8").partition(RESULTS_HEADING)
    parts = [text + RESULTS_HEADING]
    compared = [record for name, record in records.items() if name.startswith("peers-")]
    if not compared:
        parts.append("No comparison is kept yet: run `make bench-peers`.\n")
    for each in sorted(compared, key=lambda each: list(SHAPES).index(each["settings"]["shape"])):
        with rc_context(STYLE):
            draw(each, pictures)
        parts.append("\n".join(_section(each, pictures.relative_to(page.parent))) + "\n")
    parts.append("\n".join((*sections.of(records), *mesh_sections.of(records))))
    page.write_text("\n".join(parts), encoding="utf-8")


def draw(record: Record, directory: Path) -> None:
    """Write NAME.svg: throughput and latency by callers, and latency by rate of arrivals."""
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    axes = figure.subplots(2, 2)
    callers, rates = record["settings"]["callers"], record["settings"]["rates"]
    panels: tuple[tuple[Axes, str, Sequence[float], str, str], ...] = (
        (axes[0, 0], "per_second", callers, "callers", "answers per second"),
        (axes[0, 1], "p99_ms", callers, "callers", "latency, 99th percentile (ms)"),
        (axes[1, 0], "p50_ms", rates, "arrivals per second", "latency, median (ms)"),
        (axes[1, 1], "p99_ms", rates, "arrivals per second", "latency, 99th percentile (ms)"),
    )
    for panel, figure_name, loads, across, up in panels:
        for name, found in record["figures"]["runs"].items():
            colour, marker, width = LINES[name]
            middle = [medians(found["loads"][_load(load, across)])[figure_name] for load in loads]
            panel.plot(
                loads,
                [math.nan if value is None else value for value in middle],
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=width,
                label=found["title"] if panel is axes[0, 0] else None,
            )
        panel.set(xlabel=across, ylabel=up)
        if across == "callers":
            panel.set_xscale("log", base=2)
            panel.set_xticks(loads, [str(load) for load in loads])
        if figure_name != "per_second":
            panel.set_yscale("log")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(directory / f"{record['benchmark']}.svg", metadata={"Date": None})


def _load(load: float, across: str) -> str:
    return f"{load:g} callers" if across == "callers" else f"{load:g} per second"


def _section(record: Record, pictures: Path) -> Iterable[str]:
    settings, figures, machine = record["settings"], record["figures"], record["machine"]
    how = ["the others with the stock export"] if settings["stock"] else []
    if settings["synthetic"]:
        how.append(f"no engine, a run taking {settings['synthetic']} (ms, us per token)")
    if len(figures["runs"]) + len(figures["could_not_run"]) < len(PEERS):
        how.append("some servers")
    yield f"### {'; '.join([SHAPES[settings['shape']], *how])}\n"
    yield (
        f"{record['date'][:10]}, commit {record['commit']}"
        f"{' with changes' if record['uncommitted_changes'] else ''}, on {machine['cpu']}; "
        f"{settings['engine_threads']} engine threads; "
        f"servers on {_cores(settings['server_cores'])}, load on {_cores(settings['load_cores'])}; "
        f"turns of each server: {settings['repeats']}, each load for {settings['seconds']:g} s.\n"
    )
    yield f"![Throughput and latency]({pictures.as_posix()}/{record['benchmark']}.svg)\n"
    runs = figures["runs"]
    yield from _table(
        "Closed loop: answers per second; median / 99th percentile in ms",
        [_load(callers, "callers") for callers in settings["callers"]],
        runs,
        _speed,
    )
    yield from _table(
        "Open loop: median / 99th percentile in ms; share answered",
        [_load(rate, "arrivals") for rate in settings["rates"]],
        runs,
        _lateness,
    )
    yield from _table(
        "Cores kept busy by the server / by the load generator",
        [_load(callers, "callers") for callers in settings["callers"]],
        runs,
        lambda found: f"{found['server_cores']:.2f} / {found['load_cores']:.2f}",
    )
    for name, reason in figures["could_not_run"].items():
        yield f"{name} could not run:\n\n```text\n{reason}\n```\n"


def _cores(cores: Sequence[int] | None) -> str:
    return f"CPU {', '.join(map(str, cores))}" if cores else "any"


def _table(title: str, loads: Sequence[str], runs: Mapping[str, Any], cell: Any) -> Iterable[str]:
    yield f"{title}:\n"
    yield f"| server | {' | '.join(loads)} |"
    yield "|---|" + "---:|" * len(loads)
    for found in runs.values():
        cells = [cell(medians(found["loads"][load])) for load in loads]
        yield f"| {found['title']} | {' | '.join(cells)} |"
    yield ""


def _speed(found: Mapping[str, Any]) -> str:
    return f"{found['per_second']:.0f}; {milliseconds(found)}"


def _lateness(found: Mapping[str, Any]) -> str:
    return f"{milliseconds(found)}; {found['answered'] / found['calls']:.0%}"


if __name__ == "__main__":
    sys.exit(main())

"""What the demo shows: tables, and answers as they come."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Group
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from bestroute.manifest import Manifest
from bestroute.v1 import routing_pb2 as pb
from examples.demonstration.questions import Question
from examples.demonstration.upstreams import APIS, STANDIN, STANDIN_LLM


def one_line(text: str, length: int, *, tail: bool = False) -> Text:
    """The beginning of a text (or its end), on one line."""
    line = " ".join(text.split())
    if len(line) > length:
        line = f"…{line[1 - length :]}" if tail else f"{line[: length - 1]}…"
    return Text(line, no_wrap=True, overflow="ellipsis")


def usd(amount: float) -> str:
    """An amount of money, in cents where it is small."""
    return f"${amount:.2f}" if amount >= 1 else f"{100 * amount:.3f} ¢"


def bar(fraction: float, width: int = 10) -> str:
    """A fraction as a bar."""
    full = round(width * min(max(fraction, 0.0), 1.0))
    return "█" * full + "░" * (width - full)


def percentile(values: Sequence[float], percent: int) -> float:
    """A percentile, between neighbours where it falls between them."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def title(number: int, text: str) -> Rule:
    """The heading of a part."""
    return Rule(Text(f" {number}  {text} ", style="bold"), style="cyan", align="left")


def introduction(prompts: int, generate: int, manifest: Manifest) -> Panel:
    """What is about to happen."""
    text = Text.from_markup(
        "bestroute reads a prompt and picks a cheaper [bold]arm[/] (an LLM x how many answers to "
        "draw) where its best answer is predicted to be good enough beside the [bold]reference[/] "
        f"LLM's, here {manifest.reference_model}. This demo\n"
    )
    parts = Table.grid(padding=(0, 2))
    for number, words in enumerate(
        (
            "starts the real server with a trained bundle, and an LLM for it to ask",
            f"[bold]Route[/]: decides about {prompts} prompts; no LLM is asked",
            f"[bold]Generate[/]: answers {generate}; draws the samples, scores each as it ends, "
            "keeps the best",
            "measures Route, with one caller and with many at once",
        ),
        start=1,
    ):
        parts.add_row(f"[cyan]{number}", words)
    return Panel(
        Group(text, parts), title="[bold]bestroute demo", border_style="cyan", padding=(1, 2)
    )


def who_answers(who: Mapping[str, str]) -> Text:
    """In one line, which providers are used."""
    real = [name for name in dict.fromkeys(who.values()) if name != STANDIN]
    note = Text()
    if real:
        keys = ", ".join(APIS[name].key for name in real)
        note.append(f"{keys} found: {', '.join(real)} answers, at your expense. ", "bold")
    if STANDIN in who.values():
        note.append(f"Stand-in: {STANDIN_LLM}, a tiny LLM on this machine, answers ", "bold yellow")
        note.append(
            "in place of the other models" if real else "in place of every model of the pool"
        )
        note.append(
            ".\nIts answers are as weak as its size; money is counted at the prices of the "
        )
        note.append("models it stands in for.")
    return note


def pool_table(manifest: Manifest, who: Mapping[str, str]) -> Table:
    """The LLMs that there are to choose from."""
    table = Table(box=ROUNDED, title=f"the pool of bundle {manifest.name} {manifest.version}")
    table.add_column("LLM", no_wrap=True)
    for name in ("$ / M in", "$ / M out", "samples"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("answered by", no_wrap=True)
    for model in sorted(manifest.models, key=lambda model: model.output_usd_per_mtok):
        samples = [str(arm.samples) for arm in manifest.arms if arm.model == model.name]
        reference = model.name == manifest.reference_model
        table.add_row(
            f"{model.name} (reference)" if reference else model.name,
            f"{model.input_usd_per_mtok:.2f}",
            f"{model.output_usd_per_mtok:.2f}",
            "1" if reference else ", ".join(samples),
            who[model.name],
            style="bold" if reference else None,
        )
    return table


def arm_text(arm: pb.Arm) -> str:
    """An arm, as `model x n`."""
    return f"{arm.model} x {arm.samples}"


def predicted(decision: pb.RouteResponse) -> str:
    """What was predicted of the arm chosen, by what it was chosen for."""
    if decision.HasField("quality_per_usd"):
        return f"{decision.arm.expected_gain:+.3f}"
    return f"{decision.arm.match_probability:.2f}"


def criterion(decision: pb.RouteResponse) -> str:
    """The threshold or the rate that decided."""
    if decision.HasField("quality_per_usd"):
        return f"$1 = {decision.quality_per_usd:.3g}"
    return f"p ≥ {decision.match_threshold:.2f}"


def explanation(decision: pb.RouteResponse) -> str:
    """How arms are chosen, in one line and with markup."""
    reference = decision.reference.model
    if decision.HasField("quality_per_usd"):
        return (
            f"the arm whose [bold]gain[/] (predicted quality less that of {reference}) and saving "
            f"are worth most, where $1 is worth {decision.quality_per_usd:.3g} of quality and a "
            "right answer 1; if none is worth more than 0, the reference."
        )
    return (
        f"the cheapest arm with [bold]{criterion(decision)}[/], else the reference; [bold]p[/] is "
        f"the predicted probability that the arm's best answer is as good as {reference}'s."
    )


def measurement(
    pool: pb.ListArmsResponse, decision: pb.RouteResponse
) -> pb.Point | pb.TradeOff | None:
    """What the threshold or the rate of a decision was measured to give, if it was measured."""
    if decision.HasField("quality_per_usd"):
        trades = {each.quality_per_usd: each for each in pool.trade_offs}
        return trades.get(decision.quality_per_usd)
    points = {each.match_threshold: each for each in pool.calibration}
    return points.get(decision.match_threshold)


def saving(decision: pb.RouteResponse) -> float:
    """What a decision is estimated to save, as a fraction of the reference's cost."""
    return 1 - decision.arm.estimated_cost_usd / decision.reference.estimated_cost_usd


def total_saving(decisions: Sequence[pb.RouteResponse]) -> float:
    """What decisions are estimated to save together."""
    paid = sum(decision.arm.estimated_cost_usd for decision in decisions)
    return 1 - paid / sum(decision.reference.estimated_cost_usd for decision in decisions)


def routes_table(
    asked: Sequence[Question], decisions: Sequence[pb.RouteResponse], width: int
) -> Table:
    """One row per prompt; on a screen of less than 100 columns without what can be spared."""
    wide = width >= 100
    paid = sum(decision.arm.estimated_cost_usd for decision in decisions)
    reference = sum(decision.reference.estimated_cost_usd for decision in decisions)
    table = Table(box=ROUNDED, show_footer=True, expand=True)
    table.add_column("task and prompt", no_wrap=True, ratio=1, footer="all together")
    table.add_column("arm chosen", no_wrap=True)
    trading = decisions[0].HasField("quality_per_usd")
    table.add_column("gain" if trading else "p", justify="right", no_wrap=True)
    table.add_column("est. cost", justify="right", no_wrap=True, footer=usd(paid))
    if wide:
        table.add_column("reference", justify="right", no_wrap=True, footer=usd(reference))
    table.add_column(
        "saved", justify="right", no_wrap=True, footer=f"{total_saving(decisions):.0%}"
    )
    for question, decision in zip(asked, decisions, strict=True):
        is_reference = decision.arm.model == decision.reference.model
        row: list[Text | str] = [
            Text.assemble((question.task, "cyan"), "  ", one_line(question.text, 60)),
            "the reference" if is_reference else arm_text(decision.arm),
            "" if is_reference else predicted(decision),
            usd(decision.arm.estimated_cost_usd),
        ]
        if wide:
            row.append(usd(decision.reference.estimated_cost_usd))
        row.append(f"{f'{bar(saving(decision), 6)} ' if wide else ''}{saving(decision):4.0%}")
        table.add_row(*row, style="dim" if is_reference else "green")
    return table


def targets_table(
    pool: pb.ListArmsResponse, runs: Mapping[str, Sequence[pb.RouteResponse]]
) -> Table:
    """The same prompts under different targets, beside what was measured of what they stand for."""
    table = Table(box=SIMPLE_HEAD, title="the same prompts, other targets", title_justify="left")
    table.add_column("target of the request")
    for name in ("decided\nby", "to the\nreference", "to cheaper\narms", "of these\nn > 1"):
        table.add_column(name, justify="right")
    for name in ("saved here,\nestimated", "measured:\nsaved", "quality\ndrop"):
        table.add_column(name, justify="right")
    for words, decisions in runs.items():
        point = measurement(pool, decisions[0])
        cheaper = [d.arm for d in decisions if d.arm.model != d.reference.model]
        table.add_row(
            words,
            criterion(decisions[0]),
            str(len(decisions) - len(cheaper)),
            str(len(cheaper)),
            str(sum(arm.samples > 1 for arm in cheaper)),
            f"{total_saving(decisions):.0%}",
            f"{point.cost_saving:.0%}" if point else "",
            f"{point.quality_drop:.1%}" if point else "",
        )
    return table


@dataclass(frozen=True)
class Call:
    """One Route: seconds seen by the client, seconds in the server, inputs in its batch."""

    client: float
    server: float
    batch: int


def timings_table(runs: Mapping[str, Sequence[Call]], seconds: Mapping[str, float]) -> Table:
    """Latency and throughput of Route."""
    table = Table(box=ROUNDED)
    table.add_column("Route", no_wrap=True)
    for name in ("calls", "per second", "client p50", "p99", "server p50", "p99", "in a batch"):
        table.add_column(name, justify="right", no_wrap=True)
    for words, calls in runs.items():
        client = [1000 * call.client for call in calls]
        inside = [1000 * call.server for call in calls]
        table.add_row(
            words,
            str(len(calls)),
            f"{len(calls) / seconds[words]:.0f}",
            *(f"{percentile(series, p):.1f} ms" for series in (client, inside) for p in (50, 99)),
            f"{statistics.fmean(call.batch for call in calls):.1f}",
        )
    return table


def batches_table(callers: int, calls: Sequence[Call]) -> Table:
    """How often each batch size was seen."""
    sizes = Counter(call.batch for call in calls)
    table = Table(
        box=SIMPLE_HEAD, title=f"batch sizes seen with {callers} callers", title_justify="left"
    )
    table.add_column("inputs in the batch", justify="right")
    table.add_column("calls", justify="right")
    table.add_column("")
    for size, count in sorted(sizes.items()):
        table.add_row(str(size), str(count), Text(bar(count / max(sizes.values()), 40)))
    return table


def ending(failures: int) -> Panel:
    """What one can do next."""
    lines = Text()
    if failures:
        lines.append(f"{failures} of the answers failed; see above.\n", "red")
    lines.append("Everything that was started has been stopped. Next:\n\n")
    for command, words in (
        ("make serve", "the same server, to stay"),
        ('.venv-demo/bin/bestroute route "What is 2 + 2?"', "ask it"),
        (".venv-demo/bin/bestroute bundle show", "what its bundle knows"),
        ("OPENROUTER_API_KEY=... make demo", "real models instead of the stand-in"),
        ("examples/client.py, examples/bestroute.toml", "to start from"),
    ):
        lines.append(f"  {command:<50}", "bold").append(f"{words}\n")
    lines.rstrip()
    return Panel(lines, border_style="cyan", padding=(1, 2))

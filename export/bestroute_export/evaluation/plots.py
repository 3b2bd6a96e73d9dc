"""The figures of one experiment as pictures (SVG), told apart without colour too.

Colours are those of Okabe and Ito (2008), which most colour-blind readers can tell apart.
"""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bestroute_export.calibrate import Bin
from bestroute_export.evaluation.figures import Calibration, Results
from bestroute_export.evaluation.policies import (
    AT_MEAN_LENGTHS,
    BASELINE,
    HULL,
    NEIGHBOURS,
    SERVED,
    THRESHOLD,
)

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
LINES: dict[str, tuple[str, str, Any, float]] = {
    SERVED: ("bestroute (predicted lengths)", BLUE, "-", 2.2),
    AT_MEAN_LENGTHS: ("bestroute (mean lengths)", SKY, "--", 1.5),
    THRESHOLD: ("threshold on bestroute's match probability", GREEN, "-.", 1.5),
    BASELINE: ("TF-IDF, logistic regression", RED, (0, (5, 1, 1, 1)), 1.5),
    NEIGHBOURS: ("32 nearest MiniLM embeddings", ORANGE, ":", 1.8),
    HULL: ("static arms, mixed at random", PURPLE, (0, (1, 1)), 1.5),
}
HIGHEST = 0.12
"""Quality drop up to which curves are shown; beyond, nobody would run a policy."""
LOWEST = -0.06
FEWEST = 30
"""Predictions in a bin of the reliability diagram; the mean of fewer says little."""
STYLE: Any = {
    # The same figures give the same bytes.
    "svg.hashsalt": "bestroute",
    # Letters stay letters: a quarter of the size.
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def draw(results: Results, folder: Path) -> None:
    """Write NAME-curve.svg, NAME-shares.svg and NAME-reliability.svg."""
    with rc_context(STYLE):
        for kind, figure in (
            ("curve", _curves(results)),
            ("shares", _shares(results)),
            ("reliability", _reliability(results)),
        ):
            figure.savefig(folder / f"{results.name}-{kind}.svg", metadata={"Date": None})


def _curves(results: Results) -> Figure:
    figure = Figure(figsize=(7.2, 4.9), layout="constrained")
    axes = figure.add_subplot()
    for name, (label, colour, style, width) in LINES.items():
        policy = results.policy(name)
        if policy is None:
            continue
        reached = policy.real_lengths.drops.items()
        points = [(saved / 100, drop) for saved, drop in reached if drop is not None]
        x, drops = [saved for saved, _ in points], [drop for _, drop in points]
        axes.plot(
            x,
            [drop.value for drop in drops],
            color=colour,
            linestyle=style,
            linewidth=width,
            label=label,
        )
        if name in (SERVED, BASELINE):
            low, high = [drop.low for drop in drops], [drop.high for drop in drops]
            axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    shown = [arm for arm in results.static if arm.drop <= HIGHEST and arm.saving >= 0]
    if shown:
        axes.plot(
            [arm.saving for arm in shown],
            [arm.drop for arm in shown],
            "x",
            color=BLACK,
            label="one arm for every prompt",
        )
    axes.plot(0, 0, "o", color=BLACK, clip_on=False, label="always the reference", zorder=5)
    axes.axhline(results.drop, color=BLACK, linewidth=0.8, linestyle=(0, (2, 4)))
    axes.annotate(
        f"{results.drop:.0%} drop", (0.995, results.drop), ha="right", va="bottom", fontsize=8
    )
    axes.set(
        xlim=(0, 1),
        ylim=(LOWEST, HIGHEST),
        xlabel="cost saved, at the lengths of the sampled answers (%)",
        ylabel="quality drop (%); below 0: better than the reference",
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _shares(results: Results) -> Figure:
    shares = {name: share for name, share in results.shares.items() if share >= 0.001}
    figure = Figure(figsize=(7.2, 0.8 + 0.28 * len(shares)), layout="constrained")
    axes = figure.add_subplot()
    colours = [BLACK if name == results.experiment.reference else BLUE for name in shares]
    bars = axes.barh(list(shares), list(shares.values()), color=colours, height=0.7)
    axes.bar_label(bars, [f"{share:.1%}" for share in shares.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, max(shares.values()) * 1.15), xlabel="prompts (%)")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    axes.grid(visible=False, axis="y")
    return figure


def _reliability(results: Results) -> Figure:
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _diagram(left, results.match, "match probability", (0, 1))
    bins = _filled(results.gains)
    ends = [end for each in bins for end in (each.probability, each.label)]
    _diagram(right, results.gains, "gain in quality", (min(ends) - 0.05, max(ends) + 0.05))
    return figure


def _filled(calibration: Calibration) -> list[Bin]:
    most = max(each.count for each in calibration.bins)
    return [each for each in calibration.bins if each.count >= min(FEWEST, most)]


def _diagram(axes: Axes, calibration: Calibration, what: str, limits: tuple[float, float]) -> None:
    """Predicted against observed means; areas of the dots are numbers of predictions."""
    bins = _filled(calibration)
    most = max(each.count for each in bins)
    x, y = [each.probability for each in bins], [each.label for each in bins]
    axes.plot(limits, limits, color=BLACK, linewidth=0.8, linestyle=(0, (2, 4)))
    axes.plot(x, y, color=BLUE, linewidth=1)
    axes.scatter(x, y, s=[8 + 90 * each.count / most for each in bins], color=BLUE)
    axes.set(
        xlim=limits,
        ylim=limits,
        aspect="equal",
        xlabel=f"predicted {what}",
        ylabel=f"mean observed {what}",
        title=f"calibration error {calibration.error:.3f}",
    )

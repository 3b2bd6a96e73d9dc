"""`bestroute bundle`: look at a bundle on disk."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bestroute.cli import activate
from bestroute.cli.arguments import add_json, described
from bestroute.cli.terminal import complain, console, count, facts, percent, table
from bestroute.errors import BundleInvalid

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType
    from rich.table import Table

    from bestroute.cli.arguments import Commands
    from bestroute.manifest import Manifest
    from bestroute.promise import Point

_CURVE_ROWS = 12
_BAR = 30
"""Characters that stand for a saving of 100 %."""


def add(commands: "Commands") -> None:
    """Declare the command and its own subcommands."""
    parser = commands.add_parser(
        "bundle",
        help="show, verify or activate a bundle",
        **described(
            "Look at a bundle: the directory that `bestroute-export` makes and the service loads.",
            "bestroute bundle show",
            "bestroute bundle verify ./my-bundle",
        ),
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = verbs.add_parser(
        "show",
        help="print what it holds",
        **described(
            "Print a bundle's digest, which bundle_sha256 pins, its models and prices, its arms, "
            "what its targets were measured to give (by exchange rate or by match threshold), its "
            "gates, and where it came from.",
            "bestroute bundle show",
            "bestroute bundle show ./my-bundle --json | jq .arms",
        ),
    )
    _add_path(show)
    add_json(show)
    show.set_defaults(run=_show)
    verify = verbs.add_parser(
        "verify",
        help="check its files and its answers",
        **described(
            "Check a bundle's files against their digests, and that its networks answer on "
            "this machine as they did where it was made; prints the digest that bundle_sha256 "
            "pins. The engine is the configured one (see BESTROUTE_ENGINE__PROVIDER). Exit code 0 "
            "if it can be served, else 1.",
            "bestroute bundle verify",
            "BESTROUTE_ENGINE__PROVIDER=cuda bestroute bundle verify ./my-bundle",
        ),
    )
    _add_path(verify)
    verify.set_defaults(run=_verify)
    activate.add(verbs)


def _add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        type=Path,
        help="its directory (default: the embedded bundle)",
    )


def _show(args: argparse.Namespace) -> int:
    from bestroute.bundle import DEFAULT_BUNDLE, digest, read_manifest

    directory = args.path or DEFAULT_BUNDLE
    try:
        sha256 = digest(directory)
        manifest = read_manifest(directory, sha256)
    except BundleInvalid as error:
        return complain(str(error), code=1)
    if args.json:
        print(manifest.model_dump_json())
        return 0
    out = console(sys.stdout)
    out.print(f"{manifest.name} {manifest.version}", style="bold")
    out.print(f"bundle_sha256 = {sha256}", soft_wrap=True, highlight=False)
    for title, content in _sections(manifest).items():
        out.print(f"\n{title}", style="bold")
        out.print(content)
    return 0


def _verify(args: argparse.Namespace) -> int:
    import asyncio

    from bestroute.bundle import DEFAULT_BUNDLE, Bundle, digest
    from bestroute.config import ConfigInvalid, Settings
    from bestroute.networks import verify

    try:
        engine = Settings.load().engine
        directory = args.path or DEFAULT_BUNDLE
        sha256 = digest(directory)
        bundle = Bundle.load(directory, sha256)
        deviation = asyncio.run(verify(bundle, engine))
    except ConfigInvalid as error:
        return complain(str(error), code=2)
    except BundleInvalid as error:
        return complain(str(error), code=1)
    manifest = bundle.manifest
    print(
        f"{bundle.directory}: {manifest.name} {manifest.version} can be served; its answers on "
        f"{engine.provider} deviate by {deviation:.2g} at most ({manifest.golden.tolerance:g} "
        f"allowed); bundle_sha256 = {sha256}"
    )
    return 0


def _sections(manifest: "Manifest") -> "dict[str, RenderableType]":
    """The parts of a manifest under their titles; empty ones are left out."""
    sections: dict[str, RenderableType] = {
        "Models (USD per million tokens)": _models(manifest),
        "Arms": _arms(manifest),
        "Networks": _networks(manifest),
        "Calibration on validation data": _curve(manifest),
    }
    if manifest.gates:
        sections["Gates: that arm first, the reference where its answers don't convince"] = _gates(
            manifest
        )
    if manifest.metrics:
        rows = [(name, f"{value:.4g}") for name, value in manifest.metrics.items()]
        sections["Metrics"] = facts(*rows)
    if manifest.provenance:
        sections["Provenance"] = facts(*manifest.provenance.items())
    return sections


def _models(manifest: "Manifest") -> "Table":
    listed = table("model", "input", "output", "mean answer", "")
    for model in manifest.models:
        listed.add_row(
            model.name,
            f"{model.input_usd_per_mtok:g}",
            f"{model.output_usd_per_mtok:g}",
            f"{model.mean_output_tokens:.0f} tokens",
            "reference" if model.name == manifest.reference_model else "",
        )
    return listed


def _arms(manifest: "Manifest") -> "Table":
    """One line per model with its sample counts."""
    samples: dict[str, list[str]] = {}
    for arm in manifest.arms:
        samples.setdefault(arm.model, []).append(str(arm.samples))
    return facts(*((model, f"{', '.join(counts)} samples") for model, counts in samples.items()))


def _networks(manifest: "Manifest") -> "Table":
    networks = {"router": manifest.router, "reward": manifest.reward}
    return facts(
        *(
            (name, f"{', '.join(network.files)}; up to {network.max_tokens} tokens")
            for name, network in networks.items()
        )
    )


def _curve(manifest: "Manifest") -> "Table":
    """The calibration of the rule that answers where no match threshold is asked for."""
    trade_offs = manifest.trade_offs
    if trade_offs is None:
        threshold = manifest.default_match_threshold
        return _drawn("threshold", ".3f", manifest.curve, lambda p: p.match_threshold, threshold)
    rate = trade_offs.default_quality_per_usd
    return _drawn("quality per USD", ".4g", trade_offs.curve, lambda p: p.quality_per_usd, rate)


def _gates(manifest: "Manifest") -> "Table":
    """Per gated arm the smallest drop that can be promised while anything is saved."""
    from bestroute.promise import least_promise

    listed = table("arm", "smallest drop promised (95 %)", "saving", "at quality per USD")
    for gate in manifest.gates:
        arm = f"{gate.arm.model}, {count(gate.arm.samples, 'sample')}"
        if least := least_promise(gate.trade_offs.curve):
            point = least.point
            saving, rate = percent(point.cost_saving), f"{point.quality_per_usd:.4g}"
            listed.add_row(arm, percent(least.quality_drop), saving, rate)
        else:
            listed.add_row(arm, "saves nothing", "", "")
    return listed


def _drawn(
    name: str,
    digits: str,
    curve: "list[Point]",
    setting: "Callable[[Point], float]",
    default: float,
) -> "Table":
    """A calibration table, thinned out to what can be read at a glance, savings as bars."""
    from bestroute.promise import least_promise, promises

    promised = {setting(promise.point): promise.quality_drop for promise in promises(curve)}
    drawn = table(name, "saving", "quality drop", "promised (95 %)")
    drawn.add_column()
    for point in _thinned(curve, setting, default):
        is_default = setting(point) == default
        drawn.add_row(
            f"{setting(point):{digits}}{' *' if is_default else ''}",
            percent(point.cost_saving),
            percent(point.quality_drop),
            percent(promised[setting(point)]),
            "█" * round(_BAR * min(max(point.cost_saving, 0.0), 1.0)),
            style="bold" if is_default else None,
        )
    drawn.caption = f"* default {name}: {default:g}"
    if least := least_promise(curve):
        drawn.caption += (
            f"\nsmallest drop promised: {percent(least.quality_drop)}, "
            f"saving {percent(least.point.cost_saving)} at {setting(least.point):{digits}}"
        )
    return drawn


def _thinned(
    curve: "list[Point]", setting: "Callable[[Point], float]", default: float
) -> "list[Point]":
    """Points spread evenly over the curve, with its ends and the one at the default."""
    last = len(curve) - 1
    kept = {round(i * last / (_CURVE_ROWS - 1)) for i in range(_CURVE_ROWS)}
    return [
        point for index, point in enumerate(curve) if index in kept or setting(point) == default
    ]

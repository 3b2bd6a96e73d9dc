"""What a file of prompts can and can't train."""

from collections.abc import Sequence
from dataclasses import dataclass

from bestroute_export.validate.tally import DROP, Model, Resolution

FEW_PAIRS = 1000
"""With fewer pairs a reward model is expected to choose hardly better than chance."""


@dataclass(frozen=True)
class Verdict:
    """Whether the data can serve a purpose, and why."""

    purpose: str
    possible: bool
    reason: str


def verdicts(
    models: Sequence[Model],
    reference: Model,
    resolution: Resolution | None,
    rows: int,
    priced: bool,
) -> tuple[Verdict, ...]:
    """Say what a file can serve for.

    Args:
        models: all LLMs of the file.
        reference: the one to match.
        resolution: of the reference's mean quality.
        rows: sound rows of the file.
        priced: whether an LLM without a price is left out.
    """
    arms = [
        model
        for model in models
        if model != reference and model.most and model.graded == model.answers
        if model.price is not None or not priced
    ]
    graded = reference.prompts == rows and reference.graded == reference.answers
    return (
        _router(arms, reference, graded),
        _best_of_n(arms),
        _reward(models),
        _quality(reference, resolution, rows),
    )


def _router(arms: Sequence[Model], reference: Model, graded: bool) -> Verdict:
    if not graded:
        reason = f"{reference.name} has no graded answer to some prompts"
    elif not arms:
        reason = f"no LLM beside {reference.name} has graded answers to every prompt, and a price"
    else:
        names = ", ".join(model.name for model in arms)
        reason = f"reference {reference.name}; LLMs to choose from: {names}"
    return Verdict("a router", graded and bool(arms), reason)


def _best_of_n(arms: Sequence[Model]) -> Verdict:
    by_most: dict[int, list[str]] = {}
    for model in sorted(arms, key=lambda model: -model.most):
        by_most.setdefault(model.most, []).append(model.name)
    reason = "; ".join(f"n up to {most}: {', '.join(names)}" for most, names in by_most.items())
    return Verdict("best of n", max(by_most, default=1) > 1, reason or "no LLM to draw from")


def _reward(models: Sequence[Model]) -> Verdict:
    pairs = sum(model.pairs for model in models)
    reason = f"{pairs:,} pairs of one LLM's answers to one prompt differ in score"
    if pairs < FEW_PAIRS:
        reason += f"; {FEW_PAIRS:,} are the least to hope for more than chance"
    return Verdict("a reward model", pairs >= FEW_PAIRS, reason)


def _quality(reference: Model, resolution: Resolution | None, rows: int) -> Verdict:
    purpose = f"telling a quality drop of {DROP:.0%}"
    if resolution is None or resolution.needed is None:
        return Verdict(purpose, False, f"{reference.name} has too few scores, or only 0")
    reason = (
        f"mean quality of {reference.name} {resolution.mean:.3f}, standard error "
        f"{resolution.error:.4f} ({resolution.error / resolution.mean:.1%} of it); "
        f"about {resolution.needed:,} prompts needed, {rows:,} there"
    )
    return Verdict(purpose, resolution.fine, reason)

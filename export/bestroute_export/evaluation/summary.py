"""All figures of one experiment.

A setting is picked twice: on the prompts that it is then measured on, as is usual and flatters, and
on the other folds.
"""

import numpy as np

from bestroute.policy import REFERENCE
from bestroute.promise import least_promise, rate_for
from bestroute_export import thresholds
from bestroute_export.calibrate import Bin, reliability
from bestroute_export.evaluate import Choice, calibration_error
from bestroute_export.evaluation.experiment import SELECTORS, Selector
from bestroute_export.evaluation.figures import (
    Account,
    Calibration,
    Fixed,
    Held,
    Point,
    PolicyFigures,
    Promised,
    Results,
    SelectorFigures,
    interval,
    interval_or_none,
)
from bestroute_export.evaluation.frontier import (
    Frontier,
    best_level,
    drop_at,
    improvement,
    saving_within,
    static,
)
from bestroute_export.evaluation.policies import Policy, compared
from bestroute_export.evaluation.rewordings import stability
from bestroute_export.evaluation.selectors import recovered
from bestroute_export.evaluation.study import Study
from bestroute_export.labels import Floats
from bestroute_export.outcomes import Outcomes, costs
from bestroute_export.pipeline import QUALITY_DROP
from bestroute_export.trades import by_rate, rates, trade_curve
from bestroute_export.values import Predictions

SAVINGS = range(0, 92, 2)
"""Per cent at which drops are read off."""
TARGETS = (0.01, 0.02, 0.05)
"""Quality drops of which it is measured how promises of them fare."""
DRAWS = 200


def summarize(study: Study) -> Results:
    """Run what is missing of an experiment, and measure everything."""
    of, pool = study.experiment, study.pool
    measured = study.measured(of.selector)
    at_mean = measured.at_estimated_costs()
    predictions = study.predictions(of.selector, measured)
    foreign = study.foreign(measured)

    study.say("policies")
    every = compared(
        measured,
        pool,
        predictions,
        foreign,
        study.prompts,
        of.agreement,
        study.folds,
        QUALITY_DROP,
    )
    policies, fixed = [], []
    for policy in every:
        policies.append(
            PolicyFigures(
                name=policy.name,
                mean_lengths=account(study, policy.mean_lengths, at_mean),
                real_lengths=account(study, policy.real_lengths, measured),
            )
        )
        if len(policy.real_lengths.quality) == 2:
            fixed.append(_fixed(policy))

    estimates = costs(pool, measured.input_tokens, predictions.tokens)
    usd = rates(estimates[1])
    choices = by_rate(predictions.gains, *estimates)
    level = _best(choices, measured)
    points = trade_curve(predictions, measured, pool, of.seed)
    least = least_promise(points)
    # The curve lists some of the rates.
    run = [int(np.abs(usd - rate_for(points, target)).argmin()) for target in TARGETS]
    study.say("promises")
    promised = [
        _promised(study, target, choices, measured, at)
        for target, at in zip(TARGETS, run, strict=True)
    ]
    study.say("rewordings")
    return Results(
        name=study.name,
        experiment=of,
        drop=QUALITY_DROP,
        prompts=len(study.prompts),
        models=[model.name for model in pool.models if model.name != of.reference],
        policies=policies,
        fixed=fixed,
        static=_static(_names(study), at_mean, measured),
        shares={
            name: float((choices[level] == index).mean())
            for index, name in [(REFERENCE, of.reference), *enumerate(_names(study))]
        },
        match=Calibration(
            error=calibration_error(predictions.match, measured.labels),
            bins=reliability(predictions.match, measured.labels),
        ),
        gains=_of_gains(predictions.gains, measured.quality - measured.reference_quality[:, None]),
        lengths=_lengths(study, predictions, measured),
        promised=promised,
        least_promise=least and Point(saving=least.point.cost_saving, drop=least.quality_drop),
        selectors=[_selector(study, s) for s in SELECTORS] if of.max_samples > 1 else [],
        stable=stability(study, measured, float(usd[level])),
    )


def account(study: Study, frontier: Frontier, measured: Outcomes) -> Account:
    """Figures of a policy at the costs in `measured`."""
    weights = study.weights
    saved, lost = frontier.savings(weights), frontier.drops(weights)
    held = frontier.held_out(study.folds, QUALITY_DROP)
    arm = measured.costs.sum(0).argmin()
    cheapest = (
        1 - (weights @ measured.costs[:, arm]) / (weights @ measured.reference_costs),
        1 - (weights @ measured.quality[:, arm]) / (weights @ measured.reference_quality),
    )
    return Account(
        saving=interval(saving_within(saved, lost, QUALITY_DROP)),
        held_out_saving=interval(held.savings(weights)[:, 1]),
        held_out_drop=interval(held.drops(weights)[:, 1]),
        drops={s: interval_or_none(drop_at(saved, lost, s / 100)) for s in SAVINGS},
        improvement=interval(improvement(saved, lost, cheapest)),
    )


def _names(study: Study) -> list[str]:
    if study.experiment.max_samples == 1:
        return [arm.model for arm in study.pool.arms]
    return [f"{arm.model} x {arm.samples}" for arm in study.pool.arms]


def _best(choices: Choice, measured: Outcomes) -> int:
    """The setting that saves most within the drop, at real lengths."""
    frontier, plain = Frontier.of(choices, measured), np.ones((1, len(measured.quality)))
    level = best_level(frontier.savings(plain)[0], frontier.drops(plain)[0], QUALITY_DROP)
    return max(level - 1, 0)  # A frontier has the reference in front.


def _fixed(policy: Policy) -> Fixed:
    """Of a policy whose frontier holds the reference and nothing else but it."""
    plain = np.ones((1, policy.real_lengths.quality.shape[1]))
    return Fixed(
        name=policy.name,
        mean_saving=float(policy.mean_lengths.savings(plain)[0, 1]),
        saving=float(policy.real_lengths.savings(plain)[0, 1]),
        drop=float(policy.real_lengths.drops(plain)[0, 1]),
    )


def _static(names: list[str], at_mean: Outcomes, measured: Outcomes) -> list[Fixed]:
    rows = zip(names, static(at_mean)[0], *static(measured), strict=True)
    return [
        Fixed(name=name, mean_saving=mean, saving=saving, drop=drop)
        for name, mean, saving, drop in rows
    ]


def _of_gains(predicted: Floats, real: Floats) -> Calibration:
    """As for probabilities, but gains lie in [-1, 1]."""
    p, y = (predicted + 1) / 2, (real + 1) / 2
    return Calibration(
        error=2 * calibration_error(p, y, bins=20),
        bins=[
            Bin(2 * each.probability - 1, 2 * each.label - 1, each.count)
            for each in reliability(p, y, bins=20)
        ],
    )


def _lengths(study: Study, predictions: Predictions, measured: Outcomes) -> dict[str, float]:
    real, said = np.log(measured.output_tokens + 1), np.log(predictions.tokens + 1)
    left = ((real - said) ** 2).mean(0) / np.maximum(real.var(0), 1e-12)
    names = [model.name for model in study.pool.models]
    return {name: float(1 - share) for name, share in zip(names, left, strict=True)}


def _promised(
    study: Study, target: float, choices: Choice, measured: Outcomes, level: int
) -> Promised:
    """How promises of one target fare; `level` is what runs for it."""
    prompts, seed = len(study.prompts), study.experiment.seed
    resampled, halved = (
        thresholds.coverage(choices, measured, target, draw(prompts, DRAWS, seed), seed)
        for draw in (thresholds.resampled, thresholds.halved)
    )
    frontier, plain = Frontier.of(choices[[level]], measured), np.ones((1, prompts))
    return Promised(
        target=target,
        saving=float(frontier.savings(plain)[0, 1]),
        drop=float(frontier.drops(plain)[0, 1]),
        resampled=Held(**resampled._asdict()),
        halved=Held(**halved._asdict()),
    )


def _selector(study: Study, selector: Selector) -> SelectorFigures:
    """Our trade-off and the baseline's threshold, trained and measured with one selector."""
    measured = study.measured(selector)
    predictions = study.predictions(selector, measured)
    estimates = costs(study.pool, measured.input_tokens, predictions.tokens)
    by_mean = by_rate(predictions.gains, measured.estimates, measured.reference_estimates)
    by_length = by_rate(predictions.gains, *estimates)
    theirs = thresholds.by_threshold(study.baseline_match(selector, measured), measured)
    at_mean = measured.at_estimated_costs()
    shares = recovered(
        study.rewards(selector),
        study.prompts,
        [model.name for model in study.pool.models if model.name != study.experiment.reference],
        study.experiment.max_samples,
        study.weights,
    )
    return SelectorFigures(
        name=selector,
        recovered={name: interval(values) for name, values in shares.items()},
        saving=interval(_saving(study, by_mean, at_mean)),
        real_saving=interval(_saving(study, by_length, measured)),
        baseline_saving=interval(_saving(study, theirs, at_mean)),
    )


def _saving(study: Study, choices: Choice, measured: Outcomes) -> Floats:
    frontier = Frontier.of(choices, measured)
    saved, lost = frontier.savings(study.weights), frontier.drops(study.weights)
    return saving_within(saved, lost, QUALITY_DROP)

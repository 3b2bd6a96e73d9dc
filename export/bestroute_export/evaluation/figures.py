"""The figures of one experiment, as they are stored; savings and drops are fractions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter

from bestroute_export.calibrate import Bin
from bestroute_export.evaluate import Interval
from bestroute_export.evaluation.experiment import Experiment, LossExperiment
from bestroute_export.labels import Floats


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Point(_Figures):
    """A place in the plane of cost saving and quality drop."""

    saving: float
    drop: float


class Account(_Figures):
    """A policy under one way to count costs.

    Attributes:
        saving: largest within the drop, the setting picked on the prompts that it is measured on.
        held_out_saving: with the setting of each fold picked on the others.
        held_out_drop: what that drops.
        drops: smallest drop by the saving in per cent; None where nothing saves so much.
        improvement: mean relative quality over all budgets, see `frontier.improvement`.
    """

    saving: Interval
    held_out_saving: Interval
    held_out_drop: Interval
    drops: dict[int, Interval | None]
    improvement: Interval


class PolicyFigures(_Figures):
    """A policy under both ways to count costs."""

    name: str
    mean_lengths: Account
    real_lengths: Account


class Fixed(_Figures):
    """A policy without a setting: its saving at mean and at real lengths, and its drop."""

    name: str
    mean_saving: float
    saving: float
    drop: float


class Calibration(_Figures):
    """Expected calibration error out of fold, and the points of the reliability diagram."""

    error: float
    bins: list[Bin]


class Held(_Figures):
    """How a promise fared, see `bestroute_export.thresholds.Coverage`."""

    held: float
    promised: float
    saving: float
    drop: float


class Promised(_Figures):
    """What can be promised for a target, at 95 % confidence and real lengths.

    Attributes:
        target: quality drop asked for.
        saving: measured at the point that the promise runs.
        drop: measured there.
        resampled: the promise in bootstrap resamples, measured on all prompts.
        halved: the promise from random halves, measured on the other half.
    """

    target: float
    saving: float
    drop: float
    resampled: Held
    halved: Held


class SelectorFigures(_Figures):
    """Best-of-n with one selector.

    Attributes:
        recovered: share of the gap between random and perfect, by LLM, and their "mean".
        saving: of the trade-off by mean lengths, within the drop, costs counted at those.
        real_saving: of the trade-off by predicted lengths, costs counted at real ones.
        baseline_saving: of TF-IDF with logistic regression and a threshold, at mean lengths.
    """

    name: str
    recovered: dict[str, Interval]
    saving: Interval
    real_saving: Interval
    baseline_saving: Interval


class Results(_Figures):
    """Everything that one experiment gave.

    Attributes:
        name: of the experiment's file.
        models: LLMs to choose from.
        fixed: those of the policies that have no setting.
        static: each arm given to every prompt.
        shares: prompts by what the served policy gives them, at the setting that saves most
            within the drop at real lengths.
        gains: predicted against real gains; a gain is a difference of qualities.
        lengths: share of the variance of log lengths that is predicted, by LLM.
        least_promise: the smallest drop that can be promised while anything is saved.
        stable: share of unchanged decisions by rewording.
    """

    name: str
    experiment: Experiment
    drop: float
    prompts: int
    models: list[str]
    policies: list[PolicyFigures]
    fixed: list[Fixed]
    static: list[Fixed]
    shares: dict[str, float]
    match: Calibration
    gains: Calibration
    lengths: dict[str, float]
    promised: list[Promised]
    least_promise: Point | None
    selectors: list[SelectorFigures]
    stable: dict[str, float]

    def policy(self, name: str) -> PolicyFigures | None:
        """The policy of that name, if it took part."""
        return next((policy for policy in self.policies if policy.name == name), None)


class LossAccount(_Figures):
    """A policy on one fold under one way to count costs; as in `Account`."""

    saving: Interval
    drops: dict[int, Interval | None]
    improvement: Interval


class LossPolicy(_Figures):
    """A policy on one fold under both ways to count costs.

    Attributes:
        seconds: wall time of fine-tuning; None of what isn't fine-tuned.
    """

    name: str
    mean_lengths: LossAccount
    real_lengths: LossAccount
    seconds: float | None


class LossResults(_Figures):
    """What the losses gave on one fold.

    Attributes:
        name: of the experiment's file.
        prompts: in the fold.
        trained: prompts in the other folds.
        models: LLMs to choose from.
        arm: the one that losses of two classes tell from the reference.
        fixed: those of the policies that have no setting.
    """

    name: str
    experiment: LossExperiment
    drop: float
    prompts: int
    trained: int
    models: list[str]
    arm: str
    policies: list[LossPolicy]
    fixed: list[Fixed]


def interval(values: Floats) -> Interval:
    """A figure and its 95 % interval, from float [1 + R]: as measured, then resampled."""
    return Interval.of(values[:1], values[1:])


def interval_or_none(values: Floats) -> Interval | None:
    """The same, of the resamples that have a figure; None where the prompts themselves don't."""
    if np.isnan(values[0]):
        return None
    resampled = values[1:]
    return Interval.of(values[:1], resampled[~np.isnan(resampled)])


def write_results(results: Results | LossResults, path: Path) -> None:
    """Store figures as JSON, to six digits after the point."""
    text = json.dumps(_rounded(results.model_dump(mode="json")), indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def read_results(path: Path) -> Results:
    """Read what `write_results` stored."""
    return Results.model_validate_json(path.read_text(encoding="utf-8"))


def read_folder(folder: Path) -> tuple[list[Results], list[LossResults]]:
    """Read all that `write_results` stored in a folder, by name."""
    either: TypeAdapter[Results | LossResults] = TypeAdapter(Results | LossResults)
    every = [either.validate_json(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
    return (
        [each for each in every if isinstance(each, Results)],
        [each for each in every if isinstance(each, LossResults)],
    )

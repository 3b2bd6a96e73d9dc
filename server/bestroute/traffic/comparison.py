"""What one bundle's training data lead to expect of traffic, and how far traffic is from it."""

import time
from bisect import bisect
from typing import NamedTuple

import numpy as np

from bestroute.manifest import Manifest, Training
from bestroute.option import Decision, Options
from bestroute.order import Routed
from bestroute.traffic.decision_id import NO_ARM, REFERENCE_ARM, bundle_tag
from bestroute.traffic.drift import (
    Calibration,
    CalibrationWindow,
    Floats,
    Window,
    counts_in,
    stability_index,
)

PROMPTS_WINDOW = 3600.0
"""Seconds of traffic by which the drift of prompts is measured."""
OUTCOMES_WINDOW = 86400.0
"""Seconds by which calibration is measured: outcomes are fewer than decisions."""

_AT_ONCE = 256
"""Decisions that are counted together, in about 0.15 ms; one by one that takes 4 ms."""


class PromptDrift(NamedTuple):
    """How far prompts are from the training data.

    Attributes:
        decisions: how many prompts there were.
        stability_index: by input; see `drift.stability_index`.
    """

    decisions: int
    stability_index: dict[str, float]


class CalibrationDrift(NamedTuple):
    """How far the quality of answers is from what was expected of them.

    Attributes:
        error: expected calibration error.
        overall: of all answers.
        by_arm: of each arm and the reference, by model and samples.
    """

    error: float
    overall: Calibration
    by_arm: dict[tuple[str, int], Calibration]


class Comparison:
    """Compares traffic with one bundle's training data.

    Args:
        manifest: the bundle's; without `training` nothing is compared.

    Attributes:
        bundle: what its decisions' ids have for it.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest  # kept, so that no other gets its identity
        self.bundle = bundle_tag(manifest.name, manifest.version)
        self._training = manifest.training
        self._arms = {(arm.model, arm.samples): i for i, arm in enumerate(manifest.arms)}
        self._arms = {arm: index for arm, index in self._arms.items() if index < NO_ARM}
        self._reference = (manifest.reference_model, 1)
        self._uncounted: list[tuple[int, Floats]] = []
        bins = len(self._training.prompt_tokens.shares) if self._training else 0
        more = len(self._training.match_probability.shares) if self._training else 0
        self._token_bins, self._prompts = bins, Window(PROMPTS_WINDOW, bins + more)
        self._outcomes = CalibrationWindow(OUTCOMES_WINDOW, len(self._arms) + 1)

    def note(self, routed: Routed) -> None:
        """Take in the prompt of a decision."""
        options = routed.decision.options
        if self._training is None or not isinstance(options, Options):
            return
        if (probabilities := options.match_probability) is not None:
            self._uncounted.append((routed.prompt_tokens, probabilities))
            if len(self._uncounted) >= _AT_ONCE:
                self._count(self._training)

    def _count(self, training: Training) -> None:
        tokens, probabilities = zip(*self._uncounted, strict=True)
        self._uncounted.clear()
        bucket = self._prompts.now(time.monotonic())
        match = np.stack(probabilities).mean(axis=1)
        bucket[: self._token_bins] += counts_in(tokens, training.prompt_tokens.edges)
        bucket[self._token_bins :] += counts_in(match, training.match_probability.edges)

    def arm(self, decision: Decision) -> int:
        """The code of what was chosen, as ids have it."""
        chosen = decision.arm.model, decision.arm.samples
        if chosen == self._reference:
            return REFERENCE_ARM
        return self._arms.get(chosen, NO_ARM)

    def expected_quality(self, decision: Decision) -> float | None:
        """The mean quality to expect of the answer, in [0, 1]; None where the router did not run.

        That of the reference on prompts that are matched as well, plus the gain of the chosen arm.
        """
        training, options = self._training, decision.options
        if training is None or not isinstance(options, Options):
            return None
        if (probabilities := options.match_probability) is None:
            return None
        by_mean, arm = training.reference_quality, decision.arm
        match = float(np.add.reduce(probabilities)) / len(probabilities)
        quality = by_mean.means[bisect(by_mean.edges, match)]
        if arm is not decision.reference:
            gain = arm.expected_gain
            if gain is None:
                by_match = training.arm_gain
                gain = by_match.means[bisect(by_match.edges, arm.match_probability)]
            quality += gain
        return min(1.0, max(0.0, quality))

    def outcome(self, arm: int, expected: float, observed: float) -> None:
        """Take in how good an answer was; the arm as ids have it."""
        last = len(self._arms)
        index = last if arm == REFERENCE_ARM else arm
        if index <= last:
            self._outcomes.add(time.monotonic(), index, expected, observed)

    def prompt_drift(self) -> PromptDrift | None:
        """Of the last `PROMPTS_WINDOW` seconds; None where the bundle doesn't tell of its data."""
        if (training := self._training) is None:
            return None
        if self._uncounted:
            self._count(training)
        counts = self._prompts.sum(time.monotonic())
        tokens, match = counts[: self._token_bins], counts[self._token_bins :]
        return PromptDrift(
            int(tokens.sum()),
            {
                "prompt_tokens": stability_index(tokens, training.prompt_tokens.shares),
                "match_probability": stability_index(match, training.match_probability.shares),
            },
        )

    def calibration_drift(self) -> CalibrationDrift | None:
        """Of the last `OUTCOMES_WINDOW` seconds; None where the bundle doesn't tell of its data."""
        if self._training is None:
            return None
        now = time.monotonic()
        arms = [*self._arms, self._reference]
        return CalibrationDrift(
            self._outcomes.error(now),
            self._outcomes.overall(now),
            dict(zip(arms, self._outcomes.by_arm(now), strict=True)),
        )

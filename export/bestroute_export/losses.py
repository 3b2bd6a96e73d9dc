"""What a router can be trained to predict: BEST-Route's loss, and those it is compared with.

A loss is a kind of target, how far outputs are from it, and how outputs become the numbers that the
decision rule compares with its threshold. All are trained, stopped and evaluated the same way, so
that a difference between two of them is the losses'. Shapes: Q prompts, B in a batch, A arms.

  prob_nlabels  per arm the probability that it matches; soft cross-entropy. BEST-Route, Eq. 4
  det_nlabels   per arm whether its expected score matches the reference's; N-label
  det_ncls      which arm is the cheapest that matches, or none; N-class
  prob_2cls     prob_nlabels for a single arm against the reference; Hybrid LLM, probabilistic
  det_2cls      det_nlabels for a single arm against the reference; Hybrid LLM, deterministic

BEST-Route is arXiv 2506.22716, Hybrid LLM arXiv 2404.14618.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bestroute.policy import choose
from bestroute_export.calibrate import sigmoid
from bestroute_export.labels import Floats, expected_match
from bestroute_export.outcomes import Outcomes


@dataclass(frozen=True)
class Loss:
    """A way to train a router.

    Attributes:
        targets: outcomes and a slack to what is to be predicted, float64 [Q, A] in [0, 1].
        value: logits and targets, float [B, A] each, to the mean loss, a scalar.
        probabilities: logits float64 [Q, A] to what the decision rule compares with its threshold.
        monotone: whether more samples of an LLM are to raise its logit.
    """

    targets: Callable[[Outcomes, float], Floats]
    value: Callable[[Tensor, Tensor], Tensor]
    probabilities: Callable[[Floats], Floats]
    monotone: bool


def one_arm(measured: Outcomes, arm: int) -> Outcomes:
    """The same outcomes as if there were one arm, for the losses that tell two models apart.

    Args:
        measured: of A arms.
        arm: the index of the one to keep.
    """
    return replace(
        measured,
        labels=measured.labels[:, [arm]],
        quality=measured.quality[:, [arm]],
        estimates=measured.estimates[:, [arm]],
        costs=measured.costs[:, [arm]],
    )


def match_labels(measured: Outcomes, slack: float) -> Floats:
    """Match probabilities [Q, A]; `slack` is in them since `match_probability` made them."""
    return measured.labels


def hard_labels(measured: Outcomes, slack: float) -> Floats:
    """1 where the arm's expected score is at least the reference's - slack, else 0; [Q, A]."""
    return expected_match(measured.quality, measured.reference_quality, slack)


def cheapest_match(measured: Outcomes, slack: float) -> Floats:
    """1 at the cheapest arm whose hard label is 1, 0 elsewhere; all 0 for the reference; [Q, A].

    The cheapest by estimated costs, since those are what a policy can know.
    """
    choice = choose(hard_labels(measured, slack), measured.estimates, 0.5)  # [Q]
    chosen: Floats = (choice[:, None] == np.arange(measured.quality.shape[1])).astype(np.float64)
    return chosen


def per_arm(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy with soft targets, the mean over prompts and arms.

    The released code has two outputs and a softmax per arm, which is this with their difference as
    the logit.
    """
    return functional.binary_cross_entropy_with_logits(logits, targets)


def one_of_all(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of a softmax over the arms and the reference, whose logit is 0."""
    reference = 1 - targets.sum(1, keepdim=True)  # [B, 1]
    classes = functional.pad(logits, (0, 1))  # [B, A + 1]
    return functional.cross_entropy(classes, torch.cat([targets, reference], 1))


def most_likely(logits: Floats) -> Floats:
    """1 at the arm that is the most likely class; all 0 where the reference is; [Q, A].

    There is one decision per prompt, the same at any threshold in (0, 1].
    """
    highest = np.maximum(logits.max(1), 0)  # [Q], the reference's logit is 0
    chosen: Floats = (logits == highest[:, None]).astype(np.float64)
    return chosen


def _of_one_arm(
    targets: Callable[[Outcomes, float], Floats],
) -> Callable[[Outcomes, float], Floats]:
    def checked(measured: Outcomes, slack: float) -> Floats:
        if measured.quality.shape[1] != 1:
            raise ValueError("this loss tells one arm from the reference: pick it by `one_arm`")
        return targets(measured, slack)

    return checked


PROB_NLABELS = Loss(match_labels, per_arm, sigmoid, monotone=True)

LOSSES: Mapping[str, Loss] = {
    "prob_nlabels": PROB_NLABELS,
    "det_nlabels": Loss(hard_labels, per_arm, sigmoid, monotone=True),
    "det_ncls": Loss(cheapest_match, one_of_all, most_likely, monotone=False),
    "prob_2cls": Loss(_of_one_arm(match_labels), per_arm, sigmoid, monotone=True),
    "det_2cls": Loss(_of_one_arm(hard_labels), per_arm, sigmoid, monotone=True),
}
"""Every loss by the name that BEST-Route's code gives it."""

"""What there is to choose from for a prompt, and what was chosen. Pure."""

from collections.abc import Iterator, Sequence
from enum import Enum, auto
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from bestroute.target import Criterion

Floats = npt.NDArray[np.float64]


class Option(NamedTuple):
    """An arm for one prompt, as far as it is known.

    Attributes:
        match_probability: that the best of its answers is as good as the reference's.
        expected_gain: quality of its answer less that of the reference's; None where the bundle has
            no trade-offs or the router did not run.
        expected_output_tokens: of one answer.
        estimated_cost_usd: of all samples.
    """

    model: str
    samples: int
    match_probability: float
    expected_gain: float | None
    expected_output_tokens: float
    estimated_cost_usd: float


class Options(Sequence[Option]):
    """Every arm for one prompt, in the manifest's order; made into an `Option` when it is read.

    Few callers read more than the one that was chosen, and making them all takes longer than
    choosing.

    Args:
        arms: model and samples of each, A of them.
        match_probability: [A]; None: all unknown, given as 0.
        expected_gain: [A], or None.
        expected_output_tokens: [A].
        estimated_cost_usd: [A].
    """

    __slots__ = ("_arms", "_costs", "_tokens", "expected_gain", "match_probability")

    def __init__(
        self,
        arms: Sequence[tuple[str, int]],
        match_probability: Floats | None,
        expected_gain: Floats | None,
        expected_output_tokens: Floats,
        estimated_cost_usd: Floats,
    ) -> None:
        self._arms = arms
        self.match_probability, self.expected_gain = match_probability, expected_gain
        self._tokens, self._costs = expected_output_tokens, estimated_cost_usd

    @overload
    def __getitem__(self, index: int) -> Option: ...
    @overload
    def __getitem__(self, index: slice) -> "list[Option]": ...
    def __getitem__(self, index: int | slice) -> "Option | list[Option]":
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return Option(
            *self._arms[index],
            0.0 if self.match_probability is None else float(self.match_probability[index]),
            None if self.expected_gain is None else float(self.expected_gain[index]),
            float(self._tokens[index]),
            float(self._costs[index]),
        )

    def __len__(self) -> int:
        return len(self._arms)

    def __iter__(self) -> Iterator[Option]:
        return (self[index] for index in range(len(self)))


class Fallback(Enum):
    """Why a decision is not the best arm that meets the criterion; named as in the proto."""

    BELOW_THRESHOLD = auto()
    OVER_BUDGET = auto()
    ROUTER_FAILED = auto()
    SHADOW = auto()


class Decision(NamedTuple):
    """What to run, what always asking the reference would be, and all there was to choose from."""

    arm: Option
    reference: Option
    criterion: Criterion
    fallback: Fallback | None
    options: Sequence[Option]

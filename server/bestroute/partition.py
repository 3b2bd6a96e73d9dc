"""How inputs of mixed lengths are best divided into batches, by what a run costs. Pure.

A run costs a fixed amount plus a time per token, padding included. So a batch saves the fixed
amount for all of its inputs but one, and pays for padding all of them to the longest. Neighbours in
length belong together: exchanging two inputs between batches never helps. The cheapest division is
found by dynamic programming over the sorted lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_PATIENCE = 0.15
"""Waiting for batch mates counts as this much of computing them: nobody gains from a batch that is
hardly cheaper, and all of it comes back later."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What one batch may hold, and what it costs.

    Attributes:
        max_items: most inputs.
        max_padded_tokens: most tokens, counting every input as long as the longest. An input that
            is longer by itself runs alone.
        tokens_per_run: what starting a run costs, in tokens that could be computed meanwhile. It
            decides how much padding pays: on a CPU hardly any, on a GPU much.
    """

    max_items: int
    max_padded_tokens: int
    tokens_per_run: float


def divided(lengths: Sequence[int], budget: Budget) -> list[int]:
    """The cheapest division of sorted lengths into batches.

    Args:
        lengths: rising, N of them, in tokens, each at least 1.
        budget: of each batch.

    Returns:
        The ends of the batches, rising: the first is `lengths[:ends[0]]`, the next
        `lengths[ends[0]:ends[1]]`, the last end is N.
    """
    # least[j]: cost of the first j, of which the last batch begins at begins[j].
    least, begins = [0.0], [0]
    for end, longest in enumerate(lengths, 1):
        each = (1 + _PATIENCE) * longest
        most = max(1, min(budget.max_items, budget.max_padded_tokens // longest))
        cost = budget.tokens_per_run - _PATIENCE * longest
        found, at = math.inf, end
        for begin in range(end - 1, max(-1, end - 1 - most), -1):
            cost += each
            if begin < end - 1 and budget.tokens_per_run + lengths[begin] < each:
                break  # the shortest costs less by itself than here, and so do those before it
            if cost + least[begin] < found:
                found, at = cost + least[begin], begin
        least.append(found)
        begins.append(at)
    ends = [len(lengths)]
    while begin := begins[ends[-1]]:
        ends.append(begin)
    return ends[::-1] if lengths else []

"""What bounds the asking: requests per minute, and money."""

import asyncio
import math
from dataclasses import dataclass
from math import inf

from bestroute.pricing import ModelPrice

_TEMPLATE_TOKENS = 64
"""Tokens that a provider's chat template may add to a prompt; generous."""


class Pace:
    """Turns at even distances, so that no minute sees more of them than it may.

    Args:
        per_minute: most turns in a minute; infinite for no limit.
    """

    def __init__(self, per_minute: float = inf) -> None:
        self._distance = 60 / per_minute
        self._next = -inf

    async def turn(self) -> None:
        """Wait for the next turn."""
        now = asyncio.get_running_loop().time()
        mine = max(self._next, now)
        self._next = mine + self._distance
        if mine > now:
            await asyncio.sleep(mine - now)


class Budget:
    """Money: what was spent, and what calls under way may still cost.

    Args:
        cap: USD that may be spent in all; infinite for no limit.
        spent: USD spent before.

    Attributes:
        exhausted: whether something was refused; all that comes after it is, too.
    """

    def __init__(self, cap: float = inf, spent: float = 0.0) -> None:
        self._cap = cap
        self.spent = spent
        self._under_way: list[float] = []
        self._settled = asyncio.Event()
        self.exhausted = False

    async def reserve(self, most: float) -> bool:
        """Set aside what a call may cost at most; False: the cap leaves no room for it.

        Waits as long as calls under way may turn out cheaper than was set aside for them.

        Args:
            most: in USD.
        """
        while not self.exhausted:
            if self.spent + math.fsum(self._under_way) + most <= self._cap:
                self._under_way.append(most)
                return True
            if self._under_way:
                self._settled.clear()
                await self._settled.wait()
            else:
                self.exhausted = True
        self._settled.set()  # others who wait are refused, too
        return False

    def settle(self, most: float, cost: float) -> None:
        """Replace what was set aside for a call by what it did cost, in USD."""
        self._under_way.remove(most)
        self.spent += cost
        self._settled.set()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may ask for.

    Attributes:
        max_cost_usd: money that may be spent; infinite for no limit.
        requests_per_minute: calls by provider; those not listed have no limit. When a refused call
            is repeated is for the provider's Retry-After to say, and not counted here.
    """

    max_cost_usd: float
    requests_per_minute: dict[str, float]

    def share(self, workers: int) -> "Limits":
        """What each of several workers may ask for, so that all together keep the limits."""
        return Limits(
            self.max_cost_usd / workers,
            {name: limit / workers for name, limit in self.requests_per_minute.items()},
        )


def most_expensive(prompt: str, answers: int, max_output_tokens: int, price: ModelPrice) -> float:
    """What one call can cost at most, in USD.

    No tokenizer makes more tokens of a text than it has bytes.
    """
    input_tokens = len(prompt.encode()) + _TEMPLATE_TOKENS
    return (
        input_tokens * price.input_usd_per_mtok
        + answers * max_output_tokens * price.output_usd_per_mtok
    ) / 1e6

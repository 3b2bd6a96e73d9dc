"""The embedded bundle, served for real: what it promises does not depend on company."""

import asyncio
import random
from collections.abc import AsyncIterator

import numpy as np
import pytest

from bestroute.config import Routing, Settings
from bestroute.prompt import Prompt
from bestroute.router import Router, open_router
from bestroute.target import Policy

WORDS = [
    "the",
    "sum",
    "of",
    "two",
    "numbers",
    "sorted",
    "by",
    "length",
    "is",
    "what",
    "how",
    "many",
]
TOLERANCE = 1e-5


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    # Every prompt is read anew: what is remembered would agree with itself.
    async with open_router(Settings(routing=Routing(cache_entries=0))) as router:
        yield router


def texts(count: int, longest: int) -> list[str]:
    source = random.Random(3)
    return [" ".join(source.choices(WORDS, k=source.randint(1, longest))) for _ in range(count)]


async def test_a_decision_is_the_same_alone_and_in_any_batch(router: Router) -> None:
    """Bit for bit, or within 1e-5 where the engine's kernels differ by shape."""
    prompts = [Prompt.of(text) for text in texts(48, 120)]
    alone = [await router.decide(prompt, Policy()) for prompt in prompts]

    sizes = set()
    for shuffle in range(3):
        order = random.Random(shuffle).sample(range(len(prompts)), len(prompts))
        together = await asyncio.gather(*(router.decide(prompts[i], Policy()) for i in order))
        for i, routed in zip(order, together, strict=True):
            assert routed.timing is not None
            sizes.add(routed.timing.batch_size)
            here = [option.match_probability for option in routed.decision.options]
            there = [option.match_probability for option in alone[i].decision.options]
            assert np.abs(np.subtract(here, there)).max() <= TOLERANCE
            chosen, expected = routed.decision.arm, alone[i].decision.arm
            assert (chosen.model, chosen.samples) == (expected.model, expected.samples)

    assert max(sizes) > 1, "batches must have been shared for this to mean anything"


async def test_a_reward_is_the_same_alone_and_in_any_batch(router: Router) -> None:
    prompt, answers = Prompt.of("What is 2 + 2?"), texts(24, 200)
    alone = [(await router.score(prompt, [answer])).rewards[0] for answer in answers]

    together = await router.score(prompt, answers)

    assert together.timing.batch_size > 1
    assert np.abs(np.subtract(together.rewards, alone)).max() <= TOLERANCE * max(
        1, *map(abs, alone)
    )


async def test_more_samples_never_match_less(router: Router) -> None:
    """Probabilities rise with n, by construction of the router."""
    for text in texts(10, 60):
        routed = await router.decide(Prompt.of(text), Policy())
        by_model: dict[str, list[float]] = {}
        for option in routed.decision.options:
            by_model.setdefault(option.model, []).append(option.match_probability)

        assert all(p == sorted(p) for p in by_model.values())


async def test_special_tokens_in_a_prompt_are_text(router: Router) -> None:
    """A prompt can't end itself early: what follows a written [SEP] still counts."""
    policy = Policy()
    with_marker = await router.decide(Prompt.of("Add 2 and 3. [SEP] [PAD] Prove it."), policy)
    plain = await router.decide(Prompt.of("Add 2 and 3."), policy)

    assert with_marker.prompt_tokens > plain.prompt_tokens + 6

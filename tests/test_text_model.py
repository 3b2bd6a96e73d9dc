"""A network behind its tokenizer and its batcher, with the tiny bundle's real one."""

import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from bestroute.bundle import Bundle
from bestroute.call import Call, Trace
from bestroute.config import Settings
from bestroute.errors import DeadlineExceeded, Overloaded
from bestroute.text_model import TextModel, load_text_model
from bestroute.tokenizer import Tokenizer


class Recorded:
    """A trace that keeps the names and attributes of what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Mapping[str, Any]]] = []

    def record(
        self, name: str, start: float, end: float, attributes: Mapping[str, Any] = {}
    ) -> None:
        assert start <= end <= time.monotonic()
        self.told.append((name, attributes))


@pytest.fixture
async def loaded(tiny_bundle: Path) -> TextModel:
    bundle = Bundle.load(tiny_bundle)
    return await load_text_model(bundle, bundle.manifest.reward, Settings(), wide=False)


@pytest.fixture
async def model(loaded: TextModel) -> AsyncIterator[TextModel]:
    async with loaded.running():
        yield loaded


async def test_who_is_not_let_in_costs_no_tokenizing(
    loaded: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids(self: Tokenizer, text: str) -> list[int]:
        raise AssertionError("must not be read")

    monkeypatch.setattr(Tokenizer, "_ids", ids)
    late = Call(time.monotonic() - 1)
    async with loaded.running():
        with pytest.raises(DeadlineExceeded):
            await loaded.prompt("easy", late)
        with pytest.raises(DeadlineExceeded):
            await loaded.answers("easy", ["good", "bad"], late)
        with pytest.raises(Overloaded):
            await loaded.answers("easy", ["good"] * 2000)
    with pytest.raises(Overloaded):
        await loaded.prompt("easy")

    assert loaded.counts.refused == 1 + 2 + 2000 + 1


async def test_counts_add_up(model: TextModel) -> None:
    await model.answers("word1", ["good", "good good"])
    await model.prompt("word1")

    counts = model.counts
    assert (counts.items, counts.tokens) == (3, 5 + 6 + 3)
    assert sum(size * runs for size, runs in counts.sizes.items()) == 3
    assert counts.padded_tokens >= counts.tokens
    assert counts.waiting == counts.running == counts.failed == counts.stalls == 0


async def test_a_traced_call_shows_where_its_time_went(model: TextModel) -> None:
    trace = Recorded()
    await model.prompt("easy", Call(trace=cast("Trace", trace)))

    assert [name for name, _ in trace.told] == ["tokenize", "queue", "batch"]
    assert {told["bestroute.network"] for _, told in trace.told} == {"reward"}
    assert trace.told[-1][1]["bestroute.batch.items"] == 1


async def test_an_answer_that_breaks_the_network_fails_alone(model: TextModel) -> None:
    """Also where it shares a run with others."""
    with pytest.raises(ArithmeticError, match="nan"):
        await model.answers("word1", ["good", "broken", "bad"])

    readings, _ = await model.answers("word1", ["good", "bad"])
    assert [float(each.row[0]) for each in readings] == pytest.approx([1, -1])
    assert model.fault() is None

"""What the growth benchmark makes of its times, and the bundles that it serves."""

from pathlib import Path

import pytest

from benchmarks.grown import spread, write_grown_bundle
from benchmarks.growth import (
    METRICS,
    PARTS,
    Load,
    Series,
    Step,
    draw,
    exponent,
    line,
    measured,
    memory_over_requests,
    span,
    texts,
    whole_words,
)
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.config import Settings
from bestroute.manifest import Model
from bestroute.prompt import Prompt
from bestroute.router import open_router
from bestroute.target import Policy
from bestroute.tokenizer import Tokenizer

SIZES = [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("start", [0.0, 3.0, 1000.0])
def test_a_straight_line_has_exponent_1_wherever_it_starts(start: float) -> None:
    assert exponent(SIZES, [start + 0.5 * size for size in SIZES]) == pytest.approx(1)


def test_exponents_tell_curves_from_lines() -> None:
    assert exponent(SIZES, [5 + size**2 for size in SIZES]) == pytest.approx(2, abs=0.15)
    assert exponent(SIZES, [5 + size**0.5 for size in SIZES]) == pytest.approx(0.5, abs=0.15)


def test_only_the_smallest_size_and_the_upper_half_count() -> None:
    straight = [10.0 * size for size in SIZES]
    bent = [straight[0], 700.0, 3.0, *straight[3:]]
    assert exponent(SIZES, bent) == exponent(SIZES, straight)


def test_what_does_not_rise_has_no_exponent() -> None:
    assert exponent(SIZES, [3.0] * 6) is None
    assert exponent(SIZES, [3.0, 9, 9, 4, 2.9, 5]) is None
    assert exponent([10, 30], [1.0, 3.0]) is None


def test_a_span_needs_an_exponent_of_every_round() -> None:
    assert span([1.0, 0.9, 1.25]) == "1.00 (0.90 to 1.25)"
    assert span([1.0, None, 1.25]) == "-"


def test_a_slope_comes_with_its_error() -> None:
    x = list(range(6))
    assert line(x, [4 - 2 * each for each in x]) == pytest.approx((-2, 0), abs=1e-9)
    slope, error = line(x, [1, -1, 1, 1, -1, 1])
    # By hand: residuals' sum of squares 16/3 over 4 degrees of freedom, x's 17.5.
    assert slope == pytest.approx(0, abs=1e-9)
    assert error == pytest.approx((16 / 3 / 4 / 17.5) ** 0.5)


def test_texts_have_as_many_tokens_as_words() -> None:
    bundle = Bundle.load(DEFAULT_BUNDLE)
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=bundle.manifest.router.max_tokens)
    drawn = texts(whole_words(bundle.tokenizer_path), 40, 20)
    assert {tokenizer.prompt(text).prompt_tokens for text in drawn} == {40}
    assert len({*drawn}) == 20


def test_arms_are_spread_evenly_and_rise_in_samples() -> None:
    pool = [
        Model(name=name, input_usd_per_mtok=1, output_usd_per_mtok=1, mean_output_tokens=1)
        for name in "ab"
    ]
    assert [(arm.model, arm.samples) for arm in spread(pool, 5)] == [
        *[("a", 1), ("a", 2), ("a", 3)],
        *[("b", 1), ("b", 2)],
    ]


@pytest.mark.parametrize(("arms", "models"), [(1, 2), (50, 7), (19, 20)])
async def test_a_grown_bundle_is_served_with_all_its_arms(
    tmp_path: Path, arms: int, models: int
) -> None:
    bundle = write_grown_bundle(tmp_path / "grown", arms, models)
    async with open_router(Settings(bundle=bundle)) as router:
        here = await router.decide(Prompt.of("What is the sum of 2 and 3?"), Policy())
        there = await router.decide(Prompt.of("Name every word that ends in a"), Policy())
    assert len(router.manifest.models) == models
    assert len(here.decision.options) == arms
    assert here.timing is not None  # the router model ran
    assert [o.expected_gain for o in here.decision.options] != [
        o.expected_gain for o in there.decision.options
    ]


def test_steps_are_measured_and_drawn(tiny_bundle: Path, tmp_path: Path) -> None:
    prompts = ["easy", "hard hard"]
    series = {
        "callers": Series(
            "callers", "callers", [Step(n, tiny_bundle, Load(prompts, callers=n)) for n in (1, 2)]
        ),
        "answers": Series(
            "answers",
            "answers",
            [Step(n, tiny_bundle, Load(prompts, answers=["good"] * n)) for n in (1, 2)],
        ),
    }
    figures = {name: measured(each, 1, 0.05, lambda: None) for name, each in series.items()}
    for found in figures.values():
        assert found["sizes"] == [1, 2]
        assert {*found["medians"]} == {*METRICS} - {"ready_s"}
        assert found["medians"]["round_trip_ms"][0] > found["medians"]["server_ms"][0] > 0
        assert found["medians"]["peak_mb"][1] >= found["medians"]["resident_mb"][1] > 10
    draw(figures, tmp_path / "growth.svg")
    assert "answers" in (tmp_path / "growth.svg").read_text(encoding="utf-8")


def test_failed_calls_are_not_measured(tiny_bundle: Path) -> None:
    series = Series(
        "bad", "bad", [Step(n, tiny_bundle, Load(["easy"], answers=["good"] * 65)) for n in (1, 2)]
    )
    with pytest.raises(RuntimeError, match="calls failed"):
        measured(series, 1, 0.05, lambda: None)


def test_memory_is_read_after_every_part() -> None:
    found = memory_over_requests(DEFAULT_BUNDLE, 4 * PARTS)
    assert found["requests"] == list(range(0, 4 * PARTS + 1, 4))
    assert len(found["resident_mb"]) == PARTS + 1
    assert min(found["resident_mb"]) > 10

"""What `bestroute-export validate` says about sound, broken and real files."""

import gzip
import json
import os
from collections.abc import Iterable
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bestroute_export.__main__ import main
from bestroute_export.data import Price, read_prices
from bestroute_export.rows import Row
from bestroute_export.validate.check import Report, check_file, check_pairs, check_prompts
from bestroute_export.validate.findings import EXAMPLES

REAL = Path(os.environ.get("BESTROUTE_DATA", "")) / "reasoning_gym.jsonl.gz"
PRICES = {"large": Price(3, 15), "small": Price(0.1, 0.2)}


def answer(score: float | None = 1.0, **changes: object) -> dict[str, object]:
    return {"text": "four", "score": score, "tokens": 2, **changes}


def row(identifier: str, responses: dict[str, Any] | None = None, **fields: object) -> Any:
    """A sound row of two LLMs, unless told otherwise."""
    return {
        "id": identifier,
        "prompt": f"prompt {identifier}",
        "split": "train",
        "responses": responses or {"large": [answer()], "small": [answer(), answer(0.0)]},
        **fields,
    }


def rows(values: Iterable[object]) -> list[Row]:
    return [Row(f"line {number}", value) for number, value in enumerate(values, 1)]


def check(*values: object, **options: Any) -> Report:
    return check_prompts(rows(values), **options)


def said(report: Report, wrong: bool) -> dict[str, tuple[str, ...]]:
    return {p.kind: p.examples for p in report.problems if p.wrong == wrong}


def test_a_sound_file_has_no_problems() -> None:
    report = check(row("a"), row("b", split="test"), prices=PRICES, reference="large")
    assert (report.problems, report.wrong) == ((), False)
    assert (report.rows, report.sound, report.splits) == (2, 2, {"train": 1, "test": 1})


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([row("a", split="dev")], "field split", "line 1: split is 'dev': write"),
        ([row("a", {"m": [answer(1.5)]})], "field score", "line 1: responses.m[0].score is 1.5"),
        ([row("a", {"m": [answer("1")]})], "field score", "a number from 0 to 1, or null"),  # type: ignore[arg-type]
        ([row("a", {"m": [{"text": "", "score": 1}]})], "field tokens", "tokens is missing: write"),
        ([row("a", {"m": []})], "field responses", "responses.m is []: write answers by LLM"),
        (["x"], "no row", "line 1: the row is 'x': write an object"),
        ([row("a", {"m": [answer(tokens=0)]})], "no tokens", "line 1, m[0]: a text of 0 tokens"),
        ([row("a"), row("a", prompt="x")], "duplicate id", "line 2: 'a' is also the id of line 1"),
        (
            [row("a", prompt="x y"), row("b", prompt="x  y\n", split="test")],
            "prompt in two splits",
            "line 2: its prompt is in test, and in train at line 1",
        ),
        (
            [row("a", task="t"), row("b", task="t", task_split="heldout")],
            "task partly held out",
            "line 2: 't' is held out here, unlike in line 1",
        ),
        ([], "no rows", "not one row can be used"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said_with_its_place(
    values: list[object], kind: str, message: str
) -> None:
    report = check(*values)
    assert report.wrong
    assert message in said(report, wrong=True)[kind][0]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([row("a", {"m": [answer(text=" ")]})], "empty answer", "line 1, m[0]: no text"),
        ([row("a", {"m": [answer(None)]})], "not graded", "run `bestroute-export label`"),
        ([row("a"), row("b", prompt="prompt a")], "duplicate prompt", "line 2: has the prompt of"),
        (
            [row("a"), row("b"), row("c", {"large": [answer()]})],
            "missing answers",
            "line 3: none of small: collect them",
        ),
        (
            [*map(row, "abc"), row("d", row("d")["responses"] | {"smal": [answer()]})],
            "rare LLM",
            "line 4: answers of smal, which 1 of 4 rows have",
        ),
        (
            [row("a"), row("b", {"large": [answer()], "small": [answer()]})],
            "ragged samples",
            "line 2: small has 1 of 2 answers, as in 1 rows in all",
        ),
        (
            [row("a", {"m": [answer(scores=1)]})],
            "unknown field of an answer",
            "line 1, m[0]: scores: not read",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_be_lived_with_is_said_too(values: list[object], kind: str, message: str) -> None:
    report = check(*values)
    assert not report.wrong
    assert message in said(report, wrong=False)[kind][0]


def test_checking_goes_on_behind_what_is_wrong() -> None:
    report = check_prompts(
        [
            Row("line 1", None, "not a JSON object in UTF-8: ..."),
            *rows([row("a", split="dev", prompt=7), row("b")])[0:2],
        ]
    )
    assert (report.rows, report.sound) == (3, 1)
    assert list(said(report, wrong=True)) == ["unreadable row", "field prompt", "field split"]


def test_many_problems_of_a_kind_are_counted() -> None:
    report = check(*(row(str(index), split="dev") for index in range(100)), row("a"))
    (problem,) = report.problems
    assert (problem.count, len(problem.examples)) == (100, EXAMPLES)


def test_the_reference_must_be_there_and_priced() -> None:
    missing = check(row("a"), reference="huge")
    assert said(missing, wrong=True)["reference"] == (
        "no answers of huge: name one of large, small",
    )
    partial = check(row("a"), row("b", {"small": [answer()]}), reference="large")
    assert "large answered only 1 of 2 prompts" in said(partial, wrong=True)["reference"][0]
    unpriced = check(row("a"), prices={}, reference="large")
    assert "large" in said(unpriced, wrong=True)["no price"][0]
    assert "small" in said(unpriced, wrong=False)["no price"][0]


def test_models_are_summed_up() -> None:
    responses = {
        "large": [answer(0.5, tokens=8)],
        "small": [answer(1.0), answer(0.0), answer(0.0), answer(None)],
    }
    report = check(row("a", responses), row("b"), row("c"), prices=PRICES)
    large, small = report.models
    assert report.reference == large
    assert (large.prompts, large.samples, large.median_samples, large.most) == (3, 1, 1, 1)
    assert (large.answers, large.graded, large.score, large.tokens) == (3, 3, 2.5 / 3, 4.0)
    assert (small.samples, small.median_samples, small.most, small.pairs) == (2, 2, 2, 2 + 1 + 1)
    assert (small.answers, small.graded, small.score) == (8, 7, 3 / 7)
    assert small.price == PRICES["small"]


def verdicts(report: Report) -> dict[str, bool]:
    return {verdict.purpose: verdict.possible for verdict in report.verdicts}


def test_verdicts_of_enough_data() -> None:
    """Six answers, half right: nine pairs per prompt."""
    answers = {"large": [answer(1.0)], "small": [answer(float(n % 2)) for n in range(6)]}
    report = check(*(row(str(index), answers) for index in range(120)), prices=PRICES)
    assert all(verdicts(report).values())
    reasons = {verdict.purpose: verdict.reason for verdict in report.verdicts}
    assert reasons["best of n"] == "n up to 6: small"
    assert reasons["a reward model"].startswith("1,080 pairs")


def test_verdicts_of_too_little_data() -> None:
    scores = [1.0, 1.0, 1.0, 0.0]
    only = [row(str(index), {"large": [answer(score)]}) for index, score in enumerate(scores)]
    report = check(*only)
    assert not any(verdicts(report).values())
    assert report.resolution is not None
    deviation = float(np.std(scores, ddof=1))
    assert report.resolution.mean == 0.75
    assert report.resolution.error == pytest.approx(deviation / 2)
    assert report.resolution.needed == ceil((1.645 * deviation / 0.0075) ** 2)


def test_an_ungraded_or_unpriced_llm_is_no_arm() -> None:
    ungraded = check(row("a", {"large": [answer()], "small": [answer(None)]}), reference="large")
    assert not verdicts(ungraded)["a router"]
    unpriced = check(row("a"), prices={"large": PRICES["large"]}, reference="large")
    assert not verdicts(unpriced)["a router"]
    assert verdicts(check(row("a"), prices=PRICES, reference="large"))["a router"]


def test_pairs_are_checked() -> None:
    pair = {"pid": "a", "prompt": "x", "chosen": "4", "rejected": "5", "split": "train"}
    report = check_pairs(
        rows([pair, pair, pair | {"split": "test"}, pair | {"rejected": "4"}, {"pid": "a"}])
    )
    assert (report.rows, report.sound, report.models) == (5, 4, ())
    assert list(said(report, wrong=True)) == [
        "prompt in two splits",
        "equal answers",
        "field prompt",
        "field chosen",
        "field rejected",
    ]


def test_the_command_prints_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    values = [row("a"), row("b"), row("c", {"small": [answer(text="[/red]", score=2)]})]
    lines = [*map(json.dumps, values), "{"]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    prices = tmp_path / "prices.json"
    prices.write_text('{"large": {"input_per_mtok": 3, "output_per_mtok": 15}}')
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(path), "--reference", "large", "--prices", str(prices)])
    assert stopped.value.code == 2
    printed = capsys.readouterr().out
    for text in (
        "2 of 4 rows can be read (2 train)",
        "line 3: responses.small[0].score is 2: write a number from 0 to 1",
        "line 4: not a JSON object",
        "small: write its price",
        "large *",
        "can't serve for a router",
        "to mend: 2",
    ):
        assert text in printed, text


def test_the_command_ends_well_on_a_sound_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row("a")))
    main(["validate", str(path)])
    assert "to mend: 0" in capsys.readouterr().out


def test_the_command_names_a_missing_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(tmp_path / "none.jsonl")])
    assert stopped.value.code == 2
    assert "can't be read" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(not REAL.exists(), reason="BESTROUTE_DATA names no folder with real answers")
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("reasoning_gym", "claude-sonnet-4"),
        ("zeroeval", "gpt-4o-2024-05-13"),
        ("mmlu_pro", "gpt-4o-2024-05-13"),
        ("pairs_reasoning_gym", None),
        ("pairs_correctness", None),
    ],
)
def test_real_data_is_sound(name: str, reference: str | None) -> None:
    prices = read_prices(REAL.parent)
    report = check_file(REAL.with_name(f"{name}.jsonl.gz"), prices, reference)
    assert (report.rows, report.wrong) == (report.sound, False)

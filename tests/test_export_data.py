"""Prompts, pairs and prices from real files, sound and broken, in memory that stays bounded."""

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from bestroute_export.data import (
    Answer,
    DataError,
    Pair,
    Price,
    Prompt,
    digest,
    fold_of,
    read_pairs,
    read_prices,
    read_prompts,
    split_of,
    stream_pairs,
    stream_prompts,
    write_prompts,
)

FORMATS = ("jsonl", "jsonl.gz", "parquet")
ANSWER = {"text": "4", "score": 1.0, "tokens": 1}
ROW: dict[str, Any] = {"id": "a", "prompt": "2 + 2?", "responses": {"small": [ANSWER]}}
FULL = [
    Prompt(
        id="a",
        text="Wie spät? 🕰",
        split="test",
        heldout=True,
        answers={
            "große": (Answer("zwölf", 0.5, 3, 7, 0.001, "stop", -1.5), Answer("", None, 0)),
            "small": (Answer("12", 1.0, 1),),
        },
        task="clock",
        extra={"gold": "12", "source": {"page": [1, None]}},
    ),
    Prompt("b", "2 + 2?", "train", False, {"small": (Answer("4", 0.0, 1),)}),
]


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", FORMATS)
def test_what_is_written_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"prompts.{ending}"
    write_prompts(path, FULL)
    assert read_prompts(path) == FULL


@pytest.mark.parametrize("ending", FORMATS)
def test_texts_can_stay_on_disk(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"prompts.{ending}"
    write_prompts(path, FULL)
    without = [
        replace(
            prompt,
            answers={
                model: tuple(replace(answer, text="") for answer in group)
                for model, group in prompt.answers.items()
            },
        )
        for prompt in FULL
    ]
    assert read_prompts(path, texts=False) == without


def test_a_row_needs_no_more_than_a_prompt_with_answers(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write_lines(tmp_path / "prompts.jsonl", ROW))
    assert prompt == Prompt(
        "a", "2 + 2?", split_of("2 + 2?"), False, {"small": (Answer("4", 1.0, 1),)}
    )


def test_rows_of_a_data_frame_are_read(tmp_path: Path) -> None:
    """A frame knows no maps: its responses are a struct, null where an LLM has no answers."""
    other = {**ROW, "id": "b", "responses": {"large": [ANSWER], "small": [ANSWER]}, "gold": "4"}
    path = tmp_path / "prompts.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([other, ROW]), path)
    for texts in (True, False):
        first, second = read_prompts(path, texts)
        assert (list(first.answers), list(second.answers)) == (["large", "small"], ["small"])
        assert first.extra == {"gold": "4"}
        assert second.extra == {}


def test_a_prompt_without_a_split_lies_with_its_pairs(tmp_path: Path) -> None:
    rows = [{**ROW, "id": str(index), "prompt": f"{index}?"} for index in range(200)]
    prompts = read_prompts(write_lines(tmp_path / "prompts.jsonl", *rows))
    pair = {"pid": "x", "chosen": "4", "rejected": "5"}
    pairs = [{**pair, "prompt": prompt.text} for prompt in prompts]
    read = read_pairs(write_lines(tmp_path / "pairs.jsonl", *pairs))
    assert [pair.split for pair in read] == [prompt.split for prompt in prompts]
    counts = {split: sum(p.split == split for p in prompts) for split in ("train", "test")}
    assert counts["train"] > 140
    assert counts["test"] > 10


def test_an_answer_that_is_not_graded_has_no_score() -> None:
    assert Answer("4", 0.5, 1).score == 0.5
    with pytest.raises(DataError, match="bestroute-export label"):
        _ = Answer("4", None, 1).score


def answers(**changes: object) -> dict[str, object]:
    return {"responses": {"small": [{**ANSWER, **changes}]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 7}, "id is 7: write a string"),
        ({"prompt": ""}, "prompt is '': write the text"),
        ({"split": "dev"}, r"split is 'dev': write \"train\", \"validation\" or \"test\""),
        ({"responses": [ANSWER]}, "responses is .*: write answers by LLM"),
        ({"responses": {"small": []}}, r"responses.small is \[\]: write answers by LLM"),
        ({"responses": {"small": ["4"]}}, r"responses.small\[0\] is '4': write answers by LLM"),
        (answers(score=1.5), r"responses.small\[0\].score is 1.5: write a number from 0 to 1"),
        (answers(score="1"), "score is '1': write a number"),
        (answers(score=True), "score is True: write a number"),
        (answers(score=float("nan")), "score is nan: write a number"),
        (answers(tokens=-1), "tokens is -1: write how many tokens"),
        (answers(tokens=None), "tokens is None: write how many tokens"),
        (answers(text=None), "text is None: write the answer as a string"),
        (answers(cost_usd=-0.1), "cost_usd is -0.1: write what the answer cost"),
        (answers(text="\ud83d"), "text is .*: write the answer as a string"),
    ],
    ids=lambda value: "" if isinstance(value, str) else json.dumps(value)[:50],
)
def test_a_wrong_value_is_named_with_its_place(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", ROW, {**ROW, **change})
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        read_prompts(path)


def test_a_missing_field_is_named_and_the_others_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", {"id": "a"})
    expected = r"line 1: prompt is missing: write the text .*\(and 1 more; `bestroute-export valid"
    with pytest.raises(DataError, match=expected):
        read_prompts(path)


def test_a_row_of_parquet_is_counted_from_one(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([ROW, {**ROW, "id": None}]), path)
    with pytest.raises(DataError, match="row 2: id is missing"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": ', "line 1: not a JSON object"),
        ("a.jsonl", b'\n{"id": "\xff"}', "line 2: not a JSON object"),
        ("a.jsonl", b"[]", "line 1: the row is .*: write an object"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 1000)[:-9], "damaged from here on"),
        ("a.jsonl.gz", b"{}", "damaged from here on"),
        ("a.parquet", b"{}", "can't be read"),
        ("a.csv", b"", "name it .jsonl, .jsonl.gz or .parquet"),
    ],
    ids=["torn", "not-utf-8", "list", "torn-gzip", "no-gzip", "no-parquet", "format"],
)
def test_a_file_that_is_something_else_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_missing_file_is_named(tmp_path: Path, ending: str) -> None:
    with pytest.raises(DataError, match=f"none.{ending} can't be read"):
        read_prompts(tmp_path / f"none.{ending}")
    with pytest.raises(DataError, match="can't be written"):
        write_prompts(tmp_path / "none" / f"out.{ending}", FULL)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"prompts.{ending}"
    write_prompts(path, FULL)
    before = digest(path)

    def interrupted() -> Iterator[Prompt]:
        yield FULL[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_prompts(path, interrupted())
    assert digest(path) == before
    assert list(tmp_path.iterdir()) == [path]
    write_prompts(path, (replace(prompt, split="test") for prompt in stream_prompts(path)))
    assert [prompt.split for prompt in stream_prompts(path)] == ["test", "test"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_pairs_are_read(tmp_path: Path, ending: str) -> None:
    rows = [{"pid": "a", "prompt": "2 + 2?", "chosen": "4", "rejected": "5", "split": "test"}]
    path = tmp_path / f"pairs.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_lines(path, *rows)
    assert list(stream_pairs(path)) == [Pair("a", "2 + 2?", "4", "5", "test")]
    assert read_pairs(tmp_path, path.name) == list(stream_pairs(path))


def test_a_pair_that_lacks_an_answer_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", {"pid": "a", "prompt": "2 + 2?", "chosen": "4"})
    with pytest.raises(DataError, match="line 1: rejected is missing: write the worse answer"):
        read_pairs(path)


def test_prices_are_read_from_a_file_or_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text('{"small": {"input_per_mtok": 1, "output_per_mtok": 2.5}}')
    assert read_prices(path) == read_prices(tmp_path) == {"small": Price(1.0, 2.5)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"small": {"input_per_mtok": -1, "output_per_mtok": 2}}', "is -1: write USD per million"),
        ('{"small": {"input_per_mtok": 1}}', "small.output_per_mtok is missing: write USD"),
        ("{", "prices.json: "),
    ],
    ids=["negative", "missing", "torn"],
)
def test_wrong_prices_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prices.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_prices(path)


def test_folds_are_the_same_everywhere() -> None:
    assert [fold_of(str(index), 5) for index in range(10)] == [0, 3, 1, 3, 4, 3, 4, 0, 0, 0]


def large(prompts: int, characters: int) -> Iterator[Prompt]:
    """Eight LLMs with 20 answers each to every prompt."""
    for index in range(prompts):
        answers = {
            f"model-{model}": tuple(
                Answer(f"{index} {model} {n} ".ljust(characters, "x"), n / 20, 300 + n, 40 + index)
                for n in range(20)
            )
            for model in range(8)
        }
        yield Prompt(f"prompt-{index}", f"question {index}", "train", False, answers)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_memory_is_bounded(tmp_path: Path, ending: str) -> None:
    """A hundredth of 10,000 prompts; the whole must fit in 4 GB."""
    count, length = 100, 1500
    path = tmp_path / f"prompts.{ending}"
    write_prompts(path, large(count, length))
    for _ in stream_prompts(path):  # loads what is loaded once
        pass
    tracemalloc.start()
    try:
        for _ in stream_prompts(path):
            pass
        _, streamed = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        kept = read_prompts(path, texts=False)
        _, numbers = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept) == count
    assert streamed < count * 160 * length / 4
    assert numbers / (count * 160) < 400  # bytes per answer: 0.64 GB for 10,000 prompts

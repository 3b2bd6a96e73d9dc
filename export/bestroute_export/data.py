"""Prompts with graded answers of several LLMs, pairs of answers, and prices.

docs/data.md describes the files, with examples. Prompts and pairs are JSON Lines (.jsonl,
.jsonl.gz) or Parquet (.parquet). Where a function takes a directory too, it looks there for a name
given below.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from sys import intern
from typing import Any

from bestroute_export.rows import DataError as DataError
from bestroute_export.rows import read_rows, write_rows
from bestroute_export.schema import (
    AnswerRow,
    PromptRow,
    RowInvalid,
    pair_row,
    price_table,
    prompt_row,
)

PROMPTS = "reasoning_gym.jsonl.gz"
PAIRS = "pairs_reasoning_gym.jsonl.gz"
OTHER_PAIRS = "pairs_correctness.jsonl.gz"
PRICES = "prices.json"

HELDOUT = "heldout"
"""The `task_split` of a task that the out-of-distribution measurement never trains on."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled answer.

    Attributes:
        text: the answer; "" where it was left on disk.
        grade: quality in [0, 1] from a verifier, a judge or a person; None until it has one.
        tokens: length in tokens, as the source counts them.
        input_tokens: length of the prompt in tokens, as the source counts them.
        cost_usd: what it cost.
        finish_reason: why it ends, such as "stop" or "length".
        reward: what a reward model gave it; on no particular scale.
    """

    text: str
    grade: float | None
    tokens: int
    input_tokens: int | None = None
    cost_usd: float | None = None
    finish_reason: str | None = None
    reward: float | None = None

    @property
    def score(self) -> float:
        """The grade, for those who can't do without one.

        Raises:
            DataError: the answer has none yet.
        """
        if self.grade is None:
            raise DataError("an answer has no score: grade it with `bestroute-export label`")
        return self.grade


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and what each LLM answered.

    Attributes:
        split: "train", "validation" or "test"; by prompt.
        heldout: belongs to a task that the out-of-distribution measurement never trains on.
        answers: by LLM name, in the order sampled; at least one each.
        task: name of the task it belongs to.
        extra: fields of the row that the schema doesn't name, as JSON has them.
    """

    id: str
    text: str
    split: str
    heldout: bool
    answers: dict[str, tuple[Answer, ...]]
    task: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """A better and a worse answer to the same prompt."""

    prompt_id: str
    prompt: str
    chosen: str
    rejected: str
    split: str


@dataclass(frozen=True, slots=True)
class Price:
    """List prices in USD per million tokens."""

    input_usd_per_mtok: float
    output_usd_per_mtok: float


def stream_prompts(path: Path, texts: bool = True) -> Iterator[Prompt]:
    """Read prompts one by one, in file order.

    Args:
        path: file of prompts.
        texts: False leaves the answers' texts on disk; each reads "".

    Raises:
        DataError: the file can't be read, or a row departs from the schema.
    """
    for row in read_rows(path, texts):
        if row.fault:
            raise DataError(f"{path}, {row.where}: {row.fault}")
        try:
            yield _prompt(prompt_row(row.value), texts)
        except RowInvalid as error:
            raise _refused(path, row.where, error) from error


def read_prompts(path: Path, texts: bool = True) -> list[Prompt]:
    """Read every prompt, in file order; arguments and errors as in `stream_prompts`.

    Of 10,000 prompts with 160 answers each, the numbers take about 0.4 GB, the texts their length.
    """
    return list(stream_prompts(_inside(path, PROMPTS), texts))


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write a file of prompts, whole or not at all.

    `prompts` may be streamed from the very file that is written.

    Raises:
        DataError: the file can't be written, or its name ends in no known format.
    """
    write_rows(path, map(_row, prompts))


def stream_pairs(path: Path) -> Iterator[Pair]:
    """Read pairs one by one, in file order.

    Raises:
        DataError: the file can't be read, or a row departs from the schema.
    """
    for row in read_rows(path):
        if row.fault:
            raise DataError(f"{path}, {row.where}: {row.fault}")
        try:
            pair = pair_row(row.value)
        except RowInvalid as error:
            raise _refused(path, row.where, error) from error
        split = pair.get("split") or split_of(pair["prompt"])
        yield Pair(pair["pid"], pair["prompt"], pair["chosen"], pair["rejected"], intern(split))


def read_pairs(path: Path, name: str = PAIRS) -> list[Pair]:
    """Read every pair of a file, or of the file of that name in a directory, in file order."""
    return list(stream_pairs(_inside(path, name)))


def read_prices(path: Path) -> dict[str, Price]:
    """Read the price of every LLM that has one.

    Raises:
        DataError: the file can't be read, or is no table of prices.
    """
    path = _inside(path, PRICES)
    try:
        table = price_table(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{path} can't be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return {
        model: Price(price["input_per_mtok"], price["output_per_mtok"])
        for model, price in table.items()
    }


def fold_of(identifier: str, folds: int) -> int:
    """The fold in [0, folds) of a prompt: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8]) % folds


def split_of(prompt: str) -> str:
    """The split of a row that names none: of ten prompts, eight train, one validation, one test.

    It goes by the text, so that a prompt that comes twice never lies on both sides.
    """
    return ("validation", "test", *["train"] * 8)[fold_of(prompt, 10)]


def digest(path: Path) -> str:
    """SHA-256 of a file in hex.

    Raises:
        DataError: the file can't be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error}") from error


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 in hex of each file that is read from a directory, by name."""
    return {name: digest(directory / name) for name in (PROMPTS, PAIRS, OTHER_PAIRS, PRICES)}


def _inside(path: Path, name: str) -> Path:
    return path / name if path.is_dir() else path


def _refused(path: Path, where: str, error: RowInvalid) -> DataError:
    more = len(error.faults) - 1
    rest = f" (and {more} more; `bestroute-export validate {path}` lists them)" if more else ""
    return DataError(f"{path}, {where}: {error.faults[0].message}{rest}")


def _prompt(row: PromptRow, texts: bool) -> Prompt:
    # Names that come in every row are kept once.
    task = row.get("task")
    return Prompt(
        id=row["id"],
        text=row["prompt"],
        split=intern(row.get("split") or split_of(row["prompt"])),
        heldout=row.get("task_split") == HELDOUT,
        answers={
            intern(model): tuple(_answer(answer, texts) for answer in group)
            for model, group in row["responses"].items()
        },
        task=task and intern(task),
        extra={name: value for name, value in row.items() if name not in PromptRow.__annotations__},
    )


def _answer(row: AnswerRow, texts: bool) -> Answer:
    reason = row.get("finish_reason")
    return Answer(
        text=row["text"] if texts else "",
        grade=row.get("score"),
        tokens=row["tokens"],
        input_tokens=row.get("input_tokens"),
        cost_usd=row.get("cost_usd"),
        finish_reason=reason and intern(reason),
        reward=row.get("reward"),
    )


def _row(prompt: Prompt) -> dict[str, Any]:
    row: dict[str, Any] = {"id": prompt.id, "prompt": prompt.text, "split": prompt.split}
    if prompt.task is not None:
        row["task"] = prompt.task
    if prompt.heldout:
        row["task_split"] = HELDOUT
    row |= prompt.extra
    row["responses"] = {
        model: [_answer_row(answer) for answer in group] for model, group in prompt.answers.items()
    }
    return row


def _answer_row(answer: Answer) -> dict[str, Any]:
    optional = {
        "input_tokens": answer.input_tokens,
        "cost_usd": answer.cost_usd,
        "finish_reason": answer.finish_reason,
        "reward": answer.reward,
    }
    return {
        "text": answer.text,
        "score": answer.grade,
        "tokens": answer.tokens,
        **{name: value for name, value in optional.items() if value is not None},
    }

"""Prompts with graded answers of several LLMs, pairs of answers, and prices, read from a folder.

The folder holds `reasoning_gym.jsonl.gz` (one prompt per row, with answers and their scores in
[0, 1]), `pairs_reasoning_gym.jsonl.gz` (a better and a worse answer to one of the prompts per row),
`pairs_correctness.jsonl.gz` (the same for other prompts) and `prices.json` (USD per million
tokens). `DataError` tells where a row departs from that.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = "reasoning_gym.jsonl.gz"
PAIRS = "pairs_reasoning_gym.jsonl.gz"
OTHER_PAIRS = "pairs_correctness.jsonl.gz"
PRICES = "prices.json"
SPLITS = ("train", "validation", "test")


class DataError(ValueError):
    """The data folder lacks a file, or a row of it lacks a field."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled answer.

    Attributes:
        score: quality in [0, 1], from a verifier.
        tokens: length in tokens, as the source counts them.
    """

    text: str
    score: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and what each LLM answered.

    Attributes:
        split: "train", "validation" or "test"; by prompt.
        heldout: belongs to a task that the out-of-distribution measurement never trains on.
        answers: by LLM name, in the order sampled.
    """

    id: str
    text: str
    split: str
    heldout: bool
    answers: dict[str, tuple[Answer, ...]]


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


def read_prompts(directory: Path) -> list[Prompt]:
    """Read every prompt, in file order."""
    return [
        Prompt(
            id=row["id"],
            text=row["prompt"],
            split=row["split"],
            heldout=row["task_split"] == "heldout",
            answers={
                model: tuple(Answer(a["text"], float(a["score"]), a["tokens"]) for a in answers)
                for model, answers in row["responses"].items()
            },
        )
        for row in _rows(directory / PROMPTS, "id", "prompt", "split", "task_split", "responses")
    ]


def read_pairs(directory: Path, name: str = PAIRS) -> list[Pair]:
    """Read every pair of a file, in file order."""
    fields = ("pid", "prompt", "chosen", "rejected", "split")
    return [Pair(*(row[field] for field in fields)) for row in _rows(directory / name, *fields)]


def read_prices(directory: Path) -> dict[str, Price]:
    """Read the price of every LLM that has one."""
    try:
        table = json.loads((directory / PRICES).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{directory / PRICES} can't be read: {error}") from error
    return {
        model: Price(float(price["input_per_mtok"]), float(price["output_per_mtok"]))
        for model, price in table.items()
    }


def fold_of(identifier: str, folds: int) -> int:
    """The fold in [0, folds) of a prompt: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8]) % folds


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 in hex of each file that is read here, by name."""
    found = {}
    for name in (PROMPTS, PAIRS, OTHER_PAIRS, PRICES):
        try:
            with (directory / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{directory / name} can't be read: {error}") from error
    return found


def _rows(path: Path, *fields: str) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if missing := [field for field in fields if field not in row]:
                    raise DataError(f"{path}, line {number}: no {', '.join(missing)}")
                if row["split"] not in SPLITS:
                    raise DataError(f"{path}, line {number}: unknown split {row['split']!r}")
                yield row
    except OSError as error:
        raise DataError(f"{path} can't be read: {error}") from error

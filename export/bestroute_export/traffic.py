"""A decision log as data: its prompts and answers with what feedback says of them.

Files are read one by one. In memory are all feedback and whatever of the decisions is asked for.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from bestroute.traffic.schema import ADDED, DECISION, DECISIONS, FEEDBACK, FEEDBACK_ROW
from bestroute_export.data import DataError
from bestroute_export.evaluate import calibration_error

Row = dict[str, Any]
"""A row of a file of prompts, as docs/data.md describes it."""

_BATCH = 1024


@dataclass(frozen=True)
class Arm:
    """How the answers of one model and number of samples turned out.

    Attributes:
        outcomes: how many there is feedback on.
        expected: mean quality that the bundle's training data led to expect.
        observed: mean quality by feedback.
    """

    model: str
    samples: int
    outcomes: int
    expected: float
    observed: float


@dataclass(frozen=True)
class Summary:
    """What a log holds.

    Attributes:
        decisions: how many.
        with_text: decisions whose prompt was kept.
        with_answers: decisions with at least one answer whose text was kept.
        with_feedback: decisions that feedback is on.
        different: different prompts.
        bundles: decisions by version of the bundle.
        arms: those that feedback is on and whose quality was expected.
        calibration_error: expected calibration error over these; None without any.
    """

    decisions: int
    with_text: int
    with_answers: int
    with_feedback: int
    different: int
    bundles: dict[str, int]
    arms: tuple[Arm, ...]
    calibration_error: float | None


def summarize(directory: Path) -> Summary:
    """Count what a log holds, and compare expected with observed quality.

    An answer that another model gave than the one that was chosen is left out of the comparison.

    Raises:
        DataError: there is no log, or a file can't be read.
    """
    told, prompts, bundles = _feedback(directory), set[str](), Counter[str]()
    count = Counter[str]()
    outcomes: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for decision in _decisions(directory):
        count["decisions"] += 1
        count["with_text"] += decision["prompt"] is not None
        count["with_answers"] += any(True for _ in _answers(decision))
        prompts.add(decision["prompt_digest"])
        bundles[decision["bundle_version"]] += 1
        if (quality := told.get(decision["decision_id"])) is None:
            continue
        count["with_feedback"] += 1
        expected = decision["expected_quality"]
        if expected is not None and _by_chosen_model(decision):
            arm = decision["model"], decision["samples"]
            outcomes.setdefault(arm, []).append((expected, quality))
    pairs = np.array([pair for each in outcomes.values() for pair in each]).reshape(-1, 2)
    return Summary(
        decisions=count["decisions"],
        with_text=count["with_text"],
        with_answers=count["with_answers"],
        with_feedback=count["with_feedback"],
        different=len(prompts),
        bundles=dict(bundles),
        arms=tuple(
            Arm(*arm, len(each), *(float(mean) for mean in np.mean(each, axis=0)))
            for arm, each in sorted(outcomes.items())
        ),
        calibration_error=calibration_error(pairs[:, 0], pairs[:, 1]) if len(pairs) else None,
    )


def graded_rows(directory: Path, *, graded_only: bool) -> Iterator[Row]:
    """The log's prompts with the answers that were drawn, one row per different prompt.

    An answer that feedback is on has that as its score; all others have none.

    Args:
        directory: of the log.
        graded_only: leave out answers without a score, and prompts without answers.

    Raises:
        DataError: there is no log, a file can't be read, or no prompt's text was kept.
    """
    told = _feedback(directory)
    by_prompt: dict[str, dict[str, list[Row]]] = {}
    for decision in _decisions(directory):
        if decision["prompt"] is None:
            continue
        responses = by_prompt.setdefault(decision["prompt"], {})
        quality = told.get(decision["decision_id"])
        for candidate in _answers(decision):
            score = quality if candidate["index"] == decision["winner"] else None
            if score is not None or not graded_only:
                responses.setdefault(candidate["model"], []).append(_answer(candidate, score))
    if not by_prompt:
        raise DataError(
            f"{directory} has no text of any prompt, only digests: that serves to measure "
            'calibration, but not to train; serve with decision_log.prompts = "keep"'
        )
    for prompt, responses in by_prompt.items():
        if responses or not graded_only:
            digest = sha256(prompt.encode()).hexdigest()[:16]
            yield {"id": f"traffic-{digest}", "prompt": prompt, "responses": responses}


def _answer(candidate: Row, score: float | None) -> Row:
    return {
        "text": candidate["text"],
        "score": score,
        "tokens": candidate["output_tokens"],
        "finish_reason": candidate["finish_reason"],
        "reward": candidate["reward"],
    }


def _answers(decision: Row) -> Iterator[Row]:
    """The candidates that are answers and whose texts were kept."""
    for candidate in decision["candidates"] or ():
        if candidate["complete"] and candidate["text"] is not None:
            yield candidate


def _by_chosen_model(decision: Row) -> bool:
    """Whether the answer is by the model that was chosen; of a Route nobody knows better."""
    if decision["candidates"] is None:
        return True
    winner = (c for c in decision["candidates"] if c["index"] == decision["winner"])
    return any(candidate["model"] == decision["model"] for candidate in winner)


def _feedback(directory: Path) -> dict[str, float]:
    """Quality by id of the decision; the last that was told."""
    latest: dict[str, tuple[Any, float]] = {}
    for row in _rows(directory, FEEDBACK, FEEDBACK_ROW):
        told = latest.get(row["decision_id"])
        if told is None or told[0] <= row["time"]:
            latest[row["decision_id"]] = row["time"], row["quality"]
    return {decision_id: quality for decision_id, (_, quality) in latest.items()}


def _decisions(directory: Path) -> Iterator[Row]:
    found = False
    for row in _rows(directory, DECISIONS, DECISION):
        found = True
        yield row
    if not found:
        raise DataError(
            f"{directory} holds no decisions; name the directory of a server's decision_log. "
            "A server writes the first file after decision_log.rotate_seconds, or when it ends"
        )


def _completed(batch: pyarrow.RecordBatch, schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """The batch with the columns that it has from a time before there were some of the schema's."""
    names = set(batch.schema.names)
    for index, field in enumerate(schema):
        if field.name in ADDED - names:
            batch = batch.add_column(index, field, pyarrow.nulls(len(batch), field.type))
    return batch


def _rows(directory: Path, kind: str, schema: pyarrow.Schema) -> Iterator[Row]:
    for path in sorted(directory.glob(f"{kind}-*.parquet")):
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(_BATCH):
                    yield from _completed(batch, schema).cast(schema).to_pylist()
        except FileNotFoundError:
            continue  # the server has made room since
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} can't be read: {error}") from error

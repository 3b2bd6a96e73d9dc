"""Grades the answers of a file, once each."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from bestroute_export.gather.graders import Grader
from bestroute_export.gather.journal import Entry, Journal
from bestroute_export.gather.on_ray import Piece
from bestroute_export.gather.prompts import Fields, key_of, read_answers
from bestroute_export.gather.tasks import first_failure


class Labels:
    """The answers of a file, and the journal with their grades.

    An answer that comes graded keeps its score. One that could not be graded is tried again in the
    next run.

    Args:
        data: the file.
        journal: holds the grades.
        references: reference answers by prompt id; they win over the rows' own.

    Attributes:
        errors: why answers could not be graded in this run, and how many.

    Raises:
        DataError: the journal can't be used.
    """

    def __init__(self, data: Path, journal: Journal, references: Mapping[str, object]) -> None:
        self._data, self._journal, self._references = data, journal, references
        self._scores: dict[str, float | None] = {}
        self.errors: Counter[str] = Counter()
        for _, entry in journal.entries():
            self._scores[entry["key"]] = entry["score"]

    def record(self, entry: Entry) -> None:
        """Keep a grade."""
        self._journal.append(entry)
        self._scores[entry["key"]] = entry["score"]
        if entry["score"] is None:
            self.errors[entry["error"]] += 1

    def ungraded(self, answers_at_once: int) -> Iterator[Piece]:
        """What has no grade yet: a `prompt` (its row), some `answers` to it, and their `keys`.

        Equal answers to a prompt are graded once.
        """
        for row in self._rows():
            responses = row.pop("responses")
            prompt = _key(row)
            texts = {
                key_of(prompt, answer["text"]): answer["text"]
                for answers in responses.values()
                for answer in answers
                if answer.get("score") is None
            }
            keys = [key for key in texts if self._scores.get(key) is None]
            for start in range(0, len(keys), answers_at_once):
                some = keys[start : start + answers_at_once]
                yield {"prompt": row, "answers": [texts[key] for key in some], "keys": some}

    def rows(self) -> Iterator[Fields]:
        """The rows of the file with the grades there are."""
        for row in self._rows():
            responses = row.pop("responses")
            prompt = _key(row)
            for answers in responses.values():
                for answer in answers:
                    if answer.get("score") is None:
                        answer["score"] = self._scores.get(key_of(prompt, answer["text"]))
            yield row | {"responses": responses}

    def _rows(self) -> Iterator[Fields]:
        for row in read_answers(self._data):
            if row["id"] in self._references:
                row["reference_answer"] = self._references[row["id"]]
            yield row


def _key(prompt: Fields) -> str:
    """Of the whole row: a grader may look at any of its fields."""
    return key_of(json.dumps(prompt, sort_keys=True))


class Labeller:
    """Runs a grader.

    Args:
        make: makes it, here and now.
    """

    def __init__(self, make: Callable[[], Grader]) -> None:
        self._grader = make()

    async def work(self, pieces: Iterable[Piece], record: Callable[[Entry], None]) -> None:
        """Grade pieces of `Labels.ungraded`, as many together as the grader takes."""
        places = asyncio.Semaphore(self._grader.calls_at_once)

        async def grade(piece: Piece) -> None:
            try:
                grades = await self._grader.grade(piece["prompt"], piece["answers"])
            finally:
                places.release()
            for key, grade in zip(piece["keys"], grades, strict=True):
                entry: Entry = {"key": key, "score": grade.score}
                record(entry if grade.error is None else entry | {"error": grade.error})

        with first_failure():
            async with asyncio.TaskGroup() as grading:
                for piece in pieces:
                    await places.acquire()
                    grading.create_task(grade(piece))

    async def aclose(self) -> None:
        """Give back what the grader holds."""
        await self._grader.aclose()

"""Rows of prompts with every field that they came with, whatever graders or people need of it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bestroute_export.rows import DataError, read_rows
from bestroute_export.schema import RowInvalid, prompt_row

Fields = dict[str, Any]
"""A row of a file of prompts, as docs/data.md describes it."""


def key_of(*texts: str) -> str:
    """What stands for these texts in a journal: 32 hex digits."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]


def read_prompts(path: Path) -> Iterator[Fields]:
    """Stream the prompts that answers are wanted for; rows with and without `responses` do.

    Args:
        path: a file of rows, or text (.txt) with a prompt per line. A line goes by a digest of
            itself and counts once, however often it is there.

    Raises:
        DataError: the file can't be read, or a row departs from the schema or repeats an id.
    """
    if path.suffix == ".txt":
        yield from _lines(path)
        return
    yield from _rows(path, {"responses": {}})


def read_answers(path: Path) -> Iterator[Fields]:
    """Stream the rows of a file of answers.

    Raises:
        DataError: the file can't be read, or a row departs from the schema or repeats an id.
    """
    yield from _rows(path, {})


def read_references(path: Path) -> dict[str, object]:
    """Read reference answers by the ids of their prompts.

    Args:
        path: a file of rows with `id` and `reference_answer`.

    Raises:
        DataError: the file can't be read, or a row lacks one of them.
    """
    references = {}
    for row in read_rows(path):
        match row.value:
            case {"id": str(identifier), "reference_answer": reference}:
                references[identifier] = reference
            case _:
                raise DataError(
                    f"{path}, {row.where}: {row.fault or 'write an id and a reference_answer'}"
                )
    return references


def _rows(path: Path, defaults: Fields) -> Iterator[Fields]:
    seen: set[str] = set()
    for row in read_rows(path):
        if row.fault or not isinstance(row.value, dict):
            raise DataError(f"{path}, {row.where}: {row.fault or 'not an object; write one'}")
        fields = defaults | row.value
        try:
            identifier = prompt_row(fields)["id"]
        except RowInvalid as error:
            raise DataError(f"{path}, {row.where}: {error.faults[0].message}") from error
        if identifier in seen:
            raise DataError(
                f'{path}, {row.where}: the id "{identifier}" is there twice; rename one'
            )
        seen.add(identifier)
        yield fields


def _lines(path: Path) -> Iterator[Fields]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    for line in dict.fromkeys(line.strip() for line in lines):
        if line:
            yield {"id": key_of(line)[:16], "prompt": line, "responses": {}}

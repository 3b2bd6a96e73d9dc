"""Rows of prompts in Parquet: the columns of JSON's fields, and back."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

BATCH = 16
"""Rows that are taken from a file at once: some MB where a prompt has 160 answers."""
GROUP = 256
"""Rows per row group of a written file: what the writer holds in memory."""
BUFFER = 1 << 20
"""Bytes read ahead per column, so that a file that is one large row group isn't read whole."""

EXTRA = "extra_json"
"""Column of the fields that have no column of their own, as one JSON object."""

_ANSWER = pyarrow.struct(
    {
        "text": pyarrow.string(),
        "score": pyarrow.float64(),
        "tokens": pyarrow.int64(),
        "input_tokens": pyarrow.int64(),
        "cost_usd": pyarrow.float64(),
        "finish_reason": pyarrow.string(),
        "reward": pyarrow.float64(),
    }
)
SCHEMA = pyarrow.schema(
    {
        "id": pyarrow.string(),
        "prompt": pyarrow.string(),
        "split": pyarrow.string(),
        "task": pyarrow.string(),
        "task_split": pyarrow.string(),
        "responses": pyarrow.map_(pyarrow.string(), pyarrow.list_(_ANSWER)),
        EXTRA: pyarrow.string(),
    }
)


def read_rows(path: Path, texts: bool) -> Iterator[dict[str, Any]]:
    """Read rows as JSON would have them: what is null in a column is absent in a row.

    Args:
        path: the file.
        texts: False leaves the texts of answers unread and gives "" for them.

    Raises:
        OSError: the file can't be read.
        pyarrow.ArrowException: the file is no Parquet.
    """
    with parquet.ParquetFile(path, buffer_size=BUFFER) as file:
        leaves = [file.schema.column(index).path for index in range(len(file.schema))]
        columns = [leaf for leaf in leaves if texts or not _is_text(leaf)]
        # Group by group: a reader of several keeps what it has read of each until it is closed.
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns):
                for values in batch.to_pylist():
                    yield _row(values, texts)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows of prompts.

    Raises:
        OSError: the file can't be written.
    """
    remaining = iter(rows)
    with parquet.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        while group := [_columns(row) for row in islice(remaining, GROUP)]:
            writer.write_batch(pyarrow.RecordBatch.from_pylist(group, SCHEMA))


def _is_text(leaf: str) -> bool:
    """A text by its path, such as responses.key_value.value.list.element.text."""
    return leaf.startswith("responses.") and ".list." in leaf and leaf.endswith(".text")


def _row(values: dict[str, Any], texts: bool) -> dict[str, Any]:
    row = {name: value for name, value in values.items() if value is not None}
    row.update(json.loads(row.pop(EXTRA, "{}")))
    if (responses := _by_model(row.pop("responses", None))) is not None:
        row["responses"] = responses
    if not texts and isinstance(responses, dict):
        for group in responses.values():
            for answer in filter(None, group):
                answer["text"] = ""
    return row


def _by_model(responses: Any) -> Any:
    """A map as a dict; what is neither map nor struct as it is, for the schema to refuse."""
    if isinstance(responses, list) and all(isinstance(entry, tuple) for entry in responses):
        return dict(responses)
    if isinstance(responses, dict):
        # Data frames store a struct, with a field for every LLM whether a row has it or not.
        return {model: group for model, group in responses.items() if group is not None}
    return responses


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    extra = {name: value for name, value in row.items() if name not in SCHEMA.names}
    return {
        **row,
        "responses": list(row["responses"].items()),
        EXTRA: json.dumps(extra, ensure_ascii=False) if extra else None,
    }

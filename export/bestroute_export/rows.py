"""Files of rows: JSON Lines, plain or gzipped, and Parquet, a few rows in memory at a time."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple


class DataError(ValueError):
    """A data file is missing, can't be read, or holds something else than docs/data.md describes.

    The message says where, and what to write instead.
    """


class Row(NamedTuple):
    """One row as it lies in the file, unchecked.

    Attributes:
        where: "line 3" or, in Parquet, "row 3"; counted from 1.
        value: what the row holds; None if it can't be decoded.
        fault: why it can't, else "".
    """

    where: str
    value: object
    fault: str = ""


def read_rows(path: Path, texts: bool = True) -> Iterator[Row]:
    """Read a file row by row.

    A row that can't be decoded is given with its fault, and reading goes on behind it.

    Args:
        path: the file; its name ends in .jsonl, .jsonl.gz or .parquet.
        texts: False leaves the texts of answers in a Parquet file unread and gives "" for them.

    Raises:
        DataError: the file can't be read, or its name has none of the endings.
    """
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path, texts)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_lines(path)
    else:
        raise _unknown_format(path)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file whole or not at all; it may replace the file that `rows` is being read from.

    Args:
        path: the file; its name ends in .jsonl, .jsonl.gz or .parquet.
        rows: of prompts, as JSON has them.

    Raises:
        DataError: the file can't be written, or its name has none of the endings.
    """
    with _replacing(path) as part:
        if path.name.endswith(".parquet"):
            # Imported where it is needed: it is slow to load, and most runs read JSON Lines only.
            from bestroute_export import parquet

            parquet.write_rows(part, rows)
        elif path.name.endswith(".jsonl.gz"):
            with gzip.open(part, "wb", compresslevel=6) as file:
                _write_lines(file, rows)
        elif path.name.endswith(".jsonl"):
            with part.open("wb") as file:
                _write_lines(file, rows)
        else:
            raise _unknown_format(path)


def _unknown_format(path: Path) -> DataError:
    return DataError(f"{path}: unknown format; name it .jsonl, .jsonl.gz or .parquet")


def _read_lines(path: Path) -> Iterator[Row]:
    number = 0
    try:
        # Bytes, so that one line of broken UTF-8 doesn't end the reading.
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield Row(f"line {number}", None, f"not a JSON object in UTF-8: {error}")
                else:
                    yield Row(f"line {number}", value)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Row(f"line {number + 1}", None, f"the file is damaged from here on: {error}")
    except OSError as error:
        raise DataError(f"{path} can't be read: {error}") from error


def _read_parquet(path: Path, texts: bool) -> Iterator[Row]:
    import pyarrow

    from bestroute_export import parquet

    try:
        for number, value in enumerate(parquet.read_rows(path, texts), 1):
            yield Row(f"row {number}", value)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} can't be read: {error}") from error


def _write_lines(file: IO[bytes] | gzip.GzipFile, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path} can't be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)

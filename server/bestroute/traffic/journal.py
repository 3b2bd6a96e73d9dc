"""Rows on their way into Parquet files: buffered, and written by one thread.

What a process holds when it is killed is lost: at most `rotate_seconds` worth, and `max_file_rows`
rows, of each kind.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import pyarrow
from pyarrow import parquet

from bestroute.traffic.directory import Directory

_log = logging.getLogger(__name__)

MOST_WAITING = 16_384
"""Rows that may wait for the thread; more are dropped."""
MOST_WAITING_CHARACTERS = 64 << 20
"""And characters of text in them."""

_PAUSE = 0.25
"""Seconds between two looks at what waits. Nobody wakes the thread: that would cost each call."""
_AT_ONCE = 32
"""Rows that are converted without letting go of the interpreter, in about 0.2 ms."""
_BREATH = 0.0005
"""Seconds after that in which the event loop has the interpreter; it would else wait for 5 ms."""
_MOST_BYTES = 32 << 20
"""Of rows that are kept for one file, before compression."""
_SHARE = 8
"""And at most one in so many of the bytes that all files may have."""
_RETRY = 10.0
"""Seconds until a file that could not be written is tried again."""
_LAST_WAIT = 10.0
"""Seconds that the end waits for the last files."""

Row = TypeVar("Row")


class Journal(Generic[Row]):
    """Rows of one kind; `put` is for the event loop, all else for the writer's thread.

    Args:
        kind: how its files' names begin.
        directory: where they are written.
        convert: makes a batch of some rows.
        max_rows: of a file.
        rotate_seconds: after which a file is written, however few rows there are.

    Attributes:
        kind: as given.
        written: rows in files.
    """

    def __init__(
        self,
        kind: str,
        directory: Directory,
        convert: Callable[[Sequence[Row]], pyarrow.RecordBatch],
        max_rows: int,
        rotate_seconds: float,
    ) -> None:
        self.kind, self._directory, self._convert = kind, directory, convert
        self._max_rows, self._rotate_seconds = max_rows, rotate_seconds
        self._waiting: deque[tuple[Row, int]] = deque()
        # Two counters, each written by one thread only.
        self._put, self._taken = 0, 0
        self._refused, self._lost, self.written = 0, 0, 0
        self._batches: list[pyarrow.RecordBatch] = []
        self._max_bytes = min(_MOST_BYTES, directory.max_bytes // _SHARE)
        self._rows, self._bytes = 0, 0
        self._due = 0.0
        self._failing = False

    @property
    def dropped(self) -> int:
        """Rows that are lost, since too many waited or no file could be written."""
        return self._refused + self._lost

    def put(self, row: Row, characters: int = 0) -> bool:
        """Take a row; False if it is dropped.

        Args:
            row: what to write.
            characters: of text in it.
        """
        full = len(self._waiting) >= MOST_WAITING
        if full or self._put - self._taken + characters > MOST_WAITING_CHARACTERS:
            self._refused += 1
            return False
        self._put += characters
        self._waiting.append((row, characters))
        return True

    def work(self, *, pause: float) -> None:
        """Convert what waits, and write the file that is due.

        Args:
            pause: seconds after every few rows, for other threads to run.
        """
        while self._waiting:
            while self._full:
                self._lose_oldest()  # could not be written
            number = min(_AT_ONCE, len(self._waiting), self._max_rows - self._rows)
            self._take([self._waiting.popleft() for _ in range(number)])
            if self._full and not self._failing:
                self.flush()
            time.sleep(pause)
        if self._batches and time.monotonic() >= self._due:
            self.flush()

    @property
    def _full(self) -> bool:
        return self._rows >= self._max_rows or self._bytes >= self._max_bytes

    def _take(self, taken: Sequence[tuple[Row, int]]) -> None:
        self._taken += sum(characters for _, characters in taken)
        try:
            batch = self._convert([row for row, _ in taken])
        except Exception:  # a thread that ends over one row would lose all that come after it
            _log.exception("lost rows of %s: %d", self.kind, len(taken))
            self._lost += len(taken)
            return
        if not self._batches:
            self._due = time.monotonic() + self._rotate_seconds
        self._batches.append(batch)
        self._rows += batch.num_rows
        self._bytes += batch.nbytes

    def flush(self) -> None:
        """Write what there is; if that fails, it is tried again later."""
        if not self._batches:
            return
        try:
            made = pyarrow.BufferOutputStream()
            table = pyarrow.Table.from_batches(self._batches).combine_chunks()
            parquet.write_table(table, made, compression="zstd")
            self._directory.write(self.kind, made.getvalue().to_pybytes())
        except Exception as error:  # whatever it is, the thread has to go on
            if not self._failing:
                _log.error("%s can't be written: %s; trying again", self.kind, error)
            self._failing = True
            self._due = time.monotonic() + _RETRY
            return
        if self._failing:
            _log.info("%s are written again", self.kind)
        self._failing = False
        self.written += self._rows
        self._batches, self._rows, self._bytes = [], 0, 0

    def _lose_oldest(self) -> None:
        batch = self._batches.pop(0)
        self._lost += batch.num_rows
        self._rows -= batch.num_rows
        self._bytes -= batch.nbytes

    def end(self) -> None:
        """Write all that is left; what can't be is lost."""
        self.work(pause=0.0)
        self.flush()
        if self._rows:
            _log.error("lost rows of %s: %d", self.kind, self._rows)
            self._lost += self._rows


@asynccontextmanager
async def writing(*journals: Journal[Any]) -> AsyncIterator[None]:
    """Have a thread write journals while the block lasts, and what is left after it."""
    ended = threading.Event()

    def write() -> None:
        while not ended.wait(_PAUSE):
            for journal in journals:
                journal.work(pause=_BREATH)
        for journal in journals:
            journal.end()

    # A daemon: a disk that hangs must not keep the process from ending.
    thread = threading.Thread(target=write, name="decision-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        await asyncio.to_thread(thread.join, _LAST_WAIT)
        if thread.is_alive():
            _log.error("the decision log's disk hangs; what was not written yet is lost")

"""The append-only file that makes a run resumable: one line per finished piece of work."""

import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bestroute_export.rows import DataError

SYNC_EVERY = 1.0
"""Seconds between two fsyncs, at least. What a crash of the machine can cost; a killed process
loses nothing that was appended."""

Entry = dict[str, Any]


class JournalInvalid(DataError):
    """The journal belongs to another run, is in use, is damaged or can't be written."""


class Journal:
    """Entries in the order they were appended; a context manager that holds the file for itself.

    The first line says what the entries depend on. A last line that was torn when its writer was
    killed is cut off.

    Args:
        path: the file; made if missing.
        settings: must be what the journal was begun with.

    Raises:
        JournalInvalid: it was begun with other settings, another process has it open, or it can't
            be opened.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: nothing is left behind that a later write could put after a torn line.
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise JournalInvalid(f"{path} can't be opened: {error}; name another output") from error
        try:
            self._hold()
            self._drop_torn_line()
            self._begin(settings)
        except BaseException:
            self._file.close()
            raise
        # Of its own, because reading moves the position.
        self._reader = path.open("rb")
        self._unsynced = threading.Event()
        self._closing = threading.Event()
        self._failure: OSError | None = None
        self._syncing = threading.Thread(target=self._sync, name="journal", daemon=True)
        self._syncing.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._unsynced.set()
        self._syncing.join()
        self._reader.close()
        self._file.close()
        if error is None:
            self._check()

    def append(self, entry: Entry) -> int:
        """Add an entry; once this returns, killing the process can't lose it.

        Returns:
            Where it lies, for `read`.

        Raises:
            JournalInvalid: the disk refused this entry, or failed on one before.
        """
        self._check()
        line, place = _line(entry), self._file.tell()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._failure = error
        self._check()
        self._unsynced.set()
        return place

    def read(self, place: int) -> Entry:
        """The entry that lies there."""
        self._reader.seek(place)
        return self._parsed(self._reader.readline(), f"byte {place}")

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """Every entry there is now, with its place, oldest first.

        Raises:
            JournalInvalid: a line is damaged.
        """
        with self.path.open("rb") as file:
            place = len(file.readline())
            for number, line in enumerate(file, 2):
                yield place, self._parsed(line, f"line {number}")
                place += len(line)

    def _hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalInvalid(
                f"{self.path} is being written by another process; wait for it, or end it"
            ) from None

    def _drop_torn_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        whole = end
        while whole:
            start = max(0, whole - (1 << 16))
            self._file.seek(start)
            newline = self._file.read(whole - start).rfind(b"\n")
            if newline >= 0:
                whole = start + newline + 1
                break
            whole = start
        if whole < end:
            self._file.truncate(whole)

    def _begin(self, settings: Mapping[str, object]) -> None:
        begun = _line({"settings": settings})
        self._file.seek(0)
        first = self._file.readline()
        if not first:
            self._file.write(begun)
        elif first != begun:
            raise JournalInvalid(
                f"{self.path} was begun with other settings: {first.decode(errors='replace')}"
                f"and not {begun.decode()}name another output, or delete the journal"
            )
        self._file.seek(0, os.SEEK_END)

    def _sync(self) -> None:
        try:
            while not self._closing.is_set():
                self._unsynced.wait()
                self._unsynced.clear()
                os.fsync(self._file.fileno())
                self._closing.wait(SYNC_EVERY)
            os.fsync(self._file.fileno())
        except OSError as error:
            self._failure = error

    def _check(self) -> None:
        if self._failure is not None:
            raise JournalInvalid(
                f"{self.path} can't be written: {self._failure}; what it holds is kept, "
                "make room and run the same again"
            ) from self._failure

    def _parsed(self, line: bytes, where: str) -> Entry:
        try:
            entry: Entry = json.loads(line)
        except ValueError as error:
            raise JournalInvalid(
                f"{self.path}, {where}: damaged ({error}); delete that line and run the same again"
            ) from error
        return entry


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"

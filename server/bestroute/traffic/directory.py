"""A directory of files that are complete or absent, and in bounds together.

A file is written under another name and renamed. All processes that write there keep the bounds
together, by a lock on a file.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

_PATIENCE = 5.0
"""Seconds that a process waits for others to write; one of them may be stopped, or hang."""

_LOCK = ".lock"
_FILE = re.compile(r"[a-z]+-\d{8}T\d{12}-\d+-\d+\.parquet")
_PART = re.compile(rf"\.{_FILE.pattern}\.part")
"""A file before it is complete; nothing else in the directory is touched."""


class Directory:
    """Where files are written, in bounds that all who write there keep together.

    Args:
        path: is made if it is missing, for its owner only.
        max_bytes: of all files together.

    Raises:
        OSError: it can't be made, or nothing can be written there.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path, self.max_bytes = path, max_bytes
        self._number = count()
        with self._alone():
            pass

    def write(self, kind: str, data: bytes) -> None:
        """Write a file, after deleting the oldest that leave no room for it.

        Raises:
            OSError: it can't be written; nothing of it is left.
        """
        if len(data) > self.max_bytes:
            raise OSError(f"{len(data)} bytes are more than the {self.max_bytes} of all files")
        now = datetime.now(UTC)
        name = f"{kind}-{now:%Y%m%dT%H%M%S%f}-{os.getpid()}-{next(self._number)}.parquet"
        with self._alone():
            self._make_room(len(data))
            self._put(name, data)

    def secret(self, name: str) -> bytes:
        """32 random bytes, the same for all who write here and at every start.

        Raises:
            OSError: they can't be read or written.
        """
        path = self.path / name
        with self._alone():
            if not path.exists():
                self._put(name, os.urandom(32))
            return path.read_bytes()

    def _put(self, name: str, data: bytes) -> None:
        """Write a file, complete or not at all, for its owner only."""
        part = self.path / f".{name}.part"
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.rename(self.path / name)
        finally:
            part.unlink(missing_ok=True)
        directory = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _make_room(self, size: int) -> None:
        files = []
        for entry in os.scandir(self.path):
            if _PART.fullmatch(entry.name):
                os.unlink(entry)  # of one who died: nobody else is writing now
            elif _FILE.fullmatch(entry.name):
                found = entry.stat()
                files.append((found.st_mtime_ns, entry.name, found.st_size))
        total = size + sum(each for _, _, each in files)
        for _, name, freed in sorted(files):
            if total <= self.max_bytes:
                break
            (self.path / name).unlink(missing_ok=True)
            total -= freed

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out; the lock goes with the process that holds it."""
        lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            end = time.monotonic() + _PATIENCE
            while not _locked(lock):
                if time.monotonic() > end:
                    raise TimeoutError(f"another process has held {self.path / _LOCK} for long")
                time.sleep(0.01)
            yield
        finally:
            os.close(lock)


def _locked(file: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False

"""What is read again and again, from a file or a URL, and kept where that fails."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from bestroute.config import ConfigInvalid

_log = logging.getLogger(__name__)

T = TypeVar("T")

_SETTLES = 0.05
"""Seconds, of a file: it may be seen half written, with some of its keys missing."""


class Refreshed(Generic[T]):
    """A value that follows its source; where that is away or wrong, the last good one stays.

    Args:
        what: names the source, in the log.
        read: reads it.
        parse: what it says; raises ConfigInvalid.
        every: seconds from one reading to the next.
        at_most_every: seconds between two readings, however often they are asked for.
        settles: seconds that a change has to last before it is believed; 0: none.

    Attributes:
        value: as it was last read; once `start` has returned.
        changes: how often it has changed.
    """

    value: T

    def __init__(
        self,
        what: str,
        read: Callable[[], Awaitable[bytes]],
        parse: Callable[[bytes], T],
        *,
        every: float,
        at_most_every: float = 0.0,
        settles: float = 0.0,
    ) -> None:
        self._settles = settles
        self._what, self._read, self._parse = what, read, parse
        self._every, self._at_most_every = every, at_most_every
        self._text: bytes | None = None
        self._complaint: str | None = None
        self._last = -float("inf")
        self._asked, self._looked = asyncio.Event(), asyncio.Event()
        self._looking = False
        self.changes = 0

    async def start(self) -> None:
        """Read it for the first time.

        Raises:
            ConfigInvalid: it can't be had.
        """
        self._last = time.monotonic()
        try:
            await self._take()
        except (OSError, TimeoutError) as error:
            raise ConfigInvalid(f"{self._what} can't be read: {_words(error)}") from error
        except ConfigInvalid as error:
            raise ConfigInvalid(f"{self._what}: {error}") from error

    async def follow(self) -> None:
        """Read it again and again, for as long as it is wanted; never fails."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await self._asked.wait()
            self._looking = True
            await self._look()
            self._looking = False
            self._asked.clear()
            self._looked.set()
            self._looked = asyncio.Event()

    async def look(self) -> None:
        """Have it read before its time, unless it was lately; returns when that is done.

        Whoever asks may be cancelled: the reading is not.
        """
        if not self._looking:
            if time.monotonic() - self._last < self._at_most_every:
                return
            self._asked.set()
        await self._looked.wait()

    async def _look(self) -> None:
        self._last = time.monotonic()
        try:
            await self._take()
        except Exception as error:  # whatever it is, callers must not be shut out by it
            if (complaint := _words(error)) != self._complaint:
                _log.warning("%s: %s; what it said before stays", self._what, complaint)
            self._complaint = complaint
        else:
            if self._complaint is not None:
                _log.info("%s is well again", self._what)
            self._complaint = None

    async def _take(self) -> None:
        text = await self._read()
        while text != self._text and self._settles:
            await asyncio.sleep(self._settles)
            former, text = text, await self._read()
            if text == former:
                break
        if text != self._text:
            self.value, self._text = self._parse(text), text
            self.changes += 1


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def followed_file(
    what: str, file: Path, parse: Callable[[bytes], T], *, every: float
) -> Refreshed[T]:
    """A value that follows a file."""

    async def read() -> bytes:
        return await asyncio.to_thread(file.read_bytes)

    return Refreshed(f"{what} {file}", read, parse, every=every, settles=_SETTLES)

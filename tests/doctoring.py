"""Runs `bestroute doctor` in this process, beside the servers that it examines."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import pytest

from bestroute.cli import main

NOBODY = "127.0.0.1:1"
"""Nothing listens here: the port is reserved."""


class Told(NamedTuple):
    """How it ended and what it said."""

    code: int
    out: str
    err: str

    def line(self, level: str, words: str) -> str:
        """The only finding of that level that has the words."""
        lines = [line for line in (self.out + self.err).splitlines() if line[:4].strip() == level]
        found = [line for line in lines if words in line]
        assert len(found) == 1, f"{words!r} in {self.out}{self.err}"
        return found[0]

    def levels(self, level: str) -> list[str]:
        """All findings of a level."""
        return [line for line in (self.out + self.err).splitlines() if line[:4].strip() == level]


Doctor = Callable[..., Awaitable[Told]]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    async def run(*arguments: object) -> Told:
        code = await asyncio.to_thread(main, ["doctor", *map(str, arguments)])
        return Told(code, *capsys.readouterr())

    return run

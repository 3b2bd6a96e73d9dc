"""The decision log: which decisions are kept, and where they and their feedback go."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bestroute.config import ConfigInvalid
from bestroute.config import DecisionLog as LogSettings
from bestroute.traffic.noted import Noted, Told

if TYPE_CHECKING:  # pyarrow need be there only where a log is kept
    from bestroute.traffic.journal import Journal

KEY = "prompt.key"
"""File of the secret that digests of prompts are made with."""


class DecisionLog:
    """Made by `open_log`; belongs to the event loop, and never holds it up."""

    def __init__(
        self, settings: LogSettings, decisions: "Journal[Noted]", feedback: "Journal[Told]"
    ) -> None:
        self._sample, self._answers = settings.sample, settings.answers == "keep"
        self._decisions, self._feedback = decisions, feedback

    def wants(self) -> bool:
        """Whether the next decision is in the sample."""
        return self._sample == 1 or random.random() < self._sample

    def keep(self, noted: Noted) -> bool:
        """Take a decision; False if it is dropped, as too many wait to be written."""
        characters = len(noted.prompt.text)
        if self._answers:
            characters += sum(len(each.text) for each in noted.candidates or ())
        return self._decisions.put(noted, characters)

    def tell(self, feedback: Told) -> bool:
        """Take feedback; False if it is dropped, as too much waits to be written."""
        return self._feedback.put(feedback)

    def rows(self) -> dict[str, tuple[int, int]]:
        """How many rows are in files, and how many are lost, by kind."""
        return {
            each.kind: (each.written, each.dropped) for each in (self._decisions, self._feedback)
        }


@asynccontextmanager
async def open_log(settings: LogSettings) -> AsyncIterator[DecisionLog | None]:
    """Keep a log while the block lasts, if there is to be one; write what is left after it.

    Raises:
        ConfigInvalid: pyarrow is missing, or the directory can't be used.
    """
    if settings.directory is None:
        yield None
        return
    try:
        import pyarrow

        from bestroute.traffic.journal import writing
    except ImportError as error:
        raise ConfigInvalid(
            f"decision_log.directory: a decision log needs pyarrow, which can't be imported "
            f"({error}); run `pip install 'bestroute[log]'`, or leave decision_log.directory away"
        ) from error
    pyarrow.array(
        [""]
    )  # imports pandas where that is installed: half a second that no call may see
    try:
        decisions, feedback = await asyncio.to_thread(_journals, settings, settings.directory)
    except OSError as error:
        raise ConfigInvalid(
            f"decision_log.directory = {str(settings.directory)!r}: nothing can be written there "
            f"({error}); name a directory that this process may write into"
        ) from error
    async with writing(decisions, feedback):
        yield DecisionLog(settings, decisions, feedback)


def _journals(settings: LogSettings, path: Path) -> "tuple[Journal[Noted], Journal[Told]]":
    from bestroute.traffic import rows
    from bestroute.traffic.directory import Directory
    from bestroute.traffic.journal import Journal
    from bestroute.traffic.schema import DECISIONS, FEEDBACK

    directory = Directory(path, settings.max_total_bytes)
    key, callers = directory.secret(KEY), settings.callers
    prompts, answers = settings.prompts == "keep", settings.answers == "keep"
    bounds = settings.max_file_rows, settings.rotate_seconds
    as_rows = rows.decisions(key, prompts=prompts, answers=answers, callers=callers)
    return (
        Journal(DECISIONS, directory, as_rows, *bounds),
        Journal(FEEDBACK, directory, rows.feedback(callers=callers), *bounds),
    )

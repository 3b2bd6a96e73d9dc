"""Whether a network works: what its runs say, and what it says to a question that it must answer.

A run may fail because of what was in it. So after one a probe is run, an input that is known to
work, and only if that fails too, again and again, the network is at fault. Until it works it is
probed, so that it is found well without anybody's request.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)

_FAILURES = 3
"""In a row, of which all but the first are probes: that many may be chance."""
_SOON, _LATER = 0.2, 0.5
"""Seconds between probes until a fault is certain, and then until it is over."""
_PATIENCE = 1.0
"""Seconds after which a probe that isn't back counts as failed."""


class Vitals:
    """Watches one network.

    Args:
        probe: runs the input that is known to work, and raises if the network doesn't.
        name: of the network, for the log.

    Attributes:
        fault: why the network answers nobody now; None if it does.
    """

    def __init__(self, probe: Callable[[], Awaitable[None]], name: str) -> None:
        self._probe, self._name = probe, name
        self._failures = 0
        self._watching: asyncio.Task[None] | None = None
        self.fault: str | None = None

    def succeeded(self) -> None:
        """A run gave what it should."""
        if self._failures:
            self._failures, self.fault = 0, None

    def failed(self, tasks: asyncio.TaskGroup) -> None:
        """A run failed.

        Args:
            tasks: where the network is probed from now on, until it works.
        """
        self._failures += 1
        if self._watching is None:
            self._watching = tasks.create_task(self._watch())

    def close(self) -> None:
        """Probe no more."""
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        probes = 0
        while self._failures:
            probe = asyncio.ensure_future(self._probe())
            try:
                await asyncio.wait([probe], timeout=_PATIENCE)
                if not probe.done():
                    self.fault = "does not come back"
                    await asyncio.wait([probe])
            finally:
                probe.cancel()
            error = probe.exception()
            if error is None:
                self.succeeded()
                break
            probes += 1
            if probes + 1 >= _FAILURES and self.fault is None:
                self.fault = f"fails: {error!r}"
                _log.error(
                    "%s: an input that is known to work fails as well", self._name, exc_info=error
                )
            await asyncio.sleep(_LATER if self.fault else _SOON)
        self._watching = None

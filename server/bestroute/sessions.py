"""Remembers where sessions stand, a bounded number of them for a bounded time.

In memory, and per process: a session that another replica was asked about is new here. Nothing is
kept of what was said, and ids only as digests.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from bestroute.addresses import machine
from bestroute.config import Sessions as Settings
from bestroute.session import Past, Session, Standing


class Sessions:
    """The sessions that were asked about lately; belongs to the event loop.

    Args:
        settings: how many, for how long, and what they do.
        clock: seconds.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._pasts: OrderedDict[bytes, Past] = OrderedDict()

    def change(self, settings: Settings) -> None:
        """Have other settings hold from now on."""
        self._settings = settings

    def standing(self, caller: str, session: Session) -> Standing:
        """Where a caller's session stands."""
        settings, now = self._settings, self._clock()
        past = self._pasts.get(_key(caller, session))
        if past is None or now - past.at > settings.idle_seconds:
            return Standing(session.sticky, settings.momentum)
        warm = now - past.at <= settings.cache_seconds
        return Standing(session.sticky, settings.momentum, past, past.tokens if warm else 0)

    def ran(self, caller: str, session: Session, past: Past) -> None:
        """Remember a turn that ran, and how the session goes on from it.

        Of turns that ran at the same time the one that ended last counts, and each is counted.
        """
        settings, now = self._settings, self._clock()
        key = _key(caller, session)
        other = self._pasts.pop(key, None)
        if other is not None and now - other.at <= settings.idle_seconds:
            past = replace(past, turns=max(past.turns, other.turns + 1))
        self._pasts[key] = replace(past, at=now)
        while True:  # the new one itself stays: it is not idle, and one may always be kept
            oldest = next(iter(self._pasts.values()))
            if len(self._pasts) <= settings.max_sessions and (
                now - oldest.at <= settings.idle_seconds
            ):
                return
            self._pasts.popitem(last=False)

    def __len__(self) -> int:
        return len(self._pasts)


def _key(caller: str, session: Session) -> bytes:
    """What stands for a caller's session; with the caller's length, so that no two read alike.

    Of callers who prove nothing only the machine counts, as they may connect anew under way.
    """
    name = machine(caller)
    text = f"{len(name)} {name}{session.id}"
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()

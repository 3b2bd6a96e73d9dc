"""Settings of conversations that are decided turn by turn."""

from typing import Annotated

from pydantic import Field

from bestroute.config.base import Count, Seconds, Section


class Sessions(Section):
    """Sessions, which callers name.

    Attributes:
        max_sessions: that are remembered; the one not asked about the longest goes first.
        idle_seconds: after which one is forgotten.
        cache_seconds: for which a provider is expected to keep a prompt in its cache.
        momentum: how much a turn that looks easier than those before is still taken for as hard:
            0, not at all; 1, for ever.
    """

    max_sessions: Count = 100_000
    idle_seconds: Seconds = 3600.0
    cache_seconds: Seconds = 300.0
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.5

"""Settings of who may call, and how much."""

from typing import Annotated

from pydantic import Field

from bestroute.config.base import Section


class Security(Section):
    """Transport security and authentication."""


class CallerLimits(Section):
    """What one caller may have.

    Attributes:
        weight: its share of a full server, beside others of weight 1.
    """

    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0

"""What every section of the configuration is made of."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Delay = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ConfigInvalid(Exception):
    """The configuration can't be used; one line per fault, each says what to write instead."""


class Section(BaseModel):
    """A table of the configuration: frozen, and without keys it doesn't know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def instead(wrong: str, known: Mapping[str, Any] | list[str]) -> str:
    """Say what to write instead of `wrong`, as the end of a sentence."""
    close = difflib.get_close_matches(wrong, list(known), n=1)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known: {', '.join(known)}" if known else "; none is defined"

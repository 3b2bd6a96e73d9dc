"""Settings by which operators change, under load, what is decided and answered."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from bestroute.config.base import Section


class Operations(Section):
    """What is overruled for now.

    Attributes:
        shadow: decide, but always answer with the reference; what would have been saved is counted
            and logged.
        disabled_arms: arms that are never chosen: "MODEL" for all of a model, "MODEL:SAMPLES" for
            one. The reference can't be among them.
    """

    shadow: bool = False
    disabled_arms: tuple[Annotated[str, Field(min_length=1)], ...] = ()


class Canary(Section):
    """A second bundle that serves a share of the traffic, to be compared with the first.

    Attributes:
        bundle: bundle directory; unset: none.
        bundle_sha256: digest that its manifest.json must have.
        share: of the requests, or of the sessions where requests have one.
    """

    bundle: Path | None = None
    bundle_sha256: Annotated[str | None, Field(pattern="^[0-9a-f]{64}$")] = None
    share: Annotated[float, Field(gt=0, lt=1)] = 0.05

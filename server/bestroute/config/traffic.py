"""Settings of what is kept of the traffic to learn from."""

from pathlib import Path

from bestroute.config.base import Section


class DecisionLog(Section):
    """The log of decisions.

    Attributes:
        directory: where its Parquet files are written; unset: nothing is kept.
    """

    directory: Path | None = None

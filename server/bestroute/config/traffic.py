"""Settings of what is kept of the traffic to learn from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bestroute.config.base import Count, Seconds, Section


class DecisionLog(Section):
    """The log of decisions.

    Attributes:
        directory: where its Parquet files are written; unset: nothing is kept.
        prompts: hash keeps a digest of each, by a secret that lies in the directory: enough to see
            which prompts are the same. keep keeps their text, which training needs.
        answers: drop keeps of a Generate what it took, but no text; keep keeps the texts as well.
        callers: whether the callers' names are kept.
        sample: share of the decisions that are kept.
        max_file_rows: most rows of a file.
        rotate_seconds: after which a file is written, however few rows it has. A process that is
            killed loses at most so much, of decisions and of feedback.
        max_total_bytes: of all files together; the oldest are deleted first.
    """

    directory: Path | None = None
    prompts: Literal["hash", "keep"] = "hash"
    answers: Literal["drop", "keep"] = "drop"
    callers: bool = False
    sample: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_file_rows: Count = 10_000
    rotate_seconds: Seconds = 300.0
    max_total_bytes: Annotated[int, Field(ge=100_000)] = 1 << 30

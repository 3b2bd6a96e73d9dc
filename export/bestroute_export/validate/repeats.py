"""Ids and prompts that come twice, and what leaks from one split into another by it."""

from collections import Counter
from hashlib import blake2b

from bestroute_export.data import HELDOUT, split_of
from bestroute_export.schema import PairRow, PromptRow
from bestroute_export.validate.findings import Findings


class Repeats:
    """Remembers where each id, prompt and task was first met.

    Attributes:
        splits: rows by split.
    """

    def __init__(self) -> None:
        self.splits: Counter[str] = Counter()
        self._ids: dict[str, str] = {}
        self._prompts: dict[bytes, tuple[str, str]] = {}
        self._tasks: dict[str, tuple[str, bool]] = {}

    def prompt(self, where: str, row: PromptRow, findings: Findings) -> None:
        """Compare a row of prompts with those before it."""
        first = self._ids.setdefault(row["id"], where)
        if first != where:
            findings.wrong(
                "duplicate id", f"{where}: {row['id']!r} is also the id of {first}: rename one"
            )
        if (first := self._place(where, row, findings)) != where:
            findings.notable(
                "duplicate prompt", f"{where}: has the prompt of {first}: merge their answers"
            )
        if (task := row.get("task")) is not None:
            heldout = row.get("task_split") == HELDOUT
            first, before = self._tasks.setdefault(task, (where, heldout))
            if before != heldout:
                findings.wrong(
                    "task partly held out",
                    f"{where}: {task!r} is {'' if heldout else 'not '}held out here, unlike in "
                    f"{first}: hold out all of its rows or none",
                )

    def pair(self, where: str, row: PairRow, findings: Findings) -> None:
        """Compare a row of pairs with those before it; many may share a prompt."""
        self._place(where, row, findings)

    def _place(self, where: str, row: PromptRow | PairRow, findings: Findings) -> str:
        """Count the row's split, and say where its prompt was first met."""
        split = row.get("split") or split_of(row["prompt"])
        self.splits[split] += 1
        first, before = self._prompts.setdefault(_key(row["prompt"]), (where, split))
        if before != split:
            findings.wrong(
                "prompt in two splits",
                f"{where}: its prompt is in {split}, and in {before} at {first}: "
                "give both rows the same split",
            )
        return first


def _key(prompt: str) -> bytes:
    """Equal for prompts that differ in white space only."""
    return blake2b(" ".join(prompt.split()).encode(), digest_size=16).digest()

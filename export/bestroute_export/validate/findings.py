"""Problems with data: counted by kind, the first few of each with their place."""

from dataclasses import dataclass

EXAMPLES = 5
"""Problems of one kind that are kept word for word; the others are counted."""


@dataclass(frozen=True)
class Problem:
    """All problems of one kind.

    Attributes:
        kind: what they have in common, such as "duplicate id".
        wrong: must be mended; False if the data can be used as it is.
        count: how many there are.
        examples: the first ones, each with its place and what to do.
    """

    kind: str
    wrong: bool
    count: int
    examples: tuple[str, ...]


class Findings:
    """Collects problems in memory bounded by the number of kinds."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, bool], int] = {}
        self._examples: dict[tuple[str, bool], list[str]] = {}

    def wrong(self, kind: str, message: str) -> None:
        """Add something that must be mended."""
        self._add((kind, True), message)

    def notable(self, kind: str, message: str) -> None:
        """Add something that the data can be used in spite of."""
        self._add((kind, False), message)

    def _add(self, key: tuple[str, bool], message: str) -> None:
        self._counts[key] = self._counts.get(key, 0) + 1
        examples = self._examples.setdefault(key, [])
        if len(examples) < EXAMPLES:
            examples.append(message)

    def problems(self) -> tuple[Problem, ...]:
        """By kind: what is wrong first, then in the order met."""
        found = [
            Problem(kind, wrong, count, tuple(self._examples[kind, wrong]))
            for (kind, wrong), count in self._counts.items()
        ]
        return tuple(sorted(found, key=lambda problem: not problem.wrong))

"""What was found, and how it is told."""

import sys
from enum import StrEnum
from typing import NamedTuple


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "WARN"
    FAIL = "FAIL"


class Finding(NamedTuple):
    """One thing that was looked at; where it isn't well, the text says what to do."""

    level: Level
    text: str


def ok(text: str) -> Finding:
    """It is well."""
    return Finding(Level.OK, text)


def warn(text: str) -> Finding:
    """It works, but likely not as it was meant."""
    return Finding(Level.WARN, text)


def fail(text: str) -> Finding:
    """It doesn't work."""
    return Finding(Level.FAIL, text)


class Report:
    """Keeps what was found, and prints it: what is well to stdout, what is not to stderr.

    Args:
        well: whether to print what is well.
        unwell: whether to print what isn't.

    Attributes:
        findings: all of them.
    """

    def __init__(self, *, well: bool, unwell: bool) -> None:
        self._well, self._unwell = well, unwell
        self.findings: list[Finding] = []

    def add(self, finding: Finding) -> None:
        """Keep one, and print it."""
        self.findings.append(finding)
        level, text = finding
        if level is Level.OK:
            if self._well:
                print(f"{level:<4}  {text}", flush=True)
        elif self._unwell:
            print(f"{level:<4}  {text}", file=sys.stderr, flush=True)

    @property
    def failed(self) -> bool:
        """Whether something doesn't work."""
        return any(finding.level is Level.FAIL for finding in self.findings)

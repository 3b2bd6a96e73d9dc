"""Numbers and tables as Markdown."""

from collections.abc import Iterable, Iterator, Sequence

from bestroute_export.evaluate import Interval


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table."""
    yield _row(header)
    yield _row(["---"] * len(header))
    yield from map(_row, rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def points(share: float) -> str:
    """A fraction in per cent, without the sign."""
    return f"{round(100 * share, 1) + 0.0:.1f}"  # -0.0 + 0.0 is 0.0


def percent(share: float) -> str:
    """A fraction in per cent."""
    return f"{points(share)} %"


def interval(figure: Interval) -> str:
    """A fraction in per cent with its interval."""
    return f"{percent(figure.value)} [{100 * figure.low:.0f}, {100 * figure.high:.0f}]"


def anchor(title: str) -> str:
    """What a heading can be linked by."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")

"""What the terminal shows."""

import math
import sys
from typing import TYPE_CHECKING, TextIO

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPE_WIDTH = 1000
"""Columns where no terminal sets a width: lines are for programs there and must not wrap."""


def console(file: TextIO) -> "Console":
    """A console on stdout or stderr; without colour and wrapping where it isn't a terminal."""
    from rich.console import Console

    width = None if file.isatty() else _PIPE_WIDTH
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)


def table(*columns: str) -> "Table":
    """A table without rules, readable in a pipe too; columns after the first are numbers."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    return made


def facts(*rows: tuple[str, str]) -> "Table":
    """Names and what they are, below each other."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(style="dim")
    made.add_column(overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def print_json(message: Message) -> None:
    """Print a message as one line of JSON, with the proto's own field names and all its fields."""
    line = MessageToJson(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        ensure_ascii=False,
        indent=None,
    )
    print(line, flush=True)


def complain(message: str, *, code: int) -> int:
    """Print what went wrong on stderr; gives back the exit code."""
    print(f"bestroute: {message}", file=sys.stderr)
    return code


def usd(amount: float) -> str:
    """An amount of money, cents at least, three significant digits where it is less."""
    if not amount:
        return "$0"
    return f"${amount:.{max(2, 2 - math.floor(math.log10(abs(amount))))}f}"


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def percent(fraction: float) -> str:
    """A fraction as per cent."""
    return f"{100 * fraction:.1f} %"


def saved(cost: float, reference_cost: float) -> str:
    """How much less (or more) than the reference that is; empty where that costs nothing."""
    if not reference_cost:
        return ""
    saving = 1 - cost / reference_cost
    return f"{percent(abs(saving))} {'less' if saving >= 0 else 'more'}"


def milliseconds(seconds: float) -> str:
    """A short time."""
    return f"{1000 * seconds:.2f} ms"

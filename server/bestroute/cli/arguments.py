"""Arguments that several commands take."""

import argparse
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # What `add_subparsers` returns; it has no public name.
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

ADDRESS = "127.0.0.1:50051"
"""Where the service listens by default."""
MAX_UINT32 = 2**32 - 1
SESSION = ("session", "sticky")
POLICY = (
    "match_threshold",
    "max_quality_drop",
    "min_cost_saving",
    "allowed_models",
    "max_samples",
    "max_cost_usd",
)


def described(description: str, *examples: str) -> dict[str, Any]:
    """Arguments for a parser whose help starts with a description and ends with examples."""
    return {
        "description": textwrap.fill(description, 80),
        "epilog": "examples:\n" + "\n".join(f"  {line}" for line in examples),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def text(value: str) -> str:
    """Text that a message can carry.

    Raises:
        argparse.ArgumentTypeError: the shell's bytes are not UTF-8.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("this is not UTF-8 text") from None
    return value


def prompt(value: str) -> str:
    """The prompt, or with `-` all of stdin without the newline at its end.

    Raises:
        argparse.ArgumentTypeError: it is not UTF-8.
    """
    if value != "-":
        return text(value)
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError("stdin is not UTF-8 text") from None


def integer(low: int, high: int) -> Callable[[str], int]:
    """A parser of integers in [low, high]."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{value!r} is not an integer") from None
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{number} is not in {low} ... {high}")
        return number

    return parse


def seconds(value: str) -> float:
    """A time span.

    Raises:
        argparse.ArgumentTypeError: it is not a positive, finite number.
    """
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of seconds above 0")
    return number


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Declare the prompt."""
    parser.add_argument("prompt", metavar="PROMPT", type=prompt, help="the prompt; - reads stdin")


def add_connection(parser: argparse.ArgumentParser, *, timeout: float) -> None:
    """Declare where the service is and how long it may take."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        default=ADDRESS,
        help=f"where the service listens (default: {ADDRESS})",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=timeout,
        help="how long it may take (default: %(default)g)",
    )
    _add_security(parser)


def _add_security(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("security", "default: in the clear, and without a token")
    group.add_argument(
        "--tls", action="store_true", help="connect by TLS, trusting gRPC's own authorities"
    )
    group.add_argument(
        "--tls-ca", metavar="FILE", type=Path, help="connect by TLS, trusting these authorities"
    )
    group.add_argument("--tls-cert", metavar="FILE", type=Path, help="show this certificate (mTLS)")
    group.add_argument("--tls-key", metavar="FILE", type=Path, help="its private key")
    group.add_argument(
        "--tls-server-name",
        metavar="NAME",
        help="whom the server's certificate has to name (default: the host in --address)",
    )
    group.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        help="holds an API key or a JWT to send (default: what BESTROUTE_TOKEN holds)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare machine-readable output."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per line and nothing else"
    )


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Declare the target and the limits of a decision."""
    group = parser.add_argument_group("policy", "default: what the bundle was calibrated for")
    target = group.add_mutually_exclusive_group()
    target.add_argument(
        "--match-threshold",
        metavar="P",
        type=float,
        help="take the cheapest arm that matches the reference with at least this probability",
    )
    target.add_argument(
        "--max-quality-drop",
        metavar="FRACTION",
        type=float,
        help="save as much as a quality drop within this fraction allows",
    )
    target.add_argument(
        "--min-cost-saving",
        metavar="FRACTION",
        type=float,
        help="lose as little quality as a saving of this fraction allows",
    )
    group.add_argument(
        "--allow",
        metavar="MODEL",
        dest="allowed_models",
        action="append",
        type=text,
        help="choose only among these models; may be repeated",
    )
    group.add_argument(
        "--max-samples",
        metavar="N",
        type=integer(1, MAX_UINT32),
        help="draw at most this many samples",
    )
    group.add_argument(
        "--max-cost",
        metavar="USD",
        dest="max_cost_usd",
        type=float,
        help="highest estimated cost of the request",
    )


def add_session(parser: argparse.ArgumentParser) -> None:
    """Declare what the request is a turn of."""
    group = parser.add_argument_group("session", "default: the request stands alone")
    group.add_argument(
        "--session",
        metavar="ID",
        type=text,
        help="the conversation that this is a turn of, by any name",
    )
    group.add_argument(
        "--sticky",
        action="store_const",
        const=True,
        help="stay with the session's model for as long as it may be chosen",
    )


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the named arguments that were given, for which parsers have the default None."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}

"""`bestroute key`: a new API key for a caller."""

import argparse
import sys
from typing import TYPE_CHECKING

from bestroute.cli.arguments import described
from bestroute.cli.terminal import complain

if TYPE_CHECKING:
    from bestroute.cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "key",
        help="make an API key for a caller",
        **described(
            "Make an API key. The key goes to stdout and is kept nowhere; the line to add to the "
            "server's security.api_keys_file, which has only its digest, goes to stderr.",
            "bestroute key billing > billing.key",
            "bestroute route --token-file billing.key --tls --address router:50051 Hello",
        ),
    )
    parser.add_argument("name", metavar="NAME", help="the caller's; letters, digits, _ and -")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make it and print both."""
    from bestroute.guard.keys import new_key

    try:
        key, line = new_key(args.name)
    except ValueError as error:
        return complain(str(error), code=2)
    print(key)
    print(line, file=sys.stderr)
    return 0

"""`bestroute health`: a probe's question, for where Kubernetes' own can't ask it."""

import argparse
from typing import TYPE_CHECKING

from bestroute.cli.arguments import add_connection, described
from bestroute.cli.remote import ask
from bestroute.cli.terminal import complain

if TYPE_CHECKING:
    from bestroute.cli.arguments import Commands
    from bestroute.client import Client


def add(commands: "Commands") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "health",
        help="ask one health name, as probes do",
        **described(
            "Ask the service whether it serves: a probe for where that has to speak TLS, which "
            "Kubernetes' own gRPC probes don't. It needs no token. Exit code 0 if it serves, 1 if "
            "it doesn't or can't be reached. `bestroute doctor` looks at more.",
            "bestroute health",
            "bestroute health liveness --tls-ca ca.crt --tls-server-name router",
        ),
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        default="readiness",
        help="readiness, liveness, or a service's name (default: %(default)s)",
    )
    add_connection(parser, timeout=3)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask once."""
    serving = False

    async def check(service: "Client") -> None:
        nonlocal serving
        serving = await service.check(args.name)

    code = ask(args, check)
    return code if code or serving else complain(f"not serving as {args.name}", code=1)

"""`bestroute doctor`: is the service there, healthy, and what does it serve.

It is the container's health check too, hence quick: it draws no tables and so loads no `rich`.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import grpc

from bestroute.cli.arguments import add_connection, described
from bestroute.cli.remote import advice
from bestroute.client import Client
from bestroute.errors import BestrouteError

if TYPE_CHECKING:
    from bestroute.cli.arguments import Commands

_HEALTH_NAMES = ("", "liveness", "readiness", "bestroute.v1.RoutingService")


def add(commands: "Commands") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="check that the service is well",
        **described(
            "Check that the service can be reached, is healthy and has a bundle with arms. "
            "Exit code 0 if all is well, 1 if something is not; each line then says what to do.",
            "bestroute doctor",
            "bestroute doctor --quiet --address router:50051",
        ),
    )
    parser.add_argument("--quiet", action="store_true", help="print only what is not well")
    add_connection(parser, timeout=3)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check one thing after the other; what can't be asked after a failure is left out."""
    checks = _Checks(quiet=args.quiet)
    try:
        asyncio.run(_examine(args, checks))
    except (BestrouteError, grpc.aio.AioRpcError) as error:
        checks.fail(advice(error, args))
    return 1 if checks.failed else 0


class _Checks:
    """Prints what was found: what is well to stdout, what is not to stderr."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self.failed = False

    def passed(self, finding: str) -> None:
        if not self._quiet:
            print(f"ok    {finding}", flush=True)

    def fail(self, finding: str) -> None:
        self.failed = True
        print(f"FAIL  {finding}", file=sys.stderr)


async def _examine(args: argparse.Namespace, checks: _Checks) -> None:
    async with Client(args.address, timeout=args.timeout) as client:
        serving = {name: await _serves(client, name) for name in _HEALTH_NAMES}
        checks.passed(f"{args.address} answers")
        if away := [name for name, serves in serving.items() if not serves]:
            checks.fail(
                f"health: not serving as {_quoted(away)}; it is starting or shutting down: "
                "wait, or look into its log"
            )
        else:
            checks.passed(f"health: serving as {_quoted(_HEALTH_NAMES)}")
        pool = await client.list_arms()
        found = f"{len(pool.arms)} arms of {len(pool.models)} models"
        checks.passed(f"bundle {pool.bundle_version}: {found}, reference {pool.reference_model}")


async def _serves(client: Client, name: str) -> bool:
    try:
        return await client.check(name)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return False
        raise


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)

"""`bestroute doctor`: is the service well, what does it serve, and what can this machine run on.

With `--quiet` it is the container's health check, hence quick: it asks the service only, and loads
neither ONNX Runtime nor `rich`.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import grpc

from bestroute.cli.arguments import add_connection, described
from bestroute.cli.remote import Unusable, advice, client
from bestroute.client import Client
from bestroute.errors import BestrouteError

if TYPE_CHECKING:
    from bestroute.cli.arguments import Commands

_HEALTH_NAMES = ("", "liveness", "readiness", "bestroute.v1.RoutingService")


def add(commands: "Commands") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="check that the service is well, and what this machine can run on",
        **described(
            "Check that the service can be reached, is healthy and has a bundle with arms. "
            "Exit code 0 if all is well, 1 if something is not; each line then says what to do. "
            "Then run a small network on every provider of this machine's ONNX Runtime, and say "
            "which work: what `engine.provider` may be here. The exit code doesn't depend on that.",
            "bestroute doctor",
            "bestroute doctor --quiet --address router:50051",
            "bestroute doctor --json | jq .providers",
        ),
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--quiet", action="store_true", help="print only what is not well; leave the providers out"
    )
    shown.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_connection(parser, timeout=3)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check one thing after the other; what can't be asked after a failure is left out."""
    checks = _Checks(passed=not args.quiet and not args.json, failed=not args.json)
    try:
        asyncio.run(_examine(args, checks))
    except (BestrouteError, grpc.aio.AioRpcError, Unusable) as error:
        checks.fail(advice(error, args))
    well = all(check["passed"] for check in checks.made)
    if args.json:
        found = {"address": args.address, "well": well, "checks": checks.made}
        print(json.dumps({**found, "providers": _providers()}, ensure_ascii=False))
    elif not args.quiet:
        for provider in _providers():
            print(f"{provider['provider']:<8}  {provider['fault'] or 'runs networks here'}")
    return 0 if well else 1


class _Checks:
    """Keeps what was found, and prints it: what is well to stdout, what is not to stderr."""

    def __init__(self, *, passed: bool, failed: bool) -> None:
        self._print_passed, self._print_failed = passed, failed
        self.made: list[dict[str, object]] = []

    def passed(self, finding: str) -> None:
        self.made.append({"passed": True, "finding": finding})
        if self._print_passed:
            print(f"ok    {finding}", flush=True)

    def fail(self, finding: str) -> None:
        self.made.append({"passed": False, "finding": finding})
        if self._print_failed:
            print(f"FAIL  {finding}", file=sys.stderr)


def _providers() -> list[dict[str, str | None]]:
    """Each provider with the reason why it doesn't work on this machine, or None."""
    from bestroute.config import ConfigInvalid

    try:
        from bestroute.execution import PROVIDERS, fault
    except ConfigInvalid as error:  # a machine that only calls the service needs no ONNX Runtime
        return [{"provider": "none", "fault": str(error)}]
    return [{"provider": provider, "fault": fault(provider)} for provider in PROVIDERS]


async def _examine(args: argparse.Namespace, checks: _Checks) -> None:
    async with client(args) as service:
        serving = {name: await _serves(service, name) for name in _HEALTH_NAMES}
        checks.passed(f"{args.address} answers")
        if away := [name for name, serves in serving.items() if not serves]:
            checks.fail(
                f"health: not serving as {_quoted(away)}; it is starting or shutting down: "
                "wait, or look into its log"
            )
        else:
            checks.passed(f"health: serving as {_quoted(_HEALTH_NAMES)}")
        pool = await service.list_arms()
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

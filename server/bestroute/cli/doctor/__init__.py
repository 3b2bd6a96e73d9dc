"""`bestroute doctor`: is the service well, and what does a newcomer get wrong.

With `--quiet` it is the container's health check, hence quick: it asks the service only, and loads
neither ONNX Runtime nor `rich`. What else there is to look at is imported where it is wanted.

    service         the service at an address
    reach           why it can't be reached
    machine         what is installed here, and what processes may have
    configuration   whether a configuration can be served, as it was meant
    ports           where it listens
    certificates    its certificate
    upstreams       its LLMs' APIs
    findings        what was found, and how it is told
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

from bestroute.cli.arguments import ADDRESS, add_connection, described
from bestroute.cli.doctor import service
from bestroute.cli.doctor.findings import Level, Report

if TYPE_CHECKING:
    from bestroute.cli.arguments import Commands

_ENVIRONMENT = Path()
"""Stands for a configuration without a file."""


def add(commands: "Commands") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="check the service, this machine, or a configuration, and say what to do",
        **described(
            "Check that the service can be reached, is healthy and has a bundle with arms; and "
            "this machine: what is installed, and on which providers of ONNX Runtime a small "
            "network runs (what `engine.provider` may be here). With --config check instead "
            "whether `bestroute serve` would serve with that configuration, as it was meant: "
            "settings, bundle and networks, ports, TLS, keys, LLMs; and the service too, if "
            "--address is given. The LLMs' APIs are asked for their models, which costs nothing. "
            "Each line that is not ok says what to do. Exit code 0 if nothing is FAIL, else 1; "
            "WARN, and which providers work, don't count.",
            "bestroute doctor",
            "bestroute doctor --config bestroute.toml",
            "bestroute doctor --config bestroute.toml --offline",
            "bestroute doctor --quiet --address router:50051",
            "bestroute doctor --json | jq .providers",
        ),
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--quiet",
        action="store_true",
        help="print only what is not ok; without --config ask the service only",
    )
    shown.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--config",
        metavar="FILE",
        nargs="?",
        type=Path,
        const=_ENVIRONMENT,
        help="check this configuration; without FILE what the environment and the defaults say",
    )
    parser.add_argument("--offline", action="store_true", help="don't ask the LLMs' APIs")
    add_connection(parser, timeout=3)
    parser.set_defaults(run=run, address=None)


def run(args: argparse.Namespace) -> int:
    """Check one thing after the other."""
    asked = args.address is not None or args.config is None
    args.address = args.address or ADDRESS
    report = Report(well=not args.quiet and not args.json, unwell=not args.json)
    asyncio.run(_examine(args, report, asked=asked))
    well = not report.failed
    if args.json:
        found: dict[str, object] = {"address": args.address} if asked else {}
        checks = [
            {"passed": level is not Level.FAIL, "level": level.lower(), "finding": text}
            for level, text in report.findings
        ]
        found |= {"well": well, "checks": checks, "providers": _providers()}
        print(json.dumps(found, ensure_ascii=False))
    elif not args.quiet:
        for provider in _providers():
            print(f"{provider['provider']:<8}  {provider['fault'] or 'runs networks here'}")
    return 0 if well else 1


def _providers() -> list[dict[str, str | None]]:
    """Each provider with the reason why it doesn't work on this machine, or None."""
    from bestroute.config import ConfigInvalid

    try:
        from bestroute.execution import PROVIDERS, fault
    except ConfigInvalid as error:  # a machine that only calls the service needs no ONNX Runtime
        return [{"provider": "none", "fault": str(error)}]
    return [{"provider": provider, "fault": fault(provider)} for provider in PROVIDERS]


async def _examine(args: argparse.Namespace, report: Report, *, asked: bool) -> None:
    if asked:
        async for finding in service.checks(args):
            report.add(finding)
    if args.config is None and args.quiet:
        return
    from bestroute.cli.doctor import machine

    for finding in machine.checks(serves=args.config is not None):
        report.add(finding)
    if args.config is not None:
        await _examine_configuration(args, report, asked=asked)


async def _examine_configuration(args: argparse.Namespace, report: Report, *, asked: bool) -> None:
    from bestroute.config import ConfigInvalid

    try:
        from bestroute.cli.doctor import configuration, reach, upstreams
    except ConfigInvalid:  # there is no ONNX Runtime, as was found already
        return
    file = None if args.config == _ENVIRONMENT else args.config
    settings, findings = configuration.load(file)
    for finding in findings:
        report.add(finding)
    if settings is None:
        return
    host, _ = reach.host_and_port(args.address) if asked else (None, None)
    async for finding in configuration.checks(settings, file, args.tls_server_name or host):
        report.add(finding)
    async for finding in upstreams.checks(settings, offline=args.offline):
        report.add(finding)

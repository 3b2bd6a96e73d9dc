"""`bestroute bundle activate` and `rollback`: which bundle a running server serves."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from bestroute.cli.arguments import described
from bestroute.cli.terminal import complain
from bestroute.errors import BundleInvalid

if TYPE_CHECKING:
    from bestroute.bundle import Bundle
    from bestroute.cli.arguments import Commands


def add(verbs: "Commands") -> None:
    """Declare both."""
    activate = verbs.add_parser(
        "activate",
        help="verify one, and have a running server serve it",
        **described(
            "Verify a bundle as `bestroute bundle verify` does, then point a symbolic link at it, "
            "in one step, and remember where it led before, in LINK.previous. A server whose "
            "bundle that link is loads it under load: by itself where watch_bundle = true, else at "
            "SIGHUP. It verifies the bundle again, and what it can't serve leaves the former "
            "serving. Exit code 0 if the link leads there, else 1.",
            "bestroute bundle activate ./bundles/2026-11-22 --link /var/lib/bestroute/bundle",
        ),
    )
    activate.add_argument("path", metavar="DIR", type=Path, help="the bundle")
    _add_link(activate)
    activate.set_defaults(run=_activate)
    rollback = verbs.add_parser(
        "rollback",
        help="go back to the one before",
        **described(
            "Point a link back at the bundle that LINK.previous remembers, in one step, and "
            "remember the one that it led to; a second rollback goes there again. Only the "
            "bundle's files are checked, since it has served before.",
            "bestroute bundle rollback --link /var/lib/bestroute/bundle",
        ),
    )
    _add_link(rollback)
    rollback.set_defaults(run=_rollback)


def _add_link(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--link",
        metavar="LINK",
        type=Path,
        required=True,
        help="the symbolic link that the server's `bundle = ` names",
    )


def _activate(args: argparse.Namespace) -> int:
    import asyncio

    from bestroute.bundle import Bundle
    from bestroute.config import ConfigInvalid, Settings
    from bestroute.links import point, target_of
    from bestroute.networks import verify

    try:
        target_of(args.link)  # before the work of verifying
        bundle = Bundle.load(Path(os.path.realpath(args.path)))
        asyncio.run(verify(bundle, Settings.load().engine))
        former = point(args.link, bundle.directory)
    except ConfigInvalid as error:
        return complain(str(error), code=2)
    except BundleInvalid as error:
        return complain(str(error), code=1)
    _say(args.link, bundle, former)
    return 0


def _rollback(args: argparse.Namespace) -> int:
    from bestroute.bundle import Bundle
    from bestroute.links import point, previous_of, same, target_of

    try:
        current, previous = target_of(args.link), target_of(previous_of(args.link))
        if previous is None:
            raise BundleInvalid(
                f"{previous_of(args.link)} does not exist, so there is nothing to go back to; "
                "it is made when `bestroute bundle activate` finds the link leading elsewhere"
            )
        if current is not None and same(current, previous):
            raise BundleInvalid(
                f"{args.link} leads to {current} already, and nothing else is remembered; "
                "activate the bundle that you want"
            )
        bundle = Bundle.load(previous)
        former = point(args.link, previous)
    except BundleInvalid as error:
        return complain(str(error), code=1)
    _say(args.link, bundle, former)
    return 0


def _say(link: Path, bundle: "Bundle", former: Path | None) -> None:
    manifest = bundle.manifest
    before = f"; before it led to {former}" if former else ""
    print(f"{link} leads to {bundle.directory}: {manifest.name} {manifest.version}{before}")

"""The link by which a server is told its bundle, pointed at another and back, each in one step.

LINK            what `bundle = ` names; leads to the bundle that is to serve
LINK.previous   leads to the one before, as `rollback` needs it
"""

import os
from pathlib import Path

from bestroute.errors import BundleInvalid


def previous_of(link: Path) -> Path:
    """Where it is remembered what a link led to before."""
    return link.with_name(f"{link.name}.previous")


def target_of(link: Path) -> Path | None:
    """Where a link leads, as an absolute path; None: there is no link.

    Raises:
        BundleInvalid: something else is there, which is not to be replaced.
    """
    try:
        return Path(os.path.realpath(link.parent)) / link.readlink()
    except FileNotFoundError:
        return None
    except OSError:
        raise BundleInvalid(
            f"{link} is no symbolic link; a bundle is activated by pointing a link at it: move "
            "what is there aside, and let `bundle = ` name the link"
        ) from None


def same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same; also of links that lead nowhere."""
    # Not `Path.resolve`, which raises where a link leads to itself.
    return os.path.realpath(one) == os.path.realpath(other)


def point(link: Path, bundle: Path) -> Path | None:
    """Point a link at a bundle, in one step: whoever follows it finds the one or the other.

    Returns:
        Where it led before; None: there was no link, or it led there already.

    Raises:
        BundleInvalid: the link can't be made, or something else is in its place.
    """
    former = target_of(link)
    if former is not None and same(former, bundle):
        return None
    try:
        # First, so that there is a way back whenever the link leads to the new one.
        if former is not None:
            _replace(previous_of(link), former)
        _replace(link, bundle)
    except OSError as error:
        raise BundleInvalid(f"{link} can't be pointed at {bundle}: {error}") from error
    return former


def _replace(link: Path, target: Path) -> None:
    made = link.with_name(f".{link.name}.{os.getpid()}")
    made.unlink(missing_ok=True)
    made.symlink_to(target)
    try:
        made.replace(link)
    except OSError:
        made.unlink()
        raise

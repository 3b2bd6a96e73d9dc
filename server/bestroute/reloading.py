"""Settings and bundle are read anew, on SIGHUP or when the bundle's files change, under load.

What can't be changed in a running process is said and left as it is. What can't be served is
logged, and what was served before goes on.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from bestroute.bundle import DEFAULT_BUNDLE
from bestroute.config import ConfigInvalid, Settings
from bestroute.engine import return_freed_memory
from bestroute.errors import BundleInvalid
from bestroute.live import Live
from bestroute.process import spare_what_is_loaded
from bestroute.tasks import task_group

_log = logging.getLogger(__name__)

_LOOK = 1.0
"""Seconds between two looks at the bundle's files; that long they must not have changed."""

_CHANGEABLE = frozenset(
    {"bundle", "bundle_sha256", "engine", "batching", "routing", "providers", "models"}
)
"""Settings that a router is opened with; the rest belongs to the process."""

Fingerprint = tuple[tuple[str, int, int, int], ...]


@asynccontextmanager
async def reloading(
    live: Live, settings: Settings, load: Callable[[], Settings], hangup: asyncio.Event
) -> AsyncIterator[None]:
    """Reload while the block lasts.

    Args:
        live: what serves.
        settings: what it was opened with.
        load: reads the settings.
        hangup: asks to read them; cleared when it has been seen.
    """
    async with task_group() as tasks:
        task = tasks.create_task(_reload(live, settings, load, hangup))
        if settings.watch_bundle:
            watch = tasks.create_task(_watch(settings.bundle or DEFAULT_BUNDLE, hangup))
        try:
            yield
        finally:
            task.cancel()
            if settings.watch_bundle:
                watch.cancel()


async def _reload(
    live: Live, settings: Settings, load: Callable[[], Settings], hangup: asyncio.Event
) -> None:
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            wanted = await asyncio.to_thread(load)
            for key in unchangeable(settings, wanted):
                _log.warning("%s has changed, which takes effect at the next start", key)
            await live.replace(wanted)
        except (BundleInvalid, ConfigInvalid) as error:
            _log.error("not reloaded, the former goes on: %s", error)
            continue
        except Exception:
            _log.exception("not reloaded, the former goes on")
            continue
        manifest = live.router.manifest
        _log.info("reloaded: serves bundle %s %s", manifest.name, manifest.version)
        # The former is still among what the garbage collector spares.
        spare_what_is_loaded()
        return_freed_memory()


def unchangeable(settings: Settings, wanted: Settings) -> list[str]:
    """The keys that differ and can't be changed in a running process."""
    return [
        key
        for key in Settings.model_fields
        if key not in _CHANGEABLE and getattr(settings, key) != getattr(wanted, key)
    ]


async def _watch(bundle: Path, changed: asyncio.Event) -> None:
    """Tell when the bundle's files are others than before, and at rest."""
    served = last = await asyncio.to_thread(fingerprint, bundle)
    while True:
        await asyncio.sleep(_LOOK)
        now = await asyncio.to_thread(fingerprint, bundle)
        if now == last and now != served:
            served = now
            changed.set()
        last = now


def fingerprint(bundle: Path) -> Fingerprint:
    """What shows that files of a bundle were changed; empty where there is none."""
    try:
        stats = [(path.name, path.stat()) for path in sorted(bundle.iterdir())]
    except OSError:
        return ()
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)

"""Settings and bundles are read anew, on SIGHUP or when their files change, under load.

What can't be changed in a running process is said and left as it is. What can't be served is
logged, and what was served before goes on.
"""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from bestroute.bundle import DEFAULT_BUNDLE, Fingerprint, fingerprint
from bestroute.config import ConfigInvalid, Settings
from bestroute.engine import return_freed_memory
from bestroute.errors import BundleInvalid
from bestroute.live import Live
from bestroute.place import OPENED_WITH
from bestroute.tasks import task_group

__all__ = [
    "changeable",
    "fingerprint",
    "read",
    "reloading",
    "unchangeable",
    "watching_config",
]

_log = logging.getLogger(__name__)

_LOOK = 1.0
"""Seconds between two looks at a bundle's files; that long they must not have changed."""
_LOOK_AT_CONFIG = 0.2
"""Likewise at the configuration, which is small, and by which arms are switched off."""

_AT_ONCE = ("operations", "canary", "callers", "sessions", "log_level")
"""Settings that take effect without another router."""


@asynccontextmanager
async def reloading(
    live: Live,
    settings: Settings,
    load: Callable[[], Settings],
    hangup: asyncio.Event,
    apply: Callable[[Settings], None] = lambda _: None,
) -> AsyncIterator[None]:
    """Reload while the block lasts.

    Args:
        live: what serves.
        settings: what it was opened with.
        load: reads the settings.
        hangup: asks to read them; cleared when it has been seen.
        apply: brings into force what is no router's.
    """
    latest = settings
    replacing = set[asyncio.Task[None]]()

    async def reload(tasks: asyncio.TaskGroup) -> None:
        nonlocal latest
        while True:
            await hangup.wait()
            hangup.clear()
            if (wanted := await read(load)) is None:
                continue
            latest = wanted = changeable(settings, wanted)
            apply(wanted)
            # Not waited for: while a bundle is loaded, other settings may be wanted.
            replacing.add(task := tasks.create_task(_replace(live, wanted)))
            task.add_done_callback(replacing.discard)

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(reload(tasks))]
        if settings.watch_bundle:
            served = _bundles(settings)
            if served[0] != live.files:
                hangup.set()  # changed since it was loaded
            watch = _watch(lambda: _bundles(latest), served, hangup, _LOOK)
            running.append(tasks.create_task(watch))
        try:
            yield
        finally:
            for task in (*running, *replacing):
                task.cancel()


async def read(load: Callable[[], Settings]) -> Settings | None:
    """The settings; None, and an error is logged, if they can't be read."""
    try:
        return await asyncio.to_thread(load)
    except ConfigInvalid as error:
        _log.error("not reloaded, the former goes on: %s", error)
    except Exception:
        _log.exception("not reloaded, the former goes on")
    return None


async def _replace(live: Live, wanted: Settings) -> None:
    try:
        opened = await live.replace(wanted)
    except (BundleInvalid, ConfigInvalid) as error:
        _log.error("not reloaded, the former goes on: %s", error)
        return
    except Exception:
        _log.exception("not reloaded, the former goes on")
        return
    if opened:
        gc.collect()  # the former, which is large and refers to itself
        return_freed_memory()


def changeable(settings: Settings, wanted: Settings) -> Settings:
    """The wanted settings, but for what can't be changed in a running process; warns of that."""
    held = unchangeable(settings, wanted)
    for key in held:
        _log.warning("%s has changed, which takes effect at the next start", key)
    return wanted.model_copy(update={key: getattr(settings, key) for key in held})


def unchangeable(settings: Settings, wanted: Settings) -> list[str]:
    """The keys that differ and can't be changed in a running process."""
    return [
        key
        for key in Settings.model_fields
        if key not in (*OPENED_WITH, *_AT_ONCE) and getattr(settings, key) != getattr(wanted, key)
    ]


@asynccontextmanager
async def watching_config(
    file: Path | None, settings: Settings, load: Callable[[], Settings], changed: asyncio.Event
) -> AsyncIterator[None]:
    """Tell, while the block lasts, whenever the configuration's file has changed, if that is set.

    Args:
        file: where it is; None: there is none.
        settings: what was read from it.
        load: reads it.
        changed: is set.
    """
    if not settings.watch_config or file is None:
        yield
        return
    async with task_group() as tasks:
        served = [_stat(file)]  # before it is read, so that no change is between the two
        watch = tasks.create_task(_watch(lambda: [_stat(file)], served, changed, _LOOK_AT_CONFIG))
        if await read(load) != settings:
            changed.set()  # since it was read
        try:
            yield
        finally:
            watch.cancel()


async def _watch(
    look: Callable[[], Sequence[Fingerprint]],
    served: Sequence[Fingerprint],
    changed: asyncio.Event,
    period: float,
) -> None:
    """Tell when files are others than those that are served, and at rest."""
    last = served
    while True:
        await asyncio.sleep(period)
        now = await asyncio.to_thread(look)
        if now == last and now != served:
            served = now
            changed.set()
        last = now


def _bundles(settings: Settings) -> list[Fingerprint]:
    """Of the bundle and of the canary's, as links lead to them now."""
    directories = [settings.bundle or DEFAULT_BUNDLE, settings.canary.bundle]
    return [fingerprint(directory) for directory in directories if directory]


def _stat(file: Path) -> Fingerprint:
    """Of a file, as links lead to it now; empty where there is none."""
    try:
        stat = file.stat()
    except OSError:
        return ()
    return ((file.name, stat.st_ino, stat.st_size, stat.st_mtime_ns),)

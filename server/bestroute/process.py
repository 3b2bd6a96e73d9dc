"""What a process has around the service: an event loop, and signals that end it."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bestroute import __version__

_log = logging.getLogger(__name__)

STOPPING = (signal.SIGTERM, signal.SIGINT)


def log_ready(bundle: str, address: str) -> None:
    """Log that callers are served: the line that whoever starts a server waits for.

    Args:
        bundle: its name and version.
        address: host:port.
    """
    fields = {"version": __version__, "bundle": bundle, "address": address}
    said = "bestroute %(version)s serves bundle %(bundle)s on %(address)s"
    _log.info(said, fields, extra={"fields": fields})


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop of uvloop, which serves a fifth more calls per core; without it one of asyncio."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def spare_what_is_loaded() -> None:
    """Have the garbage collector never again look through what there is by now, for it stays.

    That would hold up the event loop for tens of milliseconds. To be called before a router is
    opened, which may be replaced: what is spared is never freed.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def on_hangup() -> Iterator[asyncio.Event]:
    """An event set by each SIGHUP, also by one that `hold_hangup` has held back.

    Whoever has seen it clears it. After the block SIGHUP is ignored.
    """
    loop = asyncio.get_running_loop()
    hangup = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])
    try:
        yield hangup
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        # The default would kill a process that has drained and is about to end with exit code 0.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def hold_hangup() -> None:
    """Have a SIGHUP wait for `on_hangup`, instead of killing a process that is still starting."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])


@contextmanager
def first_signal(before_exit: Callable[[], None] | None = None) -> Iterator[asyncio.Event]:
    """An event set by the first SIGTERM or SIGINT; a second one ends the process at once.

    Args:
        before_exit: called by the second signal, before the process ends.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def exit_now(number: int, _: object) -> None:
        if before_exit:
            before_exit()
        os._exit(128 + number)

    def first() -> None:
        stop.set()
        for number in STOPPING:
            loop.remove_signal_handler(number)
            # Not left to the default: the kernel ignores it for process 1, as in a container.
            signal.signal(number, exit_now)

    for number in STOPPING:
        loop.add_signal_handler(number, first)
    try:
        yield stop
    finally:
        for number in STOPPING:
            loop.remove_signal_handler(number)

"""One of several workers, `python -m bestroute.worker NUMBER`: serves as its parent says.

See `workers` for what is said on the socket that is its stdin.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from contextlib import suppress

from bestroute.app import serving
from bestroute.config import ConfigInvalid, Settings
from bestroute.engine import cpus
from bestroute.errors import BundleInvalid
from bestroute.observe.logs import log_to_stderr
from bestroute.process import STOPPING, new_event_loop, spare_what_is_loaded
from bestroute.reloading import reloading
from bestroute.tasks import task_group

_log = logging.getLogger("bestroute.worker")  # not __main__

_LONGEST_LINE = 2**24
"""Bytes that settings may have."""


def main() -> int:
    """Serve until the parent lets go, and return the exit code."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_serve())


def shared(settings: Settings) -> Settings:
    """The settings with one worker's share of the CPUs, where they don't say how many threads."""
    threads = settings.engine.threads or max(1, cpus() // settings.server.workers)
    engine = settings.engine.model_copy(update={"threads": threads})
    return settings.model_copy(update={"engine": engine})


def _own(line: bytes) -> Settings:
    """What the parent says, with this worker's share of the CPUs and its port for metrics."""
    settings = shared(Settings.model_validate_json(line))
    metrics = settings.metrics.of_worker(int(sys.argv[1]))
    return settings.model_copy(update={"metrics": metrics})


async def _serve() -> int:
    parent = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    # Held, since a writer that is let go of closes the socket.
    reader, _writer = await asyncio.open_connection(sock=parent, limit=_LONGEST_LINE)
    if not (line := await reader.readline()):
        return 1  # the parent is gone already
    settings = _own(line)
    log_to_stderr(settings.log_level, settings.log_format, worker=int(sys.argv[1]))
    stop, changed = asyncio.Event(), asyncio.Event()
    latest = settings

    async def listen() -> None:
        nonlocal latest
        with suppress(ConnectionError):
            while line := await reader.readline():
                latest = _own(line)
                changed.set()
        stop.set()

    for number in STOPPING:
        # However many come, the worker drains: an init system signals it beside its parent.
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # Of a terminal's, which is for the parent, too.
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: None)
    try:
        async with task_group() as tasks:
            listening = tasks.create_task(listen())
            spare_what_is_loaded()
            async with serving(settings) as running:
                _report(serves=running.bundle)
                async with reloading(
                    running.live, settings, lambda: latest, changed, running.apply
                ):
                    await stop.wait()
                _log.info("draining")
            listening.cancel()
    except (ConfigInvalid, BundleInvalid) as error:
        _report(invalid=str(error))
        return 2
    return 0


def _report(**said: str) -> None:
    with suppress(BrokenPipeError):  # the parent is gone; so will be the worker
        os.write(sys.stdin.fileno(), json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())

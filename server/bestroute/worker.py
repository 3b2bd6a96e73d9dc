"""One of several workers, `python -m bestroute.worker NUMBER`: serves as its parent says.

See `workers` for what is said on the socket that is its stdin.
"""

import asyncio
import json
import logging
import os
import sys
from contextlib import suppress

from bestroute.app import serving
from bestroute.config import ConfigInvalid, Settings
from bestroute.engine import cpus
from bestroute.errors import BundleInvalid
from bestroute.process import STOPPING, log_to_stderr, new_event_loop, spare_what_is_loaded

_log = logging.getLogger("bestroute.worker")  # not __main__


def main() -> int:
    """Serve until the parent lets go, and return the exit code."""
    if not (line := sys.stdin.buffer.readline()):
        return 1  # the parent is gone already
    settings = Settings.model_validate_json(line)
    log_to_stderr(settings.log_level, process=f"worker {sys.argv[1]}")
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_serve(shared(settings)))


def shared(settings: Settings) -> Settings:
    """The settings with one worker's share of the CPUs, where they don't say how many threads."""
    threads = settings.engine.threads or max(1, cpus() // settings.server.workers)
    engine = settings.engine.model_copy(update={"threads": threads})
    return settings.model_copy(update={"engine": engine})


async def _serve(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def let_go() -> None:
        loop.remove_reader(sys.stdin)
        stop.set()

    loop.add_reader(sys.stdin, let_go)
    for number in STOPPING:
        # However many come, the worker drains: an init system signals it beside its parent.
        loop.add_signal_handler(number, stop.set)
    try:
        async with serving(settings) as running:
            spare_what_is_loaded()
            _report(serves=running.bundle)
            await stop.wait()
            _log.info("draining")
    except (ConfigInvalid, BundleInvalid) as error:
        _report(invalid=str(error))
        return 2
    return 0


def _report(**said: str) -> None:
    with suppress(BrokenPipeError):  # the parent is gone; so will be the worker
        os.write(sys.stdin.fileno(), json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())

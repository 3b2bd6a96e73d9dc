"""Several processes that serve at one address: starts them, replaces them, ends them together.

With a router as fast as the embedded one, a single Python event loop is the limit. Workers have one
each; all listen at the same address by SO_REUSEPORT, and the kernel spreads connections over them.
This process, their parent, keeps the port and serves nothing.

A socket leads from here to the stdin of each worker, see `worker`. The parent sends the settings,
the worker answers that it is ready, or why it never will be: one line of JSON each. Settings sent
later are to be served from then on. When the parent lets go of its end, which it also does by
dying, the worker drains.
"""

import asyncio
import errno
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bestroute.config import ConfigInvalid, Gateway, Server, Settings
from bestroute.observe.logs import log_to_stderr, set_level
from bestroute.process import first_signal, log_ready, on_hangup
from bestroute.reloading import changeable, read, watching_config

_log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_LONG_LIFE = 60.0


def run(load: Callable[[], Settings], file: Path | None = None) -> int:
    """Serve with workers until SIGTERM or SIGINT, drain them, and return the exit code.

    A second signal kills them and exits now.

    Args:
        load: reads the settings, now, at each SIGHUP, and where `watch_config` asks for it.
        file: that they are read from; None: there is none.

    Raises:
        ConfigInvalid: the address can't be had, or a worker says that settings or bundle are bad.
        OSError: a worker ended before all were ready.
    """
    settings = load()
    log_to_stderr(settings.log_level, settings.log_format)
    with ExitStack() as kept:
        addresses: dict[str, str] = {}
        if not settings.gateway.alone:
            addresses["server"] = kept.enter_context(reserved(settings.server))
        if (address := settings.gateway.address) is not None:
            gateway = settings.gateway.model_copy(update={"listen": address})
            addresses["gateway"] = kept.enter_context(reserved(gateway))

        def load_again() -> Settings:
            return _at(addresses, load())

        asyncio.run(_supervise(_at(addresses, settings), load_again, file))
    return 0


def _at(addresses: Mapping[str, str], settings: Settings) -> Settings:
    """The settings with these addresses, by section."""
    sections = {
        section: getattr(settings, section).model_copy(update={"listen": address})
        for section, address in addresses.items()
    }
    return settings.model_copy(update=sections)


@contextmanager
def reserved(server: Server | Gateway) -> Iterator[str]:
    """Keep an address for workers while the block lasts; gives host:port with the port's number.

    Raises:
        ConfigInvalid: a server is there, or is about to be; or this machine has no such address.
    """
    host, _, port = (server.listen or "").rpartition(":")
    number, missing = 0, None
    with ExitStack() as reservations:
        try:
            for family, kind, _, _, found in socket.getaddrinfo(
                host.strip("[]"), port, type=socket.SOCK_STREAM
            ):
                try:
                    made = reservations.enter_context(socket.socket(family, kind))
                    _reserve(made, (found[0], number or found[1], *found[2:]))
                    number = made.getsockname()[1]
                except OSError as error:
                    # As gRPC does: "localhost" may have an IPv6 address where the kernel has none.
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                    missing = error
            if missing and not number:
                raise missing
        except OSError as error:
            raise ConfigInvalid(server.cannot_listen(error)) from error
        yield f"{host}:{number}"


def _reserve(made: socket.socket, address: tuple[object, ...]) -> None:
    """Bind so that workers can listen there by SO_REUSEPORT, if nobody else does or is about to."""
    # Connections that a former server has closed are no obstacle, as they are none to gRPC.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(address)
    # Only now: with SO_REUSEPORT one may bind beside strangers that have set it, and with
    # SO_REUSEADDR beside any that don't listen yet.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


async def _supervise(settings: Settings, load: Callable[[], Settings], file: Path | None) -> None:
    workers = [_Worker(number + 1, settings) for number in range(settings.server.workers)]

    def kill() -> None:
        for worker in workers:
            worker.kill()

    with first_signal(before_exit=kill) as stop, on_hangup() as hangup:
        try:
            bundle, *_ = await asyncio.gather(*(worker.start() for worker in workers))
        except (ConfigInvalid, OSError):
            kill()
            await asyncio.gather(*(worker.end() for worker in workers))
            raise
        alone = settings.gateway.alone and settings.gateway.address
        log_ready(bundle, alone or settings.server.listen)
        async with asyncio.TaskGroup() as keeping:
            for worker in workers:
                keeping.create_task(_keep(worker, stop))
            reloading = keeping.create_task(_reload(workers, settings, load, hangup))
            async with watching_config(file, settings, load, hangup):
                await stop.wait()
            reloading.cancel()
            _log.info("draining; a second signal exits now")
            for worker in workers:
                worker.drain()
    _log.info("stopped")


async def _reload(
    workers: Sequence["_Worker"],
    settings: Settings,
    load: Callable[[], Settings],
    hangup: asyncio.Event,
) -> None:
    """Give the workers the settings anew whenever that is asked for; each says how it went."""
    while True:
        await hangup.wait()
        hangup.clear()
        if (wanted := await read(load)) is None:
            continue
        # Not left to the workers: one that is replaced would start with what the others don't have.
        wanted = changeable(settings, wanted)
        set_level(wanted.log_level)
        for worker in workers:
            worker.reload(wanted)


async def _keep(worker: "_Worker", stop: asyncio.Event) -> None:
    """Replace a worker's process whenever it ends, until all are to stop."""
    started, pause = time.monotonic(), 0.0
    end = await worker.end()
    while not stop.is_set():
        pause = pause_before(time.monotonic() - started, pause)
        _log.error("worker %d %s; starting another in %g s", worker.number, end, pause)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await stop.wait()
                return
        started = time.monotonic()
        try:
            await worker.start()
            _log.info("worker %d serves again", worker.number)
            if stop.is_set():
                worker.drain()
            end = await worker.end()
        except (ConfigInvalid, OSError) as error:
            end = f"could not be started ({error})"


def pause_before(lived: float, last: float) -> float:
    """How long to wait before a process is started in the place of one that ended.

    Args:
        lived: seconds from the start to the end of that one.
        last: the pause before that one, in seconds; 0 for the first.

    Returns:
        Seconds; from one short life to the next they double.
    """
    if not last or lived >= _LONG_LIFE:
        return _FIRST_PAUSE
    return min(2 * last, _LONGEST_PAUSE)


class _Worker:
    """A process that serves; after it has ended, another may be started in its place.

    Attributes:
        number: from 1; names it in the log.
    """

    def __init__(self, number: int, settings: Settings) -> None:
        self.number = number
        self._settings = settings.model_dump_json().encode()
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> str:
        """Start a process and wait until it is ready.

        Returns:
            Name and version of the bundle that it serves.

        Raises:
            ConfigInvalid: it can't serve with these settings, or not this bundle.
            OSError: it can't be started, or ended before it was ready.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # a directory "bestroute" where the parent was started is not our package
                "-m",
                "bestroute.worker",
                str(self.number),
                stdin=theirs.fileno(),
                start_new_session=True,  # a terminal's Ctrl-C is for the parent alone
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._writer.write(self._settings + b"\n")
        report = b""
        with suppress(ConnectionError):
            report = await reader.readline()
        if not report:
            raise ChildProcessError(f"worker {self.number} {await self.end()} before it was ready")
        said: dict[str, str] = json.loads(report)
        if "invalid" in said:
            raise ConfigInvalid(said["invalid"])
        return said["serves"]

    def reload(self, settings: Settings) -> None:
        """Have the process serve by other settings, and those that come after it, too."""
        self._settings = settings.model_dump_json().encode()
        if self._process:
            self._writer.write(self._settings + b"\n")

    async def end(self) -> str:
        """Wait until the process has ended; says how it did."""
        if not self._process:
            return "was never started"
        code = await self._process.wait()
        self._writer.close()
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def drain(self) -> None:
        """Let the process go; it ends when its calls are answered."""
        self._writer.close()

    def kill(self) -> None:
        """End the process now."""
        if self._process:
            with suppress(ProcessLookupError):
                self._process.kill()

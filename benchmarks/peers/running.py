"""A peer as processes of its own: started, asked whether it is ready, accounted, ended.

Besides what `benchmarks.peers.model` reads, a server finds in its environment PEER_BUNDLE, the
bundle that bestroute serves, and PEER_PORTS, three free ports of loopback. It listens on the first;
the others are for those that can't do without.
"""

import asyncio
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environment import HERE, Unavailable, python_of
from benchmarks.peers.registry import Peer

READY_WITHIN = 120.0
"""Seconds in which a server must give its first answer."""
ENDED_WITHIN = 15.0
"""Seconds after which a server that was asked to end is killed."""


@dataclass(frozen=True)
class Setup:
    """What is served, on what.

    Attributes:
        environment: what servers find in theirs, but for PEER_PORTS.
        cores: CPUs that they may use.
    """

    environment: Mapping[str, str]
    cores: Collection[int]


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        address: host:port.
        pid: of its first process.
    """

    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time that its processes have used so far."""
        return sum(each.cpu_seconds for each in tree(self.pid))


@asynccontextmanager
async def started(peer: Peer, setup: Setup) -> AsyncIterator[Running]:
    """Run a peer's server while the block lasts; gives it once it answers.

    Raises:
        Unavailable: it can't be installed, or doesn't answer in time.
    """
    python = python_of(peer.server)
    ports = free_ports(3)
    with tempfile.TemporaryFile() as log:
        server = _spawned(
            [str(python), "-m", f"benchmarks.peers.{peer.server}"],
            {
                **setup.environment,
                "PEER_PORTS": ",".join(map(str, ports)),
                "PYTHONPATH": str(HERE.parents[1]),
            },
            setup.cores,
            log.fileno(),
        )
        try:
            address = f"127.0.0.1:{ports[0]}"
            try:
                await _ready(peer, address, server)
            except Unavailable as error:
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines()[-20:]
                raise Unavailable("\n".join([str(error), *said])) from error
            yield Running(address, server.pid)
        finally:
            await asyncio.to_thread(_end, server)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass(frozen=True)
class Process:
    """A process as it was seen.

    Attributes:
        born: ticks of the clock from the machine's start; tells it from a later one of its id.
        cpu_seconds: user and system time, with that of children that it has waited for.
    """

    pid: int
    parent: int
    session: int
    born: int
    cpu_seconds: float

    @property
    def identity(self) -> tuple[int, int]:
        """What no other process has."""
        return self.pid, self.born


def processes() -> list[Process]:
    """All that run now."""
    found = []
    ticks = os.sysconf("SC_CLK_TCK")
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            with suppress(OSError):  # it may end meanwhile
                stat = (directory / "stat").read_text(encoding="utf-8", errors="replace")
                fields = stat.rpartition(")")[2].split()
                cpu = sum(map(int, fields[11:15])) / ticks
                parent, session, born = int(fields[1]), int(fields[3]), int(fields[19])
                found.append(Process(int(directory.name), parent, session, born, cpu))
    return found


def tree(pid: int) -> list[Process]:
    """The processes of a session that `pid` leads, and their descendants in other sessions."""
    everyone = processes()
    members = {each.pid for each in everyone if each.session == pid}
    while more := {each.pid for each in everyone if each.parent in members} - members:
        members |= more
    return [each for each in everyone if each.pid in members]


def _spawned(
    command: list[str], environment: Mapping[str, str], cores: Collection[int], log: int
) -> "subprocess.Popen[bytes]":
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # a child starts where its parent is
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            cwd=HERE.parents[1],
            start_new_session=True,
        )
    finally:
        os.sched_setaffinity(0, before)


async def _ready(peer: Peer, address: str, server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + READY_WITHIN
    while True:
        try:
            async with peer.connect(address) as client, asyncio.timeout(10):
                await client.row("ready?")
                return
        except Exception as error:  # whatever the peer's client raises
            if server.poll() is not None:
                raise Unavailable(f"it ended with exit code {server.returncode}") from error
            if time.monotonic() > end:
                raise Unavailable(f"no answer within {READY_WITHIN:.0f} s: {error!r}") from error
        await asyncio.sleep(0.25)


def _end(server: "subprocess.Popen[bytes]") -> None:
    """Ask the first process to end, then kill whatever is left of them all."""
    members = {each.identity for each in tree(server.pid)}
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(ENDED_WITHIN)
    members |= {each.identity for each in tree(server.pid)}
    for process in processes():
        if process.identity in members:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
    server.wait()

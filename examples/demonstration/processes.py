"""The programs that the demo starts, and ends whatever happens."""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bestroute.client import Client

STANDIN_PROGRAM = Path(__file__).parent.parent / "standin.py"


class Failed(Exception):
    """The demo can't go on; says why."""


@asynccontextmanager
async def running(log: Path, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child process in a group of its own, so that Ctrl-C reaches it through us, in order."""
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            process_group=0,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), timeout=10)
        except TimeoutError:
            process.kill()
            await process.wait()


@asynccontextmanager
async def standin(directory: Path) -> AsyncIterator[str]:
    """The stand-in LLM; gives its base URL."""
    log = directory / "standin.log"
    async with running(log, str(STANDIN_PROGRAM)) as process:
        assert process.stdout is not None
        if not (line := await process.stdout.readline()):
            raise Failed(f"the stand-in LLM did not start:\n{log.read_text()}")
        yield line.decode().strip()


@asynccontextmanager
async def server(directory: Path, config: str, bundle: Path) -> AsyncIterator[Client]:
    """`bestroute serve`; gives a client of it."""
    file, log = directory / "bestroute.toml", directory / "server.log"
    file.write_text(config, encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    flags = ("--config", str(file), "--listen", address, "--bundle", str(bundle))
    async with (
        running(log, "-m", "bestroute", "serve", *flags) as process,
        Client(address, timeout=30) as client,
    ):
        ready = asyncio.create_task(client.wait_ready(60))
        ended = asyncio.create_task(process.wait())
        await asyncio.wait([ready, ended], return_when=asyncio.FIRST_COMPLETED)
        if process.returncode is not None:
            ready.cancel()
            raise Failed(f"bestroute serve did not start:\n{log.read_text()}")
        await ready
        yield client


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port

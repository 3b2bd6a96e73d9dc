"""Processes of one's own around parts of the service, pinned to a core, and profiles of them."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import record
from benchmarks.peers.running import Running
from bestroute import app
from bestroute.process import first_signal, new_event_loop


def serve_until_signal(serving: AbstractAsyncContextManager[app.Running]) -> None:
    """Serve on the loop that `bestroute serve` has; prints the address when ready."""

    async def served() -> None:
        with first_signal() as stop:
            async with serving as server:
                print(server.address, flush=True)
                await stop.wait()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(served())


@dataclass
class Child:
    """A server in a process of its own.

    Attributes:
        running: where, while it runs.
        printed: what it printed beside its address; there once it has ended.
    """

    running: Running
    printed: str = ""


@contextmanager
def child(function: str, *arguments: str, core: int | None = None) -> Iterator[Child]:
    """Run a server while the block lasts, then ask it to end, and wait until it has.

    Args:
        function: "module.function", which calls `serve_until_signal`.
        arguments: of the function.
        core: the only CPU that it may use; None: it may use all.
    """
    module, _, name = function.rpartition(".")
    code = f"import sys; from {module} import {name}; {name}(*sys.argv[1:])"
    command = [*on_core(core), sys.executable, "-c", code, *arguments]
    # A session of its own, by which `Running` finds its processes.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as server:
        assert server.stdout is not None
        try:
            if not (address := server.stdout.readline().strip()):
                raise SystemExit("the server ended before it was ready")
            found = Child(Running(address, server.pid))
            yield found
        finally:
            server.terminate()
        found.printed = server.stdout.read()


def on_core(core: int | None) -> list[str]:
    """What to put before a command that may use one CPU only; None: nothing."""
    return [] if core is None else ["taskset", "--cpu-list", str(core)]


def py_spy() -> str | None:
    """Where py-spy is, in this environment or on the path; None if it isn't installed."""
    here = str(Path(sys.executable).parent)
    return shutil.which("py-spy", path=os.pathsep.join([here, os.environ.get("PATH", "")]))


@contextmanager
def profiled(pid: int, form: str, output: Path) -> Iterator[None]:
    """Have py-spy sample a process while the block lasts.

    Args:
        pid: the process.
        form: what py-spy writes: "flamegraph" or "raw".
        output: where; it holds nothing about where things lie on this machine.

    Raises:
        RuntimeError: py-spy couldn't, in its words.
    """
    tool = py_spy()
    assert tool is not None
    # Named without directories, since what py-spy was called with becomes the title of its picture.
    command = ["py-spy", "record", "--function", "--threads", "--rate", "500", "--format", form]
    command += ["--output", output.name, "--pid", str(pid)]
    with subprocess.Popen(
        command,
        executable=tool,
        cwd=output.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as sampling:
        try:
            yield
        finally:
            sampling.send_signal(signal.SIGINT)  # py-spy writes what it has
            said, _ = sampling.communicate()
    if not output.exists():
        raise RuntimeError(f"py-spy has written nothing: {said}")
    places = [sys.prefix, sys.base_prefix, str(record.RESULTS.parents[1]), str(Path.home())]
    output.write_text(without(places, output.read_text(encoding="utf-8")), encoding="utf-8")


def without(places: Sequence[str], text: str) -> str:
    """A text that names files relative to the directories that they lie in, longest ones first."""
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(f"{place.rstrip(os.sep)}{os.sep}", "")
    return text

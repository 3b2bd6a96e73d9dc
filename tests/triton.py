"""A real Triton, from the wheel of nvidia-pytriton, on a port of loopback.

That build has no ONNX Runtime backend, so repositories are exported for its Python backend.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bestroute.bundle import Bundle
from bestroute_export.triton import write_repository

_START = 90.0
_MISSING = "Triton is not installed (pip install --no-deps nvidia-pytriton==0.7.0)"


def export(bundle: Path, repository: Path) -> tuple[str, ...]:
    """Write a bundle's networks where `Triton` reads them; their names."""
    return write_repository(Bundle.load(bundle), repository, backend="python")


class Triton:
    """A server that can be killed, stopped and started again on the same port.

    Args:
        repository: of models.
        directory: for its backend and its log.
        options: further ones of its command line, by name.

    Attributes:
        repository: of models, read at each start.
        address: host:port of its gRPC server.
    """

    def __init__(self, repository: Path, directory: Path, **options: Any) -> None:
        found = importlib.util.find_spec("pytriton")
        if found is None or found.origin is None:
            pytest.skip(_MISSING)
        package = Path(found.origin).parent
        server, backends = package / "tritonserver", directory / "backends"
        python = backends / "python"
        if not python.exists():
            shutil.copytree(server / "backends" / "python", python)
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
            if not stub.exists():
                pytest.skip(f"this Triton has no Python backend for Python {version}")
            shutil.copy(stub, python)
        self.port, self._http, self._log = _free_port(), _free_port(), directory / "log"
        self.repository = repository
        self.address = f"127.0.0.1:{self.port}"
        given = {
            "backend-directory": backends,
            "grpc-address": "127.0.0.1",
            "grpc-port": self.port,
            "http-address": "127.0.0.1",
            "http-port": self._http,
            "allow-metrics": "false",
            "exit-timeout-secs": "1",
            **{name.replace("_", "-"): value for name, value in options.items()},
        }
        self._command: list[str | Path] = [
            server / "bin" / "tritonserver",
            *(f"--{n}={v}" for n, v in given.items()),
        ]
        libraries = [package.parent / "nvidia_pytriton.libs", Path(sys.base_prefix) / "lib"]
        self._environment = {
            **os.environ,
            # The backend's Python takes its packages from the environment of the first python3.
            "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
            "OMP_NUM_THREADS": "1",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Start it, in a process group of its own: with the backend's processes."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, f"--model-repository={self.repository}"],
                env=self._environment,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until it serves."""
        until = time.monotonic() + _START
        while time.monotonic() < until and self._process and self._process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return  # it listens once its models are loaded
            except OSError:
                time.sleep(0.1)
        pytest.fail(f"Triton did not start: {self._log.read_text(errors='replace')[-3000:]}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and to the backend's processes."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Kill it, with the backend's processes."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def batches(self, model: str) -> tuple[int, int]:
        """How many inputs it has run, and in how many runs, by its own statistics."""
        url = f"http://127.0.0.1:{self._http}/v2/models/{model}/stats"
        with urllib.request.urlopen(url, timeout=10) as response:
            (of,) = json.load(response)["model_stats"]
        return of["inference_count"], of["execution_count"]


@contextmanager
def running(repository: Path, directory: Path, **options: Any) -> Iterator[Triton]:
    """A Triton that serves while the block lasts."""
    triton = Triton(repository, directory, **options)
    try:
        triton.start()
        yield triton
    finally:
        triton.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port

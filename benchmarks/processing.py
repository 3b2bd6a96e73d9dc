"""What ext_proc adds: requests through an Envoy that asks us first, beside the same Envoy without.

    python -m benchmarks.processing [--short]

One Envoy with a single worker has three listeners: `asking` has the filter of
deploy/envoy/ext_proc.yaml, `plain` is the same without it, and a third one answers for the
LLM, at once or after a while. bestroute serves the embedded bundle in a process of its own. Clients
keep their connections, and no prompt is sent twice, so that each goes through the network.

- alone: one caller, and an upstream that answers at once. The callers' requests go through both
  listeners in turn, so that what else happens on the machine happens to both.
- together: 16 callers, and an upstream that takes 50 to 150 ms, in which few LLMs would begin. That
  time is taken off what they measure; being drawn anew each time, it keeps callers from marching
  in step.
- flood: 16 callers, and an upstream that answers at once: what it can do at most.

The latter two are measured in turns of a few seconds. The figure that counts is the difference of
the medians, `added_ms`, which is to be at most 2 ms alone and together.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.children import child, serve_until_signal
from benchmarks.latencies import quantile
from benchmarks.overload import PROMPTS, distinct
from bestroute import app
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.config import Mesh, Server, Settings
from bestroute.observe.logs import log_to_stderr
from bestroute.tokenizer import Tokenizer

EXAMPLE = Path(__file__).parents[1] / "deploy" / "envoy" / "ext_proc.yaml"
MOST_MS = 2.0
"""Milliseconds that may be added at the median."""
CALLERS = 16
LLM_MS = (50, 150)
"""Milliseconds that the upstream takes where it isn't to answer at once: at least, and at most."""
MODES = ("plain", "asking")


def main() -> int:
    """Measure, print the table, keep the JSON."""
    parser = argparse.ArgumentParser(description="What ext_proc adds to a request.")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--short", action="store_true", help="see that it works; keep nothing")
    options = parser.parse_args()
    if options.short:
        options.seconds, options.rounds = 0.5, 1
    network = Bundle.load(DEFAULT_BUNDLE).manifest.router
    tokenizer = Tokenizer(Bundle.load(DEFAULT_BUNDLE).tokenizer_path, max_tokens=network.max_tokens)
    prompts = distinct(record.mixed_prompts(tokenizer, PROMPTS))
    with (
        tempfile.TemporaryDirectory() as directory,
        child("benchmarks.processing.serve") as server,
        envoy(server.running.address, Path(directory)) as ports,
    ):
        found = asyncio.run(measured(ports, prompts, options.seconds, options.rounds))
    Console().print(_table(found))
    if options.short:
        return 0
    settings = {
        "seconds": options.seconds,
        "rounds": options.rounds,
        "callers": CALLERS,
        "upstream_ms": LLM_MS,
        "most_ms": MOST_MS,
    }
    kept = record.write("processing", settings, found)
    print(f"kept in {kept.relative_to(Path.cwd())}")
    return 0


def serve() -> None:
    """Serve until SIGTERM; prints the address when ready."""
    log_to_stderr("WARNING", "text")
    settings = Settings(server=Server(listen="127.0.0.1:0"), mesh=Mesh(external_processing=True))
    serve_until_signal(app.serving(settings))


@contextmanager
def envoy(adapter: str, directory: Path) -> Iterator[dict[str, int]]:
    """Run Envoy while the block lasts; gives the ports of its listeners by name.

    Args:
        adapter: host:port of bestroute.
        directory: for its files.
    """
    file, admin, log = (directory / name for name in ("envoy.json", "admin", "log"))
    file.write_text(json.dumps(_bootstrap(int(adapter.rpartition(":")[2]))), encoding="utf-8")
    command = [sys.executable, "-m", "envoy._main", "-c", str(file), "--concurrency", "1"]
    command += ["--admin-address-path", str(admin), "--disable-hot-restart", "-l", "error"]
    with (
        log.open("w") as lines,
        subprocess.Popen(command, stdout=lines, stderr=lines) as process,
    ):
        try:
            yield _ports(process, admin, log)
        finally:
            process.terminate()


def _ports(process: "subprocess.Popen[bytes]", admin: Path, log: Path) -> dict[str, int]:
    for _ in range(600):
        time.sleep(0.1)
        if process.poll() is not None:
            break
        try:
            url = f"http://{admin.read_text(encoding='utf-8')}/listeners?format=json"
            with urllib.request.urlopen(url, timeout=5) as response:
                listeners = json.load(response)["listener_statuses"]
        except (OSError, KeyError, ValueError):
            continue
        time.sleep(1)  # it knows its ports before it listens there
        return {
            each["name"]: each["local_address"]["socket_address"]["port_value"]
            for each in listeners
            if each["name"] in MODES
        }
    raise SystemExit(f"Envoy did not start: {log.read_text(encoding='utf-8')[-2000:]}")


def _bootstrap(adapter: int) -> dict[str, Any]:
    """The example, with a second listener that doesn't ask, and an upstream of Envoy's own."""
    config: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    resources = config["static_resources"]
    config["admin"]["address"] = _tcp(0)
    [asking] = resources["listeners"]
    asking |= {"name": "asking", "address": _tcp(0)}
    plain = json.loads(json.dumps(asking)) | {"name": "plain"}
    del _manager(plain)["http_filters"][:-1]
    upstream = json.loads(json.dumps(plain)) | {"name": "upstream"}
    upstream["address"] = {"pipe": {"path": "@bestroute-benchmark-upstream"}}
    manager = _manager(upstream)
    fault = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault"
    # Runs for whoever says so by the header x-envoy-fault-delay-request, in milliseconds.
    delay = {"header_delay": {}, "percentage": {"numerator": 100, "denominator": "HUNDRED"}}
    manager["http_filters"] = [
        {"name": "envoy.filters.http.fault", "typed_config": {"@type": fault, "delay": delay}},
        manager["http_filters"][-1],
    ]
    answer = {"status": 200, "body": {"inline_string": '{"choices": []}'}}
    manager["route_config"] = {
        "virtual_hosts": [
            {
                "name": "llm",
                "domains": ["*"],
                "routes": [{"match": {"prefix": "/"}, "direct_response": answer}],
            }
        ]
    }
    resources["listeners"] = [asking, plain, upstream]
    for cluster in resources["clusters"]:
        ours = cluster["name"] == "bestroute"
        place = _tcp(adapter) if ours else upstream["address"]
        cluster["type"] = "STATIC"
        cluster.pop("transport_socket", None)
        cluster["load_assignment"]["endpoints"] = [
            {"lb_endpoints": [{"endpoint": {"address": place}}]}
        ]
    return config


def _tcp(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _manager(listener: dict[str, Any]) -> dict[str, Any]:
    manager: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


async def measured(
    ports: dict[str, int], prompts: Iterator[str], seconds: float, rounds: int
) -> dict[str, Any]:
    """Put both under every load, in turn.

    Returns:
        By load and mode `p50_ms`, `p99_ms`, `per_second`; by load `added_ms`, the difference of the
        medians.
    """
    found: dict[str, Any] = {}
    at_once = (0, 0)
    for load, callers, wait in (
        ("alone", 1, at_once),
        ("together", CALLERS, LLM_MS),
        ("flood", CALLERS, at_once),
    ):
        took: dict[str, list[float]] = {mode: [] for mode in MODES}
        spent = dict.fromkeys(MODES, 0.0)
        for turn in range(rounds + 1):  # the first warms up
            turns = [MODES] if callers == 1 else [(mode,) for mode in MODES]
            for modes in turns:
                began = time.perf_counter()
                times = await _turn(ports, modes, callers, wait, seconds, prompts)
                for mode in modes if turn else ():
                    took[mode] += times[mode]
                    spent[mode] += sum(times[mode]) if callers == 1 else time.perf_counter() - began
        found[load] = {mode: _figures(took[mode], spent[mode]) for mode in MODES}
        plain, asking = (found[load][mode]["p50_ms"] for mode in MODES)
        found[load]["added_ms"] = asking - plain
    return found


async def _turn(
    ports: dict[str, int],
    modes: tuple[str, ...],
    callers: int,
    wait: tuple[int, int],
    seconds: float,
    prompts: Iterator[str],
) -> dict[str, list[float]]:
    """Have callers ask for so long, each of the modes in turn; gives how long answers took."""
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    until = time.perf_counter() + seconds

    async def call() -> None:
        open_ = {mode: await asyncio.open_connection("127.0.0.1", ports[mode]) for mode in modes}
        while time.perf_counter() < until:
            for mode, (reader, writer) in open_.items():
                waited = random.randint(*wait)
                request = _request(next(prompts), waited)
                began = time.perf_counter()
                writer.write(request)
                await _answered(reader)
                times[mode].append(time.perf_counter() - began - waited / 1000)
        for _, writer in open_.values():
            writer.close()
            await writer.wait_closed()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(callers):
            tasks.create_task(call())
    return times


def _request(prompt: str, wait: int) -> bytes:
    body = json.dumps(
        {"model": "bestroute/auto", "messages": [{"role": "user", "content": prompt}]}
    ).encode()
    delay = f"x-envoy-fault-delay-request: {wait}\r\n" if wait else ""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: llm\r\n{delay}content-length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


async def _answered(reader: asyncio.StreamReader) -> None:
    """Read an answer.

    Raises:
        SystemExit: it is an error.
    """
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"an answer that is none: {head.decode()}")
    _, _, length = head.lower().partition(b"content-length: ")
    await reader.readexactly(int(length.partition(b"\r\n")[0]))


def _figures(times: list[float], seconds: float) -> dict[str, float]:
    return {
        "p50_ms": 1e3 * quantile(times, 0.5),
        "p99_ms": 1e3 * quantile(times, 0.99),
        "answers": len(times),
        "per_second": len(times) / seconds,
    }


def _table(found: dict[str, Any]) -> Table:
    table = Table("load", "mode", "p50 ms", "p99 ms", "per second", "added ms at the median")
    for load, figures in found.items():
        for mode in MODES:
            each = figures[mode]
            added = f"{figures['added_ms']:+.2f}" if mode == "asking" else ""
            row = [f"{each['p50_ms']:.2f}", f"{each['p99_ms']:.2f}", f"{each['per_second']:.0f}"]
            table.add_row(load, mode, *row, added)
    return table


if __name__ == "__main__":
    sys.exit(main())

"""Half an hour with everything that goes wrong, and whether the server is the same at its end.

    python -m benchmarks.soak [--minutes 30] [--short]

`bestroute serve` with the default bundle, in a process of its own: its networks fail in one run of
a thousand and stall for 2.5 s every minute; its LLM's API fails in every third call; callers of
every kind (`benchmarks.soaking.callers`) ask, leave, cancel and send rubbish, and every few seconds
a process full of them is killed; every 15 seconds the bundle is swapped and reloaded; metrics are
scraped. Once a second it is noted what the server holds: resident memory, open files, threads,
tasks of its event loop. The first fifth of the time is not counted: caches fill.

A figure is flat if its median over the last fifth is no more than a little above that over the
second fifth; the slope is Theil and Sen's, over all but the first fifth. `--short` takes 40
seconds, stalls and reloads more often, and keeps nothing. The exit code is 1 if anything rose, an
answer was wrong, or the server didn't serve in the end.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import theilslopes

from benchmarks import record
from benchmarks.process import served
from benchmarks.soaking.upstream import upstream
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub

PROMPTS = 200
FAILING = 0.001
BAD_ANSWERS = 0.3
SLACK: Mapping[str, float] = {"resident_mb": 0.03, "open_files": 0.1, "threads": 0.1, "tasks": 0.3}
"""By how much of it a figure may rise from the second fifth of the time to the last."""
_CONFIG = """
bundle = "{bundle}"
[metrics]
listen = "127.0.0.1:{metrics}"
[routing]
cache_entries = 50
[providers.rough]
base_url = "{url}"
read_timeout = 1
[models."llama-4-maverick"]
provider = "rough"
[models."claude-sonnet-4"]
provider = "rough"
"""


@dataclass
class Sample:
    """What the server holds at a time."""

    seconds: float
    resident_mb: float
    open_files: int
    threads: int
    tasks: int


@dataclass(frozen=True)
class Trend:
    """How a figure went.

    Attributes:
        early: median over the second fifth of the time.
        late: median over the last.
        per_hour: the slope, by Theil and Sen; with its 95 % interval.
        flat: whether late is no more than the slack above early.
    """

    early: float
    late: float
    per_hour: tuple[float, float, float]
    flat: bool


def trend(seconds: Sequence[float], values: Sequence[float], slack: float) -> Trend:
    """How a figure went over time.

    Args:
        seconds: when each value was noted, rising.
        values: as many.
        slack: by how much of it the figure may rise.
    """
    fifth = len(values) // 5
    early, late = np.median(values[fifth : 2 * fifth]), np.median(values[-fifth:])
    slope, _, low, high = theilslopes(values[fifth:], seconds[fifth:])
    per_hour = (3600 * float(slope), 3600 * float(low), 3600 * float(high))
    return Trend(float(early), float(late), per_hour, bool(late <= early * (1 + slack) + 1))


@dataclass
class Soak:
    """What happened."""

    samples: list[Sample] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    log: Counter[str] = field(default_factory=Counter)
    reloads: int = 0
    killed: int = 0
    not_serving: float = 0.0
    serves: bool = False


def main() -> int:
    """Soak, print the tables, keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="default: 30")
    parser.add_argument("--short", action="store_true", help="40 seconds; keeps nothing")
    options = parser.parse_args()
    seconds = 40.0 if options.short else 60 * options.minutes
    pace = (10.0, 5.0, 6.0) if options.short else (60.0, 15.0, 10.0)
    soak = asyncio.run(_soak(seconds, *pace))
    counted = [s for s in soak.samples if s.seconds <= seconds]
    times = [s.seconds for s in counted]
    trends = {
        name: trend(times, [getattr(s, name) for s in counted], slack)
        for name, slack in SLACK.items()
    }
    _print(soak, trends)
    # Half a minute is no time for memory to settle.
    flat = options.short or all(each.flat for each in trends.values())
    passed = flat and soak.serves and not soak.wrong
    if not options.short:
        figures = {
            "trends": {name: asdict(each) for name, each in trends.items()},
            **{name: value for name, value in vars(soak).items() if name != "samples"},
            "samples": [asdict(each) for each in soak.samples[:: max(1, len(counted) // 120)]],
            "passed": passed,
        }
        settings = {"seconds": seconds, "stall_every": pace[0], "reload_every": pace[1]}
        print(record.write("soak", settings, figures))
    return 0 if passed else 1


async def _soak(seconds: float, stall: float, reload: float, kill: float) -> Soak:
    soak = Soak()
    with TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        bundles = [_copy(directory, version) for version in ("soak-a", "soak-b")]
        link = directory / "bundle"
        link.symlink_to(bundles[0])
        url = stack.enter_context(upstream(1, BAD_ANSWERS))
        metrics = _free_port()
        config = directory / "bestroute.toml"
        config.write_text(_CONFIG.format(bundle=link, url=url, metrics=metrics))
        module = ("benchmarks.soaking.server", "1", str(FAILING), str(stall))
        server, address = stack.enter_context(
            served("--config", config, module=module, read=_noting(soak.log))
        )
        known = directory / "known.json"
        known.write_text(json.dumps(await _decisions(address)))
        deadline = time.monotonic() + seconds
        callers = stack.enter_context(_callers(address, seconds, 1, known))
        with Progress(transient=True) as progress:
            task = progress.add_task("soaking", total=seconds)
            async with asyncio.TaskGroup() as tasks:
                around = [
                    tasks.create_task(_reload(soak, server, link, bundles, reload)),
                    tasks.create_task(_kill(soak, address, known, kill)),
                    tasks.create_task(_watch_health(soak, address)),
                ]
                begun = time.monotonic()
                while time.monotonic() < deadline:
                    await asyncio.sleep(1)
                    sample = await asyncio.to_thread(_sample, server.pid, metrics)
                    sample.seconds = time.monotonic() - begun
                    soak.samples.append(sample)
                    progress.update(task, completed=sample.seconds)
                for each in around:
                    each.cancel()
        said, _ = await asyncio.to_thread(callers.communicate)
        counted = json.loads(said)
        soak.ended.update(counted["ended"])
        soak.wrong.update(counted["wrong"])
        await asyncio.sleep(stall / 10 + 5)  # whatever was stalled is over
        soak.serves = await _healthy(address)
        last = await asyncio.to_thread(_sample, server.pid, metrics)
        last.seconds = time.monotonic() - begun
        soak.samples.append(last)
    return soak


def _copy(directory: Path, version: str) -> Path:
    copied = directory / version
    shutil.copytree(DEFAULT_BUNDLE, copied)
    manifest = copied / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps(content | {"version": version}), encoding="utf-8")
    return copied


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


def _noting(log: Counter[str]) -> Callable[[str], None]:
    """What counts the lines of the server's log by their level and what they begin with."""

    def note(line: str) -> None:
        if found := re.match(r"\S+ \S+ (\w+) (\S+ \S+ \S+ \S+)", line):
            log[f"{found[1]} {found[2]}"] += 1

    return note


async def _decisions(address: str) -> dict[str, str]:
    """What is decided about each prompt, before anything fails."""
    bundle = Bundle.load(DEFAULT_BUNDLE)
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=bundle.manifest.router.max_tokens)
    known = {}
    async with grpc.aio.insecure_channel(address) as channel:
        stub = RoutingServiceStub(channel)
        for prompt in record.mixed_prompts(tokenizer, PROMPTS):
            answer = await stub.Route(pb.RouteRequest(prompt=prompt), timeout=10)
            known[prompt] = f"{answer.arm.model} x {answer.arm.samples}"
    return known


@contextmanager
def _callers(
    address: str, seconds: float, seed: int, known: Path
) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "benchmarks.soaking.callers", address]
    with subprocess.Popen(
        [*command, str(seconds), str(seed), str(known)], stdout=subprocess.PIPE, text=True
    ) as callers:
        try:
            yield callers
        finally:
            callers.kill()


async def _reload(
    soak: Soak, server: "subprocess.Popen[str]", link: Path, bundles: list[Path], every: float
) -> None:
    while True:
        await asyncio.sleep(every)
        soak.reloads += 1
        other = link.with_name("other")
        other.symlink_to(bundles[soak.reloads % 2])
        other.replace(link)
        server.send_signal(signal.SIGHUP)


async def _kill(soak: Soak, address: str, known: Path, every: float) -> None:
    while True:
        with _callers(address, 3600.0, soak.killed + 2, known):
            await asyncio.sleep(every / 2)
        soak.killed += 1
        await asyncio.sleep(every / 2)


async def _watch_health(soak: Soak, address: str) -> None:
    while True:
        begun = time.monotonic()
        await asyncio.sleep(0.2)
        if not await _healthy(address):
            soak.not_serving += time.monotonic() - begun


async def _healthy(address: str) -> bool:
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            request = health_pb2.HealthCheckRequest()
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _sample(pid: int, metrics: int) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text()
    values = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE))
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10) as response:
        scraped = response.read().decode()
    (tasks,) = re.findall(r"^bestroute_event_loop_tasks ([0-9.e+]+)$", scraped, re.MULTILINE)
    return Sample(
        0.0,
        int(values["VmRSS"]) / 1024,
        len(os.listdir(f"/proc/{pid}/fd")),
        int(values["Threads"]),
        int(float(tasks)),
    )


def _print(soak: Soak, trends: Mapping[str, Trend]) -> None:
    table = Table(title="what the server holds")
    for column in ("", "early", "late", "per hour [95 %]", "after the load", "flat"):
        table.add_column(column, justify="left" if not column else "right")
    for name, each in trends.items():
        slope, low, high = each.per_hour
        table.add_row(
            name,
            f"{each.early:.1f}",
            f"{each.late:.1f}",
            f"{slope:+.2f} [{low:+.2f}, {high:+.2f}]",
            f"{getattr(soak.samples[-1], name):.1f}",
            "yes" if each.flat else "NO",
        )
    console = Console()
    console.print(table)
    console.print(f"{soak.reloads} reloads, {soak.killed} processes of callers killed")
    console.print(f"health said NOT_SERVING for {soak.not_serving:.1f} s; in the end it ", end="")
    console.print("serves" if soak.serves else "does NOT serve")
    console.print("calls:", dict(sorted(soak.ended.items())))
    console.print("wrong:", dict(soak.wrong) or "nothing")
    console.print("log:", dict(soak.log.most_common(12)))


if __name__ == "__main__":
    sys.exit(main())

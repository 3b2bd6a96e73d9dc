"""Hostile messages by the million to a real server; none may harm it, or anybody else's answer.

    python -m benchmarks.fuzz [--cases 1000000] [--seed 1] [--replay FILE]

`bestroute serve` runs as a process of its own, with the embedded bundle, a scripted LLM, metrics
and a decision log that keeps all it can. What it is sent depends on the seed alone
(`benchmarks.mutation`, `benchmarks.garbage`); how its answers are judged says `benchmarks.attack`.
Most messages go by RouteStream, 250 to a stream, one in fifty to the other RPCs, with odd metadata,
and beside them go connections that carry no gRPC at all. In the end the log must hold no traceback,
health must be SERVING, and threads and files must be as many as at the start.

A fault is saved with the messages that brought it about, as a file that `--replay` sends again.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import grpc
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

from benchmarks import record
from benchmarks.attack import NEIGHBOURS, Fault, Found, Known, attack, lasting, load, replay, save
from benchmarks.process import READY
from bestroute import convert
from bestroute.bundle import DEFAULT_BUNDLE, read_manifest
from bestroute.config import Settings
from bestroute.process import new_event_loop
from bestroute.prompt import Prompt
from bestroute.router import open_router
from bestroute.target import Policy

_UNARY = 0.02
"""Share of the messages that don't go by RouteStream."""
_GARBAGE = 0.05
"""Connections of garbage per such message."""
_SUSPICIOUS = re.compile(r"Traceback|\bERROR\b|\bCRITICAL\b|Exception")
_SETTLING = 10.0
"""Seconds in which connections that were broken off are cleaned up."""
_MORE_FILES, _MORE_THREADS = 4, 32
"""What may be there that wasn't: a connection that is being closed; threads of pools, which begin
when they are first needed and then stay."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a process holds.

    Attributes:
        threads: of the process.
        files: and sockets that are open.
        rss_mb: resident memory, 10^6 bytes.
    """

    threads: int
    files: int
    rss_mb: float

    @classmethod
    def of(cls, pid: int) -> "Vitals":
        """Of a process, now."""
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        numbers = dict(re.findall(r"^(Threads|VmRSS):\s+(\d+)", status, re.MULTILINE))
        files = len(os.listdir(f"/proc/{pid}/fd"))
        return cls(int(numbers["Threads"]), files, int(numbers["VmRSS"]) * 1024 / 1e6)


@dataclass
class Served:
    """A server under attack.

    Attributes:
        pid: its process.
        address: where it listens.
        log: the lines that should not be in its log.
    """

    pid: int
    address: str = ""
    log: list[str] = field(default_factory=list)


@contextmanager
def served(*flags: str | Path) -> Iterator[Served]:
    """`bestroute serve` on a free port, for as long as the block lasts; its log is read."""
    command = [sys.executable, "-m", "bestroute", "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, *map(str, flags)], stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        found, ready = Served(process.pid), Event()

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                if match := READY.search(line.strip()):
                    found.address = match[1]
                    ready.set()
                elif _SUSPICIOUS.search(line) and len(found.log) < 100:
                    found.log.append(line.rstrip())
            ready.set()

        reading = Thread(target=read)
        reading.start()
        try:
            ready.wait()
            if not found.address:
                raise SystemExit(f"the server ended before it was ready: {found.log}")
            yield found
        finally:
            process.terminate()
            reading.join()
        if process.wait() != 0:
            found.log.append(f"the server ended with exit code {process.returncode}")


@asynccontextmanager
async def scripted_llm() -> AsyncIterator[str]:
    """An OpenAI-compatible server that says "4" to everything; gives its base URL."""

    async def complete(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for delta, reason in (({"content": "4"}, None), ({}, "stop")):
            chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application(client_max_size=2**30)
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/v1"
    finally:
        await runner.cleanup()


def configuration(llm: str, directory: Path, bundle: Path = DEFAULT_BUNDLE) -> Path:
    """A configuration file by which one LLM serves all models, and all that can be kept is kept."""
    lines = ["[providers.local]", f'base_url = "{llm}"', "[decision_log]"]
    lines += [f"directory = {json.dumps(str(directory / 'log'))}", "max_file_rows = 2000"]
    lines += ['prompts = "keep"', 'answers = "keep"', "callers = true"]
    lines += ["[metrics]", 'listen = "127.0.0.1:0"']
    for model in read_manifest(bundle).models:
        lines += [f"[models.{json.dumps(model.name)}]", 'provider = "local"']
    path = directory / "bestroute.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


async def known(configuration: Path) -> Known:
    """What a server has to answer neighbours, worked out without one and with no memory."""
    settings = Settings.load(configuration, {"routing": {"cache_entries": 0}})
    answers: Known = {}
    async with open_router(settings) as router:
        for prompt in NEIGHBOURS:
            routed = await router.decide(Prompt.of(prompt), Policy())
            version = router.manifest.version
            answers[prompt] = lasting(convert.route_response("", routed, version, explain=True))
    return answers


async def health(address: str) -> str:
    """What the server says of its health."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest()
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=_SETTLING)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def leaked(before: Vitals, after: Vitals) -> bool:
    """Whether a process holds more threads or files than before, by more than can be explained."""
    files, threads = after.files - before.files, after.threads - before.threads
    return files > _MORE_FILES or threads > _MORE_THREADS


async def settled(pid: int, before: Vitals) -> Vitals:
    """What a process holds once it holds no more than before, or has had the time for that."""
    give_up = time.monotonic() + _SETTLING
    while True:
        now = Vitals.of(pid)
        if not leaked(before, now) or time.monotonic() > give_up:
            return now
        await asyncio.sleep(0.2)


def aftermath(server: Served, before: Vitals, after: Vitals, status: str) -> list[Fault]:
    """What is wrong with a server after an attack."""
    faults = [Fault(f"in the log: {line}") for line in server.log]
    if status != "SERVING":
        faults.append(Fault(f"health is {status}"))
    if leaked(before, after):
        faults.append(Fault(f"threads or files are left: {before} then, {after} now"))
    return faults


async def fuzz(cases: int, seed: int, directory: Path) -> tuple[Found, Vitals, Vitals]:
    """Attack a server of one's own.

    Args:
        cases: messages.
        seed: another one gives others.
        directory: for the configuration.

    Returns:
        What came of it; what the server held after the first messages; what it held in the end.
    """
    unary = round(cases * _UNARY)
    async with scripted_llm() as llm:
        config = configuration(llm, directory)
        expected = await known(config)
        # The server is started and ended off the loop, on which the LLM answers it.
        starting = served("--config", config)
        server = await asyncio.to_thread(starting.__enter__)
        try:
            # Threads, caches and allocators grow with the first messages of each kind.
            found = await attack(server.address, seed=seed + 1, streamed=500, unary=100)
            before = Vitals.of(server.pid)
            rest = await attack(
                server.address,
                seed=seed,
                streamed=cases - unary,
                unary=unary,
                connections=round(unary * _GARBAGE),
                known=expected,
            )
            rest.faults += found.faults
            after = await settled(server.pid, before)
            rest.faults += aftermath(server, before, after, await health(server.address))
        finally:
            await asyncio.to_thread(starting.__exit__, None, None, None)
    return rest, before, after


async def _again(path: Path, directory: Path) -> Found:
    async with scripted_llm() as llm:
        starting = served("--config", configuration(llm, directory))
        server = await asyncio.to_thread(starting.__enter__)
        try:
            found = await replay(server.address, load(path))
            found.faults += [Fault(f"in the log: {line}") for line in server.log]
        finally:
            await asyncio.to_thread(starting.__exit__, None, None, None)
    return found


def main() -> int:
    """Attack, or replay; print what came of it, keep the figures."""
    options = _options()
    out = Console()
    with (
        TemporaryDirectory() as directory,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        if options.replay:
            found = runner.run(_again(options.replay, Path(directory)))
        else:
            found, before, after = runner.run(fuzz(options.cases, options.seed, Path(directory)))
            figures = {
                "cases": found.cases,
                "cases_per_second": round(found.cases / found.seconds, 1),
                "connections_of_garbage": found.connections,
                "codes": dict(sorted(found.codes.items())),
                "faults": [fault.what for fault in found.faults],
                "neighbour_answers": len(found.neighbours),
                "neighbour_slowest_ms": round(max(found.neighbours) * 1e3, 1),
                "before": asdict(before),
                "after": asdict(after),
            }
            out.print_json(json.dumps(figures))
            if not options.discard:
                settings = {"cases": options.cases, "seed": options.seed}
                out.print(str(record.write("fuzz", settings, figures)))
    for number, fault in enumerate(found.faults[:20]):
        out.print(f"fault: {fault.what[:300]}", markup=False)
        if fault.cases and not options.replay:
            options.save.mkdir(parents=True, exist_ok=True)
            path = options.save / f"fault-{options.seed}-{number}.jsonl"
            save(fault.cases, path)
            out.print(f"  {len(fault.cases)} messages in {path}", markup=False)
    return 1 if found.faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path, help="a file of an earlier fault")
    parser.add_argument("--save", type=Path, default=Path("work/fuzz"), help="for such files")
    parser.add_argument("--discard", action="store_true", help="don't keep the figures")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

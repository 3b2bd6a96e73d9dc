"""What the gateway adds to an upstream call, beside the same call made without it.

    python -m benchmarks.gateway [--rounds N] [--discard]

An upstream in a process of its own answers at once. The same calls are made to it and through the
gateway, in turns, over connections that stay open: one caller call by call, then many callers round
by round. Every prompt is new, so that each is decided anew.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from benchmarks import record
from benchmarks.latencies import quantile
from benchmarks.process import READ_ANEW, served
from benchmarks.upstream import started
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.process import new_event_loop
from bestroute.tokenizer import Tokenizer

CALLERS = 32
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
        },
    },
}
_USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
_COMPLETION = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 0,
    "model": "any",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "word " * 50},
            "finish_reason": "stop",
        }
    ],
    "usage": _USAGE,
}
Body = dict[str, Any]


def bodies(model: str, prompts: Iterator[str]) -> Mapping[str, Iterator[Body]]:
    """What is asked, by what it is called: endless requests, each with another prompt.

    Args:
        model: of the pool.
        prompts: endless, too.
    """

    def endless(name: str, **more: Any) -> Iterator[Body]:
        return (
            {"model": name, "messages": [{"role": "user", "content": prompt}], **more}
            for prompt in prompts
        )

    return {
        "a model's own name": endless(model),
        "bestroute/auto": endless("bestroute/auto"),
        "bestroute/auto with tools": endless("bestroute/auto", tools=[_TOOL]),
        "bestroute/auto streamed": endless(
            "bestroute/auto", stream=True, stream_options={"include_usage": True}
        ),
    }


class Caller:
    """Makes calls, to the upstream or through the gateway.

    Args:
        session: to make them with.
        url: base URL.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, f"{url}/chat/completions"

    async def call(self, body: Body) -> float:
        """Make one call; gives the seconds until its last byte."""
        begun = time.perf_counter()
        headers = {"x-bestroute-max-samples": "1"}
        async with self._session.post(self._url, json=body, headers=headers) as response:
            said = await response.read()
        took = time.perf_counter() - begun
        if response.status != 200:
            raise SystemExit(f"{self._url} answered {response.status}: {said[:500]!r}")
        return took


async def one_by_one(
    bare: Caller, gateway: Caller, asked: Iterator[Body], calls: int
) -> Mapping[str, list[float]]:
    """One caller, whose calls take turns; gives the seconds of each."""
    times: dict[str, list[float]] = {"bare": [], "gateway": []}
    for _ in range(calls):
        times["bare"].append(await bare.call(next(asked)))
        times["gateway"].append(await gateway.call(next(asked)))
    return times


async def together(
    caller: Caller, asked: Iterator[Body], callers: int, calls: int
) -> tuple[float, list[float]]:
    """Many callers at once; gives calls per second, and the seconds of each."""
    times: list[float] = []

    async def keep_calling() -> None:
        for _ in range(calls):
            times.append(await caller.call(next(asked)))

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(callers):
            tasks.create_task(keep_calling())
    return len(times) / (time.perf_counter() - begun), times


def _milliseconds(times: list[float]) -> dict[str, float]:
    return {
        "p50_ms": 1e3 * quantile(times, 0.5),
        "p90_ms": 1e3 * quantile(times, 0.9),
        "p99_ms": 1e3 * quantile(times, 0.99),
    }


async def measured(
    bare: Caller, gateway: Caller, asked: Iterator[Body], rounds: int, calls: int
) -> dict[str, Any]:
    """The figures of one kind of request."""
    await one_by_one(bare, gateway, asked, calls // 4)
    times: dict[str, list[float]] = {"bare": [], "gateway": []}
    rates: dict[str, list[float]] = {"bare": [], "gateway": []}
    crowded: dict[str, list[float]] = {"bare": [], "gateway": []}
    for _ in range(rounds):
        for name, found in (await one_by_one(bare, gateway, asked, calls)).items():
            times[name] += found
        for name, caller in (("bare", bare), ("gateway", gateway)):
            rate, found = await together(caller, asked, CALLERS, max(1, calls // 8))
            rates[name].append(rate)
            crowded[name] += found
    one = {name: _milliseconds(found) for name, found in times.items()}
    many = {
        name: {"per_second": statistics.median(rates[name]), **_milliseconds(found)}
        for name, found in crowded.items()
    }
    added = one["gateway"]["p50_ms"] - one["bare"]["p50_ms"]
    return {"added_p50_ms": added, "1 caller": one, f"{CALLERS} callers": many}


def _prompts() -> Iterator[str]:
    """New prompts without end, of the lengths of real questions."""
    bundle = Bundle.load(DEFAULT_BUNDLE)
    limit = bundle.manifest.router.max_tokens
    mixed = record.mixed_prompts(Tokenizer(bundle.tokenizer_path, max_tokens=limit), 500)
    return (f"{number} {prompt}" for number, prompt in enumerate(itertools.cycle(mixed)))


def _configuration(url: str) -> str:
    names = [model.name for model in Bundle.load(DEFAULT_BUNDLE).manifest.models]
    models = "".join(f"[models.{json.dumps(name)}]\nprovider = 'here'\n" for name in names)
    return f"[providers.here]\nbase_url = '{url}'\nmax_concurrency = 1000\n{models}"


async def _measure(bare: str, gateway: str, rounds: int, calls: int) -> dict[str, Any]:
    model = Bundle.load(DEFAULT_BUNDLE).manifest.models[0].name
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        callers = Caller(session, bare), Caller(session, gateway)
        figures = {}
        for name, asked in bodies(model, _prompts()).items():
            found = figures[name] = await measured(*callers, asked, rounds, calls)
            one, many = found["1 caller"], found[f"{CALLERS} callers"]
            print(
                f"{name}: {one['bare']['p50_ms']:.2f} ms bare, {one['gateway']['p50_ms']:.2f} ms "
                f"through the gateway ({found['added_p50_ms']:+.2f}); {CALLERS} callers: "
                f"{many['bare']['per_second']:.0f} and {many['gateway']['per_second']:.0f} per s",
                flush=True,
            )
    return figures


@asynccontextmanager
async def answering() -> AsyncIterator[str]:
    """An upstream that answers at once while the block lasts; gives its base URL."""
    whole = json.dumps(_COMPLETION).encode()
    stream = b"".join(
        b"data: " + json.dumps(chunk).encode() + b"\n\n"
        for chunk in (
            *({"choices": [{"index": 0, "delta": {"content": "word "}}]} for _ in range(50)),
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": _USAGE},
        )
    )

    async def complete(request: web.Request) -> web.Response:
        asked = await request.json()
        if asked.get("stream"):
            return web.Response(body=stream + b"data: [DONE]\n\n", content_type="text/event-stream")
        return web.Response(body=whole, content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/v1"
    finally:
        await runner.cleanup()


async def _answer() -> None:
    async with answering() as url:
        print(url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=8, help="of each kind of request (default: 8)"
    )
    parser.add_argument("--calls", type=int, default=400, help="of one caller per round and way")
    parser.add_argument("--discard", action="store_true", help="don't keep the figures")
    parser.add_argument("--upstream", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.upstream:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_answer())
        return
    alone = {"BESTROUTE_GATEWAY__ALONE": "true", "BESTROUTE_GATEWAY__LISTEN": "127.0.0.1:0"}
    with (
        tempfile.TemporaryDirectory() as directory,
        started("-m", "benchmarks.gateway", "--upstream") as upstream,
    ):
        file = Path(directory) / "bestroute.toml"
        file.write_text(_configuration(upstream), encoding="utf-8")
        with (
            served("--config", file, environment={**READ_ANEW, **alone}) as (_, address),
            asyncio.Runner(loop_factory=new_event_loop) as runner,
        ):
            url = f"http://{address}/v1"
            figures = runner.run(_measure(upstream, url, args.rounds, args.calls))
    if not args.discard:
        settings = {"rounds": args.rounds, "calls": args.calls, "callers": CALLERS}
        print(record.write("gateway", settings, figures))


if __name__ == "__main__":
    main()

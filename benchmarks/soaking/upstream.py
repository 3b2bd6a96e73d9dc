"""An LLM's API that misbehaves now and then, in a process of its own.

    python -m benchmarks.soaking.upstream SEED SHARE

It prints its base URL as one line and runs until its standard input ends. SHARE of the calls are
refused (429, 500, 503), cut off, fall silent, answer nothing, or stream what is no JSON.
"""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from aiohttp import web

FAULTS = ("429", "500", "503", "cut", "silent", "empty", "garbage", "slow")
_WORDS = ["the", "answer", "is", "one", "of", "seven", "and", "so", "on"]
_SILENCE = 30.0
"""Seconds: longer than anybody waits here."""


class Upstream:
    """The handler; `share` of its answers are bad."""

    def __init__(self, source: random.Random, share: float) -> None:
        self._source, self._share = source, share

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer a call, or don't, until its caller leaves."""
        await request.read()
        bad = self._source.random() < self._share
        fault = self._source.choice(FAULTS) if bad else None
        if fault in ("429", "500", "503"):
            headers = {"Retry-After": "0.05"} if self._source.random() < 0.5 else {}
            return web.json_response(
                {"error": {"message": fault}}, status=int(fault), headers=headers
            )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        with suppress(ConnectionError):
            await response.prepare(request)
            if fault == "slow":
                await asyncio.sleep(0.5)
            length = 0 if fault == "empty" else self._source.randint(2, 30)
            words = self._source.choices(_WORDS, k=length)
            for position, word in enumerate(words):
                await response.write(_chunk({"content": word + " "}, None))
                await asyncio.sleep(0.002)
                if position == len(words) // 2:
                    if fault == "cut" and request.transport:
                        request.transport.close()
                        return response
                    if fault == "silent":
                        await asyncio.sleep(_SILENCE)
                    if fault == "garbage":
                        await response.write(b'data: {"choices": [{"delta": \n\n\xff\xfe\n\n')
            await response.write(_chunk({}, "stop"))
            usage = {"prompt_tokens": 20, "completion_tokens": length, "total_tokens": 20 + length}
            await response.write(_event({"choices": [], "usage": usage}))
            await response.write(b"data: [DONE]\n\n")
        return response


def _chunk(delta: dict[str, str], finish_reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return _event({"id": "soak", "choices": [choice]})


def _event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


async def _serve(seed: int, share: float) -> None:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", Upstream(random.Random(seed), share).complete)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


@contextmanager
def upstream(seed: int, share: float) -> Iterator[str]:
    """Run one while the block lasts; gives its base URL."""
    command = [sys.executable, "-m", "benchmarks.soaking.upstream", str(seed), str(share)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))

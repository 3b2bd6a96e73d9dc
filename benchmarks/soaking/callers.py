"""Callers of every kind, well and badly behaved, in a process of their own.

    python -m benchmarks.soaking.callers ADDRESS SECONDS SEED KNOWN.json

They do what callers do in a year: ask, score, generate, leave in the middle, open streams and
cancel them, let go of calls without a word, send rubbish, come with deadlines that can't be met. At
the end one line of JSON says how many calls ended how. An answer that differs from the one that is
known for its prompt is wrong, and so is a code that nobody promised.
"""

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from bestroute.v1 import routing_pb2 as pb
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub

if TYPE_CHECKING:
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

Known = dict[str, str]
"""The chosen arm, as MODEL x N, by prompt. The bundles that take turns decide alike."""

ALLOWED = {
    "Route": {"OK", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"},
    "RouteStream": {"OK", "CANCELLED", "UNAVAILABLE", "RESOURCE_EXHAUSTED"},
    # A reward model that raises is INTERNAL on purpose.
    "Score": {"OK", "INTERNAL", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"},
    "Generate": {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"},
}
_PACE = 0.02
"""Seconds that each caller rests between two calls."""


class Callers:
    """What each kind of caller does; `ended` counts how calls ended, `wrong` what was not right."""

    def __init__(self, address: str, source: random.Random, known: Known) -> None:
        self._address, self._source, self._known = address, source, known
        self._prompts = sorted(known)
        self.ended: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """Call for so long, each kind on a connection of its own that is opened anew at times."""
        kinds: list[Callable[[RoutingServiceAsyncStub], Coroutine[None, None, None]]] = [
            self._ask,
            self._ask,
            self._stream,
            self._leave_a_stream,
            self._score,
            self._generate,
            self._leave_an_answer,
            self._let_go,
            self._send_rubbish,
        ]
        end = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as tasks:
            for kind in kinds:
                tasks.create_task(self._repeat(kind, end))

    async def _repeat(
        self, kind: "Callable[[RoutingServiceAsyncStub], Coroutine[None, None, None]]", end: float
    ) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        while (now := asyncio.get_running_loop().time()) < end:
            until = min(end, now + self._source.uniform(1, 10))
            async with grpc.aio.insecure_channel(self._address, options) as channel:
                stub: RoutingServiceAsyncStub = RoutingServiceStub(channel)
                while asyncio.get_running_loop().time() < until:
                    await kind(stub)
                    await asyncio.sleep(_PACE)

    def _count(self, method: str, code: str) -> None:
        self.ended[f"{method} {code}"] += 1
        if code not in ALLOWED[method]:
            self.wrong[f"{method} {code}"] += 1

    def _check(self, prompt: str, answer: pb.RouteResponse) -> None:
        failed = answer.fallback_reason == pb.FALLBACK_REASON_ROUTER_FAILED
        if not failed and f"{answer.arm.model} x {answer.arm.samples}" != self._known[prompt]:
            self.wrong["another's decision"] += 1

    async def _ask(self, stub: "RoutingServiceAsyncStub") -> None:
        prompt = self._source.choice(self._prompts)
        deadline = self._source.choice([0.001, 1.0, 10.0, 10.0])
        try:
            self._check(prompt, await stub.Route(pb.RouteRequest(prompt=prompt), timeout=deadline))
        except grpc.aio.AioRpcError as error:
            self._count("Route", error.code().name)
        else:
            self._count("Route", "OK")

    async def _stream(self, stub: "RoutingServiceAsyncStub") -> None:
        prompts = self._source.choices(self._prompts, k=20)
        call = stub.RouteStream(timeout=20)
        try:
            for number, prompt in enumerate(prompts):
                request = pb.RouteRequest(request_id=str(number), prompt=prompt)
                await call.write(pb.RouteStreamRequest(request=request))
            await call.done_writing()
            answered = set()
            async for answer in call:
                answered.add(int(answer.request_id))
                if answer.HasField("response"):
                    self._check(prompts[int(answer.request_id)], answer.response)
            if len(answered) != len(prompts):
                self.wrong["a message without an answer"] += 1
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        self._count("RouteStream", (await call.code()).name)

    async def _leave_a_stream(self, stub: "RoutingServiceAsyncStub") -> None:
        call = stub.RouteStream(timeout=20)
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for prompt in self._source.choices(self._prompts, k=self._source.randint(1, 50)):
                await call.write(pb.RouteStreamRequest(request=pb.RouteRequest(prompt=prompt)))
        call.cancel()
        with suppress(asyncio.CancelledError):
            self._count("RouteStream", (await call.code()).name)

    async def _score(self, stub: "RoutingServiceAsyncStub") -> None:
        request = pb.ScoreRequest(
            prompt=self._source.choice(self._prompts), responses=["4", "It is 5.", "I don't know."]
        )
        try:
            await stub.Score(request, timeout=10)
        except grpc.aio.AioRpcError as error:
            self._count("Score", error.code().name)
        else:
            self._count("Score", "OK")
        await asyncio.sleep(0.2)

    def _generation(self) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            request=pb.RouteRequest(prompt=self._source.choice(self._prompts)),
            arm=pb.Arm(model="llama-4-maverick", samples=self._source.randint(1, 3)),
            sampling=pb.Sampling(seed=1),
        )

    async def _generate(self, stub: "RoutingServiceAsyncStub") -> None:
        call = stub.Generate(self._generation(), timeout=self._source.choice([0.3, 5.0, 10.0]))
        ends = 0
        with suppress(grpc.aio.AioRpcError):
            async for event in call:
                ends += event.HasField("result")
        code = (await call.code()).name
        self._count("Generate", code)
        # The deadline may come between the result and the call's end.
        if ends > 1 or (code == "OK" and not ends):
            self.wrong["not one result"] += 1

    async def _leave_an_answer(self, stub: "RoutingServiceAsyncStub") -> None:
        call = stub.Generate(self._generation(), timeout=10)
        with suppress(grpc.aio.AioRpcError):
            events = 0
            async for _ in call:
                events += 1
                if events > self._source.randint(1, 10):
                    break
        call.cancel()
        with suppress(asyncio.CancelledError):
            self._count("Generate", (await call.code()).name)

    async def _let_go(self, stub: "RoutingServiceAsyncStub") -> None:
        """Begin calls and forget them; grpcio keeps them until the channel closes."""
        stub.Route(pb.RouteRequest(prompt=self._source.choice(self._prompts)), timeout=10)
        stub.RouteStream(timeout=1)
        await asyncio.sleep(0.1)

    async def _send_rubbish(self, stub: "RoutingServiceAsyncStub") -> None:
        bad = self._source.choice(
            [
                pb.RouteRequest(),
                pb.RouteRequest(prompt=" "),
                pb.RouteRequest(prompt="x" * 300_000),
                pb.RouteRequest(prompt="x", policy=pb.RoutingPolicy(match_threshold=7)),
            ]
        )
        try:
            await stub.Route(bad, timeout=10)
        except grpc.aio.AioRpcError as error:
            self._count("Route", error.code().name)
        else:
            self.wrong["rubbish was taken"] += 1


async def _main(address: str, seconds: float, seed: int, known: Known) -> None:
    callers = Callers(address, random.Random(seed), known)
    await callers.run(seconds)
    print(json.dumps({"ended": callers.ended, "wrong": callers.wrong}), flush=True)


if __name__ == "__main__":
    address, seconds, seed, known = sys.argv[1:]
    asyncio.run(_main(address, float(seconds), int(seed), json.loads(Path(known).read_text())))

"""`bestroute.v1.RoutingService`: proto in, proto out; decides nothing itself."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from bestroute import convert
from bestroute.completion import Delta
from bestroute.config import Server
from bestroute.errors import InvalidRequest
from bestroute.router import Routed, Router
from bestroute.status import Context, Draining, server_stream, status_of, unary
from bestroute.v1 import routing_pb2 as pb
from bestroute.wire import Malformed, decoder

NAME = "bestroute.v1.RoutingService"


class RoutingService:
    """The handlers of the service over one router.

    Args:
        router: decides, scores and generates.
        limits: what a request may hold.
    """

    def __init__(self, router: Router, limits: Server) -> None:
        self._router, self._limits = router, limits
        self._draining = asyncio.Event()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register every RPC, with decoders that name what is malformed."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Route": grpc.unary_unary_rpc_method_handler(
                unary(self.route), decoder(pb.RouteRequest), pb.RouteResponse.SerializeToString
            ),
            "RouteStream": grpc.stream_stream_rpc_method_handler(
                self.route_stream,
                decoder(pb.RouteStreamRequest),
                pb.RouteStreamResponse.SerializeToString,
            ),
            "Score": grpc.unary_unary_rpc_method_handler(
                unary(self.score), decoder(pb.ScoreRequest), pb.ScoreResponse.SerializeToString
            ),
            "Generate": grpc.unary_stream_rpc_method_handler(
                server_stream(self.generate),
                decoder(pb.GenerateRequest),
                pb.GenerateResponse.SerializeToString,
            ),
            "ListArms": grpc.unary_unary_rpc_method_handler(
                unary(self.list_arms),
                decoder(pb.ListArmsRequest),
                pb.ListArmsResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))

    async def route(self, request: pb.RouteRequest, context: Context) -> pb.RouteResponse:
        """Decide."""
        self._admit()
        return await self._route(request, _deadline(context))

    async def route_stream(
        self,
        requests: AsyncIterator[pb.RouteStreamRequest | Malformed[pb.RouteStreamRequest]],
        context: Context,
    ) -> None:
        """Decide for each message, many at once, and answer as each is ready."""
        window = asyncio.Semaphore(self._limits.stream_window)
        answered: asyncio.Queue[pb.RouteStreamResponse | None] = asyncio.Queue()
        deadline = _deadline(context)

        async def answer(message: pb.RouteStreamRequest | Malformed[pb.RouteStreamRequest]) -> None:
            answered.put_nowait(await self._stream_answer(message, deadline))

        async def read(answers: asyncio.TaskGroup) -> None:
            async for message in requests:
                await window.acquire()
                answers.create_task(answer(message))

        async def write() -> None:
            while response := await answered.get():
                await context.write(response)
                window.release()

        async with asyncio.TaskGroup() as writing:
            writing.create_task(write())
            async with asyncio.TaskGroup() as answers:
                reading = answers.create_task(read(answers))
                draining = answers.create_task(self._draining.wait())
                await asyncio.wait([reading, draining], return_when=asyncio.FIRST_COMPLETED)
                reading.cancel()
                draining.cancel()
            answered.put_nowait(None)
        if self._draining.is_set():
            # What was read is answered; whoever has asked more since then asks another server.
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(Draining()))

    def drain(self) -> None:
        """Refuse new calls; end the open streams once what was read from them is answered."""
        self._draining.set()

    def _admit(self) -> None:
        if self._draining.is_set():
            raise Draining

    async def score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Score given answers."""
        self._admit()
        limits = self._limits
        prompt = convert.prompt(request, limits.max_prompt_bytes)
        answers = convert.answers(request, limits.max_responses, limits.max_prompt_bytes)
        scored = await self._router.score(prompt, answers, deadline=_deadline(context))
        return pb.ScoreResponse(
            request_id=request.request_id,
            rewards=scored.rewards,
            best=scored.best,
            truncated=scored.truncated,
            bundle_version=self._router.manifest.version,
            timing=convert.timing(scored.timing),
        )

    async def generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Decide, sample, score, and answer with the best."""
        self._admit()
        order = convert.order(request, self._limits, time.monotonic(), _deadline(context))
        execution = request.execution
        with_deltas = execution.stream_deltas or not execution.HasField("stream_deltas")
        reference_cost_usd = 0.0
        try:
            async with aclosing(self._router.generate(order)) as events:
                async for event in events:
                    if isinstance(event, Routed):
                        reference_cost_usd = event.decision.reference.estimated_cost_usd
                        yield pb.GenerateResponse(decision=self._response(request.request, event))
                    elif with_deltas or not isinstance(event, Delta):
                        yield convert.event(event, reference_cost_usd)
        except InvalidRequest as error:
            # The policy lies inside the request to route, the arm beside it.
            inside = error.field.startswith("policy")
            raise (error.within("request") if inside else error) from error

    async def list_arms(self, request: pb.ListArmsRequest, context: Context) -> pb.ListArmsResponse:
        """List the pool, its prices and its calibration."""
        self._admit()
        manifest, prices = self._router.manifest, self._router.prices
        trade_offs = manifest.trade_offs
        return pb.ListArmsResponse(
            bundle_version=manifest.version,
            reference_model=manifest.reference_model,
            models=[
                pb.Model(
                    name=model.name,
                    input_usd_per_mtok=prices[model.name].input_usd_per_mtok,
                    output_usd_per_mtok=prices[model.name].output_usd_per_mtok,
                    mean_output_tokens=model.mean_output_tokens,
                )
                for model in manifest.models
            ],
            arms=convert.arms(self._router.rules.arms()),
            calibration=[pb.Point(**point.model_dump()) for point in manifest.curve],
            trade_offs=convert.trade_offs(trade_offs) if trade_offs else (),
            default_quality_per_usd=trade_offs.default_quality_per_usd if trade_offs else None,
            gates=[convert.gate(gate) for gate in manifest.gates],
        )

    async def _stream_answer(
        self,
        message: pb.RouteStreamRequest | Malformed[pb.RouteStreamRequest],
        deadline: float | None,
    ) -> pb.RouteStreamResponse:
        if isinstance(message, Malformed):
            return pb.RouteStreamResponse(
                request_id=message.request_id, error=status_of(message.error)
            )
        request_id = message.request.request_id
        try:
            response = await self._route(message.request, deadline)
        except InvalidRequest as error:
            return pb.RouteStreamResponse(
                request_id=request_id, error=status_of(error.within("request"))
            )
        except Exception as error:
            return pb.RouteStreamResponse(request_id=request_id, error=status_of(error))
        return pb.RouteStreamResponse(request_id=request_id, response=response)

    async def _route(self, request: pb.RouteRequest, deadline: float | None) -> pb.RouteResponse:
        prompt = convert.prompt(request, self._limits.max_prompt_bytes)
        policy = convert.policy(request.policy)
        routed = await self._router.decide(prompt, policy, deadline=deadline)
        return self._response(request, routed)

    def _response(self, request: pb.RouteRequest, routed: Routed) -> pb.RouteResponse:
        version = self._router.manifest.version
        return convert.route_response(request.request_id, routed, version, explain=request.explain)


def _deadline(context: Context) -> float | None:
    """The caller's deadline on the clock of `time.monotonic`; None if it set none."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining

"""`bestroute.v1.RoutingService`: proto in, proto out; decides nothing itself."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from bestroute import convert
from bestroute.boundary import Boundary
from bestroute.call import Call
from bestroute.config import Server
from bestroute.desk import Decided, Desk
from bestroute.errors import InvalidRequest
from bestroute.status import Context, Draining, code_of, status_of
from bestroute.upstream.completion import Delta
from bestroute.upstream.relay import Opened, Piece
from bestroute.v1 import routing_pb2 as pb
from bestroute.wire import Malformed, decoder

NAME = "bestroute.v1.RoutingService"


class RoutingService:
    """The handlers of the service.

    Args:
        desk: where requests are served.
        limits: what a request may hold.
        boundary: what is around every RPC.
    """

    def __init__(self, desk: Desk, limits: Server, boundary: Boundary) -> None:
        self._desk, self._limits, self._boundary = desk, limits, boundary

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register every RPC, with decoders that name what is malformed."""
        around = self._boundary
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Route": grpc.unary_unary_rpc_method_handler(
                around.unary("Route", self.route),
                decoder(pb.RouteRequest),
                pb.RouteResponse.SerializeToString,
            ),
            "RouteStream": grpc.stream_stream_rpc_method_handler(
                around.streams("RouteStream", self.route_stream),
                decoder(pb.RouteStreamRequest),
                pb.RouteStreamResponse.SerializeToString,
            ),
            "Score": grpc.unary_unary_rpc_method_handler(
                around.unary("Score", self.score),
                decoder(pb.ScoreRequest),
                pb.ScoreResponse.SerializeToString,
            ),
            "Generate": grpc.unary_stream_rpc_method_handler(
                around.server_stream("Generate", self.generate),
                decoder(pb.GenerateRequest),
                pb.GenerateResponse.SerializeToString,
            ),
            "ListArms": grpc.unary_unary_rpc_method_handler(
                around.unary("ListArms", self.list_arms),
                decoder(pb.ListArmsRequest),
                pb.ListArmsResponse.SerializeToString,
            ),
            "Feedback": grpc.unary_unary_rpc_method_handler(
                around.unary("Feedback", self.feedback),
                decoder(pb.FeedbackRequest),
                pb.FeedbackResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))

    async def route(self, request: pb.RouteRequest, call: Call) -> pb.RouteResponse:
        """Decide."""
        return await self._route(request, call)

    async def route_stream(
        self,
        requests: AsyncIterator[pb.RouteStreamRequest | Malformed[pb.RouteStreamRequest]],
        context: Context,
        call: Call,
    ) -> None:
        """Decide for each message, many at once, and answer as each is ready."""
        window = asyncio.Semaphore(self._limits.stream_window)
        answered: asyncio.Queue[pb.RouteStreamResponse | None] = asyncio.Queue()

        async def answer(message: pb.RouteStreamRequest | Malformed[pb.RouteStreamRequest]) -> None:
            answered.put_nowait(await self._stream_answer(message, call))

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
                draining = answers.create_task(self._boundary.draining.wait())
                await asyncio.wait([reading, draining], return_when=asyncio.FIRST_COMPLETED)
                reading.cancel()
                draining.cancel()
            answered.put_nowait(None)
        if self._boundary.draining.is_set():
            # What was read is answered; whoever has asked more since then asks another server.
            raise Draining

    async def score(self, request: pb.ScoreRequest, call: Call) -> pb.ScoreResponse:
        """Score given answers."""
        limits = self._limits
        prompt = convert.prompt(request, limits.max_prompt_bytes)
        answers = convert.answers(request, limits.max_responses, limits.max_prompt_bytes)
        scored, router = await self._desk.score(prompt, answers, call)
        return pb.ScoreResponse(
            request_id=request.request_id,
            rewards=scored.rewards,
            best=scored.best,
            truncated=scored.truncated,
            bundle_version=router.manifest.version,
            timing=convert.timing(scored.timing),
        )

    async def generate(
        self, request: pb.GenerateRequest, call: Call
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Decide, sample, score, and answer with the best."""
        order = convert.order(request, self._limits, time.monotonic(), call)
        execution = request.execution
        with_deltas = execution.stream_deltas or not execution.HasField("stream_deltas")
        reference_cost = 0.0
        try:
            async with aclosing(self._desk.generate(order)) as events:
                async for event in events:
                    if isinstance(event, Decided):
                        reference_cost = event.routed.decision.reference.estimated_cost_usd
                        decision = _response(request.request, event)
                        yield pb.GenerateResponse(decision=decision)
                    elif isinstance(event, Opened | Piece):
                        continue  # of requests that are passed through, and this is none
                    elif with_deltas or not isinstance(event, Delta):
                        yield convert.event(event, reference_cost)
        except InvalidRequest as error:
            # The policy lies inside the request to route, the arm beside it.
            inside = error.field.startswith("policy")
            raise (error.within("request") if inside else error) from error

    async def feedback(self, request: pb.FeedbackRequest, call: Call) -> pb.FeedbackResponse:
        """Take in how a decision turned out."""
        self._desk.traffic.feedback(request.decision_id, request.quality, request.source, call)
        return pb.FeedbackResponse()

    async def list_arms(self, request: pb.ListArmsRequest, call: Call) -> pb.ListArmsResponse:
        """List the pool, its prices and its calibration."""
        router = self._desk.live.router
        manifest, prices = router.manifest, router.prices
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
                    cached_input_usd_per_mtok=prices[model.name].input_usd_per_mtok
                    - prices[model.name].cache_saves_usd_per_mtok,
                )
                for model in manifest.models
            ],
            arms=convert.arms(router.rules.arms(), router.rules.disabled),
            calibration=[pb.Point(**point.model_dump()) for point in manifest.curve],
            trade_offs=convert.trade_offs(trade_offs) if trade_offs else (),
            default_quality_per_usd=trade_offs.default_quality_per_usd if trade_offs else None,
            gates=[convert.gate(gate) for gate in manifest.gates],
        )

    async def _stream_answer(
        self,
        message: pb.RouteStreamRequest | Malformed[pb.RouteStreamRequest],
        stream: Call,
    ) -> pb.RouteStreamResponse:
        inner = message if isinstance(message, Malformed) else message.request
        began, code, failed = time.monotonic(), grpc.StatusCode.CANCELLED, None
        call = self._desk.telemetry.message("RouteStream", stream)
        try:
            self._boundary.callers.admit(call)
            if isinstance(message, Malformed):
                raise message.error
            response = await self._route(message.request, call)
            code = grpc.StatusCode.OK
            return pb.RouteStreamResponse(request_id=inner.request_id, response=response)
        except Exception as error:
            failed = error
            if isinstance(error, InvalidRequest) and inner is not message:
                error = error.within("request")
            status = status_of(error)
            code = code_of(status)
            return pb.RouteStreamResponse(request_id=inner.request_id, error=status)
        finally:
            seconds = time.monotonic() - began
            self._desk.telemetry.answered("RouteStream", call, code, seconds, failed)

    async def _route(self, request: pb.RouteRequest, call: Call) -> pb.RouteResponse:
        prompt = convert.prompt(request, self._limits.max_prompt_bytes)
        policy = convert.policy(request.policy)
        session = convert.session(request)
        return _response(request, await self._desk.decide(prompt, policy, call, session))


def _response(request: pb.RouteRequest, decided: Decided) -> pb.RouteResponse:
    response = convert.route_response(
        request.request_id,
        decided.routed,
        decided.router.manifest.version,
        explain=request.explain,
    )
    if decided.decision_id:
        response.decision_id = decided.decision_id
    return response

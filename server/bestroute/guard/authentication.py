"""API keys and JWTs, around every RPC: who shows neither gets no further."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import grpc

from bestroute.config import Security
from bestroute.guard.keys import Keys, digest, read_keys
from bestroute.guard.refreshed import Refreshed
from bestroute.guard.tokens import Tokens
from bestroute.tasks import task_group

authenticated: ContextVar[str | None] = ContextVar("authenticated", default=None)
"""The name that the caller of the RPC under way has proved to have, in that RPC's task."""

OPEN = "/grpc.health.v1.Health/"
"""What anybody may ask, since load balancers have no credentials."""

if TYPE_CHECKING:  # generic in the stub files only
    Handler = grpc.RpcMethodHandler[Any, Any]


@asynccontextmanager
async def authenticating(
    security: Security, refused: Callable[[str], None]
) -> AsyncIterator["Authentication | None"]:
    """The interceptor that authenticates while the block lasts; none where nothing is configured.

    Args:
        security: how callers show who they are.
        refused: is told the method of every call that is refused.

    Raises:
        ConfigInvalid: the keys can't be read.
    """
    if not security.credentials:
        yield None
        return
    keys = read_keys(security.api_keys_file) if security.api_keys_file else None
    tokens = Tokens(security) if security.tokens else None
    sources: list[Refreshed[Any]] = [keys] if keys else []
    sources += [tokens.keys] if tokens else []
    for source in sources:
        await source.start()
    async with task_group() as tasks:
        following = [tasks.create_task(source.follow()) for source in sources]
        try:
            yield Authentication(keys, tokens, refused)
        finally:
            for task in following:
                task.cancel()


class Authentication(grpc.aio.ServerInterceptor):
    """Asks every caller for an API key or a JWT.

    Args:
        keys: those that are good; None: no key is.
        tokens: verifies JWTs; None: none is good.
        refused: is told the method of every call that is refused.

    Attributes:
        words: what whoever is refused is told; the same whatever was wrong with what was shown,
            since details would help who guesses.
    """

    def __init__(
        self,
        keys: Refreshed[Keys] | None,
        tokens: Tokens | None,
        refused: Callable[[str], None],
    ) -> None:
        self._keys, self._tokens, self._refused = keys, tokens, refused
        shown = [
            *(["an API key"] if keys else []),
            *(["a valid JWT"] if tokens else []),
        ]
        self.words = f"send {' or '.join(shown)} as metadata authorization: Bearer ..."

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[Handler | None]"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Let a known caller pass, under its name."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith(OPEN):
            return handler
        caller = await self.caller(handler_call_details.invocation_metadata)
        if caller is None:
            self._refused(method)
            return self._refusal(handler)
        authenticated.set(caller)  # the RPC's handler runs in this task
        return handler

    async def caller(self, metadata: Any) -> str | None:
        """The caller by what its metadata shows, or an HTTP request's headers; None: nobody."""
        shown = [
            (key, value) for key, value in metadata or () if key in ("authorization", "x-api-key")
        ]
        if len(shown) != 1:  # with several, a proxy and we might not read the same one
            return None
        ((key, value),) = shown
        if key == "authorization":
            scheme, _, value = value.partition(" ")
            if scheme.lower() != "bearer":
                return None
            value = value.strip()
        if self._keys and (caller := self._keys.value.get(digest(value))):
            return caller
        if self._tokens and key == "authorization":
            return await self._tokens.caller(value)
        return None

    def _refusal(self, handler: "Handler") -> "Handler":
        async def refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, self.words, (("www-authenticate", "Bearer"),)
            )

        # Of the handler's kind, but without its decoder: strangers' messages aren't even parsed.
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[bool(handler.request_streaming), bool(handler.response_streaming)]
        refusal: Handler = make(refuse)
        return refusal

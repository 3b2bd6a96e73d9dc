"""The token that says who calls, sent with every call."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import grpc

Token = str | Callable[[], str]
"""An API key or a JWT; or what gives one, asked at every call, for those that expire."""


def authorized(channel: grpc.aio.Channel, token: Token) -> grpc.aio.Channel:
    """The channel, whose calls all carry the token."""
    return cast(grpc.aio.Channel, _Authorized(channel, token))


class _Authorized:
    """As much of a channel as generated stubs need.

    gRPC's own credentials of calls ask a thread at each call and don't work without TLS; its
    interceptors make every call two tasks.
    """

    def __init__(self, channel: grpc.aio.Channel, token: Token) -> None:
        self._channel, self._token = channel, token
        self.close = channel.close

    def unary_unary(self, *args: Any, **options: Any) -> Callable[..., Any]:
        return self._with_token(self._channel.unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> Callable[..., Any]:
        return self._with_token(self._channel.unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> Callable[..., Any]:
        return self._with_token(self._channel.stream_unary(*args, **options))

    def stream_stream(self, *args: Any, **options: Any) -> Callable[..., Any]:
        return self._with_token(self._channel.stream_stream(*args, **options))

    def _with_token(self, method: Any) -> Callable[..., Any]:
        def call(
            *args: Any, metadata: Sequence[tuple[str, str | bytes]] | None = None, **options: Any
        ) -> Any:
            token = self._token if isinstance(self._token, str) else self._token()
            sent = (*(metadata or ()), ("authorization", f"Bearer {token}"))
            return method(*args, metadata=sent, **options)

        return call

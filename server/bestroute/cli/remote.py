"""Commands that ask a running service."""

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc

from bestroute.cli.terminal import complain
from bestroute.client import Client
from bestroute.client.channel import open_channel
from bestroute.errors import (
    BestrouteError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    SpendLimitReached,
)


class Unusable(Exception):
    """The arguments can't be used to connect; says which and why."""


def client(args: argparse.Namespace) -> Client:
    """A client of the address in the arguments.

    Raises:
        Unusable: TLS or token can't be had as they say.
    """
    try:
        return Client(
            args.address,
            timeout=args.timeout,
            credentials=_credentials(args),
            server_name=args.tls_server_name,
            token=_token(args),
        )
    except ValueError as error:
        raise Unusable(f"{error}; --tls or --tls-ca connects by TLS") from error


def channel(args: argparse.Namespace) -> grpc.aio.Channel:
    """A channel to the address in the arguments, for what `Client` has no method for.

    Raises:
        Unusable: TLS or token can't be had as they say.
    """
    try:
        return open_channel(
            args.address, _credentials(args), server_name=args.tls_server_name, token=_token(args)
        )
    except ValueError as error:
        raise Unusable(f"{error}; --tls or --tls-ca connects by TLS") from error


def ask(args: argparse.Namespace, work: Callable[[Client], Awaitable[None]]) -> int:
    """Do work with a client of the address in the arguments; gives the exit code."""

    async def connected() -> None:
        async with client(args) as connection:
            await work(connection)

    try:
        asyncio.run(connected())
    except (InvalidRequest, Unusable) as error:
        return complain(str(error), code=2)
    except (BestrouteError, grpc.aio.AioRpcError) as error:
        return complain(advice(error, args), code=1)
    return 0


def advice(error: Exception, args: argparse.Namespace) -> str:
    """What went wrong and what to do next, in one line."""
    match error:
        case SpendLimitReached():
            return str(error)
        case Overloaded():
            return f"{args.address} is overloaded; try again in {error.retry_after:.3g} s"
        case DeadlineExceeded():
            return f"no answer from {args.address} within {args.timeout:g} s; see --timeout"
        case grpc.aio.AioRpcError():
            return _advice(error.code(), error.details() or "", args.address)
    return str(error)


def _advice(code: grpc.StatusCode, details: str, address: str) -> str:
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return (
                f"{address} can't be reached ({details}); "
                "start the service with `bestroute serve`, or say where it is with --address; "
                "one with TLS is reached by --tls or --tls-ca"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"what answers at {address} is not a bestroute service; see --address"
        case grpc.StatusCode.UNAUTHENTICATED:
            return (
                f"{address} doesn't know who calls; put an API key or a JWT into a file and name "
                "that with --token-file, or set BESTROUTE_TOKEN"
            )
    return f"{address} answered {code.name}: {details}"


def _credentials(args: argparse.Namespace) -> grpc.ChannelCredentials | None:
    """For TLS, where the arguments ask for it."""
    if (args.tls_cert is None) != (args.tls_key is None):
        raise Unusable("--tls-cert and --tls-key go together")
    if not (args.tls or args.tls_ca or args.tls_cert):
        return None
    ca, key, certificate = map(_contents, (args.tls_ca, args.tls_key, args.tls_cert))
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _token(args: argparse.Namespace) -> str | None:
    if args.token_file is not None:
        try:
            if token := (_contents(args.token_file) or b"").decode().strip():
                return token
        except UnicodeDecodeError:
            pass
        raise Unusable(f"--token-file {args.token_file} holds no token")
    # Not in bestroute.config, with which a health check would load the whole configuration.
    return os.environ.get("BESTROUTE_TOKEN", "").strip() or None  # noqa: TID251


def _contents(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise Unusable(str(error)) from error

"""Commands that ask a running service."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable

import grpc

from bestroute.cli.terminal import complain
from bestroute.client import Client
from bestroute.errors import (
    BestrouteError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
)


def ask(args: argparse.Namespace, work: Callable[[Client], Awaitable[None]]) -> int:
    """Do work with a client of the address in the arguments; gives the exit code."""

    async def connected() -> None:
        async with Client(args.address, timeout=args.timeout) as client:
            await work(client)

    try:
        asyncio.run(connected())
    except InvalidRequest as error:
        return complain(str(error), code=2)
    except (BestrouteError, grpc.aio.AioRpcError) as error:
        return complain(advice(error, args), code=1)
    return 0


def advice(error: Exception, args: argparse.Namespace) -> str:
    """What went wrong and what to do next, in one line."""
    match error:
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
                "start the service with `bestroute serve`, or say where it is with --address"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"what answers at {address} is not a bestroute service; see --address"
    return f"{address} answered {code.name}: {details}"

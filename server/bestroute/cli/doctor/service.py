"""The service at an address: can it be reached, is it well, what does it serve."""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Iterable

import grpc

from bestroute import __version__
from bestroute.cli.doctor import reach
from bestroute.cli.doctor.findings import Finding, fail, ok, warn
from bestroute.cli.remote import Unusable, advice, channel, client
from bestroute.client import Client
from bestroute.errors import BestrouteError
from bestroute.v1 import operations_pb2 as pb
from bestroute.v1.operations_pb2_grpc import OperationsServiceStub

_HEALTH_NAMES = ("", "liveness", "readiness", "bestroute.v1.RoutingService")
_SKEW = 30.0
"""Seconds that clocks may differ by: about what issuers of tokens allow."""


async def checks(args: argparse.Namespace) -> AsyncIterator[Finding]:
    """Ask one thing after the other; what can't be asked after a failure is left out."""
    if wrong := reach.unusable(args.address):
        yield wrong
        return
    if captured := reach.captured(args.address):
        yield captured
    try:
        async with client(args) as service:
            async for finding in _asked(service, args):
                yield finding
        if not args.quiet:
            async for finding in _watched(args):
                yield finding
    except (BestrouteError, grpc.aio.AioRpcError, Unusable) as error:
        yield fail(advice(error, args))
        if _unreachable(error):
            for finding in await asyncio.to_thread(lambda: [*reach.why(args)]):
                yield finding


def _unreachable(error: Exception) -> bool:
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED)
    return isinstance(error, BestrouteError)


async def _asked(service: Client, args: argparse.Namespace) -> AsyncIterator[Finding]:
    serving = {name: await _serves(service, name) for name in _HEALTH_NAMES}
    yield ok(f"{args.address} answers")
    if away := [name for name, serves in serving.items() if not serves]:
        yield fail(
            f"health: not serving as {_quoted(away)}; it is starting or shutting down: "
            "wait, or look into its log"
        )
    else:
        yield ok(f"health: serving as {_quoted(_HEALTH_NAMES)}")
    pool = await service.list_arms()
    found = f"{len(pool.arms)} arms of {len(pool.models)} models"
    yield ok(f"bundle {pool.bundle_version}: {found}, reference {pool.reference_model}")


async def _serves(client: Client, name: str) -> bool:
    try:
        return await client.check(name)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return False
        raise


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


async def _watched(args: argparse.Namespace) -> AsyncIterator[Finding]:
    connection = channel(args)
    try:
        call = OperationsServiceStub(connection).WatchStatus(
            pb.WatchStatusRequest(), timeout=args.timeout
        )
        status = await call.read()
        call.cancel()
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
            raise
        yield warn(f"the service is older than this command ({__version__}); update it")
        return
    finally:
        await connection.close()
    if isinstance(status, pb.WatchStatusResponse):
        for finding in told(status, time.time()):
            yield finding


def told(status: pb.WatchStatusResponse, now: float) -> Iterable[Finding]:
    """What the service says of itself that may not be as it was meant.

    Args:
        status: what it says.
        now: this machine's clock, in seconds since 1970.
    """
    process = status.process
    if process.version != __version__:
        yield warn(
            f"the service is bestroute {process.version}, this command {__version__}; "
            "install the same, or expect that one lacks what the other has"
        )
    ahead = status.time.ToNanoseconds() / 1e9 - now
    if abs(ahead) > _SKEW:
        yield warn(
            f"the service's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} "
            "this machine's; tokens (JWTs) and certificates may be refused: run NTP on both"
        )
    if status.fault:
        yield fail(f"it can't answer: {status.fault}; its log has the reason")
    for upstream in status.upstreams:
        for breaker in upstream.breakers:
            if breaker.state != pb.Breaker.STATE_CLOSED:
                yield warn(
                    f"provider {upstream.name}: {breaker.model} fails ({upstream.failures} of "
                    f"{upstream.calls} calls to it failed) and is left alone for a while; its "
                    "log, or `bestroute generate --model`, says why"
                )
    if status.shadow:
        yield warn("[operations] shadow is set: the reference answers, whatever is decided")
    if status.disabled_arms:
        names = ", ".join(status.disabled_arms)
        yield warn(f"[operations] disabled_arms is set: {names} will not be chosen")
    for bundle in status.bundles:
        if bundle.role == pb.Bundle.ROLE_CANARY and not bundle.serving:
            yield warn(
                f"the canary {bundle.name} {bundle.version} gets no requests, since it can't "
                "answer; the log has the reason"
            )

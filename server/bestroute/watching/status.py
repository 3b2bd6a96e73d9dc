"""How things stand, as a message; reads what others count, and counts nothing itself."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from math import ceil

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from bestroute import __version__
from bestroute.batching.counts import Counts
from bestroute.desk import Desk
from bestroute.live import Live
from bestroute.observe.history import MINUTE, History, Past, Period
from bestroute.option import Fallback
from bestroute.router import Router
from bestroute.upstream.breaker import State
from bestroute.upstream.counts import UpstreamCounts
from bestroute.v1 import operations_pb2 as pb
from bestroute.v1 import routing_pb2

HOUR_MINUTES = 60

_FALLBACKS: Mapping[Fallback | None, routing_pb2.FallbackReason.ValueType] = {
    None: routing_pb2.FALLBACK_REASON_UNSPECIFIED,
    **{each: routing_pb2.FallbackReason.Value(f"FALLBACK_REASON_{each.name}") for each in Fallback},
}
_BREAKERS = {state: pb.Breaker.State.Value(f"STATE_{state.name}") for state in State}


class Observer:
    """Looks at a server again and again, for one reader.

    Args:
        desk: where requests are served.
        workers: processes that serve at the address.
    """

    def __init__(self, desk: Desk, workers: int) -> None:
        self._desk, self._workers = desk, workers
        self._batches = dict[str, tuple[int, int]]()
        self._told = 0

    def look(self) -> pb.WatchStatusResponse:
        """How things stand now; the decisions are those since the last look."""
        live, history = self._desk.live, self._desk.telemetry.history
        routers = {"": live.router, **({"canary/": live.canary} if live.canary else {})}
        lately, seconds = history.lately()
        hour = history.total(HOUR_MINUTES)
        decisions = history.last_decisions(self._told)
        self._told = decisions[-1].number if decisions else self._told
        fault = live.router.fault()
        now = time.time()
        return pb.WatchStatusResponse(
            time=timestamp(now),
            process=pb.Process(
                version=__version__,
                pid=os.getpid(),
                workers=self._workers,
                uptime=duration(max(0.0, now - history.started)),
            ),
            bundles=bundles(live),
            serving=fault is None,
            fault=fault or "",
            decisions_per_second=lately.decisions / seconds,
            methods=methods(history),
            networks=[network for each in routers.items() for network in self._networks(*each)],
            arms=[
                pb.ArmCount(model=model, samples=samples, decisions=count)
                for (model, samples), count in hour.arms.most_common()
            ],
            lately=period(lately, seconds),
            last_hour=period(hour, now - hour.start),
            upstreams=[
                upstream(prefix + name, counts)
                for prefix, router in routers.items()
                for name, counts in router.providers.counts().items()
            ],
            sessions=self._desk.sessions,
            shadow=live.operations.shadow,
            disabled_arms=live.operations.disabled_arms,
            decisions=map(past_decision, decisions),
        )

    def _networks(self, prefix: str, router: Router) -> Iterator[pb.Network]:
        for name, model in router.networks().items():
            counts = model.counts
            items, runs = counts.items, counts.sizes.total()
            items_before, runs_before = self._batches.get(prefix + name, (0, 0))
            if runs < runs_before:  # another router has taken its place
                items_before = runs_before = 0
            self._batches[prefix + name] = items, runs
            yield network(prefix + name, counts, items - items_before, runs - runs_before)


def network(name: str, counts: Counts, items: int, runs: int) -> pb.Network:
    """What waits for a network.

    Args:
        name: its.
        counts: its.
        items: that were lately run, in
        runs: so many batches.
    """
    waits = sorted(counts.waits)
    oldest = counts.oldest
    return pb.Network(
        name=name,
        waiting=counts.waiting,
        oldest_wait=None if oldest is None else duration(time.monotonic() - oldest),
        runs=counts.runs,
        mean_batch_size=items / runs if runs else None,
        queue_wait_p50=ranked(waits, 0.5),
        queue_wait_p95=ranked(waits, 0.95),
    )


def methods(history: History) -> list[pb.Method]:
    """What is called, by name."""
    paces = history.paces()
    in_flight = {name: count for name, count in history.in_flight.items() if count > 0}
    return [
        pb.Method(
            name=name,
            in_flight=in_flight.get(name, 0),
            per_second=pace.per_second if (pace := paces.get(name)) else 0.0,
            p50=duration(pace.p50) if pace else None,
            p99=duration(pace.p99) if pace else None,
        )
        for name in sorted(paces.keys() | in_flight.keys())
    ]


def bundles(live: Live) -> Iterator[pb.Bundle]:
    """What is served."""
    canary, role = live.canary, pb.Bundle.ROLE_STABLE
    share = live.share if canary else 0.0
    yield bundle(live.router, role, 1.0 - share, serving=live.router.fault() is None)
    if canary:
        yield bundle(canary, pb.Bundle.ROLE_CANARY, share, serving=bool(live.canary_serves))


def bundle(
    router: Router, role: pb.Bundle.Role.ValueType, share: float, *, serving: bool
) -> pb.Bundle:
    """A bundle that is served."""
    manifest = router.manifest
    return pb.Bundle(
        name=manifest.name, version=manifest.version, role=role, share=share, serving=serving
    )


def upstream(name: str, counts: UpstreamCounts) -> pb.Upstream:
    """What has happened at a provider."""
    return pb.Upstream(
        name=name,
        calls=counts.calls,
        failures=counts.failures.total(),
        retries=counts.retries,
        in_flight=counts.in_flight,
        breakers=[
            pb.Breaker(model=model, state=_BREAKERS[state])
            for model, state in sorted(counts.breakers.items())
        ],
    )


def past_decision(past: Past) -> pb.PastDecision:
    """A decision that was made."""
    timing, shadow = past.timing, past.shadow
    return pb.PastDecision(
        shadow_model=shadow.model if shadow else "",
        shadow_samples=shadow.samples if shadow else 0,
        shadow_cost_usd=shadow.estimated_cost_usd if shadow else 0.0,
        number=past.number,
        time=timestamp(past.time),
        model=past.arm.model,
        samples=past.arm.samples,
        estimated_cost_usd=past.arm.estimated_cost_usd,
        reference_cost_usd=past.reference.estimated_cost_usd,
        fallback_reason=_FALLBACKS[past.fallback],
        prompt_tokens=past.prompt_tokens,
        duration=None
        if timing is None
        else duration(timing.tokenize + timing.queue + timing.inference),
    )


def minutes(history: History, most: int) -> list[pb.Period]:
    """The last minutes one by one; see `History.minutes`."""
    now = time.time()
    return [period(minute, min(MINUTE, now - minute.start)) for minute in history.minutes(most)]


def period(of: Period, length: float) -> pb.Period:
    """What happened in some time, of so many seconds."""
    return pb.Period(
        start=timestamp(of.start),
        length=duration(max(0.0, length)),
        decisions=of.decisions,
        fallbacks=of.fallbacks,
        estimated_cost_usd=of.estimated_usd,
        estimated_reference_cost_usd=of.reference_usd,
        shadow_saving_usd=of.shadow_usd,
        answers=of.answers,
        cost_usd=of.answers_usd,
        reference_cost_usd=of.answers_reference_usd,
        errors=of.errors,
        failovers=of.failovers,
    )


def ranked(ordered: Sequence[float], share: float) -> Duration | None:
    """The value that a share of the ordered values is at most; None where there are none."""
    return duration(ordered[ceil(share * len(ordered)) - 1]) if ordered else None


def duration(seconds: float) -> Duration:
    """A time span."""
    made = Duration()
    made.FromNanoseconds(round(seconds * 1e9))
    return made


def timestamp(seconds: float) -> Timestamp:
    """A time, from seconds since 1970."""
    made = Timestamp()
    made.FromNanoseconds(round(seconds * 1e9))
    return made

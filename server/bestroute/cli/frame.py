"""What `bestroute top` draws: a status and the last hour, as a picture of a given size. Pure."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from google.protobuf.duration_pb2 import Duration
from rich.console import Group
from rich.text import Text

from bestroute.cli.terminal import count, milliseconds, percent, usd
from bestroute.v1 import operations_pb2 as pb
from bestroute.v1 import routing_pb2

HOUR = 60
"""Minutes in the curve of savings."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_ARM_BAR = 24
_MOST_METHODS = 2
_OWN = frozenset({"WatchStatus", "GetHistory"})
_LEAST_DECISIONS = 3
"""Lines that the last decisions get, however much else there is."""

_REASONS = {
    routing_pb2.FALLBACK_REASON_UNSPECIFIED: "",
    routing_pb2.FALLBACK_REASON_BELOW_THRESHOLD: "none good enough",
    routing_pb2.FALLBACK_REASON_OVER_BUDGET: "over budget",
    routing_pb2.FALLBACK_REASON_ROUTER_FAILED: "router failed",
}
_BREAKERS = {
    pb.Breaker.STATE_OPEN: "open",
    pb.Breaker.STATE_HALF_OPEN: "half open",
}


class View(NamedTuple):
    """What there is to show.

    Attributes:
        address: of the server.
        status: the latest.
        minutes: the last hour's, oldest first.
        decisions: the last, oldest first.
        lost: why the server can't be seen any more; empty: it can.
    """

    address: str
    status: pb.WatchStatusResponse
    minutes: Sequence[pb.Period]
    decisions: Sequence[pb.PastDecision]
    lost: str = ""


def frame(view: View, width: int, height: int | None) -> Group:
    """The picture.

    Args:
        view: what it shows.
        width: most columns.
        height: most lines; None: as many as there are.
    """
    status = view.status
    head = [*_head(view), *_savings(view, width)]
    queues = [_title("queues", width), *map(_network, status.networks)]
    upstreams = [_title("upstreams", width), *map(_upstream, status.upstreams)]
    if not status.upstreams:
        upstreams = []
    arms = [_title("arms in the last hour", width), *_arms(status.arms)]
    room = len(arms)
    if height is not None:
        # Of what there may be any number of, arms give way first, then upstreams.
        others = len(head) + len(queues) + 1 + _LEAST_DECISIONS
        room = max(3, height - others - len(upstreams))
        upstreams = upstreams[: max(0, height - others - min(len(arms), room))]
    lines = [*head, *_cut(arms, room), *queues, *upstreams, _title("decisions", width)]
    left = len(view.decisions) if height is None else max(0, height - len(lines))
    lines += map(_decision, reversed(view.decisions[-left:] if left else ()))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines[:height])


def _title(words: str, width: int) -> Text:
    return Text(f"── {words} ".ljust(width, "─"), style="dim")


def _cut(lines: Sequence[Text], room: int) -> Sequence[Text]:
    if len(lines) <= room:
        return lines
    return [*lines[: room - 1], Text(f"and {len(lines) - room + 1} more", style="dim")]


def _head(view: View) -> Iterator[Text]:
    status, process = view.status, view.status.process
    bundles = ", ".join(_bundle(bundle) for bundle in status.bundles)
    yield Text(f"bestroute {process.version} at {view.address}  {bundles}", style="bold")
    if view.lost:
        yield Text(view.lost, style="bold red")
    else:
        health = Text("serving" if status.serving else "NOT SERVING: " + status.fault)
        health.stylize("green" if status.serving else "bold red")
        up = process.uptime.ToTimedelta().total_seconds()
        yield Text("  ").join([health, Text(f"up {_span(up)}"), Text(_process(process))])
    parts = [f"{status.decisions_per_second:,.1f} decisions/s"]
    timed = [m for m in status.methods if m.HasField("p50") and m.name not in _OWN]
    for method in sorted(timed, key=lambda m: -m.per_second)[:_MOST_METHODS]:
        parts.append(f"{method.name} p50 {_short(method.p50)} p99 {_short(method.p99)}")
    if under_way := [f"{m.name} {m.in_flight}" for m in status.methods if m.in_flight]:
        parts.append("under way: " + ", ".join(under_way))
    if status.sessions:
        parts.append(count(status.sessions, "session"))
    yield Text("  ".join(parts))
    overruled = ["shadow mode: the reference answers all"] * status.shadow
    if status.disabled_arms:
        overruled.append("disabled: " + ", ".join(status.disabled_arms))
    if overruled:
        yield Text("; ".join(overruled), style="yellow")


def _bundle(bundle: pb.Bundle) -> str:
    name = f"{bundle.name} {bundle.version}"
    if bundle.role != pb.Bundle.ROLE_CANARY:
        return f"bundle {name}"
    return f"canary {name} ({percent(bundle.share) if bundle.serving else 'NOT SERVING'})"


def _process(process: pb.Process) -> str:
    if process.workers == 1:
        return f"process {process.pid}"
    return f"process {process.pid}, one of {process.workers} workers: figures are its own"


def _savings(view: View, width: int) -> Iterator[Text]:
    status = view.status
    yield _title("savings, estimated", width)
    yield Text(f"now        {_rate(status.lately)}")
    hour = status.last_hour
    yield Text(f"last hour  {_amount(hour)}")
    if hour.shadow_saving_usd:
        yield Text(f"           {usd(hour.shadow_saving_usd)} would have been saved without shadow")
    if hour.cost_usd or hour.answers:
        against = f"the reference: {usd(hour.reference_cost_usd)}" if hour.answers else ""
        paid = f"{usd(hour.cost_usd)} for {count(hour.answers, 'answer')}"
        yield Text(f"paid       {'  '.join(filter(None, (paid, against)))}{_troubles(hour)}")
    elif troubles := _troubles(hour):
        yield Text(f"         {troubles}")
    yield Text(f"by minute  {_curve(view.minutes, status.time.seconds, min(HOUR, width - 11))}")


def _rate(lately: pb.Period) -> str:
    seconds = lately.length.ToTimedelta().total_seconds()
    per_hour = 3600 / seconds if seconds else 0.0
    saving = (lately.estimated_reference_cost_usd - lately.estimated_cost_usd) * per_hour
    of = lately.estimated_reference_cost_usd * per_hour
    return f"{usd(saving)}/h of {usd(of)}/h{_share(saving, of)}"


def _amount(hour: pb.Period) -> str:
    of = hour.estimated_reference_cost_usd
    saving = of - hour.estimated_cost_usd
    return f"{usd(saving)} of {usd(of)}{_share(saving, of)}  {count(hour.decisions, 'decision')}"


def _share(saving: float, of: float) -> str:
    return f" ({percent(saving / of)})" if of else ""


def _troubles(hour: pb.Period) -> str:
    told = {
        "error": hour.errors,
        "fallback": hour.fallbacks,
        "failover": hour.failovers,
    }
    words = ", ".join(count(number, noun) for noun, number in told.items() if number)
    return f"  {words}" if words else ""


def _curve(minutes: Sequence[pb.Period], now: int, most: int) -> str:
    """Savings of the last minutes, one block each; none where nothing was decided."""
    latest = now // 60
    savings = {
        minute.start.seconds // 60: minute.estimated_reference_cost_usd - minute.estimated_cost_usd
        for minute in minutes
        if minute.decisions
    }
    top = max((saving for saving in savings.values()), default=0.0)
    blocks = []
    for minute in range(latest - most + 1, latest + 1):
        saving = savings.get(minute)
        if saving is None:
            blocks.append(" ")
        else:
            share = saving / top if top > 0 else 0.0
            blocks.append(_BLOCKS[round(max(0.0, share) * (len(_BLOCKS) - 1))])
    return "".join(blocks)


def _arms(arms: Sequence[pb.ArmCount]) -> Iterator[Text]:
    total = sum(arm.decisions for arm in arms)
    if not total:
        yield Text("nothing was decided", style="dim")
    longest = max((len(arm.model) for arm in arms), default=0)
    for arm in arms:
        share = arm.decisions / total
        bar = "█" * round(_ARM_BAR * share)
        name = f"{arm.model:<{min(longest, 32)}} x {arm.samples:<3}"
        yield Text(f"{name} {bar:<{_ARM_BAR}} {percent(share):>7}  {arm.decisions:,}")


def _network(network: pb.Network) -> Text:
    parts = [f"{network.name:<7} {network.waiting:,} waiting"]
    if network.HasField("oldest_wait"):
        parts[0] += f" since {_short(network.oldest_wait)}"
    parts.append(f"{network.runs} running")
    if network.HasField("mean_batch_size"):
        parts.append(f"batches of {network.mean_batch_size:.1f}")
    if network.HasField("queue_wait_p50"):
        parts.append(
            f"waits p50 {_short(network.queue_wait_p50)} p95 {_short(network.queue_wait_p95)}"
        )
    return Text("  ".join(parts))


def _upstream(upstream: pb.Upstream) -> Text:
    parts = [f"{upstream.name:<7} {count(upstream.calls, 'call')}", f"{upstream.failures} failed"]
    if upstream.retries:
        parts.append(f"{upstream.retries} retried")
    parts.append(f"{upstream.in_flight} under way")
    line = Text("  ".join(parts))
    broken = [
        f"{breaker.model}: {_BREAKERS[breaker.state]}"
        for breaker in upstream.breakers
        if breaker.state in _BREAKERS
    ]
    if broken:
        line.append(f"  breakers {', '.join(broken)}", style="bold red")
    else:
        line.append("  breakers closed")
    return line


def _decision(past: pb.PastDecision) -> Text:
    at = time.strftime("%H:%M:%S", time.localtime(past.time.seconds))
    saving = past.reference_cost_usd - past.estimated_cost_usd
    parts = [
        f"{at}  {past.model} x {past.samples}",
        usd(past.estimated_cost_usd),
        f"{usd(saving)} saved" if saving > 0 else "nothing saved",
        count(past.prompt_tokens, "token"),
    ]
    if past.HasField("duration"):
        parts.append(_short(past.duration) if past.duration.ToNanoseconds() else "remembered")
    if past.shadow_model:
        parts.append(f"shadow: {past.shadow_model} x {past.shadow_samples}")
    elif why := _REASONS.get(past.fallback_reason, ""):
        parts.append(why)
    return Text("  ".join(parts))


def _short(span: Duration) -> str:
    return milliseconds(span.ToNanoseconds() / 1e9)


def _span(seconds: float) -> str:
    """How long something has lasted, in two units."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    if hours:
        return f"{hours} h {minute} min"
    return f"{minutes} min {second} s" if minutes else f"{second} s"

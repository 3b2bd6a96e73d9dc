"""bestroute under more load than it can take, and how soon it is well again afterwards.

    python -m benchmarks.overload [--shape minilm] [--server-cores 0 --load-cores 1] [--short]

Three steps with one `bestroute serve`:

1. Capacity: closed loops of several sizes; the most answers per second within the deadline.
2. Overload: Poisson arrivals at a multiple of the capacity. Every call has the deadline, and is
   sent when it is due, whoever is under way.
3. Relief: without a pause, arrivals at half the capacity. The server has recovered once every call
   is answered in time again.

A call is in time if it ends with OK: its deadline is gRPC's, which decides when the answer comes
in, however late this process looks. By the clock of this process fewer may be, since it sends
calls and takes answers a little late itself, and a queue in front of a deadline lets most answers
come in the last millisecond. So goodput is given both ways, the second as a lower bound, with how
late calls were sent and how late after their deadline they were seen to end. Where these delays
are not small, the figures say as much about the generator as about the server.

No prompt is sent twice, since the server remembers what it has predicted.

A call that was shed was answered RESOURCE_EXHAUSTED. One that would have been after its deadline
counts as DEADLINE_EXCEEDED instead, so the latency of those seen can't be much above the deadline.

The overload comes from one process on one connection, by grpcio's synchronous client: a thread
that sleeps until the next call is due sends it, grpcio's own thread takes the answers, and nobody
parses messages. A call costs it about half of what it costs grpc.aio, whose timers are those of
epoll, of 1 ms. h2load can't take its place: it paces evenly, sets no deadline
of its own, and doesn't see gRPC's status. RouteStream can't either: its messages share a deadline.
"""

import argparse
import asyncio
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.compare import written
from benchmarks.latencies import Call, poisson_arrivals, quantile
from benchmarks.load import closed_loop
from benchmarks.process import served
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb

CALLERS = (2, 4, 8, 16, 64)
"""Of the closed loops. A few, since many would wait for longer than the deadline at a slow router;
many, since a few don't fill a fast one."""
PROMPTS = 512
"""Different but for their numbers; see `distinct`."""
RELIEF = 0.5
"""Arrivals after the overload, as a share of the capacity."""
RELIEF_SECONDS = 5.0
_METHOD = "/bestroute.v1.RoutingService/Route"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended; times in seconds from the start of the overload.

    Attributes:
        due: when it should have been sent.
        begun: when it was.
        ended: when its answer or its error was there.
        code: name of its gRPC status.
    """

    due: float
    begun: float
    ended: float
    code: str


def main() -> int:
    """Measure, print the table, keep the JSON."""
    options = _options()
    deadline, cores = options.deadline_ms / 1e3, os.sched_getaffinity(0)
    pending = options.max_pending
    limits = {"BESTROUTE_SERVER__MAX_PENDING": str(pending)} if pending else {}
    with TemporaryDirectory() as directory:
        bundle, _ = written(options.shape, Path(directory), stock=False)
        network = bundle.manifest.router
        tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
        prompts = distinct(record.mixed_prompts(tokenizer, PROMPTS))
        if options.server_cores:
            os.sched_setaffinity(0, options.server_cores)  # a child starts where its parent is
        with served("--bundle", bundle.directory, environment=limits) as (server, address):
            if options.load_cores:
                os.sched_setaffinity(0, options.load_cores)
            rates = asyncio.run(_capacity(address, prompts, deadline, options.capacity_seconds))
            if not (capacity := max(rates.values())):
                raise SystemExit(
                    f"no answer within {options.deadline_ms:g} ms, by callers: {rates}; "
                    "allow more by --deadline-ms"
                )
            found = _overload(
                address, server.pid, prompts, capacity, options.factor, options.seconds, deadline
            )
    os.sched_setaffinity(0, cores)  # which the record names
    found = {"in_time_per_second": rates, **found}
    _show(found, options)
    if options.short:
        return 0
    settings = {
        "shape": options.shape,
        "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
        "prompts": PROMPTS,
        "capacity_seconds": options.capacity_seconds,
        "seconds": options.seconds,
        "factor": options.factor,
        "deadline_ms": options.deadline_ms,
        "relief": RELIEF,
        "relief_seconds": RELIEF_SECONDS,
        "max_pending": options.max_pending,
        "server_cores": options.server_cores,
        "load_cores": options.load_cores,
    }
    name = f"overload-{options.shape}{'-limited' if pending else ''}"
    kept = record.write(name, settings, found)
    print(f"kept in {kept.relative_to(Path.cwd())}")
    return 0


def distinct(prompts: Sequence[str]) -> Iterator[str]:
    """The prompts in turn, over and over, each with a number of its own in front."""
    return (f"{n} {prompt}" for n, prompt in enumerate(itertools.cycle(prompts)))


def figures(
    outcomes: Sequence[Outcome], *, capacity: float, seconds: float, deadline: float
) -> dict[str, Any]:
    """What the calls of an overload, and of the relief after it, say.

    Args:
        outcomes: of all calls, in any order; some are due in the overload.
        capacity: answers per second in time that the server can give.
        seconds: how long the overload lasted; calls due from then on are the relief.
        deadline: of a call, in seconds.

    Returns:
        Of the overload: `offered_per_second`, as really sent; `goodput_per_second`, answers in
        time that came while it lasted; `goodput_share` of the capacity;
        `goodput_by_clock_per_second`, those seen within the deadline from when they were due;
        `outcomes`, calls by status; `shed_*_ms` from sending to RESOURCE_EXHAUSTED, or
        CANCELLED, which is how gRPC itself refuses;
        `sent_late_*_ms` after they were due; `seen_late_*_ms`, from the deadline to the end of
        calls that ran into it. Quantiles of nothing are None. Of the relief: calls made, those
        that were not answered in time, and `recovery_seconds`; see `recovery`.
    """
    overload = [each for each in outcomes if each.due < seconds]
    statuses = Counter(each.code for each in overload)
    refused = ("RESOURCE_EXHAUSTED", "CANCELLED")
    shed = [each.ended - each.begun for each in overload if each.code in refused]
    by_clock = sum(each.code == "OK" and each.ended - each.due <= deadline for each in overload)
    overrun = [
        over
        for each in overload
        if each.code == "DEADLINE_EXCEEDED" and (over := each.ended - each.begun - deadline) >= 0
    ]
    relief = [each for each in outcomes if each.due >= seconds]
    goodput = sum(each.code == "OK" and each.ended < seconds for each in overload) / seconds
    return {
        "capacity_per_second": capacity,
        "offered_per_second": sum(each.begun < seconds for each in overload) / seconds,
        "goodput_per_second": goodput,
        "goodput_share": goodput / capacity,
        "goodput_by_clock_per_second": by_clock / seconds,
        "outcomes": dict(statuses),
        **_quantiles("shed", shed),
        **_quantiles("sent_late", [each.begun - each.due for each in overload]),
        **_quantiles("seen_late", overrun),
        "relief_calls": len(relief),
        "relief_missed": sum(each.code != "OK" for each in relief),
        "recovery_seconds": recovery(outcomes, seconds),
    }


def _quantiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {
        f"{name}_{each}_ms": 1e3 * quantile(values, share) if values else None
        for each, share in (("p50", 0.5), ("p99", 0.99))
    }


def recovery(outcomes: Sequence[Outcome], end: float) -> float | None:
    """Seconds after the overload from which on every call due is answered in time.

    Args:
        outcomes: of all calls, in any order.
        end: of the overload; only calls due from then on matter.

    Returns:
        When the last call was due that was not answered in time, 0 if all were; None where no later
        call shows that the server has recovered.
    """
    relief = [each for each in outcomes if each.due >= end]
    bad = max((each.due for each in relief if each.code != "OK"), default=end)
    return bad - end if any(each.due > bad for each in relief) else None


def send(
    call: Any,
    messages: Iterator[bytes],
    arrivals: Sequence[float],
    start: float,
    deadline: float,
    ended: "SimpleQueue[Outcome]",
) -> None:
    """Send a call at each time of arrival; returns when all are sent, not when they have ended.

    Args:
        call: a method of a synchronous channel that takes bytes.
        messages: requests, serialized.
        arrivals: seconds from the start, rising.
        start: on the clock of `time.perf_counter`.
        deadline: of each call, in seconds from its sending.
        ended: gets the outcome of each call, once it has one.
    """

    def done(due: float, begun: float) -> Callable[[Any], None]:
        return lambda call: ended.put(
            Outcome(due, begun, time.perf_counter() - start, call.code().name)
        )

    for due, message in zip(arrivals, messages, strict=False):
        time.sleep(max(0.0, start + due - time.perf_counter()))
        begun = time.perf_counter() - start
        call.future(message, timeout=deadline).add_done_callback(done(due, begun))


async def _capacity(
    address: str, prompts: Iterator[str], deadline: float, seconds: float
) -> dict[int, float]:
    """Answers per second within the deadline, by callers."""
    async with grpc.aio.insecure_channel(address) as channel:
        method: Any = channel.unary_unary(
            _METHOD,
            request_serializer=lambda prompt: pb.RouteRequest(prompt=prompt).SerializeToString(),
        )

        async def ask(_: str) -> object:
            return await method(next(prompts), timeout=deadline)

        await method(next(prompts))  # a server that fails says here why; a loop only counts
        await closed_loop(ask, [""], CALLERS[2], seconds / 2)  # warm
        return {
            callers: _answered(await closed_loop(ask, [""], callers, seconds))
            for callers in CALLERS
        }


def _answered(calls: Sequence[Call]) -> float:
    ends = [call.ended for call in calls if call.ended is not None]
    return len(ends) / (max(ends) - min(call.due for call in calls)) if ends else 0.0


def _overload(
    address: str,
    pid: int,
    prompts: Iterator[str],
    capacity: float,
    factor: float,
    seconds: float,
    deadline: float,
) -> dict[str, Any]:
    """Overload and relief; `figures` with the cores that both sides kept busy in the overload."""
    messages = (pb.RouteRequest(prompt=prompt).SerializeToString() for prompt in prompts)
    overload = poisson_arrivals(factor * capacity, seconds, seed=0)
    relief = [
        seconds + each for each in poisson_arrivals(RELIEF * capacity, RELIEF_SECONDS, seed=1)
    ]
    ended: SimpleQueue[Outcome] = SimpleQueue()
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result()
        call: Any = channel.unary_unary(_METHOD)
        start, server, load = time.perf_counter(), _cpu_seconds(pid), time.process_time()
        send(call, messages, overload, start, deadline, ended)
        took = time.perf_counter() - start
        server, load = _cpu_seconds(pid) - server, time.process_time() - load
        send(call, messages, relief, start, deadline, ended)
        outcomes = [ended.get() for _ in (*overload, *relief)]
    return {
        **figures(outcomes, capacity=capacity, seconds=seconds, deadline=deadline),
        "server_cores": server / took,
        "load_cores": load / took,
    }


def _cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, in all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _show(found: dict[str, Any], options: argparse.Namespace) -> None:
    outcomes = Counter(found["outcomes"])
    wanted = options.factor * found["capacity_per_second"]
    calls, recovered = outcomes.total(), found["recovery_seconds"]
    named = {
        "OK": "in time",
        **{each: each for each in ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")},
    }
    other = ", ".join(f"{code}: {n}" for code, n in outcomes.items() if code not in named)
    table = Table(
        title=f"{options.factor:g} times the capacity, {options.shape}", show_header=False
    )
    table.add_row(
        f"capacity within {options.deadline_ms:g} ms", f"{found['capacity_per_second']:.0f}/s"
    )
    table.add_row("offered", f"{found['offered_per_second']:.0f}/s of {wanted:.0f}/s")
    table.add_row(
        "goodput",
        f"{found['goodput_per_second']:.0f}/s, {found['goodput_share']:.0%} of the capacity",
    )
    table.add_row("goodput by the clock", f"{found['goodput_by_clock_per_second']:.0f}/s")
    for code, name in named.items():
        table.add_row(name, f"{outcomes[code]}, {outcomes[code] / calls:.1%}")
    table.add_row("other", other or "0")
    table.add_row("shed after, p50 / p99", _milliseconds(found, "shed"))
    table.add_row(
        "recovered after",
        f"more than {RELIEF_SECONDS:g} s" if recovered is None else f"{recovered:.2f} s",
    )
    table.add_row("missed in the relief", f"{found['relief_missed']} of {found['relief_calls']}")
    table.add_row("sent late by, p50 / p99", _milliseconds(found, "sent_late"))
    table.add_row("seen late by, p50 / p99", _milliseconds(found, "seen_late"))
    table.add_row(
        "cores of the server / the load",
        f"{found['server_cores']:.2f} / {found['load_cores']:.2f}",
    )
    Console().print(table)


def _milliseconds(found: dict[str, Any], name: str) -> str:
    p50, p99 = found[f"{name}_p50_ms"], found[f"{name}_p99_ms"]
    return "-" if p50 is None else f"{p50:.2f} / {p99:.2f} ms"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        choices=("ngrams", "minilm"),
        default="ngrams",
        help="the router: of the default bundle, or MiniLM-L6; default: %(default)s",
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of the overload; default: %(default)s"
    )
    parser.add_argument(
        "--factor", type=float, default=2.0, help="times the capacity; default: %(default)s"
    )
    parser.add_argument(
        "--deadline-ms", type=float, default=100.0, help="of a call; default: %(default)s"
    )
    parser.add_argument(
        "--max-pending",
        type=int,
        metavar="N",
        help="server.max_pending: calls that may wait for the event loop; default: as many as come",
    )
    parser.add_argument(
        "--server-cores", type=_numbers, metavar="C,C", help="CPUs of the server; default: any"
    )
    parser.add_argument(
        "--load-cores", type=_numbers, metavar="C,C", help="CPUs of the load; default: any"
    )
    parser.add_argument(
        "--short", action="store_true", help="a few seconds, to see that it works; keeps nothing"
    )
    options = parser.parse_args()
    if bool(options.server_cores) != bool(options.load_cores):
        parser.error("--server-cores and --load-cores: name both, or neither")
    options.capacity_seconds = 5.0
    if options.short:
        options.seconds, options.capacity_seconds = 3.0, 1.0
    return options


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())

"""Who is answered when callers ask for three times what bestroute can give.

    python -m benchmarks.fairness [--shape minilm] [--shared] [--server-cores 0 --load-cores 1]
    python -m benchmarks.fairness --priorities [--shape minilm]

Three steps with one `bestroute serve`:

1. Capacity: closed loops of several sizes over ten connections; the most answers per second.
2. Overload: ten callers send Poisson arrivals, whoever is under way. Nine polite ones ask for a
   tenth of the capacity each, a greedy one for all that makes the sum a multiple of the capacity.
3. Relief: without a pause the polite ones alone, at half of that. The server has recovered once
   every call is answered in time again.

A caller's fair share is a tenth of the capacity, or what it asked for if that was less (max-min
fairness). `part` is how much of it was answered in time; see `overload` for what that means.

With `--priorities` there are two callers instead: one asks for a tenth of the capacity, at high
priority, and one for all the rest, at low. `quiet` are the latencies of the first in the relief.

Each caller has a connection of its own, which is what tells callers apart where nothing is
configured. The default limit of calls under way on a connection (`server.max_streams`) then makes
the greedy one's wait at its own side. With `--shared` all have one connection, as behind a proxy,
and are told apart by metadata (`security.caller_metadata`); the limit then holds for all together,
so set it with `--max-streams`.

Calls are made as our clients make them: what gRPC itself refuses, and what the server refuses with
time left to come back, is repeated within the deadline, with a throttle.

The load comes from two processes, as in `overload`: the greedy one's is nice, so that the polite
ones' calls are sent in time where the two share a core; `sent_late_p99_ms` says whether they were.
With `--shared` it is one process. `offered_per_second` is what was really sent: where that is less
than asked for, the machine is too small for the load.
"""

import argparse
import asyncio
import itertools
import math
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.compare import written
from benchmarks.latencies import poisson_arrivals, quantile
from benchmarks.load import closed_loop
from benchmarks.overload import Outcome, recovery, send
from benchmarks.process import READ_ANEW, served
from bestroute.client.channel import OPTIONS
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb

CALLERS = 10
"""The greedy one included."""
LOOPS = (16, 64)
"""Calls under way while the capacity is measured."""
PROMPTS = 512
RELIEF, RELIEF_SECONDS = 0.5, 5.0
"""Of the polite ones' arrivals, after the overload."""
_METHOD = "/bestroute.v1.RoutingService/Route"
_CALLER, _PRIORITY = "x-caller", "bestroute-priority"
_REFUSED = ("RESOURCE_EXHAUSTED", "CANCELLED", "UNAVAILABLE")
"""The server's own word; gRPC's for too many calls at once, and for too many on one connection."""
_NICE = 10


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and for how much.

    Attributes:
        name: by which it is known where callers share a connection.
        rate: calls per second.
        polite: whether it asks for its fair share only, and goes on asking after the overload.
        priority: of its calls.
    """

    name: str
    rate: float
    polite: bool
    priority: str = "normal"


def equals(capacity: float, factor: float) -> list[Caller]:
    """Nine polite callers and a greedy one, who ask for `factor` times the capacity together."""
    share = capacity / CALLERS
    polite = [Caller(f"polite-{n}", share, polite=True) for n in range(1, CALLERS)]
    return [*polite, Caller("greedy", factor * capacity - share * len(polite), polite=False)]


def unequals(capacity: float, factor: float) -> list[Caller]:
    """One caller of high priority with a tenth of the capacity, one of low with the rest."""
    share = capacity / CALLERS
    return [
        Caller("high", share, polite=True, priority="high"),
        Caller("low", factor * capacity - share, polite=False, priority="low"),
    ]


def figures(
    callers: Sequence[Caller],
    outcomes: Mapping[str, Sequence[Outcome]],
    *,
    capacity: float,
    seconds: float,
) -> dict[str, Any]:
    """What the calls of an overload, and of the relief after it, say.

    Args:
        callers: all of them.
        outcomes: by caller, in any order; times in seconds from the start of the overload.
        capacity: answers per second that the server can give.
        seconds: how long the overload lasted; calls due from then on are the relief.

    Returns:
        Of the overload, `callers` by name, as `_one` says; `polite_least_part` and
        `polite_mean_part` of their fair share; `greedy_of_capacity`, what the others had in that
        time; `goodput_share`, what all had, of the capacity; `offered_per_second`, as really sent;
        `sent_late_p99_ms` of the polite ones' calls. Of the relief: `relief_missed` calls not
        answered in time, and `recovery_seconds`; see `overload.recovery`.
    """
    share = capacity / CALLERS
    found = {
        caller.name: _one(
            [each for each in outcomes[caller.name] if each.due < seconds], share, seconds
        )
        for caller in callers
    }
    polite = [each.name for each in callers if each.polite]
    calm = [each for name in polite for each in outcomes[name]]
    relief = [each for each in calm if each.due >= seconds]
    sent = sum(each.begun < seconds for name in outcomes for each in outcomes[name])
    answered = {
        name: sum(each.code == "OK" and each.ended < seconds for each in outcomes[name])
        for name in found
    }
    parts = [found[name]["part"] or 0.0 for name in polite]
    greedy = sum(answered[each.name] for each in callers if not each.polite)
    return {
        "capacity_per_second": capacity,
        "offered_per_second": sent / seconds,
        "goodput_share": sum(answered.values()) / seconds / capacity,
        "polite_least_part": min(parts),
        "polite_mean_part": sum(parts) / len(parts),
        "greedy_of_capacity": greedy / seconds / capacity,
        "callers": found,
        "quiet": _latencies(relief),
        "sent_late_p99_ms": 1e3 * quantile([each.begun - each.due for each in calm], 0.99),
        "relief_calls": len(relief),
        "relief_missed": sum(each.code != "OK" for each in relief),
        "recovery_seconds": recovery(calm, seconds),
    }


def _one(outcomes: Sequence[Outcome], share: float, seconds: float) -> dict[str, Any]:
    """One caller's calls: `asked`, `answered` in time, `refused`, `late`, `other`; latencies.

    Refused are those with a status of `_REFUSED`. `part` is what was answered of a fair share of so
    many calls per second; None if nothing was asked.
    """
    statuses = Counter(each.code for each in outcomes)
    known = {
        "answered": statuses.pop("OK", 0),
        "refused": sum(statuses.pop(code, 0) for code in _REFUSED),
        "late": statuses.pop("DEADLINE_EXCEEDED", 0),
        "other": statuses.total(),
    }
    fair = min(len(outcomes), share * seconds)
    return {
        "asked": len(outcomes),
        **known,
        "part": known["answered"] / fair if fair else None,
        **_latencies(outcomes),
    }


def _latencies(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    took = [each.ended - each.due for each in outcomes if each.code == "OK"]
    return {
        f"{name}_ms": 1e3 * quantile(took, part) if took else None
        for name, part in (("p50", 0.5), ("p99", 0.99))
    }


def main() -> int:
    """Measure, print the tables, keep the JSON."""
    options = _options()
    cores = os.sched_getaffinity(0)
    environment = dict(READ_ANEW)  # callers send the same prompts
    if options.shared:
        environment["BESTROUTE_SECURITY__CALLER_METADATA"] = _CALLER
    if options.max_streams:
        environment["BESTROUTE_SERVER__MAX_STREAMS"] = str(options.max_streams)
    with TemporaryDirectory() as directory:
        bundle, _ = written(options.shape, Path(directory), stock=False)
        network = bundle.manifest.router
        tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
        messages = [
            pb.RouteRequest(prompt=prompt).SerializeToString()
            for prompt in record.mixed_prompts(tokenizer, PROMPTS)
        ]
        if options.server_cores:
            os.sched_setaffinity(0, options.server_cores)  # a child starts where its parent is
        with served("--bundle", bundle.directory, environment=environment) as (server, address):
            if options.load_cores:
                os.sched_setaffinity(0, options.load_cores)
            rates = asyncio.run(_capacity(address, messages, options.capacity_seconds))
            capacity = max(rates.values())
            callers = (unequals if options.priorities else equals)(capacity, options.factor)
            before = _mebibytes(server.pid)
            outcomes = _overload(address, messages, callers, options)
            after = _mebibytes(server.pid)
    os.sched_setaffinity(0, cores)  # which the record names
    found = {
        "answered_per_second": rates,
        **figures(callers, outcomes, capacity=capacity, seconds=options.seconds),
        "server_mib": {"before": before, "after": after},
    }
    _show(found, options)
    if options.short:
        return 0
    settings = {
        "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
        "prompts": PROMPTS,
        "relief": RELIEF,
        "relief_seconds": RELIEF_SECONDS,
        **{name: value for name, value in vars(options).items() if name != "short"},
    }
    kind = "priorities" if options.priorities else "fairness"
    name = f"{kind}-{options.shape}{'-shared' if options.shared else ''}"
    kept = record.write(name, settings, found)
    print(f"kept in {kept.relative_to(Path.cwd())}")
    return 0


async def _capacity(address: str, messages: Sequence[bytes], seconds: float) -> dict[int, float]:
    """Answers per second, by calls under way."""
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, OPTIONS))
            for _ in range(CALLERS)
        ]
        methods: Any = itertools.cycle([channel.unary_unary(_METHOD) for channel in channels])
        todo = itertools.cycle(messages)

        async def ask(_: str) -> object:
            return await next(methods)(next(todo))

        await ask("")  # a server that fails says here why; a loop only counts
        await closed_loop(ask, [""], LOOPS[0], seconds / 2)  # warm
        found = {}
        for calls in LOOPS:
            made = await closed_loop(ask, [""], calls, seconds)
            ends = [call.ended for call in made if call.ended is not None]
            found[calls] = len(ends) / (max(ends) - min(call.due for call in made))
        return found


def _overload(
    address: str, messages: Sequence[bytes], callers: Sequence[Caller], options: argparse.Namespace
) -> dict[str, list[Outcome]]:
    """Overload and relief; how the calls ended, by caller."""
    polite = [each for each in callers if each.polite]
    greedy = [each for each in callers if not each.polite]
    groups = [list(callers)] if options.shared else [polite, greedy]
    spawn = multiprocessing.get_context("spawn")  # gRPC doesn't survive a fork
    ready = spawn.Barrier(len(groups))
    outcomes: dict[str, list[Outcome]] = {}
    with ExitStack() as stack:
        ends = []
        for group in groups:
            ours, theirs = spawn.Pipe(duplex=False)
            arguments = (theirs, ready, address, messages, group, options)
            process = spawn.Process(target=_send_all, args=arguments)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(process.terminate)
            ends.append(ours)
        for end in ends:
            outcomes |= end.recv()
    return outcomes


def _send_all(
    result: Connection,
    ready: Barrier,
    address: str,
    messages: Sequence[bytes],
    callers: Sequence[Caller],
    options: argparse.Namespace,
) -> None:
    """Send the calls of some callers, in a process of its own; gives their outcomes by name."""
    if not any(each.polite for each in callers):
        os.nice(_NICE)
    deadline = options.deadline_ms / 1e3
    with ExitStack() as stack:
        channels = [
            stack.enter_context(grpc.insecure_channel(address, OPTIONS))
            for _ in range(1 if options.shared else len(callers))
        ]
        for channel in channels:
            grpc.channel_ready_future(channel).result()
        ended: dict[str, SimpleQueue[Outcome]] = {each.name: SimpleQueue() for each in callers}
        arrivals = {
            each.name: _arrivals(each, options.seconds, seed) for seed, each in enumerate(callers)
        }
        ready.wait(60)
        start = time.perf_counter()
        # Who falls behind sends nothing into the relief.
        ends = {each.name: math.inf if each.polite else options.seconds for each in callers}
        methods = {
            caller.name: _Method(channel, caller)
            for caller, channel in zip(callers, itertools.cycle(channels), strict=False)
        }
        threads = [
            threading.Thread(
                target=send,
                args=(
                    methods[name],
                    _until(start + ends[name], messages),
                    arrivals[name],
                    start,
                    deadline,
                    ended[name],
                ),
            )
            for name in methods
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        result.send(
            {
                name: [ended[name].get() for _ in range(method.sent)]
                for name, method in methods.items()
            }
        )


def _until(end: float, messages: Sequence[bytes]) -> Iterator[bytes]:
    """The messages over and over, until that time on the clock of `time.perf_counter`."""
    for message in itertools.cycle(messages):
        if time.perf_counter() >= end:
            return
        yield message


def _arrivals(caller: Caller, seconds: float, seed: int) -> list[float]:
    overload = poisson_arrivals(caller.rate, seconds, seed=2 * seed)
    if not caller.polite:
        return overload
    relief = poisson_arrivals(RELIEF * caller.rate, RELIEF_SECONDS, seed=2 * seed + 1)
    return [*overload, *(seconds + each for each in relief)]


class _Method:
    """Route, as one caller calls it.

    Attributes:
        sent: how often it did.
    """

    def __init__(self, channel: grpc.Channel, caller: Caller) -> None:
        self._method: Any = channel.unary_unary(_METHOD)
        self._metadata = ((_CALLER, caller.name), (_PRIORITY, caller.priority))
        self.sent = 0

    def future(self, message: bytes, timeout: float) -> Any:
        self.sent += 1
        return self._method.future(message, timeout=timeout, metadata=self._metadata)


def _mebibytes(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _show(found: dict[str, Any], options: argparse.Namespace) -> None:
    table = Table(title=f"{options.factor:g} times the capacity, {options.shape}")
    for name in ("caller", "asked", "in time", "refused", "late", "other", "of its share"):
        table.add_column(name, justify="left" if name == "caller" else "right")
    table.add_column("p50 / p99 ms", justify="right")
    for name, each in found["callers"].items():
        counts = (str(each[key]) for key in ("asked", "answered", "refused", "late", "other"))
        table.add_row(name, *counts, _percent(each["part"]), _milliseconds(each))
    wanted, recovered = options.factor * found["capacity_per_second"], found["recovery_seconds"]
    memory = found["server_mib"]
    console = Console()
    console.print(table)
    console.print(
        f"capacity {found['capacity_per_second']:.0f}/s; "
        f"offered {found['offered_per_second']:.0f}/s of {wanted:.0f}/s; "
        f"in time {found['goodput_share']:.0%} of the capacity\n"
        f"polite: {found['polite_least_part']:.1%} of their fair share at least, "
        f"{found['polite_mean_part']:.1%} on average; "
        f"the other: {found['greedy_of_capacity']:.1%} of the capacity\n"
        f"recovered after "
        f"{f'more than {RELIEF_SECONDS:g}' if recovered is None else f'{recovered:.2f}'} s; "
        f"missed {found['relief_missed']} of {found['relief_calls']} calls; "
        f"then p50 / p99 {_milliseconds(found['quiet'])} ms\n"
        f"sent late by {found['sent_late_p99_ms']:.1f} ms (p99, polite); "
        f"server {memory['before']:.0f} MiB before, {memory['after']:.0f} MiB after"
    )


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.1%}"


def _milliseconds(found: Mapping[str, float | None]) -> str:
    return " / ".join(
        "-" if each is None else f"{each:.1f}" for each in (found["p50_ms"], found["p99_ms"])
    )


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
    parser.add_argument("--priorities", action="store_true", help="a high and a low one instead")
    parser.add_argument("--shared", action="store_true", help="all callers on one connection")
    parser.add_argument(
        "--max-streams", type=int, metavar="N", help="server.max_streams; default: the server's"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of the overload; default: %(default)s"
    )
    parser.add_argument(
        "--factor", type=float, default=3.0, help="times the capacity; default: %(default)s"
    )
    parser.add_argument(
        "--deadline-ms", type=float, default=1000.0, help="of a call; default: %(default)s"
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
        options.seconds, options.capacity_seconds = 5.0, 1.0
    return options


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())

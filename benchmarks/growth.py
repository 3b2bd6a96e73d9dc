"""How time, memory and start-up of `bestroute serve` grow with what it is given.

    python -m benchmarks.growth [--axes callers,length,...] [--requests N] [--short]

One thing grows at a time, and the rest stays as it is:

- callers: 1 to 128 in a closed loop of Routes.
- length: of the prompt. In tokens up to the 254 that the default bundle reads; in words beyond
  that, where they are tokenized and then cut; in tokens with MiniLM-L6 as router, which reads 510.
- arms: 10 to 1,000 of 7 LLMs, in a response without and with all of them (`explain`).
- models: 2 to 200, the reference and LLMs with one arm each.
- candidates: 1 to 64 answers of 50 words in one Score.
- requests: a million on streams, no prompt and no target twice, each prompt with a made-up word;
  what is resident after each part.

Sizes rise in each of several rounds, which start servers of their own. A size has some calls to
warm up, then calls for half a second, one at a time but for the callers: the median time as the
caller sees it, and as the server reports it: tokenize + queue + inference, of several candidates
the longest of each. No prompt comes twice, since the server remembers what it said. Memory is what
is resident afterwards, from smaller sizes too where they are of the same bundle and so of the same
server, and the most there ever was; start-up ends when the server listens.

Per figure there is one exponent per round: `exponent` says of what, their median and their span
are shown. 1 is linear; there is none where something doesn't rise in every round. The peak has
none: it is the larger of two, what either network takes to load, and so bends where that changes.
"""

import argparse
import asyncio
import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer as _Tokenizer

from benchmarks import record
from benchmarks.encoder import write_encoder_bundle
from benchmarks.grown import write_grown_bundle
from benchmarks.load import closed_loop
from benchmarks.process import served
from bestroute.bundle import DEFAULT_BUNDLE, Bundle, read_manifest
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub
from bestroute_export.evaluation.plots import BLACK, BLUE, GREEN, ORANGE, SKY, STYLE

if TYPE_CHECKING:
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

AXES = ("callers", "length", "arms", "models", "candidates", "requests")
METRICS = {
    "round_trip_ms": "round trip, ms",
    "server_ms": "server, ms",
    "resident_mb": "resident, MB",
    "peak_mb": "peak, MB",
    "ready_s": "ready, s",
}
ROUNDS, SECONDS = 3, 0.5
PARTS = 50
"""Streams that the requests come on; what is resident is read after each."""
_PROMPTS = 64
_ENCODER_TOKENS = 512


@dataclass(frozen=True)
class Load:
    """What callers ask, one call after another.

    Attributes:
        prompts: taken in turn, each behind two words that make it another one every time.
        callers: calls under way at once.
        explain: whether responses list every arm.
        answers: scored for each prompt; none: prompts are routed.
    """

    prompts: Sequence[str]
    callers: int = 1
    explain: bool = False
    answers: Sequence[str] = ()


@dataclass(frozen=True)
class Step:
    """A size, and what is served and asked at it."""

    size: int
    bundle: Path
    load: Load


@dataclass(frozen=True)
class Series:
    """Steps of rising size.

    Attributes:
        name: in the JSON.
        title: what a size counts.
    """

    name: str
    title: str
    steps: Sequence[Step]

    @property
    def starts(self) -> bool:
        """Whether each step has a bundle of its own, and so a start of its own."""
        return len({step.bundle for step in self.steps}) == len(self.steps)


def main() -> int:
    """Measure along the chosen axes, print the tables, keep the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--axes", type=_axes, default=AXES, help=f"of {','.join(AXES)} (default: all)"
    )
    parser.add_argument("--requests", type=int, default=1_000_000, help="default: 1,000,000")
    parser.add_argument(
        "--short", action="store_true", help="two sizes, one round, few requests; keeps nothing"
    )
    options = parser.parse_args()
    rounds, seconds, sizes = (1, 0.1, 2) if options.short else (ROUNDS, SECONDS, None)
    requests = 2_000 if options.short else options.requests
    figures: dict[str, Any] = {}
    with TemporaryDirectory() as directory, Progress(transient=True) as progress:
        for axis in options.axes:
            if axis == "requests":
                task = progress.add_task(axis, total=PARTS)
                figures[axis] = memory_over_requests(
                    DEFAULT_BUNDLE, requests, partial(progress.advance, task)
                )
                progress.console.print(_requests_table(figures[axis]))
                continue
            for series in planned(axis, Path(directory), sizes):
                task = progress.add_task(series.title, total=rounds * len(series.steps))
                figures[series.name] = measured(
                    series, rounds, seconds, partial(progress.advance, task)
                )
                progress.console.print(_table(figures[series.name]))
    if options.short:
        return 0
    settings = {
        "bundle": read_manifest(DEFAULT_BUNDLE).version,
        "rounds": rounds,
        "seconds": seconds,
        "requests": requests,
    }
    print(f"kept in {record.write('growth', settings, figures).relative_to(Path.cwd())}")
    draw(figures, record.RESULTS / "growth.svg")
    return 0


def _axes(text: str) -> tuple[str, ...]:
    named = tuple(text.split(","))
    if unknown := {*named} - {*AXES}:
        raise argparse.ArgumentTypeError(f"no such axis: {', '.join(sorted(unknown))}")
    return named


def planned(axis: str, directory: Path, few: int | None = None) -> Iterator[Series]:
    """The series of an axis other than requests; writes the bundles that they need.

    Args:
        axis: one of `AXES`.
        directory: exists, and has room for bundles.
        few: take only so many sizes, the smallest; None: all.
    """
    bundle = Bundle.load(DEFAULT_BUNDLE)
    limit = bundle.manifest.router.max_tokens
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=limit)
    mixed = record.mixed_prompts(tokenizer, 4 * _PROMPTS)
    words = whole_words(bundle.tokenizer_path)

    def lengths(name: str, title: str, path: Path, sizes: Sequence[int]) -> Series:
        steps = [Step(size, path, Load(texts(words, size - 2, _PROMPTS))) for size in sizes[:few]]
        return Series(name, title, steps)

    if axis == "callers":
        steps = [
            Step(size, DEFAULT_BUNDLE, Load(mixed, callers=size)) for size in _doubling(128)[:few]
        ]
        yield Series(axis, "callers", steps)
    elif axis == "length":
        read = limit - 2
        yield lengths("tokens", "tokens read", DEFAULT_BUNDLE, (10, 20, 40, 80, 160, read))
        longer = (read, 500, 1_000, 2_000, 4_000, 8_000, 16_000)
        yield lengths("words", "words, cut", DEFAULT_BUNDLE, longer)
        encoder = _encoder_bundle(directory / "encoder")
        yield lengths("minilm", "tokens, MiniLM-L6", encoder, (10, 30, 60, 125, 250, 500))
    elif axis == "arms":
        grown = {size: _grown(directory, size, 7) for size in (10, 30, 100, 300, 1_000)[:few]}
        steps = [Step(size, path, Load(mixed)) for size, path in grown.items()]
        yield Series(axis, "arms", steps)
        steps = [Step(size, path, Load(mixed, explain=True)) for size, path in grown.items()]
        yield Series("arms-explained", "arms, explained", steps)
    elif axis == "models":
        steps = [
            Step(size, _grown(directory, size - 1, size), Load(mixed))
            for size in (2, 6, 20, 60, 200)[:few]
        ]
        yield Series(axis, "LLMs", steps)
    elif axis == "candidates":
        questions, answers = texts(words, 20, _PROMPTS), texts(words, 50, 64, seed=1)
        steps = [
            Step(size, DEFAULT_BUNDLE, Load(questions, answers=answers[:size]))
            for size in _doubling(64)[:few]
        ]
        yield Series(axis, "candidates", steps)


def _doubling(last: int) -> list[int]:
    return [2**power for power in range(last.bit_length())]


def _grown(directory: Path, arms: int, models: int) -> Path:
    return write_grown_bundle(directory / f"{arms}-{models}", arms, models)


def _encoder_bundle(directory: Path) -> Path:
    manifest = read_manifest(write_encoder_bundle(directory))
    longer = manifest.router.model_copy(update={"max_tokens": _ENCODER_TOKENS})
    manifest.model_copy(update={"router": longer}).write(directory)
    return directory


def whole_words(tokenizer: Path) -> list[str]:
    """Short words that the tokenizer of that file makes one token each, sorted."""
    vocabulary = _Tokenizer.from_file(str(tokenizer)).get_vocab()
    return sorted(
        word for word in vocabulary if word.isascii() and word.isalpha() and 3 <= len(word) <= 6
    )


def texts(words: Sequence[str], length: int, count: int, *, seed: int = 0) -> list[str]:
    """So many texts of `length` random words, the same in every run."""
    source = random.Random(seed)
    return [" ".join(source.choices(words, k=length)) for _ in range(count)]


def measured(
    series: Series, rounds: int, seconds: float, report: Callable[[], object]
) -> dict[str, Any]:
    """Measure every step once in every round.

    Args:
        series: at least two steps.
        rounds: how many.
        seconds: in which calls of a step begin.
        report: called after each step.

    Returns:
        `title` as in `Series`, `sizes`, `medians` over rounds, `exponents` of each round (none of
        the peak), and the `rounds` themselves. The latter three are by metric; `ready_s` is there
        only if each step has a start of its own.
    """
    metrics = [metric for metric in METRICS if metric != "ready_s" or series.starts]
    heads = itertools.permutations(whole_words(Bundle.load(DEFAULT_BUNDLE).tokenizer_path), 2)
    found: dict[str, list[list[float]]] = {metric: [] for metric in metrics}
    for _ in range(rounds):
        steps = list(_round(series, heads, seconds, report))
        for metric in metrics:
            found[metric].append([step[metric] for step in steps])
    sizes = [step.size for step in series.steps]
    return {
        "title": series.title,
        "sizes": sizes,
        "medians": {
            metric: [statistics.median(column) for column in zip(*values, strict=True)]
            for metric, values in found.items()
        },
        "exponents": {
            metric: [exponent(sizes, row) for row in values]
            for metric, values in found.items()
            if metric != "peak_mb"
        },
        "rounds": found,
    }


def _round(
    series: Series,
    heads: Iterator[tuple[str, str]],
    seconds: float,
    report: Callable[[], object],
) -> Iterator[dict[str, float]]:
    for bundle, steps in itertools.groupby(series.steps, key=lambda step: step.bundle):
        start = time.perf_counter()
        with served("--bundle", bundle) as (server, address):
            ready = time.perf_counter() - start
            for step in steps:
                times = asyncio.run(_times(address, step.load, heads, seconds))
                yield {**times, **_memory(server.pid), "ready_s": ready}
                report()


async def _times(
    address: str, load: Load, heads: Iterator[tuple[str, str]], seconds: float
) -> dict[str, float]:
    """Median times of calls, in milliseconds."""
    reported: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub: RoutingServiceAsyncStub = RoutingServiceStub(channel)

        async def ask(prompt: str) -> None:
            response: pb.RouteResponse | pb.ScoreResponse
            prompt = " ".join((*next(heads), prompt))
            if load.answers:
                response = await stub.Score(pb.ScoreRequest(prompt=prompt, responses=load.answers))
            else:
                response = await stub.Route(pb.RouteRequest(prompt=prompt, explain=load.explain))
            timing = response.timing
            parts = (timing.tokenize, timing.queue, timing.inference)
            reported.append(sum(part.ToNanoseconds() for part in parts) / 1e6)

        await closed_loop(ask, load.prompts, load.callers, seconds / 4)
        reported.clear()
        calls = await closed_loop(ask, load.prompts, load.callers, seconds)
    if failed := sum(call.ended is None for call in calls):
        raise RuntimeError(f"{failed} of {len(calls)} calls failed")
    return {
        "round_trip_ms": 1e3 * statistics.median(call.latency for call in calls),
        "server_ms": statistics.median(reported),
    }


def _memory(pid: int) -> dict[str, float]:
    """What is resident of a process and the most there ever was, in MB of 2^20 bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    said = dict(line.split(":", 1) for line in lines)
    fields = {"resident_mb": "VmRSS", "peak_mb": "VmHWM"}  # as "  1234 kB"
    return {name: int(said[field].split()[0]) / 1024 for name, field in fields.items()}


def memory_over_requests(
    bundle: Path, total: int, report: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Send Routes of which no two are alike, and see what the server keeps of them.

    Args:
        bundle: what is served.
        total: rounded down to a multiple of `PARTS`.
        report: called after each of the `PARTS`.

    Returns:
        `requests` answered and megabytes resident (`resident_mb`) after each part, from the start
        on; `bytes_per_request`, the slope over the second half, with its standard error as if the
        parts were independent, and `per_second` on average.

    Raises:
        RuntimeError: a request failed.
    """
    words = whole_words(bundle / read_manifest(bundle).tokenizer.name)
    each = total // PARTS
    answered, resident = [0], []
    with served("--bundle", bundle) as (server, address), grpc.insecure_channel(address) as channel:
        stub = RoutingServiceStub(channel)
        start = time.perf_counter()
        resident.append(_memory(server.pid)["resident_mb"])
        for part in range(PARTS):
            count = 0
            for answer in stub.RouteStream(_different(words, each, seed=part)):
                if answer.HasField("error"):
                    raise RuntimeError(f"a request failed: {answer.error.message}")
                count += 1
            answered.append(answered[-1] + count)
            resident.append(_memory(server.pid)["resident_mb"])
            report()
    half = len(answered) // 2
    slope, error = line(answered[half:], [2**20 * each for each in resident[half:]])
    return {
        "requests": answered,
        "resident_mb": resident,
        "bytes_per_request": slope,
        "bytes_per_request_error": error,
        "per_second": answered[-1] / (time.perf_counter() - start),
    }


def _different(words: Sequence[str], count: int, *, seed: int) -> Iterator[pb.RouteStreamRequest]:
    source = random.Random(seed)
    for index in range(count):
        yield pb.RouteStreamRequest(
            request=pb.RouteRequest(
                request_id=f"{seed}-{index}",
                prompt=" ".join([*source.choices(words, k=12), f"{source.getrandbits(48):x}"]),
                policy=pb.RoutingPolicy(max_quality_drop=source.random()),
            )
        )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """By which power of the size something rises, over the upper half of a logarithmic axis.

    The least-squares slope of log(y - y0) over log(x - x0), where (x0, y0) is at the smallest size.
    So what is there at any size doesn't hide growth, and a straight line has exactly 1 wherever it
    crosses the axis.

    Args:
        sizes: x, rising.
        values: y, as many.

    Returns:
        None if a value of the upper half is not above the first, or fewer than two are there.
    """
    x, y = np.array(sizes, dtype=np.float64), np.array(values, dtype=np.float64)
    upper = (x > x[0]) & (x >= math.sqrt(x[0] * x[-1]))
    more, added = x[upper] - x[0], y[upper] - y[0]
    if len(more) < 2 or (added <= 0).any():
        return None
    return float(np.polyfit(np.log(more), np.log(added), 1)[0])


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line and its standard error; at least five points."""
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), math.sqrt(covariance[0, 0])


def span(exponents: Sequence[float | None]) -> str:
    """Median and span over rounds, as "1.00 (0.97 to 1.04)"; "-" where a round has none."""
    known = [each for each in exponents if each is not None]
    if len(known) < len(exponents):
        return "-"
    return f"{statistics.median(known):.2f} ({min(known):.2f} to {max(known):.2f})"


def _table(found: Mapping[str, Any]) -> Table:
    table = Table()
    table.add_column(found["title"], justify="right")
    for metric in found["medians"]:
        table.add_column(METRICS[metric], justify="right")
    for size, *values in zip(found["sizes"], *found["medians"].values(), strict=True):
        table.add_row(
            f"{size:,}", *(f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in values)
        )
    table.add_section()
    exponents = found["exponents"]
    table.add_row("exponent", *(span(exponents.get(metric, [None])) for metric in found["medians"]))
    return table


def _requests_table(found: Mapping[str, Any]) -> Table:
    table = Table("requests", "resident, MB")
    ends = (0, len(found["requests"]) // 2, -1)
    for end in ends:
        table.add_row(f"{found['requests'][end]:,}", f"{found['resident_mb'][end]:.1f}")
    table.add_section()
    slope, error = found["bytes_per_request"], found["bytes_per_request_error"]
    table.add_row("bytes per request, second half", f"{slope:.2f} ± {error:.2f}")
    table.add_row("requests per second", f"{found['per_second']:,.0f}")
    return table


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Write an SVG with a small panel for each series: times and memory over sizes."""
    rows = math.ceil(len(figures) / 3)
    with rc_context({**STYLE, "font.size": 7}):
        figure = Figure(figsize=(7.2, 0.6 + 2.1 * rows), layout="constrained")
        panels = figure.subplots(rows, 3, squeeze=False).ravel()
        handles: dict[str, Line2D] = {}
        for panel, found in zip(panels, figures.values(), strict=False):
            lines = _kept(panel, found) if "requests" in found else _panel(panel, found)
            handles |= {str(each.get_label()): each for each in lines}
        for panel in panels[len(figures) :]:
            panel.set_axis_off()
        figure.legend(handles=[*handles.values()], loc="outside lower center", ncols=5)
        figure.savefig(path, metadata={"Date": None})


def _panel(axes: Axes, found: Mapping[str, Any]) -> list[Line2D]:
    """Times on a logarithmic axis, with what linear growth would be; memory on the right."""
    sizes, medians = found["sizes"], found["medians"]
    lines = [
        *axes.plot(sizes, medians["round_trip_ms"], "o-", color=BLUE, ms=3, label="round trip"),
        *axes.plot(sizes, medians["server_ms"], "s-", color=SKY, ms=3, label="server's timing"),
    ]
    if "ready_s" in medians:
        ready = [1e3 * seconds for seconds in medians["ready_s"]]
        lines += axes.plot(sizes, ready, "D-", color=ORANGE, ms=3, label="start-up")
    axes.set(xscale="log", yscale="log", xlabel=found["title"], ylabel="ms")
    shown = np.array([y for each in lines for y in np.asarray(each.get_ydata()) if y > 0])
    low, high = np.log10([shown.min(), shown.max()])  # whole decades, so that noise looks small
    axes.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))
    last = medians["round_trip_ms"][-1]
    linear = [last * size / sizes[-1] for size in sizes]
    lines += axes.plot(sizes, linear, ":", color=BLACK, linewidth=0.8, label="linear")
    memory = axes.twinx()
    lines += memory.plot(sizes, medians["resident_mb"], "--", color=GREEN, label="resident")
    memory.set_ylim(0, 1.5 * max(medians["resident_mb"]))
    memory.set_ylabel("MB", color=GREEN)
    memory.grid(False)
    return lines


def _kept(axes: Axes, found: Mapping[str, Any]) -> list[Line2D]:
    """What is resident, from nothing, after so many requests."""
    thousands = [count / 1e3 for count in found["requests"]]
    lines = axes.plot(thousands, found["resident_mb"], "--", color=GREEN, label="resident")
    axes.set(xlabel="thousand requests", ylabel="MB", ylim=(0, 1.5 * max(found["resident_mb"])))
    return lines


if __name__ == "__main__":
    sys.exit(main())

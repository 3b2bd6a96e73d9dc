"""What `Generate` adds to the answers that it draws, and what stopping early saves.

    python -m benchmarks.generate [--standin] [--short]

A synthetic upstream in a process of its own (see `benchmarks.upstream`) keeps to a timetable, and
notes when each piece and each last byte was written, on the clock of this process. Four questions:

1. Overhead: from the last byte of the last of n answers until the caller has the result, with the
   bundle's reward model. Beside it, in turn, the same n answers asked for with the openai client
   and asyncio.gather, which scores nothing; and what one Score takes. For n = 1, which isn't
   scored, also from the first piece until the caller has it. Answers take longer where more are
   under way, so that all loads bring about as many per second, and the figures say what an answer
   waits for, not how long a queue can get.
2. Batches: answers that come at once, so that the reward model is all there is to wait for.
   A caller of Score among them sees how many are scored together.
3. Waste: pieces that are still written once one answer is good enough (early_stop), or once the
   caller has cancelled. The bundle is told that any reward is good enough.
4. With `--standin`, the overhead with a real LLM server on this machine (examples/standin.py).

All processes share the machine's cores, also with the side that scores nothing.
"""

import argparse
import asyncio
import functools
import itertools
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import openai
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import record
from benchmarks.latencies import milliseconds, quantile
from benchmarks.process import served
from benchmarks.upstream import Call, Control, Timetable, Waste, controlling, started, waste
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

SAMPLES = (1, 2, 4, 8)
REQUESTS = {1: 32, 8: 40, 32: 64}
"""Calls of Generate at once, and how many are made of each side."""
REPEATS = 2
"""Parts that these are made in, the sides in turn."""
SCORES = 8
"""Calls of Score, one at a time, after each part."""
ANSWERS_PER_SECOND = 24
"""That the upstream gives at every load, or fewer; two cores can score about twice as many."""
SHORTEST_ANSWER = 0.1
"""Seconds of the longest answers, where few are under way."""
PIECES = (6, 24)
"""Fewest and most of an answer; as they differ, answers don't all end at once."""
WORDS_PER_PIECE = 4
ANSWERS = 64
"""Different ones."""
MAX_TOKENS = 48
"""Of a real LLM's answer; the synthetic upstream has its timetable."""
_EVERY = 0.01
"""Seconds between pieces where waste is measured."""
_LONG, _SHORT = 100, 20
"""Pieces of an answer there, and of the one that is complete first."""
_AT_ONCE = 4
"""Calls of Generate at once there."""
_WORDS = ["the", "sum", "of", "all", "is", "seven", "because", "each", "word", "counts"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt's answers as who asked for them saw it; times as `time.perf_counter`.

    Attributes:
        seeds: of the upstream's calls, one per answer.
        sent: when they were asked for.
        first: when the first piece of text was there.
        done: when the result was, or when the caller cancelled.
    """

    seeds: range
    sent: float
    first: float
    done: float


@dataclass(frozen=True, slots=True)
class Added:
    """What lies between the upstream and who asked; seconds.

    Attributes:
        before: from sending until the last call had arrived.
        first: from the first piece until it was there; of several answers, from whichever it was.
        after: from the last byte of the last answer until the result was there.
    """

    before: float
    first: float
    after: float


def added(asked: Asked, calls: Mapping[int, Call]) -> Added:
    """What was added to answers that were all needed.

    Args:
        asked: for them.
        calls: of the upstream, by seed.

    Raises:
        ValueError: one of them has not ended.
    """
    needed = [calls[seed] for seed in asked.seeds]
    ends = [call.ended for call in needed if call.ended is not None]
    if len(ends) < len(needed):
        raise ValueError(f"calls {asked.seeds} have not all ended: the overhead is unknown")
    return Added(
        before=max(call.begun for call in needed) - asked.sent,
        first=asked.first - min(call.written[0] for call in needed),
        after=asked.done - max(ends),
    )


def timetable(seconds: float) -> Timetable:
    """Answers of all lengths in turn at random, the longest of which take so many seconds."""
    source = random.Random(0)
    shortest, longest = PIECES
    lengths = [shortest + k % (longest - shortest + 1) for k in range(ANSWERS)]
    source.shuffle(lengths)
    answers = [[_piece(source) for _ in range(length)] for length in lengths]
    return Timetable(seconds / longest, seconds / longest, answers)


def _piece(source: random.Random) -> str:
    return " ".join(source.choices(_WORDS, k=WORDS_PER_PIECE)) + " "


def answer_seconds(samples: int, callers: int) -> float:
    """How long the longest answers take with so many under way."""
    return max(SHORTEST_ANSWER, samples * callers / ANSWERS_PER_SECOND)


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile in milliseconds."""
    return {name: 1e3 * quantile(seconds, q) for name, q in (("p50_ms", 0.5), ("p99_ms", 0.99))}


Ask = Callable[[str, range], Awaitable[Asked]]
"""Asks for a prompt's answers, one per seed, and waits for all of them."""


@dataclass(frozen=True)
class Bench:
    """What all measurements use.

    Attributes:
        stub: of the service.
        client: of the upstream.
        control: of the upstream.
        model: of the pool, that the answers are from.
        prompts: taken in turn, over and over.
    """

    stub: "RoutingServiceAsyncStub"
    client: openai.AsyncOpenAI
    control: Control
    model: str
    prompts: Sequence[str]

    async def generate(
        self,
        prompt: str,
        seeds: range,
        *,
        early_stop: bool = False,
        cancel_after: float = math.inf,
    ) -> Asked:
        """Ask by Generate; cancel when there was text for so many seconds."""
        request = pb.GenerateRequest(
            request=pb.RouteRequest(prompt=prompt),
            sampling=pb.Sampling(max_output_tokens=MAX_TOKENS, seed=seeds.start),
            execution=pb.Execution(early_stop=early_stop),
            arm=pb.Arm(model=self.model, samples=len(seeds)),
        )
        first = done = math.inf
        sent = time.perf_counter()
        events = self.stub.Generate(request)
        async for event in events:
            now = time.perf_counter()
            match event.WhichOneof("event"):
                case "delta":
                    first = min(first, now)
                case "candidate" if event.candidate.HasField("error"):
                    raise RuntimeError(event.candidate.error.message)
                case "result":
                    done = now
            if now > first + cancel_after:
                events.cancel()
                return Asked(seeds, sent, first, now)
        return Asked(seeds, sent, first, done)

    async def ask_directly(self, prompt: str, seeds: range) -> Asked:
        """Ask the upstream itself, by a call per answer."""
        sent = time.perf_counter()
        firsts = await asyncio.gather(*(self._read(prompt, seed) for seed in seeds))
        return Asked(seeds, sent, min(firsts), time.perf_counter())

    async def _read(self, prompt: str, seed: int) -> float:
        """Read an answer to its end; gives when its first text was there."""
        first, text = math.inf, ""
        async with await self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=MAX_TOKENS,
            seed=seed,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream:
            async for chunk in stream:
                if chunk.choices and (new := chunk.choices[0].delta.content):
                    first = min(first, time.perf_counter())
                    text += new
        return first

    async def ask(self, ask: Ask, samples: int, callers: int, requests: int) -> list[Asked]:
        """Have callers ask for n answers to one prompt after another."""
        numbers = iter(range(requests))
        asked: list[Asked] = []

        async def caller() -> None:
            for number in numbers:
                prompt = self.prompts[number % len(self.prompts)]
                seeds = range(number * samples, (number + 1) * samples)
                asked.append(await ask(prompt, seeds))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(callers):
                tasks.create_task(caller())
        return asked

    async def overhead(self, samples: int, callers: int, requests: int) -> dict[str, Any]:
        """What each side adds to answers, the sides in turn."""
        sides: dict[str, Ask] = {"generate": self.generate, "direct": self.ask_directly}
        found: dict[str, list[Added]] = {name: [] for name in sides}
        scores: list[float] = []
        for _ in range(REPEATS):
            for name, ask in sides.items():
                asked = await self.ask(ask, samples, callers, max(1, requests // REPEATS))
                calls = await self.control.calls()
                found[name] += [added(each, calls) for each in asked]
            scores += await self.scores(SCORES)
        figures = {
            name: {
                "before": quantiles([each.before for each in times]),
                "first": quantiles([each.first for each in times]),
                "after": quantiles([each.after for each in times]),
            }
            for name, times in found.items()
        }
        made = {"samples": samples, "callers": callers, "requests": len(found["generate"])}
        return {**made, **figures, "score": quantiles(scores)}

    async def score(self, prompt: str, answer: str) -> tuple[float, int]:
        """Score an answer; gives the seconds until its reward was there, and its batch's size."""
        start = time.perf_counter()
        response = await self.stub.Score(pb.ScoreRequest(prompt=prompt, responses=[answer]))
        return time.perf_counter() - start, response.timing.batch_size

    async def scores(self, requests: int) -> list[float]:
        """Seconds that each Score takes, one at a time, with answers as the upstream gives them."""
        answers = ["".join(pieces) for pieces in timetable(0).answers]
        pairs = zip(itertools.cycle(self.prompts), itertools.cycle(answers), strict=False)
        return [(await self.score(*pair))[0] for pair in itertools.islice(pairs, requests)]

    async def batches(self, callers: int, samples: int, requests: int) -> dict[str, Any]:
        """How many answers are scored together, and per second, where they come at once."""
        whole = [["".join(pieces)] for pieces in timetable(0).answers]
        await self.control.follow(Timetable(0, 0, whole))
        start = time.perf_counter()
        flood = asyncio.create_task(self.ask(self.generate, samples, callers, requests))
        sizes: list[int] = []
        while not flood.done():
            number = len(sizes)
            prompt = self.prompts[number % len(self.prompts)]
            sizes.append((await self.score(prompt, whole[number % ANSWERS][0]))[1])
        await flood
        seconds = time.perf_counter() - start
        await self.control.calls()
        return {
            "callers": callers,
            "samples": samples,
            "requests": requests,
            "per_second": (requests * samples + len(sizes)) / seconds,
            "batches_seen": len(sizes),
            "batch_size_mean": sum(sizes) / len(sizes),
            "batch_size_max": max(sizes),
        }

    async def early_stop(self, samples: int, requests: int) -> dict[str, Any]:
        """Waste where one answer is complete long before the others, and is good enough."""
        lengths = [_SHORT] + [_LONG] * (samples - 1)
        await self.control.follow(Timetable(_EVERY, _EVERY, [["word "] * k for k in lengths]))
        ask = functools.partial(self.generate, early_stop=True)
        asked = await self.ask(ask, samples, _AT_ONCE, requests)
        calls = await self.control.calls()
        found = []
        for each in asked:
            own = [calls[seed] for seed in each.seeds]
            if own[0].ended is None:
                raise RuntimeError("the shortest answer did not end")
            found.append(waste(own, own[0].ended))
        return _waste_figures(found, requests * sum(lengths))

    async def cancelling(self, samples: int, requests: int) -> dict[str, Any]:
        """Waste where callers cancel half way."""
        await self.control.follow(Timetable(_EVERY, _EVERY, [["word "] * _LONG]))
        ask = functools.partial(self.generate, cancel_after=_LONG * _EVERY / 2)
        asked = await self.ask(ask, samples, _AT_ONCE, requests)
        calls = await self.control.calls()
        found = [waste([calls[seed] for seed in each.seeds], each.done) for each in asked]
        return _waste_figures(found, requests * samples * _LONG)


def _waste_figures(found: Sequence[Waste], whole: int) -> dict[str, Any]:
    late = [count for each in found for count in each.late]
    if not late:
        raise RuntimeError("no answer was cut")
    written = sum(each.written for each in found)
    return {
        "requests": len(found),
        "tokens_of_whole_answers": whole,
        "tokens_written": written,
        "tokens_needed": sum(each.needed for each in found),
        "share_not_bought": 1 - written / whole,
        "answers_cut": len(late),
        "late_tokens_per_answer_mean": sum(late) / len(late),
        "late_tokens_per_answer_max": max(late),
        "stopped": quantiles([seconds for each in found for seconds in each.stopped]),
    }


def main() -> int:
    """Measure, print the tables, keep the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--standin", action="store_true", help="measure with a real LLM on this machine as well"
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="a few calls each, to see that all works; keeps nothing",
    )
    options = parser.parse_args()
    bundle = Bundle.load(DEFAULT_BUNDLE)
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=bundle.manifest.reward.max_tokens)
    prompts = record.mixed_prompts(tokenizer, ANSWERS)
    with tempfile.TemporaryDirectory() as directory, Progress(transient=True) as progress:
        easily_pleased = write_easily_pleased(bundle, Path(directory) / "bundle")
        task = progress.add_task("measuring", total=None)

        def report(doing: str) -> None:
            progress.update(task, description=doing)

        with started("-m", "benchmarks.upstream") as url:
            file = write_configuration(easily_pleased, url, Path(directory) / "synthetic.toml")
            with served("--config", file) as (_, address):
                plan = synthetic(options.short, report)
                figures = asyncio.run(connected(address, url, bundle, prompts, plan))
        if options.standin:
            standin = str(Path(__file__).parents[1] / "examples" / "standin.py")
            with (
                started(standin, "--parallel", "4") as llm,
                started("-m", "benchmarks.upstream", "--relay", llm) as url,
            ):
                file = write_configuration(easily_pleased, url, Path(directory) / "standin.toml")
                with served("--config", file) as (_, address):
                    plan = real(options.short, report)
                    figures |= asyncio.run(connected(address, url, bundle, prompts, plan))
    show(figures)
    if options.short:
        return 0
    settings = {
        "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
        "prompts": len(prompts),
        "answers_per_second_at_most": ANSWERS_PER_SECOND,
        "shortest_answer_seconds": SHORTEST_ANSWER,
        "pieces": PIECES,
        "words_per_piece": WORDS_PER_PIECE,
        "repeats": REPEATS,
    }
    print(f"kept in {record.write('generate', settings, figures).relative_to(Path.cwd())}")
    return 0


Plan = Callable[[Bench], Awaitable[dict[str, Any]]]


async def connected(
    address: str, url: str, bundle: Bundle, prompts: Sequence[str], plan: Plan
) -> dict[str, Any]:
    """Carry out a plan.

    Args:
        address: of the service.
        url: base URL of the upstream.
        bundle: that is served.
        prompts: to ask.
        plan: what to measure.
    """
    async with (
        grpc.aio.insecure_channel(address) as channel,
        controlling(url) as control,
        openai.AsyncOpenAI(
            # As the server's providers call, which is what callers would write themselves.
            base_url=url,
            api_key="none",
            max_retries=0,
            http_client=openai.DefaultAioHttpClient(),
        ) as client,
    ):
        stub: RoutingServiceAsyncStub = RoutingServiceStub(channel)
        model = bundle.manifest.models[0].name
        return await plan(Bench(stub, client, control, model, prompts))


def synthetic(short: bool, report: Callable[[str], None]) -> Plan:
    """All that is measured with the synthetic upstream."""
    sizes, loads = ((1, 4), {1: 6, 8: 16}) if short else (SAMPLES, REQUESTS)
    few, many = (8, 50) if short else (32, 200)

    async def plan(bench: Bench) -> dict[str, Any]:
        report("warming up")
        await bench.control.follow(timetable(SHORTEST_ANSWER))
        for side in (bench.generate, bench.ask_directly):
            await bench.ask(side, max(sizes), 4, 8)
        await bench.control.calls()
        figures: dict[str, Any] = {"overhead": []}
        for callers, samples in itertools.product(loads, sizes):
            report(f"{callers} at once, n = {samples}")
            await bench.control.follow(timetable(answer_seconds(samples, callers)))
            figures["overhead"].append(await bench.overhead(samples, callers, loads[callers]))
        report("batches")
        alone = await bench.scores(many)
        figures["score"] = {"per_second": many / sum(alone), **quantiles(alone)}
        figures["batches"] = await bench.batches(32, 4, 4 * few)
        report("early stop and cancellation")
        figures["early_stop"] = await bench.early_stop(4, few)
        figures["cancelled"] = await bench.cancelling(4, few)
        return figures

    return plan


def real(short: bool, report: Callable[[str], None]) -> Plan:
    """The overhead with an LLM, for one caller."""
    sizes, requests = ((2,), 2) if short else ((1, 2, 4), 8)

    async def plan(bench: Bench) -> dict[str, Any]:
        report("the stand-in, warming up")
        await bench.ask(bench.generate, 1, 1, 1)
        await bench.control.calls()
        found = []
        for samples in sizes:
            report(f"the stand-in, n = {samples}")
            found.append(await bench.overhead(samples, 1, requests))
        return {"standin": found}

    return plan


def write_easily_pleased(bundle: Bundle, directory: Path) -> Path:
    """The bundle, but any reward is good enough to stop at; gives the directory it is put in."""
    shutil.copytree(bundle.directory, directory)
    reward = bundle.manifest.reward.model_copy(update={"accept_reward": -1e6})
    bundle.manifest.model_copy(update={"reward": reward}).write(directory)
    return directory


def write_configuration(bundle: Path, url: str, file: Path) -> Path:
    """Settings that serve a bundle's first model by an upstream; gives the file."""
    model = Bundle.load(bundle).manifest.models[0].name
    file.write_text(
        f"bundle = {json.dumps(str(bundle))}\n"
        f"[providers.upstream]\nbase_url = {json.dumps(url)}\n"
        f"max_concurrency = {max(SAMPLES) * max(REQUESTS)}\n"
        f'[models.{json.dumps(model)}]\nprovider = "upstream"\n',
        encoding="utf-8",
    )
    return file


def show(figures: Mapping[str, Any]) -> None:
    """Print median / 99th percentile of the overheads, and the rest."""
    console = Console()
    score, batches = figures["score"], figures["batches"]
    for name, title in (("overhead", "Synthetic upstream"), ("standin", "Stand-in LLM")):
        if name in figures:
            console.print(_overhead_table(title, figures[name]))
    console.print("median / 99th percentile; n = 1 is not scored\n")
    table = Table(title="Answers scored", title_justify="left")
    for column in ("", "per second", "together, mean", "together, most"):
        table.add_column(column, justify="right")
    table.add_row("Score, one at a time", f"{score['per_second']:.1f}", "1", "1")
    table.add_row(
        f"{batches['callers']} Generate at once, n = {batches['samples']}",
        *(f"{batches[key]:.1f}" for key in ("per_second", "batch_size_mean")),
        str(batches["batch_size_max"]),
    )
    console.print(table)
    table = Table(title="Tokens not bought", title_justify="left")
    for column in ("", "whole", "needed", "written", "saved", "late per answer", "ms to stop"):
        table.add_column(column, justify="right")
    for name in ("early_stop", "cancelled"):
        row = figures[name]
        table.add_row(
            name.replace("_", " "),
            *(str(row[f"tokens_{key}"]) for key in ("of_whole_answers", "needed", "written")),
            f"{row['share_not_bought']:.0%}",
            f"{row['late_tokens_per_answer_mean']:.1f}, max {row['late_tokens_per_answer_max']}",
            milliseconds(row["stopped"]),
        )
    console.print(table)


def _overhead_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title=f"{title}: ms from the first piece, from the last byte", title_justify="left"
    )
    for column in ("callers", "n", "from", "Generate", "openai alone", "ratio", "one Score"):
        table.add_column(column, justify="right")
    for row in rows:
        alone = row["samples"] == 1
        moments = {"first": "first", "after": "last"} if alone else {"after": "last"}
        for key, moment in moments.items():
            sides = [row[side][key] for side in ("generate", "direct")]
            table.add_row(
                *(str(row["callers"]), str(row["samples"]), moment),
                *map(milliseconds, sides),
                f"{sides[0]['p50_ms'] / sides[1]['p50_ms']:.1f}",
                milliseconds(row["score"]),
            )
    return table


if __name__ == "__main__":
    sys.exit(main())

"""The whole way on one machine: real prompts, the real server, and an LLM that answers.

    make demo                                          (or, in an environment with the extra demo:)
    python examples/demo.py --prompts 24 --generate 5

Starts a stand-in LLM and `bestroute serve`, makes prompts with reasoning-gym, routes them, answers
a few, and measures Route. Where a provider's key is in the environment, its real models answer (and
bill you); the stand-in answers in place of the others.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `examples` is, if run as a file

from bestroute.bundle import DEFAULT_BUNDLE, read_manifest
from bestroute.client import Client, GenerateOptions, PolicyOptions
from bestroute.errors import BestrouteError, BundleInvalid
from bestroute.v1 import routing_pb2 as pb
from examples.demonstration.answering import Answering, chosen
from examples.demonstration.processes import Failed, server, standin
from examples.demonstration.questions import (
    SEED,
    TASKS,
    Question,
    asks,
    questions,
    reachable_saving,
)
from examples.demonstration.screens import (
    Call,
    batches_table,
    ending,
    explanation,
    introduction,
    one_line,
    pool_table,
    routes_table,
    targets_table,
    timings_table,
    title,
    who_answers,
)
from examples.demonstration.upstreams import APIS, STANDIN, STANDIN_LLM, answering, configuration

CALLERS = 16
PIPE_WIDTH = 118
"""Columns where no terminal sets a width."""


async def route_all(
    client: Client, asked: Sequence[Question], policy: PolicyOptions
) -> list[pb.RouteResponse]:
    """Decide about every question."""
    return [await client.route(question.text, **policy) for question in asked]


async def show_routes(
    console: Console, client: Client, pool: pb.ListArmsResponse, asked: Sequence[Question]
) -> None:
    """Part 2."""
    console.print(title(2, f"Route: {len(asked)} prompts of reasoning-gym, decisions only"))
    decisions = await route_all(client, asked, {})
    console.print(
        "Nothing is asked for but a decision, which means the bundle's default target: "
        f"{explanation(decisions[0])} Costs are estimates.\n"
    )
    console.print(routes_table(asked, decisions, console.width))
    most = reachable_saving(pool)
    console.print()
    others: dict[str, PolicyOptions] = {
        "max_quality_drop = 0.05": {"max_quality_drop": 0.05},
        f"min_cost_saving = {most:.2f}": {"min_cost_saving": most},
        "match_threshold = 0.3": {"match_threshold": 0.3},
    }
    runs = {"(default)": decisions}
    for words, policy in others.items():
        runs[words] = await route_all(client, asked, policy)
    console.print(targets_table(pool, runs))
    console.print(
        "measured: when the bundle was made, on prompts like those it was trained on; a negative "
        "drop means better than always asking the reference.\n",
        style="dim",
    )


async def show_answers(
    console: Console,
    client: Client,
    pool: pb.ListArmsResponse,
    asked: Sequence[Question],
    who: Mapping[str, str],
) -> int:
    """Part 3; gives how many failed."""
    limit = 128 if STANDIN in who.values() else 1024
    console.print(title(3, f"Generate: {len(asked)} prompts answered, at most {limit} tokens each"))
    console.print(
        "[bold]reward[/]: the reward model's score, by which the winner ★ is chosen; a sample "
        "alone is not scored.\n"
        "[bold]verifier[/]: reasoning-gym's own grade, 0 to 1, of the answer (or its last word); "
        "bestroute never sees it.\n"
    )
    failures, plan = 0, asks(pool)
    for number, question in enumerate(asked):
        ask = plan[number % len(plan)]
        console.print(Text.assemble((question.task, "bold cyan"), f"  asked for: {ask.words}"))
        console.print(Padding(one_line(question.text, 104), (0, 0, 0, 2)))
        options = GenerateOptions(
            max_output_tokens=limit, expected_output_tokens=limit, temperature=0.8, seed=SEED
        )
        options.update(ask.options)
        arm = ask.arm
        screen = Answering(question, limit)
        events = client.generate(
            question.text,
            model=arm.model if arm else None,
            samples=arm.samples if arm else 1,
            **options,
        )
        try:
            with Live(screen, console=console, refresh_per_second=10, transient=True) as live:
                async with aclosing(events):
                    async for event in events:
                        if event.HasField("decision"):
                            live.console.print(chosen(event.decision, who))
                        screen.take(event)
        except (BestrouteError, grpc.aio.AioRpcError) as error:
            failures += 1
            console.print(Text(f"  failed: {error}", style="red"))
        if screen.texts:
            console.print(screen)
        console.print()
    return failures


async def measure(
    client: Client, asked: Sequence[Question], callers: int, calls: int
) -> list[Call]:
    """Route the questions in turn, with so many callers at once."""
    waiting = iter(range(calls))
    seen: list[Call] = []

    async def caller() -> None:
        for index in waiting:
            start = time.perf_counter()
            decision = await client.route(asked[index % len(asked)].text)
            seconds, timing = time.perf_counter() - start, decision.timing
            stages = (timing.tokenize, timing.queue, timing.inference)
            inside = sum(stage.ToTimedelta().total_seconds() for stage in stages)
            seen.append(Call(seconds, inside, timing.batch_size))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(callers):
            tasks.create_task(caller())
    return seen


async def show_timings(console: Console, client: Client, asked: Sequence[Question]) -> None:
    """Part 4."""
    console.print(title(4, "Route, measured: client and server share this machine"))
    console.print(
        "[bold]client[/]: what a caller waits. [bold]server[/]: tokenize + queue + inference, as "
        "each response reports it.\n"
    )
    await measure(client, asked, 1, len(asked))  # the first calls of a connection are slower
    runs: dict[str, list[Call]] = {}
    seconds: dict[str, float] = {}
    for words, callers, calls in (("1 caller", 1, 200), (f"{CALLERS} callers", CALLERS, 600)):
        start = time.perf_counter()
        runs[words] = await measure(client, asked, callers, calls)
        seconds[words] = time.perf_counter() - start
    console.print(timings_table(runs, seconds))
    console.print(batches_table(CALLERS, runs[f"{CALLERS} callers"]))


async def demonstrate(console: Console, prompts: int, generate: int, bundle: Path) -> int:
    """All parts, in order; gives the exit code."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    manifest = read_manifest(bundle)
    who = answering((model.name for model in manifest.models), os.environ)
    asked = questions(max(prompts, generate))
    console.print(introduction(prompts, generate, manifest))
    console.print(title(1, "the server and who answers for it"))
    console.print(who_answers(who))
    console.print(pool_table(manifest, who))
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bestroute-demo-")))
        start = time.perf_counter()
        with console.status("starting"):
            url = ""
            if STANDIN in who.values():
                url = await stack.enter_async_context(standin(directory))
            client = await stack.enter_async_context(
                server(directory, configuration(who, url), bundle)
            )
        console.print(
            f"bestroute serve answers on {client.address}"
            f"{f', the stand-in on {url}' if url else ''}; both up after "
            f"{time.perf_counter() - start:.1f} s\n"
        )
        pool = await client.list_arms()
        await show_routes(console, client, pool, asked[:prompts])
        failures = await show_answers(console, client, pool, asked[:generate], who)
        await show_timings(console, client, asked)
    console.print(ending(failures))
    return 1 if failures else 0


def at_least(low: int) -> Any:
    """A parser of integers from `low` on."""

    def parse(value: str) -> int:
        if (number := int(value)) < low:
            raise argparse.ArgumentTypeError(f"{number} is less than {low}")
        return number

    return parse


def main() -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Start bestroute and an LLM on this machine, route prompts, answer some, and "
        "measure. Takes one to two minutes.",
        epilog=f"{STANDIN_LLM} on this machine answers in place of every model of the pool. With "
        + " or ".join(api.key for api in APIS.values())
        + " in the environment the real models answer instead, at your expense.",
    )
    parser.add_argument(
        "--prompts",
        metavar="N",
        type=at_least(2),
        default=len(TASKS),
        help="prompts to route (default: %(default)s)",
    )
    parser.add_argument(
        "--generate",
        metavar="N",
        type=at_least(0),
        default=5,
        help="prompts to answer (default: %(default)s)",
    )
    parser.add_argument(
        "--bundle",
        metavar="DIR",
        type=Path,
        default=DEFAULT_BUNDLE,
        help="bundle to serve (default: the embedded one)",
    )
    args = parser.parse_args()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    try:
        return asyncio.run(demonstrate(console, args.prompts, args.generate, args.bundle))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("\nInterrupted; everything that was started has been stopped.")
        return 130
    except (Failed, BundleInvalid) as error:
        console.print(Text(str(error), style="red"))
        return 1


if __name__ == "__main__":
    sys.exit(main())

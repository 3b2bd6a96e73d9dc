"""`bestroute generate`: route, ask the LLM, and pick the best answer.

The answer goes to stdout, the story of how it came about to stderr.
"""

import argparse
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from bestroute.cli.arguments import (
    MAX_UINT32,
    POLICY,
    SESSION,
    add_connection,
    add_json,
    add_policy,
    add_prompt,
    add_session,
    described,
    given,
    integer,
    text,
)
from bestroute.cli.remote import ask
from bestroute.cli.route import cost, headline, reason, turn
from bestroute.cli.terminal import complain, console, count, facts, print_json, saved, usd
from bestroute.client import Client
from bestroute.v1 import routing_pb2 as pb

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bestroute.cli.arguments import Commands

_OPTIONS = ("max_output_tokens", "temperature", "top_p", "seed", "early_stop", "escalate")


def add(commands: "Commands") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "generate",
        help="answer a prompt",
        **described(
            "Route a prompt, draw the samples from the chosen LLM and print the best "
            "answer on stdout; how it came about is told on stderr.",
            'bestroute generate "Write a haiku about rain."',
            "bestroute generate - --early-stop < prompt.txt > answer.txt",
            'bestroute generate "Write a haiku." --model gpt-4o-mini --samples 5',
            'bestroute generate "What is 17 * 23?" --model gpt-4o-mini --samples 3 --escalate',
        ),
    )
    add_prompt(parser)
    add_policy(parser)
    add_session(parser)
    arm = parser.add_argument_group("arm", "skip the routing")
    arm.add_argument("--model", type=text, help="ask this model")
    arm.add_argument(
        "--samples", metavar="N", type=integer(1, MAX_UINT32), help="how often (default: 1)"
    )
    sampling = parser.add_argument_group("sampling", "default: the provider's")
    sampling.add_argument("--temperature", metavar="T", type=float, help="in 0 ... 2")
    sampling.add_argument("--top-p", metavar="P", type=float, help="above 0, up to 1")
    sampling.add_argument(
        "--max-output-tokens", metavar="N", type=integer(1, MAX_UINT32), help="per answer"
    )
    sampling.add_argument(
        "--seed",
        metavar="N",
        type=integer(-(2**63), 2**63 - 1),
        help="makes sampling repeatable where the provider can",
    )
    execution = parser.add_argument_group("execution")
    execution.add_argument(
        "--early-stop", action="store_true", help="stop drawing once an answer is good enough"
    )
    execution.add_argument(
        "--escalate",
        action="store_true",
        help="ask the reference as well where the answers don't convince",
    )
    add_connection(parser, timeout=120)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask and show the events as they come."""
    if args.samples and not args.model:
        return complain("--samples needs --model; --max-samples limits a routed one", code=2)

    async def answer(client: Client) -> None:
        events = client.generate(
            args.prompt,
            model=args.model,
            samples=args.samples or 1,
            timeout=args.timeout,
            **given(args, *POLICY, *SESSION, *_OPTIONS),
        )
        async with aclosing(events):
            if args.json:
                async for event in events:
                    print_json(event)
            else:
                await _show(events, escalate=args.escalate)

    return ask(args, answer)


async def _show(events: AsyncIterator[pb.GenerateResponse], *, escalate: bool) -> None:
    err = console(sys.stderr)
    decision = (await anext(events)).decision
    err.print(_decision(decision), style="bold")
    if what := turn(decision):
        err.print(f"session: {what}")
    # A single sample that no other can replace is the answer; it can be printed as it comes.
    only = decision.arm.samples == 1 and not escalate
    result = await (_follow(events, err) if only else _compare(events, err))
    err.print(_result(result), style="bold")


async def _follow(events: AsyncIterator[pb.GenerateResponse], err: "Console") -> pb.Result:
    """Print the answer while it is written; one that replaces it begins on a line of its own."""
    result = pb.Result()
    begun = False
    async for event in events:
        match event.WhichOneof("event"):
            case "delta":
                begun = True
                print(event.delta.text, end="", flush=True)
            case "retry":
                err.print(_retry(event.retry))
            case "fallback":
                if begun:
                    print(flush=True)
                    err.print("What was printed of the answer is not all of it.")
                begun = False
                err.print(_fallback(event.fallback))
            case "result":
                result = event.result
    print(flush=True)
    return result


async def _compare(events: AsyncIterator[pb.GenerateResponse], err: "Console") -> pb.Result:
    """Show what is being written (on a terminal) and what it was worth; print the winner."""
    from rich.live import Live

    result = pb.Result()
    drafts: dict[int, str] = {}
    with Live(console=err, transient=True, auto_refresh=False, redirect_stdout=False) as live:
        async for event in events:
            match event.WhichOneof("event"):
                case "delta":
                    written = drafts.get(event.delta.candidate, "") + event.delta.text
                    drafts[event.delta.candidate] = written
                case "candidate":
                    drafts.pop(event.candidate.index, None)
                    err.print(_candidate(event.candidate))
                case "retry":
                    err.print(_retry(event.retry))
                case "fallback":
                    err.print(_fallback(event.fallback))
                case "result":
                    result = event.result
            live.update(_ends(drafts, err.width), refresh=True)
    print(result.text, flush=True)
    return result


def _ends(drafts: dict[int, str], width: int) -> "Table":
    """The last words of each unfinished candidate, one line each."""
    rows = []
    for index, written in sorted(drafts.items()):
        name = f"candidate {index}"
        room = max(0, width - len(name) - 3)
        # Only what fits is joined: the line is drawn again for every piece that comes.
        rows.append((name, " ".join(written[-2 * room :].split())[-room:]))
    return facts(*rows)


def _decision(decision: pb.RouteResponse) -> str:
    line = f"{headline(decision.arm)}: {cost(decision)}"
    return f"{line} ({why})" if (why := reason(decision)) else line


def _candidate(candidate: pb.Candidate) -> str:
    who = f"candidate {candidate.index} of {candidate.model}"
    if candidate.HasField("error"):
        return f"{who} failed: {candidate.error.message}"
    reward = f"reward {candidate.reward:.3f}, " if candidate.HasField("reward") else ""
    tokens = count(candidate.usage.output_tokens, "token")
    return f"{who}: {reward}{tokens}, {candidate.finish_reason}"


def _retry(retry: pb.Retry) -> str:
    delay = retry.delay.ToTimedelta().total_seconds()
    return f"{retry.model} failed: {retry.cause.message}; asked again in {delay:.1f} s"


def _fallback(fallback: pb.Fallback) -> str:
    failed = f"{fallback.failed_model} gave no answer: {fallback.cause.message}"
    return f"{failed}; {fallback.model} is asked instead"


def _result(result: pb.Result) -> str:
    parts = [f"candidate {result.candidate} of {result.model}", f"{usd(result.cost_usd)} paid"]
    if against := saved(result.cost_usd, result.reference_cost_usd):
        parts[-1] += f", {against} than the reference at {usd(result.reference_cost_usd)}"
    tokens = result.usage.input_tokens + result.usage.output_tokens
    parts.append(count(tokens, "token") + (" (estimated)" if result.usage.estimated else ""))
    first, whole = (
        span.ToTimedelta().total_seconds() for span in (result.time_to_first_token, result.duration)
    )
    parts.append(f"first text after {first:.2f} s, {whole:.2f} s in all")
    if result.candidates_cancelled:
        parts.append(f"{result.candidates_cancelled} stopped early")
    if result.escalated:
        parts.append("the reference was asked as well")
    return "; ".join(parts)

"""`bestroute score`: score given answers."""

import argparse
import sys
from typing import TYPE_CHECKING

from bestroute.cli.arguments import add_connection, add_json, add_prompt, described, text
from bestroute.cli.remote import ask
from bestroute.cli.terminal import console, print_json, table
from bestroute.client import Client
from bestroute.v1 import routing_pb2 as pb

if TYPE_CHECKING:
    from bestroute.cli.arguments import Commands

_SHOWN = 60
"""Characters of an answer that are enough to recognise it."""


def add(commands: "Commands") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "score",
        help="score answers with the reward model",
        **described(
            "Score answers to a prompt with the reward model; higher is better.",
            'bestroute score "What is 2 + 2?" "It is 4." "Five, I think."',
        ),
    )
    add_prompt(parser)
    parser.add_argument(
        "responses", metavar="RESPONSE", nargs="+", type=text, help="an answer to score"
    )
    add_connection(parser, timeout=10)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask and show the rewards."""

    async def rate(client: Client) -> None:
        scores = await client.score(args.prompt, args.responses)
        if args.json:
            print_json(scores)
        else:
            _show(scores, args.responses)

    return ask(args, rate)


def _show(scores: pb.ScoreResponse, responses: list[str]) -> None:
    listed = table("answer", "reward", "")
    for index, (response, reward) in enumerate(zip(responses, scores.rewards, strict=True)):
        notes = ["best"] if index == scores.best else []
        notes += ["cut"] if scores.truncated[index] else []
        listed.add_row(beginning(response, _SHOWN), f"{reward:.3f}", ", ".join(notes))
    console(sys.stdout).print(listed)


def beginning(answer: str, length: int) -> str:
    """The first characters of an answer, in one line."""
    line = " ".join(answer.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"

"""`bestroute route`: ask for a decision."""

import argparse
import sys
from typing import TYPE_CHECKING

from bestroute.cli.arguments import (
    POLICY,
    SESSION,
    add_connection,
    add_json,
    add_policy,
    add_prompt,
    add_session,
    described,
    given,
)
from bestroute.cli.remote import ask
from bestroute.cli.terminal import (
    console,
    count,
    facts,
    milliseconds,
    percent,
    print_json,
    saved,
    table,
    usd,
)
from bestroute.client import Client
from bestroute.v1 import routing_pb2 as pb

if TYPE_CHECKING:
    from rich.table import Table

    from bestroute.cli.arguments import Commands

_REASONS = {
    pb.FALLBACK_REASON_BELOW_THRESHOLD: "no allowed arm reached the threshold",
    pb.FALLBACK_REASON_OVER_BUDGET: "the reference is over the highest cost; "
    "this is the most promising arm within it",
    pb.FALLBACK_REASON_ROUTER_FAILED: "the router model failed; the server's log has the reason",
    pb.FALLBACK_REASON_SHADOW: "the server is in shadow mode: the reference always answers",
}


_TURNS = {
    pb.SESSION_REASON_NEW: "new",
    pb.SESSION_REASON_WORTH_MOST: "stays: no other is worth more",
    pb.SESSION_REASON_STICKY: "stays: it is sticky",
    pb.SESSION_REASON_TOOL_TURN: "stays: a turn of tools",
    pb.SESSION_REASON_WORTH_CHANGING: "changed: another is worth more",
    pb.SESSION_REASON_NOT_ALLOWED: "changed: the former may not be chosen any more",
    pb.SESSION_REASON_REQUESTED: "the request names the model",
    pb.SESSION_REASON_FALLBACK: "the router model failed, so that the reference answers",
}


def add(commands: "Commands") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "route",
        help="decide which LLM to ask and how often",
        **described(
            "Decide which LLM to ask and how many samples to draw; asks no LLM.",
            'bestroute route "What is 2 + 2?"',
            "bestroute route - --max-quality-drop 0.02 --explain < prompt.txt",
            'bestroute route "What is 2 + 2?" --json | jq .arm.model',
            "bestroute route - --session chat-17 --sticky < turn.txt",
        ),
    )
    add_prompt(parser)
    add_policy(parser)
    add_session(parser)
    parser.add_argument("--explain", action="store_true", help="list every arm")
    add_connection(parser, timeout=10)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask and show the decision."""

    async def decide(client: Client) -> None:
        options = given(args, *POLICY, *SESSION)
        decision = await client.route(args.prompt, explain=args.explain, **options)
        if args.json:
            print_json(decision)
        else:
            _show(decision)

    return ask(args, decide)


def headline(arm: pb.Arm) -> str:
    """What is going to be run."""
    return f"{arm.model}, {count(arm.samples, 'sample')}"


def reason(decision: pb.RouteResponse) -> str:
    """Why it is not the best arm that qualifies; empty where it is."""
    below = decision.fallback_reason == pb.FALLBACK_REASON_BELOW_THRESHOLD
    if below and decision.HasField("quality_per_usd"):
        return "no allowed arm is worth more than the reference"
    return _REASONS.get(decision.fallback_reason, "")


def turn(decision: pb.RouteResponse) -> str:
    """What the session did to it; empty where it has none."""
    if not decision.HasField("session"):
        return ""
    session = decision.session
    line = f"turn {session.turn}, {_TURNS[session.reason]}"
    if session.changed:
        line += f"; {session.previous_model} ran before"
    if session.cached_tokens:
        line += f"; {count(session.cached_tokens, 'token')} expected in its prompt cache"
    return line


def cost(decision: pb.RouteResponse) -> str:
    """What is expected to be paid, against the reference."""
    arm, reference = decision.arm, decision.reference
    if arm.model == reference.model:
        return f"{usd(arm.estimated_cost_usd)} estimated"
    against = saved(arm.estimated_cost_usd, reference.estimated_cost_usd)
    than = f"{against} than {reference.model} at {usd(reference.estimated_cost_usd)}"
    return f"{usd(arm.estimated_cost_usd)} estimated, {than}"


def _show(decision: pb.RouteResponse) -> None:
    out = console(sys.stdout)
    out.print(headline(decision.arm), style="bold")
    rows = [
        ("why", reason(decision)),
        ("session", turn(decision)),
        _criterion(decision),
        ("cost", cost(decision)),
        ("answer", f"about {count(round(decision.arm.expected_output_tokens), 'token')}"),
        (
            "prompt",
            count(decision.prompt_tokens, "token") + (", cut" if decision.truncated else ""),
        ),
        ("time", _time(decision.timing) if decision.HasField("timing") else ""),
        ("bundle", decision.bundle_version),
    ]
    out.print(facts(*(row for row in rows if row[1])))
    if decision.arms:
        out.print()
        out.print(_arms(decision))


def _criterion(decision: pb.RouteResponse) -> tuple[str, str]:
    """By what it was chosen."""
    arm, reference = decision.arm, decision.reference.model
    if not decision.HasField("quality_per_usd"):
        probability = f"{arm.match_probability:.3f} to match {reference}"
        return "probability", f"{probability}; threshold {decision.match_threshold:.3f}"
    rate = f"one dollar is worth {decision.quality_per_usd:g} of quality"
    if not arm.HasField("expected_gain") or arm.model == reference:
        return "trade-off", rate
    return "gain", f"{arm.expected_gain:+.3f} expected against {reference}; {rate}"


def _time(timing: pb.Timing) -> str:
    stages = {"tokenize": timing.tokenize, "queue": timing.queue, "inference": timing.inference}
    parts = [
        f"{name} {milliseconds(span.ToTimedelta().total_seconds())}"
        for name, span in stages.items()
    ]
    return f"{', '.join(parts)} in a batch of {timing.batch_size}"


def _arms(decision: pb.RouteResponse) -> "Table":
    """Every arm and the reference, cheapest first; by threshold the first that qualifies."""
    trading = decision.reference.HasField("expected_gain")
    gain = ("gain",) if trading else ()
    listed = table("arm", "samples", "probability", *gain, "tokens", "cost", "saved", "")
    reference = decision.reference
    for arm in sorted([*decision.arms, reference], key=lambda arm: arm.estimated_cost_usd):
        chosen = (arm.model, arm.samples) == (decision.arm.model, decision.arm.samples)
        saving = 1 - arm.estimated_cost_usd / (reference.estimated_cost_usd or 1)
        listed.add_row(
            arm.model,
            str(arm.samples),
            f"{arm.match_probability:.3f}",
            *((f"{arm.expected_gain:+.3f}",) if trading else ()),
            f"{arm.expected_output_tokens:.0f}",
            usd(arm.estimated_cost_usd),
            percent(saving),
            "chosen" if chosen else "reference" if arm == reference else "",
            style="bold" if chosen else None,
        )
    return listed

"""What sessions are worth: models changed, network runs, cost with providers' prompt caches.

    python -m benchmarks.sessions [--sessions 200] [--momentum 0.5] [--cached 0.1]

Agents' conversations are put before `bestroute serve`, turn by turn, once for each way of asking:
as strangers to a server that remembers no prompts (so every turn is a run of the network), as
strangers, in sessions, and in sticky ones. All ways get the very same conversations.

Real: the server, the router and its prices, the questions (of reasoning-gym), the latencies.

Simulated: everything else. What models and tools say is filler of drawn lengths, which doesn't
depend on the model. Each user's turn leads to some turns of tools; of the later ones half are
short ("Commit it."). No LLM is asked: costs are computed, by one rule for all ways: a model's
prompt tokens that it has had in this conversation before, whenever that was, cost `--cached` of
the others. Nothing is known of what a change does to quality but what the router itself predicts:
the gain that it expects of the chosen arm, read without the session, counted on every turn of a
user's and its tools.

Cost alone doesn't tell the ways apart. Who takes no account of the cache overrates what staying
with a better model costs, and so buys less quality than its target asks for. The last table
therefore has both at several targets: what the same money buys.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import reasoning_gym
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import record
from benchmarks.latencies import quantile
from benchmarks.process import READ_ANEW, served
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.client import RouteOptions, SyncClient
from bestroute.v1 import routing_pb2 as pb
from examples.demonstration.questions import TASKS

DROPS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
"""Targets at which asking alone and in sessions are compared."""
WAYS = ("no memory", "alone", "session", "sticky")
SHORT = ("Commit it.", "Go on.", "Now write a test for it.", "Why?", "Do the same once more.")
WORDS = ("file", "line", "value", "error", "test", "result", "count", "name", "found", "of", "the")
SYSTEM_TOKENS = 1500
Message = dict[str, str]


@dataclass(frozen=True)
class Step:
    """One request of a conversation.

    Attributes:
        messages: up to it.
        user: whether the user speaks in it, or else tools.
        answer_tokens: of what the model says to it.
    """

    messages: Sequence[Message]
    user: bool
    answer_tokens: int


@dataclass
class Tally:
    """What one way of asking came to."""

    requests: int = 0
    tool_turns: int = 0
    changes: int = 0
    changes_at_tools: int = 0
    runs: int = 0
    runs_at_tools: int = 0
    usd: float = 0.0
    gain: float = 0.0
    tool_seconds: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """For the table and the JSON."""
        return {
            "requests": self.requests,
            "tool_turns": self.tool_turns,
            "changes_of_model": self.changes,
            "changes_of_model_at_tool_turns": self.changes_at_tools,
            "runs_per_turn": self.runs / self.requests,
            "runs_per_tool_turn": self.runs_at_tools / self.tool_turns,
            "usd": self.usd,
            "expected_gain": self.gain / self.requests,
            "tool_turn_ms_median": 1e3 * quantile(self.tool_seconds, 0.5),
            "tool_turn_ms_p99": 1e3 * quantile(self.tool_seconds, 0.99),
        }


def main() -> int:
    """Ask in every way, print the table, keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=200, help="(default: 200)")
    parser.add_argument("--momentum", type=float, default=0.5, help="(default: 0.5)")
    parser.add_argument("--cached", type=float, default=0.1, help="price, of others (default: 0.1)")
    options = parser.parse_args()
    conversations = [list(_conversation(seed)) for seed in range(options.sessions)]
    prices = {
        model.name: (model.input_usd_per_mtok, model.output_usd_per_mtok)
        for model in Bundle.load(DEFAULT_BUNDLE).manifest.models
    }
    figures: dict[str, Any] = {}
    with TemporaryDirectory() as directory:
        file = Path(directory) / "bestroute.toml"
        file.write_text(_configuration(prices, options.cached, options.momentum))
        for way in WAYS:
            environment = READ_ANEW if way == "no memory" else None
            with (
                served("--config", file, environment=environment) as (_, address),
                SyncClient(address, timeout=30) as client,
            ):
                figures[way] = _asked(client, way, conversations, prices, options.cached).figures()
        figures["by_target"] = {}
        with (
            served("--config", file) as (_, address),
            SyncClient(address, timeout=30) as client,
        ):
            for drop in DROPS:
                target: RouteOptions = {"max_quality_drop": drop}
                figures["by_target"][drop] = {
                    way: _asked(
                        client, way, conversations, prices, options.cached, target
                    ).figures()
                    for way in ("alone", "session")
                }
    figures["reference alone"] = {"usd": _reference(conversations, prices, options.cached)}

    _show(figures)
    print(f"kept in {record.write('sessions', vars(options), figures)}")
    return 0


def _conversation(seed: int) -> Iterator[Step]:
    source = random.Random(seed)

    def filler(median: float, sigma: float = 0.8) -> tuple[str, int]:
        count = max(3, min(int(source.lognormvariate(0, sigma) * median), 4000))
        return " ".join(source.choices(WORDS, k=count)), count

    said: list[Message] = [
        {"role": "system", "content": " ".join(source.choices(WORDS, k=SYSTEM_TOKENS))}
    ]
    for turn in range(source.randint(2, 5)):
        short = turn > 0 and source.random() < 0.5
        question = source.choice(SHORT) if short else _question(source)
        said.append({"role": "user", "content": question})
        for tools in range(min(int(source.expovariate(1 / 4.5)), 20) + 1):
            if tools:
                said.append({"role": "tool", "content": filler(200)[0]})
            text, tokens = filler(60)
            yield Step(list(said), tools == 0, tokens)
            said.append({"role": "assistant", "content": text})


def _question(source: random.Random) -> str:
    task = source.choice(list(TASKS))
    dataset = reasoning_gym.create_dataset(
        task, seed=source.randrange(1 << 30), size=1, **TASKS[task]
    )
    return str(dataset[0]["question"])


def _asked(
    client: SyncClient,
    way: str,
    conversations: Sequence[Sequence[Step]],
    prices: Mapping[str, tuple[float, float]],
    cached: float,
    target: RouteOptions | None = None,
) -> Tally:
    """Ask for all decisions in one way."""
    tally = Tally()
    for number, steps in enumerate(track(conversations, way, transient=True)):
        options: RouteOptions = {**(target or {})}
        if way in ("session", "sticky"):
            options |= {"session": f"{number} {target}", "sticky": way == "sticky"}
        known: dict[str, int] = {}
        before, gains = "", {}
        for step in steps:
            start = time.perf_counter()
            decision = client.route(step.messages, **options)
            seconds = time.perf_counter() - start
            if step.user:
                gains = _gains(client.route(step.messages, explain=True))
            arm, tools = decision.arm, not step.user
            changed, ran = before not in ("", arm.model), decision.timing.batch_size > 0
            tally.requests += 1
            tally.tool_turns += tools
            tally.changes += changed
            tally.changes_at_tools += changed and tools
            tally.runs += ran
            tally.runs_at_tools += ran and tools
            tally.gain += gains[arm.model, arm.samples]
            tally.usd += _usd(
                arm, decision.prompt_tokens, step.answer_tokens, known, prices, cached
            )
            if tools:
                tally.tool_seconds.append(seconds)
            before = arm.model
    return tally


def _gains(decision: pb.RouteResponse) -> dict[tuple[str, int], float]:
    return {
        (arm.model, arm.samples): arm.expected_gain for arm in (*decision.arms, decision.reference)
    }


def _usd(
    arm: pb.Arm,
    prompt_tokens: int,
    answer_tokens: int,
    known: dict[str, int],
    prices: Mapping[str, tuple[float, float]],
    cached: float,
) -> float:
    """What a turn costs; takes note in `known` of what the model has had by then."""
    price, answer_price = prices[arm.model]
    had = min(known.get(arm.model, 0), prompt_tokens)
    known[arm.model] = prompt_tokens + answer_tokens
    prompt = (prompt_tokens - had * (1 - cached)) * price
    return arm.samples * (prompt + answer_tokens * answer_price) / 1e6


def _reference(
    conversations: Sequence[Sequence[Step]],
    prices: Mapping[str, tuple[float, float]],
    cached: float,
) -> float:
    """What it costs if the reference answers every turn; tokens are words here."""
    model, usd = Bundle.load(DEFAULT_BUNDLE).manifest.reference_model, 0.0
    for steps in conversations:
        known: dict[str, int] = {}
        for step in steps:
            tokens = sum(2 + len(turn["content"].split()) for turn in step.messages)
            arm = pb.Arm(model=model, samples=1)
            usd += _usd(arm, tokens, step.answer_tokens, known, prices, cached)
    return usd


def _configuration(
    prices: Mapping[str, tuple[float, float]], cached: float, momentum: float
) -> str:
    lines = [
        f"[sessions]\nmomentum = {momentum}",
        '[providers.none]\nbase_url = "http://127.0.0.1:9"',
    ]
    for model, (price, answer_price) in prices.items():
        lines.append(
            f'[models."{model}"]\nprovider = "none"\nprice = {{ input_usd_per_mtok = {price}, '
            f"output_usd_per_mtok = {answer_price}, "
            f"cached_input_usd_per_mtok = {cached * price} }}"
        )
    return "\n".join(lines)


def _show(figures: Mapping[str, Any]) -> None:
    columns = ("changes of model", "at tools", "runs per turn", "at tools", "USD", "expected gain")
    table = Table("asked", *columns, "tool turn, ms: median", "p99", title="Sessions")
    for way in WAYS:
        found = figures[way]
        table.add_row(
            way,
            f"{found['changes_of_model']:.0f}",
            f"{found['changes_of_model_at_tool_turns']:.0f}",
            f"{found['runs_per_turn']:.2f}",
            f"{found['runs_per_tool_turn']:.2f}",
            f"{found['usd']:.2f}",
            f"{found['expected_gain']:+.4f}",
            f"{found['tool_turn_ms_median']:.2f}",
            f"{found['tool_turn_ms_p99']:.2f}",
        )
    Console().print(table)
    table = Table("max quality drop", title="USD, and expected gain, by target")
    for way in ("alone", "session"):
        table.add_column(f"{way}: USD", justify="right")
        table.add_column("gain", justify="right")
        table.add_column("changes", justify="right")
    for drop, found in figures["by_target"].items():
        cells = [
            cell
            for each in found.values()
            for cell in (
                f"{each['usd']:.2f}",
                f"{each['expected_gain']:+.4f}",
                f"{each['changes_of_model']:.0f}",
            )
        ]
        table.add_row(f"{drop:g}", *cells)
    Console().print(table)
    requests = figures["alone"]["requests"]
    print(f"{requests:.0f} turns; the reference alone: {figures['reference alone']['usd']:.2f} USD")


if __name__ == "__main__":
    sys.exit(main())

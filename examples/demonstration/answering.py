"""A Generate as it comes: its candidates side by side, their rewards, the winner and the money."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.box import ROUNDED
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bestroute.v1 import routing_pb2 as pb
from examples.demonstration.questions import Question
from examples.demonstration.screens import arm_text, one_line, predicted, usd
from examples.demonstration.upstreams import STANDIN, STANDIN_LLM


@dataclass
class Answering:
    """A Generate as it comes: what its screen shows.

    Attributes:
        question: what is answered.
        limit: most tokens per answer.
        texts: what there is of each candidate.
        candidates: those that ended.
    """

    question: Question
    limit: int
    decision: pb.RouteResponse | None = None
    texts: dict[int, str] = field(default_factory=dict)
    candidates: dict[int, pb.Candidate] = field(default_factory=dict)
    result: pb.Result | None = None

    def take(self, event: pb.GenerateResponse) -> None:
        """Note an event."""
        match event.WhichOneof("event"):
            case "decision":
                self.decision = event.decision
                self.texts = dict.fromkeys(range(event.decision.arm.samples), "")
            case "delta":
                known = self.texts.get(event.delta.candidate, "")
                self.texts[event.delta.candidate] = known + event.delta.text
            case "candidate":
                self.texts.setdefault(event.candidate.index, "")
                self.candidates[event.candidate.index] = event.candidate
            case "result":
                self.result = event.result

    def __rich__(self) -> Group:
        """The candidates, and below them what came of it."""
        table = Table(box=ROUNDED, expand=True)
        table.add_column("", width=2)
        table.add_column("candidate", no_wrap=True, ratio=1)
        for name in ("tokens", "reward", "verifier"):
            table.add_column(name, justify="right", no_wrap=True)
        for index, text in sorted(self.texts.items()):
            table.add_row(*self._row(index, text))
        if self.decision is None or self.result is None:
            return Group(table)
        return Group(table, self._outcome(self.decision, self.result))

    def _row(self, index: int, text: str) -> list[Text | str]:
        done = self.candidates.get(index)
        if done is None:
            return ["…", one_line(text, 90, tail=True), "", "", ""]
        if done.HasField("error"):
            return ["✗", Text(done.error.message, style="red"), "", "", ""]
        won = self.result is not None and self.result.candidate == index
        cancelled = done.finish_reason == "cancelled"
        return [
            Text("★" if won else "✗" if cancelled else "✓", style="bold green" if won else "dim"),
            one_line(done.text, 90),
            f"{done.usage.output_tokens}{'~' if done.usage.estimated else ''}",
            f"{done.reward:+.2f}" if done.HasField("reward") else "-",
            "stopped" if cancelled else f"{self.question.grade(done.text):.2f}",
        ]

    def _outcome(self, decision: pb.RouteResponse, result: pb.Result) -> Padding:
        """The winner and the money; the reference's cost is an estimate, for as long an answer."""
        text = Text.assemble(
            (f"★ candidate {result.candidate}", "bold green"),
            "  cost ",
            (usd(result.cost_usd), "bold"),
            f" for {result.usage.output_tokens} tokens; ",
        )
        if result.model == decision.reference.model:
            text.append("this is the reference itself")
        else:
            saved = 1 - result.cost_usd / (result.reference_cost_usd or 1)
            text.append(
                f"a reference answer of {self.limit} tokens is estimated at "
                f"{usd(result.reference_cost_usd)}: "
            )
            text.append(f"{saved:.0%} saved" if saved >= 0 else f"{-saved:.0%} more", "bold")
        if result.candidates_cancelled:
            text.append(f"; {result.candidates_cancelled} stopped early")
        first, whole = (
            span.ToTimedelta().total_seconds()
            for span in (result.time_to_first_token, result.duration)
        )
        text.append(f"\n  first text after {first:.2f} s, the result after {whole:.2f} s", "dim")
        return Padding(text, (0, 0, 0, 2))


def chosen(decision: pb.RouteResponse, who: Mapping[str, str]) -> Padding:
    """What Generate decided, and who really answers."""
    arm, name = decision.arm, who[decision.arm.model]
    why = ""
    if decision.fallback_reason:
        why = " (no arm qualified)"
    elif decision.HasField("timing"):
        trading = decision.HasField("quality_per_usd")
        why = f" ({'gain' if trading else 'p ='} {predicted(decision)})"
    line = Text.assemble("→ ", (arm_text(arm), "bold"), why)
    if name == STANDIN:
        line.append(f"   {STANDIN_LLM} answers in its place", "yellow")
    else:
        line.append(f"   answered by {name}")
    return Padding(line, (0, 0, 0, 2))

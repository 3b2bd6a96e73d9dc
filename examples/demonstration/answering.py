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
from examples.demonstration.screens import arm_text, one_line, usd
from examples.demonstration.upstreams import STANDIN, STANDIN_LLM


@dataclass
class Answering:
    """A Generate as it comes: what its screen shows."""

    question: Question
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
        return Group(table, *([self._outcome(self.result)] if self.result else []))

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

    def _outcome(self, result: pb.Result) -> Padding:
        saved = 1 - result.cost_usd / (result.reference_cost_usd or 1)
        first, whole = (
            span.ToTimedelta().total_seconds()
            for span in (result.time_to_first_token, result.duration)
        )
        text = Text.assemble(
            (f"★ candidate {result.candidate}", "bold green"),
            "  cost ",
            (usd(result.cost_usd), "bold"),
            f", one answer of the reference {usd(result.reference_cost_usd)}: ",
            (f"{saved:.0%} saved", "bold"),
            f"  first text {first:.2f} s, all {whole:.2f} s",
        )
        if result.candidates_cancelled:
            text.append(f", {result.candidates_cancelled} stopped early")
        return Padding(text, (0, 0, 0, 2))


def chosen(decision: pb.RouteResponse, who: Mapping[str, str]) -> Padding:
    """What Generate decided, and who really answers."""
    arm, name = decision.arm, who[decision.arm.model]
    why = ""
    if decision.fallback_reason:
        why = " (no arm reached the threshold)"
    elif decision.HasField("timing"):
        why = f" (p = {arm.match_probability:.2f})"
    line = Text.assemble("→ ", (arm_text(arm), "bold"), why)
    if name == STANDIN:
        line.append(f"   {STANDIN_LLM} answers in its place", "yellow")
    else:
        line.append(f"   answered by {name}")
    return Padding(line, (0, 0, 0, 2))

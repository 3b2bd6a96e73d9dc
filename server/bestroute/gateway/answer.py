"""What we have to say of an answer: headers, a block in its usage, answers of our own. Pure."""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bestroute.best_of_n import FellBack, Result
from bestroute.candidate import Candidate
from bestroute.desk import Decided
from bestroute.members import members_by_name, with_member
from bestroute.pass_through import Event
from bestroute.pricing import cost
from bestroute.upstream.completion import Ended
from bestroute.upstream.relay import Opened, Piece
from bestroute.upstream.usage import Usage

_CHUNK = 120
"""Characters of a text that is streamed when it is known already."""
_DONE = b"data: [DONE]\n\n"


class Account:
    """Takes note of what happens to an answer in the making, and tells of it.

    Args:
        decided: how it was decided.

    Attributes:
        settled: whether it is known who answers.
    """

    def __init__(self, decided: Decided) -> None:
        self.settled = False
        self._decided = decided
        self._model = decided.routed.decision.arm.model
        self._request_id = ""
        self._fell_back = False
        self._candidates: list[dict[str, Any]] = []
        self._finish_reasons: dict[int, str] = {}

    def happened(self, event: Event) -> None:
        """Take note of an event."""
        match event:
            case Opened():
                self._model, self._request_id = event.model, event.request_id
                self.settled = True
            case FellBack():
                self._fell_back = True
            case Candidate():
                end = Ended(event.index, "", event.finish_reason, event.usage, event.error)
                self._candidates.append(self._candidate(event.model, event.reward, end))
            case Result():
                self._model = event.model
                self.settled = True

    def headers(self) -> dict[str, str]:
        """What is known by now, for a stream that begins."""
        decision = self._decided.routed.decision
        reason = decision.fallback.name.lower() if decision.fallback else ""
        if self._fell_back:
            reason = "provider_failed"
        found = {
            "x-bestroute-model": self._model,
            "x-bestroute-samples": str(decision.arm.samples),
            "x-bestroute-reason": reason,
            "x-bestroute-estimated-cost-usd": _usd(decision.arm.estimated_cost_usd),
            "x-bestroute-reference-cost-usd": _usd(decision.reference.estimated_cost_usd),
            "x-bestroute-bundle": self._decided.router.manifest.version,
            "x-bestroute-decision-id": self._decided.decision_id,
            "x-request-id": self._request_id,
        }
        return {name: value for name, value in found.items() if value}

    def final_headers(self) -> dict[str, str]:
        """What is known in the end."""
        return {
            **self.headers(),
            "x-bestroute-cost-usd": _usd(sum(each["cost_usd"] for each in self._candidates)),
            "x-bestroute-candidates": json.dumps(self._candidates),
        }

    def passed(self, piece: Piece, *, usage: bool) -> bytes:
        """The bytes of a piece, with our block in its usage.

        Args:
            piece: that passes.
            usage: whether the caller wants to know what was used.

        Returns:
            None of a piece that says only that, if the caller doesn't.
        """
        if not piece.ended:
            return piece.raw
        if piece.alone and not usage:
            return b""
        ended = [self._candidate(self._model, None, each) for each in piece.ended]
        block = self._block([*self._candidates, *ended])
        try:
            text = piece.raw.decode()
            begin = text.index("{")
            end = text.rindex("}") + 1
            said = text[begin:end]
            found = members_by_name(said)["usage"]
            told = with_member(said[found.start : found.end], "bestroute", block)
        except (ValueError, KeyError):  # JSON in several lines, say: then it passes as it is
            return piece.raw
        return f"{text[:begin]}{said[: found.start]}{told}{said[found.end :]}{text[end:]}".encode()

    def completion(self, result: Result) -> bytes:
        """The best of several answers, as one chat completion."""
        message = {"role": "assistant", "content": result.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self._finish_reason(result),
        }
        body = self._object("chat.completion", result, [choice])
        return json.dumps({**body, "usage": self._usage(result)}).encode()

    def chunks(self, result: Result, *, usage: bool) -> Iterator[bytes]:
        """The best of several answers, as the events of a stream.

        Args:
            result: has the answer.
            usage: whether it ends with what was used.
        """

        def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
            return _event({**frame, "choices": choices, **more})

        def choice(delta: dict[str, Any], reason: str | None = None) -> list[dict[str, Any]]:
            return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]

        frame = self._object("chat.completion.chunk", result, [])
        yield chunk(choice({"role": "assistant", "content": ""}))
        for begin in range(0, len(result.text), _CHUNK):
            yield chunk(choice({"content": result.text[begin : begin + _CHUNK]}))
        yield chunk(choice({}, self._finish_reason(result)))
        if usage:
            yield chunk([], usage=self._usage(result))
        yield _DONE

    def _object(self, kind: str, result: Result, choices: Sequence[Any]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self._decided.decision_id or secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": result.model,
            "choices": choices,
        }

    def _usage(self, result: Result) -> dict[str, Any]:
        used = result.usage
        told: dict[str, Any] = {
            "prompt_tokens": used.input_tokens,
            "completion_tokens": used.output_tokens,
            "total_tokens": _total(used),
        }
        if used.cached_tokens:
            told["prompt_tokens_details"] = {"cached_tokens": used.cached_tokens}
        return {**told, "bestroute": self._block(self._candidates)}

    def _finish_reason(self, result: Result) -> str:
        return self._finish_reasons.get(result.candidate, "stop")

    def _block(self, candidates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        routed = self._decided.routed
        arm, reference = routed.decision.arm, routed.decision.reference.estimated_cost_usd
        paid = sum(each["cost_usd"] for each in candidates)
        block: dict[str, Any] = {
            "model": self._model,
            "samples": arm.samples,
            "candidates": candidates,
            "cost_usd": paid,
            "reference_cost_usd": reference,
            "saving": 1 - paid / reference if reference else 0.0,
            "decision_id": self._decided.decision_id,
            "bundle": self._decided.router.manifest.version,
        }
        if (turn := routed.turn) is not None:
            block["turn"] = {**turn._asdict(), "reason": turn.reason.name.lower()}
        return block

    def _candidate(self, model: str, reward: float | None, end: Ended) -> dict[str, Any]:
        self._finish_reasons[end.candidate] = end.finish_reason
        return {
            "index": end.candidate,
            "model": model,
            "reward": reward,
            "tokens": _total(end.usage),
            "estimated": end.usage.estimated,
            "cost_usd": cost(end.usage, self._decided.router.prices[model]),
            "finish_reason": end.finish_reason,
        }


def _total(usage: Usage) -> int:
    return usage.input_tokens + usage.output_tokens


def _usd(amount: float) -> str:
    return f"{amount:.10f}".rstrip("0").rstrip(".")


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"

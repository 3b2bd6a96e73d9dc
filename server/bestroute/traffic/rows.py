"""What was noted of decisions and of feedback, as rows of Parquet files."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow

from bestroute.candidate import Candidate
from bestroute.option import Option, Options
from bestroute.target import Rate, Threshold
from bestroute.traffic.noted import Noted, Told
from bestroute.traffic.schema import DECISION, FEEDBACK_ROW

Row = tuple[Any, ...]
"""Values in the order of a schema's columns: a dict for each would take half as long again."""

_TARGETS = ("match_threshold", "max_quality_drop", "min_cost_saving")


def decisions(
    key: bytes, *, prompts: bool, answers: bool, callers: bool
) -> Callable[[Sequence[Noted]], pyarrow.RecordBatch]:
    """Makes batches of decisions.

    Args:
        key: of the digests.
        prompts: whether to keep the prompts' texts.
        answers: whether to keep the answers' texts.
        callers: whether to keep the callers' names.
    """

    def row(noted: Noted) -> Row:
        routed, policy, decision = noted.routed, noted.policy, noted.routed.decision
        arm, criterion, options = decision.arm, decision.criterion, decision.options
        text, result, drawn = noted.prompt.text, noted.result, noted.candidates
        shadow = routed.shadow
        target = next((name for name in _TARGETS if getattr(policy, name) is not None), None)
        known = isinstance(options, Options)
        return (
            noted.decision_id,
            noted.time,
            noted.manifest.name,
            noted.manifest.version,
            noted.caller if callers else None,
            hashlib.blake2b(text.encode(), digest_size=16, key=key).hexdigest(),
            text if prompts else None,
            routed.prompt_tokens,
            routed.truncated,
            target,
            getattr(policy, target) if target else None,
            criterion.match_threshold if isinstance(criterion, Threshold) else None,
            criterion.quality_per_usd if isinstance(criterion, Rate) else None,
            arm.model,
            arm.samples,
            arm.match_probability if known else None,
            arm.expected_gain,
            noted.expected_quality,
            arm.estimated_cost_usd,
            decision.reference.model,
            decision.reference.estimated_cost_usd,
            decision.fallback.name if decision.fallback else None,
            *((None, None, None) if shadow is None else _priced(shadow)),
            options.match_probability if isinstance(options, Options) else None,
            options.expected_gain if isinstance(options, Options) else None,
            None if drawn is None else [_candidate(each, answers) for each in drawn],
            result.candidate if result else None,
            result.cost_usd if result else None,
            result.escalated if result else None,
        )

    return lambda noted: _batch([row(each) for each in noted], DECISION)


def feedback(*, callers: bool) -> Callable[[Sequence[Told]], pyarrow.RecordBatch]:
    """Makes batches of feedback; see `decisions`."""

    def row(told: Told) -> Row:
        caller = told.caller if callers else None
        return told.decision_id, told.time, told.quality, told.source, caller

    return lambda told: _batch([row(each) for each in told], FEEDBACK_ROW)


def _priced(arm: Option) -> tuple[str, int, float]:
    return arm.model, arm.samples, arm.estimated_cost_usd


def _candidate(candidate: Candidate, text: bool) -> dict[str, Any]:
    usage = candidate.usage
    return {
        "index": candidate.index,
        "model": candidate.model,
        "text": candidate.text if text else None,
        "reward": candidate.reward,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "estimated": usage.estimated,
        "finish_reason": candidate.finish_reason,
        "complete": candidate.complete,
    }


def _batch(rows: Sequence[Row], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    columns = zip(*rows, strict=True)
    arrays = [pyarrow.array(each, f.type) for each, f in zip(columns, schema, strict=True)]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=schema)

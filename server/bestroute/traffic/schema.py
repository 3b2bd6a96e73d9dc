"""The columns of the decision log's files, which the exporter reads.

A file of decisions has a row per decision, a file of feedback one per `Feedback`; they are joined
by `decision_id`, and the last feedback of a decision counts. A column may be added; what one means
stays.
"""

import pyarrow

DECISIONS, FEEDBACK = "decisions", "feedback"
"""How the names of files begin; both end in `.parquet`."""

_TIME = pyarrow.timestamp("ms", tz="UTC")

CANDIDATE = pyarrow.struct(
    {
        "index": pyarrow.int32(),
        "model": pyarrow.string(),
        # null where answers are dropped
        "text": pyarrow.string(),
        "reward": pyarrow.float64(),
        "input_tokens": pyarrow.int64(),
        "output_tokens": pyarrow.int64(),
        # whether the tokens are the server's estimate
        "estimated": pyarrow.bool_(),
        "finish_reason": pyarrow.string(),
        # whether it is an answer one can give: neither failed nor cancelled
        "complete": pyarrow.bool_(),
    }
)

DECISION = pyarrow.schema(
    {
        "decision_id": pyarrow.string(),
        "time": _TIME,
        "bundle": pyarrow.string(),
        "bundle_version": pyarrow.string(),
        # null unless callers are kept
        "caller": pyarrow.string(),
        # keyed digest in hex: the same for the same prompt in the same directory
        "prompt_digest": pyarrow.string(),
        # null unless prompts are kept
        "prompt": pyarrow.string(),
        "prompt_tokens": pyarrow.int64(),
        "truncated": pyarrow.bool_(),
        # what the request asked for: the name of the policy's target and its value; null: nothing
        "target": pyarrow.string(),
        "target_value": pyarrow.float64(),
        # by what was decided: one of these two
        "match_threshold": pyarrow.float64(),
        "quality_per_usd": pyarrow.float64(),
        # what was chosen
        "model": pyarrow.string(),
        "samples": pyarrow.int32(),
        "match_probability": pyarrow.float64(),
        "expected_gain": pyarrow.float64(),
        # what the bundle's training data lead to expect of its answer; see `Training` in a manifest
        "expected_quality": pyarrow.float64(),
        "estimated_cost_usd": pyarrow.float64(),
        "reference_model": pyarrow.string(),
        "reference_cost_usd": pyarrow.float64(),
        "fallback": pyarrow.string(),
        # in shadow mode, where the reference answers: what would have been run; else null
        "shadow_model": pyarrow.string(),
        "shadow_samples": pyarrow.int32(),
        "shadow_cost_usd": pyarrow.float64(),
        # of every arm in the bundle's order; null where the router did not run
        "match_probabilities": pyarrow.list_(pyarrow.float32()),
        "expected_gains": pyarrow.list_(pyarrow.float32()),
        # of a Generate: what was drawn; null of a Route
        "candidates": pyarrow.list_(CANDIDATE),
        # of a Generate that gave an answer: which candidate, what all cost
        "winner": pyarrow.int32(),
        "cost_usd": pyarrow.float64(),
        "escalated": pyarrow.bool_(),
    }
)

ADDED = frozenset({"shadow_model", "shadow_samples", "shadow_cost_usd"})
"""Columns that files of former versions lack; there they are null."""

FEEDBACK_ROW = pyarrow.schema(
    {
        "decision_id": pyarrow.string(),
        "time": _TIME,
        "quality": pyarrow.float64(),
        "source": pyarrow.string(),
        # null unless callers are kept
        "caller": pyarrow.string(),
    }
)

"""Writing a bundle: files first, figures measured on them, the manifest last."""

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bestroute.manifest import File, Golden, GoldenReward, GoldenRoute, Manifest, Network, Precision
from bestroute.manifest import RewardNetwork as RewardEntry
from bestroute_export.batches import Indices, predict
from bestroute_export.distribution import training
from bestroute_export.evaluate import Interval, routed
from bestroute_export.files import write_files
from bestroute_export.labels import Floats
from bestroute_export.measure import Figures, evaluation, reward_levels
from bestroute_export.pipeline import Pipeline
from bestroute_export.session import session
from bestroute_export.trades import traded
from bestroute_export.values import Predictions

# Written for this purpose: none comes from the data.
PROMPTS = (
    "What is 17 * 23? Answer with the number only.",
    "Rewrite this sentence in the passive voice: the gardener watered the tulips.",
    "A train leaves at 09:40 and arrives at 13:05. How long is the journey, in minutes?",
    "def f(xs):\n    return xs[::-1] + [len(xs)]\n\nWhat does f([3, 1]) return?",
    "Sort these words by length, shortest first: pear, fig, banana, kiwi.",
)
ANSWERS = (
    (PROMPTS[0], "391"),
    (PROMPTS[0], "17 * 23 is about 400."),
    (PROMPTS[2], "From 09:40 to 13:05 are 3 hours and 25 minutes, so the answer is 205."),
    (PROMPTS[4], "fig, pear, kiwi, banana"),
)
TOLERANCE = 5e-3
"""Wide enough for FP16 on another device, far narrower than any wrong input or weight gives."""
TYPICAL = 400
"""Inputs on which a faster file's decisions are compared."""


def write_bundle(
    pipeline: Pipeline,
    out: Path,
    name: str,
    version: str,
    sources: Mapping[str, str],
    faster: Sequence[Precision] = (),
) -> Manifest:
    """Export both networks, measure them and write the bundle.

    Args:
        pipeline: the run.
        out: directory to write into; made if missing.
        name: of the bundle.
        version: of the bundle.
        sources: provenance of the data, by topic.
        faster: precisions to export in besides FP32.

    Raises:
        Disagreement: an exported file doesn't do what was trained; no manifest is written.
    """
    recipe = pipeline.recipe
    out.mkdir(parents=True, exist_ok=True)
    router, reward, tokenizer = out / "router.onnx", out / "reward.onnx", out / "tokenizer.json"
    router_files = write_files(
        pipeline.router,
        "router",
        "outputs",
        out,
        ("fp32", *faster),
        [row.ids for row in pipeline.inputs[:TYPICAL]],
        partial(_routes, pipeline),
        recipe.router_tokens,
    )
    reward_files = write_files(
        pipeline.reward,
        "reward",
        "rewards",
        out,
        ("fp32", *faster),
        [
            pipeline.reward_tokenizer.pair(pair.prompt, answer).ids
            for pair in pipeline.pairs[: TYPICAL // 2]
            for answer in (pair.chosen, pair.rejected)
        ],
        lambda rewards: rewards.reshape(-1, 2).argmax(1),
        recipe.reward_tokens,
    )
    shutil.copyfile(recipe.backbone / "tokenizer.json", tokenizer)
    accept, escalate = reward_levels(pipeline)
    manifest = Manifest(
        format_version=1,
        name=name,
        version=version,
        reference_model=pipeline.pool.reference.name,
        models=list(pipeline.pool.models),
        arms=list(pipeline.pool.arms),
        router=Network(files=router_files, max_tokens=recipe.router_tokens),
        reward=RewardEntry(
            files=reward_files,
            max_tokens=recipe.reward_tokens,
            agreement_bonus=pipeline.reward_models.agreement_bonus,
            accept_reward=accept,
            escalate_reward=escalate,
        ),
        tokenizer=File.of(tokenizer),
        default_match_threshold=pipeline.threshold,
        curve=pipeline.curve,
        trade_offs=pipeline.trade_offs,
        gates=pipeline.gates,
        training=training(pipeline.fold_outputs[:, : len(pipeline.pool.arms)], pipeline.outcomes),
        metrics=flat(evaluation(pipeline, router, reward)),
        provenance={**sources, **provenance(pipeline)},
        golden=golden(pipeline, router, reward),
    )
    manifest.write(out)
    return manifest


def _routes(pipeline: Pipeline, outputs: Floats) -> Indices:
    """What the policy takes at every point of the curve: int64 [points, Q]."""
    measured = pipeline.outcomes.take(range(len(outputs)))
    if pipeline.trade_offs is None:
        return np.stack(
            [routed(outputs, measured, point.match_threshold) for point in pipeline.curve]
        )
    predictions = Predictions.of(outputs, len(pipeline.pool.arms))
    return np.stack(
        [
            traded(predictions, measured, pipeline.pool, point.quality_per_usd)
            for point in pipeline.trade_offs.curve
        ]
    )


def golden(pipeline: Pipeline, router: Path, reward: Path) -> Golden:
    """Inputs with what the exported files give for them, each computed alone."""
    route, score = session(router), session(reward)
    return Golden(
        tolerance=TOLERANCE,
        router=[
            _golden_route(
                pipeline, prompt, predict(route, [pipeline.router_tokenizer.prompt(prompt).ids])[0]
            )
            for prompt in PROMPTS
        ],
        reward=[
            GoldenReward(
                prompt=prompt,
                response=answer,
                reward=float(
                    predict(score, [pipeline.reward_tokenizer.pair(prompt, answer).ids])[0, 0]
                ),
            )
            for prompt, answer in ANSWERS
        ],
    )


def _golden_route(pipeline: Pipeline, prompt: str, row: Floats) -> GoldenRoute:
    arms = len(pipeline.pool.arms)
    if pipeline.trade_offs is None:
        return GoldenRoute(prompt=prompt, probabilities=row.tolist())
    return GoldenRoute(
        prompt=prompt,
        probabilities=row[:arms].tolist(),
        gains=row[arms : 2 * arms].tolist(),
        output_tokens=row[2 * arms :].tolist(),
    )


def flat(figures: Mapping[str, Figures]) -> dict[str, float]:
    """Figures as `set/name`, intervals as three entries."""
    result = {}
    for group, values in figures.items():
        for name, value in values.items():
            if isinstance(value, Interval):
                result[f"{group}/{name}"] = value.value
                result[f"{group}/{name}/low"] = value.low
                result[f"{group}/{name}/high"] = value.high
            else:
                result[f"{group}/{name}"] = value
    return result


def provenance(pipeline: Pipeline) -> dict[str, str]:
    """How the networks were made, by topic."""
    recipe = pipeline.recipe
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "data_sha256": ", ".join(f"{name} {digest}" for name, digest in pipeline.digests.items()),
        "backbone_sha256": str(recipe.inputs()["backbone"]),
        "router_training": str(recipe.router),
        "reward_training": str(recipe.reward),
        "storage": "matrices in per-channel symmetric INT8, widened to FP32 at load",
        "curve": (
            "out-of-fold predictions over train and validation; exact best-of-n expectations; "
            "costs at the lengths of the answers sampled; quality_drop_upper by "
            f"betting, for any distribution, 95 % one-sided, seed {recipe.seed}"
        ),
    }

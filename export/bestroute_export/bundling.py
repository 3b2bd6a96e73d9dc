"""Writing a bundle: files first, figures measured on them, the manifest last."""

import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from bestroute.bundle import (
    File,
    Golden,
    GoldenReward,
    GoldenRoute,
    Manifest,
    Network,
)
from bestroute.bundle import RewardNetwork as RewardEntry
from bestroute_export.batches import predict
from bestroute_export.evaluate import Interval
from bestroute_export.graph import export
from bestroute_export.measure import Figures, evaluation, reward_levels, session
from bestroute_export.pipeline import Pipeline

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


def write_bundle(
    pipeline: Pipeline, out: Path, name: str, version: str, sources: Mapping[str, str]
) -> Manifest:
    """Export both networks, measure them and write the bundle.

    Args:
        pipeline: the run.
        out: directory to write into; made if missing.
        name: of the bundle.
        version: of the bundle.
        sources: provenance of the data, by topic.
    """
    recipe = pipeline.recipe
    out.mkdir(parents=True, exist_ok=True)
    router, reward, tokenizer = out / "router.onnx", out / "reward.onnx", out / "tokenizer.json"
    export(pipeline.router, "probabilities", router)
    export(pipeline.reward, "rewards", reward)
    shutil.copyfile(recipe.backbone / "tokenizer.json", tokenizer)
    accept, escalate = reward_levels(pipeline)
    manifest = Manifest(
        format_version=1,
        name=name,
        version=version,
        reference_model=pipeline.pool.reference.name,
        models=list(pipeline.pool.models),
        arms=list(pipeline.pool.arms),
        router=Network(files={"fp32": File.of(router)}, max_tokens=recipe.router_tokens),
        reward=RewardEntry(
            files={"fp32": File.of(reward)},
            max_tokens=recipe.reward_tokens,
            accept_reward=accept,
            escalate_reward=escalate,
        ),
        tokenizer=File.of(tokenizer),
        default_match_threshold=pipeline.threshold,
        curve=pipeline.curve,
        metrics=flat(evaluation(pipeline, router, reward)),
        provenance={**sources, **provenance(pipeline)},
        golden=golden(pipeline, router, reward),
    )
    manifest.write(out)
    return manifest


def golden(pipeline: Pipeline, router: Path, reward: Path) -> Golden:
    """Inputs with what the exported files give for them, each computed alone."""
    route, score = session(router), session(reward)
    return Golden(
        tolerance=TOLERANCE,
        router=[
            GoldenRoute(
                prompt=prompt,
                probabilities=predict(route, [pipeline.router_tokenizer.prompt(prompt).ids])[
                    0
                ].tolist(),
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
            "costs at the lengths of the answers sampled; quality_drop_upper is the 95th "
            f"percentile over {recipe.resamples} bootstrap resamples, seed {recipe.seed}"
        ),
    }

"""The figures that go into a bundle, measured on the exported files."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from bestroute_export import calibrate
from bestroute_export.batches import Function, predict
from bestroute_export.evaluate import Interval, report
from bestroute_export.labels import Floats
from bestroute_export.outcomes import Outcomes, decided_by_reward, outcomes
from bestroute_export.pipeline import Pipeline
from bestroute_export.reward import by_group, pair_accuracy, score_answers, selection

Figures = dict[str, float | Interval]


def session(path: Path) -> Function:
    """Open an ONNX file on the CPU, to be called like the network it was made from."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        feeds = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(opened.run(None, feeds)[0])

    return run


def evaluation(pipeline: Pipeline, router: Path, reward: Path) -> dict[str, Figures]:
    """Figures by set of prompts.

    Sets: "out_of_fold" (train and validation, each prompt predicted by a router not trained on it;
    the threshold was chosen here), "test" (exported files, threshold fixed before), "unseen_tasks"
    (whole tasks that the measured router never saw) and "reward" (exported file, test).

    Args:
        pipeline: the run.
        router: exported router.
        reward: exported reward model.
    """
    recipe, pool, test = pipeline.recipe, pipeline.pool, pipeline.test
    score = session(reward)
    groups = decided_by_reward(test, pool)
    rewards = by_group(score_answers(score, pipeline.reward_tokenizer, test, groups), test, groups)
    random, selected, perfect = selection(rewards, test, recipe.max_samples)
    pairs = [pair for pair in pipeline.pairs if pair.split == "test"]

    def figures(probabilities: Floats, measured: Outcomes) -> Figures:
        return report(probabilities, measured, pipeline.threshold, recipe.resamples, recipe.seed)

    unseen = [row for row, prompt in enumerate(pipeline.prompts) if prompt.heldout]
    inputs = [pipeline.router_tokenizer.prompt(prompt.text) for prompt in test]
    return {
        "out_of_fold": figures(pipeline.fold_probabilities, pipeline.outcomes),
        "test": figures(
            predict(session(router), [row.ids for row in inputs]),
            outcomes(test, [row.prompt_tokens for row in inputs], pool, rewards),
        ),
        "unseen_tasks": figures(
            predict(pipeline.unseen_router, [pipeline.inputs[row].ids for row in unseen]),
            pipeline.outcomes.take(unseen),
        ),
        "reward": {
            "pair_accuracy": pair_accuracy(score, pipeline.reward_tokenizer, pairs),
            "groups_decided": float(len(rewards)),
            "best_of_n_random": random,
            "best_of_n_selected": selected,
            "best_of_n_perfect": perfect,
        },
    }


def reward_levels(pipeline: Pipeline) -> tuple[float | None, float | None]:
    """`accept_reward` and `escalate_reward`, from the answers that the router would draw.

    The reference's mean is that on the same prompts.
    """
    by_id = {prompt.id: prompt for prompt in pipeline.prompts}
    rewards, scores, of_reference = [], [], []
    for (identifier, model), values in pipeline.routed_rewards.items():
        answers = by_id[identifier].answers
        rewards += values
        scores += [answer.score for answer in answers[model]]
        of_reference.append(np.mean([a.score for a in answers[pipeline.pool.reference.name]]))
    return calibrate.reward_levels(
        np.array(rewards), np.array(scores), float(np.mean(of_reference))
    )

"""The figures that go into a bundle, measured on the exported files."""

from pathlib import Path

import numpy as np

from bestroute_export import calibrate
from bestroute_export.batches import predict
from bestroute_export.evaluate import Interval, report
from bestroute_export.labels import Floats
from bestroute_export.outcomes import Outcomes, decided_by_reward, outcomes
from bestroute_export.pipeline import Pipeline
from bestroute_export.reward import by_group, pair_accuracy, score_answers, selection
from bestroute_export.reward_models import voting
from bestroute_export.session import session

Figures = dict[str, float | Interval]


def evaluation(pipeline: Pipeline, router: Path, reward: Path) -> dict[str, Figures]:
    """Figures by set of prompts, of the decisions that a request without a target gets.

    Sets: "out_of_fold" (train and validation, each prompt predicted by a router not trained on it;
    the default was chosen here), "test" (exported files, default fixed before), "unseen_tasks"
    (whole tasks that the measured router never saw, where there are such) and "reward" (exported
    file, test).

    Args:
        pipeline: the run.
        router: exported router.
        reward: exported reward model.
    """
    recipe, pool, test = pipeline.recipe, pipeline.pool, pipeline.test
    score = session(reward)
    groups = decided_by_reward(test, pool)
    scored = by_group(score_answers(score, pipeline.reward_tokenizer, test, groups), test, groups)
    rewards = voting(test, scored, pipeline.reward_models.agreement_bonus)
    random, selected, perfect = selection(rewards, test, recipe.max_samples)
    pairs = [pair for pair in pipeline.pairs if pair.split == "test"]

    def figures(outputs: Floats, measured: Outcomes) -> Figures:
        choice = pipeline.decide(outputs, measured)
        probabilities = outputs[:, : len(pool.arms)]
        return report(choice, probabilities, measured, recipe.resamples, recipe.seed)

    inputs = [pipeline.router_tokenizer.prompt(prompt.text) for prompt in test]
    measured: dict[str, Figures] = {
        "out_of_fold": figures(pipeline.fold_outputs, pipeline.outcomes),
        "test": figures(
            predict(session(router), [row.ids for row in inputs]),
            outcomes(test, [row.prompt_tokens for row in inputs], pool, rewards),
        ),
        "reward": {
            "pair_accuracy": pair_accuracy(score, pipeline.reward_tokenizer, pairs),
            "groups_decided": float(len(rewards)),
            "best_of_n_random": random,
            "best_of_n_selected": selected,
            "best_of_n_perfect": perfect,
        },
    }
    if unseen := [row for row, prompt in enumerate(pipeline.prompts) if prompt.heldout]:
        measured["unseen_tasks"] = figures(
            predict(pipeline.unseen_router, [pipeline.inputs[row].ids for row in unseen]),
            pipeline.outcomes.take(unseen),
        )
    return measured


def reward_levels(pipeline: Pipeline) -> tuple[float | None, float | None]:
    """`accept_reward` and `escalate_reward`, from the answers that the router would draw.

    The reference's mean is that on the same prompts.
    """
    by_id = {prompt.id: prompt for prompt in pipeline.prompts}
    rewards, scores, of_reference = [], [], []
    for (identifier, model), values in pipeline.routed_rewards.items():
        answers = by_id[identifier].answers
        rewards += values.tolist()
        scores += [answer.score for answer in answers[model]]
        of_reference.append(np.mean([a.score for a in answers[pipeline.pool.reference.name]]))
    if not rewards:
        # No threshold could be promised, so that none of these prompts is routed to an arm.
        return None, None
    return calibrate.reward_levels(
        np.array(rewards), np.array(scores), float(np.mean(of_reference))
    )

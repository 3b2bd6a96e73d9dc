"""Training the reward model and scoring answers with it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional

from bestroute.tokenizer import Tokenizer
from bestroute_export.batches import Function, Indices, device_of, in_bfloat16, pad, predict
from bestroute_export.checkpoint import Checkpoint
from bestroute_export.data import Pair, Prompt
from bestroute_export.encoders import load_encoder, store_in_eight_bits
from bestroute_export.labels import Floats, expected_score
from bestroute_export.networks import RewardNetwork
from bestroute_export.outcomes import Group, Rewards
from bestroute_export.train import TrainConfig, Trained, fit


def train_reward(
    pairs: Sequence[Pair],
    backbone: Path,
    tokenizer: Tokenizer,
    config: TrainConfig,
    progress: Progress,
    title: str,
    evaluate: Callable[[RewardNetwork], float] | None = None,
    checkpoint: Checkpoint | None = None,
    report: Callable[[Trained], None] = lambda trained: None,
) -> RewardNetwork:
    """Fine-tune on pairs by -log sigmoid(reward(chosen) - reward(rejected)).

    The loss is that of BEST-Route's proxy reward model (arXiv 2506.22716, section 4.2), which is
    Bradley and Terry's. The result's matrices are rounded to the bundle's 8 bits.

    Args:
        pairs: given, or made by `bestroute_export.pairs.pairs_of`.
        backbone: directory of the pretrained encoder.
        tokenizer: of the backbone, with the limit of the reward model.
        config: how to train.
        progress: where a bar is shown.
        title: the bar's text.
        evaluate: metric for early stopping, see `selection_metric`.
        checkpoint: where to write progress, and to go on from.
        report: told what the training took.

    Raises:
        ValueError: there are no pairs.
        CheckpointInvalid: the checkpoint is of another training.
        FloatingPointError: the loss or the metric is not finite.
    """
    torch.manual_seed(config.seed)
    network = RewardNetwork(load_encoder(backbone))
    chosen = [tokenizer.pair(pair.prompt, pair.chosen).ids for pair in pairs]
    rejected = [tokenizer.pair(pair.prompt, pair.rejected).ids for pair in pairs]

    def loss(batch: Indices) -> Tensor:
        # Two passes: the halves of a pair may differ much in length.
        device = device_of(network)
        better = network(*pad([chosen[index] for index in batch], device))  # [B, 1]
        worse = network(*pad([rejected[index] for index in batch], device))  # [B, 1]
        return -functional.logsigmoid(better - worse).mean()

    lengths = [max(len(c), len(r)) for c, r in zip(chosen, rejected, strict=True)]
    report(fit(network, loss, lengths, config, progress, title, evaluate, checkpoint))
    store_in_eight_bits(network)
    return network


def selection_metric(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], groups: Sequence[Group], samples: int
) -> Callable[[RewardNetwork], float]:
    """The metric that matters for a reward model: the true quality of what it selects.

    Args:
        tokenizer: its tokenizer.
        prompts: at least the prompts of the groups; not trained on.
        groups: the choices to make, see `bestroute_export.outcomes.decided_by_reward`.
        samples: n of the best-of-n; groups with fewer answers are left out.

    Returns:
        A network to the mean score of its choices, see `selection`.
    """

    def quality(network: RewardNetwork) -> float:
        function = in_bfloat16(network, device_of(network))
        rewards = score_answers(function, tokenizer, prompts, groups)
        return selection(by_group(rewards, prompts, groups), prompts, samples)[1]

    return quality


def score_answers(
    function: Function, tokenizer: Tokenizer, prompts: Sequence[Prompt], groups: Sequence[Group]
) -> Floats:
    """Rewards of all answers of some groups.

    Args:
        function: the reward model.
        tokenizer: its tokenizer.
        prompts: at least the prompts of the groups.
        groups: whose answers to score.

    Returns:
        float64 [N], by group, then sample; see `by_group`.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    rows = [
        tokenizer.pair(by_id[identifier].text, answer.text).ids
        for identifier, model in groups
        for answer in by_id[identifier].answers[model]
    ]
    return predict(function, rows)[:, 0] if rows else np.empty(0)


def by_group(
    rewards: Floats, prompts: Sequence[Prompt], groups: Sequence[Group]
) -> dict[Group, Floats]:
    """The rewards [N, ...] that `score_answers` gave, by group."""
    by_id = {prompt.id: prompt for prompt in prompts}
    sizes = [len(by_id[identifier].answers[model]) for identifier, model in groups]
    # What follows the last group is empty.
    return dict(zip(groups, np.split(rewards, np.cumsum(sizes, dtype=int)), strict=False))


def pair_accuracy(function: Function, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> float:
    """Share of pairs whose better answer gets the higher reward."""
    rows = [
        tokenizer.pair(pair.prompt, text).ids
        for pair in pairs
        for text in (pair.chosen, pair.rejected)
    ]
    rewards = predict(function, rows).reshape(-1, 2)
    return float((rewards[:, 0] > rewards[:, 1]).mean())


def selection(
    rewards: Rewards, prompts: Sequence[Prompt], samples: int
) -> tuple[float, float, float]:
    """Mean score of best-of-n with a random, this and a perfect selector, over the given groups.

    Args:
        rewards: of the groups (prompt, LLM) to average over.
        prompts: at least the prompts of these groups.
        samples: n; groups with fewer answers are left out.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    scores = []
    for (identifier, model), proxy in rewards.items():
        truth = [answer.score for answer in by_id[identifier].answers[model]]
        if len(truth) >= samples:
            picked = [
                expected_score(by, truth, samples) for by in ([0.0] * len(truth), proxy, truth)
            ]
            scores.append(picked)
    random, this, perfect = np.mean(scores, axis=0).tolist()
    return random, this, perfect

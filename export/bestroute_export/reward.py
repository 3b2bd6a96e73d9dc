"""Training the reward model and scoring answers with it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional

from bestroute.tokenizer import Tokenizer
from bestroute_export.batches import Function, Indices, pad, predict
from bestroute_export.data import Pair, Prompt
from bestroute_export.encoder import load_encoder, store_in_eight_bits
from bestroute_export.labels import Floats, expected_score
from bestroute_export.networks import RewardNetwork
from bestroute_export.outcomes import Group, Rewards
from bestroute_export.train import TrainConfig, fit


def train_reward(
    pairs: Sequence[Pair],
    backbone: Path,
    tokenizer: Tokenizer,
    config: TrainConfig,
    progress: Progress,
    title: str,
) -> RewardNetwork:
    """Fine-tune on pairs by -log sigmoid(reward(chosen) - reward(rejected)).

    The loss is that of BEST-Route's proxy reward model (arXiv 2506.22716, section 4.2), which is
    Bradley and Terry's. The result's matrices are rounded to the bundle's 8 bits.
    """
    torch.manual_seed(config.seed)
    network = RewardNetwork(load_encoder(backbone))
    chosen = [tokenizer.pair(pair.prompt, pair.chosen).ids for pair in pairs]
    rejected = [tokenizer.pair(pair.prompt, pair.rejected).ids for pair in pairs]

    def loss(batch: Indices) -> Tensor:
        # Two passes: the halves of a pair may differ much in length.
        better = network(*pad([chosen[index] for index in batch]))  # [B, 1]
        worse = network(*pad([rejected[index] for index in batch]))  # [B, 1]
        return -functional.logsigmoid(better - worse).mean()

    lengths = [max(len(c), len(r)) for c, r in zip(chosen, rejected, strict=True)]
    fit(network, loss, lengths, config, progress, title)
    store_in_eight_bits(network)
    return network


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
) -> dict[Group, list[float]]:
    """The rewards that `score_answers` gave, by group."""
    by_id = {prompt.id: prompt for prompt in prompts}
    values = iter(rewards.tolist())
    return {group: [next(values) for _ in by_id[group[0]].answers[group[1]]] for group in groups}


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
        if len(proxy) >= samples:
            truth = [answer.score for answer in by_id[identifier].answers[model]]
            picked = [
                expected_score(by, truth, samples) for by in ([0.0] * len(truth), proxy, truth)
            ]
            scores.append(picked)
    random, this, perfect = np.mean(scores, axis=0).tolist()
    return random, this, perfect

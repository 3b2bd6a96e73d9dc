"""The part of a reward that wording tells, and the blend of the parts."""

import numpy as np
import pytest
import torch

from bestroute.tokenizer import Tokenizer
from bestroute_export.batches import pad
from bestroute_export.data import Pair
from bestroute_export.networks import BlendedReward, RewardNetwork
from bestroute_export.ngrams import NgramSum, frequencies
from bestroute_export.wording import blend, fit_wording
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.write(directory)
    return Tokenizer(directory / "tokenizer.json", max_tokens=32)


def pair(chosen: str, rejected: str) -> Pair:
    return Pair(prompt_id="1", prompt="easy word1", chosen=chosen, rejected=rejected, split="train")


def test_a_sum_is_frequencies_times_weights() -> None:
    network = NgramSum(64)
    network.weights.copy_(torch.randn(64, 1, generator=torch.Generator().manual_seed(0)))
    texts = [[1, 2, 1, 2, 1], [3, 4], [5], list(range(20))]
    sums = network(*pad(texts)).numpy()
    expected = frequencies(texts, 64) @ network.weights.numpy()
    assert sums == pytest.approx(expected, abs=1e-5)


def test_wording_tells_the_better_answer(tokenizer: Tokenizer) -> None:
    network = fit_wording([pair("good word2", "bad word2"), pair("good", "bad")] * 5, tokenizer)
    better, worse = (
        network(*pad([tokenizer.pair("hard word3", text).ids])).item() for text in ("good", "bad")
    )
    assert better > worse


def test_what_both_answers_share_cancels(tokenizer: Tokenizer) -> None:
    network = fit_wording([pair("good word2", "bad word2")] * 5, tokenizer)
    token = tokenizer.pair("easy", "word2").ids[-2]
    assert network.weights[token % len(network.weights)].item() == pytest.approx(0, abs=1e-6)


def test_a_blend_weighs_parts_by_what_they_tell() -> None:
    generator = np.random.default_rng(0)
    quality, *noise = generator.normal(size=(3, 600))
    parts = np.column_stack([quality + 0.5 * noise[0], noise[1]])
    one, other = np.arange(0, 600, 2), np.arange(1, 600, 2)
    first = quality[one] > quality[other]
    better, worse = np.where(first, one, other), np.where(first, other, one)
    telling, idle = blend(parts, better.tolist(), worse.tolist())
    assert telling > 1
    assert abs(idle) < 0.3


def test_a_blended_reward_is_the_weighted_sum(tokenizer: Tokenizer) -> None:
    class Encoder(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return (input_ids * attention_mask).sum(1, keepdim=True).float()

    reading = RewardNetwork.__new__(RewardNetwork)
    torch.nn.Module.__init__(reading)
    reading.encoder, reading.head = Encoder(), torch.nn.Identity()  # type: ignore[assignment]
    wording = NgramSum(64)
    wording.weights.fill_(1.0)
    network = BlendedReward(reading, wording)
    network.blend.copy_(torch.tensor([2.0, 3.0]))
    ids, mask = pad([[5, 6, 7], [8]])
    sums = wording(ids, mask)
    assert torch.equal(network(ids, mask), 2 * torch.tensor([[18.0], [8.0]]) + 3 * sums)

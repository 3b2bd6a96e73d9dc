"""The n-gram features and the value router fitted to them."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.feature_extraction.text import TfidfTransformer

from bestroute.manifest import Arm, Model
from bestroute.tokenizer import Encoded
from bestroute_export.batches import pad
from bestroute_export.graph import export
from bestroute_export.ngrams import (
    NgramLinear,
    features,
    frequencies,
    inverse_document_frequencies,
    terms,
)
from bestroute_export.outcomes import Outcomes, Pool, costs
from bestroute_export.session import session
from bestroute_export.values import (
    Predictions,
    ValueConfig,
    ValueNetwork,
    cross_predict,
    fit,
    predictions_of,
)

BUCKETS = 1 << 10
CONFIG = ValueConfig(max_tokens=32, buckets=BUCKETS)
MODELS = tuple(
    Model(name=name, input_usd_per_mtok=p, output_usd_per_mtok=5 * p, mean_output_tokens=100)
    for name, p in [("large", 3.0), ("small", 0.1)]
)
ARMS = tuple(Arm(model="small", samples=n) for n in (1, 2))
POOL = Pool(MODELS[0], MODELS, ARMS)
EASY, HARD = 11, 12

rows = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=6)


@given(rows)
@settings(deadline=None)
def test_terms_are_counted_per_row(texts: list[list[int]]) -> None:
    buckets, frequency, count = terms(*pad(texts), BUCKETS)

    for row, ids in enumerate(texts):
        pairs = pairwise(ids)
        double = [((a * 1_000_003 + b) % (2**31 - 1) * 2) % BUCKETS for a, b in pairs]
        expected = Counter([*ids, *double])
        kept = frequency[row] > 0
        assert Counter(buckets[row][kept].tolist()) == expected
        assert count[row][kept].tolist() == [expected[b] for b in buckets[row][kept].tolist()]


@given(rows)
@settings(deadline=None)
def test_features_are_those_of_scikit_learn(texts: list[list[int]]) -> None:
    counts = sparse.lil_matrix((len(texts), BUCKETS))
    hashed, frequency, _ = terms(*pad(texts), BUCKETS)
    for row in range(len(texts)):
        for bucket in hashed[row][frequency[row] > 0].tolist():
            counts[row, bucket] += 1
    theirs = TfidfTransformer(sublinear_tf=True).fit_transform(counts.tocsr())

    counted = frequencies(texts, BUCKETS)
    ours = features(counted, inverse_document_frequencies(counted, fewest=1))

    used = np.flatnonzero(counted.getnnz(axis=0))
    assert np.allclose(ours.toarray(), theirs[:, used].toarray(), atol=1e-6)


def test_a_bucket_of_one_text_is_not_used() -> None:
    counted = frequencies([[1, 2], [1, 3]], BUCKETS)
    assert np.flatnonzero(inverse_document_frequencies(counted)).tolist() == [1]


def _linear() -> NgramLinear:
    generator = torch.Generator().manual_seed(0)
    layer = NgramLinear(3, BUCKETS)
    layer.idf.copy_(torch.rand(BUCKETS, 1, generator=generator) + 1)
    layer.table.weight.data.copy_(torch.randn(BUCKETS, 3, generator=generator) * layer.idf)
    layer.bias.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    return layer


def test_the_layer_is_features_times_weights() -> None:
    layer, texts = _linear(), [[1, 2, 1, 2, 1], [3, 4], [5]]
    idf = layer.idf[:, 0].double().numpy()
    weights = (layer.table.weight / layer.idf).detach().double().numpy()

    out = layer(*pad(texts)).detach().numpy()

    used = np.flatnonzero(idf)
    expected = features(frequencies(texts, BUCKETS), idf) @ weights[used] + [1, 2, 3]
    assert np.allclose(out, expected, atol=1e-5)


def test_a_row_does_not_depend_on_its_company() -> None:
    layer, texts = _linear(), [[1, 2, 1], [7] * 30, list(range(20))]
    together = layer(*pad(texts))
    alone = torch.cat([layer(*pad([text])) for text in texts])
    assert torch.allclose(together, alone, atol=1e-6)


def test_a_text_of_unknown_words_gets_the_bias() -> None:
    layer = NgramLinear(2, BUCKETS)
    assert layer(*pad([[5, 6, 7]])).tolist() == [[0.0, 0.0]]


def world(prompts: int = 240) -> tuple[list[Encoded], Outcomes, np.ndarray]:
    """Prompts whose first word says whether the small model can do it, and how long it takes."""
    generator = np.random.default_rng(0)
    easy = generator.random(prompts) < 0.5
    texts = [(EASY if e else HARD, *generator.integers(20, 40, 6).tolist()) for e in easy.tolist()]
    inputs = [Encoded(ids, len(ids), truncated=False) for ids in texts]
    reference = np.full(prompts, 0.8)
    quality = np.where(easy[:, None], [[0.85, 0.9]], [[0.2, 0.3]])
    labels = np.where(easy[:, None], [[0.9, 0.95]], [[0.2, 0.3]])
    lengths = np.where(easy[:, None], [[50.0, 20.0]], [[400.0, 200.0]])
    tokens = np.array([float(len(ids)) for ids in texts])
    arms, whole = costs(POOL, tokens, lengths)
    means = np.array([[100.0, 100.0]])
    estimated, whole_estimated = costs(POOL, tokens, means)
    measured = Outcomes(
        labels=labels,
        quality=quality,
        reference_quality=reference,
        estimates=estimated,
        reference_estimates=whole_estimated,
        costs=arms,
        reference_costs=whole,
        input_tokens=tokens,
        output_tokens=lengths,
    )
    return inputs, measured, generator.integers(0, 3, prompts)


def test_it_learns_gains_matches_and_lengths() -> None:
    inputs, measured, folds = world()

    said = cross_predict(inputs, measured, POOL, folds, replace(CONFIG, strength=100.0))

    easy = np.array([row.ids[0] == EASY for row in inputs])
    assert np.allclose(said.gains[easy].mean(0), [0.05, 0.1], atol=0.05)
    assert np.allclose(said.gains[~easy].mean(0), [-0.6, -0.5], atol=0.05)
    assert np.allclose(said.match[easy].mean(0), [0.9, 0.95], atol=0.05)
    assert said.tokens[~easy, 0].mean() > 3 * said.tokens[easy, 0].mean()
    assert np.allclose(said.tokens.mean(0), measured.output_tokens.mean(0), rtol=0.1)


def test_nothing_is_fitted_to_the_fold_that_is_predicted() -> None:
    inputs, measured, folds = world()
    held = folds == 1
    other = replace(
        measured,
        quality=np.where(held[:, None], 1 - measured.quality, measured.quality),
        labels=np.where(held[:, None], 1 - measured.labels, measured.labels),
        output_tokens=np.where(held[:, None], 7.0, measured.output_tokens),
    )

    before = cross_predict(inputs, measured, POOL, folds, CONFIG)
    after = cross_predict(inputs, other, POOL, folds, CONFIG)

    assert np.allclose(before.rows[held], after.rows[held])
    assert not np.allclose(before.rows[~held], after.rows[~held])


@pytest.fixture(scope="module")
def network() -> ValueNetwork:
    return fit(*world()[:2], POOL, world()[2], CONFIG)


def test_the_file_says_what_the_network_says(network: ValueNetwork, tmp_path: Path) -> None:
    export(network, "outputs", tmp_path / "router.onnx")
    run = session(tmp_path / "router.onnx")
    ids, mask = pad([row.ids for row in world()[0][:9]] + [(1,), (EASY, 39) * 16])

    difference = run(ids, mask) - network(ids, mask)

    scale = network(ids, mask).abs().clamp(min=1)
    assert (difference / scale).abs().max() < 1e-5


def test_outputs_keep_their_ranges_whatever_is_read(network: ValueNetwork) -> None:
    generator = np.random.default_rng(1)
    inputs = [
        Encoded(tuple(generator.integers(0, 30_000, n).tolist()), n, truncated=False)
        for n in generator.integers(1, 32, 200).tolist()
    ]

    said = predictions_of(network, inputs, len(ARMS))

    assert ((said.match >= 0) & (said.match <= 1)).all()
    assert (said.match[:, 1] >= said.match[:, 0]).all()
    assert (np.abs(said.gains) <= 1).all()
    assert (said.tokens > 0).all()
    assert np.array_equal(Predictions.of(said.rows, len(ARMS)).gains, said.gains)

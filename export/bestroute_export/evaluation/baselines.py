"""What others would use to predict which arm will do: TF-IDF, embeddings, clusters.

Everything is out of fold: what is said of one fold is learned from the others. A target is a
column in [0, 1], such as a match probability or a quality. Shapes: Q prompts, K targets, H width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from joblib import Parallel, delayed
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from bestroute_export.batches import Ids, in_bfloat16, predict
from bestroute_export.encoders import BackboneUnsupported, load_encoder
from bestroute_export.encoders.bert import Bert
from bestroute_export.encoders.encoder import padding_bias
from bestroute_export.evaluation.frontier import Folds
from bestroute_export.labels import Floats

CLUSTERS = 50
NEIGHBOURS = 32

Rows = npt.NDArray[np.int64]
Learn = Callable[[Rows, Rows], Floats]
"""Rows to learn from and rows to speak of, to what is said of the latter."""


def logistic(texts: Sequence[str], targets: Floats, folds: Folds) -> Floats:
    """TF-IDF of words and word pairs, and a logistic regression per target on soft labels.

    Returns:
        float64 [Q, K].
    """
    return _out_of_fold(partial(_logistic, texts, targets), folds)


def clusters(texts: Sequence[str], targets: Floats, folds: Folds, seed: int) -> Floats:
    """The mean targets of each prompt's cluster: 50-means on TF-IDF, as BEST-Route compares with.

    Returns:
        float64 [Q, K].
    """
    return _out_of_fold(partial(_clusters, texts, targets, seed), folds)


def likeliest(texts: Sequence[str], classes: npt.NDArray[np.int64], folds: Folds) -> Floats:
    """The most likely class by a multinomial logistic regression on TF-IDF.

    Args:
        texts: Q prompts.
        classes: int64 [Q].
        folds: of the prompts.

    Returns:
        float64 [Q], whole numbers.
    """
    return _out_of_fold(partial(_likeliest, texts, classes), folds)


def neighbours(embeddings: Floats, targets: Floats, folds: Folds) -> Floats:
    """The mean targets of the 32 prompts whose embeddings [Q, H] have the highest cosine.

    Returns:
        float64 [Q, K].
    """
    return _out_of_fold(partial(_neighbours, embeddings, targets), folds)


@torch.no_grad()
def embed(backbone: Path, rows: Sequence[Ids]) -> Floats:
    """Mean of a frozen encoder's last hidden states over each prompt's tokens.

    Args:
        backbone: directory of a BERT.
        rows: token ids of Q prompts.

    Returns:
        float64 [Q, H].

    Raises:
        BackboneUnsupported: the backbone is of another family.
    """
    encoder = load_encoder(backbone)
    if not isinstance(encoder, Bert):
        raise BackboneUnsupported(f"{backbone}: embeddings are taken from a BERT; name one")
    return predict(in_bfloat16(partial(_mean_pooled, encoder.eval())), rows)


def _mean_pooled(encoder: Bert, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    x = encoder.norm(encoder.embed(input_ids))  # [B, T, H]
    bias = padding_bias(attention_mask, x.dtype)
    for layer in encoder.layers:
        x = layer(x, x, bias)
    mask = attention_mask[..., None].float()
    pooled: Tensor = (x.float() * mask).sum(1) / mask.sum(1)  # [B, H]
    return pooled


def _out_of_fold(learn: Learn, folds: Folds) -> Floats:
    held = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
    parts = Parallel()(delayed(learn)(np.flatnonzero(folds != folds[h[0]]), h) for h in held)
    said: Floats = np.concatenate(parts)[np.argsort(np.concatenate(held))]
    return said


def _features(texts: Sequence[str], rest: Rows, held: Rows) -> tuple[sparse.csr_matrix, ...]:
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    known = vectorizer.fit_transform([texts[row] for row in rest])
    return known, vectorizer.transform([texts[row] for row in held])


def _logistic(texts: Sequence[str], targets: Floats, rest: Rows, held: Rows) -> Floats:
    known, asked = _features(texts, rest, held)
    # A soft label is both labels, weighted.
    twice = sparse.vstack([known, known]).tocsr()
    hard = np.repeat([1, 0], len(rest))
    said = []
    for target in targets[rest].T:
        weights = np.concatenate([target, 1 - target])
        used = np.flatnonzero(weights)
        if len(np.unique(hard[used])) == 1:
            said.append(np.full(len(held), target[0]))
            continue
        model = LogisticRegression(max_iter=300)
        model.fit(twice[used], hard[used], sample_weight=weights[used])
        said.append(model.predict_proba(asked)[:, 1])
    return np.stack(said, axis=1)


def _clusters(texts: Sequence[str], targets: Floats, seed: int, rest: Rows, held: Rows) -> Floats:
    known, asked = _features(texts, rest, held)
    count = min(CLUSTERS, len(rest))
    means = KMeans(count, n_init=1, max_iter=50, random_state=seed).fit(known)
    members = np.eye(count)[means.labels_]  # [rest, clusters]
    centres = (members.T @ targets[rest]) / members.sum(0)[:, None]
    return np.asarray(centres[means.predict(asked)])


def _likeliest(
    texts: Sequence[str], classes: npt.NDArray[np.int64], rest: Rows, held: Rows
) -> Floats:
    known, asked = _features(texts, rest, held)
    if len(np.unique(classes[rest])) == 1:
        return np.full(len(held), float(classes[rest[0]]))
    model = LogisticRegression(max_iter=100).fit(known, classes[rest])
    return np.asarray(model.predict(asked), dtype=np.float64)


def _neighbours(embeddings: Floats, targets: Floats, rest: Rows, held: Rows) -> Floats:
    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(rest)), metric="cosine")
    nearest = search.fit(embeddings[rest]).kneighbors(embeddings[held], return_distance=False)
    return np.asarray(targets[rest][nearest].mean(1))

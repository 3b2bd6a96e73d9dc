"""Does a bundle do what its manifest says, whoever shares the batch?"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bestroute.bundle import Bundle
from bestroute.tokenizer import Tokenizer
from bestroute_export.batches import Function, Ids, pad, predict
from bestroute_export.labels import Floats
from bestroute_export.measure import session

INVARIANCE = 1e-5


@dataclass(frozen=True)
class Check:
    """One thing looked at: how far off it was, and how far it may be."""

    name: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit; NaN is not."""
        return self.difference <= self.limit


def verify(directory: Path) -> list[Check]:
    """Check digests, golden outputs, independence of batch mates, and order in n.

    Raises:
        BundleInvalid: a file is missing or altered, or the manifest can't be read.
    """
    bundle = Bundle.load(directory)
    manifest = bundle.manifest
    route = session(bundle.network_path(manifest.router, ("fp32",)))
    score = session(bundle.network_path(manifest.reward, ("fp32",)))
    prompts = Tokenizer(bundle.tokenizer_path, max_tokens=manifest.router.max_tokens)
    answers = Tokenizer(bundle.tokenizer_path, max_tokens=manifest.reward.max_tokens)
    routed = [prompts.prompt(golden.prompt).ids for golden in manifest.golden.router]
    scored = [answers.pair(golden.prompt, golden.response).ids for golden in manifest.golden.reward]
    probabilities = np.array([golden.probabilities for golden in manifest.golden.router])
    rewards = np.array([[golden.reward] for golden in manifest.golden.reward])
    tolerance = manifest.golden.tolerance
    models = [arm.model for arm in manifest.arms]
    falls = [
        float((probabilities[:, column - 1] - probabilities[:, column]).max())
        for column in range(1, len(models))
        if models[column] == models[column - 1]
    ]
    return [
        Check("router, golden", _far(_alone(route, routed), probabilities), tolerance),
        Check("reward, golden", _far(_alone(score, scored), rewards), tolerance),
        Check(
            "router, in company", _company(route, routed, manifest.router.max_tokens), INVARIANCE
        ),
        Check(
            "reward, in company", _company(score, scored, manifest.reward.max_tokens), INVARIANCE
        ),
        Check("router, more samples never look worse", max(falls, default=0.0), 1e-6),
    ]


def _alone(function: Function, rows: list[tuple[int, ...]]) -> Floats:
    return np.concatenate([predict(function, [row]) for row in rows])


def _company(function: Function, rows: list[tuple[int, ...]], longest: int) -> float:
    """Largest change of an output when its input is padded beside one of the greatest length."""
    filler: Ids = (rows[0] * longest)[:longest]
    together = function(*pad([*rows, filler])).double().numpy()
    return _far(_alone(function, rows), together[:-1])


def _far(one: Floats, other: Floats) -> float:
    return float(np.abs(one - other).max())

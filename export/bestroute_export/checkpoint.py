"""Where a training stands, in one file: an interrupted one goes on as if nothing had happened.

The file is safetensors with JSON in its header. Nothing of it is ever executed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]


class CheckpointInvalid(ValueError):
    """The file is damaged, or of a training with other settings or data."""


@dataclass
class Standing:
    """How far a training has come.

    Attributes:
        step: optimizer steps done.
        seconds: spent on them.
        history: (step, metric) of each evaluation, in order.
        best: the trained weights at the highest metric; none before the first evaluation.
    """

    step: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)
    best: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A file to write now and then, and to go on from.

    It is left behind at the end: whoever stores the trained network deletes it then.

    Attributes:
        path: the file; need not exist.
        every: optimizer steps between two writes.
    """

    path: Path
    every: int = 100

    def save(
        self,
        training: str,
        standing: Standing,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Replace the file in one go, so that a kill at any moment leaves a whole one.

        Args:
            training: tells one training from another, see `load`.
            standing: where it stands.
            network: whose trained weights to keep; frozen ones are the backbone's.
            optimizer: whose moments to keep.
        """
        tensors = {
            **{f"network/{name}": value for name, value in trained_weights(network).items()},
            **{f"best/{name}": value for name, value in standing.best.items()},
            **{
                f"optimizer/{index}/{name}": value
                for index, moments in optimizer.state_dict()["state"].items()
                for name, value in moments.items()
            },
        }
        position = {
            "training": training,
            "step": standing.step,
            "seconds": standing.seconds,
            "history": standing.history,
        }
        part = self.path.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, {"position": json.dumps(position)})
        part.replace(self.path)

    def load(self, training: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> Standing:
        """Bring a network and its optimizer to where the file stands; a new one without a file.

        Raises:
            CheckpointInvalid: the file can't be read, or was saved by another `training`.
        """
        if not self.path.exists():
            return Standing()
        try:
            with safe_open(self.path, "pt") as file:
                position = json.loads(file.metadata()["position"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointInvalid(f"{self.path} is damaged ({error}); delete it") from error
        if position["training"] != training:
            raise CheckpointInvalid(
                f"{self.path} is of a training with other settings or data; "
                "delete it, or name another file"
            )
        moments: dict[int, Weights] = {}
        for name, value in _below("optimizer", tensors).items():
            index, _, moment = name.partition("/")
            moments.setdefault(int(index), {})[moment] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        restore(network, _below("network", tensors))
        history = [(step, metric) for step, metric in position["history"]]
        return Standing(position["step"], position["seconds"], history, _below("best", tensors))


def trained_weights(network: nn.Module) -> Weights:
    """The parameters that are not frozen, by name: copies on the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def restore(network: nn.Module, weights: Weights) -> None:
    """Set the parameters that `trained_weights` gave."""
    parameters = dict(network.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


def _below(folder: str, tensors: Weights) -> Weights:
    return {
        name.removeprefix(f"{folder}/"): value
        for name, value in tensors.items()
        if name.startswith(f"{folder}/")
    }

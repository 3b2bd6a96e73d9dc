"""The work directory: results of finished steps, so that a run goes on where it stopped."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file, save_file
from torch import nn

from bestroute_export.checkpoint import Checkpoint

INPUTS = "inputs.json"

NetworkT = TypeVar("NetworkT", bound=nn.Module)
Arrays = dict[str, npt.NDArray[np.float64]]


class WorkInvalid(ValueError):
    """The work directory holds results of other data or settings."""


class Work:
    """Results by name, each made once.

    A result is written under another name first and then renamed, so that an interrupted step
    leaves nothing behind that a later run would take for finished.

    Args:
        directory: where results lie; made if missing.
        inputs: whatever the results depend on; must be what the directory was begun with.

    Raises:
        WorkInvalid: the directory was begun with other inputs.
    """

    def __init__(self, directory: Path, inputs: Mapping[str, object]) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / INPUTS
        begun = json.dumps(inputs, indent=1, sort_keys=True, default=str)
        if not path.exists():
            path.write_text(begun, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != begun:
            raise WorkInvalid(
                f"{directory} holds results of other data or settings (see {path}); "
                "name another work directory, or delete this one"
            )

    def network(
        self, name: str, empty: Callable[[], NetworkT], train: Callable[[], NetworkT]
    ) -> NetworkT:
        """The trained network of that name, in evaluation mode.

        Args:
            name: of the result.
            empty: makes a network of the right shape, for stored weights.
            train: makes the result.
        """
        path = self.directory / f"{name}.safetensors"
        if path.exists():
            network = empty()
            network.load_state_dict(load_file(path))
        else:
            network = train()
            self._write(path, lambda part: save_file(network.state_dict(), part))
        return network.eval()

    @contextmanager
    def checkpoint(self, name: str) -> Iterator[Checkpoint]:
        """What an interrupted training goes on from; deleted once it has ended well."""
        checkpoint = Checkpoint(self.directory / f"{name}.checkpoint")
        yield checkpoint
        checkpoint.path.unlink(missing_ok=True)

    def arrays(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """The arrays of that name."""
        path = self.directory / f"{name}.npz"
        if not path.exists():
            made = make()
            self._write(path, lambda part: _save_arrays(part, made))
        with np.load(path) as stored:
            return {key: stored[key] for key in stored.files}

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        part = path.with_suffix(".part")
        write(part)
        part.replace(path)


def _save_arrays(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:  # given a name, numpy would append its own suffix
        np.savez(file, **arrays)  # type: ignore[arg-type]

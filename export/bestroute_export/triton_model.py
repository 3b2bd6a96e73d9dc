"""Runs a network in Triton's Python backend, for builds without that of ONNX Runtime.

It is copied into a model repository beside model.onnx, and uses nothing else of bestroute. Triton's
Python needs numpy and onnxruntime.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # type: ignore[import-not-found]

# ONNX Runtime reports its use to its maker unless this is set before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # noqa: TID251 - written, not read

import onnxruntime as ort


class TritonPythonModel:
    """An instance of the model; its methods are called by the Python backend."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Load the network, onto the GPU that Triton gave the instance, if any."""
        directory = Path(arguments["model_repository"]) / arguments["model_version"]
        providers: list[Any] = ["CPUExecutionProvider"]
        if arguments["model_instance_kind"] == "GPU":
            device = {"device_id": arguments["model_instance_device_id"]}
            providers.insert(0, ("CUDAExecutionProvider", device))
        self._session = ort.InferenceSession(directory / "model.onnx", providers=providers)
        self._inputs = [each.name for each in self._session.get_inputs()]
        self._output = self._session.get_outputs()[0].name

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run what Triton's batcher took, requests of one length, together.

        Tensors cross as DLPack, since the backend's own way gives empty outputs with numpy 2.
        """
        taken = {
            name: [
                np.from_dlpack(triton.get_input_tensor_by_name(request, name))
                for request in requests
            ]
            for name in self._inputs
        }
        feeds = {name: np.concatenate(parts) for name, parts in taken.items()}
        (rows,) = self._session.run([self._output], feeds)
        ends = np.cumsum([len(part) for part in taken[self._inputs[0]]])
        return [
            triton.InferenceResponse([triton.Tensor.from_dlpack(self._output, part)])
            for part in np.split(rows, ends[:-1])
        ]

# /// script
# dependencies = ["nvidia-pytriton==0.7.0", "numpy<2"]
# ///
"""Triton: its C++ server and dynamic batcher (2.51.0, from the wheel of PyTriton), gRPC.

That build has no ONNX Runtime backend, so the network runs in a Python-backend model, which also
tokenizes. PyTriton itself isn't used: the server is started as it is outside of Python.

Settings, with the reasons:

- max_batch_size as all.
- dynamic_batching with its defaults, where its guide has one start: an instance that becomes free
  takes what waits, without delay.
- one instance: all cores are its session's.
- HTTP and metrics off: nobody calls them.
"""

import os
import shutil
import site
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.model import Model

CONFIG = f"""
name: "router"
backend: "python"
max_batch_size: {os.environ["PEER_MAX_BATCH"]}
dynamic_batching {{ }}
instance_group [ {{ count: 1, kind: KIND_CPU }} ]
input [ {{ name: "prompt", data_type: TYPE_STRING, dims: [ 1 ] }} ]
output [ {{ name: "row", data_type: TYPE_FP32, dims: [ -1 ] }} ]
"""


class TritonPythonModel:
    """Rows of prompts; its methods are called by the Python backend."""

    def initialize(self, _: dict[str, str]) -> None:
        """Load the network."""
        self._model = Model()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run what the batcher took: each request has string [B, 1], its answer float32 [B, K]."""
        import triton_python_backend_utils as backend  # type: ignore[import-not-found]

        prompts = [
            [
                text.decode()
                for text in backend.get_input_tensor_by_name(each, "prompt").as_numpy()[:, 0]
            ]
            for each in requests
        ]
        rows = iter(self._model([text for texts in prompts for text in texts]))
        return [
            backend.InferenceResponse(
                [backend.Tensor("row", _stacked([next(rows) for _ in texts]))]
            )
            for texts in prompts
        ]


def _stacked(rows: list[Any]) -> Any:
    import numpy as np

    return np.stack(rows)


def main() -> None:
    """Lay out the model repository in this environment, and become the server."""
    packages = Path(site.getsitepackages()[0])
    server = packages / "pytriton" / "tritonserver"
    backends, models = Path(sys.prefix) / "backends", Path(sys.prefix) / "models"
    shutil.copytree(server / "backends", backends, dirs_exist_ok=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    (models / "router" / "1").mkdir(parents=True, exist_ok=True)
    (models / "router" / "config.pbtxt").write_text(CONFIG, encoding="utf-8")
    (models / "router" / "1" / "model.py").write_text(
        f"import sys\nsys.path[:0] = [{str(packages)!r}, {os.environ['PYTHONPATH']!r}]\n"
        "from benchmarks.peers.triton import TritonPythonModel\n",
        encoding="utf-8",
    )
    options = {
        "model-repository": models,
        "backend-directory": backends,
        "grpc-address": "127.0.0.1",
        "grpc-port": os.environ["PEER_PORTS"].split(",")[0],
        "allow-http": "false",
        "allow-metrics": "false",
    }
    libraries = [packages / "nvidia_pytriton.libs", Path(sys.base_prefix) / "lib"]
    os.execve(
        server / "bin" / "tritonserver",
        ["tritonserver", *(f"--{name}={value}" for name, value in options.items())],
        {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, libraries))},
    )


if __name__ == "__main__":
    main()

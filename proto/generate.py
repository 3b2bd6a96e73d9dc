"""Write the gRPC code of proto/bestroute to server/bestroute.

    make proto        (or: python proto/generate.py [OUTPUT_ROOT])

The generator is pinned in pyproject.toml because its version sets the floor of grpcio and
protobuf at run time: code made by 1.76.0 runs on protobuf >= 6.31.1 and grpcio >= 1.76.0.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).parent
OUTPUT_ROOT = HERE.parent / "server"
SOURCES = [
    "bestroute/v1/routing.proto",
    "bestroute/v1/operations.proto",
    "bestroute/mesh/v1/external_processor.proto",
    "bestroute/mesh/v1/orca.proto",
    "bestroute/kserve/v2/inference.proto",
]


def generate(output: Path) -> None:
    """Generate messages, service stubs and their types below `output`.

    Raises:
        RuntimeError: protoc refused; it has printed why.
    """
    includes = [str(HERE), str(Path(protoc.__file__).parent / "_proto")]
    arguments = [
        "protoc",
        *(f"-I{include}" for include in includes),
        f"--python_out={output}",
        f"--grpc_python_out={output}",
        f"--mypy_out={output}",
        f"--mypy_grpc_out={output}",
        *SOURCES,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed; see its message above")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT_ROOT)

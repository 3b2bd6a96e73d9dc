"""How soon `bestroute serve` is ready, and how much memory it holds.

    python -m benchmarks.startup [--bundle DIR]

Ready means that it listens: the bundle is verified and warm by then. Memory is the resident set
of a server that has answered prompts of every length, beside that of a bare Python that has
loaded the router's ONNX file.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import grpc
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import record
from benchmarks.process import served
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.config import Engine as EngineSettings
from bestroute.engine import preferred_precisions
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub

_BARE = (
    "import sys, onnxruntime\n"
    "session = onnxruntime.InferenceSession(sys.argv[1])\n"
    "print([line for line in open('/proc/self/status') if 'VmRSS' in line][0].split()[1])\n"
)


def main() -> int:
    """Start servers and bare sessions in turn, print the table, keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="bundle to serve")
    parser.add_argument("--repeats", type=int, default=5, help="of each side (default: 5)")
    options = parser.parse_args()
    bundle = Bundle.load(options.bundle)
    network = bundle.manifest.router
    path = bundle.network_path(network, preferred_precisions(EngineSettings()))
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
    prompts = record.mixed_prompts(tokenizer, 64)

    ready, bare, resident, bare_resident = [], [], [], []
    for _ in track(range(options.repeats), "measuring", transient=True):
        start = time.perf_counter()
        with served("--bundle", options.bundle) as (server, address):
            ready.append(time.perf_counter() - start)
            with grpc.insecure_channel(address) as channel:
                stub = RoutingServiceStub(channel)
                for prompt in prompts:
                    stub.Route(pb.RouteRequest(prompt=prompt))
                    stub.Score(pb.ScoreRequest(prompt=prompt, responses=[prompt]))
            resident.append(_resident_mb(server.pid))
        start = time.perf_counter()
        command = [sys.executable, "-c", _BARE, str(path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        bare.append(time.perf_counter() - start)
        bare_resident.append(int(output) / 1024)

    figures = {
        "ready_seconds": ready,
        "ready_seconds_median": statistics.median(ready),
        "bare_session_seconds_median": statistics.median(bare),
        "resident_mb_median": statistics.median(resident),
        "bare_session_resident_mb_median": statistics.median(bare_resident),
    }
    table = Table("", "bestroute serve", "bare session", "target", title="Start")
    table.add_row(
        "ready (median)",
        f"{figures['ready_seconds_median']:.2f} s",
        f"{figures['bare_session_seconds_median']:.2f} s",
        "<= 3 s",
    )
    table.add_row(
        "resident",
        f"{figures['resident_mb_median']:.0f} MB",
        f"{figures['bare_session_resident_mb_median']:.0f} MB",
        "< 600 MB",
    )
    Console().print(table)
    settings = {"bundle": bundle.manifest.version, "repeats": options.repeats}
    print(f"kept in {record.write('startup', settings, figures).relative_to(Path.cwd())}")
    return 0


def _resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no resident memory")


if __name__ == "__main__":
    sys.exit(main())

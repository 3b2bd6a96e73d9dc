# /// script
# dependencies = ["ray[serve]==2.60.0"]
# ///
"""Ray Serve: a deployment with @serve.batch behind its HTTP proxy.

Settings, with the reasons:

- max_batch_size as all; batch_wait_timeout_s 0: a batch doesn't wait to fill.
- max_ongoing_requests 4096: the default, 5, would keep batches from forming.
- RAY_SERVE_THROUGHPUT_OPTIMIZED=1: its performance guide advises it for throughput and latency.
  That wants no blocking in the request path, so the network runs in a thread.
- one replica: all cores are its session's. Ray is told of more CPUs than there are, since its own
  actors ask for some.
- no dashboard, no access log: nothing that costs time.
- HTTP and not its gRPC ingress, which listens on all interfaces and can't be told otherwise.
"""

import asyncio
import os
import signal
import threading
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.peers.model import Model

MAX_BATCH_SIZE = int(os.environ["PEER_MAX_BATCH"])
BATCH_WAIT_TIMEOUT_S = 0.0
MAX_ONGOING_REQUESTS = 4096


@serve.deployment(max_ongoing_requests=MAX_ONGOING_REQUESTS)
class Router:
    """Rows of prompts."""

    def __init__(self) -> None:
        self._model = Model()

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_TIMEOUT_S)
    async def _rows(self, prompts: list[str]) -> list[list[float]]:
        rows = await asyncio.to_thread(self._model, prompts)
        return [row.tolist() for row in rows]

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Answer {"prompt": ...} with {"row": [...]}."""
        return {"row": await self._rows((await request.json())["prompt"])}


def main() -> None:
    """Serve until SIGTERM."""
    port = int(os.environ["PEER_PORTS"].split(",")[0])
    os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"  # for the processes that Ray starts
    ray.init(num_cpus=8, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        logging_config={"enable_access_log": False},
    )
    serve.run(Router.bind())  # type: ignore[attr-defined]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    ray.shutdown()


if __name__ == "__main__":
    main()

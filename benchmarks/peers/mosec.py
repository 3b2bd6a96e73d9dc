# /// script
# dependencies = ["mosec==0.9.8"]
# ///
"""Mosec: a web server and batcher in Rust in front of Python workers.

Settings, with the reasons:

- max_batch_size as all.
- max_wait_time 1 ms: its README wants less than a run takes; 1 is the least, 0 means 10.
- one worker process: all cores are its session's.
- JSON, its default: a prompt and a short row gain nothing from another encoding.
- one stage: its README splits CPU and GPU work into stages; here both are CPU work.
- timeout 60 s instead of 3: calls that wait should count as late, not as refused.
"""

import os
import sys
from typing import Any

from mosec import Server, Worker  # type: ignore[import-not-found]

from benchmarks.peers.model import Model

MAX_BATCH_SIZE = int(os.environ["PEER_MAX_BATCH"])
MAX_WAIT_MS = 1
TIMEOUT_MS = 60_000


class Router(Worker):  # type: ignore[misc]
    """Rows of a batch of prompts."""

    def __init__(self) -> None:
        super().__init__()
        self._model = Model()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer requests {"prompt": ...} with {"row": [...]}."""
        rows = self._model([each["prompt"] for each in data])
        return [{"row": row.tolist()} for row in rows]


def main() -> None:
    """Serve until the process is ended."""
    port = os.environ["PEER_PORTS"].split(",")[0]
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", port, "--timeout", str(TIMEOUT_MS)]
    sys.argv += ["--log-level", "warning"]
    server = Server()
    server.append_worker(Router, max_batch_size=MAX_BATCH_SIZE, max_wait_time=MAX_WAIT_MS)
    server.run()


if __name__ == "__main__":
    main()

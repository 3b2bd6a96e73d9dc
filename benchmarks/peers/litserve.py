# /// script
# dependencies = ["litserve==0.2.19"]
# ///
"""LitServe: FastAPI in front of worker processes.

Settings, with the reasons:

- max_batch_size as all.
- batch_timeout 0, its default: a worker takes what waits and never waits for more.
- fast_queue: its documentation advises it (ZeroMQ instead of multiprocessing's queues) for speed.
- one worker and one API server: all cores are the session's.
- no tracking of requests, no OpenAPI page, no generated client file: nothing that costs time.
"""

import os
from typing import Any

import litserve  # type: ignore[import-not-found]

from benchmarks.peers.model import Model, Rows

MAX_BATCH_SIZE = int(os.environ["PEER_MAX_BATCH"])
BATCH_TIMEOUT = 0.0


class Router(litserve.LitAPI):  # type: ignore[misc]
    """Rows of a batch of prompts."""

    def setup(self, device: str) -> None:
        """Load the network, in the worker."""
        self._model = Model()

    def decode_request(self, request: dict[str, Any], **_: Any) -> str:
        """The prompt of a request."""
        prompt: str = request["prompt"]
        return prompt

    def batch(self, inputs: list[str]) -> list[str]:
        """A batch of prompts is a list."""
        return inputs

    def predict(self, x: list[str], **_: Any) -> Rows:
        """Run a batch."""
        return self._model(x)

    def unbatch(self, output: Rows) -> list[Any]:
        """One row per request."""
        return list(output)

    def encode_response(self, output: Any, **_: Any) -> dict[str, Any]:
        """The answer to a request."""
        return {"row": output.tolist()}


def main() -> None:
    """Serve until the process is ended."""
    server = litserve.LitServer(
        Router(max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_TIMEOUT),
        accelerator="cpu",
        workers_per_device=1,
        timeout=60,
        fast_queue=True,
        disable_openapi_url=True,
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["PEER_PORTS"].split(",")[0]),
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()

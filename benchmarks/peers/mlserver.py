# /// script
# dependencies = ["mlserver==1.7.1", "uvloop==0.21.0"]
# ///
"""MLServer: KServe's Python server, with adaptive batching.

Settings, with the reasons:

- max_batch_size as all; max_batch_time 1 ms: above 0, which turns batching off, and as short as
  its timer is useful, because every batch that isn't full waits as long.
- one inference worker, its default: the network runs beside the server's event loop, not in it.
- gRPC, its faster protocol. Its HTTP server can't be turned off, but nobody calls it.
- uvloop 0.21: with later ones its workers end at start ("There is no current event loop").
- no metrics endpoint, no debug log: nothing that costs time.
"""

import asyncio
import os
import sys

from mlserver import (  # type: ignore[import-not-found]
    MLModel,
    MLServer,
    ModelSettings,
    Settings,
)
from mlserver.codecs import NumpyCodec, StringCodec  # type: ignore[import-not-found]
from mlserver.types import InferenceRequest, InferenceResponse  # type: ignore[import-not-found]

from benchmarks.peers.model import Model

MAX_BATCH_SIZE = int(os.environ["PEER_MAX_BATCH"])
MAX_BATCH_TIME = 0.001
PARALLEL_WORKERS = 1


class Router(MLModel):  # type: ignore[misc]
    """Rows of a batch of prompts."""

    async def load(self) -> bool:
        """Load the network, in the worker."""
        self._model = Model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run a batch: string [B, 1] to float32 [B, K]."""
        rows = self._model(StringCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("row", rows)]
        )


async def main() -> None:
    """Serve until SIGTERM."""
    grpc_port, http_port, _ = map(int, os.environ["PEER_PORTS"].split(","))
    settings = Settings(
        host="127.0.0.1",
        grpc_port=grpc_port,
        http_port=http_port,
        parallel_workers=PARALLEL_WORKERS,
        environments_dir=f"{sys.prefix}/environments",
        metrics_dir=f"{sys.prefix}/metrics",
        metrics_endpoint=None,
        debug=False,
    )
    router = ModelSettings(
        name="router",
        # Not the class itself: here it is __main__'s, which the worker can't import.
        implementation="benchmarks.peers.mlserver.Router",
        max_batch_size=MAX_BATCH_SIZE,
        max_batch_time=MAX_BATCH_TIME,
    )
    await MLServer(settings).start([router])


if __name__ == "__main__":
    asyncio.run(main())

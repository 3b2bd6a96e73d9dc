"""bestroute as it is installed: `bestroute serve` with its default settings.

But that it remembers no prompts: the load asks the same few again and again, and would measure
that.
"""

import os
from pathlib import Path

from benchmarks.peers.model import SYNTHETIC, Cost
from bestroute import app
from bestroute.config import Engine, Routing, Server, Settings


def main() -> None:
    """Serve until SIGTERM."""
    port = os.environ["PEER_PORTS"].split(",")[0]
    settings = Settings(
        bundle=Path(os.environ["PEER_BUNDLE"]),
        server=Server(listen=f"127.0.0.1:{port}"),
        # The same as its default on the cores that it may use; said, since all peers are told.
        engine=Engine(threads=int(os.environ["PEER_THREADS"])),
        routing=Routing(cache_entries=0),
    )
    if SYNTHETIC in os.environ:
        from benchmarks import synthetic

        synthetic.install(Cost.parse(os.environ[SYNTHETIC]))
    app.run(lambda: settings)


if __name__ == "__main__":
    main()

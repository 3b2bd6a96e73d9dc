"""`bestroute serve` as a process of its own, for the benchmarks that measure it from outside."""

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

READY = re.compile(r"serves bundle .* on (\S+:\d+)$")
READ_ANEW: Mapping[str, str] = {"BESTROUTE_ROUTING__CACHE_ENTRIES": "0"}
"""The environment of a server that remembers no prompts, for loads that repeat theirs."""


@contextmanager
def served(
    *flags: str | Path, environment: Mapping[str, str] | None = None
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Serve on a free port of loopback; gives the process and its address when ready.

    Args:
        flags: of `bestroute serve`, beside the address.
        environment: of the server, beside this process's own.
    """
    command = ["-m", "bestroute", "serve", "--listen", "127.0.0.1:0", *map(str, flags)]
    with subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    ) as server:
        assert server.stderr is not None
        # A server whose log nobody reads stands still once the pipe is full.
        reading = Thread(target=deque, args=(server.stderr, 0))
        try:
            for line in server.stderr:
                if found := READY.search(line.strip()):
                    reading.start()
                    yield server, found[1]
                    break
            else:
                raise SystemExit("the server ended before it was ready")
        finally:
            server.terminate()
            if reading.ident:
                reading.join()

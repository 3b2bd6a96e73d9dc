"""`bestroute serve` as a process of its own, for the benchmarks that measure it from outside."""

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

READY = re.compile(r"serves bundle .* on (\S+:\d+)$")
READ_ANEW: Mapping[str, str] = {"BESTROUTE_ROUTING__CACHE_ENTRIES": "0"}
"""The environment of a server that remembers no prompts, for loads that repeat theirs."""


@contextmanager
def served(
    *flags: str | Path,
    environment: Mapping[str, str] | None = None,
    module: Sequence[str] = ("bestroute",),
    read: Callable[[str], object] | None = None,
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Serve on a free port of loopback; gives the process and its address when ready.

    Args:
        flags: of `bestroute serve`, beside the address.
        environment: of the server, beside this process's own.
        module: what has the command `serve`, with arguments that come before that.
        read: is given each line of the log after the one that says it is ready.
    """
    command = ["-m", *module, "serve", "--listen", "127.0.0.1:0", *map(str, flags)]
    with subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    ) as server:
        assert server.stderr is not None
        # A server whose log nobody reads stands still once the pipe is full.
        lines = map(read, server.stderr) if read else server.stderr
        reading = Thread(target=deque, args=(lines, 0))
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

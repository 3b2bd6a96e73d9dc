"""`bestroute serve` as a process of its own, for the benchmarks that measure it from outside."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READY = re.compile(r"serves bundle .* on (\S+:\d+)$")


@contextmanager
def served(bundle: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Serve a bundle on a free port of loopback; gives the process and its address when ready."""
    command = ["-m", "bestroute", "serve", "--listen", "127.0.0.1:0", "--bundle", str(bundle)]
    with subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            for line in server.stderr:
                if found := READY.search(line.strip()):
                    yield server, found[1]
                    break
            else:
                raise SystemExit("the server ended before it was ready")
        finally:
            server.terminate()

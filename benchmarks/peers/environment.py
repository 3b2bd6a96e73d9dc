"""Environments of the peers, each made on first use from what the peer's file asks for.

A peer's file starts with its dependencies as inline script metadata (PEP 723). A peer without any
runs in the harness's own environment.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE / ".venv"
_METADATA = re.compile(r"^# /// script\n((?:#.*\n)+?)# ///$", re.MULTILINE)
ENGINE = ("onnxruntime", "tokenizers")
"""What all have in the harness's own version, since it is the servers that are compared."""


class Unavailable(Exception):
    """A peer that can't be installed or started here; says why, in the words of what failed."""


def dependencies(server: str) -> list[str]:
    """What the server's file asks for, pinned, with the engine; empty if it asks for nothing."""
    text = (HERE / f"{server}.py").read_text(encoding="utf-8")
    found = _METADATA.search(text)
    if found is None:
        return []
    lines = [line.removeprefix("#").removeprefix(" ") for line in found[1].splitlines()]
    asked: list[str] = tomllib.loads("\n".join(lines))["dependencies"]
    return [*asked, *(f"{name}=={version(name)}" for name in ENGINE)]


def python_of(server: str) -> Path:
    """The interpreter that runs a server; installs what it needs if that isn't there yet.

    Raises:
        Unavailable: pip can't install it.
    """
    wanted = dependencies(server)
    if not wanted:
        return Path(sys.executable)
    directory = ROOT / server
    python, ready = directory / "bin" / "python", directory / "ready"
    stamp = "\n".join(wanted)
    if ready.exists() and ready.read_text(encoding="utf-8") == stamp:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Unavailable(f"pip install {' '.join(wanted)}: {done.stderr.strip()}")
    ready.write_text(stamp, encoding="utf-8")
    return python

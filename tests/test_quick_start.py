"""docs/quick-start.md works as it is written; only its ports are replaced by free ones."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quick-start.md"
SETTINGS = ROOT / "examples" / "quickstart.toml"
PORTS = ("50051", "8080", "8081")


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block of the page; the first sets up what tests run in."""
    return re.findall(r"^```(sh|python)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def free_ports() -> dict[str, str]:
    with socket.socket() as a, socket.socket() as b, socket.socket() as c:
        for each in (a, b, c):
            each.bind(("127.0.0.1", 0))
        found = [str(each.getsockname()[1]) for each in (a, b, c)]
    return dict(zip(PORTS, found, strict=True))


@pytest.fixture
def transcript(tmp_path: Path) -> Iterator[subprocess.CompletedProcess[str]]:
    """What all blocks print, run one after the other by one shell."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed: apt install curl")
    ports = free_ports()

    def moved(text: str) -> str:
        return re.sub(r"\b(50051|8080|8081)\b", lambda found: ports[found[1]], text)

    settings = tmp_path / "quickstart.toml"
    listen = f'\n[server]\nlisten = "127.0.0.1:{ports["50051"]}"\n'
    settings.write_text(moved(SETTINGS.read_text()) + listen)
    script = ["set -e", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    _, *steps = blocks()
    for number, (language, text) in enumerate(steps):
        text = moved(text).replace("examples/quickstart.toml", str(settings))
        # Where the default address is meant, it is this one now.
        text = re.sub(
            r"^(bestroute (?:route|generate|top)\b)",
            rf"\1 --address 127.0.0.1:{ports['50051']}",
            text,
            flags=re.MULTILINE,
        )
        if language == "python":
            program = tmp_path / f"{number}.py"
            program.write_text(text)
            text = f"python {program}\n"
        script.append(text)
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        ["bash", "-c", "\n".join(script)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as shell:
        try:
            out, err = shell.communicate(timeout=100)
            yield subprocess.CompletedProcess(shell.args, shell.returncode, out, err)
        finally:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)


def test_the_page_works_as_written(transcript: subprocess.CompletedProcess[str]) -> None:
    said = f"{transcript.stdout}\n{transcript.stderr}"
    assert transcript.returncode == 0, said
    out = transcript.stdout
    assert "FAIL" not in said, said
    assert re.search(r"saves|saving|cheaper", out), said
    assert "reference_cost_usd" in out, "the gateway explains the money"
    assert "data: [DONE]" in out, "an answer was streamed"
    assert "decisions" in out, "top saw them"

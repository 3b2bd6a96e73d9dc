"""The committed stubs are what the pinned generator makes of the .proto."""

import os
import sys
from pathlib import Path

import pytest

from proto.generate import SOURCES, generate

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "server"


def test_committed_stubs_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regenerating changes no byte; if this fails, run `make proto` and commit the result."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    generate(tmp_path)

    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.py*")}
    assert len(made) == 4 * len(SOURCES)
    assert made == {name: (SERVER / name).read_bytes() for name in made}

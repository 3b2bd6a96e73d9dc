"""The committed stubs are what the pinned generator makes of the .proto."""

import os
import sys
from pathlib import Path

import pytest

from proto.generate import generate

ROOT = Path(__file__).parents[1]
STUBS = ROOT / "server" / "bestroute" / "v1"


def test_committed_stubs_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regenerating changes no byte; if this fails, run `make proto` and commit the result."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    generate(tmp_path)

    made = {path.name: path.read_bytes() for path in (tmp_path / "bestroute" / "v1").iterdir()}
    assert len(made) == 4
    assert made == {name: (STUBS / name).read_bytes() for name in made}

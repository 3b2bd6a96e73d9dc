"""docs/security.md promises nothing without a test."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "security.md").read_text()
ROWS = re.findall(r"^\| (?!threat|asset|---)([^|]+) \|([^|]*)\|([^|]*)\|([^|]*)\|$", TEXT, re.M)
NOT_A_TEST = {"what the server is made of"}


def test_every_threat_has_a_test() -> None:
    assert len(ROWS) > 20
    untested = {threat for threat, _, tests, _ in ROWS if "::" not in tests}
    assert untested == NOT_A_TEST


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TEXT)
    assert named
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^(async )?def {name}\(", (ROOT / "tests" / file).read_text(), re.M)
    ]
    assert missing == []

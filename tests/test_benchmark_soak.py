"""The soak's judgement and its faults, and its short form against the real server."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.broken import written
from benchmarks.promises import PROMISES
from benchmarks.soak import trend
from benchmarks.soaking.server import faulty

ROOT = Path(__file__).parents[1]


def test_what_only_wavers_is_flat_and_what_rises_is_not() -> None:
    source = np.random.default_rng(1)
    seconds = list(np.arange(600.0))
    wavering = 300 + source.normal(0, 3, 600)

    steady = trend(seconds, list(wavering), 0.03)
    leaking = trend(seconds, list(wavering + np.arange(600) * 0.05), 0.03)

    assert steady.flat
    assert steady.per_hour[1] < 0 < steady.per_hour[2]
    assert not leaking.flat
    assert leaking.per_hour[0] == pytest.approx(180, rel=0.1)


def test_what_has_filled_by_the_second_fifth_is_flat() -> None:
    filling = [min(300.0, 100.0 + 4 * second) for second in range(500)]

    assert trend(list(range(500)), filling, 0.03).flat


def test_networks_fail_as_often_and_in_all_ways_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0.0, 1e6, 0.01))
    monkeypatch.setattr("benchmarks.soaking.server.time.monotonic", lambda: next(clock))
    stalls: list[float] = []
    monkeypatch.setattr("benchmarks.soaking.server.time.sleep", stalls.append)
    run = faulty(lambda *_: [np.ones((2, 3))], random.Random(1), share=0.3, every=5.0)
    ways: Counter[str] = Counter()
    for _ in range(3000):
        try:
            (rows,) = run(None)
        except RuntimeError:
            ways["raises"] += 1
            continue
        ways["short" if len(rows) < 2 else "nan" if np.isnan(rows).any() else "sound"] += 1

    assert 3000 - ways["sound"] == pytest.approx(0.3 * (3000 - 800), rel=0.15)
    assert min(ways["raises"], ways["short"], ways["nan"]) > 150
    assert len(stalls) == 4, "from 13 s on, every 5 s, within 30 s"


def test_the_page_keeps_what_is_around_its_tables() -> None:
    page = "# Title\n<!-- written by benchmarks.broken -->former<!-- until here -->\nafter\n"
    results = {each.promise: index > 0 for index, each in enumerate(PROMISES)}

    text = written(page, PROMISES, results)

    assert text.startswith("# Title\n")
    assert text.endswith("<!-- until here -->\nafter\n")
    assert "former<" not in text
    assert text.count("| **no** |") == 1
    assert written(text, PROMISES, results) == text


def test_every_promise_can_be_broken_where_it_says() -> None:
    """The line to change is there once, and each test is in its file."""
    for each in PROMISES:
        source = (ROOT / "server" / "bestroute" / each.file).read_text(encoding="utf-8")
        assert source.count(each.before) == 1, each.promise
        for test in each.tests:
            path, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8")


def test_half_a_minute_of_everything_that_goes_wrong() -> None:
    """Nothing is answered wrongly, and the server serves in the end."""
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--short"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    assert "wrong: nothing" in ended.stdout

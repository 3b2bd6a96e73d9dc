"""Breaks the service on purpose, promise by promise, and sees whether the tests notice.

    python -m benchmarks.broken [--only WORD] [--keep]

For each promise of `benchmarks.promises`: its tests pass with the service as it is, and fail with a
copy in which a line is changed so that the promise is broken. A test that passes there proves
nothing. With `--keep` the figures are kept, and docs/reliability.md is written anew from them. Only
what lies below server/ is changed, and only in the copy.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from benchmarks import record
from benchmarks.promises import PROMISES, Promise

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
_BEGIN, _END = "<!-- written by benchmarks.broken -->", "<!-- until here -->"
_LONGEST = 300.0


def main() -> int:
    """Break, test, print; 1 if anything went unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="promises that have it in them")
    parser.add_argument("--keep", action="store_true", help="keep the result, write the page")
    options = parser.parse_args()
    promises = [each for each in PROMISES if options.only in f"{each.group} {each.promise}"]
    console, results = Console(), {}
    if not _pass(ROOT / "server", [test for each in promises for test in each.tests]):
        console.print("the tests fail with the service as it is; nothing can be told from them")
        return 1
    for each in promises:
        noticed = _noticed(each)
        results[each.promise] = noticed
        console.print(
            "noticed  " if noticed else "[red]UNNOTICED[/red]", each.promise, soft_wrap=True
        )
    if options.keep:
        print(record.write("broken", {"promises": len(promises)}, results))
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), promises, results), "utf-8")
    return 0 if all(results.values()) else 1


def _noticed(promise: Promise) -> bool:
    """Whether the promise's tests fail once it is broken."""
    with TemporaryDirectory() as directory:
        server = Path(directory) / "server"
        shutil.copytree(ROOT / "server", server, ignore=shutil.ignore_patterns("__pycache__"))
        path = server / "bestroute" / promise.file
        source = path.read_text(encoding="utf-8")
        if source.count(promise.before) != 1:
            raise SystemExit(
                f"{promise.file} has {source.count(promise.before)} times what is to be changed "
                f"for: {promise.promise}\n{promise.before}"
            )
        path.write_text(source.replace(promise.before, promise.after), encoding="utf-8")
        return not _pass(server, promise.tests)


def _pass(server: Path, tests: Sequence[str]) -> bool:
    """Whether the tests pass with the service in a directory.

    Raises:
        SystemExit: there are no such tests, or they can't be run.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(server), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False  # which is a way to notice a hang
    if ended.returncode not in (0, 1):  # 1: tests failed
        raise SystemExit(f"{' '.join(tests)} can't be run:\n{ended.stdout[-2000:]}")
    return ended.returncode == 0


def written(page: str, promises: Sequence[Promise], results: dict[str, bool]) -> str:
    """The page with its tables written anew."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    lines = [_BEGIN, "", f"Last run on {datetime.now(UTC):%Y-%m-%d}.", ""]
    for group, members in groupby(promises, key=lambda each: each.group):
        lines += [
            f"### {group}",
            "",
            "| promise | test | broken by | noticed |",
            "|---|---|---|---|",
        ]
        for each in members:
            tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in each.tests)
            noticed = "yes" if results[each.promise] else "**no**"
            lines.append(f"| {each.promise} | {tests} | {each.broken_by} | {noticed} |")
        lines.append("")
    return before + "\n".join(lines) + _END + after


if __name__ == "__main__":
    sys.exit(main())

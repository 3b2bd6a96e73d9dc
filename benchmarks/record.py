"""What every benchmark shares: the prompts, and the JSON record with its circumstances."""

import json
import os
import platform
import random
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime

from bestroute.engine import cpus
from bestroute.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"
_WORDS = ["what", "is", "the", "sum", "of", "these", "numbers", "find", "every", "word", "that"]


def mixed_prompts(tokenizer: Tokenizer, count: int, *, seed: int = 0) -> list[str]:
    """Prompts of mixed lengths, the same in every run.

    Lengths in tokens are lognormal (median 100, sigma 0.8), cut to what the model takes: about
    those of real questions, half of them within 58 to 172 tokens.

    Args:
        tokenizer: decides how long the longest may be.
        count: how many.
        seed: another one gives other prompts.
    """
    source = random.Random(seed)
    lengths = [
        min(max(int(source.lognormvariate(4.605, 0.8)), 4), tokenizer.max_tokens - 2)
        for _ in range(count)
    ]
    return [" ".join(source.choices(_WORDS, k=length)) for length in lengths]


def write(name: str, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> Path:
    """Keep a run as `results/NAME-DATE.json`: figures, settings, commit, machine, versions."""
    now = datetime.now(UTC)
    record = {
        "benchmark": name,
        "date": now.isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": {"cpu": _cpu(), "cpus": cpus(), "load_average": os.getloadavg()},
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,  # of either package, for CPUs or for GPUs
            **{name: version(name) for name in ("grpcio", "tokenizers", "numpy")},
        },
        "settings": settings,
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=RESULTS.parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()

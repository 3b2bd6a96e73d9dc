"""`bestroute serve` whose networks fail now and then.

    python -m benchmarks.soaking.server SEED SHARE STALL_EVERY serve ...

SHARE of the runs fail, a third each by an exception, by outputs that are no numbers, and by too
few outputs. Every STALL_EVERY seconds one run takes 2.5 s. Both begin some seconds after the start,
since a server that can't warm up doesn't serve.
"""

import random
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime

from bestroute.cli import main

_SOUND = 8.0
"""Seconds from the start in which nothing fails."""
STALL = 2.5
"""Seconds that a stalled run takes: long enough to be noticed, and more than a second over."""


def faulty(
    run: Callable[..., list[Any]], source: random.Random, share: float, every: float
) -> Callable[..., list[Any]]:
    """A session's `run` that fails as the module says."""
    begun = time.monotonic()
    due = begun + _SOUND + every

    def run_badly(session: Any, *arguments: Any, **options: Any) -> list[Any]:
        nonlocal due
        outputs = run(session, *arguments, **options)
        now = time.monotonic()
        if now < begun + _SOUND:
            return outputs
        if now > due:
            due = now + every
            time.sleep(STALL)
        if source.random() >= share:
            return outputs
        match source.randrange(3):
            case 0:
                raise RuntimeError("made to fail")
            case 1:
                return [np.full_like(outputs[0], np.nan), *outputs[1:]]
            case _:
                return [outputs[0][:-1], *outputs[1:]]

    return run_badly


if __name__ == "__main__":
    seed, share, every, *arguments = sys.argv[1:]
    sessions = onnxruntime.InferenceSession
    sessions.run = faulty(sessions.run, random.Random(int(seed)), float(share), float(every))
    sys.argv = ["bestroute", *arguments]
    sys.exit(main())

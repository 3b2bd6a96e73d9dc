"""`bestroute serve` whose networks don't come back for as long as a file exists.

python -m tests.stalling FILE serve ...
"""

import sys
import time
from pathlib import Path
from typing import Any

import onnxruntime

from bestroute.cli import main

if __name__ == "__main__":
    held, seconds = Path(sys.argv.pop(1)), float(sys.argv.pop(1))
    sessions = onnxruntime.InferenceSession
    run = sessions.run

    def stalling(session: Any, *arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        while held.exists():
            time.sleep(0.05)
        return run(session, *arguments, **options)

    sessions.run = stalling
    sys.exit(main())

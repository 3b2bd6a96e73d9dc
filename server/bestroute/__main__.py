"""`bestroute` and `python -m bestroute`."""

import sys

from bestroute.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""The `bestroute` command; one module per subcommand.

Each module has `add(commands)`, which declares its arguments and sets `run(args) -> exit code`.
Exit codes: 0 done, 1 it failed, 2 it was asked wrongly, 130 interrupted. Results go to stdout,
everything else to stderr. What only one command needs is imported when it runs, so that `doctor`
is quick enough to be a health check.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from bestroute import __version__
from bestroute.cli import bundle, doctor, gateway, generate, health, key, route, score, serve, top
from bestroute.cli.arguments import described
from bestroute.cli.terminal import complain


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; None takes the process's.
    """
    try:
        args = parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`head`, say) has seen enough. The interpreter flushes stdout once more as it
        # ends, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return complain(str(error), code=1)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="bestroute",
        **described(
            "Route each prompt to the cheapest LLM and number of samples that is predicted "
            "to match a reference LLM, and pick the best answer.",
            "bestroute serve",
            'bestroute route "What is 2 + 2?" --max-quality-drop 0.02',
            'bestroute generate "Write a haiku about rain."',
            "bestroute top",
            "bestroute doctor",
        ),
    )
    root.add_argument("--version", action="version", version=f"bestroute {__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (serve, gateway, route, score, generate, top, doctor, health, bundle, key):
        command.add(commands)
    return root

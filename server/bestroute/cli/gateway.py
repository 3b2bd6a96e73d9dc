"""`bestroute gateway`: serve the OpenAI-compatible HTTP API, and nothing else."""

import argparse
from typing import TYPE_CHECKING

from bestroute.cli import serve
from bestroute.cli.arguments import described, given

if TYPE_CHECKING:
    from bestroute.cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "gateway",
        help="serve the OpenAI-compatible HTTP API",
        **described(
            "Serve an HTTP API that OpenAI's clients can talk to, with a router of its own and "
            "without gRPC, until SIGTERM or SIGINT. To have both in one process, set [gateway] "
            "listen and run `bestroute serve`.",
            "bestroute gateway --config bestroute.toml",
            "bestroute gateway --config bestroute.toml --listen 0.0.0.0:8080 --workers 4",
        ),
    )
    serve.add_settings(parser, "127.0.0.1:8080")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    gateway = {"alone": True, **given(args, "listen")}
    return serve.serve(args, {**serve.settings_of(args), "gateway": gateway})

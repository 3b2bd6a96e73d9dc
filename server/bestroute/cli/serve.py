"""`bestroute serve`: run the service."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestroute.cli.arguments import MAX_UINT32, described, given, integer
from bestroute.cli.terminal import complain
from bestroute.errors import BundleInvalid

if TYPE_CHECKING:
    from bestroute.cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "serve",
        help="run the service",
        **described(
            "Run the service until SIGTERM or SIGINT; calls under way are then answered, "
            "and a second signal ends it at once. Every setting may be in a file or in the "
            "environment (BESTROUTE_SERVER__LISTEN is the file's [server] listen); flags win. "
            "With a router as fast as the embedded one, a single Python event loop is the limit: "
            "--workers serves with several processes at one address, each with memory of its own. "
            "Connections are spread over them, not calls, so a client should open several channels "
            '(in Python each with the option ("grpc.use_local_subchannel_pool", 1)), or be behind '
            "a proxy such as Envoy.",
            "bestroute serve",
            "bestroute serve --config bestroute.toml --listen 0.0.0.0:50051 --workers 4",
            "bestroute serve --provider cuda --bundle ./my-bundle",
        ),
    )
    add_settings(parser, "127.0.0.1:50051")
    parser.set_defaults(run=run)


def add_settings(parser: argparse.ArgumentParser, listen: str) -> None:
    """Declare what whoever serves can be told.

    Args:
        parser: the command's.
        listen: where it listens if it isn't told.
    """
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="a TOML file; examples/bestroute.toml explains every setting",
    )
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help=f"where to listen (default: {listen})"
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=integer(1, MAX_UINT32),
        help="processes that serve there (default: 1)",
    )
    parser.add_argument(
        "--bundle", metavar="DIR", type=Path, help="the bundle to serve (default: the embedded one)"
    )
    parser.add_argument(
        "--provider",
        choices=("cpu", "cuda", "tensorrt", "kserve"),
        help="what computes (default: cpu); kserve needs [engine] endpoint",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=integer(1, MAX_UINT32),
        help="threads per run (default: the CPUs this process may use, divided by the workers)",
    )
    parser.add_argument(
        "--log-level",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        help="of the log on stderr (default: INFO)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    return serve(args, {**settings_of(args), "server": given(args, "listen", "workers")})


def serve(args: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    """Serve by a file's settings, and by flags that win over them, until a signal comes."""
    from bestroute.config import ConfigInvalid, Settings
    from bestroute.process import hold_hangup

    hold_hangup()
    try:

        def load() -> Settings:
            return Settings.load(args.config, flags)

        settings = load()
        if settings.watch_config and args.config is None:
            raise ConfigInvalid("watch_config: there is no file to watch; start with --config FILE")
        if settings.server.workers > 1:
            from bestroute import workers

            return workers.run(load, args.config)
        from bestroute import app

        return app.run(load, args.config)
    except (ConfigInvalid, BundleInvalid) as error:
        return complain(str(error), code=2)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, nested as in the file; where to listen not among them."""
    return {
        **given(args, "bundle", "log_level"),
        "server": given(args, "workers"),
        "engine": given(args, "provider", "threads"),
    }

"""A configuration: would `bestroute serve` serve with it, and as it was meant."""

import asyncio
import importlib.util
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.cli.doctor import certificates, machine, ports
from bestroute.cli.doctor.findings import Finding, fail, ok, warn
from bestroute.config import ConfigInvalid, Settings, strays
from bestroute.engine import cpus, preferred_precisions
from bestroute.errors import BundleInvalid
from bestroute.guard.authentication import authenticating
from bestroute.guard.exposure import exposures
from bestroute.manifest import Manifest
from bestroute.pricing import is_listed
from bestroute.router import open_router

_PROCESS_BYTES = 200 * machine.MIB
"""Of a worker without its networks."""
_COPIES = 2
"""Of a network's file that are in memory while it is loaded."""


def load(file: Path | None) -> tuple[Settings | None, list[Finding]]:
    """Read the configuration as `bestroute serve --config FILE` would."""
    found = [
        warn(f"{name} is in the environment, but is no setting{meant}") for name, meant in strays()
    ]
    try:
        settings = Settings.load(file)
    except ConfigInvalid as error:
        return None, [*found, *map(fail, str(error).splitlines())]
    source = str(file) if file else "what the environment and the defaults say"
    return settings, [ok(f"configuration: {source} is valid"), *found]


async def checks(settings: Settings, file: Path | None, name: str | None) -> AsyncIterator[Finding]:
    """What is found of settings that are valid.

    Args:
        settings: the configuration.
        file: where it came from.
        name: whom clients expect the server's certificate to name; None: where it listens.
    """
    if settings.watch_config and file is None:
        yield fail("watch_config is set, but there is no file to watch; name one by --config")
    manifest: Manifest | None = None
    for which in _bundles(settings):
        finding, bundle = await asyncio.to_thread(whole, *which)
        yield finding
        manifest = manifest or (bundle.manifest if bundle else None)
        if bundle:
            yield machine.memory(needed(settings, bundle))
    if manifest is not None:
        for finding in pool(settings, manifest):
            yield finding
        yield await answering(settings)
    for finding in (*ports.checks(settings), *certificates.checks(settings, name)):
        yield finding
    yield await callers(settings)
    for exposure in exposures(settings):
        yield warn(exposure)
    for key, directory in (
        ("engine.cache", settings.engine.cache),
        ("decision_log.directory", settings.decision_log.directory),
    ):
        if directory is not None:
            yield writable(key, directory)
    for finding in extras(settings):
        yield finding
    yield threads(settings)
    if settings.gateway.listen is None:
        yield ok(
            "gateway.listen is unset: there is no OpenAI-compatible HTTP API, and no web page; "
            'for them set [gateway] listen = "127.0.0.1:8080"'
        )
    elif not settings.gateway.page:
        yield ok("gateway.page = false: the gateway has no web page")


def _bundles(settings: Settings) -> Iterator[tuple[str, Path, str | None]]:
    yield "bundle", settings.bundle or DEFAULT_BUNDLE, settings.bundle_sha256
    if settings.canary.bundle is not None:
        yield "canary.bundle", settings.canary.bundle, settings.canary.bundle_sha256


def whole(key: str, directory: Path, sha256: str | None) -> tuple[Finding, Bundle | None]:
    """Whether a bundle's files are as they were exported."""
    try:
        bundle = Bundle.load(directory, sha256)
    except BundleInvalid as error:
        return fail(f"{key}: {error}"), None
    manifest = bundle.manifest
    return ok(f"{key}: {manifest.name} {manifest.version} in {directory} is whole"), bundle


def needed(settings: Settings, bundle: Bundle) -> int:
    """Bytes of memory that workers need with a bundle, roughly."""
    try:
        preferred = preferred_precisions(settings.engine)
        files = [
            bundle.network_path(network, preferred).stat().st_size
            for network in (bundle.manifest.router, bundle.manifest.reward)
        ]
    except (BundleInvalid, ConfigInvalid):  # `answering` tells
        files = []
    return settings.server.workers * (_PROCESS_BYTES + _COPIES * sum(files))


async def answering(settings: Settings) -> Finding:
    """Whether the networks give on this machine what they gave where the bundle was made."""
    try:
        async with open_router(settings) as router:
            manifest = router.manifest
    except (BundleInvalid, ConfigInvalid) as error:
        return fail(f"it can't be served: {error}")
    return ok(
        f"{manifest.name} {manifest.version} can be served: on {settings.engine.provider} its "
        "networks give what they gave where it was made"
    )


def pool(settings: Settings, manifest: Manifest) -> Iterator[Finding]:
    """Whether Generate can ask the pool's models, and knows their prices."""
    names = [model.name for model in manifest.models]
    served = [name for name in names if name in settings.models]
    missing = [name for name in names if name not in settings.models]
    if not served:
        yield ok(
            "no [models] are configured: Route decides, but Generate is refused; that needs "
            "[providers] and [models], see examples/bestroute.toml"
        )
        return
    if missing:
        yield warn(
            f"no provider serves {', '.join(missing)}: Generate never asks them, though Route "
            f'may choose them; add [models."{missing[0]}"]'
        )
    if manifest.reference_model in missing:
        yield warn(
            f"no provider serves {manifest.reference_model}, the reference: where no arm is good "
            "enough Generate has nobody to ask"
        )
    for name in served:
        model = settings.models[name]
        provider = settings.providers[model.provider]
        if model.price is None and not is_listed(model.upstream or name, provider):
            yield warn(
                f'the price of "{model.upstream or name}" at {model.provider} is not known, and '
                f'taken to be the bundle\'s; set [models."{name}".price]'
            )
    used = {model.provider for model in settings.models.values()}
    for provider_name in settings.providers:
        if provider_name not in used:
            yield warn(f"[providers.{provider_name}] serves no model; add [models] or remove it")


async def callers(settings: Settings) -> Finding:
    """Whether callers can show who they are."""
    try:
        async with authenticating(settings.security, lambda method: None):
            pass
    except ConfigInvalid as error:
        return fail(str(error))
    if settings.security.credentials:
        return ok("callers show a key or a token")
    if settings.security.client_ca is not None:
        return ok("callers show a certificate")
    return ok("callers show no key; [security] api_keys_file or jwks_url would ask them for one")


def extras(settings: Settings) -> Iterator[Finding]:
    """Packages that the configuration needs, and that are not installed by default."""
    wanted = {
        "security.jwks_url or jwks_file": ("jwt", "jwt", settings.security.tokens),
        "tracing.endpoint": ("opentelemetry", "otel", settings.tracing.endpoint is not None),
        "decision_log.directory": ("pyarrow", "log", settings.decision_log.directory is not None),
    }
    for key, (module, extra, needed) in wanted.items():
        if needed and importlib.util.find_spec(module) is None:
            yield fail(f"{key} needs the package {module}: pip install 'bestroute[{extra}]'")


def writable(key: str, directory: Path) -> Finding:
    """Whether files can be written to a directory, which is made where it is missing."""
    nearest = next(
        path for path in (directory.absolute(), *directory.absolute().parents) if path.exists()
    )
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        return fail(
            f"{key} = {str(directory)!r} can't be written by this user ({nearest} is in the way); "
            "name another directory, or chown this one"
        )
    return ok(f"{key}: {directory} can be written")


def threads(settings: Settings) -> Finding:
    """Whether there are as many CPUs as threads."""
    may, workers = cpus(), settings.server.workers
    each = settings.engine.threads or max(1, may // workers)
    if each * workers > may:
        return warn(
            f"{workers} workers of {each} threads each share {may} CPUs (by affinity and the "
            "cgroup's quota), and get in each other's way; leave engine.threads unset, take fewer "
            "workers, or raise the container's CPU limit"
        )
    return ok(f"{each * workers} of {may} CPUs are computed on")

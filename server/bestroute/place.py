"""A router that is open for as long as it is wanted or in use, and what it was opened with."""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple, Self

from bestroute.bundle import DEFAULT_BUNDLE, Fingerprint, fingerprint, read_manifest
from bestroute.config import Canary, ConfigInvalid, Operations, Settings, instead
from bestroute.errors import BundleInvalid
from bestroute.router import Router, open_router

_log = logging.getLogger(__name__)

OPENED_WITH = ("bundle", "bundle_sha256", "engine", "batching", "routing", "providers", "models")
"""Settings that a router is opened with; where one changes, another has to be opened."""


class Opening(NamedTuple):
    """What a router is opened with: where two are equal, so are the routers.

    Attributes:
        settings: what it is opened with; its bundle is a directory, no link to one.
        parts: of the settings, what matters, and the providers' keys.
        files: the bundle's, as they were.
    """

    settings: Settings
    parts: tuple[Any, ...]
    files: Fingerprint

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """What a router is opened with now; reads files.

        Raises:
            ConfigInvalid: a provider's key is missing.
        """
        assert settings.bundle is not None
        used = sorted({model.provider for model in settings.models.values()})
        keys = [settings.providers[name].api_key() for name in used]
        parts = [getattr(settings, key) for key in OPENED_WITH]
        return cls(settings, (*parts, *keys), fingerprint(settings.bundle))

    def same(self, other: "Opening") -> bool:
        """Whether routers opened with either are the same."""
        return self.parts == other.parts and self.files == other.files


class Plan(NamedTuple):
    """The routers that settings ask for."""

    stable: Opening
    canary: Opening | None


def planned(settings: Settings) -> Plan:
    """The routers that settings ask for; reads files.

    Links are followed once, here, so that nothing is read from two bundles when one is swapped.
    With a canary, each router is opened with those of the configured models that its pool has.

    Raises:
        ConfigInvalid: no pool has a model, or a provider's key is missing.
    """
    canary = settings.canary
    stable = _at(settings, settings.bundle or DEFAULT_BUNDLE, settings.bundle_sha256)
    if canary.bundle is None:
        return Plan(Opening.of(stable), None)
    other = _at(settings, canary.bundle, canary.bundle_sha256)
    pools = [_pool(stable), _pool(other)]
    if None not in pools:
        known = [name for pool in pools for name in pool or ()]
        for name in settings.models:
            if name not in known:
                raise ConfigInvalid(
                    f'[models."{name}"]: neither in the bundle nor in the canary'
                    + instead(name, known)
                )
    return Plan(*(Opening.of(_within(s, p)) for s, p in zip((stable, other), pools, strict=True)))


def _at(settings: Settings, bundle: Path, sha256: str | None) -> Settings:
    directory = Path(os.path.realpath(bundle))
    return settings.model_copy(
        update={
            "bundle": directory,
            "bundle_sha256": sha256,
            "operations": Operations(),
            "canary": Canary(),
        }
    )


def _pool(settings: Settings) -> list[str] | None:
    """The models of the bundle; None if it can't be read, of which opening it tells."""
    assert settings.bundle is not None
    try:
        return [model.name for model in read_manifest(settings.bundle).models]
    except BundleInvalid:
        return None


def _within(settings: Settings, pool: list[str] | None) -> Settings:
    if pool is None:
        return settings
    models = {name: model for name, model in settings.models.items() if name in pool}
    return settings.model_copy(update={"models": models})


class Place:
    """A router that is open until it has retired and nobody uses it.

    Attributes:
        router: the router.
        opening: what it was opened with.
        expendable: whether it may break without taking the process along.
        broken: whether it has.
        users: how many use it.
        closed: set when it is.
    """

    def __init__(self, router: Router, opening: Opening) -> None:
        self.router, self.opening = router, opening
        self.expendable = self.broken = False
        self.users, self._retired = 0, False
        self._left, self.closed = asyncio.Event(), asyncio.Event()

    def fault(self) -> str | None:
        """Why requests can't be answered now; None if they can."""
        return "it has broken" if self.broken else self.router.fault()

    def leave(self) -> None:
        """One uses it no more."""
        self.users -= 1
        if self._retired and not self.users:
            self._left.set()

    def retire(self) -> None:
        """Close it as soon as nobody uses it."""
        self._retired = True
        if not self.users:
            self._left.set()

    async def left(self) -> None:
        """Wait until it may be closed."""
        await self._left.wait()


async def hold(opening: Opening, opened: "asyncio.Future[Place]") -> None:
    """Open a router, keep it while it has its place, and close it."""
    place = None
    try:
        async with open_router(opening.settings) as router:
            assert opening.settings.bundle is not None
            if await asyncio.to_thread(fingerprint, opening.settings.bundle) != opening.files:
                raise BundleInvalid(
                    f"{opening.settings.bundle} was changed while it was loaded; reload again when "
                    "it is complete"
                )
            if opened.cancelled():
                return
            place = Place(router, opening)
            opened.set_result(place)
            await place.left()
        place.closed.set()
    except BaseException as error:
        if place is not None and place.expendable and isinstance(error, Exception):
            _log.exception("the canary has broken; the bundle serves all requests")
            place.broken = True
            place.closed.set()
            return
        if opened.done():
            raise
        opened.set_exception(error)
        if not isinstance(error, Exception):
            raise

"""The routers that serve now, and how others take their place under load.

One serves, or two: the bundle's, and beside it a canary's with a share of the traffic.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from hashlib import blake2b

from bestroute.addresses import machine
from bestroute.bundle import Fingerprint
from bestroute.call import ANYBODY, Call
from bestroute.config import ConfigInvalid, Operations, Settings
from bestroute.disabled import check, disabled, unknown
from bestroute.errors import BundleInvalid
from bestroute.place import Opening, Place, hold, planned
from bestroute.pricing import ModelPrice
from bestroute.router import Router
from bestroute.session import Session
from bestroute.tasks import task_group

_log = logging.getLogger(__name__)

_GOLDEN = 0.6180339887498949
"""Of all steps around a circle the one whose places are spread most evenly, however many it makes:
any share of the requests is kept to within a few, and it can't beat in time with a caller's."""


class Live:
    """Serves with one router at a time, or two; while it is `serving`, others may take their place.

    Attributes:
        replaced: how often other settings came into force.
        failed: how often some should have, but could not.
        operations: what operators overrule now.
        share: of the canary, if there is one.
    """

    def __init__(self) -> None:
        self.replaced = self.failed = 0
        self.operations, self.share = Operations(), 0.0
        self._routers: asyncio.TaskGroup | None = None
        self._stable: Place | None = None
        self._canary: Place | None = None
        self._canary_wanted = False
        self._wanted: Settings | None = None
        self._opening = asyncio.Lock()
        self._point = 0.0

    @property
    def router(self) -> Router:
        """The bundle's; whoever awaits anything with it has to be `using` it."""
        assert self._stable is not None
        return self._stable.router

    @property
    def prices(self) -> Mapping[str, ModelPrice]:
        """Of every model that may answer; the bundle's where the canary has another."""
        prices = self.router.prices
        return prices if self._canary is None else {**self._canary.router.prices, **prices}

    @property
    def files(self) -> Fingerprint:
        """Those of the bundle that serves, as they were when it was loaded."""
        assert self._stable is not None
        return self._stable.opening.files

    @property
    def canary(self) -> Router | None:
        """The canary's, if it is open."""
        return self._canary.router if self._canary else None

    @property
    def canary_serves(self) -> bool | None:
        """Whether the canary can be given its share of the traffic; None: none is configured."""
        if not self._canary_wanted:
            return None
        return self._canary is not None and self._canary.fault() is None

    @contextmanager
    def using(self, call: Call = ANYBODY, session: Session | None = None) -> Iterator[Router]:
        """The one for a request, which stays open for as long as the block lasts.

        A session stays with one of them for as long as both serve and the share is the same; where
        that rises, it is sessions of the stable one that change, and where it falls, the canary's.

        Args:
            call: whose request it is.
            session: that it is a turn of.
        """
        place = self._stable if self._canary is None else self._chosen(call, session)
        assert place is not None
        place.users += 1
        try:
            yield place.router
        finally:
            place.leave()

    def _chosen(self, call: Call, session: Session | None) -> Place | None:
        if session is None:
            self._point = point = (self._point + _GOLDEN) % 1.0
        else:
            name = f"{machine(call.caller)}\0{session.id}".encode(errors="replace")
            point = int.from_bytes(blake2b(name, digest_size=6).digest()) / 2**48
        canary = self._canary
        assert canary is not None
        return canary if point < self.share and canary.fault() is None else self._stable

    @asynccontextmanager
    async def serving(self, settings: Settings) -> AsyncIterator[None]:
        """Serve while the block lasts.

        A router that breaks, now or later, cancels the block; its error comes out of it. Unless it
        is the canary's, without which the bundle's goes on.

        Raises:
            BundleInvalid: the bundle can't be served.
            ConfigInvalid: the settings don't fit the bundle or the machine.
        """
        async with task_group() as self._routers:
            self._wanted = settings
            await self._open()
            try:
                yield
            finally:
                last = [place for place in (self._stable, self._canary) if place]
                self._stable = self._canary = None
                for place in last:
                    place.retire()

    async def replace(self, settings: Settings) -> bool:
        """Bring settings into force; the routers that they have no use for end with their requests.

        Where nothing has changed that a router is opened with, that is at once. Otherwise what can
        be is in force at once, which is what operators overrule, and the rest when all is open; if
        still others are wanted by then, those.

        Returns:
            Whether a router was opened.

        Raises:
            BundleInvalid: the bundle can't be served; the former goes on.
            ConfigInvalid: the settings don't fit the bundle or the machine; the former goes on.
        """
        self._wanted = settings
        try:
            plan = await asyncio.to_thread(planned, settings)
            if self._wanted is not settings:
                return False
            stable = self._find(plan.stable)
            canary = self._find(plan.canary) if plan.canary else None
            if stable and (canary or plan.canary is None):
                self._switch(settings, stable, canary)
                return False
            self._overrule(settings)
            async with self._opening:
                for former in await self._open():
                    await former.closed.wait()
        except Exception:
            self.failed += 1
            raise
        return True

    def _find(self, opening: Opening, places: Sequence[Place] = ()) -> Place | None:
        """One that is open already and in order, here or among the places."""
        for place in (self._stable, self._canary, *places):
            if place and place.fault() is None and place.opening.same(opening):
                return place
        return None

    def _overrule(self, settings: Settings) -> None:
        """Bring into force what needs no other router, as far as those that serve know it."""
        places = [place for place in (self._stable, self._canary) if place]
        names = settings.operations.disabled_arms
        if unknown(names, [place.router.manifest for place in places]):
            return
        try:
            for place in places:
                disabled(names, place.router.manifest)
        except ConfigInvalid:
            return  # to be said when it is known what is to serve
        for place in places:
            place.router.operate(settings.operations)
        self.operations = settings.operations

    async def _open(self) -> list[Place]:
        """Open what is wanted and bring it into force; gives those that have retired.

        Raises:
            BundleInvalid, ConfigInvalid: it can't be; nothing has changed.
        """
        fresh: list[Place] = []
        try:
            while True:
                settings = self._wanted
                assert settings is not None
                plan = await asyncio.to_thread(planned, settings)
                stable = self._find(plan.stable, fresh)
                if stable is None:
                    fresh.append(stable := await self._opened(plan.stable))
                canary = None
                if plan.canary and not (canary := self._find(plan.canary, fresh)):
                    try:
                        fresh.append(canary := await self._opened(plan.canary))
                    except Exception as error:
                        _canary_failed(error)
                if self._wanted is settings:
                    return self._switch(settings, stable, canary)
        finally:
            for place in fresh:
                if place not in (self._stable, self._canary):
                    place.retire()

    def _switch(self, settings: Settings, stable: Place, canary: Place | None) -> list[Place]:
        """Have these serve from now on; gives those that have retired.

        Raises:
            ConfigInvalid: what is to be overruled doesn't fit; nothing has changed.
        """
        operations, first = settings.operations, self._stable is None
        wanted = settings.canary.bundle is not None
        manifests = [place.router.manifest for place in (stable, canary) if place]
        names = operations.disabled_arms
        for name in unknown(names, manifests):
            # What was in force must not keep anybody from going back to a bundle without it, nor
            # what is meant for a canary that doesn't serve from having the bundle serve.
            if not (name in self.operations.disabled_arms or (wanted and not canary)):
                check([name], manifests)
            _log.warning('operations.disabled_arms: no bundle that serves has "%s"', name)
        disabled(names, stable.router.manifest)
        if canary is stable:
            _log.error("the canary is the bundle itself, so that there is nothing to compare")
            canary = None
        elif canary:
            try:
                canary.router.operate(operations)
            except ConfigInvalid as error:
                _canary_failed(error)
                canary = None
        stable.router.operate(operations)
        before = self._stable, self._canary, self.operations, self.share
        former = {place for place in (self._stable, self._canary) if place} - {stable, canary}
        self._stable, self._canary, self._canary_wanted = stable, canary, wanted
        stable.expendable = False
        if canary:
            canary.expendable = True
            if canary.router.manifest.version == stable.router.manifest.version:
                _log.warning("bundle and canary have the same version; nobody can tell them apart")
        self.operations, self.share = operations, settings.canary.share
        for place in former:
            place.retire()
        if not first:
            self.replaced += 1
        told = self.described()
        if before == (stable, canary, operations, self.share):
            _log.info("reloaded: what serves is the same as before")
        elif not first or told != _named(stable):
            _log.info("%s: serves bundle %s", "started" if first else "reloaded", told)
        return [*former]

    def described(self) -> str:
        """What serves, in words."""
        assert self._stable is not None
        told = [_named(self._stable)]
        if self._canary:
            told.append(f"canary {_named(self._canary)} with {self.share:.4g} of the traffic")
        if self.operations.shadow:
            told.append("in shadow mode")
        if self.operations.disabled_arms:
            told.append(f"disabled: {', '.join(self.operations.disabled_arms)}")
        return "; ".join(told)

    async def _opened(self, opening: Opening) -> Place:
        assert self._routers is not None
        opened: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        task = self._routers.create_task(hold(opening, opened))
        try:
            return await opened
        except asyncio.CancelledError:
            task.cancel()
            raise


def _named(place: Place) -> str:
    manifest = place.router.manifest
    return f"{manifest.name} {manifest.version}"


def _canary_failed(error: Exception) -> None:
    known = isinstance(error, BundleInvalid | ConfigInvalid)
    _log.error(
        "the canary can't be served, so that the bundle serves all requests: %s",
        error if known else "unexpected error",
        exc_info=None if known else error,
    )

"""The router that serves now, and how another takes its place under load."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from bestroute.config import Settings
from bestroute.router import Router, open_router
from bestroute.tasks import task_group

_log = logging.getLogger(__name__)


class Live:
    """Serves with one router at a time; while it is `serving`, another may take its place.

    Attributes:
        replaced: how often another took the place.
        failed: how often one should have, but could not be opened.
    """

    def __init__(self) -> None:
        self.replaced = self.failed = 0
        self._routers: asyncio.TaskGroup | None = None
        self._now: _Place | None = None
        self._replacing = asyncio.Lock()

    @property
    def router(self) -> Router:
        """The one that serves now; whoever awaits anything with it has to be `using` it."""
        assert self._now is not None
        return self._now.router

    @contextmanager
    def using(self) -> Iterator[Router]:
        """The one that serves now, which stays open for as long as the block lasts."""
        place = self._now
        assert place is not None
        place.users += 1
        try:
            yield place.router
        finally:
            place.users -= 1
            if not place.users and place is not self._now:
                place.left.set()

    @asynccontextmanager
    async def serving(self, settings: Settings) -> AsyncIterator[None]:
        """Serve while the block lasts.

        A router that breaks, now or later, cancels the block; its error comes out of it.

        Raises:
            BundleInvalid: the bundle can't be served.
            ConfigInvalid: the settings don't fit the bundle or the machine.
        """
        async with task_group() as self._routers:
            self._now = await self._opened(settings)
            try:
                yield
            finally:
                last, self._now = self._now, None
                last.retire()

    async def replace(self, settings: Settings) -> None:
        """Open another router and let it take over; the former ends with its last request.

        Raises:
            BundleInvalid: the bundle can't be served; the former goes on.
            ConfigInvalid: the settings don't fit the bundle or the machine; the former goes on.
        """
        async with self._replacing:
            try:
                place = await self._opened(settings)
            except Exception:
                self.failed += 1
                raise
            former, self._now = self._now, place
            self.replaced += 1
            if former is not None:
                former.retire()
                await former.closed.wait()

    async def _opened(self, settings: Settings) -> "_Place":
        assert self._routers is not None
        opened: asyncio.Future[_Place] = asyncio.get_running_loop().create_future()
        opening = self._routers.create_task(_hold(settings, opened))
        try:
            return await opened
        except asyncio.CancelledError:
            opening.cancel()
            raise


class _Place:
    """A router that is open until it has retired and nobody uses it.

    Attributes:
        users: how many use it.
        left: set when it may be closed.
        closed: set when it is.
    """

    def __init__(self, router: Router) -> None:
        self.router, self.users = router, 0
        self.left, self.closed = asyncio.Event(), asyncio.Event()

    def retire(self) -> None:
        """Close it as soon as nobody uses it."""
        if not self.users:
            self.left.set()


async def _hold(settings: Settings, opened: "asyncio.Future[_Place]") -> None:
    """Open a router, keep it while it has its place, and close it."""
    try:
        async with open_router(settings) as router:
            if opened.cancelled():
                return
            place = _Place(router)
            opened.set_result(place)
            await place.left.wait()
        place.closed.set()
    except BaseException as error:
        if opened.done():
            raise
        opened.set_exception(error)
        if not isinstance(error, Exception):
            raise

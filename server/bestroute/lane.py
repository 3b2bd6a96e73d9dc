"""A thread that does one thing at a time for the event loop, which may wait a moment for it.

What is over within that moment costs no wake-up of the loop: 15 us beside a plain call, a fifth of
a hop to a `ThreadPoolExecutor` and back. What isn't becomes a future, so the loop is never held up
for longer, whatever the work does. The thread is a daemon: work that hangs doesn't keep a process
from ending, as a pool's would.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Lane(Generic[T]):
    """A thread.

    Args:
        name: of the thread.
        freed: is told, on the event loop's thread, whenever the lane may be used again.
    """

    def __init__(self, name: str, freed: "Callable[[Lane[T]], None]") -> None:
        self._freed = freed
        self._go, self._over = threading.Lock(), threading.Lock()
        self._first = threading.Lock()
        """Who takes it decides how the result is handed over: the thread, if it is ready while the
        loop still waits; or the loop, when it leaves."""
        self._go.acquire()
        self._over.acquire()
        self._work: Callable[[], T] | None = None
        self._value: T | None = None
        self._error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._future: asyncio.Future[T] | None = None
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def run(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Have work done; call it on the event loop's thread.

        Args:
            work: is called on the lane's thread.

        Returns:
            What the work will have given.
        """
        self._first.acquire()
        future = self._promised()
        self._work = work
        self._go.release()
        return future

    def run_soon(self, work: Callable[[], T], patience: float) -> "T | asyncio.Future[T]":
        """Have work done and wait for it, blocking, but not for long; else as `run`.

        Args:
            work: is called on the lane's thread.
            patience: seconds to wait at most.

        Returns:
            What the work gave if it was over in time, else the future of that.

        Raises:
            Exception: what the work raised, if it was over in time.
        """
        self._work = work
        self._go.release()
        if not self._over.acquire(timeout=patience):
            # The promise comes first: the thread looks for it once it finds the lock taken.
            future = self._promised()
            if self._first.acquire(blocking=False):
                return future
            self._over.acquire()
        self._first.release()
        self._freed(self)
        return self._result()

    def end(self) -> None:
        """End the thread, which must be idle."""
        self._work = None
        self._go.release()

    def _promised(self) -> "asyncio.Future[T]":
        self._loop = asyncio.get_running_loop()
        self._future = self._loop.create_future()
        return self._future

    def _serve(self) -> None:
        while True:
            self._go.acquire()
            work, self._work = self._work, None
            if work is None:
                return
            try:
                self._value = work()
            except BaseException as error:
                self._error = _raisable(error)
            del work
            if self._first.acquire(blocking=False):
                self._over.release()
                continue
            assert self._loop is not None
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop has been closed; nobody is left to hear of it
                return

    def _deliver(self) -> None:
        """Keep the promise; on the event loop's thread."""
        self._first.release()
        future, self._future, self._loop = self._future, None, None
        assert future is not None
        self._freed(self)
        try:
            value = self._result()
        except Exception as error:
            if not future.done():  # done, where whoever waited has left
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(value)

    def _result(self) -> T:
        value, self._value = self._value, None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # unset only where there is an error


def _raisable(error: BaseException) -> Exception:
    """The error as one that a future can hold and a task doesn't take for its own end."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    raised = RuntimeError(f"the work raised {error!r}")
    raised.__cause__ = error
    return raised

"""Threads for driver calls, each with a deadline: a call into the driver may never return."""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

from hive.errors import CudaDeviceFailed

T = TypeVar("T")
Calls: TypeAlias = "queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]"


SLICE_S = 0.25


class DriverHung(CudaDeviceFailed):
    """A driver call did not return in time; its thread is lost until it does."""


def _slices(seconds: float) -> Iterator[float]:
    """A deadline in pieces that must each be lived through.

    hive may have been stopped, or its host paused, for longer than the whole deadline: then the
    call's thread has not run either, and no device is lost for that.
    """
    while seconds > 0:
        yield min(SLICE_S, seconds)
        seconds -= SLICE_S


class Lane:
    """One thread that makes one call at a time, for one device.

    A call that is late makes the lane stuck: further calls fail at once, and no second thread is
    spent on the same device, until the call returns after all. The thread keeps hive's process from
    ending only where the kernel itself cannot end it (state D).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: Calls | None = None  # of the thread, once there is one
        self._asking = threading.Lock()
        self._late: Future[Any] | None = None

    @property
    def is_stuck(self) -> bool:
        return self._late is not None and not self._late.done()

    def ask(self, call: Callable[[], T], seconds: float) -> T:
        """`call`'s result; blocks the calling thread for up to `seconds`.

        Raises DriverHung on the deadline or when the lane is stuck, and whatever `call` raises.
        """
        future = self._submit(call)
        for slice_s in _slices(seconds):
            if futures.wait([future], slice_s).done:
                return future.result()
        raise self._give_up(future, seconds)

    async def wait(self, call: Callable[[], T], seconds: float) -> T:
        """Like `ask`, without blocking the event loop."""
        future = self._submit(call)
        waiting = asyncio.wrap_future(future)
        # Whoever waited may be gone when the answer comes: that is no forgotten exception.
        waiting.add_done_callback(lambda late: late.cancelled() or late.exception())
        for slice_s in _slices(seconds):
            # Never cancelled: wrap_future would pass that on, and the lane would look free.
            await asyncio.wait([waiting], timeout=slice_s)
            # The call's own future: `waiting` hears of its end a moment later.
            if future.done():
                return future.result()
        raise self._give_up(future, seconds)

    def _submit(self, call: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        with self._asking:
            if self.is_stuck:
                raise self._hung("still does not answer an earlier call")
            if self._calls is None:
                self._calls = queue.SimpleQueue()
                threading.Thread(
                    target=self._run, args=(self._calls,), name=self.name, daemon=True
                ).start()
            self._calls.put((call, future))
        return future

    def _run(self, calls: Calls) -> None:
        while (asked := calls.get()) is not None:
            call, future = asked
            try:
                future.set_result(call())
            except BaseException as exc:  # noqa: BLE001 (handed over to the caller's thread)
                future.set_exception(exc)

    def _give_up(self, future: "Future[Any]", seconds: float) -> DriverHung:
        self._late = future
        return self._hung(f"did not answer within {seconds:g} s")

    def _hung(self, what: str) -> DriverHung:
        return DriverHung(
            f"The NVIDIA driver {what}.",
            action="Check the driver with nvidia-smi and the kernel log; a hung driver needs a "
            "reset of the GPU or a reboot.",
        )

    def close(self) -> None:
        """Let the thread end after the call that it is in; may be called again."""
        with self._asking:
            if self._calls is not None:
                self._calls.put(None)
            self._calls = None

    def __repr__(self) -> str:
        return f"<Lane {self.name}{' stuck' if self.is_stuck else ''}>"

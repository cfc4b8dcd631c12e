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
Asked: TypeAlias = "tuple[Callable[[], Any], Future[Any]]"
Calls: TypeAlias = "queue.SimpleQueue[Asked | None]"

SLICE_S = 0.25


class DriverHung(CudaDeviceFailed):
    """A driver call did not return in time; its thread is lost until it does."""


def slices(seconds: float) -> Iterator[float]:
    """A deadline in pieces that must each be lived through.

    hive may have been stopped, or its host paused, for longer than the whole deadline: then the
    call's thread has not run either, and no device is lost for that.
    """
    while seconds > 0:
        yield min(SLICE_S, seconds)
        seconds -= SLICE_S


class Lane:
    """One thread that makes one call at a time, for one device.

    A call's time begins when it has its turn: who waits behind others blames the driver for none
    of theirs. A call that is late makes the lane stuck: who waits is told so, further calls fail at
    once, and no second thread is spent on the same device, until the call returns after all. Equal
    calls that wait for their turn are made once. The thread keeps hive's process from ending only
    where the kernel itself cannot end it (state D).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: Calls | None = None  # of the thread, once there is one
        self._asking = threading.Lock()
        self._waiting: list[Asked] = []  # for their turn
        self._turn: Future[Any] | None = None  # whose it is, or was last
        self._late: Future[Any] | None = None

    @property
    def is_stuck(self) -> bool:
        return self._late is not None and not self._late.done()

    def ask(self, call: Callable[[], T], seconds: float) -> T:
        """`call`'s result; blocks the calling thread, for up to `seconds` from the call's turn on.

        Raises DriverHung on the deadline or when the lane is stuck, and whatever `call` raises.
        """
        future = self._submit(call)
        for slice_s in self._patience(future, seconds):
            futures.wait([future], slice_s)
        return future.result()

    async def wait(self, call: Callable[[], T], seconds: float) -> T:
        """Like `ask`, without blocking the event loop."""
        future = self._submit(call)
        waiting = asyncio.wrap_future(future)
        # Whoever waited may be gone when the answer comes: that is no forgotten exception.
        waiting.add_done_callback(lambda late: late.cancelled() or late.exception())
        for slice_s in self._patience(future, seconds):
            # Never cancelled: wrap_future would pass that on, and the lane would look free.
            await asyncio.wait([waiting], timeout=slice_s)
        return future.result()

    def _patience(self, future: "Future[Any]", seconds: float) -> Iterator[float]:
        """How long to wait, again and again, until the call is done. Raises DriverHung."""
        turn: Future[Any] | None = future  # as on a lane with nothing else to do
        while True:
            for slice_s in slices(seconds):
                yield slice_s
                if future.done():
                    return
                if self.is_stuck:
                    raise self._hung("still does not answer an earlier call")
                if self._turn is not turn:
                    break
            else:
                self._late = turn
                raise self._hung(f"did not answer within {seconds:g} s")
            turn = self._turn

    def _submit(self, call: Callable[[], T]) -> "Future[T]":
        with self._asking:
            if self.is_stuck:
                raise self._hung("still does not answer an earlier call")
            for waiting, future in self._waiting:
                if waiting == call:
                    return future
            if self._calls is None:
                calls: Calls = queue.SimpleQueue()
                threading.Thread(
                    target=self._run, args=(calls,), name=self.name, daemon=True
                ).start()
                self._calls = calls
            asked: Asked = call, Future()
            self._waiting.append(asked)
            self._calls.put(asked)
        return asked[1]

    def _run(self, calls: Calls) -> None:
        while (asked := calls.get()) is not None:
            call, future = asked
            with self._asking:
                self._waiting.remove(asked)
                self._turn = future
            try:
                future.set_result(call())
            except BaseException as exc:  # noqa: BLE001 (handed over to the caller's thread)
                future.set_exception(exc)

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

"""A GPU's Xids as they come: heard in a thread of its own, handed over in heaps."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from hive.devices.lanes import DriverHung, slices
from hive.devices.nvml import EVENT_MS, Device, Driver
from hive.errors import HiveError

GATHER_S = 0.1  # a GPU may report thousands a second: each is counted, none waits longer


@dataclass(slots=True)
class Heard:
    """What came meanwhile: how often each Xid, and why no more will come; perhaps neither."""

    xids: Counter[int] = field(default_factory=Counter)
    error: HiveError | None = None


class Ear:
    """Hears one GPU; what refuses to tell may do so later, also after a release."""

    def __init__(self, driver: Driver, device: Device, retry_s: float) -> None:
        self._driver, self._device, self._retry_s = driver, device, retry_s
        self._heard: Heard | None = None
        self._handing_over = threading.Lock()
        self._is_there = asyncio.Event()
        self._rest_s = 0.0
        self._stop = threading.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while the block runs; the thread ends when the driver's call returns after that."""
        threading.Thread(
            target=self._listen,
            args=(asyncio.get_running_loop(),),
            name=f"nvml events {self._device.id}",
            daemon=True,
        ).start()
        try:
            yield
        finally:
            self._stop.set()

    async def news(self) -> Heard:
        """What came since the last time; a driver that does not even say "nothing" is an error."""
        await asyncio.sleep(self._rest_s)
        for slice_s in slices(self._driver.call_s + EVENT_MS / 1000):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(slice_s):
                    await self._is_there.wait()
            self._is_there.clear()
            with self._handing_over:
                heard, self._heard = self._heard, None
            if heard:
                self._rest_s = GATHER_S if heard.xids else 0.0
                return heard
        return Heard(error=DriverHung("The NVIDIA driver does not answer who waits for events."))

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._stop.is_set():
            try:
                for xid in self._driver.xids(self._device.uuid, self._stop):
                    self._hand_over(loop, xid, None)
            except HiveError as exc:
                self._hand_over(loop, None, exc)
                self._stop.wait(self._retry_s)

    def _hand_over(
        self, loop: asyncio.AbstractEventLoop, xid: int | None, error: HiveError | None
    ) -> None:
        with self._handing_over:
            is_first, heard = self._heard is None, self._heard or Heard()
            if xid is not None:
                heard.xids[xid] += 1
            heard.error = error
            self._heard = heard
        if is_first:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._is_there.set)

    def __repr__(self) -> str:
        return f"<Ear {self._device.id}>"

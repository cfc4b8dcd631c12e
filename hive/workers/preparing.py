"""Before anything starts: an earlier life's leavings are swept, and the preflight has passed."""

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar, cast

from hive.devices import nvml
from hive.errors import CudaDeviceNotFound, CudaDriverMissing
from hive.settings import Settings
from hive.workers import preflight
from hive.workers.janitor import sweep
from hive.workers.ledger import Ledger

log = logging.getLogger(__name__)
Result = TypeVar("Result")

ASKED_S = 1.0  # for what the preflight was asking to end
DRIVER_LOOK_S = 0.5  # how often a driver that is late at boot is looked for


async def prepared(
    settings: Settings, ledger: Ledger, driver: nvml.Driver
) -> Mapping[str, nvml.Device]:
    """The configured devices, when nothing is left of an earlier life and nothing is wrong."""
    # Before the preflight: what an earlier life left would hold the devices.
    for found in await sweep(ledger, settings.server.runtime_dir):
        log.warning("left by an earlier hive: %s", found)
    return await passed_preflight(settings, driver)


async def passed_preflight(settings: Settings, driver: nvml.Driver) -> Mapping[str, nvml.Device]:
    """The configured devices, once nothing is wrong with anything; at boot the driver may be late.

    Raises the worst of what is wrong after server.driver_wait_s.
    """
    waits_until = time.monotonic() + settings.server.driver_wait_s
    while True:
        stop = threading.Event()
        try:
            findings, resolved = await in_its_own_thread(
                functools.partial(preflight.check, settings, driver, stop=stop)
            )
        except asyncio.CancelledError:
            stop.set()  # what it has asked ends with it
            await asyncio.sleep(ASKED_S)
            raise
        wrong = [finding.error for finding in findings if finding.error]
        if not wrong:
            return resolved
        may_come = any(isinstance(e, CudaDriverMissing | CudaDeviceNotFound) for e in wrong)
        if not may_come or time.monotonic() >= waits_until:
            raise preflight.worst(wrong)
        await asyncio.sleep(DRIVER_LOOK_S)


async def unless(stopped: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What the work comes to; None if it is to be stopped before that."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
        return None
    finally:
        stopping.cancel()


async def in_its_own_thread(work: Callable[[], Result]) -> Result:
    """Like asyncio.to_thread, but the end of hive does not wait for it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def tell(result: Result | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast(Result, result))

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as exc:  # noqa: BLE001 (it is raised where it is waited for)
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, daemon=True).start()
    return await done

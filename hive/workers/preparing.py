"""Before anything starts: an earlier life's leavings are swept, and the preflight has passed."""

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from hive.devices import nvml
from hive.errors import CudaDeviceNotFound, CudaDriverMissing
from hive.settings import Settings
from hive.storage.threads import in_its_own_thread
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

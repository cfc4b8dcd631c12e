"""The daemon: builds every part and ties their lifetimes together.

Read `serve` downwards for the order of starting, upwards for the order of stopping.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from hive.devices import nvml
from hive.devices.watch import Devices
from hive.events import COUNTED, Announcer, DaemonMoved, RequestEnded
from hive.gateway.app import Gateway
from hive.gateway.listener import listening, raise_descriptor_limit
from hive.policy.lifecycle import State
from hive.settings import Settings
from hive.telemetry import logs, systemd
from hive.telemetry.metrics import Metrics
from hive.windows.keeping import keeping
from hive.workers import cgroup, directories, guard, preflight
from hive.workers.fleet import Fleet
from hive.workers.ledger import Ledger
from hive.workers.preparing import prepared, unless

log = logging.getLogger(__name__)

# A request makes some hundred objects and hardly a cycle: Python's own 700 is a look every few
# requests at what is about to be freed anyhow.
GC_AFTER = (10_000, 20, 20)
RECHECK_S = 10.0  # how often leaks that are known are looked at again


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; returns after everything that was started has ended.

    Raises the worst HiveError of the preflight before anything is started (R016, R017, C8), and
    AddressInUse when the port is taken.
    """
    with systemd.supervised(os.environ, settings) as notifier:
        inherited = systemd.inherited_socket(os.environ, settings)
        await serve_supervised(settings, notifier, inherited)


async def serve_supervised(
    settings: Settings, notifier: systemd.Notifier, inherited: socket.socket | None
) -> None:
    """`serve`, once who started hive is known; `inherited` replaces server.host and port."""
    stop_asked = stop_signals()
    most_connections = raise_descriptor_limit()
    preflight.prepare_directories(settings)
    with only_daemon(settings):
        announcer = Announcer()
        announcer.listen(logs.write, deaf_to=COUNTED)
        progress = systemd.Progress(notifier, settings)
        announcer.listen(progress.hear, deaf_to=(RequestEnded, *COUNTED))
        # Orphans of a killed guard come to hive, not to init.
        guard.become_subreaper()
        ledger = Ledger(settings.server.state_dir / "ledger", announcer.announce)
        driver = nvml.Driver(settings.server.driver_call_s)
        resolved = await unless(stop_asked.first, prepared(settings, ledger, driver))
        if resolved is None:  # stopped before anything was started
            announcer.announce(DaemonMoved("stopped"))
            return
        devices = Devices(driver, resolved, announcer)
        groups = await asyncio.to_thread(cgroup.find)
        fleet = Fleet(settings, devices, ledger, announcer, groups)
        metrics = Metrics(
            ((worker.id, worker.model) for worker in fleet.everyone()),
            (watched.device.id for watched in devices.watched.values()),
            fleet.doors,
        )
        announcer.listen(metrics.hear)
        async with keeping(settings, fleet, announcer) as kept:
            drain = stop_asked.first.set
            gateway = Gateway(
                settings, fleet, devices, ledger, announcer, metrics.text, drain, kept
            )
            async with (
                metrics.measuring_lag(),
                rechecking(ledger),
                listening(
                    gateway.app, settings, announcer, inherited, most_connections, gateway.entrance
                ),
                fleet.running(),
                devices.watching(),
            ):
                await fleet.start()
                gc.collect()
                gc.freeze()  # what exists now lives as long as hive: never look at it again
                gc.set_threshold(*GC_AFTER)
                await until_the_end(stop_asked, fleet)
                why = fleet.verdict.message if fleet.verdict else ""
                announcer.announce(DaemonMoved("stopping", why))
                gateway.close_streams()
                by = time.monotonic() + settings.server.drain_s
                await stop_fleet(fleet, stop_asked)
                if not fleet.verdict:
                    await unless(stop_asked.second, gateway.finish(by))
        await ledger.close()
        driver.close()
        announcer.announce(DaemonMoved("stopped"))
        be_deaf()
        if fleet.verdict:  # perhaps only while it was stopping
            raise fleet.verdict
        if error := ledger.error():
            raise error


async def until_the_end(asked: "StopAsked", fleet: Fleet) -> None:
    """Return when somebody asks for a stop, or when a device fails that hive ends with."""
    waiting = [asyncio.ensure_future(one.wait()) for one in (asked.first, fleet.condemned)]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for one in waiting:
        one.cancel()


@asynccontextmanager
async def rechecking(ledger: Ledger) -> AsyncIterator[None]:
    """Look from time to time whether what leaked is still there, while the block runs."""

    async def look() -> None:
        while True:
            await asyncio.sleep(RECHECK_S)
            if ledger.leaks:
                await ledger.recheck()

    async with asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(look(), name="recheck leaks")
        try:
            yield
        finally:
            looking.cancel()


def be_deaf() -> None:
    """All is over: a second signal in the last milliseconds must not make a bad exit of it."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


class StopAsked:
    """The first signal, or a drain, asks for a clean stop; a second signal for one without draining."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self._heard = False  # a signal, that is: being asked to drain is none

    def hear(self) -> None:
        (self.second if self._heard else self.first).set()
        self._heard = True


def stop_signals() -> StopAsked:
    asked = StopAsked()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.hear)
    loop.add_signal_handler(
        signal.SIGHUP, log.warning, "SIGHUP: hive does not reload its settings; restart it"
    )
    return asked


async def stop_fleet(fleet: Fleet, asked: StopAsked) -> None:
    """Drain and end every worker; a second signal, the first one after a verdict, ends the
    draining."""
    haste = asked.first if fleet.verdict else asked.second
    async with asyncio.TaskGroup() as tasks:
        stopping = tasks.create_task(fleet.stop(drain=True), name="stop fleet")
        hurry = tasks.create_task(haste.wait(), name="second signal")
        await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            for worker in fleet.workers.values():
                if worker.state in (State.READY, State.DRAINING):
                    await worker.stop(drain=False)
        await stopping
        hurry.cancel()


@contextmanager
def only_daemon(settings: Settings) -> Iterator[None]:
    """Hold both directories: two daemons in one would sweep each other's workers away."""
    with contextlib.ExitStack() as held:
        for key, path in directories.both(settings):
            with directories.usable(key, path):
                is_there = path.exists()
            if is_there:  # `hive sweep` makes none: there is nothing to sweep in it
                held.enter_context(directories.only_hive(key, path))
        yield

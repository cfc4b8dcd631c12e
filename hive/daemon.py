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
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hive.devices import nvml
from hive.devices.watch import Devices
from hive.errors import HiveError
from hive.events import COUNTED, Announcer, DaemonMoved, KeyRefused, RequestEnded
from hive.gateway.admin import MetricsText
from hive.gateway.app import Gateway
from hive.gateway.audit import AuditApi
from hive.gateway.listener import listening, raise_descriptor_limit
from hive.gateway.reload import ReloadApi
from hive.policy.lifecycle import State
from hive.reload import Apply, Reloader
from hive.settings import Settings
from hive.telemetry import logs, systemd
from hive.telemetry.alerts import DEAF_TO, Alerts
from hive.telemetry.audit import DIRECTORY, auditing
from hive.telemetry.engines import Scrape, answering
from hive.telemetry.metrics import Metrics
from hive.workers import cgroup, directories, guard, preflight
from hive.workers.fleet import Fleet
from hive.workers.ledger import Ledger
from hive.workers.preparing import prepared, unless

if TYPE_CHECKING:
    from hive.windows.keeping import Keeping

log = logging.getLogger(__name__)

# A request makes some hundred objects and hardly a cycle: Python's own 700 is a look every few
# requests at what is about to be freed anyhow.
GC_AFTER = (10_000, 20, 20)
RECHECK_S = 10.0  # how often leaks that are known are looked at again


async def serve(settings: Settings, reread: Callable[[], Settings]) -> None:
    """Serve until SIGTERM or SIGINT; returns after everything that was started has ended.

    `reread` loads the settings again, for a reload; blocking.
    Raises the worst HiveError of the preflight before anything is started (R016, R017, C8), and
    AddressInUse when the port is taken.
    """
    with systemd.supervised(os.environ, settings) as notifier:
        inherited = systemd.inherited_socket(os.environ, settings)
        await serve_supervised(settings, reread, notifier, inherited)


async def serve_supervised(
    settings: Settings,
    reread: Callable[[], Settings],
    notifier: systemd.Notifier,
    inherited: socket.socket | None,
) -> None:
    """`serve`, once who started hive is known; `inherited` replaces server.host and port."""
    stop_asked = stop_signals()
    most_connections = raise_descriptor_limit()
    preflight.prepare_directories(settings)
    with only_daemon(settings), listened_to(settings, notifier) as (announcer, alerts, applies):
        # Orphans of a killed guard come to hive, not to init.
        guard.become_subreaper()
        ledger = Ledger(settings.server.state_dir / "ledger", announcer.announce)
        driver = nvml.Driver(settings.server.driver_call_s)
        # What the start itself finds is told, too, and what an earlier life could not send.
        async with alerts.running():
            resolved = await unless(stop_asked.first, prepared(settings, ledger, driver))
            if resolved is None:  # stopped before anything was started
                announcer.announce(DaemonMoved("stopped"))
                return
            devices = Devices(driver, resolved, announcer)
            groups = await asyncio.to_thread(cgroup.find)
            fleet = Fleet(settings, devices, ledger, announcer, groups)
            reloader = Reloader(settings, reread, announcer)
            reloader.tells(*applies)
            if inherited is not None:
                reloader.asks(partial(systemd.must_be_guarded, inherited))
            async with windows_kept(settings, fleet, announcer) as kept:
                parts = Parts(settings, announcer, ledger, devices, fleet, reloader, alerts, kept)
                await serve_fleet(parts, stop_asked, inherited, most_connections)
            await ledger.close()
        driver.close()
        announcer.announce(DaemonMoved("stopped"))
        be_deaf()
        if fleet.verdict:  # perhaps only while it was stopping
            raise fleet.verdict
        if error := ledger.error():
            raise error


@dataclass(frozen=True, slots=True)
class Parts:
    """What serves, built and not yet running."""

    settings: Settings
    announcer: Announcer
    ledger: Ledger
    devices: Devices
    fleet: Fleet
    reloader: Reloader
    alerts: Alerts
    kept: "Keeping | None"


async def serve_fleet(
    parts: Parts,
    stop_asked: "StopAsked",
    inherited: socket.socket | None,
    most_connections: int,
) -> None:
    """Listen and run the workers, until a stop is asked for or a device fails; then stop them."""
    fleet, announcer, reloader = parts.fleet, parts.announcer, parts.reloader
    metrics = Metrics(
        ((worker.id, worker.model) for worker in fleet.everyone()),
        (watched.device.id for watched in parts.devices.watched.values()),
        fleet.doors,
    )
    announcer.listen(metrics.hear)
    scrape = Scrape(metrics, lambda: answering(fleet.everyone()))
    gateway = gateway_of(parts, scrape.text, partial(stop_asked.ask, "drain"))
    async with (
        metrics.measuring_lag(),
        rechecking(parts.ledger),
        listening(
            gateway.app,
            parts.settings,
            announcer,
            inherited,
            most_connections,
            gateway.entrance,
        ) as apply_to_connections,
        fleet.running(),
        parts.devices.watching(),
        reloading(reloader, stop_asked.reload),
    ):
        reloader.tells(fleet.apply, gateway.apply, apply_to_connections)
        if parts.kept is not None:
            reloader.tells(parts.kept.apply)
        parts.alerts.look_anew()  # not before: a start that fails has found nothing over
        await fleet.start()
        spare_collections()
        await until_the_end(stop_asked, fleet)
        reloader.close()
        announcer.announce(stopping(fleet, stop_asked))
        await stop_serving(gateway, fleet, stop_asked, reloader.settings.server.drain_s)


def gateway_of(parts: Parts, metrics: MetricsText, drain: Callable[[], None]) -> Gateway:
    settings = parts.settings
    return Gateway(
        settings,
        parts.fleet,
        parts.devices,
        parts.ledger,
        parts.announcer,
        metrics,
        drain,
        parts.alerts,
        parts.kept,
        (AuditApi(settings.server.state_dir / DIRECTORY), ReloadApi(parts.reloader.reload)),
    )


@contextmanager
def listened_to(
    settings: Settings, notifier: systemd.Notifier
) -> Iterator[tuple[Announcer, Alerts, tuple[Apply, ...]]]:
    """While the block runs, logs, systemd, the audit log and alerts hear what is announced.

    Yields what takes other settings, too.
    """
    announcer = Announcer()
    announcer.listen(logs.write, deaf_to=COUNTED)
    progress = systemd.Progress(notifier, settings)
    announcer.listen(progress.hear, deaf_to=(RequestEnded, *COUNTED))
    with auditing(settings, announcer.announce) as audit:
        announcer.listen(audit.hear, deaf_to=[kind for kind in COUNTED if kind is not KeyRefused])
        alerts = Alerts(settings, announcer)
        announcer.listen(alerts.hear, deaf_to=DEAF_TO)
        announcer.listen(alerts.outbox.hear, deaf_to=(RequestEnded, *COUNTED))
        yield announcer, alerts, (logs.apply, progress.apply, audit.apply, alerts.apply)


def spare_collections() -> None:
    """What exists now lives as long as hive: never look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_AFTER)


async def until_the_end(asked: "StopAsked", fleet: Fleet) -> None:
    """Return when somebody asks for a stop, or when a device fails that hive ends with."""
    waiting = [asyncio.ensure_future(one.wait()) for one in (asked.first, fleet.condemned)]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for one in waiting:
        one.cancel()


@asynccontextmanager
async def windows_kept(
    settings: Settings, fleet: Fleet, announcer: Announcer
) -> AsyncIterator["Keeping | None"]:
    """What keeps windows; where no model has them, nothing is loaded for it either.

    Raises ConfigInvalid, StoreUnreachable.
    """
    if fleet.site is None:
        yield None
        return
    from hive.windows.keeping import keeping  # noqa: PLC0415 (a third of hive's start, and 20 MB)

    async with keeping(settings, fleet, fleet.site.tier, announcer) as kept:
        yield kept


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


@asynccontextmanager
async def reloading(reloader: Reloader, asked: asyncio.Event) -> AsyncIterator[None]:
    """Reload whenever it is asked for, while the block runs; what it came to is announced."""

    async def reload() -> None:
        while True:
            await asked.wait()
            asked.clear()  # a file that changes from now on is read again
            with contextlib.suppress(HiveError):
                await reloader.reload("SIGHUP")

    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(reload(), name="reload")
        try:
            yield
        finally:
            waiting.cancel()


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
        self.reload = asyncio.Event()  # SIGHUP
        self.by = ""  # who was the first
        self._heard = False  # a signal, that is: being asked to drain is none

    def hear(self, number: signal.Signals) -> None:
        if self._heard:
            self.second.set()
        self._heard = True
        self.ask(number.name)

    def ask(self, by: str) -> None:
        """A clean stop, for `by`: a signal's name, or "drain"."""
        self.by = self.by or by
        self.first.set()

    def hear_hup(self) -> None:
        log.info("SIGHUP: hive reads its settings again, once it serves")
        self.reload.set()


def stop_signals() -> StopAsked:
    asked = StopAsked()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.hear, number)
    loop.add_signal_handler(signal.SIGHUP, asked.hear_hup)
    return asked


def stopping(fleet: Fleet, asked: "StopAsked") -> DaemonMoved:
    if fleet.verdict:
        return DaemonMoved("stopping", fleet.verdict.message, fleet.verdict.code)
    return DaemonMoved("stopping", by=asked.by)


async def stop_serving(gateway: Gateway, fleet: Fleet, asked: "StopAsked", drain_s: float) -> None:
    """End streams, workers and requests; these get `drain_s`, unless a device has failed."""
    gateway.close_streams()
    by = time.monotonic() + drain_s
    await stop_fleet(fleet, asked)
    if not fleet.verdict:
        await unless(asked.second, gateway.finish(by))


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

"""The daemon: builds every part and ties their lifetimes together.

Read `serve` downwards for the order of starting, upwards for the order of stopping.
"""

import asyncio
import errno
import fcntl
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

from hive.devices import nvml
from hive.devices.watch import Devices
from hive.errors import (
    AddressInUse,
    ConfigInvalid,
    CudaDeviceNotFound,
    CudaDriverMissing,
)
from hive.events import Announcer, DaemonMoved
from hive.gateway.app import Gateway
from hive.policy.lifecycle import State
from hive.settings import Settings
from hive.telemetry import logs, systemd
from hive.telemetry.metrics import Metrics
from hive.workers import cgroup, guard, preflight
from hive.workers.fleet import Fleet
from hive.workers.janitor import sweep
from hive.workers.ledger import Ledger

log = logging.getLogger(__name__)

BACKLOG = 1024
DRIVER_LOOK_S = 0.5  # how often a driver that is late at boot is looked for
RECHECK_S = 10.0  # how often leaks that are known are looked at again
CLOSE_S = 2.0  # for handlers to end after their workers did


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
    preflight.prepare_directories(settings)
    with only_daemon(settings):
        announcer = Announcer()
        announcer.listen(logs.write)
        announcer.listen(systemd.Progress(notifier, settings).hear)
        # Orphans of a killed guard come to hive, not to init.
        guard.become_subreaper()
        ledger = Ledger(settings.server.state_dir / "ledger", announcer.announce)
        # Before the preflight: what an earlier life left would hold the devices.
        for found in await sweep(ledger, settings.server.runtime_dir):
            log.warning("left by an earlier hive: %s", found)
        driver = nvml.Driver(settings.server.driver_call_s)
        resolved = await passed_preflight(settings, driver)
        devices = Devices(driver, resolved, announcer)
        groups = await asyncio.to_thread(cgroup.find)
        fleet = Fleet(settings, devices, ledger, announcer, groups)
        metrics = Metrics(
            ((worker.id, worker.model) for worker in fleet.workers.values()),
            (watched.device.id for watched in devices.watched.values()),
            fleet.doors,
        )
        announcer.listen(metrics.hear)
        gateway = Gateway(
            settings, fleet, devices, ledger, announcer, metrics.text, stop_asked.first.set
        )
        async with (
            metrics.measuring_lag(),
            rechecking(ledger),
            listening(gateway, settings, announcer, inherited),
            fleet.running(),
            devices.watching(),
        ):
            await fleet.start()
            gc.collect()
            gc.freeze()  # what exists now lives as long as hive: never look at it again
            await until_the_end(stop_asked, fleet)
            why = fleet.verdict.message if fleet.verdict else ""
            announcer.announce(DaemonMoved("stopping", why))
            gateway.close_streams()
            await stop_fleet(fleet, stop_asked)
        await ledger.close()
        driver.close()
        announcer.announce(DaemonMoved("stopped"))
        be_deaf()
        if fleet.verdict:  # perhaps only while it was stopping
            raise fleet.verdict
        if error := ledger.error():
            raise error


async def passed_preflight(settings: Settings, driver: nvml.Driver) -> Mapping[str, nvml.Device]:
    """The configured devices, once nothing is wrong with anything; at boot the driver may be late.

    Raises the worst of what is wrong after server.driver_wait_s.
    """
    waits_until = time.monotonic() + settings.server.driver_wait_s
    while True:
        findings, resolved = await asyncio.to_thread(preflight.check, settings, driver)
        wrong = [finding.error for finding in findings if finding.error]
        if not wrong:
            return resolved
        may_come = any(isinstance(e, CudaDriverMissing | CudaDeviceNotFound) for e in wrong)
        if not may_come or time.monotonic() >= waits_until:
            raise preflight.worst(wrong)
        await asyncio.sleep(DRIVER_LOOK_S)


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
    """The first signal asks for a clean stop, a second one for a stop without draining."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def hear(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def stop_signals() -> StopAsked:
    asked = StopAsked()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.hear)
    return asked


async def stop_fleet(fleet: Fleet, asked: StopAsked) -> None:
    """Drain and end every worker; a second signal ends the draining."""
    async with asyncio.TaskGroup() as tasks:
        stopping = tasks.create_task(fleet.stop(drain=True), name="stop fleet")
        hurry = tasks.create_task(asked.second.wait(), name="second signal")
        await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            for worker in fleet.workers.values():
                if worker.state in (State.READY, State.DRAINING):
                    await worker.stop(drain=False)
        await stopping
        hurry.cancel()


@asynccontextmanager
async def listening(
    gateway: Gateway,
    settings: Settings,
    announcer: Announcer,
    inherited: socket.socket | None = None,
) -> AsyncIterator[None]:
    """Accept connections while the block runs, on the inherited socket where there is one.

    Raises AddressInUse, or ConfigInvalid when the host cannot be bound.
    """
    runner = web.AppRunner(
        gateway.app,
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,  # a client that leaves cancels its request
        auto_decompress=False,
        shutdown_timeout=CLOSE_S,
        keepalive_timeout=75,
    )
    await runner.setup()
    try:
        sockets = [inherited] if inherited else bind(settings)
        for one in sockets:
            await web.SockSite(runner, one, backlog=BACKLOG).start()
        host, port = sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        announcer.announce(DaemonMoved("listening", f"http://{shown}:{port}"))
        yield
    finally:
        await runner.cleanup()


def bind(settings: Settings) -> list[socket.socket]:
    host, port = settings.server.host, settings.server.port
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as exc:
        raise ConfigInvalid(
            f"server.host: {host!r} is no address of this host: {exc.strerror}.",
            action="Set server.host to an address of this host, such as 127.0.0.1.",
        ) from exc
    family, kind, protocol, _, address = infos[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise AddressInUse(f"Port {port} of {host} is in use by another program.") from exc
        raise ConfigInvalid(
            f"server.host, server.port: cannot listen on {host}:{port}: {exc.strerror}.",
            action="Set server.host and server.port to an address that hive may listen on.",
        ) from exc
    sock.setblocking(False)
    return [sock]


@contextmanager
def only_daemon(settings: Settings) -> Iterator[None]:
    """Hold both directories: two daemons in one would sweep each other's workers away."""
    held = []
    try:
        for key in ("state_dir", "runtime_dir"):
            path = getattr(settings.server, key) / "hive.lock"
            if not path.parent.is_dir():
                continue  # of `hive sweep`, which makes none: there is nothing to sweep in it
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            held.append(fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                raise ConfigInvalid(
                    f"server.{key}: another hive (pid {holder}) runs in {path.parent}.",
                    action=f"Stop that hive, or set server.{key} to another directory.",
                ) from exc
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        for fd in held:
            os.close(fd)

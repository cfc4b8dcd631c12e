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
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

from hive.errors import AddressInUse, ConfigInvalid, HiveError
from hive.events import Announcer, DaemonMoved
from hive.gateway.app import Gateway
from hive.policy.lifecycle import State
from hive.settings import Settings
from hive.telemetry import logs
from hive.telemetry.metrics import Metrics
from hive.workers import guard, preflight
from hive.workers.fleet import Fleet
from hive.workers.process import sweep

log = logging.getLogger(__name__)

BACKLOG = 1024
CLOSE_S = 2.0  # for handlers to end after their workers did


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; returns after everything that was started has ended.

    Raises the worst HiveError of the preflight before anything is started (R016, R017, C8), and
    AddressInUse when the port is taken.
    """
    stop_asked = stop_signals()
    preflight.prepare_directories(settings)
    with only_daemon(settings):
        findings, uuids = await asyncio.to_thread(preflight.check, settings)
        if wrong := [finding.error for finding in findings if finding.error]:
            raise worst(wrong)
        announcer = Announcer()
        announcer.listen(logs.write)
        # Orphans of a killed guard come to hive, not to init.
        guard.become_subreaper()
        for found in await sweep(settings.server.runtime_dir):
            log.warning("left by an earlier hive, removed: %s", found)
        fleet = Fleet(settings, uuids, announcer)
        metrics = Metrics((worker.id, worker.model) for worker in fleet.workers.values())
        announcer.listen(metrics.hear)
        gateway = Gateway(settings, fleet, announcer, metrics.text)
        async with (
            metrics.measuring_lag(),
            listening(gateway, settings, announcer),
            fleet.running(),
        ):
            await fleet.start()
            gc.collect()
            gc.freeze()  # what exists now lives as long as hive: never look at it again
            await stop_asked.first.wait()
            announcer.announce(DaemonMoved("stopping"))
            gateway.close_streams()
            await stop_fleet(fleet, stop_asked)
        announcer.announce(DaemonMoved("stopped"))
        be_deaf()


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
    gateway: Gateway, settings: Settings, announcer: Announcer
) -> AsyncIterator[None]:
    """Accept connections while the block runs.

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
        sockets = bind(settings)
        for one in sockets:
            await web.SockSite(runner, one, backlog=BACKLOG).start()
        host, port = sockets[0].getsockname()[:2]
        announcer.announce(DaemonMoved("listening", f"http://{host}:{port}"))
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


def worst(errors: list[HiveError]) -> HiveError:
    """The error to end with: the most severe, the first of several; it names all the others."""
    order = ["info", "medium", "high", "critical", "emergency"]
    chosen = max(errors, key=lambda error: order.index(str(error.severity)))
    chosen.details = {**chosen.details, "problems": [error.message for error in errors]}
    return chosen

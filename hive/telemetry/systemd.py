"""The service manager's side of hive: what it is told, what it watches, what it hands over.

Everything is read from the environment that systemd gives (sd_notify, WatchdogSec=, socket units)
and taken out of it, so that no child of hive can speak for hive. Without those variables every
part here does nothing.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from ipaddress import IPv6Address, ip_address

from hive.errors import ConfigInvalid, HiveError
from hive.events import DaemonMoved, Event, ReloadBegan, ReloadEnded, WorkerMoved
from hive.policy.lifecycle import State
from hive.policy.redaction import without_secrets
from hive.settings import Settings
from hive.workers.preflight import VERSIONS_S

log = logging.getLogger(__name__)

FEED_S = 0.01  # a watchdog is not fed more often, since that would be all that hive did
FIRST_FD = 3  # where inherited descriptors begin, by the protocol
START_MARGIN_S = 60.0  # beside waiting for the driver and asking engines: imports, devices, a sweep
STOP_MARGIN_S = 20.0  # beside draining, TERM and KILL: proof that all is gone, closing connections
DIGITS = 18  # of a number in the environment: of microseconds these are 30,000 years
NAMED = 5  # workers that a status names one by one


def start_s(settings: Settings) -> float:
    """Longest time from the start to READY=1, seconds."""
    return settings.server.driver_wait_s + VERSIONS_S * len(settings.models) + START_MARGIN_S


def stop_s(settings: Settings) -> float:
    """Longest time that a clean stop takes, seconds; TimeoutStopSec= is this for the defaults."""
    limits = [settings.timeouts_of(model) for model in settings.models.values()]
    longest = max(one.cleanup_s + one.kill_s for one in limits or [settings.timeouts])
    # The LMCache server ends after the engines that use it.
    has_cache = any(model.windows for model in settings.models.values())
    own = settings.timeouts.cleanup_s + settings.timeouts.kill_s if has_cache else 0.0
    return settings.server.drain_s + longest + own + STOP_MARGIN_S


class Notifier:
    """sd_notify: sends to NOTIFY_SOCKET, never blocks and never raises for it.

    What could not be sent goes with the next message, so a full socket delays READY=1 only.
    """

    def __init__(self, env: MutableMapping[str, str]) -> None:
        address = env.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        self._unsent: dict[str, str] = {}
        self._is_lost = False  # the last message was not taken, and that has been logged
        if address.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        elif address:
            log.warning("NOTIFY_SOCKET is no unix socket; systemd is not told anything")

    def tell(self, **fields: object) -> None:
        """Send assignments such as READY="1" in one message."""
        if self._socket is None:
            return
        self._unsent |= {name: " ".join(str(value).split()) for name, value in fields.items()}
        text = "".join(f"{name}={value}\n" for name, value in self._unsent.items())
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError as exc:
            if not self._is_lost:
                log.warning("systemd's notify socket takes nothing: %s", exc.strerror or exc)
            self._is_lost = True
        else:
            self._unsent.clear()
            self._is_lost = False

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __repr__(self) -> str:
        return f"<Notifier {self._address or 'off'}{' unheard' if self._is_lost else ''}>"


class Watchdog:
    """WATCHDOG=1 twice in each WATCHDOG_USEC, sent by the event loop itself and by nothing else.

    A loop that stands still is silent, and systemd ends hive. `every_s` is None when nobody watches.
    """

    def __init__(self, env: MutableMapping[str, str], notifier: Notifier) -> None:
        self._notifier = notifier
        self.every_s: float | None = None
        limit = env.pop("WATCHDOG_USEC", "")
        watched = env.pop("WATCHDOG_PID", "") or str(os.getpid())
        if limit and watched == str(os.getpid()):
            if usec := _number(limit):
                self.every_s = max(FEED_S, usec / 2 / 1e6)
            else:
                log.warning("WATCHDOG_USEC is no number of microseconds; the watchdog is not fed")

    @contextmanager
    def fed(self) -> Iterator[None]:
        """Feed it while the block runs in the event loop."""
        loop = asyncio.get_running_loop()
        next_meal: asyncio.TimerHandle | None = None

        def feed(every_s: float) -> None:
            nonlocal next_meal
            self._notifier.tell(WATCHDOG=1)
            next_meal = loop.call_later(every_s, feed, every_s)

        if self.every_s is not None:
            feed(self.every_s)
        try:
            yield
        finally:
            if next_meal is not None:
                next_meal.cancel()

    def __repr__(self) -> str:
        return f"<Watchdog {f'every {self.every_s:g} s' if self.every_s else 'off'}>"


class Progress:
    """The listener that tells systemd how far hive is: READY=1, STATUS, STOPPING=1."""

    def __init__(self, notifier: Notifier, settings: Settings) -> None:
        self._notifier = notifier
        self._models = frozenset(settings.models)
        self._stop_s = stop_s(settings)
        self._workers: dict[str, WorkerMoved] = {}  # the last move of each
        self._is_stopping = False
        self._told = ""

    def apply(self, settings: Settings) -> None:
        """From now on a stop may take as long as these say."""
        self._stop_s = stop_s(settings)

    def hear(self, event: Event) -> None:
        match event:
            case ReloadBegan() | ReloadEnded() if self._is_stopping:
                pass  # it is refused, and hive is not ready again
            case ReloadBegan():
                usec = time.monotonic_ns() // 1000  # tells this reload from an earlier one
                self._notifier.tell(RELOADING=1, MONOTONIC_USEC=usec)
            case ReloadEnded():
                self._told = f"reload refused: {event.code}; {self.status}" if event.code else ""
                self._notifier.tell(READY=1, STATUS=self._told or self.status)
            case WorkerMoved():
                self._workers[event.worker] = event
                if (status := self.status) != self._told:
                    self._told = status
                    self._notifier.tell(STATUS=status)
            case DaemonMoved(state="listening"):
                self._told = self.status
                self._notifier.tell(READY=1, STATUS=self._told)
            case DaemonMoved(state="stopping"):
                self._is_stopping = True
                self._told = self.status
                # A drain_s above the unit's TimeoutStopSec= is kept all the same.
                self._notifier.tell(
                    STOPPING=1, STATUS=self._told, EXTEND_TIMEOUT_USEC=_usec(self._stop_s)
                )
            case DaemonMoved(state="stopped"):
                self._notifier.tell(STATUS="stopped")

    @property
    def status(self) -> str:
        """One line: "serving 1 of 2 models; llama-0 LOADING"."""
        moves = self._workers.values()
        if self._is_stopping:
            doing, expected = "stopping", State.STOPPED
        else:
            serving = {move.model for move in moves if move.new == State.READY}
            doing = f"serving {len(serving)} of {len(self._models)} models"
            expected = State.READY
        rest = [f"{move.worker} {move.new}" for move in moves if move.new != expected]
        more = [f"{len(rest) - NAMED} more"] if rest[NAMED:] else []
        return "; ".join([doing, *([", ".join(rest[:NAMED] + more)] if rest else [])])

    def __repr__(self) -> str:
        return f"<Progress {self.status}>"


@contextmanager
def supervised(env: MutableMapping[str, str], settings: Settings) -> Iterator[Notifier]:
    """Feed the watchdog and keep the notifier while the block runs.

    The error that ends the block is systemd's last STATUS, where `systemctl status` shows it.
    """
    notifier = Notifier(env)
    notifier.tell(
        STATUS="preflight: looking at devices, engines and models",
        EXTEND_TIMEOUT_USEC=_usec(start_s(settings)),
    )
    try:
        with Watchdog(env, notifier).fed():
            yield notifier
    except HiveError as exc:
        notifier.tell(STATUS=without_secrets(f"{exc.code}: {exc.message}"))
        raise
    finally:
        notifier.close()


def inherited_socket(
    env: MutableMapping[str, str], settings: Settings, first_fd: int = FIRST_FD
) -> socket.socket | None:
    """The listening TCP socket that a socket unit passed to this process; None without one.

    Raises ConfigInvalid, naming the unit, when it is not one TCP socket that listens, or when its
    address is not loopback and there are no API keys: the rule for server.host holds here, too.
    """
    count, pid = env.pop("LISTEN_FDS", ""), env.pop("LISTEN_PID", "")
    named = env.pop("LISTEN_FDNAMES", "").split(":")[0]  # the unit's name, unless it says another
    unit = named if named.endswith(".socket") else "hive.socket"
    env.pop("LISTEN_PIDFDID", "")
    if pid != str(os.getpid()) or not count.isdecimal() or count == "0":
        return None
    if count != "1":
        raise ConfigInvalid(
            f"The socket unit {unit} passes {count[:DIGITS]} sockets; hive serves on one.",
            action=f"Leave one ListenStream= in {unit}, then restart the socket unit.",
        )
    try:
        os.set_inheritable(first_fd, False)
        sock = socket.socket(fileno=first_fd)
    except OSError as exc:
        raise _no_listener(unit) from exc
    try:
        _must_listen(sock, unit)
        must_be_guarded(sock, settings, unit)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _must_listen(sock: socket.socket, unit: str) -> None:
    kind = (sock.type, sock.proto)
    is_tcp = kind == (socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if (
        sock.family not in (socket.AF_INET, socket.AF_INET6)
        or not is_tcp
        or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        raise _no_listener(unit)


def _no_listener(unit: str) -> ConfigInvalid:
    return ConfigInvalid(
        f"The socket unit {unit} passes something that is not a listening TCP socket.",
        action=f"Give {unit} one ListenStream=ADDRESS:PORT and Accept=no.",
    )


def must_be_guarded(sock: socket.socket, settings: Settings, unit: str = "hive.socket") -> None:
    """Raises ConfigInvalid for an address that is not loopback, without API keys."""
    host = str(sock.getsockname()[0])
    address = ip_address(host.partition("%")[0])
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address
    if not address.is_loopback and not settings.auth.keys:
        raise ConfigInvalid(
            f"The socket unit {unit} listens on {host}, which is not loopback, so API keys are "
            "needed.",
            action=f"Make a key with 'hive key new NAME', or set ListenStream=127.0.0.1:PORT in "
            f"{unit}.",
        )


def _number(text: str) -> int:
    """A whole number from the environment; 0 for what is none."""
    return int(text) if text.isdecimal() and len(text) <= DIGITS else 0


def _usec(seconds: float) -> int:
    return round(seconds * 1e6)

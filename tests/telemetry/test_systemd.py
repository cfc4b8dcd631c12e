"""What systemd is told and what it hands over, against real sockets; then the daemon itself."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hive.errors import ConfigInvalid, CudaDriverMissing
from hive.events import DaemonMoved, ReloadBegan, ReloadEnded, WorkerMoved
from hive.gateway import listener
from hive.settings import ApiKey, Settings
from hive.telemetry.systemd import (
    STOP_MARGIN_S,
    Notifier,
    Progress,
    Watchdog,
    inherited_socket,
    must_be_guarded,
    start_s,
    stop_s,
    supervised,
)
from hive.workers import guard, process, worker
from steps.driver import Hive
from steps.waiting import must, until
from tests.patience import awaited
from tests.patience import until as until_

ME = str(os.getpid())
MODEL = {"engine": "command", "device": "cpu", "command": ["prog", "{socket}"]}
WATCHED = {"WATCHDOG_USEC": "400000"}
# As systemd does it: descriptors from 3 on, and the pid of the program that is to have them.
PASS_ON = """
import fcntl, os, sys
count = int(sys.argv[1])
given = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[2:2 + count]]
for number, fd in enumerate(given, 3):
    os.dup2(fd, number)
os.closerange(3 + count, 256)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count))
os.execv(sys.argv[2 + count], sys.argv[2 + count:])
"""


class NotifySocket:
    """The receiving end that systemd has."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def look(self) -> list[dict[str, str]]:
        """Every message so far, the fields of each."""
        try:
            while True:
                text = self._socket.recv(65536).decode()
                self.messages.append(dict(line.split("=", 1) for line in text.splitlines()))
        except BlockingIOError:
            return self.messages

    def told(self, name: str) -> list[str]:
        """Every value of a field so far."""
        return [message[name] for message in self.look() if name in message]

    def must_tell(self, name: str, value: str, seconds: float = 20) -> None:
        must(lambda: value in self.told(name), seconds, lambda: f"{name}={value}: {self.messages}")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(short_dir: Path) -> Iterator[NotifySocket]:
    manager = NotifySocket(str(short_dir / "notify"))
    yield manager
    manager.close()


@pytest.fixture
def notifier(systemd: NotifySocket) -> Iterator[Notifier]:
    made = Notifier({"NOTIFY_SOCKET": systemd.address})
    yield made
    made.close()


def settings(*models: str, host: str = "127.0.0.1", keys: int = 0, **server: object) -> Settings:
    made = [ApiKey(name=f"k{number}", sha256=f"{number:064}") for number in range(keys)]
    return Settings.model_validate(
        {
            "server": {"host": host, "runtime_dir": "/run/hive", **server},
            "models": dict.fromkeys(models or ("m",), MODEL),
            "auth": {"keys": made},
        }
    )


def moved(name: str, new: str) -> WorkerMoved:
    return WorkerMoved(name, name.rpartition("-")[0], "STOPPED", new)


# ── sd_notify ───────────────────────────────────────────────────────────────────────────────────


def test_a_message_reaches_a_socket_in_the_file_system(
    systemd: NotifySocket, notifier: Notifier
) -> None:
    notifier.tell(READY=1, STATUS="serving 0 of 1 models")

    assert systemd.look() == [{"READY": "1", "STATUS": "serving 0 of 1 models"}]


def test_a_message_reaches_an_abstract_socket() -> None:
    manager = NotifySocket(f"@hive-test-{secrets.token_hex(8)}")
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    try:
        notifier.tell(STATUS="here")

        assert manager.look() == [{"STATUS": "here"}]
    finally:
        notifier.close()
        manager.close()


def test_nobody_is_told_without_a_notify_socket() -> None:
    notifier = Notifier({})

    notifier.tell(READY=1)

    assert repr(notifier) == "<Notifier off>"


def test_what_systemd_gave_is_taken_out_of_the_environment(systemd: NotifySocket) -> None:
    env = {
        "NOTIFY_SOCKET": systemd.address,
        "WATCHDOG_USEC": "1000000",
        "WATCHDOG_PID": ME,
        "LISTEN_FDS": "1",
        "LISTEN_PID": "1",
        "LISTEN_FDNAMES": "hive.socket",
        "PATH": "/bin",
    }
    notifier = Notifier(env)
    Watchdog(env, notifier)
    inherited_socket(env, settings())
    notifier.close()

    assert env == {"PATH": "/bin"}


def test_a_value_of_several_lines_cannot_make_another_assignment(
    systemd: NotifySocket, notifier: Notifier
) -> None:
    notifier.tell(STATUS="the cause:\nREADY=1")

    assert systemd.look() == [{"STATUS": "the cause: READY=1"}]


def test_a_full_socket_delays_a_message_and_nothing_else(
    systemd: NotifySocket, notifier: Notifier, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel queues no more than net.unix.max_dgram_qlen messages, 10 or some hundred."""
    sent = 0
    while "unheard" not in repr(notifier):
        sent += 1
        notifier.tell(WATCHDOG=1)
        assert sent < 100_000
    notifier.tell(READY=1)
    notifier.tell(STATUS="old")
    notifier.tell(STATUS="new")
    assert systemd.told("READY") == []

    notifier.tell(WATCHDOG=1)

    assert systemd.look()[-1] == {"WATCHDOG": "1", "READY": "1", "STATUS": "new"}
    assert len(caplog.records) == 1
    notifier.tell(STATUS="newer")
    assert systemd.look()[-1] == {"STATUS": "newer"}


def test_a_socket_that_is_gone_is_logged_once_and_found_again(
    systemd: NotifySocket, notifier: Notifier, caplog: pytest.LogCaptureFixture
) -> None:
    systemd.close()
    os.unlink(systemd.address)
    notifier.tell(READY=1)
    notifier.tell(STATUS="alone")
    assert [record.levelname for record in caplog.records] == ["WARNING"]

    again = NotifySocket(systemd.address)
    try:
        notifier.tell(WATCHDOG=1)

        assert again.look() == [{"READY": "1", "STATUS": "alone", "WATCHDOG": "1"}]
    finally:
        again.close()


def test_an_address_of_another_kind_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": "vsock:2:1234"})

    notifier.tell(READY=1)

    assert "NOTIFY_SOCKET" in caplog.text


# ── the watchdog ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("env", "every_s"),
    [
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": ME}, 15),
        ({"WATCHDOG_USEC": "30000000"}, 15),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "9" * 400}, None),
        ({"WATCHDOG_USEC": "9" * 5000}, None),
        ({"WATCHDOG_USEC": "1"}, 0.01),
        ({"WATCHDOG_PID": ME}, None),
        ({}, None),
    ],
    ids=[
        *("mine", "no pid", "another's", "off", "no number", "too long", "much too long"),
        *("too often", "no limit", "nothing"),
    ],
)
def test_the_watchdog_is_fed_in_half_its_time(env: dict[str, str], every_s: float | None) -> None:
    assert Watchdog(dict(env), Notifier({})).every_s == every_s


@awaited
async def test_a_loop_that_stands_still_feeds_nobody(
    systemd: NotifySocket, notifier: Notifier
) -> None:
    watchdog = Watchdog({"WATCHDOG_USEC": "20000"}, notifier)

    with watchdog.fed():
        await until_(lambda: len(systemd.told("WATCHDOG")) > 3, "the watchdog fed")
        fed = len(systemd.told("WATCHDOG"))
        time.sleep(0.2)  # noqa: ASYNC251 (what the loop does here is to stand still)
        assert len(systemd.told("WATCHDOG")) == fed
        await until_(lambda: len(systemd.told("WATCHDOG")) > fed, "the watchdog fed again")


@awaited
async def test_nothing_is_fed_after_the_block(systemd: NotifySocket, notifier: Notifier) -> None:
    watchdog = Watchdog({"WATCHDOG_USEC": "20000"}, notifier)
    with watchdog.fed():
        pass
    fed = len(systemd.told("WATCHDOG"))

    await asyncio.sleep(0.1)

    assert len(systemd.told("WATCHDOG")) == fed == 1


@awaited
async def test_an_unwatched_hive_feeds_nobody(systemd: NotifySocket, notifier: Notifier) -> None:
    with Watchdog({}, notifier).fed():
        pass

    assert systemd.look() == []


# ── the status ──────────────────────────────────────────────────────────────────────────────────


def test_each_step_of_hives_life_is_told(systemd: NotifySocket, notifier: Notifier) -> None:
    progress = Progress(notifier, settings("llama", "other"))
    for event in (
        DaemonMoved("listening", "http://127.0.0.1:7411"),
        moved("llama-0", "STARTING"),
        moved("llama-0", "LOADING"),
        moved("other-0", "STARTING"),
        moved("other-0", "READY"),
        moved("llama-0", "READY"),
        DaemonMoved("stopping"),
        moved("llama-0", "DRAINING"),
        moved("other-0", "STOPPED"),
        moved("llama-0", "STOPPED"),
        DaemonMoved("stopped"),
    ):
        progress.hear(event)

    assert systemd.told("STATUS") == [
        "serving 0 of 2 models",
        "serving 0 of 2 models; llama-0 STARTING",
        "serving 0 of 2 models; llama-0 LOADING",
        "serving 0 of 2 models; llama-0 LOADING, other-0 STARTING",
        "serving 1 of 2 models; llama-0 LOADING",
        "serving 2 of 2 models",
        "stopping; llama-0 READY, other-0 READY",
        "stopping; llama-0 DRAINING, other-0 READY",
        "stopping; llama-0 DRAINING",
        "stopping",
        "stopped",
    ]
    assert [i for i, message in enumerate(systemd.messages) if "READY" in message] == [0]
    assert [i for i, message in enumerate(systemd.messages) if "STOPPING" in message] == [6]


def test_a_model_is_served_by_any_of_its_workers(systemd: NotifySocket, notifier: Notifier) -> None:
    progress = Progress(notifier, settings("m"))
    for event in (moved("m-0", "READY"), moved("m-1", "READY"), moved("m-0", "FAILED")):
        progress.hear(event)

    assert systemd.told("STATUS") == [
        "serving 1 of 1 models",
        "serving 1 of 1 models; m-0 FAILED",
    ]


def test_a_status_stays_one_short_line(notifier: Notifier) -> None:
    progress = Progress(notifier, settings("m"))
    for number in range(9):
        progress.hear(moved(f"m-{number}", "LOADING"))

    assert progress.status.endswith("m-3 LOADING, m-4 LOADING, 4 more")


def test_a_longer_draining_than_the_units_is_asked_for(
    systemd: NotifySocket, notifier: Notifier
) -> None:
    Progress(notifier, settings("m", drain_s=600)).hear(DaemonMoved("stopping"))

    assert systemd.told("EXTEND_TIMEOUT_USEC") == ["630000000"]


def test_a_stop_takes_no_longer_than_is_told() -> None:
    slow = {"timeouts": {"cleanup_s": 60, "kill_s": 30, "inference_s": 1, "request_s": 90}}
    both = Settings.model_validate(
        {"server": {"runtime_dir": "/run/hive"}, "models": {"m": MODEL, "n": MODEL | slow}}
    )
    after_kill_s = process.ANSWER_S + worker.VRAM_S + listener.CLOSE_S

    assert after_kill_s <= STOP_MARGIN_S
    assert stop_s(settings()) == 30 + 5 + 5 + STOP_MARGIN_S
    assert stop_s(both) == 30 + 60 + 30 + STOP_MARGIN_S


def test_a_start_may_take_longer_with_more_models() -> None:
    assert start_s(settings("a", "b", "c")) - start_s(settings("a")) == 120
    assert start_s(settings(driver_wait_s=45)) - start_s(settings()) == 45


@awaited
async def test_the_error_that_ends_hive_is_the_last_status(systemd: NotifySocket) -> None:
    def fail() -> None:
        with supervised({"NOTIFY_SOCKET": systemd.address}, settings()):
            raise CudaDriverMissing

    with pytest.raises(CudaDriverMissing):
        fail()

    first, last = systemd.look()
    assert first["STATUS"].startswith("preflight")
    assert int(first["EXTEND_TIMEOUT_USEC"]) == start_s(settings()) * 1e6
    assert last["STATUS"] == f"CUDA_DRIVER_MISSING: {CudaDriverMissing.summary}"


def test_a_reload_is_told_as_systemd_wants_it(systemd: NotifySocket, notifier: Notifier) -> None:
    """RELOADING=1 with the time, then READY=1, and what came of it in the status."""
    progress = Progress(notifier, settings("m"))
    progress.hear(DaemonMoved("listening"))
    before = time.monotonic_ns() // 1000
    progress.hear(ReloadBegan("SIGHUP"))
    progress.hear(ReloadEnded("SIGHUP", ("server.drain_s",)))
    progress.hear(ReloadBegan("SIGHUP"))
    progress.hear(ReloadEnded("SIGHUP", (), "RELOAD_REFUSED", ("server.port",)))
    progress.hear(moved("m-0", "READY"))

    _, began, done, again, refused, later = systemd.look()
    assert began["RELOADING"] == again["RELOADING"] == "1"
    assert before <= int(began["MONOTONIC_USEC"]) <= int(again["MONOTONIC_USEC"])
    assert done == {"READY": "1", "STATUS": "serving 0 of 1 models"}
    assert refused["READY"] == "1"
    assert refused["STATUS"] == "reload refused: RELOAD_REFUSED; serving 0 of 1 models"
    assert later == {"STATUS": "serving 1 of 1 models"}


def test_a_reload_while_hive_stops_makes_it_not_ready_again(
    systemd: NotifySocket, notifier: Notifier
) -> None:
    progress = Progress(notifier, settings("m"))
    progress.hear(DaemonMoved("stopping"))
    progress.hear(ReloadBegan("SIGHUP"))
    progress.hear(ReloadEnded("SIGHUP", (), "CONFLICT"))

    assert systemd.told("READY") == systemd.told("RELOADING") == []


def test_a_longer_drain_after_a_reload_is_told_when_hive_stops(
    systemd: NotifySocket, notifier: Notifier
) -> None:
    progress = Progress(notifier, settings("m"))
    progress.apply(settings("m", drain_s=600))
    progress.hear(DaemonMoved("stopping"))

    (usec,) = systemd.told("EXTEND_TIMEOUT_USEC")
    assert int(usec) == 1e6 * stop_s(settings("m", drain_s=600))


def test_a_reload_may_not_take_the_keys_from_an_open_socket() -> None:
    """The address is the unit's, so the configuration alone cannot tell."""
    with contextlib.closing(socket.create_server(("0.0.0.0", 0))) as sock:
        must_be_guarded(sock, settings("m", keys=1))
        with pytest.raises(ConfigInvalid, match="not loopback"):
            must_be_guarded(sock, settings("m"))


# ── an inherited socket ─────────────────────────────────────────────────────────────────────────


def inherit(
    fd: int, made: Settings | None = None, count: int = 1, pid: str = ME, names: str = ""
) -> socket.socket | None:
    env = {"LISTEN_FDS": str(count), "LISTEN_PID": pid, "LISTEN_FDNAMES": names}
    return inherited_socket(env, made or settings(), first_fd=fd)


def test_a_listening_socket_is_taken_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        fd = listener.detach()
        os.set_inheritable(fd, True)
        sock = inherit(fd)
        assert sock
        with sock:
            assert sock.fileno() == fd
            assert sock.getsockname() == ("127.0.0.1", port)
            assert not sock.get_inheritable()
            assert sock.gettimeout() == 0


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "0", "LISTEN_PID": ME},
        {"LISTEN_FDS": "", "LISTEN_PID": ME},
    ],
    ids=["nothing", "another's", "nobody's", "none", "empty"],
)
def test_a_socket_that_is_not_for_hive_is_not_taken(env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert inherited_socket(env, settings(), first_fd=listener.fileno()) is None


def test_two_sockets_are_refused() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(ConfigInvalid, match=r"front\.socket passes 2 sockets") as caught,
    ):
        inherit(listener.fileno(), count=2, names="front.socket:front.socket")

    assert "ListenStream=" in caught.value.suggested_action


@pytest.mark.parametrize("count", ["1000000000", "9" * 5000])
def test_more_sockets_than_there_can_be_are_refused_at_once(count: str) -> None:
    env = {"LISTEN_FDS": count, "LISTEN_PID": ME}
    with pytest.raises(ConfigInvalid, match=r"passes \d{10,18} sockets; hive serves on one"):
        inherited_socket(env, settings())


def unix_stream() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\0hive-test-{secrets.token_hex(8)}")
    sock.listen()
    return sock


def bound(kind: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind(("127.0.0.1", 0))
    return sock


@pytest.mark.parametrize(
    "make",
    [
        lambda: unix_stream().detach(),
        lambda: bound(socket.SOCK_DGRAM).detach(),
        lambda: bound(socket.SOCK_STREAM).detach(),
    ],
    ids=["unix", "UDP", "not listening"],
)
def test_a_socket_of_another_kind_is_refused(make: Callable[[], int]) -> None:
    fd = make()
    with pytest.raises(ConfigInvalid, match=r"hive\.socket passes something"):
        inherit(fd)

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)  # closed with the refusal


def test_a_descriptor_that_is_no_socket_is_refused(tmp_path: Path) -> None:
    with (
        (tmp_path / "file").open("w") as file,
        pytest.raises(ConfigInvalid, match="not a listening TCP socket"),
    ):
        inherit(file.fileno())


@pytest.mark.parametrize(
    ("family", "host", "needs_keys"),
    [
        (socket.AF_INET, "127.0.0.1", False),
        (socket.AF_INET, "127.1.2.3", False),
        (socket.AF_INET6, "::1", False),
        (socket.AF_INET6, "::ffff:127.0.0.1", False),
        (socket.AF_INET, "0.0.0.0", True),
        (socket.AF_INET6, "::", True),
        (socket.AF_INET6, "::ffff:0.0.0.0", True),
    ],
)
def test_any_address_but_loopback_needs_keys(
    family: socket.AddressFamily, host: str, needs_keys: bool
) -> None:
    """The rule for server.host holds for the address that systemd bound."""

    def listening() -> int:
        with contextlib.ExitStack() as closing:
            try:
                sock = closing.enter_context(socket.socket(family, socket.SOCK_STREAM))
                # Whatever the address, nobody outside this host can reach it.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
                sock.bind((host, 0))
            except OSError as exc:
                pytest.skip(f"this host cannot bind {host} on lo: {exc.strerror}")
            sock.listen()
            return sock.detach()

    if needs_keys:
        with pytest.raises(ConfigInvalid, match="API keys are needed"):
            inherit(listening())
    for made in [settings(keys=1)] if needs_keys else [settings(), settings(keys=1)]:
        sock = inherit(listening(), made)
        assert sock
        sock.close()


# ── the daemon ──────────────────────────────────────────────────────────────────────────────────


def under_systemd(hive: Hive, systemd: NotifySocket, **env: str) -> Hive:
    hive.env |= {"NOTIFY_SOCKET": systemd.address, **env}
    return hive


def given_sockets(hive: Hive, *sockets: socket.socket) -> Hive:
    fds = [str(sock.fileno()) for sock in sockets]
    hive.starter = (sys.executable, "-I", "-S", "-c", PASS_ON, str(len(fds)), *fds)
    hive.pass_fds = tuple(sock.fileno() for sock in sockets)
    return hive


@pytest.mark.double
def test_hive_is_ready_when_it_listens_and_tells_what_loads(
    hive: Hive, systemd: NotifySocket
) -> None:
    gate = hive.home / "gate"
    os.mkfifo(gate)
    # The engine starts when the test opens the gate: until then it is loading.
    hive.model("m")
    hive.model("slow")
    under_systemd(hive, systemd).write_config()
    slow = hive.config.read_text().partition('[models."slow"]')[2]
    command = json.loads(slow.partition("command = ")[2].splitlines()[0])
    waits = ["/bin/sh", "-c", 'read line < "$0"; exec "$@"', str(gate), *command]
    hive.models["slow"].extra["command"] = waits

    hive.launch()
    systemd.must_tell("READY", "1")
    hive.start_was_launched(5, is_ready=False)
    assert hive.ask("GET", "/livez").status == 200
    systemd.must_tell("STATUS", "serving 1 of 2 models; slow-0 LOADING")
    models = hive.readiness("?model=slow")
    assert models.status == 503
    assert "LOADING" in models.body.decode()

    must(lambda: opened(gate), 10, "the engine at its gate")
    systemd.must_tell("STATUS", "serving 2 of 2 models")
    hive.stop()
    systemd.must_tell("STOPPING", "1")
    systemd.must_tell("STATUS", "stopped")
    statuses = systemd.told("STATUS")
    assert statuses[0].startswith("preflight")
    ready = next(i for i, message in enumerate(systemd.messages) if "READY" in message)
    assert systemd.messages[ready]["STATUS"] == "serving 0 of 2 models"
    assert statuses.index("serving 0 of 2 models") == ready
    assert systemd.told("READY") == ["1"]


def opened(gate: Path) -> bool:
    """Let one reader of a pipe go on; False while there is none."""
    try:
        fd = os.open(gate, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    os.write(fd, b"\n")
    os.close(fd)
    return True


def test_a_start_that_fails_is_never_ready(hive: Hive, systemd: NotifySocket) -> None:
    hive.model("m", command=["/nowhere/engine", "{socket}"])

    ran = under_systemd(hive, systemd).serve_to_the_end()

    assert ran.code == 1
    assert systemd.told("READY") == []
    assert systemd.told("STATUS")[-1].startswith("WORKER_SPAWN_FAILED: ")


@pytest.mark.double
def test_a_hive_that_stands_still_is_silent(hive: Hive, systemd: NotifySocket) -> None:
    hive.model("m")
    under_systemd(hive, systemd, **WATCHED).start()
    before = len(systemd.told("WATCHDOG"))
    must(lambda: len(systemd.told("WATCHDOG")) > before + 4, 10, "WATCHDOG=1 again and again")
    assert hive.process
    pid = hive.process.pid

    hive.signal(signal.SIGSTOP)
    try:
        must(lambda: (found := guard.look_at(pid)) and found.state == "T", 5, "hive stopped")
        fed = len(systemd.told("WATCHDOG"))
        # Two and a half times the limit: systemd would have ended it.
        assert not until(lambda: len(systemd.told("WATCHDOG")) > fed, 1.0), "fed by nobody"
    finally:
        hive.signal(signal.SIGCONT)
    must(lambda: len(systemd.told("WATCHDOG")) > fed, 10, "WATCHDOG=1 after it went on")


@pytest.mark.double
def test_a_notify_socket_that_nobody_reads_changes_nothing(
    hive: Hive, systemd: NotifySocket
) -> None:
    hive.model("m")
    under_systemd(hive, systemd, WATCHDOG_USEC="2000").start()
    taken_not = "systemd's notify socket takes nothing"
    must(lambda: taken_not in hive.log_text, 20, "the socket full")

    assert hive.chat().status == 200
    hive.stop()
    assert hive.log_text.count(taken_not) == 1


@pytest.mark.double
def test_no_engine_can_speak_for_hive(hive: Hive, systemd: NotifySocket) -> None:
    hive.model("m")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        given_sockets(under_systemd(hive, systemd, **WATCHED), listener).start()
        inode = f"socket:[{os.fstat(listener.fileno()).st_ino}]"
        pids = [member.pid for member in hive.tree()]

        assert len(pids) >= 2
        for pid in pids:
            environ = Path(f"/proc/{pid}/environ").read_text()
            assert "HIVE_MARK=" in environ
            assert not [
                name
                for name in ("NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_")
                if f"\0{name}" in f"\0{environ}"
            ]
            fds = Path(f"/proc/{pid}/fd")
            assert inode not in {os.readlink(fds / fd) for fd in os.listdir(fds)}
        hive.stop()


@pytest.mark.double
def test_hive_serves_on_the_socket_that_it_inherits(hive: Hive, systemd: NotifySocket) -> None:
    hive.model("m")
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_server(("127.0.0.1", 0)) as elsewhere,
    ):
        hive.sections["server"]["port"] = elsewhere.getsockname()[1]  # taken: hive must not try it
        given_sockets(under_systemd(hive, systemd), listener).start()

        assert hive.port == listener.getsockname()[1]
        assert hive.chat().status == 200
        hive.stop()
        # The address is systemd's: clients are queued until the next hive has it.
        socket.create_connection(("127.0.0.1", hive.port), 5).close()
        hive.start()
        assert hive.chat().status == 200


def test_a_socket_unit_with_two_addresses_is_a_configuration_error(
    hive: Hive, systemd: NotifySocket
) -> None:
    hive.model("m")
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        given_sockets(under_systemd(hive, systemd), one, two).launch()

        assert hive.wait_exit() == 1
    error = json.loads(hive.log_text.splitlines()[-1])["error"]
    assert error["code"] == "CONFIG_INVALID"
    assert "hive.socket" in error["message"]
    assert systemd.told("STATUS")[-1].startswith("CONFIG_INVALID: ")


@pytest.mark.double
def test_the_watchdogs_signal_makes_hive_write_where_it_stands(hive: Hive) -> None:
    """As in the unit: PYTHONFAULTHANDLER, and SIGABRT from systemd."""
    hive.env["PYTHONFAULTHANDLER"] = "1"
    hive.model("m")
    hive.start()
    pids = [member.pid for member in hive.tree()]

    hive.signal(signal.SIGABRT)

    assert hive.wait_exit() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in hive.log_text
    assert "hive/cli/serve.py" in hive.log_text
    must(lambda: not any(map(is_alive, pids)), 10, "the engine's tree ended by its guard")


def is_alive(pid: int) -> bool:
    found = guard.look_at(pid)
    return found is not None and found.state != "Z"

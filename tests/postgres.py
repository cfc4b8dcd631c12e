"""A real PostgreSQL for tests: from the host's own package, on a unix socket alone, gone at the end.

It refuses to run as root, so that it runs as somebody else there. One is shared by all tests of a
process; who breaks a server starts one of its own.
"""

import asyncio
import atexit
import contextlib
import functools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from hive.workers import guard
from steps import leaks
from tests.patience import wait_until

START_S = 30.0
# Nothing here outlives the test: the disk is not waited for.
FAST = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "shared_buffers=16MB")
SPARE = ("max_connections=40", "listen_addresses=", "unix_socket_permissions=0777")
WITH_US = ("setpriv", "--pdeathsig", "INT")  # a test process that is killed leaves no server
_ENVIRONMENT = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}


def programs() -> Path | None:
    """The newest installed version's."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: p.parts[-3])
    if found:
        return found[-1].parent
    elsewhere = shutil.which("initdb")
    return Path(elsewhere).resolve().parent if elsewhere else None


def user() -> str | None:
    """Who runs it; None: whoever runs the tests."""
    if os.getuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


class Server:
    """One server with its own data, under a short name: a socket's path has at most 107 bytes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.process: subprocess.Popen[bytes] | None = None
        self._bin = programs()
        self._as: dict[str, Any] = {"cwd": "/", "env": _ENVIRONMENT}
        if who := user():
            self._as |= {"user": who, "group": pwd.getpwnam(who).pw_gid, "extra_groups": []}

    def make(self) -> None:
        if who := user():
            shutil.chown(self.home, who)
        subprocess.run(["cp", "-a", _empty() / "data", self.home], **self._as, check=True)

    def initialise(self) -> None:
        if who := user():
            shutil.chown(self.home, who)
        argv = ["-D", str(self.home / "data"), "-U", "hive", "-A", "trust", "-E", "UTF8", "-N"]
        self._run("initdb", *argv, "--locale=C.UTF-8")

    def _run(self, program: str, *args: str) -> str:
        assert self._bin is not None
        done = subprocess.run(
            [self._bin / program, *args],
            **self._as,
            capture_output=True,
            text=True,
            check=False,
            timeout=START_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    def start(self, *options: str) -> None:
        assert self._bin is not None
        settings = [f"-c{one}" for one in (*FAST, *SPARE, *options)]
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *WITH_US,
                    self._bin / "postgres",
                    "-D",
                    self.home / "data",
                    "-k",
                    self.home,
                    *settings,
                ],
                **self._as,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        leaks.started_pids.add(self.process.pid)
        leaks.shared_pids.add(self.process.pid)
        wait_until(self._is_ready, f"PostgreSQL: {self.log}", START_S)

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        pid_file = self.home / "data" / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError):
            return "ready" in pid_file.read_text()
        return False

    @property
    def log(self) -> str:
        path = self.home / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def url(self, database: str, user: str = "hive", password: str = "") -> str:
        secret = f":{password}" if password else ""
        return f"postgresql://{user}{secret}@/{database}?host={self.home}"

    def sql(self, text: str, database: str = "postgres") -> list[str]:
        """Run it as the server's owner; a line for each row."""
        where = ("-h", str(self.home), "-U", "hive", "-d", database)
        return self._run("psql", *where, "-X", "-A", "-t", "-q", "-c", text).splitlines()

    def make_database(self, name: str) -> str:
        """Its URL."""
        self.sql(f'CREATE DATABASE "{name}"')
        return self.url(name)

    # ── what happens to it ──────────────────────────────────────────────────────────────────────

    @contextmanager
    def hung(self) -> Iterator[None]:
        """It takes connections and says nothing, while the block runs."""
        self.hang()
        try:
            yield
        finally:
            self.go_on()

    def hang(self) -> None:
        assert self.process is not None
        # The first one first: it would start others meanwhile.
        os.kill(self.process.pid, signal.SIGSTOP)
        for process in guard.descendants(self.process.pid):
            os.kill(process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        for process in guard.descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
        os.kill(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        """At once, with every connection."""
        if self.process is None:
            return
        self.go_on()
        self.process.send_signal(signal.SIGINT)  # "fast": whoever is connected is sent away
        try:
            self.process.wait(START_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(START_S)
        leaks.shared_pids.discard(self.process.pid)
        self.process = None


@functools.cache
def _empty() -> Path:
    """What a server begins with: made once, and copied; it goes with this process."""
    home = Path(tempfile.mkdtemp(prefix="hpg", dir="/tmp"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    home.chmod(0o755)
    Server(home).initialise()
    return home


@contextmanager
def server() -> Iterator[Server]:
    """One that runs while the block does; skips the test, with the reason, where there is none."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed: make test-tools")
    home = Path(tempfile.mkdtemp(prefix="hpg", dir="/tmp"))
    home.chmod(0o755)
    it = Server(home)
    try:
        it.make()
        it.start()
        yield it
    finally:
        it.end()
        shutil.rmtree(home)


def emptied(url: str) -> None:
    """Nobody's again, and without a row."""

    async def empty() -> None:
        connection = await asyncpg.connect(url)
        try:
            if await connection.fetchval("SELECT to_regclass('keeper')"):
                for table in ("sessions", "windows", "keeper"):
                    await connection.execute(f"DELETE FROM {table}")
        finally:
            await connection.close()

    # Perhaps inside a test's own loop.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, empty()).result()

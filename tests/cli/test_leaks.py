"""`hive leaks` asks a daemon, `hive sweep` needs none: what they print and how they exit."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from hive import cli
from hive.daemon import only_daemon
from hive.settings import load
from hive.workers import journal
from tests.patience import short_directory

CONFIG = """
[models.small]
engine = "command"
device = "cpu"
command = ["sleep", "600", "{socket}"]
"""
LEAK = {
    "kind": "process",
    "holder": "7 (python)",
    "worker": "small-0",
    "mark": "0123456789abcdef",
    "how_to_clear": "End it with 'kill -9 7'.",
    "since": 1_700_000_000.0,
}

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("HIVE_", "CUDA_VISIBLE"))]:
        monkeypatch.delenv(name)


# ── hive leaks ──────────────────────────────────────────────────────────────────────────────────


@contextmanager
def daemon_with(leaks: list[dict[str, Any]]) -> Iterator[str]:
    """What answers like a daemon's /hive/v1/leaks; its URL."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/hive/v1/leaks"
            text = json.dumps({"leaks": leaks}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the same)
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_where_nothing_is_leaked_the_exit_is_0(capsys: Capture) -> None:
    """(R022)"""
    with daemon_with([]) as url:
        assert cli.run(["leaks", "--url", url]) == 0
    assert capsys.readouterr().out == "nothing is leaked\n"


def test_a_leak_is_shown_with_its_holder_and_how_to_clear_it_and_the_exit_is_1(
    capsys: Capture,
) -> None:
    """(R022)"""
    with daemon_with([LEAK]) as url:
        assert cli.run(["leaks", "--url", url]) == 1
    head, row = capsys.readouterr().out.splitlines()

    assert head.split() == ["kind", "holder", "worker", "how", "to", "clear"]
    for shown in ("process", "7 (python)", "small-0", "End it with 'kill -9 7'."):
        assert shown in row


@pytest.mark.parametrize("leaks", [[], [LEAK]])
def test_programs_get_all_of_it(capsys: Capture, leaks: list[dict[str, Any]]) -> None:
    with daemon_with(leaks) as url:
        assert cli.run(["leaks", "--json", "--url", url]) == len(leaks)
    assert json.loads(capsys.readouterr().out) == {"leaks": leaks}


def test_without_a_daemon_the_exit_is_255(capsys: Capture) -> None:
    assert cli.run(["leaks", "--url", "http://127.0.0.1:1"]) == 255
    assert "DAEMON_UNREACHABLE" in capsys.readouterr().err


# ── hive sweep ──────────────────────────────────────────────────────────────────────────────────


class Left:
    """The directories that a hive had, and what it left in them."""

    def __init__(self, top: Path) -> None:
        self.state, self.runtime = top / "s", top / "r"
        self.config = top / "hive.toml"
        self.config.write_text(CONFIG)
        with subprocess.Popen(["sleep", "600"]) as process:
            self.hive = journal.identity(process.pid)
            process.kill()

    @property
    def args(self) -> list[str]:
        where = ["--state-dir", str(self.state), "--runtime-dir", str(self.runtime)]
        return ["--config", str(self.config), *where]

    def start(self) -> journal.Note:
        """A start on record, with its home."""
        home = self.runtime / "w" / "1"
        home.mkdir(parents=True)
        self.state.mkdir()
        note = journal.new("small-0", home, secrets.token_hex(8))
        note = note.model_copy(update={"hive": self.hive})
        journal.write(self.state / "ledger", note)
        return note


@pytest.fixture
def left() -> Iterator[Left]:
    with short_directory() as top:
        yield Left(top)


def test_where_no_directory_is_nothing_was_left_and_none_is_made(
    left: Left, capsys: Capture
) -> None:
    assert cli.run(["sweep", *left.args]) == 0
    assert capsys.readouterr().out == "nothing was left\n"
    assert not left.state.exists()
    assert not left.runtime.exists()


def test_where_one_directory_is_only_it_is_looked_at(left: Left, capsys: Capture) -> None:
    """systemd removes the runtime directory when the service has stopped."""
    note = left.start()
    note.home.rmdir()
    left.runtime.joinpath("w").rmdir()
    left.runtime.rmdir()

    assert cli.run(["sweep", *left.args]) == 0
    assert capsys.readouterr().out == "nothing was left\n"
    assert not journal.file_of(left.state / "ledger", note.mark).exists()
    assert not left.runtime.exists()


def test_what_a_killed_hive_left_is_ended_and_removed(left: Left) -> None:
    """As ExecStopPost does: in a process of its own, without a daemon."""
    note = left.start()
    code = "import signal; print(flush=True); signal.pause()"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code],
        env={"HIVE_MARK": note.mark},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        command = [sys.executable, "-m", "hive", "sweep", *left.args]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

        assert (done.returncode, done.stderr) == (0, "")
        assert process.wait() == -signal.SIGKILL
    assert f"process {process.pid} (python) of small-0 ended" in done.stdout.splitlines()
    assert "directory w/1 of small-0 removed" in done.stdout.splitlines()
    assert not note.home.exists()


def test_programs_get_what_was_found(left: Left, capsys: Capture) -> None:
    left.start()

    assert cli.run(["sweep", "--json", *left.args]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "found": [{"kind": "directory", "holder": "w/1", "worker": "small-0", "outcome": "removed"}]
    }


def test_what_stays_is_an_error_with_how_to_clear_it(
    left: Left, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a link stands where the home was: hive does not follow it (R022)."""
    monkeypatch.setattr("hive.workers.janitor.SETTLE_S", 0.2)
    note = left.start()
    note.home.rmdir()
    note.home.symlink_to(left.runtime)

    assert cli.run(["sweep", *left.args]) == 1
    out, err = capsys.readouterr()
    assert "directory w/1 of small-0 stays: Look what w/1" in out
    assert "hive: RESOURCE_LEAK_DETECTED: " in err
    assert "hive: what to do: Manual cleanup required: " in err
    assert note.home.is_symlink()

    assert cli.run(["sweep", "--json", *left.args]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["error"]["details"]["leaked_temp_files"] == 1
    assert [one["outcome"] for one in told["found"]] == ["stays"]

    note.home.unlink()
    assert cli.run(["sweep", *left.args]) == 0


def test_a_journal_that_cannot_be_trusted_is_told_once(left: Left, capsys: Capture) -> None:
    note = left.start()
    path = journal.file_of(left.state / "ledger", note.mark)
    path.write_text(path.read_text().replace(str(note.home), "/home"))

    assert cli.run(["sweep", *left.args]) == 1
    assert f"journal {path.name} refused: " in capsys.readouterr().out
    assert note.home.exists()
    assert cli.run(["sweep", *left.args]) == 0


def test_while_a_hive_runs_there_it_refuses(left: Left, capsys: Capture) -> None:
    note = left.start()
    server = {"state_dir": str(left.state), "runtime_dir": str(left.runtime)}
    with only_daemon(load(left.config, {"server": server})):
        assert cli.run(["sweep", *left.args]) == 1
    assert f"another hive (pid {os.getpid()}) runs in" in capsys.readouterr().err
    assert note.home.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_users_directories_are_not_swept(left: Left, capsys: Capture) -> None:
    """Root, who wonders what hive left, would otherwise take its journal for a forgery."""
    note = left.start()
    os.chown(left.state, 65534, -1)

    assert cli.run(["sweep", *left.args]) == 1
    err = capsys.readouterr().err
    assert "server.state_dir: " in err
    assert "Run this as the user that hive runs as." in err
    assert journal.file_of(left.state / "ledger", note.mark).exists()


@pytest.mark.parametrize("place", ["state", "runtime"])
def test_a_directory_that_cannot_be_used_is_told_with_its_key(
    left: Left, capsys: Capture, place: str
) -> None:
    left.start()
    path: Path = getattr(left, place)
    (path / "hive.lock").symlink_to(left.config)
    before = left.config.read_text()

    assert cli.run(["sweep", *left.args]) == 1
    assert f"server.{place}_dir: {path} cannot be used: hive.lock in it is a link" in (
        capsys.readouterr().err
    )
    assert left.config.read_text() == before


def test_a_file_is_no_directory_to_sweep(left: Left, capsys: Capture) -> None:
    left.state.touch()

    assert cli.run(["sweep", *left.args]) == 1
    assert "cannot be used: Not a directory" in capsys.readouterr().err


def test_a_configuration_that_is_wrong_is_told(left: Left, capsys: Capture) -> None:
    left.config.write_text("[server]\nprot = 1\n" + CONFIG)

    assert cli.run(["sweep", *left.args]) == 1
    assert "CONFIG_INVALID" in capsys.readouterr().err

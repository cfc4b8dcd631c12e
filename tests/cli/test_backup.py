"""`hive backup`: what is printed, for people and for programs, and what is asked before."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hive import cli
from steps.driver import HIVE, ROOT, Hive, new_hive
from tests.terminal import on_a_terminal
from tests.windows.daemon import WINDOWS

Capture = pytest.CaptureFixture[str]

KEYS = {name: f"hive_{name}_0123456789abcdef" for name in ("ops", "ann")}
WORDS = " ".join(f"w{number}" for number in range(100))


@pytest.fixture(scope="module")
def daemon() -> Iterator[Hive]:
    """Serving "m" to an admin and to Ann, for every test of this file."""
    with new_hive() as hive:
        hive.sections["windows"] = dict(WINDOWS)
        hive.model("m", windows=True)
        for name, scopes in (("ops", ["inference", "admin"]), ("ann", ["inference"])):
            sha256 = hashlib.sha256(KEYS[name].encode()).hexdigest()
            hive.keys.append({"name": name, "sha256": sha256, "scopes": scopes})
        hive.key = KEYS["ops"]
        hive.start(is_shared=True)
        yield hive


@pytest.fixture(autouse=True)
def _asked(daemon: Hive, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By the admin; no test finds windows or backups of another."""
    monkeypatch.setenv("HIVE_API_KEY", KEYS["ops"])
    monkeypatch.setenv("HIVE_URL", daemon.url)
    yield
    for one in daemon.ask("GET", "/hive/v1/windows").json["windows"]:
        path = f"/hive/v1/windows/{one['name']}?owner={one['owner']}"
        assert daemon.ask("DELETE", path).status == 204
    for file in files_of(daemon):
        file.unlink()


def files_of(daemon: Hive) -> list[Path]:
    return sorted((daemon.state / "backups").iterdir())


def frozen(daemon: Hive, name: str, key: str = "ops") -> None:
    headers = {"Authorization": f"Bearer {KEYS[key]}"}
    session = daemon.ask("POST", "/hive/v1/sessions", {"model": "m"}, headers).json["id"]
    body = {"model": "m", "messages": [{"role": "user", "content": WORDS}], "max_tokens": 40}
    in_it = {**headers, "X-Hive-Session": session}
    assert daemon.ask("POST", "/v1/chat/completions", body, in_it).status == 200
    wanted = {"session_id": session, "name": name}
    assert daemon.ask("POST", "/hive/v1/windows", wanted, headers).status == 201


def as_json(capsys: Capture, *args: str, status: int = 0) -> Any:
    assert cli.run(["backup", *args, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def printed(capsys: Capture, *args: str, status: int = 0) -> list[str]:
    """What people read, its spaces made one."""
    assert cli.run(["backup", *args]) == status
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_create_list_restore_and_delete_for_people(daemon: Hive, capsys: Capture) -> None:
    """R124, R125, R126"""
    frozen(daemon, "monday")
    first, second = printed(capsys, "create", "monday")
    assert first.startswith("monday: backed up, 145 tokens, ")
    timestamp = second.removeprefix("timestamp: ")
    head, row = printed(capsys, "list", "--window", "monday")
    assert head.split()[:5] == ["window", "timestamp", "owner", "model", "tokens"]
    assert row.split()[:6] == ["monday", timestamp, "ops", "m", "145", "9"]
    assert "not whole" not in row

    assert daemon.ask("DELETE", "/hive/v1/windows/monday").status == 204
    first, second = printed(capsys, "restore", "--window", "monday", "--timestamp", timestamp)
    assert first.startswith("monday: restored, 145 tokens, ")
    assert first.endswith(f", as of {timestamp}")
    assert second == "to see it: hive window status monday"
    assert cli.run(["window", "status", "monday"]) == 0
    status = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"state FROZEN", "tokens 145", "blocks 9"} <= set(status)

    args = ("delete", "--window", "monday", "--timestamp", timestamp)
    assert printed(capsys, *args, "--force") == [f"monday: the backup of {timestamp} was deleted"]
    assert files_of(daemon) == []


def test_json_for_programs(daemon: Hive, capsys: Capture) -> None:
    """R124, R125"""
    frozen(daemon, "monday")
    made = as_json(capsys, "create", "monday")
    assert (made["window"], made["tokens"], made["blocks"], made["whole"]) == (
        *("monday", 145, 9),
        True,
    )
    assert as_json(capsys, "list") == {"backups": [made], "unreadable": []}
    assert as_json(capsys, "list", "--window", "tuesday")["backups"] == []
    again = as_json(capsys, "restore", "--window", "monday", "--name", "tuesday")
    assert (again["name"], again["state"]) == ("tuesday", "FROZEN")
    assert again["backup"]["timestamp"] == made["timestamp"]
    args = ("--window", "monday", "--timestamp", made["timestamp"], "--force")
    assert as_json(capsys, "delete", *args)["deleted"] is True
    assert as_json(capsys, "delete", *args, status=1)["error"]["code"] == "NOT_FOUND"


def test_errors_say_what_to_do(daemon: Hive, capsys: Capture) -> None:
    frozen(daemon, "monday")
    assert as_json(capsys, "create", "tuesday", status=1)["error"]["code"] == "WINDOW_NOT_FOUND"
    assert cli.run(["backup", "restore", "--window", "monday"]) == 1
    assert "There is no backup of a window monday." in capsys.readouterr().err
    assert cli.run(["backup", "create", "monday"]) == 0
    capsys.readouterr()
    assert cli.run(["backup", "restore", "--window", "monday"]) == 1
    assert "--name" in capsys.readouterr().err
    for window, timestamp in (("..", "x"), ("monday", ".."), ("monday", "")):
        args = ["delete", "--window", window, "--timestamp", timestamp, "--force"]
        assert cli.run(["backup", *args]) == 1
        assert "Invalid parameter" in capsys.readouterr().err
    assert len(files_of(daemon)) == 1


def test_a_list_tells_what_is_not_whole_and_what_is_none(daemon: Hive, capsys: Capture) -> None:
    """R092: before anybody needs it."""
    frozen(daemon, "monday")
    assert cli.run(["backup", "create", "monday"]) == 0
    (path,) = files_of(daemon)
    os.truncate(path, path.stat().st_size - 1)
    path.with_name("odd.tar.zst").write_bytes(b"\x1b[31mno backup")
    capsys.readouterr()
    assert cli.run(["backup", "list"]) == 0
    told = capsys.readouterr()
    assert "not whole: it cannot be restored" in told.out
    assert "hive: odd.tar.zst: The backup is damaged" in told.err
    assert cli.run(["backup", "list", "--limit", "1", "--offset", "1"]) == 0


def test_pages(daemon: Hive, capsys: Capture) -> None:
    frozen(daemon, "monday")
    for _ in range(3):
        assert cli.run(["backup", "create", "monday"]) == 0
    capsys.readouterr()
    assert cli.run(["backup", "list", "--limit", "2"]) == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 3
    assert told.err == "hive: there are more: --offset 2\n"


def test_an_admin_restores_for_a_key(
    daemon: Hive, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R084"""
    frozen(daemon, "monday", "ann")
    assert as_json(capsys, "create", "monday", "--owner", "ann")["owner"] == "ann"
    again = as_json(capsys, "restore", "--window", "monday", "--name", "x", "--owner", "ann")
    assert again["owner"] == "ann"
    monkeypatch.setenv("HIVE_API_KEY", KEYS["ann"])
    assert [one["window"] for one in as_json(capsys, "list")["backups"]] == ["monday"]
    answer = as_json(capsys, "list", "--owner", "ops", status=1)
    assert answer["error"]["code"] == "FORBIDDEN"


@pytest.mark.parametrize(("typed", "is_gone"), [("y", True), ("n", False), ("", False)])
def test_on_a_terminal_it_asks_before_it_deletes(
    daemon: Hive, capsys: Capture, typed: str, is_gone: bool
) -> None:
    frozen(daemon, "monday")
    at = as_json(capsys, "create", "monday")["timestamp"]
    command = ("backup", "delete", "--window", "monday", "--timestamp", at)
    code, shown, _ = on_a_terminal(*command, typed=f"{typed}\n")
    assert code == (0 if is_gone else 1)
    assert f"Delete the backup of monday of {at}?" in shown
    assert (files_of(daemon) == []) is is_gone


def test_without_a_terminal_it_deletes_only_by_force(daemon: Hive, capsys: Capture) -> None:
    frozen(daemon, "monday")
    at = as_json(capsys, "create", "monday")["timestamp"]
    command = [*HIVE, "backup", "delete", "--window", "monday", "--timestamp", at]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, stdin=-3)
    assert (ran.returncode, "--force" in ran.stderr) == (2, True)
    assert len(files_of(daemon)) == 1

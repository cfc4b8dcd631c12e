"""`hive window`: everything that is done with windows, asked of a running daemon."""

import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hive import cli
from hive.cli import client
from hive.errors import DaemonUnreachable, HiveError, StorageCorrupted
from steps.driver import Hive, new_hive
from steps.waiting import must
from tests.terminal import on_a_terminal
from tests.windows.daemon import WINDOWS

Capture = pytest.CaptureFixture[str]

KEYS = {name: f"hive_{name}_0123456789abcdef" for name in ("ops", "ann")}
WORDS = " ".join(f"w{number}" for number in range(100))
BLOCKS = 9  # of 145 tokens: what is asked, 40 of the answer, and what a template adds


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
    """By the admin; no test finds windows of another."""
    monkeypatch.setenv("HIVE_API_KEY", KEYS["ops"])
    monkeypatch.setenv("HIVE_URL", daemon.url)
    yield
    for one in windows(daemon):
        gone = daemon.ask("DELETE", f"/hive/v1/windows/{one['name']}?owner={one['owner']}")
        assert gone.status == 204


def windows(daemon: Hive) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = daemon.ask("GET", "/hive/v1/windows").json["windows"]
    return found


def answered(daemon: Hive, session: str, messages: Any, key: str = "ops") -> None:
    body = {"model": "m", "messages": messages, "max_tokens": 40}
    headers = {"Authorization": f"Bearer {KEYS[key]}", "X-Hive-Session": session}
    assert daemon.ask("POST", "/v1/chat/completions", body, headers).status == 200


def talked(daemon: Hive, key: str = "ops") -> str:
    """A session in which something was answered."""
    headers = {"Authorization": f"Bearer {KEYS[key]}"}
    session = daemon.ask("POST", "/hive/v1/sessions", {"model": "m"}, headers).json["id"]
    answered(daemon, session, [{"role": "user", "content": WORDS}], key)
    return str(session)


def frozen(daemon: Hive, name: str, key: str = "ops") -> Path:
    """Its folder."""
    headers = {"Authorization": f"Bearer {KEYS[key]}"}
    body = {"session_id": talked(daemon, key), "name": name}
    assert daemon.ask("POST", "/hive/v1/windows", body, headers).status == 201
    folders = (daemon.state / "windows").iterdir()
    return max(folders, key=lambda folder: folder.stat().st_ctime_ns)


def lose(folder: Path, block: str) -> None:
    """The window's own name for it goes; the KV cache still has the file."""
    (folder / block).unlink()


def corrupt(folder: Path, block: str) -> None:
    """The file itself, which is the KV cache's, too."""
    with (folder / block).open("r+b") as file:
        file.write(b"not what was here")


def as_json(capsys: Capture, *args: str, status: int = 0) -> Any:
    assert cli.run(["window", *args, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def printed(capsys: Capture, *args: str, status: int = 0) -> list[str]:
    """What people read, its spaces made one."""
    assert cli.run(["window", *args]) == status
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


# ── freeze and thaw ─────────────────────────────────────────────────────────────────────────────


def test_a_session_is_frozen(daemon: Hive, capsys: Capture) -> None:
    """(R120)"""
    session = talked(daemon)
    told = printed(capsys, "freeze", session, "w")

    assert told == ["w: frozen, 145 tokens, 9 blocks, 18 KiB"]
    assert daemon.ask("GET", f"/hive/v1/sessions/{session}").json["state"] == "FROZEN"


def test_what_is_told_of_a_window_is_kept_with_it(daemon: Hive, capsys: Capture) -> None:
    """(R120)"""
    session = talked(daemon)
    more = ["--description", "a talk", "--tag", "one", "--tag", "two"]
    made = as_json(capsys, "freeze", session, "w", "--keep-active", *more)

    assert (made["name"], made["session_id"], made["blocks"]) == ("w", session, BLOCKS)
    assert (made["description"], made["tags"]) == ("a talk", ["one", "two"])
    assert daemon.ask("GET", f"/hive/v1/sessions/{session}").json["state"] == "ACTIVE"


def test_why_it_was_not_frozen_is_told_as_without_progress(daemon: Hive, capsys: Capture) -> None:
    """The error comes as an event; its code, advice and exit code are the same (R120)."""
    frozen(daemon, "w")
    assert cli.run(["window", "freeze", talked(daemon), "w", "--json"]) == 1
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]

    assert (error["code"], error["details"]["number"]) == ("WINDOW_ALREADY_EXISTS", "CWM-3003")
    assert err.splitlines() == [
        "hive: WINDOW_ALREADY_EXISTS: Window name already exists: w",
        "hive: what to do: Choose another name, or delete the existing window first.",
    ]


def test_a_window_is_thawed_into_a_new_session(daemon: Hive, capsys: Capture) -> None:
    frozen(daemon, "w")
    session, context = printed(capsys, "thaw", "w")
    shown = daemon.ask("GET", f"/hive/v1/sessions/{session.removeprefix('session: ')}").json

    assert context == "context: 144 tokens usable, 1 to compute again"
    assert shown["state"] == "THAWED"
    assert shown["messages"][0]["content"] == WORDS


def test_programs_get_the_messages_of_a_thaw_too(daemon: Hive, capsys: Capture) -> None:
    """Into the session that is named."""
    frozen(daemon, "w")
    (window,) = windows(daemon)
    found = as_json(capsys, "thaw", "w", "--session", window["session_id"])

    assert found["session_id"] == window["session_id"]
    assert found["messages"][0] == {"role": "user", "content": WORDS}
    assert found["receipt"]["usable_tokens"] == 144


def test_what_a_thaw_could_not_restore_is_said(daemon: Hive, capsys: Capture) -> None:
    lose(frozen(daemon, "w"), "000002-0")
    assert cli.run(["window", "thaw", "w", "--require-full"]) == 1
    assert "BLOCK_NOT_FOUND: Some context data is unavailable" in capsys.readouterr().err
    _, *told = printed(capsys, "thaw", "w")

    assert told == [
        "context: 32 tokens usable, 113 to compute again",
        "warning: 1 blocks could not be restored",
    ]


# ── what there is ───────────────────────────────────────────────────────────────────────────────


def test_the_windows_are_listed(daemon: Hive, capsys: Capture) -> None:
    session = talked(daemon)
    for name, tag in (("a", "odd"), ("b", "even"), ("c", "odd")):
        printed(capsys, "freeze", session, name, "--keep-active", "--tag", tag)
    frozen(daemon, "d", key="ann")

    columns, *rows = printed(capsys, "list", "--sort", "name", "--order", "asc")
    assert columns == "window owner model session tokens blocks size frozen tags"
    assert [row.split()[:2] for row in rows] == [
        *(["a", "ops"], ["b", "ops"], ["c", "ops"], ["d", "ann"]),
    ]
    assert rows[0].split()[2:] == [
        *("m", session, "145", "9", "18", "KiB", *rows[0].split()[8:10], "odd"),
    ]

    def listed(*args: str) -> list[str]:
        found = as_json(capsys, "list", *args)
        return [one["name"] for one in found["windows"]]

    assert listed("--tag", "odd") == ["c", "a"]
    assert listed("--tag", "o&d") == []
    assert listed("--session", session, "--order", "asc") == ["a", "b", "c"]
    assert listed("--model", "other") == []
    assert listed("--owner", "ann") == ["d"]
    assert listed("--sort", "name", "--limit", "2", "--offset", "1") == ["c", "b"]


def test_that_there_are_more_is_said_beside_the_list(daemon: Hive, capsys: Capture) -> None:
    session = talked(daemon)
    for name in ("a", "b"):
        printed(capsys, "freeze", session, name, "--keep-active")
    assert cli.run(["window", "list", "--limit", "1"]) == 0
    out, err = capsys.readouterr()

    assert len(out.splitlines()) == 2
    assert err == "hive: there are more: --offset 1\n"


def test_the_status_tells_how_the_last_thaw_went(daemon: Hive, capsys: Capture) -> None:
    """What was promised, then what the engine found (R126)."""
    frozen(daemon, "w")
    assert "last thaw never thawed" in printed(capsys, "status", "w")
    thawed = as_json(capsys, "thaw", "w")
    promised = "last thaw 144 tokens usable, 1 to compute again"
    assert f"{promised}; not asked yet" in printed(capsys, "status", "w")
    messages = [*thawed["messages"], {"role": "user", "content": "go on"}]
    answered(daemon, thawed["session_id"], messages)
    printed(capsys, "clone", "w", "other")
    told = printed(capsys, "status", "w")
    found = as_json(capsys, "status", "w")

    assert f"{promised}; the engine had 144 in its cache" in told
    assert {"window w", "owner ops", "blocks 9", "files in the KV tier 9", "clones other"} <= set(
        told
    )
    assert found["receipt"]["cached_tokens"] == 144
    assert found["lineage"] == {"ancestors": [], "clones": ["other"]}


# ── clone and delete ────────────────────────────────────────────────────────────────────────────


def test_a_window_is_cloned(daemon: Hive, capsys: Capture) -> None:
    frozen(daemon, "w")

    assert printed(capsys, "clone", "w", "two") == ["two: cloned from w, 9 blocks"]
    assert as_json(capsys, "clone", "two", "three")["name"] == "three"
    assert "cloned from two, w" in printed(capsys, "status", "three")


def test_without_a_terminal_nothing_is_deleted_unasked(daemon: Hive, capsys: Capture) -> None:
    frozen(daemon, "w")
    assert cli.run(["window", "delete", "w"]) == 2
    err = capsys.readouterr().err

    assert "Usage: hive window delete" in err
    assert "There is no terminal to ask on: --force deletes without asking." in err
    assert [one["name"] for one in windows(daemon)] == ["w"]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_damaged_window_is_deleted_by_force(
    daemon: Hive, capsys: Capture, more: list[str]
) -> None:
    """One that nothing else can be done with (R119)."""
    folder = frozen(daemon, "w")
    (folder / "manifest.json").write_text("{")
    assert cli.run(["window", "thaw", "w"]) == 1
    capsys.readouterr()
    assert cli.run(["window", "delete", "w", "--force", *more]) == 0
    told = capsys.readouterr().out

    assert (json.loads(told) == {"name": "w", "deleted": True}) if more else told == "w: deleted\n"
    assert windows(daemon) == []
    assert not folder.exists()


@pytest.mark.parametrize(("typed", "status", "left"), [("\n", 1, ["w"]), ("y\n", 0, [])])
def test_on_a_terminal_it_asks_first(
    daemon: Hive, typed: str, status: int, left: list[str]
) -> None:
    frozen(daemon, "w")
    code, shown, out = on_a_terminal("window", "delete", "w", "--json", typed=typed)

    assert (code, [one["name"] for one in windows(daemon)]) == (status, left)
    assert "Delete window w (145 tokens, 18 KiB)? What is in it is lost. [y/N]" in shown
    assert json.loads(out or "null") == (None if left else {"name": "w", "deleted": True})
    assert ("nothing was deleted" in shown) is bool(left)


# ── diagnose and repair ─────────────────────────────────────────────────────────────────────────


def test_damaged_windows_are_found(daemon: Hive, capsys: Capture) -> None:
    """In every block, and where not even the manifest can be read (R117)."""
    frozen(daemon, "good")
    folder = frozen(daemon, "holed")
    lose(folder, "000001-0")
    corrupt(folder, "000003-0")
    (frozen(daemon, "torn") / "manifest.json").write_text("{")
    assert cli.run(["window", "diagnose", "--check-integrity"]) == 1
    out, err = capsys.readouterr()
    found = as_json(capsys, "diagnose", "--check-integrity", status=1)["windows"]

    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "window owner state blocks whole found",
        "good ops whole 9 of 9",
        "holed ops damaged 7 of 9 1 missing (000001-0), 1 corrupt (000003-0)",
        "torn ops damaged STORAGE_CORRUPTED: The window's manifest cannot be understood.",
    ]
    assert err.startswith("hive: 2 of 3 windows are not whole\nhive: what to do: ")
    assert [(one["name"], one["state"]) for one in found] == [
        *(("good", "whole"), ("holed", "damaged"), ("torn", "damaged")),
    ]
    assert (found[1]["missing"], found[1]["corrupt"]) == (["000001-0"], ["000003-0"])
    assert found[2]["code"] == "STORAGE_CORRUPTED"


def test_one_window_is_checked_alone(daemon: Hive, capsys: Capture) -> None:
    """(R117)"""
    frozen(daemon, "good")
    (frozen(daemon, "torn") / "manifest.json").unlink()

    assert printed(capsys, "diagnose", "good", "--check-integrity")[1:] == ["good ops whole 9 of 9"]
    assert printed(capsys, "diagnose", "torn", "--check-integrity", status=1)[1:] == [
        "torn ops damaged STORAGE_CORRUPTED: The window's manifest is missing."
    ]


def test_each_owners_window_of_a_name_is_checked(daemon: Hive, capsys: Capture) -> None:
    """(R117)"""
    frozen(daemon, "w")
    lose(frozen(daemon, "w", key="ann"), "000000-0")
    found = as_json(capsys, "diagnose", "--check-integrity", status=1)["windows"]

    assert {(one["owner"], one["state"]) for one in found} == {
        *(("ops", "whole"), ("ann", "damaged")),
    }
    assert cli.run(["window", "diagnose", "--check-integrity", "--owner", "ops"]) == 0


def test_every_page_of_windows_is_checked(
    daemon: Hive, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(R117)"""
    session = talked(daemon)
    for name in "abc":
        printed(capsys, "freeze", session, name, "--keep-active")
    monkeypatch.setattr("hive.cli.window.PAGE", 2)
    found = as_json(capsys, "diagnose", "--check-integrity")["windows"]

    assert [one["name"] for one in found] == ["a", "b", "c"]


def test_a_window_that_cannot_be_checked_hides_no_other(daemon: Hive, capsys: Capture) -> None:
    """Nor is it called whole (R117)."""
    corrupt(frozen(daemon, "busy"), "000000-0")
    lose(frozen(daemon, "holed"), "000000-0")
    daemon.turn_cache(store_s=30)
    path, events = "/hive/v1/windows/busy/repair?owner=ops", {"Accept": "text/event-stream"}
    repair = daemon.stream(path, headers=events)
    try:
        repair.wait_for_events(1)
        told = printed(capsys, "diagnose", "--check-integrity", status=1)
        assert cli.run(["window", "diagnose", "busy", "--check-integrity"]) == 1
        alone = capsys.readouterr()
    finally:
        repair.leave()
        daemon.turn_cache(store_s=0)

    wrong = "Cannot perform this operation in current state: another operation on the window"
    assert told[1:] == [
        f"busy ops not checked INVALID_STATE_TRANSITION: {wrong} is under way.",
        "holed ops damaged 8 of 9 1 missing (000000-0)",
    ]
    assert (alone.out, alone.err.splitlines()[0]) == (
        "",
        f"hive: INVALID_STATE_TRANSITION: {wrong} is under way.",
    )
    must(lambda: cli.run(["window", "delete", "busy", "--force"]) == 0, 10, "no repair any more")


def test_unasked_nothing_is_checked(daemon: Hive, capsys: Capture) -> None:
    lose(frozen(daemon, "w"), "000000-0")
    assert cli.run(["window", "diagnose"]) == 0
    out, err = capsys.readouterr()

    assert out.splitlines()[1].split() == ["w", "ops", "145", "9", "never", "thawed"]
    assert "nothing was checked: --check-integrity" in err
    assert as_json(capsys, "diagnose", "w")["windows"][0]["receipt"] is None


def test_a_repair_says_what_was_recovered_and_what_was_computed(
    daemon: Hive, capsys: Capture
) -> None:
    """First what it would do, then what it did (R118)."""
    folder = frozen(daemon, "w")
    lose(folder, "000001-0")
    corrupt(folder, "000003-0")
    corrupt(folder, "000004-0")

    would = "would take 3 blocks from the KV cache's files, or compute what is not there again"
    assert printed(capsys, "repair", "w", status=1) == [
        "w: 6 of 9 blocks are whole; 1 missing (000001-0), 2 corrupt (000003-0, 000004-0)",
        f"w: --attempt-recovery {would}",
    ]
    assert printed(capsys, "repair", "w", "--attempt-recovery") == [
        "w: 1 block recovered from the KV cache's files",
        "w: 2 blocks computed again",
        "w: 9 of 9 blocks are whole",
    ]
    assert printed(capsys, "repair", "w") == ["w: nothing is damaged; 9 of 9 blocks are whole"]
    assert printed(capsys, "repair", "w", "--attempt-recovery") == [
        "w: nothing was damaged",
        "w: 9 of 9 blocks are whole",
    ]


def test_programs_get_the_repairs_report(daemon: Hive, capsys: Capture) -> None:
    """(R118)"""
    lose(frozen(daemon, "w"), "000001-0")

    assert as_json(capsys, "repair", "w", status=1)["missing"] == ["000001-0"]
    assert as_json(capsys, "repair", "w", "--attempt-recovery")["recovered"] == 1


# ── what is not there ───────────────────────────────────────────────────────────────────────────

OF_A_WINDOW = [
    ["thaw"],
    ["status"],
    ["clone", "other"],
    ["delete", "--force"],
    ["diagnose"],
    ["repair"],
    ["repair", "--attempt-recovery"],
]


@pytest.mark.parametrize("args", OF_A_WINDOW, ids=" ".join)
def test_a_window_that_is_not_there(daemon: Hive, capsys: Capture, args: list[str]) -> None:
    """Nor does a command go up a path and find something else."""
    command, *more = args
    assert cli.run(["window", command, "nowhere", *more]) == 1
    out, err = capsys.readouterr()
    error = as_json(capsys, command, "..", *more, status=1)["error"]

    assert out == ""
    assert err.splitlines() == [
        "hive: WINDOW_NOT_FOUND: Window not found: nowhere",
        "hive: what to do: List the windows with window_list or 'hive window list'.",
    ]
    assert error["code"] == "INVALID_WINDOW_NAME"


def test_what_no_window_is_called_reaches_nothing_else(daemon: Hive, capsys: Capture) -> None:
    for name in ("", ".", "../sessions", "a b", "a/b", "a?b", "a%2Fb", "\udcff", "nö"):
        error = as_json(capsys, "delete", name, "--force", status=1)["error"]
        assert error["code"] == ("NOT_FOUND" if "../" in name else "INVALID_WINDOW_NAME"), name


def test_another_keys_window_is_not_there(
    daemon: Hive, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen(daemon, "w")
    monkeypatch.setenv("HIVE_API_KEY", KEYS["ann"])

    told = as_json(capsys, "status", "w", "--owner", "ops", status=1)["error"]["code"]
    assert told == "FORBIDDEN"
    told = as_json(capsys, "status", "w", status=1)["error"]["code"]
    assert told == "WINDOW_NOT_FOUND"
    assert as_json(capsys, "diagnose", "--check-integrity") == {"windows": []}


@pytest.mark.parametrize(
    "args",
    [
        ["freeze", "session"],
        ["list", "--sort", "size"],
        ["list", "--limit", "0"],
        ["list", "--offset", "-1"],
        ["clone", "w"],
        ["nothing"],
    ],
)
def test_wrong_usage_is_2(capsys: Capture, args: list[str]) -> None:
    assert cli.run(["window", *args]) == 2
    assert "Usage: hive window" in capsys.readouterr().err


def test_what_may_take_minutes_is_waited_for(capsys: Capture) -> None:
    """The daemon's own limit is 300 s."""
    for command in ("freeze", "thaw", "diagnose", "repair"):
        assert cli.run(["window", command, "--help"]) == 0
        assert "[default: 330.0;" in " ".join(capsys.readouterr().out.split())


# ── progress ────────────────────────────────────────────────────────────────────────────────────


def test_progress_is_shown_on_a_terminal(daemon: Hive) -> None:
    session = talked(daemon)
    code, shown, out = on_a_terminal("window", "freeze", session, "w")

    assert (code, out) == (0, "w: frozen, 145 tokens, 9 blocks, 18 KiB\n")
    assert "w: link" in shown
    assert "9/9" in shown


def test_progress_of_many_windows_names_each(daemon: Hive) -> None:
    frozen(daemon, "a")
    frozen(daemon, "b")
    code, shown, _ = on_a_terminal("window", "diagnose", "--check-integrity")

    assert code == 0
    assert "a (1 of 2): check" in shown
    assert "b (2 of 2): check" in shown


def test_elsewhere_no_progress_is_shown(daemon: Hive, capsys: Capture) -> None:
    session = talked(daemon)
    assert cli.run(["window", "freeze", session, "w"]) == 0
    assert capsys.readouterr().err == ""


# ── a daemon that answers otherwise ─────────────────────────────────────────────────────────────

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = HEAD % b"text/event-stream"


@contextlib.contextmanager
def answering(*parts: bytes) -> Iterator[str]:
    """The address of something that answers one request with these chunks; an empty one ends it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def answer() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):  # who has heard enough leaves
                connection.recv(65536)
                head, *chunks = parts
                connection.sendall(head)
                for chunk in chunks:
                    connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            thread.join()


def watched(url: str, heard: list[tuple[str, int, int]] | None = None) -> Any:
    def told(*one: Any) -> None:
        if heard is not None:
            heard.append(one)

    return client.watch("POST", "/", told, url=url, api_key=None, timeout_s=10)


def test_events_arrive_in_any_pieces_and_of_any_length() -> None:
    heard: list[tuple[str, int, int]] = []
    result = {"text": "é" * 400_000}
    text = b'event: progress\ndata: {"phase": "store", "done": 1, "total": 2}\n\n'
    text += b"event: result\ndata: %b\n\n" % json.dumps(result, ensure_ascii=False).encode()
    pieces = [text[:3], text[3:60], text[60:64], text[64:90], *(text[90:],), b""]

    with answering(EVENTS, *pieces) as url:
        assert watched(url, heard) == result
    assert heard == [("store", 1, 2)]


@pytest.mark.parametrize("last", [(), (b"",)], ids=["cut off", "ended"])
def test_an_outcome_that_never_came_is_told(last: tuple[bytes, ...]) -> None:
    told = b'event: progress\ndata: {"phase": "store", "done": 1, "total": 2}\n\n'
    with (
        answering(EVENTS, told, *last) as url,
        pytest.raises(DaemonUnreachable, match="ended in the middle of its answer") as caught,
    ):
        watched(url)

    assert caught.value.exit_code == 255
    assert "look how far it came" in caught.value.suggested_action


def test_an_error_in_the_stream_is_hives() -> None:
    body = {"error": {"code": "STORAGE_CORRUPTED", "message": "torn", "details": {}}}
    text = b"event: error\ndata: %b\n\n" % json.dumps(body).encode()
    with answering(EVENTS, text, b"") as url, pytest.raises(StorageCorrupted, match="torn"):
        watched(url)


def test_an_answer_that_is_no_stream_is_not_hives() -> None:
    with (
        answering(HEAD % b"text/html", b"<html>", b"") as url,
        pytest.raises(HiveError, match="something that is not hive's") as caught,
    ):
        watched(url)
    assert caught.value.exit_code == 1

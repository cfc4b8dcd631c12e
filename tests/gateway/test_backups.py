"""Backups over HTTP: bodies, owners, lists, streams, and that no secret is ever told."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steps.driver import Answer, Hive
from tests.windows.daemon import Owner, daemon, manifest_of, new_name, state_of, texts, told_by

BACKUPS = "/hive/v1/backups"


@pytest.fixture(scope="module")
def hive() -> Iterator[Hive]:
    with daemon(windows={"max_backups": 1000}) as it:
        yield it


@pytest.fixture
def ada(hive: Hive) -> Owner:
    return Owner(hive)


@pytest.fixture
def bob(hive: Hive) -> Owner:
    return Owner(hive, "bob")


@pytest.fixture
def name(ada: Owner) -> str:
    return ada.frozen(40)[1]


def backed_up(owner: Owner, name: str) -> Any:
    answer = owner.ask("POST", BACKUPS, {"window": name})
    assert answer.status == 201, answer.body
    return answer.json


def listed(owner: Owner, query: str = "") -> list[Any]:
    answer = owner.ask("GET", BACKUPS + query)
    assert answer.status == 200, answer.body
    found: list[Any] = answer.json["backups"]
    return found


def restored(owner: Owner, query: str = "", **body: Any) -> Answer:
    return owner.ask("POST", f"{BACKUPS}/restore{query}", body)


def on_disk(hive: Hive) -> list[Path]:
    return sorted((hive.state / "backups").iterdir())


# ── there and back ──────────────────────────────────────────────────────────────────────────────


def test_what_is_made_is_listed_restored_and_deleted(hive: Hive, ada: Owner, name: str) -> None:
    """R124, R125, R126: and the engine's own count proves what was restored."""
    window = ada.window(name)
    made = backed_up(ada, name)
    assert made["window"] == name
    assert made["owner"] == "ada"
    assert made["whole"] is True
    for key in ("tokens", "blocks", "bytes", "model", "session_id", "description", "tags"):
        assert made[key] == window[key], key
    assert made["frozen_at"] == window["created_at"] < made["created_at"]
    assert listed(ada, f"?window={name}") == [made]

    assert ada.ask("DELETE", f"/hive/v1/windows/{name}").status == 204
    again = restored(ada, window=name)
    assert again.status == 201, again.body
    told = again.json
    assert told.pop("backup") == {"window": name, "timestamp": made["timestamp"]}
    assert told == {key: window[key] for key in told}
    thawed = ada.do("thaw", name, {"require_full": True}).json
    more = [*thawed["messages"], {"role": "user", "content": "go on"}]
    usage = ada.chat(thawed["session_id"], more).json["usage"]
    promised = thawed["receipt"]["usable_tokens"]
    assert promised == window["blocks"] * 16
    assert usage["prompt_tokens_details"]["cached_tokens"] >= promised

    path = f"{BACKUPS}/{name}/{made['timestamp']}"
    before = len(on_disk(hive))
    assert ada.ask("DELETE", path).status == 204
    assert len(on_disk(hive)) == before - 1
    assert told_by(ada.ask("DELETE", path)) == (404, "NOT_FOUND", None)
    assert listed(ada, f"?window={name}") == []


def test_an_event_stream_tells_how_far_it_is(ada: Owner, name: str) -> None:
    blocks = ada.window(name)["blocks"]
    for path, body, phase, key in (
        (BACKUPS, {"window": name}, "write", "timestamp"),
        (f"{BACKUPS}/restore", {"window": name, "name": new_name()}, "read", "backup"),
    ):
        answer = ada.ask("POST", path, body, Accept="text/event-stream")
        assert answer.status == 200
        events = [one.split("\n") for one in answer.body.decode().split("\n\n")[:-1]]
        kinds = [one[0] for one in events]
        assert set(kinds[:-1]) == {"event: progress"}
        assert kinds[-1] == "event: result"
        last = json.loads(events[-2][1].removeprefix("data: "))
        assert last == {"phase": phase, "done": blocks, "total": blocks}
        assert key in json.loads(events[-1][1].removeprefix("data: "))


def test_an_error_in_a_stream_is_its_last_event(ada: Owner, name: str) -> None:
    backed_up(ada, name)
    body = {"window": name}
    answer = ada.ask("POST", f"{BACKUPS}/restore", body, Accept="text/event-stream")
    last = answer.body.decode().split("\n\n")[-2]
    assert last.startswith("event: error\n")
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == "WINDOW_ALREADY_EXISTS"


def test_pages_the_newest_first(ada: Owner, name: str) -> None:
    made = [backed_up(ada, name) for _ in range(3)]
    other = ada.frozen(20)[1]
    backed_up(ada, other)
    assert listed(ada, f"?window={name}") == made[::-1]
    page = ada.ask("GET", f"{BACKUPS}?window={name}&limit=2").json
    assert (page["backups"], page["next_offset"]) == ([made[2], made[1]], 2)
    page = ada.ask("GET", f"{BACKUPS}?window={name}&limit=2&offset=2").json
    assert page == {"backups": [made[0]]}
    assert listed(ada, "?limit=1")[0]["window"] == other


# ── what is refused ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {}, None),
        ("", {"window": 5}, "window"),
        ("", {"window": "w", "owner": "bob"}, None),
        ("", [], None),
        ("", b"{", None),
        ("", {"window": "../w"}, "name"),
        ("/restore", {}, None),
        ("/restore", {"window": "w", "timestamp": 5}, "timestamp"),
        ("/restore", {"window": "w", "timestamp": "../x"}, "timestamp"),
        ("/restore", {"window": "w", "name": 5}, "name"),
        ("/restore", {"window": "w", "name": "a/b"}, "name"),
        ("/restore", {"window": "w", "salt": "mine"}, None),
    ],
)
def test_a_body_that_does_not_fit_is_told_what_is_wrong_with_it(
    hive: Hive, ada: Owner, path: str, body: Any, param: str | None
) -> None:
    """R074, R081, R082"""
    before = state_of(hive), on_disk(hive)
    answer = ada.ask("POST", BACKUPS + path, body)
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param
    assert (state_of(hive), on_disk(hive)) == before


@pytest.mark.parametrize(
    "query", ["?window=a%2Fb", "?window=", "?limit=0", "?limit=x", "?offset=-1"]
)
def test_a_list_of_nothing_is_told(ada: Owner, query: str) -> None:
    assert ada.ask("GET", BACKUPS + query).status == 400


@pytest.mark.parametrize("path", ["..%2F..%2Fcatalogue.db/x", "w/..%2Fx", "w/x%00", "%2E%2E/x"])
def test_no_path_leads_out_of_the_directory(hive: Hive, ada: Owner, path: str) -> None:
    """R081"""
    before = on_disk(hive)
    assert ada.ask("DELETE", f"{BACKUPS}/{path}").status in (400, 404)
    assert on_disk(hive) == before
    assert (hive.state / "catalogue.db").exists()


def test_another_key_does_not_see_it_and_a_key_for_metrics_may_not_ask(
    hive: Hive, ada: Owner, bob: Owner, name: str
) -> None:
    """R084"""
    made = backed_up(ada, name)
    assert listed(bob) == []
    for answer in (
        bob.ask("POST", BACKUPS, {"window": name}),
        restored(bob, window=name, name=new_name()),
        restored(bob, window=name, timestamp=made["timestamp"]),
        bob.ask("DELETE", f"{BACKUPS}/{name}/{made['timestamp']}"),
    ):
        assert answer.status == 404, answer.body
    eve = Owner(hive, "eve")
    for answer in (
        bob.ask("GET", f"{BACKUPS}?owner=ada"),
        restored(bob, "?owner=ada", window=name),
        eve.ask("GET", BACKUPS),
        eve.ask("POST", BACKUPS, {"window": name}),
    ):
        assert told_by(answer)[:2] == (403, "FORBIDDEN")
    assert hive.ask("GET", BACKUPS, headers={"Authorization": "Bearer nobody"}).status == 401
    assert listed(ada, f"?window={name}") == [made]


def test_an_admin_sees_all_and_the_files_that_are_none(hive: Hive, ada: Owner, bob: Owner) -> None:
    root = Owner(hive, "root")
    for owner in (ada, bob):
        backed_up(owner, owner.frozen(20)[1])
    odd = hive.state / "backups" / "odd.tar.zst"
    odd.write_bytes(b"half a copy")
    try:
        told = root.ask("GET", f"{BACKUPS}?limit=1000").json
        mine = ada.ask("GET", BACKUPS).json
    finally:
        odd.unlink()
    assert {"ada", "bob"} <= {one["owner"] for one in told["backups"]}
    ((one,),) = (told["unreadable"],)
    assert one["file"] == "odd.tar.zst"
    assert "damaged" in one["why"]
    assert "unreadable" not in mine
    assert {one["owner"] for one in listed(root, "?owner=bob&limit=1000")} == {"bob"}


def test_a_name_that_is_taken_says_how_to_choose_another(ada: Owner, name: str) -> None:
    backed_up(ada, name)
    answer = restored(ada, window=name)
    assert told_by(answer) == (409, "WINDOW_ALREADY_EXISTS", "CWM-3003")
    assert "--name" in answer.error["details"]["suggested_action"]


# ── secrets ─────────────────────────────────────────────────────────────────────────────────────


def test_the_salt_is_in_the_file_and_nowhere_else(hive: Hive, ada: Owner, name: str) -> None:
    """R076: neither in an answer, nor in a log, nor for another user of the host."""
    salt = manifest_of(ada.folder(name))["salt"]
    answers = [
        ada.ask("POST", BACKUPS, {"window": name}),
        ada.ask("GET", BACKUPS),
        hive.ask("GET", f"{BACKUPS}?limit=1000"),
        restored(ada, window=name),
        restored(ada, window=name, name=new_name()),
    ]
    assert [one.status for one in answers] == [201, 200, 200, 409, 201]
    for answer in answers:
        assert salt.encode() not in answer.body
        assert str(hive.state).encode() not in answer.body
    assert salt not in texts(hive)
    assert (hive.state / "backups").stat().st_mode & 0o777 == 0o700
    for path in on_disk(hive):
        assert path.stat().st_mode & 0o777 == 0o600
        assert salt not in path.name


def test_a_damaged_backup_is_told_and_leaves_nothing(hive: Hive, ada: Owner, name: str) -> None:
    """R092, R107"""
    before = on_disk(hive)
    backed_up(ada, name)
    (path,) = set(on_disk(hive)) - set(before)
    assert ada.ask("DELETE", f"/hive/v1/windows/{name}").status == 204
    state = state_of(hive)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-300] ^= 1
    path.write_bytes(flipped)
    answer = restored(ada, window=name)
    assert told_by(answer) == (500, "STORAGE_CORRUPTED", "CWM-4004")
    assert "block 0000" in answer.error["message"]
    os.truncate(path, len(whole) // 2)
    answer = restored(ada, window=name)
    assert told_by(answer) == (500, "STORAGE_CORRUPTED", "CWM-4004")
    assert "cut off" in answer.error["message"]
    assert listed(ada, f"?window={name}")[0]["whole"] is False
    assert state_of(hive) == state
    path.write_bytes(whole)
    assert restored(ada, window=name).status == 201
    assert hive.metric("hive_window_failures_total", operation="restore", code="STORAGE_CORRUPTED")

"""Freeze, thaw, verify, repair, clone and delete on the real daemon: whole, or as if never tried."""

import asyncio
import contextlib
import itertools
import json
import threading
from collections.abc import Awaitable, Iterator
from typing import Any

import pytest

from hive.errors import InvalidStateTransition, OperationTimeout, StoreUnreachable
from hive.policy.windows import WindowState
from hive.storage.catalogue import Catalogue, Window
from hive.windows.files import Manifest
from hive.windows.work import in_thread
from steps.driver import Answer, Hive
from steps.waiting import must
from tests.patience import awaited, within
from tests.windows.daemon import (
    Owner,
    daemon,
    manifest_of,
    new_name,
    said,
    state_of,
    told_by,
    turned,
    wait_quiet,
)
from tests.windows.making import CHUNK
from tests.windows.test_backups import kept


@pytest.fixture(scope="module")
def hive() -> Iterator[Hive]:
    with daemon() as it:
        yield it


@pytest.fixture
def ada(hive: Hive) -> Owner:
    return Owner(hive)


class Asking:
    """A call in a thread of its own."""

    def __init__(self, owner: Owner, *what: object) -> None:
        self.answer: Answer | None = None
        self._thread = threading.Thread(target=self._ask, args=(owner, *what))
        self._thread.start()

    def _ask(self, owner: Owner, method: str, path: str, body: object) -> None:
        self.answer = owner.ask(method, path, body)

    def end(self) -> Answer:
        self._thread.join(30)
        assert self.answer is not None
        return self.answer


def freezing(owner: Owner, session: str, name: str) -> Asking:
    """A freeze that has begun: its name is taken."""
    asking = Asking(owner, "POST", "/hive/v1/windows", {"session_id": session, "name": name})
    must(lambda: name in owner.names("?state=FREEZING"), 5, f"a freeze of {name}")
    return asking


# ── freeze ──────────────────────────────────────────────────────────────────────────────────────


def test_a_frozen_window_has_every_full_chunk_on_disk(hive: Hive, ada: Owner) -> None:
    """R106, C.5: success is proof that the blocks are there; the numbers are measured ones."""
    session = ada.talk(100)
    answer = ada.freeze(session, (name := new_name()), description="häng 😀", tags=["a", "b"])
    told = answer.json
    assert (answer.status, told["state"], told["session_id"]) == (201, "FROZEN", session)
    assert (told["owner"], told["model"], told["receipt"]) == ("ada", "m", None)
    assert (told["description"], told["tags"]) == ("häng 😀", ["a", "b"])
    manifest = manifest_of(ada.folder(name))
    assert told["tokens"] == len(manifest["tokens"]) >= 100
    assert told["blocks"] == told["tokens"] // CHUNK == len(ada.blocks(name))
    assert told["bytes"] == sum(path.stat().st_size for path in ada.blocks(name))
    assert None not in ada.in_tier(name)
    assert ada.folder(name).stat().st_mode & 0o777 == 0o700
    assert ada.state(session) == "FROZEN"
    assert "path" not in told["identity"]
    assert {key: value for key, value in ada.window(name).items() if key in told} == told


def test_an_answer_that_is_just_read_is_in_the_window(ada: Owner) -> None:
    """The freeze waits for what is being written down."""
    for _ in range(5):
        session = ada.session()
        text = ada.chat(session, said(20)).json["choices"][0]["message"]["content"]
        name = new_name()
        assert ada.freeze(session, name).status == 201
        assert ada.do("thaw", name).json["messages"][-1]["content"] == text


def test_a_conversation_shorter_than_a_chunk_is_a_window_without_blocks(ada: Owner) -> None:
    """C27: it has nothing to be found, so nothing is missing."""
    session = ada.session()
    assert ada.chat(session, said(1), max_tokens=1).status == 200
    answer = ada.freeze(session, (name := new_name()))
    assert (answer.status, answer.json["blocks"], answer.json["bytes"]) == (201, 0, 0)
    thawed = ada.do("thaw", name, {"require_full": True})
    assert (thawed.status, thawed.json["receipt"]["partial"]) == (200, False)
    assert thawed.json["receipt"]["recompute_tokens"] == answer.json["tokens"]
    assert ada.do("verify", name).json["whole"] is True


@pytest.mark.parametrize("fault", ["client leaves", "engine dies", "cancelled"])
def test_a_freeze_that_is_broken_off_is_undone(hive: Hive, ada: Owner, fault: str) -> None:
    """R107, C28"""
    before = state_of(hive)
    session, name = ada.session(), new_name()
    with turned(hive, lose_stores=True):
        assert ada.chat(session, said(40)).status == 200
        request_id = f"freeze-{name}"
        asking = ada.stream(
            "/hive/v1/windows", {"session_id": session, "name": name}, X_Request_Id=request_id
        )
        must(lambda: name in ada.names("?state=FREEZING"), 5, "a freeze")
        if fault == "client leaves":
            asking.leave()
        elif fault == "cancelled":
            assert ada.ask("DELETE", f"/hive/v1/requests/{request_id}").status in (200, 202, 204)
            answer = asking.answer
            assert (answer.status, answer.code) == (499, "REQUEST_CANCELLED")
        else:
            hive.double("m").die("sigkill")
            answer = asking.answer
            assert answer.status in (500, 502, 503), answer.body
        wait_quiet(hive, before)
    hive.wait_ready()
    assert ada.state(session) == "ACTIVE"
    must(lambda: ada.chat(session, said(40)).status == 200, 20, "an answer")
    assert ada.freeze(session, name).status == 201
    assert ada.do("verify", name).json["whole"] is True


def test_of_two_freezes_of_one_session_at_once_one_wins(hive: Hive, ada: Owner) -> None:
    """R086, R087"""
    session, first, second = ada.session(), new_name(), new_name()
    other = ada.talk(20)
    with turned(hive, lose_stores=True):
        ada.chat(session, said(40))
        asking = freezing(ada, session, first)
        assert told_by(ada.freeze(session, second)) == (409, "INVALID_STATE_TRANSITION", "CWM-3001")
        answer = ada.freeze(other, first)
        assert told_by(answer) == (409, "WINDOW_ALREADY_EXISTS", "CWM-3003")
        asked = ada.chat(session, said(3))
        assert told_by(asked) == (409, "SESSION_NOT_ACTIVE", "CWM-3004")
    assert asking.end().status == 201
    assert told_by(ada.freeze(session, second)) == (409, "SESSION_ALREADY_FROZEN", "CWM-3002")
    assert not [row for row in state_of(hive)[1] if second in row]


def test_many_freeze_at_once(hive: Hive, ada: Owner) -> None:
    """R075: as many as there are, and each is whole."""
    sessions = [ada.talk(30) for _ in range(10)]
    names = [new_name() for _ in sessions]
    asked = [
        Asking(ada, "POST", "/hive/v1/windows", {"session_id": session, "name": name})
        for session, name in zip(sessions, names, strict=True)
    ]
    assert [one.end().status for one in asked] == [201] * len(names)
    assert all(ada.do("verify", name).json["whole"] for name in names)


def test_keep_active_is_a_checkpoint(ada: Owner) -> None:
    """C24: the session goes on, and may be frozen again."""
    session, name = ada.frozen(keep_active=True)
    assert ada.state(session) == "ACTIVE"
    told = ada.found(session)["messages"]
    more = [*told, {"role": "user", "content": "go on"}]
    assert ada.chat(session, more).status == 200
    later = new_name()
    assert ada.freeze(session, later).status == 201
    assert ada.do("thaw", name).json["messages"] == told
    assert ada.do("thaw", later).json["messages"][:-1] == more
    assert ada.window(later)["tokens"] > ada.window(name)["tokens"]


def test_a_freeze_during_an_answer_is_refused(hive: Hive, ada: Owner) -> None:
    """R086: CWM-3001 during generation; the answer goes on."""
    session = ada.session()
    hive.double("m").set(token_s=0.05)
    try:
        body = {"model": "m", "messages": said(30), "max_tokens": 12, "stream": True}
        stream = ada.stream("/v1/chat/completions", body, X_Hive_Session=session)
        stream.wait_for_events(3)
        answer = ada.freeze(session, (name := new_name()))
        assert told_by(answer) == (409, "INVALID_STATE_TRANSITION", "CWM-3001")
        text = "Cannot perform this operation in current state: the session is being answered in."
        assert answer.error["message"] == text
        stream.wait_for_end()
        assert stream.is_whole
    finally:
        hive.double("m").set(token_s=0.0)
    assert ada.freeze(session, name).status == 201


# ── the order of what is checked ────────────────────────────────────────────────────────────────

BAD = {
    "session id": ("CWM-1001", "Invalid session ID format"),
    "name": ("CWM-1002", "Invalid window name format"),
    "unknown": ("CWM-2001", "Session not found: nobody"),
    "frozen": ("CWM-3002", "Session is already frozen"),
    "taken": ("CWM-3003", "Window name already exists: {name}"),
    "silent": ("CWM-3001", "Cannot perform this operation in current state: nothing was "),
}
SESSIONS = ("session id", "unknown", "frozen", "silent", "well")
NAMES = ("name", "taken", "well")


@pytest.fixture(scope="module")
def prepared(hive: Hive) -> dict[str, str]:
    ada = Owner(hive)
    frozen, taken = ada.frozen(20)
    return {"frozen": frozen, "taken": taken, "silent": ada.session(), "well": ada.talk(20)}


@pytest.mark.parametrize(("session", "name"), list(itertools.product(SESSIONS, NAMES)))
def test_what_is_wrong_is_told_in_the_sources_order_and_has_no_effect(
    hive: Hive, ada: Owner, prepared: dict[str, str], session: str, name: str
) -> None:
    """R074, R080-R083, R086-R088, R100: every combination of what can be wrong with a freeze."""
    given = {"session id": "no id!", "unknown": "nobody", **prepared}[session]
    named = {"name": "no name!", "taken": prepared["taken"], "well": new_name()}[name]
    before = state_of(hive)
    answer = ada.freeze(given, named, keep_active=True)
    wrong = [one for one in BAD if one in (session, name)]  # BAD is in order
    if not wrong:
        assert answer.status == 201
        return
    number, text = BAD[wrong[0]]
    assert answer.error["details"]["number"] == number
    assert answer.error["message"].startswith(text.format(name=named))
    assert answer.status == {"1": 400, "2": 404, "3": 409}[number[4]]
    assert answer.error["details"]["retryable"] is False
    assert state_of(hive) == before


# ── thaw ────────────────────────────────────────────────────────────────────────────────────────


def test_a_thaw_is_proved_by_the_engines_own_count(hive: Hive, ada: Owner) -> None:
    """C27, C.5: into a new session with the window's salt; any other salt finds nothing."""
    session, name = ada.frozen(100)
    answer = ada.do("thaw", name)
    told, receipt = answer.json, answer.json["receipt"]
    blocks = ada.window(name)["blocks"]
    assert (answer.status, told["warnings"], told["model"]) == (200, [], "m")
    assert told["session_id"] != session
    assert ada.state(told["session_id"]) == "THAWED"
    assert {key: receipt[key] for key in ("blocks_found", "blocks_missing", "partial")} == {
        "blocks_found": blocks,
        "blocks_missing": 0,
        "partial": False,
    }
    assert receipt["usable_tokens"] == blocks * CHUNK
    assert receipt["usable_tokens"] + receipt["recompute_tokens"] == ada.window(name)["tokens"]
    assert "cached_tokens" not in ada.window(name)["receipt"]

    more = [*told["messages"], {"role": "user", "content": "go on"}]
    used = ada.chat(told["session_id"], more).json["usage"]["prompt_tokens_details"]
    assert used["cached_tokens"] >= receipt["usable_tokens"]
    must(lambda: ada.state(told["session_id"]) == "ACTIVE", 5, "what was said")
    must(lambda: "cached_tokens" in ada.window(name)["receipt"], 5, "the proof")
    assert ada.window(name)["receipt"]["cached_tokens"] == used["cached_tokens"]
    assert hive.logged("thaw proved", window=name)
    assert ada.chat(ada.session(), more).json["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 0
    }
    assert ada.state(session) == "FROZEN"


def test_a_window_goes_back_into_its_own_session_once(ada: Owner) -> None:
    """C24"""
    session, name = ada.frozen()
    told = ada.do("thaw", name, {"session_id": session})
    assert (told.status, told.json["session_id"]) == (200, session)
    assert ada.state(session) == "THAWED"
    again = ada.do("thaw", name, {"session_id": session})
    assert told_by(again) == (409, "INVALID_STATE_TRANSITION", "CWM-3001")
    assert ada.freeze(session, new_name()).status == 201  # THAWED may be frozen at once


def test_a_window_does_not_go_into_another_session(ada: Owner) -> None:
    """R099's family: CWM-8003; of another key's session not even that it exists is told."""
    session, name = ada.frozen()
    other, _ = ada.frozen()
    for given, wanted in (
        (other, (403, "SESSION_ISOLATION", "CWM-8003")),
        (Owner(ada.hive, "bob").session(), (404, "SESSION_NOT_FOUND", "CWM-2001")),
        ("nobody", (404, "SESSION_NOT_FOUND", "CWM-2001")),
        ("no id!", (400, "INVALID_SESSION_ID", "CWM-1001")),
    ):
        assert told_by(ada.do("thaw", name, {"session_id": given})) == wanted
    assert ada.state(session) == ada.state(other) == "FROZEN"
    assert ada.window(name)["receipt"] is None


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_without_its_manifest_nothing_is_believed(ada: Owner, damage: str) -> None:
    """R092"""
    _, name = ada.frozen()
    manifest = ada.folder(name) / "manifest.json"
    whole = manifest.read_bytes()
    manifest.unlink() if damage == "gone" else manifest.write_bytes(whole[:-9] + b"x" + whole[-8:])
    for what in ("thaw", "verify", "repair"):
        assert told_by(ada.do(what, name)) == (500, "STORAGE_CORRUPTED", "CWM-4004")
    cloned = ada.do("clone", name, {"name": new_name()})
    assert told_by(cloned) == (500, "STORAGE_CORRUPTED", "CWM-4004")
    assert ada.window(name)["cache"] == {"files_in_tier": None}
    assert ada.ask("DELETE", f"/hive/v1/windows/{name}").status == 204  # R119


# ── verify and repair ───────────────────────────────────────────────────────────────────────────


def test_a_whole_window_is_told_so_and_needs_no_repair(ada: Owner) -> None:
    """R117"""
    _, name = ada.frozen()
    wanted = {"whole": True, "missing": [], "corrupt": [], "recovered": 0, "recomputed": 0}
    for what in ("verify", "repair"):
        told = ada.do(what, name).json
        assert {key: told[key] for key in wanted} == wanted
        assert told["blocks"] == told["blocks_whole"] == ada.window(name)["blocks"]


# ── clone and delete ────────────────────────────────────────────────────────────────────────────


def test_a_clone_shares_files_and_outlives_its_source(hive: Hive, ada: Owner) -> None:
    """C.5: links, a family, and a count of who has a block."""
    _, name = ada.frozen(80, tags=["x"], description="d")
    clone, grandchild = new_name(), new_name()
    answer = ada.do("clone", name, {"name": clone})
    told = answer.json
    assert (answer.status, told["tags"], told["description"]) == (201, ["x"], "d")
    assert ada.do("clone", clone, {"name": grandchild}).status == 201
    inodes = [[path.stat().st_ino for path in ada.blocks(one)] for one in (name, clone)]
    assert inodes[0] == inodes[1]
    assert ada.blocks(name)[0].stat().st_nlink == 4  # three windows and the tier
    assert ada.window(name)["lineage"] == {"ancestors": [], "clones": [clone]}
    assert ada.window(clone)["lineage"] == {"ancestors": [name], "clones": [grandchild]}
    assert ada.window(grandchild)["lineage"] == {"ancestors": [clone, name], "clones": []}

    folder = ada.folder(name)
    assert ada.ask("DELETE", f"/hive/v1/windows/{name}").status == 204
    assert not folder.exists()
    assert ada.window(clone)["lineage"] == {"ancestors": [], "clones": [grandchild]}
    assert ada.do("verify", clone).json["whole"] is True
    assert ada.do("thaw", clone, {"require_full": True}).status == 200


def test_a_clone_needs_a_name_that_is_free(hive: Hive, ada: Owner) -> None:
    """R081, R088, R107"""
    _, name = ada.frozen(20)
    before = state_of(hive)
    for new, wanted in (
        (name, (409, "WINDOW_ALREADY_EXISTS", "CWM-3003")),
        ("no name!", (400, "INVALID_WINDOW_NAME", "CWM-1002")),
    ):
        assert told_by(ada.do("clone", name, {"name": new})) == wanted
    missing = ada.do("clone", "missing", {"name": new_name()})
    assert told_by(missing) == (404, "WINDOW_NOT_FOUND", "CWM-2002")
    assert missing.error["message"] == "Window not found: missing"
    assert "window_list" in missing.error["details"]["suggested_action"]  # R084
    assert state_of(hive) == before


def test_a_deleted_window_is_gone_with_its_files_and_its_name_is_free(
    hive: Hive, ada: Owner
) -> None:
    """R107; LMCache's own files stay until they are not used."""
    session, name = ada.frozen()
    folder, theirs = ada.folder(name), ada.in_tier(name)
    assert ada.ask("DELETE", f"/hive/v1/windows/{name}").status == 204
    assert not folder.exists()
    assert all(path is not None and path.stat().st_nlink == 1 for path in theirs)
    again = ada.ask("DELETE", f"/hive/v1/windows/{name}")
    assert told_by(again) == (404, "WINDOW_NOT_FOUND", "CWM-2002")
    assert ada.state(session) == "FROZEN"
    assert ada.freeze(ada.talk(20), name).status == 201


def test_one_thing_at_a_time_is_done_with_a_window(hive: Hive, ada: Owner) -> None:
    """R086"""
    _, name = ada.frozen()
    path = f"/hive/v1/windows/{name}"
    with turned(hive, prefetch_s=1.0):
        thaw = ada.stream(f"{path}/thaw", {}, Accept="text/event-stream")
        thaw.wait_for_events(1)  # it is under way
        for answer in (
            ada.do("verify", name),
            ada.do("repair", name),
            ada.do("clone", name, {"name": new_name()}),
            ada.ask("DELETE", path),
        ):
            assert told_by(answer) == (409, "INVALID_STATE_TRANSITION", "CWM-3001")
        assert b"event: result" in thaw.answer.body
    assert ada.do("verify", name).status == 200
    assert "Traceback" not in hive.log_text


# ── what is told of it ──────────────────────────────────────────────────────────────────────────


def test_every_operation_is_logged_and_counted_alike(hive: Hive, ada: Owner) -> None:
    """R113, R115: operation, session_id, window_name, duration_ms; blocks_stored, or error_code."""
    session, name = ada.frozen()
    clone = new_name()
    ada.do("thaw", name)
    ada.do("clone", name, {"name": clone})
    ada.do("verify", name)
    ada.do("repair", name)
    ada.ask("DELETE", f"/hive/v1/windows/{clone}")
    for operation in ("freeze", "thaw", "clone", "verify", "repair", "delete"):
        of = clone if operation in ("clone", "delete") else name
        (line,) = hive.logged("window operation done", operation=operation, window_name=of)
        assert line["duration_ms"] > 0
        assert {"session_id", "model", "blocks_stored", "bytes"} <= line.keys()
        assert line["level"] == "info"
        metric = "hive_window_operation_seconds_count"
        assert hive.metric(metric, operation=operation) >= 1
    (stored,) = hive.logged("window operation done", operation="freeze", window_name=name)
    assert (stored["session_id"], stored["blocks_stored"]) == (session, ada.window(name)["blocks"])
    assert hive.metric("hive_windows", state="FROZEN") == len(
        hive.ask("GET", "/hive/v1/windows?limit=1000").json["windows"]
    )
    for path in ada.blocks(name):
        path.unlink()
    assert ada.do("thaw", name).code == "STORAGE_CORRUPTED"
    must(lambda: hive.logged("window operation failed", window_name=name), 5, "a line in the log")
    (failed,) = hive.logged("window operation failed", window_name=name)
    assert (failed["error_code"], failed["level"]) == ("STORAGE_CORRUPTED", "warning")
    assert failed["operation"] == "thaw"
    labels = {"operation": "thaw", "code": "STORAGE_CORRUPTED"}
    assert hive.metric("hive_window_failures_total", **labels) >= 1


def test_nothing_secret_was_ever_told(hive: Hive, ada: Owner) -> None:
    """R073, R076, C21: after everything above, salts, paths and token ids of no window."""
    _, name = ada.frozen()
    answers = [
        ada.ask("GET", f"/hive/v1/windows/{name}").body,
        ada.ask("GET", "/hive/v1/windows?limit=1000").body,
        ada.ask("GET", "/hive/v1/sessions?limit=1000").body,
        ada.do("thaw", name).body,
        ada.do("verify", name).body,
        ada.do("clone", name, {"name": new_name()}).body,
    ]
    told = b"\n".join(answers).decode()
    log = hive.log_text
    for path in (hive.state / "windows").glob("*/manifest.json"):
        manifest = manifest_of(path.parent)
        tokens = json.dumps(manifest["tokens"][:3])[1:-1]
        for secret in (manifest["salt"], tokens, tokens.replace(" ", ""), manifest["hashes"][:1]):
            text = "".join(secret)
            assert text not in told or not text
            assert text not in log or not text
    assert str(hive.home) not in told
    for line in hive.log:
        if line.get("event", "").startswith(("window", "session", "thaw")):
            assert str(hive.home) not in json.dumps(line)


# ── what comes late ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["thread", "backup"])
@awaited
async def test_a_window_is_nobody_elses_while_a_disk_keeps_who_works_on_it(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R107: a repair that hung, and comes back late, would write over what a newer one has done."""
    monkeypatch.setattr("hive.windows.work.HANGS_S", 0.1)
    async with kept("ada") as it:
        one, other = await it.frozen(1), await it.frozen(2)
        go_on = threading.Event()

        async def stuck() -> None:
            async with it.windows.alone(one):
                await in_thread(go_on.wait, 60)

        repairing = asyncio.ensure_future(stuck())
        await asyncio.sleep(0)
        repairing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await repairing
        doing = (
            it.windows.verify("ada", one.name)
            if how == "thread"
            else it.backups.create("ada", one.name)
        )
        with pytest.raises(InvalidStateTransition, match="is under way"):
            await doing
        assert (await it.windows.verify("ada", other.name)).is_whole  # it is nobody's fault
        go_on.set()
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(InvalidStateTransition):
                    assert (await it.windows.verify("ada", one.name)).is_whole
                    break
                await asyncio.sleep(0.01)


class Late(Catalogue):
    """It is not heard of a commit in time; some of them happen all the same."""

    happens = True

    async def commit_window(self, window: Window, **more: Any) -> None:
        if self.happens:
            await super().commit_window(window, **more)
        raise StoreUnreachable


@pytest.mark.parametrize("happens", [True, False])
@awaited
async def test_a_commit_that_came_late_is_told_as_what_it_was(
    happens: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """R106, R107: done is done; what was not is undone."""
    async with kept("ada") as it:
        one = await it.frozen()
        late = Late(it.catalogue._store)
        late.happens = happens
        it.windows._catalogue = late
        if happens:
            made = await it.windows.clone("ada", one.name, "later")
            assert made.state is WindowState.FROZEN
            assert "came late" in caplog.text
            assert (await it.windows.verify("ada", "later")).is_whole
        else:
            with pytest.raises(StoreUnreachable):
                await it.windows.clone("ada", one.name, "later")
        names = [row.name for row in await it.catalogue.windows(None, sort="name", state=None)]
        assert names == (["w1", "later"] if happens else ["w1"])
        assert it.home.files.folders() == {row.id for row in await it.catalogue.windows(None)}


@pytest.mark.parametrize("what", ["clone", "backup"])
@awaited
async def test_the_first_look_of_a_clone_or_a_backup_has_a_limit_too(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C15: a disk that hangs at the manifest keeps nobody for ever."""
    monkeypatch.setattr("hive.windows.operations.LIMIT_S", 0.2)
    monkeypatch.setattr("hive.windows.backups.LIMIT_S", 0.2)
    monkeypatch.setattr("hive.windows.work.HANGS_S", 0.1)
    async with kept("ada") as it:
        one = await it.frozen()
        go_on, read = threading.Event(), it.home.files.manifest

        def hanging(window_id: str) -> Manifest:
            assert go_on.wait(60)
            return read(window_id)

        monkeypatch.setattr(it.home.files, "manifest", hanging)
        doing: Awaitable[object] = (
            it.windows.clone("ada", one.name, "x")
            if what == "clone"
            else it.backups.create("ada", one.name)
        )
        try:
            with pytest.raises(OperationTimeout):
                await within(doing, 30)
        finally:
            go_on.set()

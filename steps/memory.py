"""Steps about memory: sessions, windows, and the LMCache beside the engines."""

import contextlib
import os
import signal
import sqlite3
import threading
from pathlib import Path
from typing import Any

import blake3
import pytest
from pytest_bdd import given, parsers, then, when

from steps.driver import Answer, Hive
from steps.engines import BEHAVIOURS
from steps.operator import key_of
from steps.story import CHAT, MODEL, WORKER, Story
from steps.waiting import must

CHUNK = 16
WORDS = " ".join(f"w{number}" for number in range(100))
HEADER = "X-Hive-Session"
SMALL = {"kv_chunk_tokens": CHUNK, "kv_tier_gib": 1, "kv_ram_gib": 0.1}
WINDOWS = "/hive/v1/windows"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": [{"role": "user", "content": WORDS}]}),
    "completion": ("/v1/completions", {"prompt": WORDS}),
    "message": ("/v1/messages", {"messages": [{"role": "user", "content": WORDS}]}),
}


def chat_in(messages: list[Any] | None = None, **fields: Any) -> dict[str, Any]:
    said = messages or [{"role": "user", "content": WORDS}]
    return {"model": MODEL, "messages": said, "max_tokens": 40, **fields}


def as_key(name: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key_of(name)}"} if name else {}


def new_session(story: Story, who: str | None = None) -> str:
    answer = story.hive.ask("POST", "/hive/v1/sessions", {"model": MODEL}, as_key(who))
    assert answer.status == 201, answer.body
    session: str = answer.json["id"]
    return session


def talk(story: Story, session: str, who: str | None = None, **fields: Any) -> Answer:
    """A chat in the session; later ones go on with what was said."""
    headers = {HEADER: session, **as_key(who)}
    answer = story.hive.ask("POST", CHAT, chat_in(**fields), headers)
    story.heard(answer)
    return answer


def answered_session(story: Story, who: str | None = None) -> str:
    session = new_session(story, who)
    answer = talk(story, session, who)
    assert answer.status == 200, answer.body
    return session


def freeze(story: Story, session: str, name: str, who: str | None = None, **fields: Any) -> Answer:
    body = {"session_id": session, "name": name, **fields}
    answer = story.hive.ask("POST", WINDOWS, body, as_key(who), timeout_s=60)
    story.heard(answer)
    return answer


def window_folder(hive: Hive, *, named: str) -> Path:
    """Where a window's files are; asked of the manifests, which say whose they are."""
    for folder in (hive.state / "windows").iterdir():
        if f'"name":"{named}"' in (folder / "manifest.json").read_text():
            return folder
    raise AssertionError(f"no folder of window {named}")


def blocks_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != "manifest.json")


# ── hive with windows ───────────────────────────────────────────────────────────────────────────


@given(parsers.parse("an engine with windows that {behaviour}"))
def _(story: Story, behaviour: str) -> None:
    story.hive.sections["windows"] = {**SMALL, **story.hive.sections.get("windows", {})}
    story.hive.model(MODEL, *BEHAVIOURS[behaviour], windows=True)


@given("hive is serving a model with windows")
def _(story: Story) -> None:
    story.hive.sections["windows"] = {**SMALL, **story.hive.sections.get("windows", {})}
    story.hive.model(MODEL, windows=True)
    story.hive.start()


@given(parsers.parse("sessions expire after {seconds:d} second"))
def _(story: Story, seconds: int) -> None:
    story.hive.sections["windows"] = {**SMALL, "session_idle_s": seconds}


@given(parsers.parse("a key may have {count:d} window"))
def _(story: Story, count: int) -> None:
    story.hive.sections["windows"] = {**SMALL, "max_windows": count}


# ── sessions ────────────────────────────────────────────────────────────────────────────────────


@given("a session")
def _(story: Story) -> None:
    story.kept["session"] = new_session(story)


@given("a session in which something was answered")
def _(story: Story) -> None:
    story.kept["session"] = answered_session(story)


@given("another session in which something was answered")
def _(story: Story) -> None:
    story.kept["first"] = story.kept["session"]
    story.kept["session"] = answered_session(story)


@given(parsers.parse('"{who}" has a session in which something was answered'))
def _(story: Story, who: str) -> None:
    story.kept["session"] = answered_session(story, who)


@given(parsers.parse('a session that is frozen as "{name}"'))
def _(story: Story, name: str) -> None:
    story.kept["session"] = answered_session(story)
    assert freeze(story, story.kept["session"], name).status == 201, story.answer.body


@given(parsers.parse('"{who}" has a session that is frozen as "{name}"'))
@when(parsers.parse('"{who}" has a session frozen as "{name}"'))
def _(story: Story, who: str, name: str) -> None:
    story.kept["session"] = answered_session(story, who)
    assert freeze(story, story.kept["session"], name, who).status == 201, story.answer.body


@given("a chat is streaming in the session")
def _(story: Story) -> None:
    body = chat_in(stream=True, max_tokens=2000)
    story.begin(CHAT, body, X_Hive_Session=story.kept["session"])
    story.client.wait_for_events(2)


@given(parsers.parse("{count:d} chats are streaming in sessions"))
def _(story: Story, count: int) -> None:
    for _ in range(count):
        body = chat_in(stream=True, max_tokens=100)
        story.begin(CHAT, body, X_Hive_Session=new_session(story))
        story.client.wait_for_events(2)


@given("a model with windows and 2 replicas")
def _(story: Story) -> None:
    story.hive.sections["windows"] = dict(SMALL)
    story.hive.model(MODEL, replicas=["cpu", "cpu"], windows=True)


@when(parsers.parse("a client asks for {count:d} chats of one session in turn"))
def _(story: Story, count: int) -> None:
    session = new_session(story)
    for _number in range(count):
        assert talk(story, session).status == 200, story.answer.body


@when(parsers.parse('a client asks in the session "{session}"'))
def _(story: Story, session: str) -> None:
    talk(story, session)


@when(parsers.parse('"{who}" asks in that session'))
def _(story: Story, who: str) -> None:
    talk(story, story.kept["session"], who)


@when("a client goes on in the session")
def _(story: Story) -> None:
    talk(story, story.kept["session"])


@when("a client asks in the session with a cache_salt of its own")
def _(story: Story) -> None:
    talk(story, story.kept["session"], cache_salt="mine")


@when("a client asks for embeddings in the session")
def _(story: Story) -> None:
    body = {"model": MODEL, "input": "abc"}
    story.ask("POST", "/v1/embeddings", body, X_Hive_Session=story.kept["session"])


@when(parsers.re(r"a client has a (?P<is_stream>streamed )?(?P<kind>\w+) answered in the session"))
def _(story: Story, is_stream: str | None, kind: str) -> None:
    path, body = KINDS[kind]
    body = {**body, "model": MODEL, "max_tokens": 5, "stream": bool(is_stream)}
    story.ask("POST", path, body, X_Hive_Session=story.kept["session"])
    assert story.answer.status == 200, story.answer.body


@when("the session has expired")
def _(story: Story) -> None:
    path = f"/hive/v1/sessions/{story.kept['session']}"
    must(lambda: story.hive.ask("GET", path).json["state"] == "EXPIRED", 10, "it expires")


@then(parsers.parse("its number is {number}"))
def _(story: Story, number: str) -> None:
    assert story.answer.error["details"]["number"] == number


@then("the engine was not asked")
def _(story: Story) -> None:
    asked = [r for r in story.double.requests if r["path"].startswith("/v1/")]
    assert len(asked) == 1, asked  # hive's own probe


@then("the engine found what it had computed for the session")
def _(story: Story) -> None:
    assert story.answer.json["usage"]["prompt_tokens_details"]["cached_tokens"] >= 96


@then("the engine finds nothing of it for a request without the session")
def _(story: Story) -> None:
    usage = story.ask("POST", CHAT, chat_in()).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


@then("the session's messages end with what was answered")
def _(story: Story) -> None:
    path = f"/hive/v1/sessions/{story.kept['session']}"
    # Its answer is written down when its client has it.
    must(lambda: story.hive.ask("GET", path).json["messages"], 5, "the answer is recorded")
    last = story.hive.ask("GET", path).json["messages"][-1]
    said = last["content"]
    text = said if isinstance(said, str) else "".join(block["text"] for block in said)
    assert last["role"] == "assistant"
    assert "t0 t1 t2 t3 t4" in text


@then("the session has no messages")
def _(story: Story) -> None:
    must(lambda: not story.hive.worker(WORKER)["in_flight"], 10, "the engine has ended it")
    path = f"/hive/v1/sessions/{story.kept['session']}"
    assert story.hive.ask("GET", path).json["messages"] == []


@then("the session takes requests")
def _(story: Story) -> None:
    answer = talk(story, story.kept["session"])
    assert answer.status == 200, answer.body


# ── freeze ──────────────────────────────────────────────────────────────────────────────────────


@when(parsers.parse('a client freezes {session} as "{name}"'))
def _(story: Story, session: str, name: str) -> None:
    ids = {
        "the session": story.kept["session"],
        "the first session": story.kept.get("first"),
        "nobody's session": "nobody",
        "no session's id": "../etc",
    }
    freeze(story, ids[session], name)


@when(parsers.parse('a client freezes the session as "{name}" and goes on with it'))
def _(story: Story, name: str) -> None:
    freeze(story, story.kept["session"], name, keep_active=True)


@when(parsers.parse('a client freezes the session as "{name}", and loses patience'))
def _(story: Story, name: str) -> None:
    body = {"session_id": story.kept["session"], "name": name}
    client = story.begin(WINDOWS, body)
    must(lambda: list((story.hive.state / "windows").glob("*.part")), 10, "it has begun")
    client.leave()


@then(parsers.parse('a client can freeze the session as "{name}"'))
def _(story: Story, name: str) -> None:
    assert freeze(story, story.kept["session"], name).status == 201, story.answer.body


@when(parsers.parse('two clients freeze the session as "{one}" and as "{other}" at once'))
def _(story: Story, one: str, other: str) -> None:
    answers: list[Answer] = []
    body = {"session_id": story.kept["session"]}

    def ask(name: str) -> None:
        answers.append(story.hive.ask("POST", WINDOWS, {**body, "name": name}))

    threads = [threading.Thread(target=ask, args=(name,)) for name in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    story.kept["answers"] = answers


@then("one of them has its window, and the other one a coded error")
def _(story: Story) -> None:
    first, second = sorted(story.kept["answers"], key=lambda answer: answer.status)
    assert (first.status, second.status) == (201, 409), (first.body, second.body)
    assert second.code in ("INVALID_STATE_TRANSITION", "SESSION_ALREADY_FROZEN")
    (window,) = story.hive.ask("GET", WINDOWS).json["windows"]
    assert window["name"] == first.json["name"]


@then(parsers.parse('the window "{name}" has every full chunk of the conversation'))
def _(story: Story, name: str) -> None:
    assert story.answer.status == 201, story.answer.body
    window = story.hive.ask("GET", f"{WINDOWS}/{name}").json
    # 100 words, two roles, an end, 40 words of an answer, and its end and what comes next
    assert window["tokens"] >= 140
    assert window["blocks"] == window["tokens"] // CHUNK


@then("each of its blocks is a hard link that fits its checksum")
def _(story: Story) -> None:
    (folder,) = (story.hive.state / "windows").iterdir()
    manifest = (folder / "manifest.json").read_text()
    blocks = blocks_of(folder)
    assert len(blocks) == story.answer.json["blocks"]
    for block in blocks:
        assert block.stat().st_nlink == 2
        assert blake3.blake3(block.read_bytes()).hexdigest() in manifest
    assert (folder / "manifest.json").stat().st_mode & 0o777 == 0o600


@then("the log tells of a freeze with its session, window, blocks and duration")
def _(story: Story) -> None:
    (line,) = story.hive.logged("window operation done", operation="freeze")
    assert line["session_id"] == story.kept["session"]
    assert (line["window_name"], line["blocks_stored"]) == ("monday", story.answer.json["blocks"])
    assert line["duration_ms"] > 0


@then("there is no window, no folder and no block of it")
def _(story: Story) -> None:
    def nothing() -> bool:
        rows = story.hive.ask("GET", f"{WINDOWS}?state=FREEZING").json["windows"]
        return not rows and not list((story.hive.state / "windows").iterdir())

    must(nothing, 10, "everything is undone")
    assert story.hive.ask("GET", WINDOWS).json["windows"] == []


# ── thaw ────────────────────────────────────────────────────────────────────────────────────────


def thaw(story: Story, name: str, who: str | None = None, **fields: Any) -> Answer:
    answer = story.hive.ask("POST", f"{WINDOWS}/{name}/thaw", fields, as_key(who), timeout_s=60)
    story.heard(answer)
    return answer


@when(parsers.parse('a client thaws "{name}"'))
def _(story: Story, name: str) -> None:
    thaw(story, name)


@when(parsers.parse('"{who}" thaws "{name}"'))
def _(story: Story, who: str, name: str) -> None:
    thaw(story, name, who)


@when(parsers.parse('a client thaws "{name}" into the session'))
def _(story: Story, name: str) -> None:
    answer = thaw(story, name, session_id=story.kept["session"])
    assert answer.json["session_id"] == story.kept["session"]


@when(parsers.parse('a client thaws "{name}", all of it or nothing'))
def _(story: Story, name: str) -> None:
    thaw(story, name, require_full=True)


@then("it has the messages, and a receipt for every full chunk")
def _(story: Story) -> None:
    assert story.answer.status == 200, story.answer.body
    told = story.answer.json
    assert [m["role"] for m in told["messages"]] == ["user", "assistant"]
    receipt = told["receipt"]
    assert receipt["blocks_found"] >= 8
    assert receipt["blocks_missing"] == 0
    assert receipt["usable_tokens"] == receipt["blocks_found"] * CHUNK
    assert receipt["partial"] is False
    story.kept["thawed"] = told


def go_on(story: Story) -> dict[str, Any]:
    """The thawed session's next request; the receipt after it."""
    told = story.kept["thawed"]
    messages = [*told["messages"], {"role": "user", "content": "go on"}]
    answer = talk(story, told["session_id"], messages=messages)
    assert answer.status == 200, answer.body
    (name,) = [one["name"] for one in story.hive.ask("GET", WINDOWS).json["windows"]]
    path = f"{WINDOWS}/{name}"
    must(lambda: "cached_tokens" in story.hive.ask("GET", path).json["receipt"], 5, "the proof")
    receipt: dict[str, Any] = story.hive.ask("GET", path).json["receipt"]
    return receipt


@then("after the next request the window's receipt has the engine's own count")
def _(story: Story) -> None:
    promised = story.kept["thawed"]["receipt"]["usable_tokens"]
    assert go_on(story)["cached_tokens"] == promised


@then("after the next request the engine's own count is what the receipt promised")
def _(story: Story) -> None:
    story.kept["thawed"] = story.answer.json
    receipt = go_on(story)
    assert receipt["cached_tokens"] == receipt["usable_tokens"] == 3 * CHUNK


@then("the metric hive_thaw_tokens_total has both")
def _(story: Story) -> None:
    promised = story.kept["thawed"]["receipt"]["usable_tokens"]
    for kind in ("promised", "cached"):
        assert story.hive.metric("hive_thaw_tokens_total", kind=kind) == promised


@then(parsers.parse("the receipt ends before block {number:d}, and says that it is partial"))
def _(story: Story, number: int) -> None:
    assert story.answer.status == 200, story.answer.body
    receipt = story.answer.json["receipt"]
    assert receipt["usable_tokens"] == number * CHUNK
    assert receipt["partial"] is True
    assert receipt["blocks_missing"] == 1


@then("the answer warns of 1 block")
def _(story: Story) -> None:
    assert story.answer.json["warnings"] == ["1 blocks could not be restored"]


@then("the damaged block is neither in the window nor in the KV tier")
def _(story: Story) -> None:
    damaged = story.kept["damaged"]
    there = [*(story.hive.state / "windows").rglob("*"), *(story.hive.state / "kv").iterdir()]
    assert damaged not in {path.stat().st_ino for path in there}


# ── damage, and hive's own restarts ─────────────────────────────────────────────────────────────


@given(parsers.parse('block {number:d} of "{name}" is missing, in the KV tier as well'))
def _(story: Story, number: int, name: str) -> None:
    block = blocks_of(window_folder(story.hive, named=name))[number]
    inode = block.stat().st_ino
    for path in [block, *(story.hive.state / "kv").iterdir()]:
        if path.stat().st_ino == inode:
            path.unlink()


@given(parsers.parse('block {number:d} of "{name}" is damaged'))
def _(story: Story, number: int, name: str) -> None:
    block = blocks_of(window_folder(story.hive, named=name))[number]
    story.kept["damaged"] = block.stat().st_ino
    _flip(block)


@given(parsers.parse('every block of "{name}" is damaged'))
def _(story: Story, name: str) -> None:
    for block in blocks_of(window_folder(story.hive, named=name)):
        _flip(block)


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


@when("hive is stopped and started again")
def _(story: Story) -> None:
    story.hive.stop()
    story.hive.start()


@when(parsers.parse('hive is stopped and started again with "{argument}" for the engine'))
def _(story: Story, argument: str) -> None:
    story.hive.stop()
    story.hive.models[MODEL].extra["args"] = [argument]
    story.hive.start()


@when("hive is stopped, the KV tier is emptied, and hive is started again")
def _(story: Story) -> None:
    story.hive.stop()
    for path in (story.hive.state / "kv").glob("*.data"):
        path.unlink()
    story.hive.start()


@when("hive is stopped, the catalogue is damaged, and hive is started again")
def _(story: Story) -> None:
    story.hive.stop()
    (story.hive.state / "catalogue.db").write_bytes(b"this is no database" * 1000)
    story.hive.start()


@then("the damaged catalogue was set aside")
def _(story: Story) -> None:
    (aside,) = story.hive.state.glob("catalogue.db.damaged-*")
    with pytest.raises(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(aside)) as it:
        it.execute("select * from windows")


# ── windows ─────────────────────────────────────────────────────────────────────────────────────


@then(parsers.parse('"{who}" sees no windows'))
def _(story: Story, who: str) -> None:
    assert story.hive.ask("GET", WINDOWS, headers=as_key(who)).json["windows"] == []


@when(parsers.parse('a client clones "{name}" as "{other}"'))
def _(story: Story, name: str, other: str) -> None:
    story.kept["folder"] = window_folder(story.hive, named=name)
    answer = story.ask("POST", f"{WINDOWS}/{name}/clone", {"name": other})
    assert answer.status == 201, answer.body


@when(parsers.parse('a client deletes "{name}"'))
def _(story: Story, name: str) -> None:
    assert story.ask("DELETE", f"{WINDOWS}/{name}").status == 204, story.answer.body


@then(parsers.parse('the folder of "{name}" is gone'))
def _(story: Story, name: str) -> None:
    del name
    assert not story.kept["folder"].exists()


# ── LMCache ─────────────────────────────────────────────────────────────────────────────────────


@given("LMCache fails to write 3 of 10 blocks")
def _(story: Story) -> None:
    story.hive.turn_cache(fail_every=3)


@given("LMCache writes nothing to disk any more")
def _(story: Story) -> None:
    story.hive.turn_cache(lose_stores=True)
    for path in (story.hive.state / "kv").glob("*.data"):
        path.unlink()


@given("LMCache needs half a second for each write")
def _(story: Story) -> None:
    story.hive.turn_cache(store_s=0.5)


@given("LMCache does not answer its health check")
def _(story: Story) -> None:
    story.hive.turn_cache(health_status=503)


@given("LMCache is down")
def _(story: Story) -> None:
    assert story.hive.ask("POST", "/hive/v1/workers/lmcache/stop").status == 202
    story.hive.wait_state("STOPPED", "lmcache")


@when("LMCache is killed")
def _(story: Story) -> None:
    story.kept["starts"] = story.hive.worker("lmcache")["starts"]
    os.kill(story.hive.worker("lmcache")["pid"], signal.SIGKILL)


@given("LMCache is killed, and ready again")
def _(story: Story) -> None:
    story.starts = story.hive.worker(WORKER)["starts"]
    story.kept["starts"] = story.hive.worker("lmcache")["starts"]
    os.kill(story.hive.worker("lmcache")["pid"], signal.SIGKILL)
    _is_back(story)


@when("LMCache is stopped in its tracks")
def _(story: Story) -> None:
    story.kept["starts"] = story.hive.worker("lmcache")["starts"]
    for process in story.hive.tree("lmcache")[1:]:
        os.kill(process.pid, signal.SIGSTOP)


@then("LMCache is ready again by itself")
@then("LMCache is replaced by itself")
def _is_back(story: Story) -> None:
    def is_new() -> bool:
        worker = story.hive.worker("lmcache")
        return bool(worker["state"] == "READY" and worker["starts"] > story.kept["starts"])

    must(is_new, 20, lambda: f"a new LMCache: {story.hive.worker('lmcache')}")


@then("every stream is complete")
def _(story: Story) -> None:
    for client in story.clients:
        client.wait_for_end()
        assert client.is_whole
        assert client.events[-1] == "[DONE]"


@then(parsers.parse("a client is answered in the session within {seconds:d} seconds"))
def _(story: Story, seconds: int) -> None:
    answer = talk(story, story.kept["session"])
    assert answer.status == 200, answer.body
    assert answer.seconds < seconds


@then("the engine is restarted by itself")
def _(story: Story) -> None:
    def is_new() -> bool:
        worker = story.hive.worker(WORKER)
        return bool(worker["starts"] > story.starts and worker["cache"] == "ok")

    must(is_new, 20, lambda: f"a new engine: {story.hive.worker(WORKER)}")

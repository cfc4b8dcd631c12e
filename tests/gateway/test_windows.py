"""Sessions and windows over HTTP: bodies, names, owners, lists, streams, and what is refused."""

import asyncio
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

from hive.gateway.windows import BODY_BYTES, MOST_AT_ONCE, _streamed
from hive.windows.work import Progress
from steps.driver import Answer, Hive, Stream
from steps.waiting import must
from tests.gateway.serving import serving
from tests.patience import awaited, until
from tests.windows.daemon import (
    Owner,
    daemon,
    new_name,
    said,
    state_of,
    told_by,
    turned,
    wait_quiet,
)

SESSIONS, WINDOWS = "/hive/v1/sessions", "/hive/v1/windows"


@pytest.fixture(scope="module")
def hive() -> Iterator[Hive]:
    with daemon() as it:
        yield it


@pytest.fixture
def ada(hive: Hive) -> Owner:
    return Owner(hive)


@pytest.fixture(scope="module")
def frozen(hive: Hive) -> str:
    """A window that tests look at and do not change."""
    return Owner(hive).frozen(40)[1]


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────

GOOD = {"session_id": "s", "name": "w"}
NO_JSON = "The request's body is not valid JSON."


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (SESSIONS, {"model": 7}, "model"),
        (SESSIONS, {"model": None}, "model"),
        (SESSIONS, {}, None),
        (SESSIONS, {"model": "m", "salt": "mine"}, None),
        (SESSIONS, [], None),
        (SESSIONS, b"", None),
        (SESSIONS, b"{", None),
        (SESSIONS, b'{"model": "\xff"}', None),
        (SESSIONS, b'{"model": "m"} more', None),
        (SESSIONS, b"[" * 100_000, None),
        (WINDOWS, {"session_id": "s"}, None),
        (WINDOWS, {"name": "w"}, None),
        (WINDOWS, {**GOOD, "session_id": 1}, "session_id"),
        (WINDOWS, {**GOOD, "name": ["w"]}, "name"),
        (WINDOWS, {**GOOD, "keep_active": "yes"}, "keep_active"),
        (WINDOWS, {**GOOD, "keep_active": 1}, "keep_active"),
        (WINDOWS, {**GOOD, "description": None}, "description"),
        (WINDOWS, {**GOOD, "description": "x" * 1025}, "description"),
        (WINDOWS, {**GOOD, "tags": "a"}, "tags"),
        (WINDOWS, {**GOOD, "tags": [1]}, "tags"),
        (WINDOWS, {**GOOD, "tags": [""]}, "tags"),
        (WINDOWS, {**GOOD, "tags": ["x" * 65]}, "tags"),
        (WINDOWS, {**GOOD, "tags": ["x"] * 33}, "tags"),
        (WINDOWS, {**GOOD, "owner": "bob"}, None),
        (f"{WINDOWS}/w/thaw", {"session_id": 5}, "session_id"),
        (f"{WINDOWS}/w/thaw", {"require_full": "no"}, "require_full"),
        (f"{WINDOWS}/w/thaw", {"cache_salt": "mine"}, None),
        (f"{WINDOWS}/w/clone", {"name": 5}, "name"),
        (f"{WINDOWS}/w/clone", {}, None),
    ],
)
def test_a_body_that_does_not_fit_is_told_what_is_wrong_with_it(
    hive: Hive, ada: Owner, path: str, body: Any, param: str | None
) -> None:
    """R074, R082: CWM-1003 names the field, CWM-1004 is the shape."""
    before = state_of(hive)
    answer = ada.ask("POST", path, body)
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param
    number, start = ("CWM-1003", f"Invalid parameter: {param}. ") if param else ("CWM-1004", "The ")
    assert answer.error["details"]["number"] == number
    assert answer.error["message"].startswith(start)
    assert state_of(hive) == before


def test_a_body_of_two_mib_is_too_large(ada: Owner) -> None:
    """R075"""
    body = json.dumps({**GOOD, "description": "x" * 2 * BODY_BYTES}).encode()
    answer = ada.ask("POST", WINDOWS, body)
    assert 400 <= answer.status < 500
    assert str(BODY_BYTES) in answer.error["message"]
    assert ada.ask("GET", WINDOWS).status == 200


@pytest.mark.parametrize("text", ["häng an 😀", "nul \0", "line\nbreak", "<b>", "x" * 1024])
def test_what_is_described_is_what_is_told(ada: Owner, text: str) -> None:
    session, name = ada.frozen(20, description=text, tags=[text[:64]])
    assert (ada.window(name)["description"], ada.window(name)["tags"]) == (text, [text[:64]])
    assert ada.window(name)["session_id"] == session


BAD_NAMES = [
    "a%2Fb",
    "a%2E%2E%2Fb",
    "a" * 129,
    "a" * 200,
    "a%00",
    "%F0%9F%98%80",
    "-a",
    "a%20b",
    "a%0A",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_no_name_is_told_so_wherever_it_is_said(ada: Owner, name: str) -> None:
    """R081: letters, digits, '-' and '_', 128 at most; nothing else ever becomes a path."""
    for method, path, body in (
        ("GET", f"{WINDOWS}/{name}", None),
        ("DELETE", f"{WINDOWS}/{name}", None),
        ("POST", f"{WINDOWS}/{name}/thaw", {}),
        ("POST", f"{WINDOWS}/{name}/verify", {}),
        ("POST", f"{WINDOWS}/{name}/repair", {}),
        ("POST", f"{WINDOWS}/{name}/clone", {"name": "x"}),
    ):
        answer = ada.ask(method, path, body)
        assert told_by(answer) == (400, "INVALID_WINDOW_NAME", "CWM-1002"), (method, path)
        assert answer.error["message"] == "Invalid window name format"


@pytest.mark.parametrize("name", ["", "a/b", "..", "a" * 129, "a\0", "😀", "-a", "a b", "a\n"])
def test_what_is_no_name_in_a_body_is_told_so_too(ada: Owner, frozen: str, name: str) -> None:
    """R081"""
    for answer in (ada.freeze("s", name), ada.do("clone", frozen, {"name": name})):
        assert told_by(answer) == (400, "INVALID_WINDOW_NAME", "CWM-1002")


def test_a_name_has_128_characters_at_most(ada: Owner, frozen: str) -> None:
    name = "Z" + "a-_9" * 31 + "xyz"
    assert len(name) == 128
    assert ada.do("clone", frozen, {"name": name}).status == 201
    assert ada.window(name)["name"] == name
    assert ada.ask("DELETE", f"{WINDOWS}/{name}").status == 204


@pytest.mark.parametrize("session_id", ["a%2Fb", "a" * 65, "a%00", "%F0%9F%98%80"])
def test_what_is_no_session_id_is_told_so(ada: Owner, session_id: str) -> None:
    """R080"""
    for method in ("GET", "DELETE"):
        answer = ada.ask(method, f"{SESSIONS}/{session_id}")
        assert told_by(answer) == (400, "INVALID_SESSION_ID", "CWM-1001")


@pytest.mark.parametrize(
    ("method", "path", "number", "text"),
    [
        ("GET", f"{WINDOWS}/missing", "CWM-2002", "Window not found: missing"),
        ("DELETE", f"{WINDOWS}/missing", "CWM-2002", "Window not found: missing"),
        ("POST", f"{WINDOWS}/missing/thaw", "CWM-2002", "Window not found: missing"),
        ("POST", f"{WINDOWS}/missing/verify", "CWM-2002", "Window not found: missing"),
        ("POST", f"{WINDOWS}/missing/repair", "CWM-2002", "Window not found: missing"),
        ("GET", f"{SESSIONS}/missing", "CWM-2001", "Session not found: missing"),
        ("DELETE", f"{SESSIONS}/missing", "CWM-2001", "Session not found: missing"),
    ],
)
def test_what_is_not_there_is_not_found(
    ada: Owner, method: str, path: str, number: str, text: str
) -> None:
    """R083, R084"""
    answer = ada.ask(method, path, {} if method == "POST" else None)
    assert (answer.status, answer.error["details"]["number"]) == (404, number)
    assert answer.error["message"] == text
    assert answer.error["details"]["retryable"] is False


def test_only_models_with_windows_have_sessions(ada: Owner) -> None:
    """R082, C.5"""
    answer = ada.ask("POST", SESSIONS, {"model": "n"})
    assert told_by(answer) == (400, "INVALID_PARAMETER", "CWM-1003")
    assert answer.error["details"]["allowed"] == ["m"]
    unknown = ada.ask("POST", SESSIONS, {"model": "nobody"})
    assert told_by(unknown)[:2] == (404, "MODEL_NOT_FOUND")


# ── owners ──────────────────────────────────────────────────────────────────────────────────────


def test_another_keys_things_do_not_exist(hive: Hive, ada: Owner) -> None:
    """R083, R084, R099: for none of the calls, and in no list."""
    bob = Owner(hive, "bob")
    session, name = ada.frozen(30)
    active = ada.talk(10)
    for answer in (
        bob.ask("GET", f"{WINDOWS}/{name}"),
        bob.ask("DELETE", f"{WINDOWS}/{name}"),
        *(bob.do(what, name) for what in ("thaw", "verify", "repair")),
        bob.do("clone", name, {"name": "mine"}),
    ):
        assert told_by(answer) == (404, "WINDOW_NOT_FOUND", "CWM-2002")
        assert answer.error["message"] == f"Window not found: {name}"
    for answer in (
        bob.ask("GET", f"{SESSIONS}/{active}"),
        bob.ask("DELETE", f"{SESSIONS}/{active}"),
        bob.freeze(active, new_name()),
        bob.chat(active, said(3)),
    ):
        assert told_by(answer) == (404, "SESSION_NOT_FOUND", "CWM-2001")
        assert answer.error["message"] == f"Session not found: {active}"
    assert name not in bob.names("?limit=1000")
    for path in (WINDOWS, f"{WINDOWS}/{name}", SESSIONS):
        answer = bob.ask("GET", f"{path}?owner=ada")
        assert told_by(answer)[:2] == (403, "FORBIDDEN")
    assert bob.names("?limit=1000&owner=bob") == bob.names("?limit=1000")
    listed = bob.ask("GET", f"{SESSIONS}?limit=1000").json["sessions"]
    assert not {session, active} & {one["id"] for one in listed}
    assert ada.state(active) == "ACTIVE"


def test_names_are_each_keys_own_and_an_admin_says_whose(hive: Hive, ada: Owner) -> None:
    """R099"""
    bob, root = Owner(hive, "bob"), Owner(hive, "root")
    name = new_name()
    for owner in (ada, bob):
        assert owner.freeze(owner.talk(20), name).status == 201
    assert (ada.window(name)["owner"], bob.window(name)["owner"]) == ("ada", "bob")
    unclear = root.ask("GET", f"{WINDOWS}/{name}")
    assert told_by(unclear) == (400, "INVALID_PARAMETER", "CWM-1003")
    assert unclear.error["param"] == "owner"
    for whose in ("ada", "bob"):
        assert root.ask("GET", f"{WINDOWS}/{name}?owner={whose}").json["owner"] == whose
    nobody = root.ask("GET", f"{WINDOWS}/{name}?owner=nobody")
    assert told_by(nobody) == (404, "WINDOW_NOT_FOUND", "CWM-2002")

    assert root.freeze(root.talk(20), name).status == 201
    assert root.window(name)["owner"] == "root"  # its own goes first
    assert {"ada", "bob", "root"} <= {
        one["owner"] for one in root.ask("GET", f"{WINDOWS}?limit=1000").json["windows"]
    }
    assert set(root.names("?owner=bob&limit=1000")) == set(bob.names("?limit=1000"))
    assert root.ask("DELETE", f"{WINDOWS}/{name}?owner=bob").status == 204
    assert told_by(bob.ask("GET", f"{WINDOWS}/{name}"))[0] == 404
    assert ada.window(name)["owner"] == "ada"


def test_an_admin_works_with_a_keys_window_for_that_key(hive: Hive, ada: Owner) -> None:
    """The clone and the session stay its owner's."""
    root = Owner(hive, "root")
    session, name = ada.frozen(30)
    thawed = root.do("thaw", name)
    assert ada.found(thawed.json["session_id"])["owner"] == "ada"
    clone = new_name()
    assert root.do("clone", name, {"name": clone}).json["owner"] == "ada"
    assert ada.window(clone)["lineage"]["ancestors"] == [name]
    assert root.found(session)["state"] == "FROZEN"
    another = root.freeze(ada.talk(20), new_name())
    assert (another.status, another.json["owner"]) == (201, "ada")
    refused = root.chat(thawed.json["session_id"], said(3))
    assert told_by(refused) == (404, "SESSION_NOT_FOUND", "CWM-2001")


@pytest.mark.parametrize(
    ("key", "status", "code"), [("eve", 403, "FORBIDDEN"), ("nobody", 401, "UNAUTHORIZED")]
)
def test_who_may_not_ask_a_model_may_not_look_at_windows(
    hive: Hive, frozen: str, key: str, status: int, code: str
) -> None:
    """R099"""
    owner = Owner(hive, key)
    for method, path, body in (
        ("GET", SESSIONS, None),
        ("POST", SESSIONS, {"model": "m"}),
        ("GET", f"{SESSIONS}/s", None),
        ("GET", WINDOWS, None),
        ("POST", WINDOWS, GOOD),
        ("GET", f"{WINDOWS}/{frozen}", None),
        ("DELETE", f"{WINDOWS}/{frozen}", None),
        ("POST", f"{WINDOWS}/{frozen}/thaw", {}),
        ("POST", f"{WINDOWS}/{frozen}/clone", {"name": "x"}),
        ("POST", f"{WINDOWS}/{frozen}/repair", {}),
    ):
        assert told_by(owner.ask(method, path, body))[:2] == (status, code), (method, path)


# ── requests of a session ───────────────────────────────────────────────────────────────────────


def test_a_session_that_is_not_there_gets_no_answer(hive: Hive, ada: Owner) -> None:
    """R080, R083: and no engine is asked."""
    before = len(hive.double("m").requests)
    for session, wanted in (
        ("nobody", (404, "SESSION_NOT_FOUND", "CWM-2001")),
        ("no id", (400, "INVALID_SESSION_ID", "CWM-1001")),
    ):
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
            body = {"model": "m", "messages": said(3), "prompt": "a", "max_tokens": 2}
            assert told_by(ada.ask("POST", path, body, X_Hive_Session=session)) == wanted
    assert len(hive.double("m").requests) == before


def test_a_frozen_session_takes_none_until_it_is_thawed(ada: Owner) -> None:
    """C24: CWM-3004"""
    session, name = ada.frozen(20)
    refused = ada.chat(session, said(3))
    assert told_by(refused) == (409, "SESSION_NOT_ACTIVE", "CWM-3004")
    assert refused.error["details"]["state"] == "FROZEN"
    assert ada.do("thaw", name, {"session_id": session}).status == 200
    assert ada.chat(session, said(3)).status == 200


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/tokenize", "/score"])
def test_an_endpoint_without_a_conversation_takes_no_session(ada: Owner, path: str) -> None:
    """R082: CWM-1003 names the header."""
    body = {"model": "m", "input": "a", "prompt": "a", "text_1": "a", "text_2": "b"}
    answer = ada.ask("POST", path, body, X_Hive_Session=ada.session())
    assert told_by(answer) == (400, "INVALID_PARAMETER", "CWM-1003")
    assert answer.error["param"] == "X-Hive-Session"


@pytest.mark.parametrize(
    "salt", [b'"cache_salt": "mine"', b'"cache\\u005fsalt": "mine"', b'"cache_salt": null']
)
def test_nobody_brings_a_salt_of_their_own(hive: Hive, ada: Owner, salt: bytes) -> None:
    """C.5: it is what keeps sessions apart; without a session it is the caller's own business."""
    body = b'{"model": "m", "messages": [{"role": "user", "content": "a"}], %b}' % salt
    answer = ada.ask("POST", "/v1/chat/completions", body, X_Hive_Session=ada.session())
    assert told_by(answer) == (400, "INVALID_PARAMETER", "CWM-1003")
    assert answer.error["param"] == "cache_salt"
    assert ada.ask("POST", "/v1/chat/completions", body).status == 200


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], [], None, [True], {"a": 1}])
def test_a_session_has_one_prompt_at_a_time(ada: Owner, prompt: Any) -> None:
    """R082"""
    body = {"model": "m", "prompt": prompt, "max_tokens": 2}
    answer = ada.ask("POST", "/v1/completions", body, X_Hive_Session=ada.session())
    assert told_by(answer) == (400, "INVALID_PARAMETER", "CWM-1003")
    assert answer.error["param"] == "prompt"


def test_another_models_session_is_refused(ada: Owner) -> None:
    session = ada.session()
    answer = ada.chat(session, said(3), model="n")
    assert told_by(answer) == (400, "INVALID_PARAMETER", "CWM-1003")
    assert answer.error["details"]["allowed"] == ["m"]


def test_each_session_has_a_salt_that_only_the_engine_gets(hive: Hive, ada: Owner) -> None:
    """C.5, R076: at the top of the body, and nothing of it anywhere else."""
    for session in (ada.session(), ada.session()):
        answer = ada.chat(session, said(3))
        assert answer.status == 200
        assert "cache_salt" not in answer.body.decode()
    asked = [json.loads(one["body"]) for one in hive.double("m").requests[-2:]]
    salts = {one["cache_salt"] for one in asked}
    assert [len(salt) for salt in salts] == [22, 22]
    assert [next(iter(one)) for one in asked] == ["cache_salt"] * 2
    told = ada.ask("GET", f"{SESSIONS}?limit=1000").body.decode() + hive.log_text
    assert not [salt for salt in salts if salt in told]
    assert (
        ada.ask("POST", "/v1/chat/completions", {"model": "m", "messages": said(3)}).status == 200
    )
    assert "cache_salt" not in json.loads(hive.double("m").requests[-1]["body"])


PARTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "one two"}]},
    "/v1/completions": {"prompt": "one two "},
    "/v1/messages": {"messages": [{"role": "user", "content": "one two"}], "system": "be kind"},
}


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("path", PARTS)
def test_what_was_answered_is_what_a_thaw_gives_back(
    ada: Owner, path: str, is_stream: bool
) -> None:
    """C.5: of chat, completions and messages, streamed or not; and its tokens are in the cache."""
    session, text = ada.session(), " ".join(f"t{at}" for at in range(40)) + " "
    body = {"model": "m", "max_tokens": 40, "stream": is_stream, **PARTS[path]}
    stream: Stream = ada.stream(path, body, X_Hive_Session=session)
    assert stream.answer.status == 200
    name = new_name()
    assert ada.freeze(session, name).status == 201
    told = ada.do("thaw", name).json
    given = told["messages"]
    if path == "/v1/completions":
        assert given == [{"role": "assistant", "content": "one two " + text}]
    elif path == "/v1/messages":
        assert given[1:] == [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
    else:
        assert given[1:] == [{"role": "assistant", "content": text}]
    assert ada.found(session)["messages"] == given

    more = dict(PARTS[path])
    if "prompt" in more:
        more["prompt"] = given[0]["content"] + "go on"
    else:
        more["messages"] = [*given, {"role": "user", "content": "go on"}]
    asked = {"model": "m", "max_tokens": 4, **more}
    usage = ada.ask("POST", path, asked, X_Hive_Session=told["session_id"]).json["usage"]
    cached = usage.get("cache_read_input_tokens")
    if cached is None:
        cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached >= told["receipt"]["usable_tokens"] >= 32


def test_an_answer_that_its_client_left_is_not_recorded(hive: Hive, ada: Owner) -> None:
    """R107"""
    session = ada.talk(10)
    must(lambda: ada.found(session)["has_conversation"], 5, "what was said first")
    before = ada.found(session)["messages"]
    hive.double("m").set(token_s=0.05)
    try:
        body = {"model": "m", "messages": said(5), "stream": True, "max_tokens": 100}
        stream = ada.stream("/v1/chat/completions", body, X_Hive_Session=session)
        stream.wait_for_events(2)
        stream.leave()
    finally:
        hive.double("m").set(token_s=0.0)
    must(lambda: ada.freeze(session, new_name()).status == 201, 10, "a freeze after it")
    assert ada.found(session)["messages"] == before


def test_a_session_that_said_nothing_has_nothing_to_freeze(ada: Owner) -> None:
    """R086"""
    answer = ada.freeze(ada.session(), new_name())
    assert told_by(answer) == (409, "INVALID_STATE_TRANSITION", "CWM-3001")
    assert "X-Hive-Session" in answer.error["details"]["suggested_action"]


# ── lists ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def listed(hive: Hive) -> tuple[Owner, dict[str, Any]]:
    """Five windows of a key that has no others, oldest first."""
    cyd = Owner(hive, "cyd")
    made: dict[str, Any] = {}
    for at, (name, words) in enumerate((("b", 10), ("e", 90), ("a", 50), ("d", 30), ("c", 70))):
        session, own = cyd.talk(words), f"list-{name}"
        tags = ["even" if at % 2 == 0 else "odd", f"n{at}"]
        answer = cyd.freeze(session, own, tags=tags)
        assert answer.status == 201
        made[own] = answer.json
    return cyd, made


@pytest.mark.parametrize("order", ["asc", "desc", None])
@pytest.mark.parametrize("sort", ["created_at", "name", "tokens", "bytes", None])
def test_a_list_is_in_the_order_that_was_asked_for(
    listed: tuple[Owner, dict[str, Any]], sort: str | None, order: str | None
) -> None:
    cyd, made = listed
    query = "&".join(f"{k}={v}" for k, v in (("sort", sort), ("order", order)) if v)
    key = sort or "created_at"
    wanted = sorted(made, key=lambda name: made[name][key], reverse=order != "asc")
    assert cyd.names(f"?{query}") == wanted


def test_a_list_comes_in_pages(listed: tuple[Owner, dict[str, Any]]) -> None:
    cyd, made = listed
    for limit in (1, 2, 3, 5, 1000):
        found, offset = [], 0
        while True:
            page = cyd.ask("GET", f"{WINDOWS}?sort=name&order=asc&limit={limit}&offset={offset}")
            found += [one["name"] for one in page.json["windows"]]
            assert len(page.json["windows"]) <= limit
            if "next_offset" not in page.json:
                break
            offset = page.json["next_offset"]
        assert found == sorted(made)
    assert cyd.names("?offset=1000000000") == []


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("tag=even", "bac"),
        ("tag=n3", "d"),
        ("tag=no", ""),
        ("tag=e", ""),
        ("tag=", ""),
        ("model=m", "beadc"),
        ("model=n", ""),
        ("state=FROZEN", "beadc"),
        ("state=FREEZING", ""),
        ("state=DELETING", ""),
        ("tag=odd&model=m&state=FROZEN", "ed"),
        ("tag=%00", ""),
        ("tag='%20OR%201=1--", ""),
        ("session_id=nobody", ""),
    ],
)
def test_a_list_may_be_of_some(
    listed: tuple[Owner, dict[str, Any]], query: str, wanted: str
) -> None:
    cyd, made = listed
    assert cyd.names(f"?order=asc&{query}") == [f"list-{one}" for one in wanted]
    one = made["list-a"]["session_id"]
    assert cyd.names(f"?session_id={one}") == ["list-a"]


@pytest.mark.parametrize(
    ("path", "query", "param"),
    [
        (WINDOWS, "sort=salt", "sort"),
        (WINDOWS, "sort=", "sort"),
        (WINDOWS, "order=up", "order"),
        (WINDOWS, "state=frozen", "state"),
        (WINDOWS, "limit=-1", "limit"),
        (WINDOWS, "limit=1001", "limit"),
        (WINDOWS, "limit=0", "limit"),
        (SESSIONS, "limit=0", "limit"),
        (WINDOWS, "limit=%D9%A3", "limit"),
        (WINDOWS, "limit=1e3", "limit"),
        (WINDOWS, "limit=", "limit"),
        (WINDOWS, f"offset={'9' * 5000}", "offset"),
        (SESSIONS, "state=FREEZING", "state"),
        (SESSIONS, "limit=x", "limit"),
    ],
)
def test_what_cannot_be_asked_for_is_told(ada: Owner, path: str, query: str, param: str) -> None:
    """R082"""
    answer = ada.ask("GET", f"{path}?{query}")
    assert told_by(answer) == (400, "INVALID_PARAMETER", "CWM-1003")
    assert answer.error["param"] == param


def test_sessions_are_listed_the_last_used_first(hive: Hive) -> None:
    bob = Owner(hive, "bob")
    first, second = bob.talk(5), bob.talk(5)
    bob.chat(first, said(3))
    frozen, _ = bob.frozen(20)
    must(
        lambda: bob.ask("GET", f"{SESSIONS}?limit=3").json["sessions"][1]["id"] == first, 5, "order"
    )
    told = bob.ask("GET", f"{SESSIONS}?limit=3").json["sessions"]
    assert [one["id"] for one in told] == [frozen, first, second]
    assert "messages" not in told[0]
    of_state = bob.ask("GET", f"{SESSIONS}?state=FROZEN").json["sessions"]
    assert of_state[0]["id"] == frozen
    assert {one["state"] for one in of_state} == {"FROZEN"}
    assert len(bob.ask("GET", f"{SESSIONS}?limit=2").json["sessions"]) == 2


def test_a_deleted_session_is_gone_and_its_window_stays(ada: Owner) -> None:
    """C24"""
    session, name = ada.frozen(20)
    assert ada.ask("DELETE", f"{SESSIONS}/{session}").status == 204
    assert ada.ask("GET", f"{SESSIONS}/{session}").status == 404
    assert ada.ask("DELETE", f"{SESSIONS}/{session}").status == 404
    into = ada.do("thaw", name, {"session_id": session})
    assert told_by(into) == (404, "SESSION_NOT_FOUND", "CWM-2001")
    assert ada.do("thaw", name).status == 200


def test_a_session_that_is_answered_is_not_deleted(hive: Hive, ada: Owner) -> None:
    """R086"""
    session = ada.session()
    hive.double("m").set(token_s=0.05)
    try:
        body = {"model": "m", "messages": said(5), "stream": True, "max_tokens": 10}
        stream = ada.stream("/v1/chat/completions", body, X_Hive_Session=session)
        stream.wait_for_events(2)
        answer = ada.ask("DELETE", f"{SESSIONS}/{session}")
        assert told_by(answer) == (409, "INVALID_STATE_TRANSITION", "CWM-3001")
        stream.wait_for_end()
    finally:
        hive.double("m").set(token_s=0.0)
    assert ada.ask("DELETE", f"{SESSIONS}/{session}").status == 204


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", WINDOWS), ("PATCH", f"{WINDOWS}/w"), ("GET", f"{WINDOWS}/w/thaw"), ("PUT", SESSIONS)],
)
def test_other_methods_are_told_which_there_are(ada: Owner, method: str, path: str) -> None:
    answer = ada.ask(method, path, {})
    assert answer.status == 405
    assert answer.error["details"]["allowed"]


# ── progress ────────────────────────────────────────────────────────────────────────────────────

EVENTS = "text/event-stream"


def events_of(answer: Answer) -> list[tuple[str, Any]]:
    """Name and data of each event."""
    assert answer.headers["content-type"] == EVENTS
    found = []
    for event in answer.body.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_whoever_accepts_events_hears_of_the_progress(ada: Owner) -> None:
    """R115: each phase from its first to its last step, then what the other answer is."""
    session, name = ada.talk(60), new_name()
    told: dict[str, tuple[list[tuple[str, Any]], set[str]]] = {
        "freeze": (
            events_of(
                ada.ask("POST", WINDOWS, {"session_id": session, "name": name}, Accept=EVENTS)
            ),
            {"render", "store", "link"},
        )
    }
    for what, phases in (("thaw", {"check", "prefetch"}), ("verify", {"check"})):
        told[what] = events_of(ada.do(what, name, Accept=EVENTS)), phases
    for what, (events, phases) in told.items():
        assert [kind for kind, _ in events] == ["progress"] * (len(events) - 1) + ["result"], what
        assert {data["phase"] for _, data in events[:-1]} == phases
        for phase in phases - {"render", "prefetch"}:
            steps = [data for _, data in events[:-1] if data["phase"] == phase]
            done = [data["done"] for data in steps]
            assert done == sorted(done)
            assert done[-1] == steps[-1]["total"] == ada.window(name)["blocks"]
    assert told["freeze"][0][-1][1]["name"] == name
    assert told["thaw"][0][-1][1]["receipt"]["partial"] is False
    assert told["verify"][0][-1][1]["whole"] is True
    removed = events_of(ada.do("clone", name, {"name": new_name()}, Accept=EVENTS))
    assert [kind for kind, _ in removed] == ["result"]


def test_what_fails_is_the_last_event(hive: Hive, ada: Owner) -> None:
    """R065: coded as in any stream."""
    session, name = ada.frozen(20)
    for path, body, code in (
        (WINDOWS, {"session_id": session, "name": "x"}, "SESSION_ALREADY_FROZEN"),
        (f"{WINDOWS}/missing/repair", {}, "WINDOW_NOT_FOUND"),
    ):
        ((kind, data),) = events_of(ada.ask("POST", path, body, Accept=EVENTS))[-1:]
        assert (kind, data["error"]["code"]) == ("error", code)
    bad = ada.ask("POST", WINDOWS, {"name": name}, Accept=EVENTS)
    assert (bad.status, bad.headers["content-type"].partition(";")[0]) == (400, "application/json")
    logged = {"status": 200, "code": "SESSION_ALREADY_FROZEN"}
    must(lambda: hive.logged("request", **logged), 5, "its line in the log")


@pytest.mark.parametrize("accept", [EVENTS, "application/json"])
def test_a_client_that_leaves_a_freeze_has_not_frozen(hive: Hive, ada: Owner, accept: str) -> None:
    """R107, C28"""
    before, session, name = state_of(hive), ada.session(), new_name()
    with turned(hive, lose_stores=True):
        assert ada.chat(session, said(40)).status == 200
        stream = ada.stream(WINDOWS, {"session_id": session, "name": name}, Accept=accept)
        must(lambda: name in ada.names("?state=FREEZING"), 5, "a freeze")
        stream.leave()
        wait_quiet(hive, before)
    assert ada.state(session) == "ACTIVE"
    failed = {"window_name": name, "error_code": "REQUEST_CANCELLED"}
    must(lambda: hive.logged("window operation failed", **failed), 5, "its line in the log")


def test_too_many_at_once_are_refused(hive: Hive, ada: Owner) -> None:
    """R098's sibling: CWM-7003 with a hint when to come again."""
    sessions = [ada.session() for _ in range(MOST_AT_ONCE)]
    with turned(hive, lose_stores=True):
        for session in sessions:
            assert ada.chat(session, said(30)).status == 200
        streams = [
            ada.stream(WINDOWS, {"session_id": session, "name": new_name()}) for session in sessions
        ]

        def is_full() -> bool:
            return told_by(ada.do("verify", "missing")) == (503, "CONCURRENCY_LIMIT", "CWM-7003")

        must(is_full, 10, "a refusal")
        assert int(ada.do("verify", "missing").headers["retry-after"]) >= 1
    assert {stream.answer.status for stream in streams} == {201}
    assert ada.do("verify", "missing").status == 404


@awaited
async def test_a_connection_that_breaks_under_an_event_is_a_client_that_left() -> None:
    """R075: as with every other stream of hive's."""
    ended: list[BaseException] = []
    with socket.socket() as client:

        async def work(told: Progress) -> dict[str, Any]:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()  # the server hears of it as it writes
            for at in range(1000):
                told("check", at, 1000)
            return {}

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                return await _streamed(request, work, "r")
            except BaseException as exc:
                ended.append(exc)
                raise ConnectionError from exc

        app = web.Application()
        app.router.add_get("/", handle)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            client.connect(runner.addresses[0])
            client.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            await until(lambda: ended, "its end")
        finally:
            await runner.cleanup()
    assert isinstance(ended[0], ConnectionError | asyncio.CancelledError)


@pytest.mark.parametrize("path", [SESSIONS, WINDOWS, f"{WINDOWS}/w/thaw", "/hive/v1/backups"])
@awaited
async def test_where_no_model_has_windows_that_is_told(path: str) -> None:
    async with serving() as it:
        answer, told = await it.ask("GET", path)
        _, elsewhere = await it.ask("GET", "/hive/v1/nowhere")

    assert (answer.status, told["error"]["code"]) == (404, "NOT_FOUND")
    assert "no model has windows = true" in told["error"]["message"]
    assert "windows" not in elsewhere["error"]["message"]

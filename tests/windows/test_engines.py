"""What a freeze and a thaw need of an engine and of LMCache, and what they say when it is not there."""

import json
import string
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.errors import EngineUnreachable, InvalidParameter
from hive.policy.windows import Shape, block_names
from hive.windows.engines import _key, _understood
from steps.driver import Hive
from steps.waiting import must
from tests.windows.daemon import Owner, daemon, new_name, said, state_of, told_by, turned

SAFE = st.text(string.ascii_letters + string.digits + "-_/.", min_size=1, max_size=40)


@given(
    path=SAFE.filter(lambda one: "-SEP-" not in one),
    workers=st.integers(1, 64),
    chunk_hash=st.binary(min_size=32, max_size=32),
    salt=st.text(string.ascii_letters + string.digits + "-_", max_size=22),
)
def test_a_blocks_name_says_whose_it_is(
    path: str, workers: int, chunk_hash: bytes, salt: str
) -> None:
    """LMCache is told of the same block that its file is of."""
    for rank, name in enumerate(block_names(Shape(path, workers, 16), chunk_hash, salt)):
        assert _key(name) == {
            "chunk_hash_hex": chunk_hash.hex(),
            "model_name": path,
            "kv_rank": workers << 24 | rank << 16 | workers << 8 | rank,
            "object_group_id": 0,
            "cache_salt": salt,
        }


@pytest.mark.parametrize(
    ("status", "answer"),
    [(200, b"no JSON"), (200, b"null"), (200, b"[" * 5000), (503, b""), (302, b"{}")],
)
def test_an_answer_that_is_none_is_the_engines_fault(status: int, answer: bytes) -> None:
    """R093: CWM-5001, and nothing of what it said."""
    with pytest.raises(EngineUnreachable) as caught:
        _understood(status, answer)
    assert caught.value.number == "CWM-5001"


def test_what_the_engine_refuses_is_the_conversations_fault() -> None:
    """R082: it is as long as the model allows, most likely; and nothing of what it said."""
    with pytest.raises(InvalidParameter, match="refused it with status 400") as caught:
        _understood(400, b'{"error": "secret"}')
    assert "secret" not in caught.value.message


def test_an_answer_is_what_it_says() -> None:
    assert _understood(200, b'{"a": [1]}') == {"a": [1]}
    assert _understood(200, b"[]") == []


# ── on the real daemon ──────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def hive() -> Iterator[Hive]:
    with daemon(breaker={"failures": 3, "cooldown_s": 0.3}) as it:
        yield it


@pytest.fixture
def ada(hive: Hive) -> Owner:
    return Owner(hive)


def test_hive_asks_an_engine_as_a_client_does(hive: Hive, ada: Owner) -> None:
    """With the session's salt at the top of the body, and one token; its slot is given back."""
    session = ada.session()
    with turned(hive, lose_stores=True):
        ada.chat(session, said(40))
    name = new_name()
    assert ada.freeze(session, name).status == 201
    asked = [one for one in hive.double("m").requests if one["path"].startswith("/v1/")]
    renders = [json.loads(one["body"]) for one in asked if one["path"].endswith("/render")][-2:]
    assert {one["messages"][-1]["content"] for one in renders} == {"a", "0 b"}
    computed = [json.loads(one["body"]) for one in asked if one["path"] == "/v1/completions"]
    salts = {json.loads(one["body"])["cache_salt"] for one in asked if "cache_salt" in one["body"]}
    assert computed[-1]["max_tokens"] == 1
    assert len(computed[-1]["prompt"]) == ada.window(name)["tokens"]
    assert computed[-1]["cache_salt"] in salts
    assert (hive.metric("hive_in_flight", model="m"), hive.metric("hive_waiting")) == (0, 0)
    assert told_by(ada.do("thaw", name))[0] == 200


@pytest.mark.parametrize(
    ("said_status", "wanted"),
    [
        ("500", (502, "ENGINE_UNREACHABLE", "CWM-5001")),
        ("400", (400, "INVALID_PARAMETER", "CWM-1003")),
    ],
)
def test_an_engine_that_refuses_undoes_the_freeze(
    hive: Hive, ada: Owner, said_status: str, wanted: tuple[int, str, str]
) -> None:
    """R093, R107"""
    session, name = ada.session(), new_name()
    with turned(hive, lose_stores=True):
        ada.chat(session, said(40))
        before = state_of(hive)
        hive.double("m").set(answer_status=said_status)
        try:
            answer = ada.freeze(session, name)
        finally:
            hive.double("m").set(answer_status="")
        assert told_by(answer) == wanted
        assert state_of(hive) == before
    must(lambda: ada.freeze(session, name).status == 201, 10, "a freeze")
    assert hive.metric("hive_in_flight", model="m") == 0


def test_an_engine_that_is_stopped_freezes_nothing(hive: Hive, ada: Owner) -> None:
    """R107: what is told is what any request is told."""
    session = ada.talk(30)
    before = state_of(hive)
    assert hive.ask("POST", "/hive/v1/workers/m-0/stop").status < 300
    hive.wait_state("STOPPED", "m-0")
    answer = ada.freeze(session, new_name())
    assert (answer.status, answer.code) == (503, "SERVICE_UNAVAILABLE")
    assert state_of(hive) == before
    assert hive.ask("POST", "/hive/v1/workers/m-0/start").status < 300
    hive.wait_ready()
    must(lambda: ada.freeze(session, new_name()).status == 201, 10, "a freeze")


def test_a_cache_server_that_fails_again_and_again_is_left_alone_for_a_while(
    hive: Hive, ada: Owner
) -> None:
    """R094, R006: it has a breaker of its own."""
    hive.turn_cache(health_status=500)
    told = [hive.ask("GET", "/hive/v1/health/lmcache") for _ in range(4)]
    assert {told_by(one) for one in told} == {(502, "KV_SERVER_UNREACHABLE", "CWM-5002")}
    assert "answered with status 500" in told[0].error["message"]
    assert "is not asked for a while" in told[3].error["message"]
    assert int(told[3].headers["retry-after"]) >= 1
    hive.turn_cache(health_status=200)
    must(lambda: hive.ask("GET", "/hive/v1/health/lmcache").status == 200, 5, "a probe")
    assert ada.frozen(20)


def test_without_the_cache_server_nothing_is_frozen_and_everything_answered(
    hive: Hive, ada: Owner
) -> None:
    """R094, C6, C28: CWM-5002 says why; an engine whose cache is lost says so until its restart."""
    session, name = ada.frozen(40)
    other, third = ada.talk(30), ada.session()
    before = state_of(hive)
    assert hive.ask("POST", "/hive/v1/workers/lmcache/stop").status < 300
    hive.wait_state("STOPPED", "lmcache")
    for answer in (ada.freeze(other, new_name()), ada.do("thaw", name)):
        assert told_by(answer) == (502, "KV_SERVER_UNREACHABLE", "CWM-5002")
        assert answer.error["details"]["retryable"] is True
        assert "retry-after" in answer.headers
    assert state_of(hive) == before
    assert (ada.state(session), ada.state(other)) == ("FROZEN", "ACTIVE")
    assert ada.do("verify", name).json["whole"] is True  # it needs no engine
    assert hive.chat().status == 200

    hive.double("m").set(token_s=0.05)
    body = {"model": "m", "messages": said(5), "stream": True, "max_tokens": 1000}
    stream = ada.stream("/v1/chat/completions", body, X_Hive_Session=third)
    try:
        stream.wait_for_events(1)
        assert hive.ask("POST", "/hive/v1/workers/lmcache/start").status < 300
        hive.wait_state("READY", "lmcache")
        must(lambda: hive.worker("m-0").get("cache") == "lost", 5, "a lost cache")
        answer = ada.freeze(other, new_name())
        assert told_by(answer) == (502, "KV_SERVER_UNREACHABLE", "CWM-5002")
        assert answer.error["details"]["reason"] == "cache_lost"
        assert answer.headers["x-hive-reason"] == "cache_lost"
        assert "hive worker restart" in answer.error["details"]["suggested_action"]
    finally:
        stream.leave()
    # Idle at last, it is started anew by itself.
    must(lambda: hive.worker("m-0").get("cache") == "ok", 20, lambda: str(hive.worker("m-0")))
    hive.wait_ready()
    must(lambda: ada.freeze(other, name + "x").status == 201, 10, "a freeze")
    assert ada.do("thaw", name, {"require_full": True}).status == 200


def test_a_freeze_of_very_many_files_is_tried_again(hive: Hive, ada: Owner) -> None:
    """C28: 1,250 chunks of 8 workers are as many files."""
    session = ada.session()
    messages = [{"role": "user", "content": "a " * (10_001 * 16)}]
    with turned(hive, lose_stores=True):
        assert ada.chat(session, messages).status == 200
        stream = ada.stream("/hive/v1/windows", {"session_id": session, "name": "large"})
        must(
            lambda: stream.ended_at is not None or "block_write failed, attempt 2" in hive.log_text,
            30,
            "its second try",
        )
        is_ended = stream.ended_at is not None
        stream.leave()
    assert not is_ended, stream.body[:500]

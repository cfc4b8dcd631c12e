"""The real vLLM with the real LMCache: one hive of its own, which its scenarios kill and start."""

import hashlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from pytest_bdd import given, parsers, then, when

from hive.workers.environment import managed_python
from steps.driver import Answer, Hive
from steps.memory import HEADER, WINDOWS, as_key
from steps.operator import key_of
from steps.real import START_S, really_serving
from steps.story import CHAT
from steps.waiting import must
from tests.doubles import faulty_lmcache

CHUNK = 32
ARGS = ["--enforce-eager", "--max-model-len=16384", f"--block-size={CHUNK}"]
SAY = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog " * 40}]
GO_ON = {"role": "user", "content": "and then"}
DEADLINE_S = 60.0
LMCACHE = "lmcache.cli.main"
SEED = int(os.environ.get("KILLS_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


@pytest.fixture(scope="session")
def cached_hive() -> Iterator[Hive]:
    """hive with windows on the real engine, and the keys ann, bob and operator."""
    scopes = {"ann": ["inference"], "bob": ["inference"], "operator": ["admin", "inference"]}
    keys = [
        {"name": n, "sha256": hashlib.sha256(key_of(n).encode()).hexdigest(), "scopes": s}
        for n, s in scopes.items()
    ]
    server = [sys.executable, faulty_lmcache.__file__, str(managed_python()), "-m", LMCACHE]
    small = {"kv_chunk_tokens": CHUNK, "kv_tier_gib": 1, "kv_ram_gib": 0.5, "kv_server": server}
    with really_serving(ARGS, keys=keys, key=key_of("operator"), windows=small) as hive:
        yield hive


@dataclass
class Remembered:
    """What a scenario knows from one step to the next."""

    hive: Hive
    name: str = ""  # of the window
    session: str = ""
    expected: list[int] = field(default_factory=list)  # the tokens that would follow
    thawed: dict[str, Any] = field(default_factory=dict)
    answer: Answer | None = None
    other: str = ""  # the window whose freeze was cut off, and its session
    other_session: str = ""
    answers: list[Answer] = field(default_factory=list)
    starts: tuple[int, int] = (0, 0)  # of LMCache and of the engine


@given("the real engine is serving with its cache", target_fixture="told")
def _serving(cached_hive: Hive) -> Remembered:
    for worker in ("lmcache", "m-0"):
        cached_hive.wait_state("READY", worker, within_s=START_S)
    must(lambda: cached_hive.worker()["cache"] == "ok", START_S, "the engine has its cache")
    return Remembered(cached_hive)


def _session(hive: Hive, who: str) -> str:
    answer = hive.ask("POST", "/hive/v1/sessions", {"model": "m"}, as_key(who))
    assert answer.status == 201, answer.body
    session: str = answer.json["id"]
    return session


def _talk(hive: Hive, who: str, session: str | None, messages: list[Any], **more: Any) -> Answer:
    body = {
        "model": "m",
        "messages": messages,
        "max_tokens": 40,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }
    headers = {**as_key(who), **({HEADER: session} if session else {})}
    return hive.ask("POST", CHAT, body, headers, timeout_s=150)


def _tokens(answer: Answer) -> list[int]:
    found: list[int] = answer.json["choices"][0]["token_ids"]
    return found


def _cached(answer: Answer) -> int:
    return int(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"] or 0)


def _answered(hive: Hive, who: str) -> tuple[str, list[Any]]:
    """A session in which something was answered, and its messages."""
    session = _session(hive, who)
    answer = _talk(hive, who, session, SAY)
    assert answer.status == 200, answer.body
    return session, [*SAY, answer.json["choices"][0]["message"]]


def _freeze(hive: Hive, who: str, session: str, name: str) -> Answer:
    body = {"session_id": session, "name": name}
    return hive.ask("POST", WINDOWS, body, as_key(who), timeout_s=120)


@given(parsers.parse('"{who}" has a conversation of many chunks, and knows how it would go on'))
def _conversation(told: Remembered, who: str) -> None:
    told.session, messages = _answered(told.hive, who)
    said = {"role": "assistant", "content": messages[-1]["content"]}
    # Under another salt, so that nothing of this is in the cache of her session.
    answer = _talk(
        told.hive,
        who,
        None,
        [*SAY, said, GO_ON],
        cache_salt=f"for-comparison-{time.monotonic_ns()}",
    )
    assert answer.status == 200, answer.body
    assert _cached(answer) == 0
    told.expected = _tokens(answer)


@given("she has frozen it")
def _frozen(told: Remembered) -> None:
    told.name = f"hers-{time.monotonic_ns()}"
    answer = _freeze(told.hive, "ann", told.session, told.name)
    assert answer.status == 201, answer.body
    assert answer.json["blocks"] == answer.json["tokens"] // CHUNK > 20


@when("hive is killed in the middle of another freeze, and started again")
def _killed(told: Remembered) -> None:
    _cut_off(told)
    told.hive.start(is_shared=True, within_s=START_S)


@when(
    "hive is killed in the middle of another freeze, and started again with loads that fail, now and "
    "then"
)
def _killed_and_faulty(told: Remembered) -> None:
    _cut_off(told)
    (told.hive.state / faulty_lmcache.FILE).write_text("0.3")
    told.hive.start(is_shared=True, within_s=START_S)


def _cut_off(told: Remembered) -> None:
    """Somewhere in the time that a freeze takes here."""
    print(f"KILLS_SEED={SEED}")
    hive = told.hive
    told.other = f"other-{time.monotonic_ns()}"
    session, _ = _answered(hive, "ann")
    body = {"session_id": session, "name": told.other}
    client = hive.stream(WINDOWS, body, as_key("ann"))
    time.sleep(random.Random(SEED).uniform(0.005, 0.1))
    assert hive.process is not None
    hive.process.kill()
    hive.process.wait()
    client.wait_for_end()
    told.other_session = session
    must(lambda: not list((hive.runtime / "w").iterdir()), 30, "the guards have ended everything")


@then("the other window is whole, or was never there")
def _whole_or_none(told: Remembered) -> None:
    hive = told.hive
    names = {w["name"] for w in hive.ask("GET", WINDOWS, headers=as_key("ann")).json["windows"]}
    path = f"/hive/v1/sessions/{told.other_session}"
    state = hive.ask("GET", path, headers=as_key("ann")).json["state"]
    assert state == ("FROZEN" if told.other in names else "ACTIVE")
    if told.other in names:
        path = f"{WINDOWS}/{told.other}/verify"
        assert hive.ask("POST", path, {}, as_key("ann")).json["whole"]
    assert len(list((hive.state / "windows").iterdir())) == len(names)


@when("she thaws hers and goes on")
def _thaws(told: Remembered) -> None:
    told.thawed, told.answer = _thawed(told.hive, told.name)


def _thawed(hive: Hive, name: str) -> tuple[dict[str, Any], Answer]:
    answer = hive.ask("POST", f"{WINDOWS}/{name}/thaw", {}, as_key("ann"), timeout_s=120)
    assert answer.status == 200, answer.body
    thawed: dict[str, Any] = answer.json
    messages = [*thawed["messages"], GO_ON]
    return thawed, _talk(hive, "ann", thawed["session_id"], messages)


@then("the tokens are the same, and the engine had every full chunk in its cache")
def _same(told: Remembered) -> None:
    assert told.answer is not None
    assert told.answer.status == 200, told.answer.body
    assert _tokens(told.answer) == told.expected
    receipt = told.thawed["receipt"]
    assert receipt["partial"] is False
    assert _cached(told.answer) == receipt["usable_tokens"] > 600
    path = f"{WINDOWS}/{told.name}"

    def is_proved() -> bool:
        found = told.hive.ask("GET", path, headers=as_key("ann")).json["receipt"]
        return bool(found.get("cached_tokens") == receipt["usable_tokens"])

    must(is_proved, 5, "the window's own receipt says so, too")


@then("the engine has nothing of it for another salt")
def _nothing(told: Remembered) -> None:
    messages = [*told.thawed["messages"], GO_ON]
    session = _session(told.hive, "ann")
    assert _cached(_talk(told.hive, "ann", session, messages)) == 0
    assert _cached(_talk(told.hive, "ann", None, messages, cache_salt="guessed")) == 0


@then(parsers.parse('"{who}" can neither see, thaw nor guess it'))
def _isolated(told: Remembered, who: str) -> None:
    hive, headers = told.hive, as_key(who)
    assert hive.ask("GET", WINDOWS, headers=headers).json["windows"] == []
    for method, path, body in (
        ("GET", f"{WINDOWS}/{told.name}", None),
        ("POST", f"{WINDOWS}/{told.name}/thaw", {}),
        ("POST", f"{WINDOWS}/{told.name}/clone", {"name": "mine"}),
        ("DELETE", f"{WINDOWS}/{told.name}", None),
        ("GET", f"/hive/v1/sessions/{told.session}", None),
    ):
        assert hive.ask(method, path, body, headers).status == 404, (method, path)
    answer = _talk(hive, who, told.thawed["session_id"], SAY)
    assert (answer.status, answer.code) == (404, "SESSION_NOT_FOUND")
    messages = [*told.thawed["messages"], GO_ON]
    assert _cached(_talk(hive, who, _session(hive, who), messages)) == 0


@when("LMCache is stopped in its tracks while requests run")
def _hangs(told: Remembered) -> None:
    hive = told.hive
    told.starts = hive.worker("lmcache")["starts"], hive.worker()["starts"]
    sessions = [_answered(hive, "ann")[0] for _ in range(2)]

    def ask(session: str) -> None:
        told.answers.append(_talk(hive, "ann", session, SAY, max_tokens=200))

    stopped = hive.tree("lmcache")[1:]
    for process in stopped:
        os.kill(process.pid, signal.SIGSTOP)
    threads = [threading.Thread(target=ask, args=(one,)) for one in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)


@then("every request is answered within its deadline")
def _all_answered(told: Remembered) -> None:
    assert [answer.status for answer in told.answers] == [200, 200]
    assert max(answer.seconds for answer in told.answers) < DEADLINE_S / 2


@then("LMCache and the engine are back by themselves")
def _back(told: Remembered) -> None:
    def are_back() -> bool:
        cache, engine = told.hive.worker("lmcache"), told.hive.worker()
        return bool(
            cache["state"] == engine["state"] == "READY"
            and cache["starts"] > told.starts[0]
            and engine["cache"] == "ok"
        )

    must(are_back, START_S, lambda: f"both, with the cache: {told.hive.workers}")


@then("what is frozen then is whole, and thaws with every chunk")
def _later(told: Remembered) -> None:
    session, _ = _answered(told.hive, "ann")
    frozen = _freeze(told.hive, "ann", session, "later")
    assert frozen.status == 201, frozen.body
    thawed, answer = _thawed(told.hive, "later")
    assert _cached(answer) == thawed["receipt"]["usable_tokens"]
    assert thawed["receipt"]["usable_tokens"] == frozen.json["blocks"] * CHUNK


@then("the tokens are the same, and the engine's count tells what the cache did not give")
def _fewer(told: Remembered) -> None:
    assert told.answer is not None
    assert told.answer.status == 200, told.answer.body
    assert _tokens(told.answer) == told.expected
    receipt = told.thawed["receipt"]
    assert receipt["partial"] is False  # every block is there, and was seen to be whole
    cached = _cached(told.answer)
    assert cached < receipt["usable_tokens"]

    def is_told() -> bool:
        found = told.hive.ask("GET", f"{WINDOWS}/{told.name}", headers=as_key("ann")).json[
            "receipt"
        ]
        return bool(found.get("cached_tokens") == cached)

    must(is_told, 5, "the window's own receipt says so, too")

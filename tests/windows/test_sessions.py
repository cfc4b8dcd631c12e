"""Sessions on a real catalogue: who may go on, what is written down, and what stands still."""

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import event

from hive.errors import (
    HiveError,
    InvalidParameter,
    InvalidSessionId,
    InvalidStateTransition,
    ModelNotFound,
    SessionNotActive,
    SessionNotFound,
    StorageQuotaExceeded,
)
from hive.events import Announcer, Event, SessionMoved, ThawProved
from hive.policy.conversations import Kind
from hive.policy.windows import NEXT, SessionState
from hive.settings import Settings
from hive.storage.catalogue import Catalogue, Session, opened
from hive.windows.sessions import Sessions, Visit, _Use, view
from tests.patience import awaited, short_directory, until, within
from tests.windows.making import window

ASKED = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":4}'
SEED = 20261122


def answer(text: str = "hello", cached: int | None = None) -> bytes:
    usage = {"prompt_tokens_details": {"cached_tokens": cached}} if cached is not None else {}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def messages(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)
    ]


class Kept:
    """Sessions, what they are kept in, and what they announced."""

    def __init__(self, home: Any, catalogue: Catalogue, idle_s: float, most: int = 0) -> None:
        program = {"engine": "command", "device": "cpu"}
        beside = {**program, "command": ["x{socket}", "{kv}"], "windows": True}
        settings = Settings.model_validate(
            {
                "server": {"state_dir": home / "s", "runtime_dir": home / "r"},
                "windows": {"session_idle_s": idle_s, "max_sessions": most, "kv_server": ["x"]},
                "models": {"m": beside, "n": beside, "o": {**program, "command": ["x{socket}"]}},
            }
        )
        announcer = Announcer()
        self.events: list[Event] = []
        announcer.listen(self.events.append)
        self.catalogue = catalogue
        self.sessions = Sessions(settings, catalogue, announcer)

    async def session(self, state: SessionState = SessionState.ACTIVE, **more: Any) -> Session:
        return await self.sessions.create("ada", "m", state=state, **more)

    async def state(self, session: Session) -> SessionState:
        return (await self.catalogue.session(session.id, None)).state

    async def said(self, session: Session) -> list[Any]:
        await self.sessions.recorded(session.id)
        return await self.sessions.messages(session)

    async def talk(self, session: Session, *parts: bytes, status: int = 200) -> None:
        visit = await self.sessions.enter(session.id, "ada", "m", Kind.CHAT, ASKED)
        for part in parts:
            visit.heard(part)
        visit.ended(status, is_stream=False)
        visit.leave()

    @property
    def is_quiet(self) -> bool:
        return repr(self.sessions) == "<Sessions 0 in use>"


@asynccontextmanager
async def kept(idle_s: float = 1000, most: int = 0) -> AsyncIterator[Kept]:
    with short_directory() as home:
        async with opened(home) as catalogue:
            it = Kept(home, catalogue, idle_s, most)
            async with it.sessions.running():
                yield it
            assert it.is_quiet


# ── for clients ─────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_new_one_has_a_salt_that_nobody_is_told() -> None:
    """R076: 22 characters, never two alike."""
    async with kept() as it:
        made = [await it.session() for _ in range(20)]
        assert {len(one.salt) for one in made} == {22}
        assert len({one.salt for one in made}) == len({one.id for one in made}) == 20
        for one in made:
            assert one.salt not in json.dumps(view(one)) + repr(one)
        assert view(made[0]) == {
            "id": made[0].id,
            "state": "ACTIVE",
            "model": "m",
            "owner": "ada",
            "created_at": made[0].created_at,
            "used_at": made[0].used_at,
            "has_conversation": False,
        }
        assert it.events[0] == SessionMoved(made[0].id, "m", "", "ACTIVE")


@awaited
async def test_only_models_with_windows_have_sessions() -> None:
    """C.5: no session of a model "unknown" is ever made."""
    async with kept() as it:
        with pytest.raises(ModelNotFound) as unknown:
            await it.sessions.create("ada", "unknown")
        assert unknown.value.public_details["available_models"] == ["m", "n", "o"]
        with pytest.raises(InvalidParameter) as without:
            await it.sessions.create("ada", "o")
        assert without.value.public_details["allowed"] == ["m", "n"]
        assert await it.sessions.listed(None, state=None, most=9) == []


@pytest.mark.parametrize("session_id", ["", "-a", "a" * 65, "a b", "ä", "a/b", "a\0", "a\n"])
@awaited
async def test_what_is_no_id_is_told_so(session_id: str) -> None:
    """R080"""
    async with kept() as it:
        with pytest.raises(InvalidSessionId, match="Invalid session ID format"):
            await it.sessions.find(session_id, None)


@awaited
async def test_another_keys_session_does_not_exist() -> None:
    """R083: for none of the calls."""
    async with kept() as it:
        one = await it.session()
        for call in (
            it.sessions.find(one.id, "bob"),
            it.sessions.delete(one.id, "bob"),
            it.sessions.enter(one.id, "bob", "m", Kind.CHAT, ASKED),
        ):
            with pytest.raises(SessionNotFound, match=f"Session not found: {one.id}"):
                await call
        assert await it.sessions.listed("bob", state=None, most=9) == []
        assert await it.sessions.find(one.id, None) == one
        assert [s.id for s in await it.sessions.listed("ada", state=None, most=9)] == [one.id]


@pytest.mark.parametrize("state", SessionState)
@awaited
async def test_only_active_and_thawed_sessions_take_requests(state: SessionState) -> None:
    """R087, C24: CWM-3004 says which state it is."""
    async with kept() as it:
        one = await it.session(state)
        if state in (SessionState.ACTIVE, SessionState.THAWED):
            (await it.sessions.enter(one.id, "ada", "m", Kind.CHAT, ASKED)).leave()
        else:
            with pytest.raises(SessionNotActive) as caught:
                await it.sessions.enter(one.id, "ada", "m", Kind.CHAT, ASKED)
            assert caught.value.number == "CWM-3004"
            assert caught.value.public_details["state"] == str(state)
        assert it.is_quiet


@awaited
async def test_a_session_is_one_models() -> None:
    async with kept() as it:
        one = await it.session()
        with pytest.raises(InvalidParameter) as caught:
            await it.sessions.enter(one.id, "ada", "n", Kind.CHAT, ASKED)
        assert caught.value.public_details["allowed"] == ["m"]
        assert it.is_quiet


@pytest.mark.parametrize("state", SessionState)
@awaited
async def test_any_session_may_be_deleted_that_is_not_yet(state: SessionState) -> None:
    """C24: its windows stay."""
    async with kept() as it:
        one = await it.session(state)
        await it.catalogue.add_window(window(session_id=one.id))
        if SessionState.DELETED in NEXT[state]:
            await it.sessions.delete(one.id, "ada")
            with pytest.raises(SessionNotFound):
                await it.sessions.find(one.id, None)
        else:
            with pytest.raises(InvalidStateTransition):
                await it.sessions.delete(one.id, "ada")
        assert len(await it.catalogue.windows("ada")) == 1


@awaited
async def test_one_that_is_in_use_is_not_deleted() -> None:
    async with kept() as it:
        one = await it.session()
        visit = await it.sessions.enter(one.id, "ada", "m", Kind.CHAT, ASKED)
        with pytest.raises(InvalidStateTransition, match="being"):
            await it.sessions.delete(one.id, "ada")
        visit.leave()
        with (
            it.sessions.frozen_still(one.id),
            pytest.raises(InvalidStateTransition, match="being"),
        ):
            await it.sessions.delete(one.id, "ada")
        await it.sessions.delete(one.id, "ada")


# ── what is written down ────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_whole_answer_is_the_end_of_the_conversation() -> None:
    async with kept() as it:
        one = await it.session()
        whole = answer("häng an 😀")
        await it.talk(one, *(whole[at : at + 1] for at in range(len(whole))))
        assert await it.said(one) == messages("hi", "häng an 😀")
        assert (await it.catalogue.session(one.id, None)).used_at > one.used_at
        written = await it.catalogue.conversation(one.id, None)
        assert written is not None
        assert written["body"] == {"messages": messages("hi", "häng an 😀")}
        await it.talk(one, answer("again"))
        assert await it.said(one) == messages("hi", "again")


@awaited
async def test_answers_are_written_down_in_the_order_in_which_they_came() -> None:
    """R107: whoever froze it else would have an older conversation, and not know it."""
    async with kept() as it:
        one = await it.session()
        async with it.catalogue._engine.begin():  # a change that takes its time
            for number in range(20):
                await it.talk(one, answer(f"answer {number}"))
        assert await it.said(one) == messages("hi", "answer 19")


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([answer()], 400),
        ([answer()], 500),
        ([answer()[:-1]], 200),
        ([b""], 200),
        ([b"\xff"], 200),
        ([answer().replace(b'"stop"', b'"abort"')], 200),
        ([b'{"choices": []}'], 200),
    ],
)
@awaited
async def test_what_is_no_whole_answer_changes_nothing(parts: list[bytes], status: int) -> None:
    async with kept() as it:
        one = await it.session()
        await it.talk(one, answer("before"))
        await it.sessions.recorded(one.id)
        await it.talk(one, *parts, status=status)
        assert await it.said(one) == messages("hi", "before")


@awaited
async def test_one_whose_client_left_is_not_written_down() -> None:
    async with kept() as it:
        one = await it.session()
        visit = await it.sessions.enter(one.id, "ada", "m", Kind.CHAT, ASKED)
        visit.heard(answer())
        for _ in range(2):
            visit.leave()
        visit.ended(200, is_stream=False)  # too late
        assert await it.said(one) == []
        assert it.is_quiet


@awaited
async def test_of_an_answer_that_is_too_long_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hive.windows.sessions.MOST_HEARD", 200)
    async with kept() as it:
        one = await it.session()
        visit = await it.sessions.enter(one.id, "ada", "m", Kind.CHAT, ASKED)
        for _ in range(100):
            visit.heard(b"x" * 100)
        visit.heard(answer())
        assert sum(map(len, visit._parts)) <= 200
        visit.ended(200, is_stream=False)
        assert await it.said(one) == []


@awaited
async def test_what_is_being_written_down_is_there_for_whoever_waits_for_it() -> None:
    """A client may freeze as soon as it has the last byte."""
    async with kept() as it:
        one = await it.session()
        for at in range(20):
            await it.talk(one, answer(f"{at}"))
            with it.sessions.frozen_still(one.id):
                await it.sessions.recorded(one.id)
                assert await it.sessions.messages(one) == messages("hi", f"{at}")


@awaited
async def test_what_was_answered_before_the_end_is_written_down() -> None:
    with short_directory() as home:
        async with opened(home) as catalogue:
            it = Kept(home, catalogue, 1000)
            async with it.sessions.running():
                one = await it.session()
                await it.talk(one, answer())
            assert (await catalogue.session(one.id, None)).has_conversation


@awaited
async def test_a_session_that_was_deleted_meanwhile_remembers_nothing() -> None:
    async with kept() as it:
        one = await it.session()
        await it.talk(one, answer())
        await it.catalogue.remove_session(one.id, SessionState.ACTIVE)
        await it.sessions.recorded(one.id)
        with pytest.raises(SessionNotFound):
            await it.sessions.find(one.id, None)


@awaited
async def test_a_database_that_fails_is_logged_and_nobody_waits_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """R066, R075, R116"""
    await lose_the_database(caplog)
    assert "what was said is not recorded" in caplog.text


@awaited
async def test_what_was_said_is_in_no_log_even_when_the_database_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """R073, R076, C21"""
    salt = await lose_the_database(caplog)
    assert salt not in caplog.text
    assert "hello" not in caplog.text


async def lose_the_database(caplog: pytest.LogCaptureFixture) -> str:
    """As an answer is to be written down; the session's salt."""
    with short_directory() as home:
        async with opened(home) as catalogue:
            it = Kept(home, catalogue, 1000)
            async with it.sessions.running():
                one = await it.session()
                async with catalogue._engine.begin() as connection:
                    await connection.exec_driver_sql("DROP TABLE sessions")
                visit = await enter_anyway(it, one)
                visit.heard(answer())
                with caplog.at_level(logging.ERROR):
                    visit.ended(200, is_stream=False)
                    await it.sessions.recorded(one.id)
            assert it.is_quiet
            return one.salt


async def enter_anyway(it: Kept, session: Session) -> Visit:
    """A visit that began before the database was lost."""
    it.sessions._uses.setdefault(session.id, _Use()).answering += 1
    return Visit(it.sessions, session, Kind.CHAT, ASKED)


# ── after a thaw ────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_the_first_answer_that_tells_its_cached_tokens_proves_a_thaw() -> None:
    """C27, C.5: the engine's own count, once, beside what was promised."""
    async with kept() as it:
        one = await it.session(SessionState.THAWED)
        await it.catalogue.add_window(window(session_id=one.id))
        await it.catalogue.note_receipt(window().id, {"session_id": one.id, "usable_tokens": 48})
        it.sessions.expects(one.id, window().id, "w0", 48)
        await it.talk(one, answer())  # does not tell
        await it.sessions.recorded(one.id)
        assert await it.state(one) is SessionState.ACTIVE
        for cached in (48, 64):
            await it.talk(one, answer(cached=cached))
            await it.sessions.recorded(one.id)

        proofs = [told for told in it.events if isinstance(told, ThawProved)]
        assert proofs == [ThawProved("w0", one.id, "m", 48, 48)]
        (proved,) = await it.catalogue.named("w0", "ada")
        assert proved.receipt == {"session_id": one.id, "usable_tokens": 48, "cached_tokens": 48}
        moves = [told for told in it.events if isinstance(told, SessionMoved)]
        assert [(move.old, move.new) for move in moves] == [("", "THAWED"), ("THAWED", "ACTIVE")]


# ── while it is frozen ──────────────────────────────────────────────────────────────────────────


@awaited
async def test_nothing_is_asked_in_a_session_that_is_being_frozen() -> None:
    """R086: CWM-3001 for a freeze, CWM-3004 for a request."""
    async with kept() as it:
        one = await it.session()
        with it.sessions.frozen_still(one.id):
            with pytest.raises(SessionNotActive) as request:
                await it.sessions.enter(one.id, "ada", "m", Kind.CHAT, ASKED)
            assert request.value.public_details["state"] == "FREEZING"
            with (
                pytest.raises(InvalidStateTransition, match="being frozen"),
                it.sessions.frozen_still(one.id),
            ):
                pass
        visit = await it.sessions.enter(one.id, "ada", "m", Kind.CHAT, ASKED)
        with (
            pytest.raises(InvalidStateTransition, match="being answered") as freeze,
            it.sessions.frozen_still(one.id),
        ):
            pass
        assert freeze.value.number == "CWM-3001"
        visit.leave()
        with it.sessions.frozen_still(one.id):
            pass
        assert it.is_quiet


@awaited
async def test_of_requests_and_freezes_at_once_no_two_overlap() -> None:
    """C24: a request that read the state before a freeze ended does not go on afterwards."""
    chance = random.Random(SEED)
    async with kept() as it:
        for _ in range(10):
            one = await it.session()
            inside: set[str] = set()

            async def ask(session: Session, inside: set[str], pauses: int) -> None:
                for _ in range(pauses):
                    await asyncio.sleep(0)
                try:
                    visit = await it.sessions.enter(session.id, "ada", "m", Kind.CHAT, ASKED)
                except HiveError:
                    return
                assert "freeze" not in inside
                inside.add("request")
                await asyncio.sleep(0)
                inside.discard("request")
                visit.leave()

            async def freeze(session: Session, inside: set[str], pauses: int) -> None:
                for _ in range(pauses):
                    await asyncio.sleep(0)
                try:
                    with it.sessions.frozen_still(session.id):
                        assert "request" not in inside
                        inside.add("freeze")
                        await it.sessions.move(session, SessionState.FROZEN)
                except InvalidStateTransition:
                    return  # the mark stays: frozen is frozen

            await asyncio.gather(
                *(ask(one, inside, chance.randint(0, 8)) for _ in range(8)),
                *(freeze(one, inside, chance.randint(0, 8)) for _ in range(2)),
            )


# ── nobody uses it ──────────────────────────────────────────────────────────────────────────────


@awaited
async def test_an_idle_session_expires_unless_it_is_in_use(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """C24; one that is frozen waits for its thaw as long as its window is there."""
    caplog.set_level(logging.INFO)
    async with kept(idle_s=0.1) as it:
        busy = await it.session()
        await it.catalogue.add_window(window())
        frozen = await it.session(SessionState.FROZEN, window_id=window().id)
        visit = await it.sessions.enter(busy.id, "ada", "m", Kind.CHAT, ASKED)
        for looks in (1, 2):
            idle = await it.session()
            await until(lambda looks=looks: expiries(caplog) >= looks, "its expiry")  # type: ignore[misc]
            assert await it.state(idle) is SessionState.EXPIRED
        assert await it.state(busy) is SessionState.ACTIVE
        assert await it.state(frozen) is SessionState.FROZEN
        visit.leave()
        with pytest.raises(SessionNotActive):
            await it.sessions.enter(idle.id, "ada", "m", Kind.CHAT, ASKED)


@awaited
async def test_a_key_has_so_many_sessions_and_no_more() -> None:
    """R091: each key for itself; one that is deleted makes room."""
    async with kept(most=2) as it:
        one = await it.session()
        await it.session()
        with pytest.raises(StorageQuotaExceeded) as caught:
            await it.session()
        assert caught.value.number == "CWM-4003"
        await it.sessions.create("bob", "m")
        await it.sessions.delete(one.id, "ada")
        await it.session()


@awaited
async def test_of_an_attempt_that_was_made_again_nothing_is_kept() -> None:
    async with kept() as it:
        one = await it.session()
        visit = await it.sessions.enter(one.id, "ada", "m", Kind.CHAT, ASKED)
        visit.begins()
        visit.heard(answer("half")[:20])
        visit.begins()
        visit.heard(answer("whole"))
        visit.ended(200, is_stream=False)
        assert await it.said(one) == messages("hi", "whole")


def expiries(caplog: pytest.LogCaptureFixture) -> int:
    return caplog.text.count("idle sessions have expired")


@awaited
async def test_a_session_does_not_expire_while_it_is_frozen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """R107: the freeze would fail, and leave its session where no freeze can be had any more."""
    caplog.set_level(logging.INFO)
    async with kept(idle_s=0.1) as it:
        one = await it.session()
        await it.session()  # idle as long, or shorter
        with it.sessions.frozen_still(one.id):
            await until(lambda: expiries(caplog), "the other one's expiry")
            assert await it.state(one) is SessionState.ACTIVE


@awaited
async def test_expiry_goes_on_after_the_database_was_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """R075"""
    caplog.set_level(logging.INFO)
    async with kept(idle_s=0.02) as it:
        engine, failed = it.catalogue._engine, list[object]()
        event.listen(engine.sync_engine, "handle_error", failed.append)
        async with engine.begin() as connection:
            await connection.exec_driver_sql("ALTER TABLE sessions RENAME TO away")
        await until(lambda: failed, "a look without a table")
        async with engine.begin() as connection:
            await connection.exec_driver_sql("ALTER TABLE away RENAME TO sessions")
        one = await it.session()
        await until(lambda: expiries(caplog), "its expiry")
        assert await it.state(one) is SessionState.EXPIRED


class Held(Catalogue):
    """Its database takes as long for an expiry as a test wants."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.began, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def expire(self, unused_since: float, but: Collection[str] = ()) -> int:
        self.began.set()
        await self.may_go_on.wait()
        return await super().expire(unused_since, but)


@awaited
async def test_only_who_may_expire_waits_for_an_expiry() -> None:
    """A database that is slow then holds up nobody who is at work."""
    async with kept(idle_s=2.0) as it:
        it.sessions._catalogue = held = Held(it.catalogue._store)
        idle = replace(await it.session(), id="i" * 24, used_at=1.0)
        await it.catalogue.add_session(idle)
        await held.began.wait()
        one = await it.session()
        visit = await within(it.sessions.enter(one.id, "ada", "m", Kind.CHAT, ASKED), 10)
        visit.leave()
        entering = asyncio.ensure_future(it.sessions.enter(idle.id, "ada", "m", Kind.CHAT, ASKED))
        done, _ = await asyncio.wait({entering}, timeout=0.2)
        assert not done
        held.may_go_on.set()
        with pytest.raises(SessionNotActive):
            await within(entering, 10)

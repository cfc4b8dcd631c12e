"""The catalogue: every change whole or not at all, whoever is killed; in both databases the same."""

import asyncio
import itertools
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete

from hive.errors import (
    InvalidStateTransition,
    SessionNotFound,
    StorageQuotaExceeded,
    StoreUnreachable,
    WindowAlreadyExists,
)
from hive.policy.windows import NEXT, SessionState, WindowState
from hive.storage.catalogue import (
    MOST_PAGE,
    Catalogue,
    Session,
    Sort,
    Window,
    opened,
)
from hive.storage.tables import CONNECTIONS, sessions, windows
from hive.storage.trying import BUSY_S
from tests.patience import awaited, short_directory
from tests.postgres import Server, emptied

SAID = {"kind": "chat", "messages": [{"role": "user", "content": "häng an 😀"}]}


def session(number: int = 0, **facts: Any) -> Session:
    made = Session(f"s{number}", "ci", "llama", f"salt{number}", 1000.0 + number, 2000.0 + number)
    return replace(made, **facts)


def window(number: int = 0, **facts: Any) -> Window:
    made = Window(f"{number:032x}", "ci", f"w{number}", "s0", "llama", "salt0", 1000.0 + number)
    return replace(made, **facts)


_url = ""  # of the database that is looked at; empty: SQLite


@pytest.fixture(scope="module", autouse=True, params=["SQLite", "PostgreSQL"])
def database(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test here in each of them."""
    global _url  # noqa: PLW0603 (Hypothesis' tests take no fixture)
    if request.param == "PostgreSQL":
        server: Server = request.getfixturevalue("postgres")
        _url = server.make_database("catalogue")
    yield
    _url = ""


@contextmanager
def new_home() -> Iterator[Path]:
    """The state of a hive that has no catalogue yet."""
    if _url:
        emptied(_url)
    with short_directory() as home:
        yield home


@asynccontextmanager
async def catalogue() -> AsyncIterator[Catalogue]:
    with new_home() as home:
        async with opened(home, _url) as it:
            yield it


Example = Callable[[Catalogue], Coroutine[Any, Any, None]]


@contextmanager
def examples() -> Iterator[Callable[[Example], None]]:
    """One catalogue for all examples of a test, empty for each of them."""
    with new_home() as home, asyncio.Runner() as runner:
        place = opened(home, _url)
        it = runner.run(place.__aenter__())

        async def one(example: Example) -> None:
            async with it._changing() as connection:
                for table in (sessions, windows):
                    await connection.execute(delete(table))
            await example(it)

        try:
            yield lambda example: runner.run(one(example))
        finally:
            runner.run(place.__aexit__(None, None, None))


async def frozen(it: Catalogue, made: Window) -> Window:
    """A window that was frozen as hive does it."""
    await it.begin_window(made)
    whole = replace(made, tokens=64, blocks=2, bytes=4096, identity={"dtype": "bf16"})
    await it.commit_window(whole, keep_active=True)
    return replace(whole, state=WindowState.FROZEN)


async def found(it: Catalogue, name: str = "w0", owner: str = "ci") -> Window:
    (one,) = await it.named(name, owner)
    return one


@awaited
async def test_what_is_kept_is_what_was_given() -> None:
    async with catalogue() as it:
        one = session(has_conversation=True)
        await it.add_session(one, SAID)
        assert await it.session("s0", "ci") == one
        assert await it.conversation("s0", "ci") == SAID
        await it.add_session(session(1))
        assert await it.conversation("s1", "ci") is None
        assert await it.sessions("ci") == [session(1), one]
        for owner in ("other", ""):
            with pytest.raises(SessionNotFound):
                await it.conversation("s0", owner)
        kept = await frozen(it, window(tags=("a", "b"), description="x"))

        assert await it.named("w0", "ci") == [kept]
        assert await it.usage("ci") == (1, 4096)


@awaited
async def test_it_is_there_after_a_restart() -> None:
    with new_home() as home:
        async with opened(home, _url) as it:
            await it.add_session(session())
            kept = await frozen(it, window())
        async with opened(home, _url) as it:
            assert await it.named("w0", None) == [kept]
            assert await it.session("s0", None) == session()
            assert it.set_aside is None


@awaited
async def test_what_another_key_made_is_not_there() -> None:
    """Not even that it exists is told."""
    async with catalogue() as it:
        await it.add_session(session())
        await frozen(it, window())
        with pytest.raises(SessionNotFound, match="Session not found: s0"):
            await it.session("s0", "other")
        assert await it.named("w0", "other") == []

        assert not await it.windows("other")
        assert not await it.sessions("other")
        assert await it.usage("other") == (0, 0)
        await frozen(it, window(1, owner="other", name="w0"))  # names are unique for each owner


@awaited
async def test_a_name_is_taken_from_the_beginning_of_a_freeze() -> None:
    async with catalogue() as it:
        await it.begin_window(window())
        with pytest.raises(WindowAlreadyExists, match="Window name already exists: w0"):
            await it.begin_window(window(1, name="w0"))
        assert await it.named("w0", "ci") == []  # it is not frozen yet
        assert [one.state for one in await it.windows(None, state=None)] == [WindowState.FREEZING]
        await it.remove_window(window().id)

        await it.begin_window(window(1, name="w0"))


@awaited
async def test_a_window_and_its_session_are_frozen_together_or_not_at_all() -> None:
    async with catalogue() as it:
        await it.add_session(session())
        for number in (0, 1):
            await it.begin_window(window(number))
        await it.commit_window(window())
        assert (await it.session("s0", "ci")).state is SessionState.FROZEN
        assert (await it.session("s0", "ci")).window_id == window().id
        with pytest.raises(InvalidStateTransition):
            await it.commit_window(window(1))

        assert [one.name for one in await it.windows("ci")] == ["w0"]
        assert len(await it.windows("ci", state=WindowState.FREEZING)) == 1


@awaited
async def test_of_many_that_freeze_one_session_one_wins() -> None:
    async with catalogue() as it:
        await it.add_session(session())

        async def freeze(number: int) -> bool:
            await it.begin_window(window(number))
            try:
                await it.commit_window(window(number))
            except InvalidStateTransition:
                await it.remove_window(window(number).id)
                return False
            return True

        won = await asyncio.gather(*(freeze(number) for number in range(8)))

        assert sum(won) == 1
        assert len(await it.windows(None, state=None)) == 1


@awaited
async def test_a_session_moves_as_the_table_says() -> None:
    """(C24)"""
    async with catalogue() as it:
        for number, (old, new) in enumerate(itertools.product(SessionState, SessionState)):
            one = session(number, state=old)
            await it.add_session(one)
            if new in NEXT[old]:
                await it.move_session(one.id, old, new)
                with pytest.raises(InvalidStateTransition):
                    await it.move_session(one.id, old, new)  # it is another one now
            else:
                with pytest.raises(InvalidStateTransition):
                    await it.move_session(one.id, old, new)

            now = (await it.session(one.id, None)).state
            assert now is (new if new in NEXT[old] else old), (old, new)


@awaited
async def test_only_a_session_that_takes_requests_remembers_them() -> None:
    async with catalogue() as it:
        for number, state in enumerate(SessionState):
            one = session(number, state=state)
            await it.add_session(one)
            takes = await it.spoke(one.id, SAID, 5000.0)

            assert takes is (state in (SessionState.ACTIVE, SessionState.THAWED))
            now, said = await it.session(one.id, None), await it.conversation(one.id, None)
            wanted = (SAID, 5000.0, SessionState.ACTIVE) if takes else (None, one.used_at, state)
            assert (said, now.used_at, now.state) == wanted
            assert now.has_conversation is takes


@awaited
async def test_sessions_that_nobody_used_expire_unless_they_are_frozen() -> None:
    async with catalogue() as it:
        for number in range(4):
            await it.add_session(session(number))
        await it.begin_window(window())
        await it.commit_window(window())
        assert await it.expire(2002.0) == 1
        states = {one.id: one.state for one in await it.sessions("ci")}

        assert states == {
            "s0": SessionState.FROZEN,
            "s1": SessionState.EXPIRED,
            "s2": SessionState.ACTIVE,
            "s3": SessionState.ACTIVE,
        }
        assert [one.id for one in await it.sessions(None, state=SessionState.ACTIVE)] == [
            "s3",
            "s2",
        ]


@awaited
async def test_a_window_that_is_being_deleted_is_not_found_and_its_session_stays() -> None:
    async with catalogue() as it:
        await it.add_session(session())
        await it.begin_window(window())
        await it.commit_window(window())
        await it.begin_removal(window().id)
        assert await it.named("w0", "ci") == []
        for _ in range(2):
            await it.remove_window(window().id)

        assert (await it.session("s0", "ci")).window_id is None
        assert await it.usage(None) == (0, 0)


@awaited
async def test_the_receipt_of_a_thaw_is_kept() -> None:
    async with catalogue() as it:
        await frozen(it, window())
        await it.note_receipt(window().id, {"cached_tokens": 64})

        assert (await found(it)).receipt == {"cached_tokens": 64}


@awaited
async def test_a_session_that_was_removed_is_not_found_and_its_window_stays() -> None:
    async with catalogue() as it:
        await it.add_session(session())
        await it.add_session(session(1))
        await it.begin_window(window())
        await it.commit_window(window())
        with pytest.raises(InvalidStateTransition):
            await it.remove_session("s0", SessionState.ACTIVE)
        await it.remove_session("s0", SessionState.FROZEN)
        with pytest.raises(SessionNotFound):
            await it.session("s0", None)

        assert [one.id for one in await it.sessions(None)] == ["s1"]
        assert (await found(it)).session_id == "s0"


@awaited
async def test_sessions_that_nobody_can_use_any_more_are_forgotten() -> None:
    """Thawed and never used, frozen into a window that is gone, expired as long ago again."""
    async with catalogue() as it:
        now = time.time()
        for number, (state, age_s) in enumerate(
            (
                (SessionState.THAWED, 200),
                (SessionState.THAWED, 50),
                (SessionState.EXPIRED, 250),
                (SessionState.EXPIRED, 150),
                (SessionState.ACTIVE, 250),
                (SessionState.DELETED, 250),
            )
        ):
            await it.add_session(session(number, state=state, used_at=now - age_s))
        await it.add_session(session(6, used_at=now - 250))
        await it.begin_window(window(6, session_id="s6"))
        await it.commit_window(window(6, session_id="s6"))
        assert await it.expire(now - 100, but=["s0"]) == 1
        left = {one.id: one.state for one in await it.sessions(None)}

        assert left == {
            "s0": SessionState.THAWED,  # it is at work just now
            "s1": SessionState.THAWED,
            "s3": SessionState.EXPIRED,
            "s4": SessionState.EXPIRED,
            "s6": SessionState.FROZEN,
        }
        await it.remove_window(window(6).id)
        assert await it.expire(now - 100) == 0
        assert {one.id for one in await it.sessions(None)} == {"s1", "s3"}


@awaited
async def test_an_owner_has_so_many_sessions_and_windows_however_many_come_at_once() -> None:
    """R091: counted where they are added."""
    async with catalogue() as it:

        async def add(number: int) -> bool:
            owner = "ci" if number % 2 else "other"
            try:
                await it.add_session(session(number, owner=owner), most=2)
                await it.begin_window(replace(window(number), owner=owner), most=2)
            except StorageQuotaExceeded:
                return False
            return True

        added = await asyncio.gather(*map(add, range(10)))

        assert sum(added) == 4
        assert len(await it.sessions("ci")) == len(await it.windows("ci", state=None)) == 2


@awaited
async def test_a_window_is_found_by_its_id_whatever_its_state() -> None:
    async with catalogue() as it:
        await it.begin_window(window())
        assert await it.window_by_id(window().id) == window()
        assert await it.window_by_id(window(1).id) is None
        kept = await frozen(it, window(1))

        assert await it.window_by_id(window(1).id) == kept


def test_sessions_that_are_at_work_do_not_expire() -> None:
    with examples() as run:

        @settings(max_examples=25)
        @given(st.sets(st.integers(0, 3)), st.integers(1999, 2005))
        def each(busy: set[int], since: int) -> None:
            async def expired(it: Catalogue) -> None:
                for number in range(4):
                    await it.add_session(session(number))
                count = await it.expire(float(since), but={f"s{number}" for number in busy})
                gone = [one.id for one in await it.sessions(None, state=SessionState.EXPIRED)]

                old = {number for number in range(4) if 2000 + number < since}
                assert set(gone) == {f"s{number}" for number in old - busy}
                assert count == len(gone)
                assert await it.expire(float(since), but=[f"s{number}" for number in busy]) == 0

            run(expired)

        each()


@awaited
async def test_more_sessions_at_work_than_a_page_are_spared_too() -> None:
    async with catalogue() as it:
        await it.add_session(session())
        busy = [f"x{number}" for number in range(2 * MOST_PAGE)]

        assert await it.expire(9000.0, but=[*busy, "s0"]) == 0
        assert await it.expire(9000.0, but=busy) == 1


@awaited
async def test_windows_are_counted_by_their_state() -> None:
    async with catalogue() as it:
        assert await it.counts() == dict.fromkeys(WindowState, 0)
        for number in range(3):
            await frozen(it, window(number))
        await it.begin_window(window(3))
        await it.begin_removal(window(0).id)

        assert await it.counts() == {
            WindowState.FREEZING: 1,
            WindowState.FROZEN: 2,
            WindowState.DELETING: 1,
        }


@awaited
async def test_a_name_is_taken_in_every_state_and_by_its_owner_alone() -> None:
    async with catalogue() as it:
        await it.begin_window(window())
        for act in (it.commit_window, it.begin_removal):
            assert await it.has_window("w0", "ci")
            assert not await it.has_window("w0", "other")
            assert not await it.has_window("w1", "ci")
            if act is it.commit_window:
                await it.commit_window(window(), keep_active=True)
            else:
                await it.begin_removal(window().id)
        assert await it.has_window("w0", "ci")
        await it.remove_window(window().id)

        assert not await it.has_window("w0", "ci")


@awaited
async def test_a_window_knows_whom_it_comes_from_and_who_comes_from_it() -> None:
    async with catalogue() as it:
        await it.add_window(window(0))
        await it.add_window(window(1, parent_id=window(0).id))
        for number in (2, 3):
            await it.add_window(window(number, parent_id=window(1).id))
        assert await it.lineage(window(0)) == ([], ["w1"])
        assert await it.lineage(window(1, parent_id=window(0).id)) == (["w0"], ["w2", "w3"])
        last = window(3, parent_id=window(1).id)
        assert await it.lineage(last) == (["w1", "w0"], [])

        await it.remove_window(window(0).id)  # of whom nothing is known any more
        assert await it.lineage(last) == (["w1"], [])


@awaited
async def test_a_circle_of_parents_has_an_end() -> None:
    """Nobody makes one; a catalogue that somebody changed may have it."""
    async with catalogue() as it:
        one, other = (window(n, parent_id=window(1 - n).id) for n in (0, 1))
        await it.add_window(one)
        await it.add_window(other)
        ancestors, clones = await it.lineage(one)

        assert set(ancestors) == {"w0", "w1"}
        assert clones == ["w1"]


@awaited
async def test_a_window_that_was_repaired_may_have_another_size() -> None:
    async with catalogue() as it:
        kept = await frozen(it, window())
        await frozen(it, window(1))
        await it.note_bytes(kept.id, 2**40)

        assert await found(it) == replace(kept, bytes=2**40)
        assert await it.usage("ci") == (2, 2**40 + 4096)


@awaited
async def test_what_the_engine_found_stands_beside_what_was_promised() -> None:
    """Only of the thaw that promised it: the session of an earlier one proves nothing."""
    async with catalogue() as it:
        await frozen(it, window())
        await it.note_proof(window().id, "s1", 64)
        assert (await found(it)).receipt is None
        promised = {"session_id": "s1", "usable_tokens": 64}
        await it.note_receipt(window().id, promised)
        await it.note_proof(window().id, "s0", 32)
        assert (await found(it)).receipt == promised
        await it.note_proof(window().id, "s1", 64)
        assert (await found(it)).receipt == {**promised, "cached_tokens": 64}
        await it.note_receipt(window().id, {**promised, "session_id": "s2"})
        await it.note_proof("nobody", "s2", 1)

        assert "cached_tokens" not in ((await found(it)).receipt or {})


def test_windows_are_found_by_a_tag_as_it_was_written() -> None:
    """Neither by a part of it nor in other letters; each once."""
    with examples() as run:

        @settings(max_examples=25)
        @given(st.lists(st.sets(st.sampled_from(["a", "A", "ab", "", "%", '"', "ü"])), max_size=5))
        def each(tags: list[set[str]]) -> None:
            async def tagged(it: Catalogue) -> None:
                for number, own in enumerate(tags):
                    await it.add_window(window(number, tags=(*own, *own)))
                for tag in ("a", "A", "ab", "", "%", '"', "ü", "b"):
                    names = [one.name for one in await it.windows("ci", tag=tag)]
                    wanted = [f"w{number}" for number, own in enumerate(tags) if tag in own]
                    assert sorted(names) == wanted
                    page = await it.windows("ci", tag=tag, begin=1, most=1)
                    assert [one.name for one in page] == names[1:2]
                assert len(await it.windows("ci")) == len(tags)

            run(tagged)

        each()


@awaited
async def test_readers_do_not_wait_for_who_writes() -> None:
    async with catalogue() as it:
        await frozen(it, window())
        async with it._changing():
            for _ in range(2 * CONNECTIONS):
                assert (await found(it)).name == "w0"


KEYS: tuple[Sort, ...] = ("name", "created_at", "tokens", "bytes")


def test_pages_are_all_windows_once_and_in_order() -> None:
    with examples() as run:

        @settings(max_examples=30)
        @given(
            sizes=st.lists(st.integers(0, 3), max_size=6),
            sort=st.sampled_from(KEYS),
            is_descending=st.booleans(),
            page=st.integers(1, 4),
        )
        def each(sizes: list[int], sort: Sort, is_descending: bool, page: int) -> None:
            async def listed(it: Catalogue) -> None:
                made = [
                    window(number, tokens=size, bytes=size, state=WindowState.FROZEN)
                    for number, size in enumerate(sizes)
                ]
                for one in made:
                    await it.add_window(one)
                found: list[Window] = []
                while some := await it.windows(
                    "ci", sort=sort, is_descending=is_descending, begin=len(found), most=page
                ):
                    found += some

                expected = sorted(made, key=lambda one: one.id)
                expected.sort(key=lambda one: getattr(one, sort), reverse=is_descending)
                assert found == expected

            run(listed)

        each()


# ── what breaks ─────────────────────────────────────────────────────────────────────────────────

WRITER = """
import asyncio, sys
from pathlib import Path
from hive.storage.catalogue import opened
from tests.storage.test_catalogue import frozen, window

async def main():
    async with opened(Path(sys.argv[1]), sys.argv[2]) as it:
        for number in range(100_000):
            await frozen(it, window(number))
            print(number, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("least", [1, 7, 20])
@awaited
async def test_what_was_told_to_be_done_survives_a_kill(least: int) -> None:
    with new_home() as home:
        argv = [sys.executable, "-c", WRITER, str(home), _url]
        writer = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        told = -1
        while told < least:
            told = int(await writer.stdout.readline())
        writer.kill()
        rest = (await writer.stdout.read()).split()
        await writer.wait()
        told = int(rest[-1]) if rest else told
        async with opened(home, _url) as it:
            found = await it.windows(None, state=None)
            assert it.set_aside is None

        whole = [one for one in found if one.state is WindowState.FROZEN]
        assert {one.name for one in whole} >= {f"w{number}" for number in range(told + 1)}
        assert all(one.blocks == 2 for one in whole)
        assert len(found) - len(whole) <= 1  # the one that was under way
        assert len(found) <= told + 2


@awaited
async def test_the_bytes_of_a_key_are_counted_in_the_same_step() -> None:
    """Of many that are frozen at once only as many become whole as there is room for."""
    async with catalogue() as it:
        for number in range(8):
            await it.begin_window(window(number))
        sizes = [replace(window(number), bytes=400) for number in range(8)]
        done = await asyncio.gather(
            *(it.commit_window(one, keep_active=True, most_bytes=1000) for one in sizes),
            return_exceptions=True,
        )
        refused = [one for one in done if isinstance(one, StorageQuotaExceeded)]
        assert (done.count(None), len(refused)) == (2, 6)
        assert (await it.usage("ci"))[1] == 800


@awaited
async def test_every_window_is_seen_once_though_others_go_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pages that are counted off would pass over some."""
    monkeypatch.setattr("hive.storage.catalogue.MOST_PAGE", 3)
    async with catalogue() as it:
        for number in range(10):
            await it.begin_window(window(number))
        await frozen(it, window(10))
        seen = []
        async for one in it.every_window(WindowState.FREEZING):
            seen.append(one.name)
            if one.name != "w4":
                await it.remove_window(one.id)

        assert seen == [f"w{number}" for number in range(10)]
        assert [one.name async for one in it.every_window(WindowState.FREEZING)] == ["w4"]


@awaited
async def test_a_line_of_writers_is_told_in_the_time_that_one_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """R161: who waits for its turn has waited."""
    limit_s = 0.5
    monkeypatch.setattr("hive.storage.catalogue.BUSY_S", limit_s)
    async with catalogue() as it:
        before = time.monotonic()
        async with asyncio.TaskGroup() as tasks, it._turn():
            line = [tasks.create_task(_refused(it, number)) for number in range(20)]
            await asyncio.wait(line)
        assert all(one.result() for one in line)
        assert limit_s <= time.monotonic() - before < BUSY_S
        await it.add_session(session())


async def _refused(it: Catalogue, number: int) -> bool:
    try:
        await it.add_session(session(number))
    except StoreUnreachable:
        return True
    return False

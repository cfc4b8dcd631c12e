"""The catalogue: every change whole or not at all, whoever is killed and whatever breaks."""

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.errors import (
    ConfigInvalid,
    InvalidStateTransition,
    SessionNotFound,
    StoreUnreachable,
    WindowAlreadyExists,
    WindowNotFound,
)
from hive.policy.windows import NEXT, SessionState, WindowState
from hive.storage.catalogue import FILE, Catalogue, Session, Sort, Window, opened
from tests.patience import awaited, short_directory

SAID = {"kind": "chat", "messages": [{"role": "user", "content": "häng an 😀"}]}


def session(number: int = 0, **facts: Any) -> Session:
    made = Session(f"s{number}", "ci", "llama", f"salt{number}", 1000.0 + number, 2000.0 + number)
    return replace(made, **facts)


def window(number: int = 0, **facts: Any) -> Window:
    made = Window(
        f"{number:032x}", "ci", f"w{number}", "s0", "llama", "salt0", 1000.0 + number, SAID
    )
    return replace(made, **facts)


@asynccontextmanager
async def catalogue() -> AsyncIterator[Catalogue]:
    with short_directory() as home:
        async with opened(home) as it:
            yield it


async def frozen(it: Catalogue, made: Window) -> Window:
    """A window that was frozen as hive does it."""
    await it.begin_window(made)
    whole = replace(made, tokens=64, blocks=2, bytes=4096, identity={"dtype": "bf16"})
    await it.commit_window(whole, keep_active=True)
    return replace(whole, state=WindowState.FROZEN)


@awaited
async def test_what_is_kept_is_what_was_given() -> None:
    async with catalogue() as it:
        one = session(conversation=SAID)
        await it.add_session(one)
        assert await it.session("s0", "ci") == one
        kept = await frozen(it, window(tags=("a", "b"), description="x"))

        assert await it.window("w0", "ci") == kept
        assert await it.usage("ci") == (1, 4096)


@awaited
async def test_it_is_there_after_a_restart_and_for_hive_alone() -> None:
    with short_directory() as home:
        async with opened(home) as it:
            await it.add_session(session())
            kept = await frozen(it, window())
        async with opened(home) as it:
            assert await it.window("w0", None) == kept
            assert await it.session("s0", None) == session()
            assert it.set_aside is None

        assert (home / FILE).stat().st_mode & 0o777 == 0o600


@awaited
async def test_what_another_key_made_is_not_there() -> None:
    """Not even that it exists is told."""
    async with catalogue() as it:
        await it.add_session(session())
        await frozen(it, window())
        with pytest.raises(SessionNotFound, match="Session not found: s0"):
            await it.session("s0", "other")
        with pytest.raises(WindowNotFound, match="Window not found: w0"):
            await it.window("w0", "other")

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
        with pytest.raises(WindowNotFound):
            await it.window("w0", "ci")  # it is not frozen yet
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


@pytest.mark.parametrize("old", SessionState)
@pytest.mark.parametrize("new", SessionState)
@awaited
async def test_a_session_moves_as_the_table_says(old: SessionState, new: SessionState) -> None:
    """(C24)"""
    async with catalogue() as it:
        await it.add_session(session(state=old))
        if new in NEXT[old]:
            await it.move_session("s0", old, new)
            with pytest.raises(InvalidStateTransition):
                await it.move_session("s0", old, new)  # it is another one now
        else:
            with pytest.raises(InvalidStateTransition):
                await it.move_session("s0", old, new)

        now = (await it.session("s0", None)).state
        assert now is (new if new in NEXT[old] else old)


@pytest.mark.parametrize("state", SessionState)
@awaited
async def test_only_a_session_that_takes_requests_remembers_them(state: SessionState) -> None:
    async with catalogue() as it:
        await it.add_session(session(state=state))
        takes = await it.spoke("s0", SAID, 5000.0)

        assert takes is (state in (SessionState.ACTIVE, SessionState.THAWED))
        now = await it.session("s0", None)
        wanted = (SAID, 5000.0, SessionState.ACTIVE) if takes else (None, 2000.0, state)
        assert (now.conversation, now.used_at, now.state) == wanted


@awaited
async def test_sessions_that_nobody_used_expire_unless_they_are_frozen() -> None:
    async with catalogue() as it:
        for number in range(4):
            await it.add_session(session(number))
        await it.move_session("s0", SessionState.ACTIVE, SessionState.FROZEN)
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
        with pytest.raises(WindowNotFound):
            await it.window("w0", "ci")
        for _ in range(2):
            await it.remove_window(window().id)

        assert (await it.session("s0", "ci")).window_id is None
        assert await it.usage(None) == (0, 0)


@awaited
async def test_the_receipt_of_a_thaw_is_kept() -> None:
    async with catalogue() as it:
        await frozen(it, window())
        await it.note_receipt(window().id, {"cached_tokens": 64})

        assert (await it.window("w0", "ci")).receipt == {"cached_tokens": 64}


KEYS: tuple[Sort, ...] = ("name", "created_at", "tokens", "bytes")


@given(
    sizes=st.lists(st.integers(0, 3), max_size=6),
    sort=st.sampled_from(KEYS),
    is_descending=st.booleans(),
    page=st.integers(1, 4),
)
def test_pages_are_all_windows_once_and_in_order(
    sizes: list[int], sort: Sort, is_descending: bool, page: int
) -> None:
    async def listed() -> None:
        async with catalogue() as it:
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

    asyncio.run(listed())


# ── what breaks ─────────────────────────────────────────────────────────────────────────────────

WRITER = """
import asyncio, sys
from pathlib import Path
from hive.storage.catalogue import opened
from tests.storage.test_catalogue import frozen, window

async def main():
    async with opened(Path(sys.argv[1])) as it:
        for number in range(100_000):
            await frozen(it, window(number))
            print(number, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("least", [1, 7, 20])
@awaited
async def test_what_was_told_to_be_done_survives_a_kill(least: int) -> None:
    with short_directory() as home:
        argv = [sys.executable, "-c", WRITER, str(home)]
        writer = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        told = -1
        while told < least:
            told = int(await writer.stdout.readline())
        writer.kill()
        rest = (await writer.stdout.read()).split()
        await writer.wait()
        told = int(rest[-1]) if rest else told
        async with opened(home) as it:
            found = await it.windows(None, state=None)
            assert it.set_aside is None

        whole = [one for one in found if one.state is WindowState.FROZEN]
        assert {one.name for one in whole} >= {f"w{number}" for number in range(told + 1)}
        assert all(one.blocks == 2 for one in whole)
        assert len(found) - len(whole) <= 1  # the one that was under way
        assert len(found) <= told + 2


def garbage(file: Path) -> None:
    file.write_bytes(b"this is no database" * 1000)


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for at in range(4096 + 8, len(data), 512):
        data[at] ^= 0xFF
    file.write_bytes(data)


def cut(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("breaks", [garbage, flipped, cut])
@awaited
async def test_a_broken_one_is_set_aside_and_kept(breaks: Any) -> None:
    with short_directory() as home:
        async with opened(home) as it:
            for number in range(30):
                await frozen(it, window(number))
        breaks(home / FILE)
        damaged = (home / FILE).read_bytes()
        async with opened(home) as it:
            assert it.set_aside is not None
            assert it.set_aside.read_bytes() == damaged
            assert await it.windows(None, state=None) == []
            await frozen(it, window())
        async with opened(home) as it:
            assert it.set_aside is None
            assert len(await it.windows(None)) == 1


@awaited
async def test_one_that_a_newer_hive_wrote_is_left_alone() -> None:
    with short_directory() as home:
        async with opened(home):
            pass
        with sqlite3.connect(home / FILE) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.close()
        with pytest.raises(ConfigInvalid, match="newer hive"):
            async with opened(home):
                pass

        assert [path.name for path in home.iterdir()] == [FILE]


@awaited
async def test_where_it_cannot_be_reached_that_is_told() -> None:
    async with catalogue() as it:
        await it._engine.dispose()
        file = Path(str(it._engine.url.database))
        file.rename(file.with_name("elsewhere"))
        file.mkdir()
        with pytest.raises(StoreUnreachable):
            await it.add_session(session())
        with pytest.raises(StoreUnreachable):
            await it.windows(None)
        file.rmdir()

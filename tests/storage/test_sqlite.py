"""SQLite's own: one file for hive alone, set aside where it is broken, waited for where it is locked."""

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hive.errors import ConfigInvalid, StoreUnreachable
from hive.storage import sqlite as of_sqlite
from hive.storage.catalogue import Catalogue, opened
from hive.storage.sqlite import FILE
from hive.storage.tables import CONNECTIONS
from hive.storage.trying import POLICY, TURN_S
from tests.patience import awaited, short_directory, until
from tests.storage.test_catalogue import frozen, session, window

SLACK_S = 3.0


@asynccontextmanager
async def catalogue() -> AsyncIterator[Catalogue]:
    with short_directory() as home:
        async with opened(home) as it:
            yield it


@awaited
async def test_it_is_a_file_for_hive_alone() -> None:
    with short_directory() as home:
        async with opened(home):
            pass
        assert (home / FILE).stat().st_mode & 0o777 == 0o600


@awaited
async def test_it_keeps_as_many_connections_as_it_opened_first() -> None:
    """hive counts its descriptors: they are the same from its start on."""
    async with catalogue() as it:
        file = str(it._engine.url.database)
        before = descriptors(file)
        await asyncio.gather(*(frozen(it, window(number)) for number in range(20)))
        await asyncio.gather(*(it.windows(None) for _ in range(20)))

        assert descriptors(file) == before
        assert before >= CONNECTIONS


def descriptors(file: str) -> int:
    """How often this process has it open."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link) == file for link in links)


def garbage(file: Path) -> None:
    file.write_bytes(b"this is no database" * 1000)


def flipped(file: Path) -> None:
    """Every page but the first says that it is of another kind; a flip in a text nobody would see."""
    data = bytearray(file.read_bytes())
    for at in range(4096, len(data), 4096):
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


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> float:
    """The database waits for less long; how many seconds for each call."""
    wait_s = 0.25
    pragmas = [one for one in of_sqlite._PRAGMAS if not one.startswith("busy_timeout")]
    monkeypatch.setattr(of_sqlite, "_PRAGMAS", (*pragmas, f"busy_timeout={int(wait_s * 1000)}"))
    return wait_s


@awaited
async def test_the_database_waits_as_long_as_a_call_has_for_others() -> None:
    """R161"""
    async with catalogue() as it, it._engine.connect() as connection:
        found = (await connection.exec_driver_sql("PRAGMA busy_timeout")).scalar_one()
        assert found / 1000 == TURN_S


@pytest.mark.usefixtures("hasty")
@awaited
async def test_who_waits_for_another_program_goes_on_when_it_is_done(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """R161: as if it had come later; a lock that is shorter than a call's own wait is not told."""
    async with catalogue() as it:
        with locked(it) as connection:
            async with asyncio.TaskGroup() as tasks:
                adding = tasks.create_task(it.add_session(session()))
                await until(lambda: caplog.records, "it was tried again")
                connection.execute("INSERT INTO alembic_version VALUES ('x')")
                connection.rollback()
                await adding
        assert await it.session("s0", None) == session()

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"the catalogue is locked, call 1 of {POLICY.calls}")


@awaited
async def test_a_lock_that_stays_is_told_with_the_next_delay(
    caplog: pytest.LogCaptureFixture, hasty: float
) -> None:
    """R161, C1: four calls, each as long as the database waits, and the pauses; readers do not."""
    async with catalogue() as it:
        with locked(it):
            began = time.monotonic()
            with pytest.raises(StoreUnreachable, match=r"locked .*4 calls.* after 0\.1 s") as told:
                await it.add_session(session())
            assert 4 * hasty <= time.monotonic() - began < 4 * hasty + SLACK_S
            assert await it.sessions(None) == []
        await it.add_session(session())

    assert told.value.retry_after_s == pytest.approx(0.1)
    assert len(caplog.records) == POLICY.calls - 1


@contextmanager
def locked(it: Catalogue) -> Iterator[sqlite3.Connection]:
    """Another program writes into the file."""
    with closing(sqlite3.connect(str(it._engine.url.database))) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.rollback()

"""A disk that hangs under SQLite costs a call its limit, and hive's end nothing."""

import asyncio
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hive.storage.leaving import Leaving
from hive.storage.tables import CONNECTIONS
from tests.doubles.fs import HANGS_S, Rule
from tests.failing import Apart, Failed, apart
from tests.patience import awaited, short_directory, until, wait_until

LIMIT_S = 0.5
FILE = "*/catalogue.db*"
OPEN = f"""
global store, it, frozen, window, session
import hive.storage.sqlite as sqlite
from hive.storage.catalogue import opened
from tests.storage.test_catalogue import frozen, session, window
import hive.storage.leaving as leaving
sqlite.LIMIT_S = leaving.CLOSE_S = {LIMIT_S}
store = opened(home)
it = await store.__aenter__()
await it.add_session(session())
"""
ENDED = "await store.__aexit__(None, None, None)"


def refused(disk: Apart, code: str) -> float:
    """Seconds until it was told that the catalogue cannot be reached."""
    began = time.monotonic()
    with pytest.raises(Failed) as told:
        disk(code)
    assert told.value.kind == "StoreUnreachable"
    return time.monotonic() - began


def answered(disk: Apart, code: str) -> Any:
    """None as long as the catalogue cannot be reached."""
    try:
        return disk(code)
    except Failed as told:
        assert told.kind == "StoreUnreachable"
        return None


def test_what_hangs_is_left_and_what_came_of_it_is_seen_before_anything_else() -> None:
    """R106, R107: hive gave up waiting for a change that has happened all the same."""
    with apart() as disk:
        disk(OPEN + "await it.begin_window(window())")
        with disk.faults.on(Rule(FILE, "sync", delay_s=HANGS_S)):
            assert refused(disk, "await it.commit_window(window(), keep_active=True)") >= LIMIT_S
            assert refused(disk, "await it.add_session(session(1))") < LIMIT_S  # at once
            for code in ("await it.window_by_id(window().id)", "await it.sessions(None)"):
                refused(disk, code)
            many = "await asyncio.gather(*(it.add_session(session(n)) for n in range(9)))"
            assert refused(disk, many) < LIMIT_S
            held = len(list(Path(f"/proc/{disk.process.pid}/task").iterdir()))
            assert held < 10  # threads
        state = "return (await it.window_by_id(window().id)).state"
        assert wait_until(lambda: answered(disk, state), "the thread, by itself") == "FROZEN"
        assert disk("await it.add_session(session(2)); return len(await it.sessions(None))") == 2
        assert "the disk of the catalogue hangs" in disk.log
        disk(ENDED)
        assert disk.leave()[0] == 0


def test_a_change_that_hangs_before_its_commit_is_taken_back() -> None:
    with apart() as disk:
        disk(OPEN)
        disk("""
            async def stuck():
                async with it._changing() as connection:
                    await connection.exec_driver_sql("UPDATE sessions SET model = 'x'")
                    (home / "begun").touch()
                    while (home / "begun").exists():
                        await asyncio.sleep(0.01)
                    await connection.exec_driver_sql(
                        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n"
                        " WHERE x < 3000000) SELECT sum(x) FROM n"
                    )
            global changing
            changing = asyncio.ensure_future(stuck())
            while not (home / "begun").exists():
                await asyncio.sleep(0.01)
            it._store._leaving.limit_s = 0.05
            (home / "begun").unlink()
        """)
        refused(disk, "await changing")
        disk(f"it._store._leaving.limit_s = {LIMIT_S}")
        model = "return (await it.session('s0', None)).model"
        assert wait_until(lambda: answered(disk, model), "the thread, by itself") == "llama"
        disk("await it.add_session(session(1))")
        disk(ENDED)


@pytest.mark.parametrize("calls", ["sync", "read|open"])
def test_hives_end_does_not_wait_for_a_disk_that_hangs(calls: str) -> None:
    with apart() as disk:
        disk(OPEN)
        disk.faults.add(Rule(FILE, calls, delay_s=HANGS_S))
        if calls == "sync":
            refused(disk, "await it.add_session(session(1))")
        began = time.monotonic()
        disk(ENDED)
        status, _ = disk.leave()
        assert (status, time.monotonic() - began < 2 * LIMIT_S + 2) == (0, True)


@awaited
async def test_a_thread_that_cannot_even_open_its_file_is_closed_when_it_comes_back() -> None:
    """Nobody has it then, so nobody else would."""
    with short_directory() as home:
        go_on, closed = threading.Event(), threading.Event()

        class Late(sqlite3.Connection):
            def close(self) -> None:
                super().close()
                closed.set()

        class Hanging(Leaving):
            def _connect(self) -> sqlite3.Connection:
                assert go_on.wait(60)
                return sqlite3.connect(home / "x", factory=Late, check_same_thread=False)

        leaving = Hanging(home / "x", 0.05)
        with pytest.raises(sqlite3.OperationalError, match="hangs"):
            await leaving.connected()
        assert leaving.hangs
        assert not await leaving.settled()
        go_on.set()
        await until(lambda: not leaving.hangs, "the thread")
        assert await leaving.settled()
        await until(closed.is_set, "its connection is closed")


@awaited
async def test_a_connection_is_closed_once_and_is_no_more() -> None:
    with short_directory() as home:
        leaving = Leaving(home / "x", 5.0)
        made = await leaving.connected()
        await asyncio.gather(leaving.close(), made.close())
        await made.close()
        with pytest.raises(ValueError, match="no active connection"):
            await made.execute("SELECT 1")
        assert not leaving.hangs


@awaited
async def test_after_the_end_all_is_in_the_one_file() -> None:
    """Whoever copies it, or finds it broken, has no log of SQLite's beside it."""
    with short_directory() as home:
        for _ in range(100):
            leaving = Leaving(home / "x", 5.0)
            made = [await leaving.connected() for _ in range(CONNECTIONS)]
            for one in made:
                await one.execute("PRAGMA journal_mode=WAL")
                await one.execute("CREATE TABLE IF NOT EXISTS t (n)")
            assert (home / "x-wal").exists()
            await leaving.close()
            assert [path.name for path in home.iterdir()] == ["x"]

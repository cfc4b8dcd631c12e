"""PostgreSQL's own: one database for one hive, and a server that hangs, ends or is locked."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from hive.errors import (
    ConfigInvalid,
    HiveError,
    InvalidParameter,
    StorageQuotaExceeded,
    StoreCredentialsRefused,
    StoreUnreachable,
)
from hive.policy.windows import SessionState, WindowState
from hive.storage import postgres as of_postgres
from hive.storage.catalogue import Catalogue, opened
from hive.storage.postgres import FILE, LIMIT_S, look, shown
from hive.storage.tables import CONNECTIONS
from hive.storage.trying import POLICY, TURN_S
from tests.patience import awaited, short_directory, until
from tests.postgres import Server, server
from tests.storage.test_catalogue import frozen, session, window

SLACK_S = 3.0  # for a connection that does not answer to be given up, on a busy machine
SECRET = "g3heim"
_number = itertools.count()


@pytest.fixture
def url(postgres: Server) -> str:
    """A database of its own."""
    return postgres.make_database(f"own{next(_number)}")


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def fragile() -> Iterator[Server]:
    """A server that these tests may hang and end."""
    with server() as it:
        it.make_database("hive")
        yield it


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> float:
    """hive and its sessions of PostgreSQL have less patience; how many seconds a call may take."""
    monkeypatch.setattr(of_postgres, "LIMIT_S", 1.5)
    monkeypatch.setattr(of_postgres, "CLOSE_S", 1.0)
    monkeypatch.setitem(of_postgres._SESSION, "lock_timeout", "250")
    return 1.5


@awaited
async def test_the_server_has_as_much_patience_as_hive(url: str, home: Path) -> None:
    """R161: else one of them would give up while the other goes on."""
    async with opened(home, url) as it, it._engine.connect() as connection:
        wanted = {"lock_timeout": TURN_S, "statement_timeout": LIMIT_S}
        for name, seconds in wanted.items():
            sql = f"SELECT setting FROM pg_settings WHERE name = '{name}'"
            found = await connection.scalar(text(sql))
            assert float(found) / 1000 == seconds


@asynccontextmanager
async def other(url: str) -> AsyncIterator[Any]:
    """Another program that is connected to the database."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def told(url: str, sql: str) -> list[Any]:
    async with other(url) as connection:
        return [tuple(row) for row in await connection.fetch(sql)]


# ── whose it is ─────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_mark_is_kept(url: str, home: Path) -> None:
    """Without the one of an import, windows are had again by their manifests."""
    for is_marked in (False, True):
        async with opened(home, url) as it:
            assert await it.has_mark("imported") is is_marked
            await it.set_mark("imported")
            assert it.set_aside is None
    assert [path.name for path in home.iterdir()] == [FILE]
    assert (home / FILE).stat().st_mode & 0o777 == 0o600


@awaited
async def test_another_hive_is_refused_and_changes_nothing(url: str, home: Path) -> None:
    """Its windows are on another disk, whether it runs just now or not."""
    async with opened(home, url) as it:
        await it.begin_window(window())
    everything = "SELECT life FROM keeper UNION SELECT id FROM windows ORDER BY 1"
    before = await told(url, everything)
    with short_directory() as elsewhere:
        with pytest.raises(ConfigInvalid, match=r"another hive .*its windows are on") as refused:
            async with opened(elsewhere, url):
                pass
        assert str(home) in refused.value.message
        with pytest.raises(ConfigInvalid, match="another hive"):
            await look(elsewhere, url)
        assert await told(url, everything) == before

        # Who has lost its state can say so.
        (elsewhere / FILE).write_text((home / FILE).read_text())
        async with opened(elsewhere, url) as it:
            assert await it.has_window("w0", "ci")


@awaited
async def test_of_two_hives_that_start_at_once_one_gets_it(url: str) -> None:
    with short_directory() as home, short_directory() as elsewhere:

        async def begin(place: Path) -> bool:
            try:
                async with opened(place, url):
                    return True
            except ConfigInvalid:
                return False

        assert sorted(await asyncio.gather(begin(home), begin(elsewhere))) == [False, True]


@awaited
async def test_an_earlier_life_writes_nothing_any_more(url: str, home: Path) -> None:
    """A host that was cut off, or a copy of its state: the later one has it."""
    async with opened(home, url) as old:
        await old.add_session(session())
        async with opened(home, url) as new:
            with pytest.raises(StoreUnreachable, match="has taken the catalogue's database"):
                await old.add_session(session(1))
            await new.add_session(session(2))
            assert [one.id for one in await old.sessions(None)] == ["s2", "s0"]


@awaited
async def test_one_that_a_newer_hive_wrote_is_left_alone(url: str, home: Path) -> None:
    async with opened(home, url):
        pass
    async with other(url) as connection:
        await connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigInvalid, match="newer hive"):
        async with opened(home, url):
            pass
    assert await told(url, "SELECT version_num FROM alembic_version") == [("9999",)]


@awaited
async def test_looking_at_it_changes_nothing(url: str, home: Path) -> None:
    assert (await look(home, url)).startswith("PostgreSQL 1")
    assert await told(url, "SELECT to_regclass('keeper')::text") == [(None,)]
    assert list(home.iterdir()) == []
    async with opened(home, url):
        assert "own" in await look(home, url)  # its own, and open


# ── what is kept ────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_what_was_said_is_kept_as_it_was_said(url: str, home: Path) -> None:
    said = {"b": [1e300, "\0", "\ud800", "ü😀", None], "a": {"": "\\u0000"}}
    async with opened(home, url) as it:
        await it.add_session(session(), said)
        kept = await it.conversation("s0", None)
        assert kept == said
        assert list(kept or {}) == ["b", "a"]


@awaited
async def test_what_postgresql_cannot_keep_is_refused_or_not_found(url: str, home: Path) -> None:
    async with opened(home, url) as it:
        for wrong in (window(description="a\0"), window(tags=("a", "b\0"))):
            with pytest.raises(InvalidParameter, match="NUL"):
                await it.begin_window(wrong)
            with pytest.raises(InvalidParameter, match="NUL"):
                await it.add_window(wrong)
        await frozen(it, window(tags=("a",)))
        assert await it.windows("ci", tag="a\0") == []
        assert await it.windows("ci", model="llama\0") == []
        assert len(await it.windows("ci", tag="a")) == 1


@awaited
async def test_names_are_ordered_by_their_bytes_whatever_the_database_prefers(
    postgres: Server, home: Path
) -> None:
    postgres.sql("CREATE DATABASE sorted TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en'")
    names = ["a", "B", "_c", "A", "b", "-d"]
    async with opened(home, postgres.url("sorted")) as it:
        for number, name in enumerate(names):
            await it.add_window(window(number, name=name, parent_id="p"))
        found = await it.windows(None, sort="name", is_descending=False)
        _, clones = await it.lineage(window(9, id="p"))

    assert [one.name for one in found] == clones == sorted(names)


# ── what is in its way ──────────────────────────────────────────────────────────────────────────


@awaited
async def test_who_waits_for_a_lock_goes_on_when_it_is_gone(
    url: str, home: Path, caplog: pytest.LogCaptureFixture, hasty: float
) -> None:
    """R161: and its quota is counted after what the other one did."""
    assert hasty < LIMIT_S
    async with opened(home, url) as it, other(url) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("SELECT 1 FROM keeper FOR UPDATE")
        async with asyncio.TaskGroup() as tasks:
            adding = tasks.create_task(_refused(it))
            await until(lambda: caplog.records, "it was tried again")
            await connection.execute(
                "INSERT INTO windows SELECT '9', 'ci', 'x', 'FROZEN', 's', 'm', 's', 1, 1, 1, 1, '',"
                " '[]', '{}', NULL, NULL"
            )
            await transaction.commit()
        assert adding.result()
        assert await it.usage("ci") == (1, 1)

    (line,) = {record.message.partition(", call")[0] for record in caplog.records}
    assert line == "the catalogue is locked"
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


async def _refused(it: Catalogue) -> bool:
    try:
        await it.begin_window(window(), most=1)
    except StorageQuotaExceeded:
        return True
    return False


@awaited
async def test_a_lock_that_stays_is_told_with_the_next_delay(
    url: str, home: Path, hasty: float
) -> None:
    """R161, C1: four calls, in the time that one waits for its database."""
    assert hasty < LIMIT_S
    async with opened(home, url) as it, other(url) as connection:
        async with connection.transaction():
            await connection.execute("SELECT 1 FROM keeper FOR UPDATE")
            began = time.monotonic()
            with pytest.raises(StoreUnreachable, match=r"locked .*4 calls.* after 0\.1 s") as told_:
                await it.add_session(session())
            took = time.monotonic() - began
            assert await it.sessions(None) == []  # nobody reads less for it
        assert POLICY.calls * 0.25 <= took < POLICY.calls * 0.25 + SLACK_S
        assert told_.value.retry_after_s == pytest.approx(0.1)
        await it.add_session(session())


@awaited
async def test_of_two_that_lock_each_other_out_both_are_done(
    postgres: Server, url: str, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """R161: PostgreSQL ends one of them; hive begins again."""
    async with opened(home, url) as it, other(url) as connection:
        await connection.execute("SET deadlock_timeout = '1min'")  # hive is the one that is ended
        await it.add_session(session())
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("UPDATE sessions SET used_at = 3 WHERE id = 's0'")
        async with asyncio.TaskGroup() as tasks:
            moving = tasks.create_task(
                it.move_session("s0", SessionState.ACTIVE, SessionState.EXPIRED)
            )
            waits = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            await until(lambda: postgres.sql(waits) != ["0"], "hive waits")
            await connection.execute("SELECT 1 FROM keeper FOR UPDATE")
            await transaction.commit()
            await moving
        found = await it.session("s0", None)
        assert (found.state, found.used_at) == (SessionState.EXPIRED, 3)

    assert ["deadlock detected" in record.message for record in caplog.records] == [True]


# ── a server that hangs, ends and comes back ────────────────────────────────────────────────────


@awaited
async def test_a_hung_server_is_not_waited_for_longer_than_that(
    fragile: Server, home: Path, hasty: float
) -> None:
    """And it is served again as soon as it answers, by itself."""
    async with opened(home, fragile.url("hive")) as it:
        await it.add_session(session())
        with fragile.hung():
            began = time.monotonic()
            calls: list[Any] = [it.sessions(None) for _ in range(2 * CONNECTIONS)]
            calls += [it.session("s0", None)]
            changes = [it.add_session(session(n)) for n in (1, 2, 3)]
            answers = await asyncio.gather(*calls, *changes, return_exceptions=True)
            assert {type(answer) for answer in answers} == {StoreUnreachable}
            assert hasty - 0.5 < time.monotonic() - began < hasty + SLACK_S
        assert (await it.session("s0", None)) == session()
        await it.add_session(session(4))
        began = time.monotonic()
        with fragile.hung():
            pass
    async with opened(home, fragile.url("hive")) as it:
        await it.remove_session("s0", SessionState.ACTIVE)
        fragile.hang()
    fragile.go_on()
    assert time.monotonic() - began < hasty + SLACK_S  # the end does not wait for it either


@awaited
async def test_what_was_committed_too_late_is_seen_before_anything_is_undone(
    fragile: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R106, R107: hive gave up on a change that the server still has under way."""
    monkeypatch.setattr(of_postgres, "LIMIT_S", 2.5)
    url = fragile.url("hive")
    with contextlib.suppress(HiveError):
        fragile.sql("DROP TABLE IF EXISTS keeper", "hive")
    async with opened(home, url) as it, other(url) as connection:
        await it.begin_window(window(7))
        async with contextlib.AsyncExitStack() as late:
            with fragile.hung(), pytest.raises(StoreUnreachable):
                await it.commit_window(window(7), keep_active=True)
            # As that change would be: its transaction has the keeper, and is not over.
            await late.enter_async_context(connection.transaction())
            await connection.execute("SELECT 1 FROM keeper FOR UPDATE")
            await connection.execute("UPDATE windows SET state = 'FROZEN'")
            async with asyncio.TaskGroup() as tasks:
                looking = tasks.create_task(it.window_by_id(window(7).id))
                done, _ = await asyncio.wait({looking}, timeout=TURN_S / 2)
                assert not done
                await late.aclose()
        found = looking.result()
        assert found is not None
        assert found.state is WindowState.FROZEN
        await it.remove_window(window(7).id)


@awaited
async def test_a_server_that_was_restarted_is_found_again(fragile: Server, home: Path) -> None:
    fragile.sql("DROP TABLE IF EXISTS keeper", "hive")
    async with opened(home, fragile.url("hive")) as it:
        kept = await frozen(it, window(20, name="kept"))
        fragile.end()
        for call in (it.windows(None), it.add_session(session(9)), it.remove_window("x")):
            with pytest.raises(StoreUnreachable):
                await call
        fragile.start()
        assert await it.named("kept", "ci") == [kept]
        again: list[Any] = [it.has_window("kept", "ci"), it.spoke("s", {}, 1.0)]
        for one in again:
            fragile.end()
            fragile.start()
            assert await one is not None  # while nobody asked: nobody is told
        # Every connection of the pool is replaced, and none is asked for twice.
        await asyncio.gather(*(it.windows(None) for _ in range(2 * CONNECTIONS)))
        await it.add_session(session(9))
        await it.remove_window(kept.id)
        count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'hive'"
        assert int(fragile.sql(count)[0]) <= CONNECTIONS


# ── secrets ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            f"postgresql://ada:{SECRET}@db.example:5433/hive",
            "postgresql://ada@db.example:5433/hive",
        ),
        (f"postgres://ada:a%40{SECRET}@db/hive?password={SECRET}", "postgresql://ada@db/hive"),
        ("postgresql:///hive?host=/run/postgresql", "postgresql:///hive?host=/run/postgresql"),
        (f"postgresql+asyncpg://:{SECRET}@[::1]/h", "postgresql://@[::1]/h"),
    ],
)
def test_a_url_is_shown_without_its_secrets(given: str, wanted: str) -> None:
    assert shown(given) == wanted


@pytest.mark.parametrize("what", ["nobody", "no database", "no server", "no port"])
@awaited
async def test_why_it_cannot_be_reached_is_told_without_the_password(
    postgres: Server, home: Path, what: str
) -> None:
    """R076"""
    wrong, said = {
        "nobody": (postgres.url("postgres", "nobody", SECRET), 'role "nobody" does not exist'),
        "no database": (postgres.url("nowhere", "hive", SECRET), '"nowhere" does not exist'),
        "no server": (f"postgresql://u:{SECRET}@/x?host={home}", "No such file"),
        "no port": (f"postgresql://u:{SECRET}@127.0.0.1:1/x", "127.0.0.1"),
    }[what]
    for asked in (look(home, wrong), opened(home, wrong).__aenter__()):
        with pytest.raises(StoreUnreachable) as refused:
            await asked
        assert said in refused.value.message
        assert (type(refused.value) is StoreCredentialsRefused) == (what == "nobody")
        exc: BaseException | None = refused.value
        while exc is not None:
            assert SECRET not in f"{exc} {exc!r}"
            exc = exc.__cause__


@awaited
async def test_nothing_shows_the_password_of_one_that_is_open(postgres: Server, home: Path) -> None:
    """R076"""
    postgres.make_database("secret")
    async with opened(home, postgres.url("secret", "hive", SECRET)) as it:
        await it.add_session(replace(session(), salt=SECRET))
        with pytest.raises(Exception, match=r"already exists|duplicate") as twice:
            await it.add_session(replace(session(), salt=SECRET))
        seen = [repr(it), repr(it._engine), repr(it._store), str(twice.value), repr(twice.value)]
    assert not [text for text in seen if SECRET in text]

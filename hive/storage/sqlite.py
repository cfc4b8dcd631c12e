"""The catalogue in a file of SQLite: the default, for one hive on one host.

A file that is broken is set aside and kept. Writers wait for each other here, and for other
programs that have the file open, TURN_S at a time.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, event, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from hive.errors import StoreUnreachable
from hive.storage.tables import CONNECTIONS, upgraded, windows
from hive.storage.trying import BUSY_S, TURN_S, reached, tried

log = logging.getLogger(__name__)

FILE = "catalogue.db"
_COMPANIONS = ("-wal", "-shm")
_PRAGMAS = (
    "journal_mode=WAL",  # readers do not wait for a writer
    "synchronous=FULL",  # what was said to be frozen is so after a power cut, too
    "foreign_keys=ON",
    f"busy_timeout={int(TURN_S * 1000)}",
)
# Of SQLite's own words: the file is broken, and not only busy or out of reach.
_BROKEN = ("malformed", "not a database", "disk image", "corrupt")
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_PRIMARY = 0xFF  # the rest of a code says more, as SQLITE_BUSY_SNAPSHOT


class SQLite:
    """What a catalogue in SQLite has of its own."""

    def __init__(self, engine: AsyncEngine, set_aside: Path | None = None) -> None:
        self.connections, self.set_aside = engine, set_aside

    def has_tag(self, tag: str) -> ColumnElement[bool]:
        each = func.json_each(windows.c.tags).table_valued("value")
        return select(each.c.value).where(each.c.value == tag).exists()

    def in_order(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return column  # by its bytes already

    def keeps(self, text: str) -> bool:
        """Whether it can be a column's value."""
        del text
        return True

    @staticmethod
    def is_locked(exc: DBAPIError) -> bool:
        code = getattr(exc.orig, "sqlite_errorcode", None)
        return code is not None and code & _PRIMARY in _LOCKED

    @staticmethod
    def is_told(exc: DBAPIError) -> bool:
        """Whether nothing of the change can happen any more."""
        del exc
        return True

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """No limit: a thread that reads or writes a file cannot be left."""
        yield

    async def began(self, connection: AsyncConnection) -> None:
        """BEGIN IMMEDIATE has all that a change needs."""

    async def settled(self) -> None:
        """A change that failed has not happened."""


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[SQLite]:
    """The file in `directory`, made where there is none (0600), and brought up to date.

    Raises ConfigInvalid for one that a newer hive has written, StoreUnreachable.
    """
    file = directory / FILE
    set_aside = None
    if broken := await asyncio.to_thread(_what_is_broken, file):
        set_aside = await asyncio.to_thread(_set_aside, file)
        log.error("the catalogue is broken (%s) and was set aside as %s", broken, set_aside.name)
    os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{file}",
        pool_size=CONNECTIONS,
        max_overflow=0,
        hide_parameters=True,  # what was said, and salts, are in no error's text
    )
    event.listen(engine.sync_engine, "connect", _connected)
    event.listen(engine.sync_engine, "begin", _begun)

    async def begin() -> None:
        with reached(SQLite.is_locked):
            async with engine.begin() as connection:
                await connection.run_sync(upgraded)
            async with contextlib.AsyncExitStack() as all_of_them:
                for _ in range(CONNECTIONS):  # hive's descriptors are the same from here on
                    await all_of_them.enter_async_context(engine.connect())

    try:
        await tried(begin)
        yield SQLite(engine, set_aside)
    finally:
        await engine.dispose()


def _connected(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy says itself when a transaction begins
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begun(connection: Connection) -> None:
    if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        return  # a reader waits for nobody, and nobody for it
    # A reader that turns into a writer could find that another one was first, and would fail.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _what_is_broken(file: Path) -> str:
    """What SQLite finds wrong with the file; empty: nothing, or there is none."""
    if not file.exists():
        return ""
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=BUSY_S)) as connection:
            (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as exc:
        if not _is_broken(exc):
            raise StoreUnreachable(f"The catalogue cannot be opened: {exc}.") from exc
        return str(exc)
    except sqlite3.DatabaseError as exc:
        return str(exc)
    return "" if said == "ok" else str(said)


def _is_broken(exc: Exception) -> bool:
    return any(word in str(exc) for word in _BROKEN)


def _set_aside(file: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    number = 0
    while (aside := file.with_name(f"{file.name}.damaged-{stamp}-{number}")).exists():
        number += 1
    file.rename(aside)
    for companion in _COMPANIONS:
        with contextlib.suppress(FileNotFoundError):
            file.with_name(file.name + companion).rename(aside.with_name(aside.name + companion))
    return aside

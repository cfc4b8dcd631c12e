"""The catalogue in a file of SQLite: the default, for one hive on one host.

A file that is broken is set aside and kept. Writers wait for each other here, and for other
programs that have the file open, TURN_S at a time. A disk that hangs is not waited for: a call costs
LIMIT_S, and the next ones nothing until it is back.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, event, func, select
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from hive.errors import StoreUnreachable
from hive.storage.damage import set_aside, what_is_broken
from hive.storage.leaving import Leaving
from hive.storage.tables import CONNECTIONS, upgraded, windows
from hive.storage.threads import in_its_own_thread
from hive.storage.trying import BUSY_S, TURN_S, reached, tried

log = logging.getLogger(__name__)
T = TypeVar("T")

FILE = "catalogue.db"
LIMIT_S = BUSY_S  # for the disk to be done with a step of a call
UPGRADE_S = 120.0  # for the tables to be brought up to date
_PRAGMAS = (
    "journal_mode=WAL",  # readers do not wait for a writer
    "synchronous=FULL",  # what was said to be frozen is so after a power cut, too
    "foreign_keys=ON",
    f"busy_timeout={int(TURN_S * 1000)}",
)
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_PRIMARY = 0xFF  # the rest of a code says more, as SQLITE_BUSY_SNAPSHOT


class SQLite:
    """What a catalogue in SQLite has of its own."""

    def __init__(
        self, engine: AsyncEngine, leaving: Leaving, set_aside: Path | None = None
    ) -> None:
        self.connections, self.set_aside = engine, set_aside
        self._leaving = leaving

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
        return not exc.connection_invalidated

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Each step of it has LIMIT_S. Raises StoreUnreachable while the disk hangs."""
        if self._leaving.hangs:
            raise StoreUnreachable
        yield

    async def began(self, connection: AsyncConnection) -> None:
        """BEGIN IMMEDIATE has all that a change needs."""

    async def settled(self) -> None:
        """Return when no change is under way that hive gave up waiting for. Raises StoreUnreachable."""
        if not await self._leaving.settled():
            raise StoreUnreachable


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[SQLite]:
    """The file in `directory`, made where there is none (0600), and brought up to date.

    Raises ConfigInvalid for one that a newer hive has written, StoreUnreachable.
    """
    file = directory / FILE
    aside = None
    if broken := await _in_time(partial(_what_is_broken, file)):
        aside = await _in_time(partial(set_aside, file))
        log.error("the catalogue is broken (%s) and was set aside as %s", broken, aside.name)
    os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    leaving = Leaving(file, UPGRADE_S)
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{file}",
        async_creator=leaving.connected,
        pool_size=CONNECTIONS,
        max_overflow=0,
        pool_timeout=LIMIT_S,
        hide_parameters=True,  # what was said, and salts, are in no error's text
    )
    event.listen(engine.sync_engine, "connect", _connected)
    event.listen(engine.sync_engine, "begin", _begun)
    event.listen(engine.sync_engine, "handle_error", _failed)

    async def begin() -> None:
        with reached(SQLite.is_locked):
            async with engine.begin() as connection:
                await connection.run_sync(upgraded)
            async with contextlib.AsyncExitStack() as all_of_them:
                for _ in range(CONNECTIONS):  # hive's descriptors are the same from here on
                    await all_of_them.enter_async_context(engine.connect())

    try:
        await tried(begin)
        leaving.limit_s = LIMIT_S
        yield SQLite(engine, leaving, aside)
    finally:
        await leaving.close()
        await engine.dispose()


def _connected(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begun(connection: Connection) -> None:
    if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        return  # a reader waits for nobody, and nobody for it
    # A reader that turns into a writer could find that another one was first, and would fail.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _failed(context: ExceptionContext) -> None:
    """One connection that was left says nothing of the others."""
    context.invalidate_pool_on_disconnect = False


async def _in_time(work: Callable[[], T]) -> T:
    """Raises StoreUnreachable where the disk takes longer than UPGRADE_S."""
    try:
        async with asyncio.timeout(UPGRADE_S):
            return await in_its_own_thread(work)
    except TimeoutError as exc:
        raise StoreUnreachable("The catalogue cannot be opened: its disk hangs.") from exc


def _what_is_broken(file: Path) -> str:
    """What SQLite finds wrong with the file; empty: nothing, or there is none."""
    try:
        return what_is_broken(file, BUSY_S)
    except sqlite3.OperationalError as exc:
        raise StoreUnreachable(f"The catalogue cannot be opened: {exc}.") from exc

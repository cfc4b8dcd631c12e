"""Connections to SQLite that can be left: a disk that hangs keeps their threads, and nobody else.

aiosqlite gives each connection a thread, and waits for it without a limit, at the end of the program,
too. Here a call that takes too long fails; its connection is given up, and closed, which takes back
what was not committed, by its own thread as soon as that comes back. Until then nothing else is
begun: a disk that keeps one thread would keep all of them.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import aiosqlite

log = logging.getLogger(__name__)

CLOSE_S = 3.0
# SQLAlchemy takes what says so for a connection that is no more.
_LEFT = "the disk under server.state_dir hangs: connection closed"


class Connection(aiosqlite.Connection):
    """Every call raises sqlite3.OperationalError where its disk takes too long."""

    def __init__(self, connector: Callable[[], sqlite3.Connection], leaving: "Leaving") -> None:
        super().__init__(connector, iter_chunk_size=64)
        self._thread.daemon = True  # hive's end does not wait for it
        self._leaving = leaving
        self._is_over = False

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._is_over:
            raise sqlite3.OperationalError(_LEFT)
        call: Any = super()._execute  # the one way that all calls of it go
        try:
            async with asyncio.timeout(self._leaving.limit_s):
                return await call(fn, *args, **kwargs)
        except TimeoutError as exc:
            # Not by its end alone: SQLite keeps a transaction as long as a cursor of it is anywhere.
            self._tx.put_nowait((None, self._conn.rollback))
            self._leave(self.stop())
            raise sqlite3.OperationalError(_LEFT) from exc

    async def close(self) -> None:
        """It waits CLOSE_S at most. Closing it again does nothing."""
        if self._is_over or self._connection is None:
            return
        self._is_over = True
        if closing := self.stop():
            await asyncio.wait({closing}, timeout=CLOSE_S)
            if not closing.done():
                self._leave(closing)

    def _leave(self, closing: "asyncio.Future[Any] | None") -> None:
        self._is_over = True
        assert closing is not None  # there is a loop
        self._leaving.keep(closing, self)


class Leaving:
    """What the connections of one catalogue have in common: `limit_s` is how long a call may take."""

    def __init__(self, file: Path, limit_s: float) -> None:
        self.file, self.limit_s = file, limit_s
        self._made: WeakSet[Connection] = WeakSet()
        self._kept: dict[asyncio.Future[Any], Connection | None] = {}
        self._until = 0.0  # when nobody waits any more for what is kept

    async def connected(self) -> Connection:
        """A new one. Raises sqlite3.OperationalError."""
        made = Connection(self._connect, self)
        connecting = asyncio.ensure_future(_opened(made))
        await asyncio.wait({connecting}, timeout=self.limit_s)
        if not connecting.done():
            self.keep(connecting, None)
            raise sqlite3.OperationalError(_LEFT)
        self._made.add(made)
        return connecting.result()

    def _connect(self) -> sqlite3.Connection:
        # SQLAlchemy says itself when a transaction begins; and who closes it may be another thread.
        return sqlite3.connect(self.file, isolation_level=None, check_same_thread=False)

    def keep(self, coming_back: "asyncio.Future[Any]", connection: Connection | None) -> None:
        """A thread that nobody waits for any more, until it comes back."""
        log.error(
            "the disk of the catalogue hangs: a call of it is not waited for any more after %g s",
            self.limit_s,
        )
        if not self._kept:
            self._until = asyncio.get_running_loop().time() + self.limit_s
        self._kept[coming_back] = connection  # which nobody may collect meanwhile
        coming_back.add_done_callback(self._came_back)

    def _came_back(self, coming_back: "asyncio.Future[Any]") -> None:
        del self._kept[coming_back]
        if coming_back.cancelled() or coming_back.exception():
            return
        if isinstance(late := coming_back.result(), Connection):
            late.stop()

    @property
    def hangs(self) -> bool:
        """Whether a thread is at work that nobody waits for any more."""
        return bool(self._kept)

    async def settled(self) -> bool:
        """Whether none is any more; it waits a while for that, once for all that hang together."""
        while self._kept:
            left_s = self._until - asyncio.get_running_loop().time()
            if left_s <= 0:
                return False
            await asyncio.wait(set(self._kept), timeout=left_s)
        return True

    async def close(self) -> None:
        """All connections at once but one: the last one takes SQLite's log into the file.

        Of two that close at the same moment each may take the other for somebody who goes on.
        """
        made = list(self._made)
        await asyncio.gather(*(one.close() for one in made[1:]))
        for last in made[:1]:
            await last.close()

    def __repr__(self) -> str:
        return f"<Leaving {len(self._kept)} kept>"


async def _opened(made: Connection) -> Connection:
    await made
    return made

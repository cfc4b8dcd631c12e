"""The catalogue of sessions and windows, in SQLite by default; every change is one transaction.

A call returns when its change is on disk. Whoever is killed in between leaves what was before or
what is after, never a mixture (R106, R107); what a window's *files* are is not known here.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, RowMapping, Select, delete, event, func, insert, select, update
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from hive.errors import (
    ConfigInvalid,
    InvalidStateTransition,
    SessionNotFound,
    StoreUnreachable,
    WindowAlreadyExists,
    WindowNotFound,
)
from hive.policy.windows import NEXT, SessionState, WindowState
from hive.storage.tables import sessions, windows

log = logging.getLogger(__name__)

FILE = "catalogue.db"
BUSY_S = 5.0  # for another connection's change to be over
MOST_PAGE = 1000
_COMPANIONS = ("-wal", "-shm")
_PRAGMAS = (
    "journal_mode=WAL",  # readers do not wait for a writer
    "synchronous=FULL",  # what was said to be frozen is so after a power cut, too
    "foreign_keys=ON",
    f"busy_timeout={int(BUSY_S * 1000)}",
)
# Of SQLite's own words: the file is broken, and not only busy or out of reach.
_BROKEN = ("malformed", "not a database", "disk image", "corrupt")

Sort = Literal["name", "created_at", "tokens", "bytes"]


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation with one model. `owner` is an API key's name; times are seconds since 1970.

    `conversation` is what the engine would be sent to go on with it, None before the first answer.
    """

    id: str
    owner: str
    model: str
    salt: str = field(repr=False)
    created_at: float
    used_at: float
    state: SessionState = SessionState.ACTIVE
    conversation: dict[str, Any] | None = field(default=None, repr=False)
    window_id: str | None = None  # that it was frozen into, or thawed from


@dataclass(frozen=True, slots=True)
class Window:
    """A frozen context. `blocks` are chunks of `tokens`, `bytes` what they have on disk."""

    id: str  # the name of its folder, too
    owner: str
    name: str
    session_id: str
    model: str
    salt: str = field(repr=False)
    created_at: float
    conversation: dict[str, Any] = field(repr=False)
    identity: dict[str, Any] = field(default_factory=dict)
    state: WindowState = WindowState.FREEZING
    tokens: int = 0
    blocks: int = 0
    bytes: int = 0
    description: str = ""
    tags: tuple[str, ...] = ()
    receipt: dict[str, Any] | None = None  # of its last thaw
    parent_id: str | None = None  # that it was cloned from


class Catalogue:
    """Made by `opened`. Every call raises StoreUnreachable where the database does not answer.

    `owner` None means everybody's; another key's sessions and windows are not found.
    """

    def __init__(self, engine: AsyncEngine, set_aside: Path | None = None) -> None:
        """`set_aside` is the broken database that this one replaces."""
        self.set_aside = set_aside
        self._engine = engine
        self._reading = engine.execution_options(isolation_level="AUTOCOMMIT")

    # ── sessions ────────────────────────────────────────────────────────────────────────────────

    async def add_session(self, session: Session) -> None:
        async with self._changing() as connection:
            await connection.execute(insert(sessions).values(**asdict(session)))

    async def session(self, session_id: str, owner: str | None) -> Session:
        """Raises SessionNotFound."""
        wanted = select(sessions).where(sessions.c.id == session_id)
        if owner is not None:
            wanted = wanted.where(sessions.c.owner == owner)
        async with self._looking() as connection:
            row = (await connection.execute(wanted)).mappings().first()
        if row is None:
            raise SessionNotFound(f"Session not found: {session_id}")
        return _session(row)

    async def sessions(
        self, owner: str | None, *, state: SessionState | None = None, most: int = MOST_PAGE
    ) -> list[Session]:
        """The last used first."""
        wanted = select(sessions).order_by(sessions.c.used_at.desc(), sessions.c.id).limit(most)
        if owner is not None:
            wanted = wanted.where(sessions.c.owner == owner)
        if state is not None:
            wanted = wanted.where(sessions.c.state == state)
        async with self._looking() as connection:
            return [_session(row) for row in (await connection.execute(wanted)).mappings()]

    async def move_session(
        self, session_id: str, old: SessionState, new: SessionState, **more: Any
    ) -> None:
        """Change its state, and other columns, if it is still what it was: of two only one wins.

        Raises InvalidStateTransition.
        """
        async with self._changing() as connection:
            await _move(connection, session_id, old, new, more)

    async def spoke(self, session_id: str, conversation: Mapping[str, Any], at: float) -> bool:
        """Note what was said last; False where the session takes nothing any more."""
        takes = (SessionState.ACTIVE, SessionState.THAWED)
        changed = (
            update(sessions)
            .where(sessions.c.id == session_id, sessions.c.state.in_(takes))
            .values(conversation=dict(conversation), used_at=at, state=SessionState.ACTIVE)
        )
        async with self._changing() as connection:
            return (await connection.execute(changed)).rowcount == 1

    async def expire(self, unused_since: float) -> int:
        """ACTIVE sessions that were not used since then are EXPIRED now; how many."""
        changed = (
            update(sessions)
            .where(sessions.c.state == SessionState.ACTIVE, sessions.c.used_at < unused_since)
            .values(state=SessionState.EXPIRED)
        )
        async with self._changing() as connection:
            return (await connection.execute(changed)).rowcount

    # ── windows ─────────────────────────────────────────────────────────────────────────────────

    async def begin_window(self, window: Window) -> None:
        """It is being frozen: its name is taken. Raises WindowAlreadyExists."""
        values = {**asdict(window), "state": WindowState.FREEZING, "tags": list(window.tags)}
        try:
            async with self._changing() as connection:
                await connection.execute(insert(windows).values(**values))
        except IntegrityError as exc:
            raise WindowAlreadyExists(f"Window name already exists: {window.name}") from exc

    async def commit_window(self, window: Window, *, keep_active: bool = False) -> None:
        """It is frozen, and with it its session, in one step (R106).

        Raises InvalidStateTransition, and nothing has changed, where the session is another one
        by now.
        """
        values = {**asdict(window), "state": WindowState.FROZEN, "tags": list(window.tags)}
        async with self._changing() as connection:
            changed = update(windows).where(
                windows.c.id == window.id, windows.c.state == WindowState.FREEZING
            )
            if (await connection.execute(changed.values(**values))).rowcount != 1:
                raise InvalidStateTransition("The window is not being frozen any more.")
            if not keep_active:
                row = (
                    await connection.execute(
                        select(sessions.c.state).where(sessions.c.id == window.session_id)
                    )
                ).first()
                old = SessionState(row.state) if row else SessionState.DELETED
                new = SessionState.FROZEN
                await _move(connection, window.session_id, old, new, {"window_id": window.id})

    async def add_window(self, window: Window) -> None:
        """One that is whole already: a clone, or one that was found. Raises WindowAlreadyExists."""
        values = {**asdict(window), "state": WindowState.FROZEN, "tags": list(window.tags)}
        try:
            async with self._changing() as connection:
                await connection.execute(insert(windows).values(**values))
        except IntegrityError as exc:
            raise WindowAlreadyExists(f"Window name already exists: {window.name}") from exc

    async def window(self, name: str, owner: str | None) -> Window:
        """One that is frozen. Raises WindowNotFound."""
        found = await self.windows(owner, name=name, most=1)
        if not found:
            raise WindowNotFound(f"Window not found: {name}")
        return found[0]

    async def windows(
        self,
        owner: str | None,
        *,
        name: str | None = None,
        model: str | None = None,
        session_id: str | None = None,
        state: WindowState | None = WindowState.FROZEN,
        sort: Sort = "created_at",
        is_descending: bool = True,
        begin: int = 0,
        most: int = MOST_PAGE,
    ) -> list[Window]:
        """A page of those that fit, in the order of `sort`."""
        column = windows.c[sort]
        order = column.desc() if is_descending else column.asc()
        wanted = _fitting(select(windows), owner, name, model, session_id, state)
        wanted = wanted.order_by(order, windows.c.id).offset(begin).limit(most)
        async with self._looking() as connection:
            return [_window(row) for row in (await connection.execute(wanted)).mappings()]

    async def usage(self, owner: str | None) -> tuple[int, int]:
        """How many windows there are, half-made ones too, and their bytes."""
        wanted = select(func.count(), func.coalesce(func.sum(windows.c.bytes), 0))
        if owner is not None:
            wanted = wanted.where(windows.c.owner == owner)
        async with self._looking() as connection:
            count, size = (await connection.execute(wanted)).one()
        return int(count), int(size)

    async def note_receipt(self, window_id: str, receipt: Mapping[str, Any]) -> None:
        changed = update(windows).where(windows.c.id == window_id).values(receipt=dict(receipt))
        async with self._changing() as connection:
            await connection.execute(changed)

    async def begin_removal(self, window_id: str) -> None:
        """From now on it is not found; its files may go."""
        changed = update(windows).where(windows.c.id == window_id)
        async with self._changing() as connection:
            await connection.execute(changed.values(state=WindowState.DELETING))

    async def remove_window(self, window_id: str) -> None:
        """Its files are gone, or were never there. Removing it again does nothing."""
        async with self._changing() as connection:
            await connection.execute(delete(windows).where(windows.c.id == window_id))

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[AsyncConnection]:
        with _reached():
            async with self._engine.begin() as connection:
                yield connection

    @asynccontextmanager
    async def _looking(self) -> AsyncIterator[AsyncConnection]:
        with _reached():
            async with self._reading.connect() as connection:
                yield connection

    def __repr__(self) -> str:
        return f"<Catalogue {self._engine.url!r}>"


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Catalogue]:
    """The catalogue in `directory` (0700), made where there is none, and brought up to date.

    A broken one is set aside, and a new one is empty: windows are found again by their manifests.
    Raises ConfigInvalid for one that a newer hive has written, StoreUnreachable.
    """
    file = directory / FILE
    set_aside = None
    if broken := await asyncio.to_thread(_what_is_broken, file):
        set_aside = await asyncio.to_thread(_set_aside, file)
        log.error("the catalogue is broken (%s) and was set aside as %s", broken, set_aside.name)
    os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}")
    event.listen(engine.sync_engine, "connect", _connected)
    event.listen(engine.sync_engine, "begin", _begun)
    try:
        with _reached():
            async with engine.begin() as connection:
                await connection.run_sync(_upgraded)
        yield Catalogue(engine, set_aside)
    finally:
        await engine.dispose()


def _connected(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy says itself when a transaction begins
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begun(connection: Connection) -> None:
    # A reader that turns into a writer could find that another one was first, and would fail.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _upgraded(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", "hive.storage:migrations")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as exc:
        raise ConfigInvalid(
            "The catalogue was written by a newer hive.",
            action="Run that hive, or set another server.state_dir.",
        ) from exc


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


@contextmanager
def _reached() -> Iterator[None]:
    """Errors of the database that are not about what was asked."""
    try:
        yield
    except IntegrityError:
        raise
    except (OperationalError, DatabaseError, OSError) as exc:
        raise StoreUnreachable from exc


async def _move(
    connection: AsyncConnection,
    session_id: str,
    old: SessionState,
    new: SessionState,
    more: Mapping[str, Any],
) -> None:
    if new not in NEXT[old]:
        raise InvalidStateTransition(f"A session that is {old} does not become {new}.")
    changed = (
        update(sessions)
        .where(sessions.c.id == session_id, sessions.c.state == old)
        .values(state=new, **more)
    )
    if (await connection.execute(changed)).rowcount != 1:
        raise InvalidStateTransition(f"The session is not {old} any more.")


def _fitting(
    wanted: Select[Any],
    owner: str | None,
    name: str | None,
    model: str | None,
    session_id: str | None,
    state: WindowState | None,
) -> Select[Any]:
    asked = {"owner": owner, "name": name, "model": model, "session_id": session_id, "state": state}
    for column, value in asked.items():
        if value is not None:
            wanted = wanted.where(windows.c[column] == value)
    return wanted


def _session(row: RowMapping) -> Session:
    return Session(**{**row, "state": SessionState(row["state"])})


def _window(row: RowMapping) -> Window:
    return Window(**{**row, "state": WindowState(row["state"]), "tags": tuple(row["tags"])})

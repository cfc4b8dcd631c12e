"""The catalogue of sessions and windows, in SQLite or PostgreSQL; every change is one transaction.

A call returns when its change is on disk. Whoever is killed in between leaves what was before or
what is after, never a mixture (R106, R107); what a window's *files* are is not known here.
"""

import asyncio
import functools
import inspect
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    RowMapping,
    Select,
    and_,
    delete,
    false,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from hive.errors import (
    InvalidParameter,
    InvalidStateTransition,
    SessionNotFound,
    StorageQuotaExceeded,
    WindowAlreadyExists,
)
from hive.policy.windows import NEXT, SessionState, WindowState
from hive.storage import postgres, sqlite
from hive.storage.finishing import to_the_end
from hive.storage.postgres import PostgreSQL
from hive.storage.sqlite import SQLite
from hive.storage.tables import marks, sessions, windows
from hive.storage.trying import BUSY_S, reached, tried

MOST_PAGE = 1000
GIB = 2**30

_SESSION = {column.name: column for column in sessions.c if column.name != "conversation"}
_HAS_CONVERSATION = sessions.c.conversation.is_not(None).label("has_conversation")

Sort = Literal["name", "created_at", "tokens", "bytes"]


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation with one model. `owner` is an API key's name; times are seconds since 1970.

    What was said in it may be megabytes, and is had apart, by `Catalogue.conversation`.
    """

    id: str
    owner: str
    model: str
    salt: str = field(repr=False)
    created_at: float
    used_at: float
    state: SessionState = SessionState.ACTIVE
    has_conversation: bool = False  # something was answered in it
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
    identity: dict[str, Any] = field(default_factory=dict)
    state: WindowState = WindowState.FREEZING
    tokens: int = 0
    blocks: int = 0
    bytes: int = 0
    description: str = ""
    tags: tuple[str, ...] = ()
    receipt: dict[str, Any] | None = None  # of its last thaw
    parent_id: str | None = None  # that it was cloned from


def _all_whole(cls: type["Catalogue"]) -> type["Catalogue"]:
    """A call that was begun is finished, though who made it is cancelled meanwhile; one that found
    the database locked is made again (R161).

    A connection that is let go in the middle keeps its transaction, and everybody else waiting.
    """
    for name, call in list(vars(cls).items()):
        if inspect.iscoroutinefunction(call) and not name.startswith("_"):
            setattr(cls, name, _whole(call))
    return cls


def _whole(call: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    @functools.wraps(call)
    async def whole(*args: Any, **kwargs: Any) -> Any:
        return await to_the_end(tried(functools.partial(call, *args, **kwargs)))

    return whole


@_all_whole
class Catalogue:
    """Made by `opened`. Every call raises StoreUnreachable where the database does not answer.

    `owner` None means everybody's; another key's sessions and windows are not found.
    """

    def __init__(self, store: SQLite | PostgreSQL) -> None:
        """Its `set_aside` is the broken database that this one replaces."""
        self.set_aside = store.set_aside
        self._store, self._engine = store, store.connections
        self._writing = asyncio.Lock()  # in turn: a database's own waiters have no order
        self._reading = store.connections.execution_options(isolation_level="AUTOCOMMIT")
        # Changes that failed and may happen yet, and up to which of them that is over.
        self._doubts = self._settled = 0

    # ── sessions ────────────────────────────────────────────────────────────────────────────────

    async def add_session(
        self, session: Session, conversation: Mapping[str, Any] | None = None, most: int = 0
    ) -> None:
        """Raises StorageQuotaExceeded where its owner has `most` already; 0 is no limit."""
        values = {name: getattr(session, name) for name in _SESSION} | {
            "conversation": conversation
        }
        async with self._changing() as connection:
            if most:
                count = select(func.count()).select_from(sessions)
                count = count.where(sessions.c.owner == session.owner)
                if (await connection.execute(count)).scalar_one() >= most:
                    raise StorageQuotaExceeded(
                        f"Storage quota exceeded: this key has {most} sessions, and may have no "
                        "more.",
                        action="Delete sessions with 'hive session delete', or wait until idle "
                        "ones expire.",
                    )
            await connection.execute(insert(sessions).values(**values))

    async def session(self, session_id: str, owner: str | None) -> Session:
        """Raises SessionNotFound."""
        wanted = _one_session(select(*_SESSION.values(), _HAS_CONVERSATION), session_id, owner)
        async with self._looking() as connection:
            row = (await connection.execute(wanted)).mappings().first()
        if row is None:
            raise SessionNotFound(f"Session not found: {session_id}")
        return _session(row)

    async def conversation(self, session_id: str, owner: str | None) -> dict[str, Any] | None:
        """What the engine would be sent to go on with it; None before the first answer.

        Raises SessionNotFound.
        """
        wanted = _one_session(select(sessions.c.conversation), session_id, owner)
        async with self._looking() as connection:
            row = (await connection.execute(wanted)).first()
        if row is None:
            raise SessionNotFound(f"Session not found: {session_id}")
        return None if row.conversation is None else dict(row.conversation)

    async def sessions(
        self, owner: str | None, *, state: SessionState | None = None, most: int = MOST_PAGE
    ) -> list[Session]:
        """The last used first."""
        wanted = select(*_SESSION.values(), _HAS_CONVERSATION)
        wanted = wanted.order_by(sessions.c.used_at.desc(), sessions.c.id).limit(most)
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

    async def expire(self, unused_since: float, but: Collection[str] = ()) -> int:
        """Sessions that were not used since then go, `but` some: how many ACTIVE ones are EXPIRED now.

        Those that nobody can use any more are forgotten: expired as long ago again, thawed and never
        used, frozen into a window that was deleted.
        """
        is_idle = and_(sessions.c.used_at < unused_since, sessions.c.id.not_in(but))
        long_ago = unused_since - (time.time() - unused_since)
        useless = or_(
            and_(sessions.c.state == SessionState.EXPIRED, sessions.c.used_at < long_ago),
            sessions.c.state.in_((SessionState.THAWED, SessionState.DELETED)),
            and_(sessions.c.state == SessionState.FROZEN, sessions.c.window_id.is_(None)),
        )
        changed = update(sessions).where(is_idle, sessions.c.state == SessionState.ACTIVE)
        async with self._changing() as connection:
            await connection.execute(delete(sessions).where(is_idle, useless))
            return (await connection.execute(changed.values(state=SessionState.EXPIRED))).rowcount

    async def remove_session(self, session_id: str, old: SessionState) -> None:
        """It is not found any more, if it is still what it was.

        Raises InvalidStateTransition.
        """
        gone = delete(sessions).where(sessions.c.id == session_id, sessions.c.state == old)
        async with self._changing() as connection:
            if (await connection.execute(gone)).rowcount != 1:
                raise InvalidStateTransition(f"The session is not {old} any more.")

    # ── windows ─────────────────────────────────────────────────────────────────────────────────

    async def begin_window(self, window: Window, most: int = 0) -> None:
        """It is being frozen: its name is taken.

        Raises WindowAlreadyExists; StorageQuotaExceeded where its owner has `most` already, 0 is
        no limit.
        """
        self._must_keep(window)
        values = {**asdict(window), "state": WindowState.FREEZING, "tags": list(window.tags)}
        try:
            async with self._changing() as connection:
                if most:
                    count = select(func.count()).select_from(windows)
                    count = count.where(windows.c.owner == window.owner)
                    if (await connection.execute(count)).scalar_one() >= most:
                        raise StorageQuotaExceeded(
                            f"Storage quota exceeded: this key has {most} windows, and may have no "
                            "more."
                        )
                await connection.execute(insert(windows).values(**values))
        except IntegrityError as exc:
            raise WindowAlreadyExists(f"Window name already exists: {window.name}") from exc

    async def commit_window(
        self, window: Window, *, keep_active: bool = False, most_bytes: int = 0
    ) -> None:
        """It is frozen, and with it its session, in one step (R106).

        Raises StorageQuotaExceeded where its owner's windows would have more than `most_bytes`, 0
        is no limit. Raises InvalidStateTransition, and nothing has changed, where the session is another one
        by now.
        """
        values = {**asdict(window), "state": WindowState.FROZEN, "tags": list(window.tags)}
        async with self._changing() as connection:
            if most_bytes:
                others = select(func.coalesce(func.sum(windows.c.bytes), 0)).where(
                    windows.c.owner == window.owner, windows.c.id != window.id
                )
                size = int((await connection.execute(others)).scalar_one()) + window.bytes
                must_fit(size, most_bytes)
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
        self._must_keep(window)
        values = {**asdict(window), "state": WindowState.FROZEN, "tags": list(window.tags)}
        try:
            async with self._changing() as connection:
                await connection.execute(insert(windows).values(**values))
        except IntegrityError as exc:
            raise WindowAlreadyExists(f"Window name already exists: {window.name}") from exc

    async def named(
        self, name: str, owner: str | None, state: WindowState | None = WindowState.FROZEN
    ) -> list[Window]:
        """All of that name, one of an owner at most, in no order."""
        # An order would have SQLite read the index of that order, and whole.
        wanted = self._fitting(select(windows), owner=owner, name=name, state=state).limit(
            MOST_PAGE
        )
        async with self._looking() as connection:
            return [_window(row) for row in (await connection.execute(wanted)).mappings()]

    async def windows(
        self,
        owner: str | None,
        *,
        model: str | None = None,
        session_id: str | None = None,
        state: WindowState | None = WindowState.FROZEN,
        sort: Sort = "created_at",
        is_descending: bool = True,
        tag: str | None = None,
        begin: int = 0,
        most: int = MOST_PAGE,
    ) -> list[Window]:
        """A page of those that fit, in the order of `sort`."""
        column = windows.c[sort]
        key = self._store.in_order(column) if sort == "name" else column
        order = key.desc() if is_descending else key.asc()
        wanted = self._fitting(
            select(windows), owner=owner, model=model, session_id=session_id, state=state
        )
        if tag is not None:
            wanted = wanted.where(self._store.has_tag(tag) if self._store.keeps(tag) else false())
        wanted = wanted.order_by(order, windows.c.id).offset(begin).limit(most)
        async with self._looking() as connection:
            return [_window(row) for row in (await connection.execute(wanted)).mappings()]

    async def every_window(self, state: WindowState) -> AsyncIterator[Window]:
        """All in that state, in no order but their own, however many come and go meanwhile."""
        after = ""
        while page := await self.page_after(after, state):
            for window in page:
                yield window
            after = page[-1].id

    async def page_after(self, window_id: str, state: WindowState) -> list[Window]:
        """The next ones by their ids: none is passed over because others have gone."""
        key = self._store.in_order(windows.c.id)
        wanted = select(windows).where(windows.c.state == state, key > window_id)
        async with self._looking() as connection:
            found = await connection.execute(wanted.order_by(key).limit(MOST_PAGE))
            return [_window(row) for row in found.mappings()]

    async def window_by_id(self, window_id: str) -> Window | None:
        wanted = select(windows).where(windows.c.id == window_id)
        async with self._looking() as connection:
            row = (await connection.execute(wanted)).mappings().first()
        return _window(row) if row else None

    async def has_window(self, name: str, owner: str) -> bool:
        """Whether the name is taken, by a half-made window, too."""
        return bool(await self.named(name, owner, state=None))

    async def lineage(self, window: Window) -> tuple[list[str], list[str]]:
        """The names of what it was cloned from, the nearest first, and of what was cloned from it."""
        ancestors: list[str] = []
        async with self._looking() as connection:
            parent = window.parent_id
            while parent is not None and len(ancestors) < MOST_PAGE:
                wanted = select(windows.c.name, windows.c.parent_id).where(windows.c.id == parent)
                row = (await connection.execute(wanted)).first()
                if row is None:  # it was deleted
                    break
                ancestors.append(row.name)
                parent = row.parent_id
            of_it = select(windows.c.name).where(windows.c.parent_id == window.id)
            rows = await connection.execute(
                of_it.order_by(self._store.in_order(windows.c.name)).limit(MOST_PAGE)
            )
            return ancestors, [row.name for row in rows]

    async def usage(self, owner: str | None) -> tuple[int, int]:
        """How many windows there are, half-made ones too, and their bytes."""
        wanted = select(func.count(), func.coalesce(func.sum(windows.c.bytes), 0))
        if owner is not None:
            wanted = wanted.where(windows.c.owner == owner)
        async with self._looking() as connection:
            count, size = (await connection.execute(wanted)).one()
        return int(count), int(size)

    async def counts(self) -> dict[WindowState, int]:
        """How many windows there are in each state."""
        wanted = select(windows.c.state, func.count()).group_by(windows.c.state)
        async with self._looking() as connection:
            told = {row[0]: int(row[1]) for row in await connection.execute(wanted)}
        return {state: told.get(state, 0) for state in WindowState}

    async def note_bytes(self, window_id: str, size: int) -> None:
        """It was repaired, and its blocks may have another size."""
        changed = update(windows).where(windows.c.id == window_id).values(bytes=size)
        async with self._changing() as connection:
            await connection.execute(changed)

    async def note_receipt(self, window_id: str, receipt: Mapping[str, Any]) -> None:
        changed = update(windows).where(windows.c.id == window_id).values(receipt=dict(receipt))
        async with self._changing() as connection:
            await connection.execute(changed)

    async def note_proof(self, window_id: str, session_id: str, cached_tokens: int) -> None:
        """Beside what the last thaw, into that session, has promised: what the engine found."""
        async with self._changing() as connection:
            wanted = select(windows.c.receipt).where(windows.c.id == window_id)
            receipt = (await connection.execute(wanted)).scalar()
            if receipt and receipt.get("session_id") == session_id:
                proved = {**receipt, "cached_tokens": cached_tokens}
                changed = update(windows).where(windows.c.id == window_id)
                await connection.execute(changed.values(receipt=proved))

    async def begin_removal(self, window_id: str) -> None:
        """From now on it is not found; its files may go."""
        changed = update(windows).where(windows.c.id == window_id)
        async with self._changing() as connection:
            await connection.execute(changed.values(state=WindowState.DELETING))

    async def remove_window(self, window_id: str) -> None:
        """Its files are gone, or were never there. Removing it again does nothing."""
        async with self._changing() as connection:
            await connection.execute(delete(windows).where(windows.c.id == window_id))

    async def has_mark(self, name: str) -> bool:
        """Whether that was done once; a new database has no marks."""
        wanted = select(marks.c.name).where(marks.c.name == name)
        async with self._looking() as connection:
            return (await connection.execute(wanted)).first() is not None

    async def set_mark(self, name: str) -> None:
        """It is done. Setting it again does nothing."""
        async with self._changing() as connection:
            await connection.execute(delete(marks).where(marks.c.name == name))
            await connection.execute(insert(marks).values(name=name))

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[AsyncConnection]:
        with reached(self._store.is_locked):
            async with self._store.answering(), self._turn():
                try:
                    async with self._engine.begin() as connection:
                        await self._store.began(connection)
                        yield connection
                except (DBAPIError, OSError, asyncio.CancelledError) as exc:
                    is_told = isinstance(exc, DBAPIError) and self._store.is_told(exc)
                    self._doubts += not is_told
                    raise

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Of all that change something here: one at a time. Raises TimeoutError after BUSY_S."""
        async with asyncio.timeout(BUSY_S):
            await self._writing.acquire()
        try:
            yield
        finally:
            self._writing.release()

    @asynccontextmanager
    async def _looking(self) -> AsyncIterator[AsyncConnection]:
        if self._settled != (doubts := self._doubts):
            await self._store.settled()
            self._settled = doubts
        with reached(self._store.is_locked):
            async with self._store.answering(), self._reading.connect() as connection:
                yield connection

    def _must_keep(self, window: Window) -> None:
        """Raises InvalidParameter."""
        for name, texts in (("description", [window.description]), ("tags", window.tags)):
            if not all(map(self._store.keeps, texts)):
                raise InvalidParameter(
                    f"Invalid parameter: {name}. A NUL character cannot be part of it.", param=name
                )

    def _fitting(self, wanted: Select[Any], **asked: str | None) -> Select[Any]:
        for column, value in asked.items():
            if value is not None:
                fits = windows.c[column] == value if self._store.keeps(value) else false()
                wanted = wanted.where(fits)
        return wanted

    def __repr__(self) -> str:
        return f"<Catalogue {self._engine.url!r}>"


@asynccontextmanager
async def opened(directory: Path, url: str = "") -> AsyncIterator[Catalogue]:
    """The catalogue of the hive whose state is in `directory` (0700), made where there is none.

    Without `url` a file there; a broken one is set aside, and a new one is empty: windows are found
    again by their manifests. Raises ConfigInvalid for one that a newer or another hive has
    written, StoreUnreachable.
    """
    place = postgres.opened(directory, url) if url else sqlite.opened(directory)
    async with place as store:
        yield Catalogue(store)


def must_fit(size: int, most: int) -> None:
    """Bytes of one key's windows, and how many they may have. Raises StorageQuotaExceeded."""
    if size > most:
        raise StorageQuotaExceeded(
            f"Storage quota exceeded: this key's windows would have {size / GIB:.3f} GiB, and may "
            f"have {most / GIB:g}."
        )


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


def _one_session(wanted: Select[Any], session_id: str, owner: str | None) -> Select[Any]:
    wanted = wanted.where(sessions.c.id == session_id)
    return wanted if owner is None else wanted.where(sessions.c.owner == owner)


def _session(row: RowMapping) -> Session:
    return Session(**{**row, "state": SessionState(row["state"])})


def _window(row: RowMapping) -> Window:
    return Window(**{**row, "state": WindowState(row["state"]), "tags": tuple(row["tags"])})

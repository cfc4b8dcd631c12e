"""The catalogue in a PostgreSQL database of its own, with asyncpg.

One database is one hive's: windows are files on that hive's disk. The row in `keeper` says whose it
is; another hive is refused before it changes anything. The row is also what writers take in turn,
so that what is counted stays so until it is added to, and what an earlier life of the same hive has
still under way on a broken connection cannot be written any more.

A server that is slow, hung or gone costs a call LIMIT_S and a little; the next call asks anew.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit
from weakref import WeakSet

from sqlalchemy import ColumnElement, func, inspect, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from hive.errors import ConfigInvalid, StoreUnreachable
from hive.storage.tables import CONNECTIONS, upgraded, windows
from hive.storage.trying import BUSY_S, TURN_S, Locked, reached, tried

log = logging.getLogger(__name__)

FILE = "catalogue.id"  # in the state directory: which hive this is
LIMIT_S = BUSY_S  # for a call to be answered, the wait for its turn and its connection included
UPGRADE_S = 120.0  # for the tables to be brought up to date
CLOSE_S = 3.0
# serialization_failure, deadlock_detected, lock_not_available
_LOCKED = frozenset({"40001", "40P01", "55P03"})
_TURN = 0x68697665  # "hive": the advisory lock of whoever makes the tables
_SESSION = {
    "application_name": "hive",
    "synchronous_commit": "on",  # what was said to be frozen is so after a power cut, too
    "lock_timeout": str(int(TURN_S * 1000)),
    "statement_timeout": str(int(LIMIT_S * 1000)),
    # Of a host that has lost its power, nobody tells the server that its transaction has ended.
    "idle_in_transaction_session_timeout": str(int(LIMIT_S * 1000)),
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
# What hive says in its database before its tables are looked at, and outside of their migrations:
# nothing of another hive's is changed.
_KEEPER = """
CREATE TABLE IF NOT EXISTS keeper (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    id varchar(32) NOT NULL,
    life varchar(32) NOT NULL,
    place text NOT NULL
)
"""


class PostgreSQL:
    """What a catalogue in PostgreSQL has of its own."""

    set_aside: Path | None = None  # PostgreSQL looks after its files itself

    def __init__(self, engine: AsyncEngine, life: str) -> None:
        self.connections, self._life = engine, life

    def has_tag(self, tag: str) -> ColumnElement[bool]:
        each = func.json_array_elements_text(windows.c.tags).table_valued("value")
        return select(each.c.value).where(each.c.value == tag).exists()

    def in_order(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        """By its bytes, whatever the database's collation is."""
        return column.collate("C")

    def keeps(self, text: str) -> bool:
        """Whether it can be a column's value."""
        return "\0" not in text

    @staticmethod
    def is_locked(exc: DBAPIError) -> bool:
        return getattr(exc.orig, "sqlstate", None) in _LOCKED

    @staticmethod
    def is_told(exc: DBAPIError) -> bool:
        """Whether the server itself has refused: nothing of the change can happen any more."""
        return getattr(exc.orig, "sqlstate", None) is not None and not exc.connection_invalidated

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Raises TimeoutError after LIMIT_S; the connection is given up then."""
        async with asyncio.timeout(LIMIT_S):
            yield

    async def began(self, connection: AsyncConnection) -> None:
        """First of every change: everybody else waits until it is over.

        Raises StoreUnreachable where another hive has taken the database meanwhile.
        """
        life = await connection.scalar(text("SELECT life FROM keeper FOR UPDATE"))
        if life != self._life:
            raise StoreUnreachable(
                "Another hive, or a later start of this one, has taken the catalogue's database.",
                action="End one of them: each hive needs a state_dir and a database of its own.",
            )

    async def settled(self) -> None:
        """Return when no change is under way that this hive gave up waiting for.

        A server that hung may yet read its COMMIT: who looked before that would see what is over.
        """
        with reached(self.is_locked):
            async with self.answering(), self.connections.begin() as connection:
                await self.began(connection)


@asynccontextmanager
async def opened(directory: Path, url: str) -> AsyncIterator[PostgreSQL]:
    """The database of that URL, its tables made where there are none, and brought up to date.

    Raises ConfigInvalid where it is another hive's or a newer hive has written it,
    StoreUnreachable.
    """
    own, life = await asyncio.to_thread(_own_id, directory), secrets.token_hex(16)

    async def begin() -> None:
        with reached(PostgreSQL.is_locked):
            async with asyncio.timeout(UPGRADE_S), engine.begin() as connection:
                await _taken(connection, own, life, directory)
            async with contextlib.AsyncExitStack() as all_of_them:
                for _ in range(CONNECTIONS):  # hive's descriptors are the same from here on
                    await all_of_them.enter_async_context(engine.connect())

    async with _engine(url) as engine:
        with _explained(url):
            await tried(begin)
        yield PostgreSQL(engine, life)


async def look(directory: Path, url: str) -> str:
    """What the server says it is; nothing is changed there.

    Raises ConfigInvalid where the database is another hive's, StoreUnreachable.
    """
    with _explained(url), reached(PostgreSQL.is_locked):
        async with (
            _engine(url) as engine,
            asyncio.timeout(LIMIT_S),
            engine.connect() as connection,
        ):
            version = await connection.scalar(text("SHOW server_version"))
            if await connection.run_sync(lambda it: inspect(it).has_table("keeper")):
                row = (await connection.execute(text("SELECT id, place FROM keeper"))).first()
                if row is not None and row.id != await asyncio.to_thread(_known_id, directory):
                    raise _others(row.place, row.id, directory)
    return f"PostgreSQL {version} at {shown(url)}"


def shown(url: str) -> str:
    """Without a password, and without options but where: another one may be a password, too."""
    parts = urlsplit(url)
    user, has_user, host = parts.netloc.rpartition("@")
    where = [(name, value) for name, value in parse_qsl(parts.query) if name in ("host", "port")]
    netloc = f"{user.partition(':')[0]}{has_user}{host}"
    query = f"?{urlencode(where, safe='/')}" if where else ""
    return f"postgresql://{netloc}{parts.path}{query}"


@asynccontextmanager
async def _engine(url: str) -> AsyncIterator[AsyncEngine]:
    """Its end waits CLOSE_S at most for a server that does not answer."""
    made: WeakSet[Any] = WeakSet()
    engine = create_async_engine(
        "postgresql+asyncpg://",  # the URL itself is nobody's to print
        async_creator=partial(_connected, url, made),
        pool_size=CONNECTIONS,
        max_overflow=0,
        pool_timeout=LIMIT_S,
        pool_pre_ping=True,  # one that broke while it was not used is replaced, and nobody told
        hide_parameters=True,  # what was said, and salts, are in no error's text
    )
    try:
        yield engine
    finally:
        # The pool would wait without a limit, and not close what it cannot wait for.
        closing = [one.close(timeout=CLOSE_S) for one in made if not one.is_closed()]
        await asyncio.gather(*closing, return_exceptions=True)
        await engine.dispose()


async def _connected(url: str, made: WeakSet[Any]) -> Any:
    """Raises ConnectionError that says why, whatever it is."""
    import asyncpg  # noqa: PLC0415 (an extra: hive runs without it)

    dsn = "postgresql://" + url.partition("://")[2]
    try:
        connection = await asyncpg.connect(
            dsn, timeout=LIMIT_S, command_timeout=UPGRADE_S, server_settings=_SESSION
        )
    except TimeoutError as exc:
        raise ConnectionError(f"it does not answer within {LIMIT_S:g} s") from exc
    except OSError as exc:
        raise ConnectionError(str(exc.strerror or exc)) from exc
    except asyncpg.InvalidAuthorizationSpecificationError as exc:  # a wrong password is one, too
        raise PermissionError(str(exc)) from exc
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
        raise ConnectionError(str(exc)) from exc
    except ValueError as exc:  # its text may repeat a part of the URL
        raise ConnectionError("the URL cannot be read") from exc
    made.add(connection)
    return connection


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """At the start the reason is told, to whoever reads the log."""
    try:
        yield
    except StoreUnreachable as exc:
        cause = exc.__cause__
        why = getattr(cause, "orig", None) or cause
        if why is None or isinstance(cause, Locked):
            raise
        if isinstance(why, TimeoutError):
            why = "it does not answer"
        raise type(exc)(
            f"The catalogue's database {shown(url)} cannot be used: {_reason(why)}.",
            action="Correct windows.catalogue_url, or see that the server runs and that its user "
            "may connect and make tables there.",
        ) from exc


def _reason(why: object) -> str:
    """PostgreSQL's own words, less the name of the class that SQLAlchemy puts before them."""
    return str(why).rpartition(">: ")[2].strip().rstrip(".")


async def _taken(connection: AsyncConnection, own: str, life: str, directory: Path) -> None:
    """Make the database this hive's, in one transaction."""
    await connection.execute(text("SELECT pg_advisory_xact_lock(:turn)"), {"turn": _TURN})
    await connection.execute(text(_KEEPER))
    place = f"{socket.gethostname()}:{directory}"
    values = {"id": own, "life": life, "place": place}
    await connection.execute(
        text(
            "INSERT INTO keeper (id, life, place) VALUES (:id, :life, :place)"
            " ON CONFLICT DO NOTHING"
        ),
        values,
    )
    row = (await connection.execute(text("SELECT id, place FROM keeper FOR UPDATE"))).one()
    if row.id != own:
        raise _others(row.place, row.id, directory)
    await connection.execute(text("UPDATE keeper SET life = :life, place = :place"), values)
    await connection.execute(text(f"SET LOCAL statement_timeout = {int(UPGRADE_S * 1000)}"))
    await connection.run_sync(upgraded)


def _others(place: str, known: str, directory: Path) -> ConfigInvalid:
    return ConfigInvalid(
        f"windows.catalogue_url: the database belongs to another hive ({place}): its windows are "
        "on that hive's disk.",
        action="Give each hive a database of its own. If this is that hive, and it lost its "
        f"state_dir, write {known} into {directory / FILE}.",
    )


def _known_id(directory: Path) -> str:
    """Empty: this hive had no PostgreSQL yet."""
    with contextlib.suppress(FileNotFoundError):
        return (directory / FILE).read_text().strip()
    return ""


def _own_id(directory: Path) -> str:
    """Of the hive whose state is in that directory; made where there is none, and on disk then."""
    if known := _known_id(directory):
        return known
    made, part = secrets.token_hex(16), directory / f"{FILE}.part"
    part.unlink(missing_ok=True)
    fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        file.write(f"{made}\n")
        file.flush()
        os.fsync(fd)
    part.rename(directory / FILE)
    above = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(above)
    finally:
        os.close(above)
    return made

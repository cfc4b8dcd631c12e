"""What is to be sent to the alerts' webhook, in a file of SQLite that outlives hive (R235, R249).

Plain `sqlite3`: a hive without windows does without the catalogue's library, not without this.
Everything blocks, and may hang as long as the disk does.
"""

import contextlib
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from hive.storage.damage import set_aside, what_is_broken

FILE = "outbox.db"
VERSION = 1
BUSY_S = 1.0  # for another program that has the file open
KEPT = 100  # messages that are done, for whoever asks what became of them
_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",  # what counts as queued is so after a power cut, too
    f"busy_timeout={int(BUSY_S * 1000)}",
)
# `open` is what the webhook was told of and was not told to be over. Times are seconds since 1970.
_TABLES = """
CREATE TABLE messages (
    delivery TEXT PRIMARY KEY,
    number INTEGER NOT NULL,
    state TEXT NOT NULL,
    rule TEXT NOT NULL,
    subject TEXT NOT NULL,
    level TEXT NOT NULL,
    is_resolved INTEGER NOT NULL,
    body TEXT NOT NULL,
    queued_at REAL NOT NULL,
    attempts INTEGER NOT NULL,
    tried_at REAL,
    last_error TEXT NOT NULL
) STRICT;
CREATE INDEX messages_in_order ON messages (state, number);
CREATE TABLE open (key TEXT PRIMARY KEY, alert TEXT NOT NULL) STRICT;
"""


class Progress(StrEnum):
    """What became of a message."""

    WAITING = "waiting"
    SENT = "sent"
    DROPPED = "dropped"


@dataclass(slots=True)
class Message:
    """One message to the webhook; its body never changes, however often it is tried."""

    delivery: str  # its id, that the webhook is told
    number: int  # messages go in this order
    rule: str
    subject: str
    level: str
    is_resolved: bool
    body: str
    queued_at: float
    state: Progress = Progress.WAITING
    attempts: int = 0
    tried_at: float | None = None
    last_error: str = ""


_COLUMNS = tuple(Message.__slots__)
_PUT = (
    f"INSERT INTO messages ({', '.join(_COLUMNS)}) "  # noqa: S608 (names of this file)
    f"VALUES ({', '.join(f':{name}' for name in _COLUMNS)}) ON CONFLICT (delivery) DO UPDATE SET "
    "state = excluded.state, attempts = excluded.attempts, tried_at = excluded.tried_at, "
    "last_error = excluded.last_error"
)
_GET = f"SELECT {', '.join(_COLUMNS)} FROM messages WHERE state "  # noqa: S608


@dataclass(frozen=True, slots=True)
class Kept:
    """What an earlier life has left: messages in order, and what is open by its key.

    `set_aside` says why a file was, and under which name; empty where none was.
    """

    waiting: list[Message]
    open: dict[str, str]
    set_aside: str = ""


class OutboxFile:
    """The file in `directory`. Calls are made one after the other, from whatever thread.

    All of them raise sqlite3.Error and OSError where the disk does not do it; then nothing of the
    call has happened, and the next one begins anew.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        self._connection: sqlite3.Connection | None = None

    def read(self) -> Kept:
        """Open it, made where there is none (0600); a broken one is set aside and kept."""
        self.close()
        aside = ""
        if why := what_is_broken(self.path, BUSY_S) or self._is_newer():
            aside = f"{why}: it is {set_aside(self.path).name} now"
        with self._changing() as connection:
            waiting = [
                _message(row) for row in connection.execute(f"{_GET} = 'waiting' ORDER BY number")
            ]
            known = dict(connection.execute("SELECT key, alert FROM open"))
        return Kept(waiting, known, aside)

    def write(
        self, messages: Collection[Message], opened: Mapping[str, str], closed: Collection[str]
    ) -> None:
        """All of it or nothing, and on disk afterwards."""
        with self._changing() as connection:
            connection.executemany(_PUT, map(asdict, messages))
            connection.executemany("INSERT OR REPLACE INTO open VALUES (?, ?)", opened.items())
            connection.executemany("DELETE FROM open WHERE key = ?", [(key,) for key in closed])
            connection.execute(
                "DELETE FROM messages WHERE state <> 'waiting' AND number NOT IN (SELECT number FROM"
                " messages WHERE state <> 'waiting' ORDER BY number DESC LIMIT ?)",
                (KEPT,),
            )

    def done(self, most: int) -> list[Message]:
        """The last messages that were sent or dropped, the newest first."""
        with self._changing() as connection:
            rows = connection.execute(f"{_GET} <> 'waiting' ORDER BY number DESC LIMIT ?", (most,))
            return [_message(row) for row in rows]

    def put_aside(self) -> str:
        """Begin anew: what was read of it cannot be. Its new name."""
        self.close()
        return set_aside(self.path).name

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        connection = self._connection or self._opened()
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            # A transaction that cannot be ended ends with its connection.
            self.close()
            raise

    def _opened(self) -> sqlite3.Connection:
        fd = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o600)  # whoever looked whether it is damaged may have made it, empty
        os.close(fd)
        connection = sqlite3.connect(
            self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            for pragma in _PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            if not _version(connection):
                connection.executescript(
                    f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version={VERSION}; COMMIT;"
                )
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _is_newer(self) -> str:
        """Why it cannot be used: a later hive has written it. Empty: it can, or there is none."""
        if not self.path.exists():
            return ""
        with contextlib.closing(sqlite3.connect(self.path, timeout=BUSY_S)) as connection:
            found = _version(connection)
        return f"a newer hive has written it (version {found})" if found > VERSION else ""

    def __repr__(self) -> str:
        return f"<OutboxFile {'open' if self._connection else 'closed'}>"


def _version(connection: sqlite3.Connection) -> int:
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    return int(found)


def _message(row: tuple[object, ...]) -> Message:
    message = Message(*row)  # type: ignore[arg-type]  # the columns are STRICT
    message.state, message.is_resolved = Progress(message.state), bool(message.is_resolved)
    return message

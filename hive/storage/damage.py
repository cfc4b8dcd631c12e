"""A file of SQLite that is broken: what is wrong with it, and how it is set aside and kept.

Everything blocks.
"""

import contextlib
import sqlite3
import time
from pathlib import Path

COMPANIONS = ("-wal", "-shm")
# Of SQLite's own words: the file is broken, and not only busy or out of reach.
_BROKEN = ("malformed", "not a database", "disk image", "corrupt")


def what_is_broken(file: Path, busy_s: float) -> str:
    """What SQLite finds wrong with the file; empty: nothing, or there is none.

    Waits `busy_s` seconds for other programs. Raises sqlite3.OperationalError where it cannot look.
    """
    if not file.exists():
        return ""
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=busy_s)) as connection:
            (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as exc:
        if not is_broken(exc):
            raise
        return str(exc)
    except sqlite3.DatabaseError as exc:
        return str(exc)
    return "" if said == "ok" else str(said)


def is_broken(exc: Exception) -> bool:
    """Whether SQLite says that the file is, and not only that it cannot be had."""
    return any(word in str(exc) for word in _BROKEN)


def set_aside(file: Path) -> Path:
    """Its new name; what belongs to it goes with it."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    number = 0
    while (aside := file.with_name(f"{file.name}.damaged-{stamp}-{number}")).exists():
        number += 1
    file.rename(aside)
    for companion in COMPANIONS:
        with contextlib.suppress(FileNotFoundError):
            file.with_name(file.name + companion).rename(aside.with_name(aside.name + companion))
    return aside

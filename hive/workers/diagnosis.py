"""What an engine said before it ended: the end of its log, bounded."""

import os
from collections.abc import Iterator
from pathlib import Path

from hive.workers.guard import HEADER

TAIL_BYTES = 16 * 1024
TAIL_LINES = 5
LINE_CHARS = 300


def read_tail(path: Path, most_bytes: int = TAIL_BYTES) -> bytes:
    """The last `most_bytes` of a file, from the beginning of a line; empty if unreadable."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - most_bytes))
            text = file.read(most_bytes)
    except OSError:
        return b""
    return text.partition(b"\n")[2] if size > most_bytes else text


def last_words(path: Path) -> list[str]:
    """The last lines that the newest start wrote, without traceback frames and blank lines."""
    text = read_tail(path).decode(errors="replace")
    newest = text.rpartition(HEADER)[2]
    lines = newest.splitlines()
    if HEADER in text:
        lines = lines[1:]
    said = [line.strip()[:LINE_CHARS] for line in lines if line.strip() and not line[:1].isspace()]
    return said[-TAIL_LINES:]


def log_files(path: Path) -> Iterator[Path]:
    """A worker's log files that exist, oldest first."""
    older = sorted(path.parent.glob(path.name + ".[0-9]*"), key=lambda p: -int(p.suffix[1:]))
    yield from (p for p in (*older, path) if p.exists())

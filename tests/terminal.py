"""Programs on a terminal, and what it showed."""

import contextlib
import os
import pty
import subprocess

from steps import leaks
from steps.driver import HIVE, ROOT


def shown_to(ours: int) -> bytes:
    """All that was written to the other side, until its last user has gone: it comes in pieces."""
    shown = b""
    with contextlib.suppress(OSError):  # EIO
        while part := os.read(ours, 65536):
            shown += part
    return shown


def on_a_terminal(*command: str, typed: str = "") -> tuple[int, str, str]:
    """A command of hive's: its status, what the terminal showed, and standard output, which is none."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [*HIVE, *command],
            stdin=theirs,
            stderr=theirs,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        leaks.started_pids.add(process.pid)
        os.close(theirs)
        os.write(ours, typed.encode())
        shown = shown_to(ours)
        out, _ = process.communicate(timeout=30)
    finally:
        os.close(ours)
    return process.returncode, shown.decode(), out

"""Standard output and error of this process: when one of them fails, that is no internal error."""

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDOUT, STDERR = 1, 2


class ReaderLeft(Exception):
    """Nobody reads our output any more. Not an OSError: click would end the program with 1."""


class OutputLost(Exception):
    """Our output cannot be written, on a full disk, say. Not an OSError, to be told from others."""


class _Output(io.FileIO):
    def write(self, text: "ReadableBuffer", /) -> int:
        try:
            return super().write(text)
        except BrokenPipeError as exc:
            raise ReaderLeft from exc
        except OSError as exc:
            raise OutputLost(exc.strerror) from exc


class _Complaints(io.FileIO):
    def write(self, text: "ReadableBuffer", /) -> int:
        with contextlib.suppress(OSError):  # there is nobody left to tell
            return super().write(text)
        return memoryview(text).nbytes


def take_over() -> None:
    """Put them in place of Python's, whatever this process was given."""
    for fd in (0, STDOUT, STDERR):
        try:
            os.fstat(fd)
        except OSError:  # closed: the next file that is opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _text(_Output(STDOUT, "wb", closefd=False))
    sys.stderr = _text(_Complaints(STDERR, "wb", closefd=False), line_buffering=True)


def _text(raw: io.FileIO, *, line_buffering: bool = False) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(sys.__stdout__, "encoding", None),
        errors="backslashreplace",
        line_buffering=line_buffering or raw.isatty(),
    )

"""What an engine said before it ended: the end of its log, and the fault that it tells.

A fault is told by structure, never by words alone. It is the exception line of a traceback, at
the beginning of the line once the engine's log prefix is off, of a known class, with a message
of a known shape (messages.py); or what C++ code prints, where it really prints it. The same
words in a prompt, a warning, a quotation or a source line are none (docs/engines.md, "What a
failure says").
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from hive.policy.visible import visible
from hive.settings import open_regular
from hive.workers.guard import HEADER
from hive.workers.messages import (
    Cause,
    Diagnosis,
    is_exception,
    of_exception,
    of_nccl,
    of_thrown,
)

__all__ = [
    "Cause",
    "Diagnosis",
    "classify",
    "diagnose",
    "last_words",
    "log_files",
    "open_log",
    "read_tail",
]

TAIL_BYTES = 16 * 1024
TAIL_LINES = 5
LINE_CHARS = 300
# The end of a log in which a fault is looked for: after the root cause vLLM writes 2 KB for each
# request that it had in flight.
SEARCH_BYTES = 1024 * 1024
SEARCH_LINES = 20_000
START_CHARS = 100
SHAPE_CHARS = 4096  # of a line, what is looked at; torch's longest message has about 900
SURVIVED_S = 900.0  # an engine that writes so long after a fault did not end of it
WORKING_S = 5.0  # between two reports of generated tokens; the first may count older ones
NCCL_LINES = 5  # after NCCL's exception, within which it names the CUDA error


def open_log(path: Path) -> BinaryIO:
    """A log, for reading. Raises OSError, also for what an engine may have put in its place: a
    pipe that nobody writes to, or a link to a file that only hive may read."""
    return open_regular(path, os.O_NOFOLLOW)


def read_tail(path: Path, most_bytes: int = TAIL_BYTES) -> bytes:
    """The last `most_bytes` of a file, from the beginning of a line; empty if unreadable."""
    try:
        with open_log(path) as file:
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
    said = [_plain(line).strip() for line in lines if not line[:1].isspace()]
    return [line[:LINE_CHARS] for line in said if line][-TAIL_LINES:]


def log_files(path: Path) -> Iterator[Path]:
    """A worker's log files that exist, oldest first."""
    rotated = (
        p for p in path.parent.glob(path.name + ".*") if re.fullmatch(r"\.\d{1,4}", p.suffix)
    )
    older = sorted(rotated, key=lambda p: -int(p.suffix[1:]))
    yield from (p for p in (*older, path) if p.exists())


def diagnose(log: Path) -> Diagnosis | None:
    """The fault that the newest start in a log ended of, if its output tells one."""
    # Not splitlines(): it also splits at characters that a prompt may contain.
    lines = read_tail(log, SEARCH_BYTES).decode(errors="replace").split("\n")[-SEARCH_LINES:]
    starts = [number for number, line in enumerate(lines) if _START.search(line[-START_CHARS:])]
    return classify(lines[starts[-1] + 1 if starts else 0 :])


def classify(lines: Iterable[str]) -> Diagnosis | None:
    """The fault that ended an engine, from the lines that it wrote; None if they tell none.

    Of several faults it is the first: what follows are its consequences in other processes. But
    a broken device explains a broken program, and not the other way round. A fault counts no
    more once the engine was seen to work on: it generated tokens, wrote SURVIVED_S later, or
    said itself that only one call had failed.
    """
    reading = _Reading()
    for line in lines:
        reading.read(line)
    return reading.found


# At the end of a line: the engine before may have ended in the middle of one.
_START = re.compile(re.escape(HEADER) + r"[\d:T+-]{20,30} pid \d{1,10}$")
_COLOUR = re.compile(r"\x1b\[[0-9;]{0,16}m")


def _plain(line: str) -> str:
    """A line without its colours, and with what else is not to be seen made visible."""
    return visible(_COLOUR.sub("", line))


# (EngineCore pid=7) ERROR 11-21 12:00:00 [core.py:842] …, and as older versions of vLLM wrote it:
# (VllmWorker rank=0 pid=7) ERROR 07-24 08:26:01 multiproc_worker_utils.py:226] …
_WHO = re.compile(
    r"\((?P<who>[A-Za-z]\w{0,63}(?: rank=\d{1,6})? pid=\d{1,10}(?:, ip=[\w.:]+)?)\) ?"
)
_RECORD = re.compile(
    r"(?P<head>(?P<level>[A-Z]{4,8}) (?P<moment>\d\d-\d\d \d\d:\d\d:\d\d) "
    r"\[?[\w./\\-]{1,300}:\d{1,7}\]) ?"
)
_RANK = re.compile(r"\[rank\d{1,6}\]: ?")
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)
# What precedes a traceback that its process survives.
_SURVIVED = re.compile(
    r"Exception ignored in[: ]|ERROR:    Exception in ASGI application"
    r"|Unexpected error pre-processing request "
)
_CALL_FAILED = re.compile(r"Invocation of \w{1,100} method failed$")
_WORKING = re.compile(
    r"(?:Engine \d{1,6}: )?Avg prompt throughput: (?P<prompt>\d+\.\d) tokens/s, "
    r"Avg generation throughput: (?P<generation>\d+\.\d) tokens/s"
)
_TERMINATED = "terminate called after throwing an instance of '"
_WHAT = "  what():  "
_GLOG = re.compile(r"\[E[\d :.]{0,40} ?ProcessGroupNCCL\.cpp:\d{1,6}\] ?")
_WATCHDOG = re.compile(
    r"\[[^\]]{1,200}\] (?:Process group|NCCL) watchdog thread terminated with exception: "
)
_ALLOCATOR = re.compile(r"CUDA Error: out of memory at \S{0,300}cumem_allocator\.cpp:\d{1,6}$")
_GGML = re.compile(r"  current device: -?\d{1,6}, in function ")
_NCCL = re.compile(
    r"torch\.distributed\.DistBackendError: NCCL error in: .{1,400}unhandled cuda error"
)
_YEAR_S = 365 * 86400.0


@dataclass(slots=True)
class _Stream:
    """What one process writes: through its logger, or past it."""

    record: str = ""  # the prefix of its newest log record
    previous: str = ""  # its newest line that is not blank
    survived: bool = False  # whether the traceback at hand is one that the engine lived through
    in_traceback: bool = False
    terminating: bool = False
    nccl: int = 0  # lines left in which NCCL may name its CUDA error


class _Reading:
    """Reads an engine's lines in their order and remembers what it ended of, so far."""

    def __init__(self) -> None:
        self.found: Diagnosis | None = None
        self._streams: dict[tuple[str, bool], _Stream] = {}
        self._moment = ""
        self._now: float | None = None
        self._found_at: float | None = None
        self._worked_at: float | None = None

    def read(self, line: str) -> None:
        text = _plain(line[:SHAPE_CHARS].rstrip("\r\n"))
        who = ""
        for _ in range(2):  # Ray puts a prefix of its own before vLLM's
            if named := _WHO.match(text):
                who, text = who + named["who"], text[named.end() :]
        if record := _RECORD.match(text):
            self._pass_time(record["moment"])
            self._read_record(who, record, text[record.end() :])
        else:
            text = text[ranked.end() :] if (ranked := _RANK.match(text)) else text
            self._read_plain(self._stream(who, logged=False), text)

    def _read_record(self, who: str, record: re.Match[str], text: str) -> None:
        if record["level"] not in ("ERROR", "CRITICAL"):
            if record["level"] == "INFO" and (working := _WORKING.match(text)):
                self._work(float(working["prompt"]) + float(working["generation"]))
            return
        stream = self._stream(who, logged=True)
        if record["head"] != stream.record:
            stream.record, stream.in_traceback, stream.nccl = record["head"], False, 0
            failed_call = _CALL_FAILED.match(text)
            # The API server touches no device, and what it logs may quote its clients.
            stream.survived = bool(
                failed_call or _SURVIVED.match(text) or who.lower().startswith("apiserver")
            )
            if failed_call:
                self._forget()
        self._note(self._of_traceback(stream, text), self._now)

    def _read_plain(self, stream: _Stream, text: str) -> None:
        if text.endswith(_TRACEBACK) and stream.previous not in _CHAINED:
            stream.survived = _SURVIVED.match(stream.previous) is not None
        # When this was written is not known before the next log record.
        self._note(self._of_traceback(stream, text) or self._of_native(stream, text), None)
        stream.previous = text if text.strip() else stream.previous

    def _of_traceback(self, stream: _Stream, text: str) -> Diagnosis | None:
        """The exception at the end of a traceback; frames are indented, its class is not."""
        if text.endswith(_TRACEBACK):
            stream.in_traceback = True
            return None
        if stream.in_traceback:
            if not is_exception(text):
                return None
            stream.in_traceback = False
            if stream.survived:
                return None
            stream.nccl = NCCL_LINES if _NCCL.match(text) else 0
            return of_exception(text)
        stream.nccl -= stream.nccl > 0
        return of_nccl(text) if stream.nccl else None

    def _of_native(self, stream: _Stream, text: str) -> Diagnosis | None:
        """What C++ code says on its way out, without a traceback."""
        if text.startswith(_TERMINATED):
            stream.terminating = True
        elif stream.terminating and text.startswith(_WHAT):
            stream.terminating = False
            said = text.removeprefix(_WHAT)
            watchdog = _WATCHDOG.match(said)
            return of_thrown(said[watchdog.end() :] if watchdog else said, said)
        elif glog := _GLOG.match(text):
            said = text[glog.end() :]
            watchdog = _WATCHDOG.match(said)
            return of_thrown(said[watchdog.end() :], said) if watchdog else None
        elif _ALLOCATOR.match(text):
            return of_thrown(text, text)
        elif _GGML.match(text):  # llama.cpp: this line follows the one with the error
            return of_thrown(stream.previous, stream.previous)
        return None

    def _note(self, fault: Diagnosis | None, at: float | None) -> None:
        if fault is None:
            return
        if self.found is None:
            self.found, self._found_at, self._worked_at = fault, at, None
        elif (self.found.cause, fault.cause) == (Cause.APPLICATION_FAULT, Cause.DEVICE_FAULT):
            self.found = fault

    def _forget(self) -> None:
        self.found = self._found_at = self._worked_at = None

    def _work(self, tokens_per_s: float) -> None:
        """The engine reports generated tokens; the first report may be of those before."""
        if self.found is None or not tokens_per_s or self._now is None:
            return
        if self._worked_at is None:
            self._worked_at = self._now
        elif _between(self._worked_at, self._now) >= WORKING_S:
            self._forget()

    def _pass_time(self, moment: str) -> None:
        if moment == self._moment and (self.found is None or self._found_at is not None):
            return
        self._moment = moment
        try:
            # A year without 29 February: a day too short is on the safe side.
            read = datetime.strptime(f"2001-{moment} +0000", "%Y-%m-%d %H:%M:%S %z")
        except ValueError:
            return
        self._now = read.timestamp()
        if self.found is not None:
            self._found_at = self._now if self._found_at is None else self._found_at
            if _between(self._found_at, self._now) > SURVIVED_S:
                self._forget()

    def _stream(self, who: str, *, logged: bool) -> _Stream:
        return self._streams.setdefault((who, logged), _Stream())


def _between(then: float, now: float) -> float:
    """Seconds from one moment to a later one, of which the log does not tell the year."""
    return now - then + (_YEAR_S if now - then < -_YEAR_S / 2 else 0.0)

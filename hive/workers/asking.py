"""Ask a program for an answer, and leave nothing of it behind, whichever way that ends."""

import contextlib
import os
import secrets
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from hive.workers import guard
from hive.workers.process import adopted

LOOK_S = 0.05
ANSWER_BYTES = 2**20  # of what it writes, the end counts
ROUNDS = 100  # of killing; each finds what was started since


class Answer(NamedTuple):
    """Exit status and the end of what it wrote on its standard output and error."""

    status: int
    said: str
    complaint: str


def ask(
    command: Sequence[str],
    within_s: float,
    stop: threading.Event,
    env: Mapping[str, str] | None = None,
) -> Answer:
    """Run a program, with little of hive's environment and what `env` adds to it, to its end.

    Raises OSError when it cannot be started, TimeoutError after `within_s` and when `stop` is set.
    Whatever ends the wait, ends the program: it has a thread of its own, where no signal's
    exception can come between its start and its end.
    """
    left = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        try:
            return threads.submit(_ask, command, within_s, (stop, left), env or {}).result()
        finally:
            left.set()


def _ask(
    command: Sequence[str],
    within_s: float,
    stops: tuple[threading.Event, threading.Event],
    env: Mapping[str, str],
) -> Answer:
    """It writes into files, not pipes: a child that it leaves behind would hold a pipe open."""
    stop, left = stops
    with (
        tempfile.TemporaryFile() as said,
        tempfile.TemporaryFile() as complaint,
        _ended_wholly() as mark,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=complaint,
            env={**env, **_environment(mark)},
            start_new_session=True,
        ) as process,
        _group_killed(process.pid),
    ):
        until = time.monotonic() + within_s
        while process.poll() is None:
            if left.wait(LOOK_S) or stop.is_set() or time.monotonic() > until:
                raise TimeoutError(f"{command[0]} has not answered")
        return Answer(process.returncode, _end_of(said.fileno()), _end_of(complaint.fileno()))


@contextmanager
def _group_killed(leader: int) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


@contextmanager
def _ended_wholly() -> Iterator[str]:
    """A mark for the environment; whoever bears it, in another session, too, ends with the block."""
    mark = f"ask-{secrets.token_hex(8)}"
    try:
        yield mark
    finally:
        killed: set[int] = set()
        for _ in range(ROUNDS):
            alive = [one for one in adopted(mark, set()) if one.state != "Z"]
            for one in alive:
                guard.send_signal(one, signal.SIGKILL)
            killed |= {one.pid for one in alive}
            if not alive:
                break
            time.sleep(LOOK_S / 10)
        for pid in killed:  # orphans of a subreaper are its to reap
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _environment(mark: str) -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", ""),
        "HOME": os.environ.get("HOME", "/"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HIVE_MARK": mark,
    }


def _end_of(fd: int) -> str:
    size = os.fstat(fd).st_size
    return os.pread(fd, ANSWER_BYTES, max(0, size - ANSWER_BYTES)).decode(errors="replace")

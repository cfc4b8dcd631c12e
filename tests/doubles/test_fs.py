"""The disk that fails: each rule does what it says, to the process that was started with it alone."""

import errno
import os
import socket
import subprocess
import sys
import threading
from ast import literal_eval
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steps.waiting import must
from tests.doubles.fs import EVERYTHING, HANGS_S, Faults, Rule
from tests.patience import short_directory

# Answers each line with what an expression comes to, or with the number of its error.
CALLER = """
import os, socket, sqlite3, subprocess, sys, threading, time
def write(path, bytes):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try: return os.write(fd, bytes)
    finally: os.close(fd)
def read(path):
    fd = os.open(path, os.O_RDONLY)
    try: return os.read(fd, 100)
    finally: os.close(fd)
def at(path, call, *more):
    fd = os.open(path, os.O_RDWR)
    try: return call(fd, *more)
    finally: os.close(fd)
def many(call, times):
    done = []
    for _ in range(times):
        try: done.append(call() and 0 or 0)
        except OSError as exc: done.append(exc.errno)
    return done
for line in sys.stdin:
    try: answer = 0, eval(line)
    except OSError as exc: answer = exc.errno, None
    except sqlite3.Error as exc: answer = -1, str(exc)
    print(repr(answer), flush=True)
"""


class Caller:
    def __init__(self, faults: Faults) -> None:
        self.process = subprocess.Popen(
            [*faults.starter, sys.executable, "-c", CALLER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, code: str) -> tuple[int, Any]:
        """The number of its error, or 0 and its value."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{code}\n")
        self.process.stdin.flush()
        number, value = literal_eval(self.process.stdout.readline())
        return number, value


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults") / "table")


@pytest.fixture
def ask(faults: Faults) -> Iterator[Caller]:
    caller = Caller(faults)
    yield caller
    caller.process.communicate(timeout=30)
    assert caller.process.returncode == 0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    return path


CALLS = {
    "os.open({0!r}, os.O_RDONLY)": "open",
    "open({0!r}).read()": "open",
    "at({0!r}, os.read, 5)": "read",
    "at({0!r}, os.pread, 5, 2)": "read",
    "at({0!r}, os.write, b'x')": "write",
    "at({0!r}, os.pwrite, b'x', 2)": "write",
    "at({0!r}, os.writev, [b'x', b'y'])": "write",
    "at({0!r}, os.fsync)": "sync",
    "at({0!r}, os.fdatasync)": "sync",
    "os.link({0!r}, {0!r} + '2')": "link",
    "os.link({0!r}, {0!r} + '2', follow_symlinks=False)": "link",
    "os.rename({0!r}, {0!r} + '3')": "rename",
    "os.replace({0!r}, {0!r} + '3')": "rename",
}


@pytest.mark.parametrize("code", CALLS)
def test_each_call_fails_with_the_error_that_is_wanted_and_only_on_its_path(
    faults: Faults, ask: Caller, file: Path, code: str
) -> None:
    for number in (errno.EIO, errno.EDQUOT):
        other = file.with_name(f"another{number}")
        other.write_bytes(b"0123456789")
        with faults.on(Rule("*/file", CALLS[code], number)) as (met,):
            assert ask(code.format(str(file))) == (number, None)
            assert ask(code.format(str(other)))[0] == 0
        assert met.fired == 1
    assert file.read_bytes() == b"0123456789"
    assert max(os.listdir(file.parent)) != "file2"
    assert ask(code.format(str(file)))[0] == 0


@pytest.mark.parametrize("of", ["its place", "the folder that it is opened in", "where it works"])
def test_a_relative_name_is_known_by_its_whole_path(
    faults: Faults, ask: Caller, file: Path, of: str
) -> None:
    folder = str(file.parent)
    code = {
        "its place": f"read({str(file)!r})",
        "the folder that it is opened in": f"os.open('file', 0, dir_fd=os.open({folder!r}, 0))",
        "where it works": f"(os.chdir({folder!r}), read('file'))",
    }[of]
    with faults.on(Rule(f"{folder}/file", "open", errno.EROFS)):
        assert ask(code) == (errno.EROFS, None)


def test_a_link_and_a_rename_fit_by_where_they_go_as_well(
    faults: Faults, ask: Caller, file: Path
) -> None:
    for call in ("link", "rename"):
        with faults.on(Rule("*/there", call, errno.ENOSPC)):
            assert ask(f"os.{call}({str(file)!r}, {str(file.parent / 'there')!r})")[0] == 28


@pytest.mark.parametrize(
    ("every", "most", "wanted"),
    [
        (3, 0, [0, 0, 5, 0, 0, 5, 0, 0, 5, 0]),
        (1, 2, [5, 5, 0, 0, 0, 0, 0, 0, 0, 0]),
        (2, 1, [0, 5, 0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_how_often_is_told_by_the_rule_and_counted(
    faults: Faults, ask: Caller, file: Path, every: int, most: int, wanted: list[int]
) -> None:
    with faults.on(Rule("*/file", "read", errno.EIO, every=every, most=most)) as (met,):
        assert ask(f"many(lambda: read({str(file)!r}), 10)") == (0, wanted)
        assert (met.seen, met.fired) == (10, sum(map(bool, wanted)))


def test_chance_is_as_likely_as_it_is_told_and_the_same_at_every_run(
    faults: Faults, ask: Caller, file: Path
) -> None:
    """R128: 30 % of them."""
    runs = []
    for seed in (1, 1, 2):
        with faults.on(Rule("*/file", "read", errno.EIO, percent=30, seed=seed)):
            runs.append(ask(f"many(lambda: read({str(file)!r}), 1000)")[1])
    assert runs[0] == runs[1] != runs[2]
    assert all(240 < sum(map(bool, run)) < 360 for run in runs)


def test_half_is_written_and_one_bit_is_flipped(faults: Faults, ask: Caller, file: Path) -> None:
    with faults.on(Rule("*/file", "write", shortened=True)):
        assert ask(f"write({str(file)!r}, b'abcdef')") == (0, 3)
    assert file.read_bytes() == b"abc3456789"
    with faults.on(Rule("*/file", "read", flipped=True)):
        assert ask(f"read({str(file)!r})") == (0, b"abc34" + bytes([b"5"[0] ^ 1]) + b"6789")
    assert ask(f"read({str(file)!r})") == (0, b"abc3456789")


def test_a_slow_call_is_slow_and_others_are_not(faults: Faults, ask: Caller, file: Path) -> None:
    code = "(lambda t: ({0}, time.monotonic() - t)[1])(time.monotonic())"
    with faults.on(Rule("*/file", "sync", delay_s=0.2)):
        assert ask(code.format(f"at({str(file)!r}, os.fsync)"))[1] >= 0.2
        assert ask(code.format(f"read({str(file)!r})"))[1] < 0.2


def test_what_hangs_goes_on_when_its_rule_is_off_though_another_one_comes(
    faults: Faults, ask: Caller, file: Path
) -> None:
    answers: list[object] = []
    code = f"at({str(file)!r}, os.fsync)"
    thread = threading.Thread(target=lambda: answers.append(ask(code)))
    with faults.on(Rule("*/file", "sync", delay_s=HANGS_S)) as (met,):
        thread.start()
        must(lambda: met.fired, 10, "a call that hangs")
        assert not answers
    faults.add(Rule("*/other", delay_s=HANGS_S))
    thread.join(10)
    faults.off()
    assert answers == [(0, None)]


def test_many_threads_are_counted_to_the_last(faults: Faults, ask: Caller, file: Path) -> None:
    work = f"lambda: many(lambda: read({str(file)!r}), 500)"
    code = f"[t.start() or t for t in [threading.Thread(target={work}) for _ in range(8)]]"
    with faults.on(Rule("*/file", "read", errno.EIO, every=2)) as (met,):
        assert ask(f"[t.join() for t in {code}]")[0] == 0
        assert (met.seen, met.fired) == (4000, 2000)


def test_sqlite_meets_it_as_well(faults: Faults, ask: Caller, tmp_path: Path) -> None:
    name = str(tmp_path / "db")
    assert ask(f"sqlite3.connect({name!r}).execute('create table t (a)') and 1") == (0, 1)
    with faults.on(Rule(f"{name}*", "write|sync", errno.EIO)):
        number, text = ask(f"sqlite3.connect({name!r}).execute('create table u (a)') and 1")
    assert (number, "I/O error" in text) == (-1, True)
    assert ask(f"sqlite3.connect({name!r}).execute('create table u (a)') and 1") == (0, 1)


def test_what_the_process_starts_has_a_disk_that_works(
    faults: Faults, ask: Caller, file: Path
) -> None:
    """Guards and engines are started by hive."""
    child = [sys.executable, "-c", f"print(len(open({str(file)!r}).read()))"]
    with faults.on(Rule("*/file", EVERYTHING, errno.EIO)) as (met,):
        assert ask(f"subprocess.run({child!r}, capture_output=True).stdout") == (0, b"10\n")
        assert not met.seen
        assert ask("[n for n in os.environ if n in ('LD_PRELOAD', 'HIVE_FS_FAULTS')]") == (0, [])
        assert ask(f"read({str(file)!r})")[0] == errno.EIO


def test_a_connection_to_a_socket_fails_by_its_path(faults: Faults, ask: Caller) -> None:
    with short_directory() as home, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(home / "engine.sock"))
        server.listen()
        code = f"socket.socket(socket.AF_UNIX).connect({str(home / 'engine.sock')!r})"
        with faults.on(Rule("*/engine.sock", "connect", errno.ECONNREFUSED)):
            assert ask(code)[0] == errno.ECONNREFUSED
        assert ask(code) == (0, None)


def test_one_rule_ends_and_the_others_stay(faults: Faults, ask: Caller, file: Path) -> None:
    with faults.on(
        Rule("*/file", "read", errno.EIO), Rule("*/file", "write", errno.EROFS)
    ) as rules:
        assert ask(f"read({str(file)!r})")[0] == errno.EIO
        rules[0].end()
        assert ask(f"read({str(file)!r})") == (0, b"0123456789")
        assert ask(f"write({str(file)!r}, b'x')")[0] == errno.EROFS


def test_a_rule_that_was_never_met_fails_its_test(faults: Faults) -> None:
    with (
        pytest.raises(AssertionError, match="never met: <read on"),
        faults.on(Rule("*/nothing", "read", errno.EIO)),
    ):
        pass

"""The outbox's file: what was written is there after any end of hive, and a broken file is kept."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hive.storage.outbox import FILE, KEPT, VERSION, Kept, Message, OutboxFile, Progress

ALERT = '{"labels": {}}'


def message(number: int, **fields: object) -> Message:
    about = Message(
        delivery=f"d{number}",
        number=number,
        rule="breaker_open",
        subject="Worker llama-0",
        level="high",
        is_resolved=False,
        body="[{}]",
        queued_at=1.5,
    )
    return replace(about, **fields)  # type: ignore[arg-type]


def reopened(directory: Path) -> OutboxFile:
    file = OutboxFile(directory)
    file.read()
    return file


def read(directory: Path) -> Kept:
    """What the next life finds."""
    file = OutboxFile(directory)
    try:
        return file.read()
    finally:
        file.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OutboxFile]:
    with contextlib.closing(reopened(tmp_path)) as opened:
        yield opened


def test_it_is_for_hive_alone(tmp_path: Path) -> None:
    with contextlib.closing(reopened(tmp_path)):
        modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o600}


def test_whoever_made_it_it_is_for_hive_alone(tmp_path: Path) -> None:
    (tmp_path / FILE).touch(0o644)
    with contextlib.closing(reopened(tmp_path)):
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_what_waits_is_read_in_its_order_and_as_it_was(tmp_path: Path, file: OutboxFile) -> None:
    """(R249)"""
    late = message(2, attempts=3, tried_at=7.0, last_error="HTTP 500", is_resolved=True)
    file.write([message(3), late, message(1)], {"k": ALERT}, [])
    file.write([message(1, state=Progress.SENT)], {}, [])
    file.close()

    kept = read(tmp_path)
    assert kept.waiting == [late, message(3)]
    assert kept.open == {"k": ALERT}
    assert kept.set_aside == ""


def test_a_message_and_its_alert_are_written_together_or_not_at_all(
    tmp_path: Path, file: OutboxFile
) -> None:
    file.write([message(1)], {"k": ALERT}, [])
    with pytest.raises(sqlite3.Error):
        file.write([message(2, body=b"\x00")], {}, ["k"])  # STRICT: a blob is no text
    kept = read(tmp_path)
    assert [one.number for one in kept.waiting] == [1]
    assert kept.open == {"k": ALERT}
    file.write([message(2)], {}, ["k"])  # it goes on after a failure

    assert read(tmp_path).open == {}


def test_only_the_last_of_what_is_done_are_kept(file: OutboxFile) -> None:
    for number in range(KEPT + 30):
        file.write([message(number, state=Progress.SENT)], {}, [])
    file.write([message(1000)], {}, [])
    done = file.done(1000)

    assert [one.number for one in done] == list(range(KEPT + 29, 29, -1))
    assert [one.number for one in file.read().waiting] == [1000]


@pytest.mark.parametrize("broken", [b"this is no database" * 500, None])
def test_a_damaged_or_newer_file_is_set_aside_and_kept(
    tmp_path: Path, file: OutboxFile, broken: bytes | None
) -> None:
    file.write([message(1)], {}, [])
    file.close()
    if broken is not None:
        (tmp_path / FILE).write_bytes(broken)
    else:
        with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection:
            connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    kept = read(tmp_path)

    assert kept.waiting == []
    assert "damaged-" in kept.set_aside
    (aside,) = tmp_path.glob(f"{FILE}.damaged-*-0")
    assert broken is None or aside.read_bytes() == broken


def test_a_disk_that_is_full_is_told_and_takes_nothing_with_it(tmp_path: Path) -> None:
    """A real limit of the file system's: of the size of a file."""
    program = f"""
import resource, signal, sqlite3, sys
from pathlib import Path
from tests.storage.test_outbox import message, reopened
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = reopened(Path({str(tmp_path)!r}))
file.write([message(1)], {{}}, [])
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
for number in range(2, 200):
    try:
        file.write([message(number, body="x" * 10000)], {{}}, [])
    except (sqlite3.Error, OSError) as exc:
        print(number, exc)
        break
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.write([message(500)], {{}}, [])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    failed_at = int(done.stdout.split()[0])
    numbers = [one.number for one in read(tmp_path).waiting]

    assert numbers == [*range(1, failed_at), 500]


def test_what_was_written_outlives_a_sigkill(tmp_path: Path) -> None:
    """Whoever is told that it is written finds it, whenever the process is killed (R235)."""
    program = f"""
import itertools
from pathlib import Path
from tests.storage.test_outbox import message, reopened
file = reopened(Path({str(tmp_path)!r}))
for number in itertools.count(1):
    file.write([message(number)], {{f"k{{number}}": "x"}}, [f"k{{number - 1}}"])
    print(number, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout
    told = [int(process.stdout.readline()) for _ in range(25)]
    process.send_signal(signal.SIGKILL)
    told += [int(line) for line in process.stdout]
    process.wait()
    process.stdout.close()
    kept = read(tmp_path)

    assert len(kept.waiting) - told[-1] in (0, 1)
    assert [one.number for one in kept.waiting] == list(range(1, len(kept.waiting) + 1))
    assert set(kept.open) == {f"k{len(kept.waiting)}"}

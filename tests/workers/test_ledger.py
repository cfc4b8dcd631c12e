"""The ledger: on disk before the fork, forgotten when all came back, and otherwise told."""

import ast
import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import hive
from hive.events import Event, LeakCleared, LeakFound
from hive.workers import guard, journal, ledger
from hive.workers.journal import NO_TREE
from hive.workers.ledger import Ledger
from hive.workers.process import Launch, Place, Tree
from tests.patience import awaited, short_directory, until
from tests.workers.blindness import blind

QUIET = "import signal; print('up', flush=True); signal.pause()"
SHARE = """
import mmap, os
file = open("/dev/shm/" + os.environ["SHM_NAME"], "w+b")
file.truncate(4096)
mapped = mmap.mmap(file.fileno(), 4096)
"""
GPU = {"cuda:0": {"uuid": "GPU-1", "free_bytes": 80_000_000_000}}


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        (directory / "w").mkdir()
        yield directory


@pytest.fixture
def heard() -> list[Event]:
    return []


@pytest.fixture
def book(home: Path, heard: list[Event]) -> Ledger:
    return Ledger(home / "ledger", heard.append)


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays is a leak sooner: the kernel has nothing to take back there."""
    monkeypatch.setattr(ledger, "SETTLE_S", 0.2)


soon = pytest.mark.usefixtures("_soon")


def place_in(home: Path, book: Ledger, name: str = "1") -> Place:
    return Place(home / "w" / name, home / f"{name}.log", records=book.directory)


def launch(place: Place, code: str = QUIET, **env: str) -> Launch:
    argv = [sys.executable, "-I", "-S", "-c", code]
    return Launch(argv, {"HIVE_MARK": place.mark, **env})


def files(book: Ledger) -> list[str]:
    return sorted(file.name for file in book.directory.glob("*"))


@contextmanager
def marked(place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a start that nobody ends: what a leak is."""
    command = [sys.executable, "-I", "-S", "-c", QUIET]
    env = {"HIVE_MARK": place.mark}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


# ── A start and its end ─────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_start_is_on_disk_from_before_its_fork_until_all_came_back(
    home: Path, book: Ledger, heard: list[Event]
) -> None:
    """(R022, R143, R153)"""
    place = place_in(home, book)
    entry = await book.intend("llama-0", place, grace_s=2)
    written = journal.read_note(book.directory / f"{place.mark}.json")

    assert not place.home.exists()
    assert (written.worker, written.home, written.grace_s) == ("llama-0", place.home, 2)
    assert written.guard is None
    assert book.entries == [entry]

    tree = await Tree.spawn(launch(place), place)
    await book.started(entry, tree.guard_pid, tree.pid)
    written = journal.read_note(book.directory / f"{place.mark}.json")

    assert written.guard == journal.identity(tree.guard_pid)
    assert written.leader == journal.identity(tree.pid)

    await tree.end(5)

    assert await book.audit(entry) == []
    assert files(book) == []
    assert (book.entries, book.leaks, book.error()) == ([], [], None)
    assert heard == []
    assert entry.is_closed


@awaited
async def test_what_the_guard_wrote_down_outlives_the_home(home: Path, book: Ledger) -> None:
    """Else nobody would know afterwards which names in /dev/shm to look for."""
    place, name = place_in(home, book), f"hivetest_{os.getpid()}"
    entry = await book.intend("llama-0", place)
    code = f"{SHARE}\n{QUIET}"
    tree = await Tree.spawn(launch(place, code, SHM_NAME=name), place)
    await book.started(entry, tree.guard_pid, tree.pid)
    await until(lambda: name in journal.tree_of(book.directory, entry.note).shm, "the record")
    inode = os.stat(guard.SHM + name).st_ino
    await tree.end(5)

    assert not place.home.exists()
    assert journal.tree_of(book.directory, entry.note).shm == {name: inode}
    assert await book.audit(entry) == []
    assert files(book) == []


@awaited
async def test_what_nobody_can_look_at_is_not_proved_given_back(
    home: Path, book: Ledger, heard: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor is free: not known yet, and looked at again; nothing raises (R144)."""
    monkeypatch.setattr(ledger, "SETTLE_S", 0.0)
    place = place_in(home, book)
    entry = await book.intend("llama-0", place)
    place.home.mkdir()
    await asyncio.to_thread(list)  # a thread needs no descriptor, its first import would
    with marked(place), blind():
        (leak,) = await book.audit(entry)
        assert (leak.kind, leak.holder) == ("process", "unknown")
        assert await book.recheck() == [leak]
    assert place.home.exists()
    assert files(book) == [f"{place.mark}.json"]
    assert await book.recheck() == []
    assert [type(event) for event in heard] == [LeakFound, LeakCleared]
    assert files(book) == []


@pytest.mark.parametrize("facts", [{"grace_s": -1.0}, {"cgroup": Path("/elsewhere")}])
@awaited
async def test_what_could_not_be_read_back_is_a_value_error(
    home: Path, book: Ledger, facts: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="validation error"):
        await book.intend("llama-0", place_in(home, book), **facts)

    assert book.entries == []


@awaited
async def test_a_start_that_failed_is_over_like_any_other(home: Path, book: Ledger) -> None:
    """Before the fork, at it, or after it: the audit finds that nothing is left (R024)."""
    before = place_in(home, book)
    entry = await book.intend("llama-0", before)

    assert await book.audit(entry) == []

    at = place_in(home, book)
    entry = await book.intend("llama-0", at)
    with pytest.raises(Exception, match="could not be run"):
        await Tree.spawn(Launch(["/nowhere/engine"], {}), at)

    assert await book.audit(entry) == []

    after = place_in(home, book, "2")
    entry = await book.intend("llama-0", after)
    spawning = asyncio.ensure_future(Tree.spawn(launch(after), after))
    await until(after.home.exists, "the start to begin")
    spawning.cancel()
    with suppress(asyncio.CancelledError):
        await spawning

    assert await book.audit(entry) == []
    assert files(book) == []


@awaited
async def test_an_intent_that_cannot_be_written_is_none(home: Path, heard: list[Event]) -> None:
    (home / "ledger").write_text("in the way")
    book = Ledger(home / "ledger", heard.append)
    with pytest.raises(OSError, match="exists"):
        await book.intend("llama-0", place_in(home, book))

    assert book.entries == []


@awaited
async def test_an_intent_that_could_not_be_read_back_is_none(home: Path, book: Ledger) -> None:
    with pytest.raises(ValueError, match="cgroup"):
        await book.intend("llama-0", place_in(home, book), cgroup=Path("/sys/fs/cgroup/of another"))

    assert (book.entries, files(book)) == ([], [])


@awaited
async def test_an_intent_that_is_cancelled_leaves_nothing(home: Path, book: Ledger) -> None:
    """(R024)"""
    for _ in range(5):
        intending = asyncio.ensure_future(book.intend("llama-0", place_in(home, book)))
        while not book.entries:  # noqa: ASYNC110 (to be there while its file is written)
            await asyncio.sleep(0)
        intending.cancel()
        with suppress(asyncio.CancelledError):
            await book.audit(await intending)
    await asyncio.get_running_loop().shutdown_default_executor()

    assert (book.entries, files(book)) == ([], [])


@awaited
async def test_a_pid_that_is_not_the_guards_child_is_not_written_down(
    home: Path, book: Ledger
) -> None:
    """An engine that ended at once is reaped, and its pid may be a stranger's already."""
    entry = await book.intend("llama-0", place_in(home, book))
    with marked(place_in(home, book, "2")) as stranger:
        await book.started(entry, os.getpid(), stranger.pid)
        assert entry.note.leader == journal.identity(stranger.pid)
        await book.started(entry, 1, stranger.pid)
        assert entry.note.leader is None


@awaited
async def test_nothing_comes_after_the_end(home: Path, book: Ledger, heard: list[Event]) -> None:
    """What was slow, such as a write whose waiter was cancelled, brings nothing back."""
    entry = await book.intend("llama-0", place_in(home, book), devices=GPU)
    book.receipt(entry, "cuda:0", "returned")
    await book.audit(entry)
    await book.started(entry, os.getpid(), os.getpid())
    book.receipt(entry, "cuda:0", entry.leak("vram", "cuda:0: process 12", "End it."))

    assert await book.audit(entry) == []
    assert (files(book), book.leaks, heard) == ([], [], [])


# ── Leaks ───────────────────────────────────────────────────────────────────────────────────────


@soon
@awaited
async def test_a_leak_is_told_once_and_again_when_it_is_gone(
    home: Path, book: Ledger, heard: list[Event]
) -> None:
    place = place_in(home, book)
    entry = await book.intend("llama-0", place)
    with marked(place) as process:
        (leak,) = await book.audit(entry)
        holder = f"{process.pid} ({guard.look_at(process.pid).name})"  # type: ignore[union-attr]

        assert (leak.kind, leak.holder, leak.worker) == ("process", holder, "llama-0")
        assert await book.recheck() == [leak]
        assert book.leaks[0].since == leak.since
        assert heard == [LeakFound("process", holder, "llama-0", leak.how_to_clear)]
        assert files(book) == [f"{place.mark}.json"]
    assert await book.recheck() == []
    assert heard[1:] == [LeakCleared("process", holder, "llama-0")]
    assert files(book) == []


@soon
@awaited
async def test_what_a_process_used_is_given_back_when_it_is_gone_at_last(
    home: Path, book: Ledger, heard: list[Event]
) -> None:
    """As that of one that survived SIGKILL."""
    place = place_in(home, book)
    entry = await book.intend("llama-0", place)
    place.home.mkdir()
    with marked(place):
        assert [leak.kind for leak in await book.audit(entry)] == ["process"]
        assert place.home.exists()
    assert await book.recheck() == []
    assert not place.home.exists()


@awaited
async def test_a_start_whose_tree_lives_is_not_looked_at_again(home: Path, book: Ledger) -> None:
    """Only what was audited can be a leak: a running engine is none."""
    place = place_in(home, book)
    await book.intend("llama-0", place)
    with marked(place):
        assert await book.recheck() == []
        assert len(book.entries) == 1
    await book.close()


@soon
@awaited
async def test_audits_at_the_same_time_tell_the_same_once(
    home: Path, book: Ledger, heard: list[Event]
) -> None:
    place = place_in(home, book)
    entry = await book.intend("llama-0", place)
    with marked(place):
        found = await asyncio.gather(*(book.audit(entry) for _ in range(3)))

        assert [len(one) for one in found] == [1, 1, 1]
        assert len(heard) == 1
    assert await asyncio.gather(*(book.audit(entry) for _ in range(3))) == [[], [], []]
    assert await book.audit(entry) == []
    assert len(heard) == 2
    assert files(book) == []


@awaited
async def test_the_kernel_gets_a_moment_before_something_is_a_leak(
    home: Path, book: Ledger, heard: list[Event]
) -> None:
    place = place_in(home, book)
    entry = await book.intend("llama-0", place)
    with marked(place) as process:
        auditing = asyncio.ensure_future(book.audit(entry))
        asyncio.get_running_loop().call_later(0.05, process.kill)

        assert await auditing == []
    assert heard == []


@soon
@awaited
async def test_a_home_that_a_later_start_got_is_left_to_it(home: Path, book: Ledger) -> None:
    old, new = place_in(home, book), place_in(home, book)
    entry = await book.intend("llama-0", old)
    with marked(old):
        await book.audit(entry)
        later = await book.intend("llama-0", new)
        new.home.mkdir()
    assert await book.recheck() == []
    assert new.home.exists()
    assert await book.audit(later) == []
    assert not new.home.exists()


@awaited
async def test_a_record_that_is_damaged_is_told_and_obeyed_in_nothing(
    home: Path, book: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    entry = await book.intend("llama-0", place := place_in(home, book))
    place.record.write_text('{"mark": "../..", "members": [], "shm": {}}')

    assert await book.audit(entry) == []
    assert "what the guard of llama-0 wrote down is lost" in caplog.text
    assert files(book) == []


# ── VRAM ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("outcome", ["returned", "unproven"])
@awaited
async def test_with_a_receipt_vram_is_no_leak(home: Path, book: Ledger, outcome: str) -> None:
    """Where pids are not visible nobody can prove more, and nobody is accused for it."""
    entry = await book.intend("llama-0", place_in(home, book), devices=GPU)
    book.receipt(entry, "cuda:0", outcome)

    assert await book.audit(entry) == []


@soon
@awaited
async def test_vram_without_a_receipt_is_not_proved_returned(home: Path, book: Ledger) -> None:
    entry = await book.intend("llama-0", place_in(home, book), devices=GPU)
    (leak,) = await book.audit(entry)

    assert (leak.kind, leak.holder) == ("vram", "cuda:0 (not proved returned)")


@soon
@awaited
async def test_a_later_receipt_replaces_the_leak(
    home: Path, book: Ledger, heard: list[Event]
) -> None:
    entry = await book.intend("llama-0", place_in(home, book), devices=GPU)
    holder = "cuda:0: process 12 (python) holds 512 MiB"
    book.receipt(entry, "cuda:0", entry.leak("vram", holder, "End process 12."))

    assert heard == []
    assert [leak.holder for leak in await book.audit(entry)] == [holder]
    assert heard == [LeakFound("vram", holder, "llama-0", "End process 12.")]

    book.receipt(entry, "cuda:0", "returned")

    assert heard[1:] == [LeakCleared("vram", holder, "llama-0")]
    assert book.error() is None
    assert await book.recheck() == []
    assert files(book) == []


# ── At shutdown ─────────────────────────────────────────────────────────────────────────────────


@soon
@awaited
async def test_what_is_leaked_is_counted_named_and_told_how_to_clear(
    home: Path, book: Ledger
) -> None:
    """(R022, R023, R148)"""
    one, two = place_in(home, book), place_in(home, book, "2")
    await book.intend("llama-0", one)
    await book.intend("llama-1", two)
    two.home.symlink_to(home)
    with marked(one) as process:
        leaks = await book.close()
        error = book.error()
        assert error is not None

        assert {leak.kind for leak in leaks} == {"process", "directory"}
        assert error.code == "RESOURCE_LEAK_DETECTED"
        assert error.exit_code == 1
        assert error.suggested_action.startswith("Manual cleanup required: ")
        assert f"kill -9 {process.pid}" in error.suggested_action
        assert "directory w/2 of llama-1" in error.message
        assert error.public_details["leaked_processes"] == 1
        assert error.public_details["leaked_temp_files"] == 1
        assert {leak["kind"] for leak in error.public_details["leaks"]} == {"process", "directory"}
    two.home.unlink()
    assert await book.close() == []
    assert await book.close() == []
    assert book.error() is None


@awaited
async def test_where_nothing_is_open_closing_does_nothing(book: Ledger) -> None:
    """Close is idempotent (R026)."""
    assert [await book.close() for _ in range(2)] == [[], []]
    assert not book.directory.exists()


@awaited
async def test_what_an_earlier_life_left_is_kept_until_it_is_gone(
    home: Path, book: Ledger, heard: list[Event]
) -> None:
    place = place_in(home, book)
    note = journal.new("llama-0", place.home, place.mark, devices=GPU)
    with marked(place):
        leak = ledger.Entry(note).leak("process", "7 (python)", "End it.")
        await book.keep(note, NO_TREE.model_copy(update={"mark": note.mark}), [leak])

        assert book.leaks == [leak]
        assert files(book) == [f"{place.mark}.json", f"{place.mark}.tree.json"]
    assert await book.recheck() == []
    assert files(book) == []


# ── What the language would do ──────────────────────────────────────────────────────────────────


def test_nothing_waits_in_a_destructor() -> None:
    """What is taken is given back by a call; the collector's time is nobody's time (R025)."""
    found: list[tuple[str, str]] = []
    for file in Path(hive.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case (
                    ast.FunctionDef(name="__del__" as name)
                    | ast.Import(names=[ast.alias(name="atexit" as name)])
                ):
                    found.append((file.name, name))
                case ast.Attribute(attr="finalize" as name):
                    found.append((file.name, name))

    assert found == []


def test_a_ledger_and_its_entries_say_how_they_are(home: Path) -> None:
    note = journal.new("llama-0", home / "w" / "1", "0" * 16)
    entry = ledger.Entry(note)

    assert repr(entry) == f"<Entry llama-0 {'0' * 16} 0 leaks>"
    entry.is_closed = True
    assert repr(entry).endswith(" closed>")

"""The janitor: clears what is provably an earlier hive's, and touches nothing else (real victims)."""

import asyncio
import contextlib
import errno
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hive.events import Event, LeakFound
from hive.workers import cgroup, guard, janitor, journal
from hive.workers.guard import Process
from hive.workers.janitor import Swept, sweep
from hive.workers.journal import Note
from hive.workers.ledger import Ledger
from hive.workers.leftovers import described
from tests.doubles.unkillable import WHY_NOT, Freezer
from tests.patience import short_directory, wait_until

QUIET = "import signal; print('up', flush=True); signal.pause()"
PYTHON = (sys.executable, "-I", "-S", "-c", QUIET)
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {QUIET}"
# Shares memory, then a grandchild in a session of its own, without a parent and without the mark.
ESCAPE = f"""
import mmap, os, signal, sys
file = open("/dev/shm/" + os.environ["SHM_NAME"], "w+b")
file.truncate(4096)
mapped = mmap.mmap(file.fileno(), 4096)
if os.fork():
    os.wait()
    signal.pause()
os.setsid()
if os.fork():
    os._exit(0)
os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", {DEAF!r}], {{}})
"""
EMPTY: dict[str, Any] = {"members": [], "shm_before": [], "shm": {}}  # of a guard's record
# A hive of its own: ledger, home, directory for logs, mark, grace, the engine's code and variable.
HIVE = """
import asyncio, sys
from pathlib import Path
from hive.workers.ledger import Ledger
from hive.workers.process import Launch, Place, Tree

async def main():
    top, mark, grace_s, code, shm = Path(sys.argv[1]), *sys.argv[2:]
    ledger = Ledger(top / "ledger", print)
    place = Place(top / "w" / "1", top / "log", mark=mark, records=ledger.directory)
    entry = await ledger.intend("llama-0", place, grace_s=float(grace_s))
    env = {"HIVE_MARK": mark, "SHM_NAME": shm}
    launch = Launch([sys.executable, "-I", "-S", "-c", code], env)
    tree = await Tree.spawn(launch, place, float(grace_s))
    await ledger.started(entry, tree.guard_pid, tree.pid)
    print(tree.guard_pid, flush=True)
    await tree.gone

asyncio.run(main())
"""


class Host:
    """Hive's directories, and what tests put there; the sweep of the next life."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.heard: list[Event] = []
        self.ledger = Ledger(top / "ledger", self.heard.append)
        (top / "w").mkdir()
        (top / "ledger").mkdir()
        self.hive = gone()  # the earlier hive: older than whatever it is said to have started

    def sweep(self) -> list[Swept]:
        return asyncio.run(sweep(self.ledger, self.top))

    def note(self, number: int = 1, **facts: Any) -> Note:
        """A start of a hive that has ended since."""
        mark = secrets.token_hex(8)
        note = journal.new("llama-0", self.top / "w" / str(number), mark, grace_s=0.2)
        return note.model_copy(update={"hive": self.hive} | facts)

    def write(self, note: Note, tree: dict[str, Any] | None = None, **changes: Any) -> Path:
        """The start on disk, changed by somebody; the path of its file."""
        journal.write(self.ledger.directory, note)
        path = journal.file_of(self.ledger.directory, note.mark)
        if changes:
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        if tree is not None:
            record = journal.record_in(self.ledger.directory, note.mark)
            record.write_text(json.dumps(EMPTY | {"mark": note.mark} | tree))
        return path

    def files(self) -> list[str]:
        return sorted(file.name for file in self.ledger.directory.iterdir())

    def homes(self) -> list[str]:
        return sorted(home.name for home in (self.top / "w").iterdir())


@pytest.fixture
def host() -> Iterator[Host]:
    with short_directory() as directory:
        yield Host(directory)


@pytest.fixture
def shm() -> Iterator[Path]:
    path = Path(guard.SHM, f"hivetest_{os.getpid()}")
    path.write_bytes(b"\0" * 4096)
    yield path
    path.unlink(missing_ok=True)


def gone() -> tuple[int, int]:
    """A process that has ended: its pid and start."""
    with subprocess.Popen(["sleep", "600"]) as process:
        one = journal.identity(process.pid)
        process.kill()
    assert one is not None
    return one


@contextmanager
def running(
    user: int | None = None, command: Sequence[str] = PYTHON, **env: str
) -> Iterator[Process]:
    """A process that is up; ended with the block, if it is still there."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, env=env, start_new_session=True, user=user
    ) as process:
        assert process.stdout
        process.stdout.readline()
        seen = guard.look_at(process.pid)
        assert seen is not None
        try:
            yield seen
        finally:
            process.kill()


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays is told sooner: the kernel has nothing to take back there."""
    monkeypatch.setattr(janitor, "SETTLE_S", 0.2)


soon = pytest.mark.usefixtures("_soon")


def lives(process: Process) -> bool:
    now = guard.look_at(process.pid)
    return now is not None and now.start == process.start and now.state != "Z"


def outcomes(found: list[Swept]) -> set[tuple[str, str, str]]:
    return {(one.kind, one.holder, one.outcome) for one in found}


# ── What an earlier hive left ───────────────────────────────────────────────────────────────────


class OtherHive:
    """A hive in a process of its own with a tree, to be killed; its orphans come to us."""

    def __init__(self, host: Host, code: str = ESCAPE, grace_s: float = 0.2) -> None:
        self.mark = secrets.token_hex(8)
        self.record = journal.record_in(host.ledger.directory, self.mark)
        self.shm = f"hivetest_{os.getpid()}"
        args = [str(host.top), self.mark, str(grace_s), code, self.shm]
        self.process = subprocess.Popen([sys.executable, "-c", HIVE, *args], stdout=subprocess.PIPE)
        assert self.process.stdout
        self.guard_pid = int(self.process.stdout.readline())
        wait_until(lambda: "up\n" in (host.top / "log").read_text(), "the engine to be up")

    def members(self, count: int) -> list[Process]:
        """Those on record, once they are so many."""

        def look() -> list[list[int]]:
            with contextlib.suppress(OSError, ValueError):
                found: list[list[int]] = json.loads(self.record.read_text())["members"]
                return found if len(found) == count else []
            return []

        found = [guard.look_at(pid) for pid, _ in wait_until(look, f"{count} members")]
        return [process for process in found if process]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def kill_with_guard(self) -> None:
        """In one step, so that the guard cannot notice hive's end first."""
        os.kill(self.guard_pid, signal.SIGSTOP)
        self.kill()
        os.kill(self.guard_pid, signal.SIGKILL)


def test_what_hive_and_its_guard_left_is_cleared(host: Host) -> None:
    """Killed together: processes, shared memory and files are found by the journal (R145, R153)."""
    hive = OtherHive(host)
    escaped = next(p for p in hive.members(2) if guard.mark_of(p.pid) is None)
    hive.kill_with_guard()

    found = host.sweep()

    assert ("process", described(escaped), "ended") in outcomes(found)
    assert ("shared_memory", hive.shm, "removed") in outcomes(found)
    assert ("directory", "w/1", "removed") in outcomes(found)
    assert {one.worker for one in found} == {"llama-0"}
    assert not lives(escaped)
    assert not Path(guard.SHM, hive.shm).exists()
    assert (host.homes(), host.files(), host.ledger.leaks) == ([], [], [])
    assert host.sweep() == []


def test_a_guard_that_is_ending_its_tree_is_waited_for(host: Host) -> None:
    """Its hive died a moment ago: the engine has its grace, and the sweep kills nobody."""
    hive = OtherHive(host, DEAF, grace_s=1.0)
    hive.kill()
    found = host.sweep()

    assert [one for one in found if one.kind == "process"] == []
    assert not is_alive(hive.guard_pid)
    assert (host.homes(), host.files()) == ([], [])


def is_alive(pid: int) -> bool:
    process = guard.look_at(pid)
    return process is not None and process.state != "Z"


def test_a_guard_that_does_not_end_its_tree_is_ended_with_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "KILL_S", 2.0)
    monkeypatch.setattr(janitor, "ANSWER_S", 0.0)
    hive = OtherHive(host, DEAF, grace_s=0.1)
    os.kill(hive.guard_pid, signal.SIGSTOP)
    hive.kill()
    found = host.sweep()

    assert len([one for one in found if (one.kind, one.outcome) == ("process", "ended")]) == 2
    assert not is_alive(hive.guard_pid)
    assert (host.homes(), host.files()) == ([], [])


def test_of_a_hive_that_was_killed_before_the_fork_there_is_nothing(host: Host) -> None:
    host.write(host.note())

    assert host.sweep() == []
    assert host.files() == []


def test_of_a_hive_that_was_killed_at_the_fork_the_home_is_removed(host: Host) -> None:
    note = host.note()
    host.write(note)
    note.home.mkdir()
    (note.home / "t").mkdir()

    assert outcomes(host.sweep()) == {("directory", "w/1", "removed")}
    assert host.homes() == []


def test_a_process_that_is_only_marked_is_ended(host: Host) -> None:
    """hive was killed between the fork and the note about it."""
    note = host.note()
    host.write(note)
    with running(HIVE_MARK=note.mark) as process:
        assert outcomes(host.sweep()) == {("process", described(process), "ended")}
        assert not lives(process)


def test_a_process_that_wiped_its_environment_is_ended_by_the_record(host: Host) -> None:
    with running() as process:
        host.write(host.note(), {"members": [[process.pid, process.start]]})

        assert outcomes(host.sweep()) == {("process", described(process), "ended")}
        assert not lives(process)


def test_who_is_in_the_control_group_is_ended_and_the_group_removed(host: Host) -> None:
    """Unmarked, unrecorded, nobody's child: the group's name is proof enough."""
    parent = cgroup.find()
    if parent is None:
        pytest.skip("no writable control groups (v2) here")
    note = host.note()
    group = cgroup.make(parent / f"hive-{note.mark}")
    try:
        host.write(note, cgroup=str(group.path))
        with running() as process:
            (group.path / "cgroup.procs").write_text(str(process.pid))
            found = host.sweep()

        assert ("process", described(process), "ended") in outcomes(found)
        assert ("cgroup", group.path.name, "removed") in outcomes(found)
        assert not group.path.exists()
    finally:
        group.remove()


def test_of_an_earlier_boot_only_files_are_left(host: Host, shm: Path) -> None:
    """Whoever has the pid, the start and even the mark now is another."""
    note = host.note(boot="of last week")
    with running(HIVE_MARK=note.mark) as process:
        members = [[process.pid, process.start]]
        host.write(note, {"members": members, "shm": {shm.name: shm.stat().st_ino}})
        note.home.mkdir()

        assert outcomes(host.sweep()) == {("directory", "w/1", "removed")}
        assert lives(process)
    assert shm.exists()
    assert host.files() == []


def test_a_home_with_its_record_in_it_is_cleared_too(host: Host, shm: Path) -> None:
    """As homes were before there was a journal."""
    mark, home = secrets.token_hex(8), host.top / "w" / "3"
    home.mkdir()
    with running(HIVE_MARK=mark) as one, running() as two:
        record = {
            **EMPTY,
            "mark": mark,
            "guard": gone()[0],
            "members": [[two.pid, two.start]],
            "shm": {shm.name: shm.stat().st_ino},
        }
        (home / "tree.json").write_text(json.dumps(record))

        assert outcomes(host.sweep()) == {
            ("process", described(one), "ended"),
            ("process", described(two), "ended"),
            ("shared_memory", shm.name, "removed"),
            ("directory", "w/3", "removed"),
        }
    assert (host.homes(), host.files()) == ([], [])


def test_the_record_in_a_home_counts_for_nothing_after_a_boot(host: Host) -> None:
    home = host.top / "w" / "3"
    home.mkdir()
    with running() as process:
        record = {"mark": "0" * 16, "members": [[process.pid, process.start]], "shm": {}}
        (home / "tree.json").write_text(json.dumps(record))
        os.utime(home / "tree.json", (1000, 1000))

        assert outcomes(host.sweep()) == {("directory", "w/3", "removed")}
        assert lives(process)


def test_where_nothing_is_there_is_nothing_to_do(host: Host) -> None:
    assert host.sweep() == []
    (host.top / "w").rmdir()
    (host.top / "ledger").rmdir()

    assert host.sweep() == []
    assert list(host.top.iterdir()) == []


def test_a_write_that_hive_did_not_live_to_finish_is_removed(host: Host) -> None:
    for name in ("0" * 16 + ".json.new", "0" * 16 + ".tree.json.new"):
        (host.ledger.directory / name).write_text("{")

    assert host.sweep() == []
    assert host.files() == []


def test_a_process_that_only_has_a_guards_name_is_not_waited_for(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard on record is gone: nobody else will end what it left."""
    monkeypatch.setattr(guard, "KILL_S", 60.0)
    code = f"import ctypes; ctypes.CDLL(None).prctl(15, b'hive-guard', 0, 0, 0); {QUIET}"
    note = host.note(guard=gone(), grace_s=0.0)
    host.write(note)
    with running(command=[*PYTHON[:-1], code], HIVE_MARK=note.mark) as process:
        assert process.name == "hive-guard"
        began = time.monotonic()
        assert outcomes(host.sweep()) == {("process", described(process), "ended")}
        assert time.monotonic() - began < 30


def test_what_nobody_can_look_at_is_kept_until_it_can_be_seen(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor is free: neither the record nor a process is taken for gone."""

    def nobody_can(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(guard, "KILL_S", 0.1)
    note = host.note()
    host.write(note, {})
    before = host.files()
    with monkeypatch.context() as blinded:
        blinded.setattr(journal, "_read", nobody_can)
        assert {one.outcome for one in host.sweep()} == {"left alone"}
        blinded.undo()
        blinded.setattr(journal, "tree_of", nobody_can)
        assert outcomes(host.sweep()) == {("process", "unknown", "stays")}
    assert host.files() == before

    assert asyncio.run(host.ledger.recheck()) == []
    assert host.files() == []


@soon
def test_a_home_that_is_another_directory_now_is_not_removed(host: Host) -> None:
    note = host.note()
    note.home.mkdir()
    (note.home / "precious").touch()
    other = note.home.stat()
    host.write(note, {"home": [other.st_dev, other.st_ino + 1]})

    assert outcomes(host.sweep()) == {("directory", "w/1", "stays")}
    assert (note.home / "precious").exists()


def test_shared_memory_that_was_there_before_the_tree_is_not_touched(host: Host, shm: Path) -> None:
    inode = shm.stat().st_ino
    host.write(host.note(), {"shm": {shm.name: inode}, "shm_before": [inode]})

    assert host.sweep() == []
    assert shm.exists()


# ── What is not hive's ──────────────────────────────────────────────────────────────────────────


def test_a_stranger_that_got_the_pid_is_not_touched(host: Host) -> None:
    with running() as process:
        reused = [process.pid, process.start + 1]
        host.write(host.note(), {"members": [reused]}, guard=reused, leader=reused)

        assert host.sweep() == []
        assert lives(process)
    assert host.files() == []


def test_shared_memory_of_the_same_name_is_not_touched(host: Host, shm: Path) -> None:
    host.write(host.note(), {"shm": {shm.name: shm.stat().st_ino + 1}})

    assert host.sweep() == []
    assert shm.exists()


def test_shared_memory_that_nobody_recorded_is_not_touched(host: Host, shm: Path) -> None:
    host.write(host.note(), {"shm": {}})

    assert host.sweep() == []
    assert shm.exists()


def test_what_is_not_on_record_in_the_runtime_directory_is_left_alone(host: Host) -> None:
    """A socket, a directory, a file or a link that hive did not put there."""
    homes = host.top / "w"
    (homes / "5").mkdir()
    (homes / "theirs").mkdir()
    (homes / "6").write_text("x")
    (homes / "7").symlink_to(host.top)
    with closing(socket.socket(socket.AF_UNIX)) as theirs:
        theirs.bind(str(homes / "s"))
        theirs.listen()
        found = host.sweep()

        assert outcomes(found) == {
            ("directory", f"w/{name}", "left alone") for name in ("5", "6", "7", "s", "theirs")
        }
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(homes / "s"))
    assert host.homes() == ["5", "6", "7", "s", "theirs"]
    assert host.ledger.leaks == []


@soon
def test_what_stands_in_a_homes_place_is_not_followed(host: Host) -> None:
    (host.top / "outside").mkdir()
    (host.top / "outside" / "file").touch()
    note = host.note()
    host.write(note)
    note.home.symlink_to(host.top / "outside")

    assert outcomes(host.sweep()) == {("directory", "w/1", "stays")}
    assert (host.top / "outside" / "file").exists()
    assert note.home.is_symlink()


def test_a_runtime_directory_that_leads_elsewhere_is_not_followed(host: Host) -> None:
    """Both the journal and the homes agree, but w is a link that hive did not make."""
    outside = host.top / "outside"
    (outside / "1").mkdir(parents=True)
    (host.top / "w").rmdir()
    (host.top / "w").symlink_to(outside)
    path = host.write(host.note())

    assert outcomes(host.sweep()) == {("journal", path.name, "refused")}
    assert (outside / "1").exists()


def test_a_hive_that_still_runs_keeps_its_own(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state directory was copied: the journal names workers that are not ours."""
    monkeypatch.setattr(janitor, "HIVE_S", 0.1)
    with running() as hive:
        note = host.note(hive=(hive.pid, hive.start))
        host.write(note)
        with running(HIVE_MARK=note.mark) as worker:
            note.home.mkdir()

            assert outcomes(host.sweep()) == {("journal", note.mark, "left alone")}
            assert lives(worker)
    assert note.home.exists()
    assert host.files() == [f"{note.mark}.json"]


def test_what_this_very_hive_started_is_nothing_of_an_earlier_one(host: Host) -> None:
    note = host.note(hive=journal.identity(os.getpid()))
    host.write(note)
    with running(HIVE_MARK=note.mark) as process:
        assert host.sweep() == []
        assert lives(process)
    assert host.files() == [f"{note.mark}.json"]


# ── Journals that are not as hive writes them ───────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes",
    [
        {"home": "/"},
        {"home": "/home"},
        {"home": "{top}/w/.."},
        {"home": "{top}/w/../outside/1"},
        {"home": "{top}/outside/1"},
        {"home": "{top}/outside"},
        {"home": "w/1"},
        {"home": 1},
        {"worker": "llama-0/../.."},
        {"mark": "../../outside"},
        {"mark": "ffffffffffffffff"},
        {"cgroup": "{top}/outside"},
        {"cgroup": "{top}/outside/hive-{mark}"},
        {"guard": [1, 0]},
        {"leader": [0, 0]},
        {"leader": "{victim}"},
        {"devices": "all"},
        {"grace_s": -1},
        {"boot": None},
    ],
    ids=str,
)
def test_a_hostile_note_is_refused_and_not_obeyed(host: Host, changes: dict[str, Any]) -> None:
    """Not even what it says truly: the process with the mark may be anybody's then."""
    note = host.note()
    outside = host.top / "outside"
    for path in (outside / "1", outside / f"hive-{note.mark}" / "below"):
        path.mkdir(parents=True)
        (path / "file").touch()
    note.home.mkdir()
    with running(HIVE_MARK=note.mark) as victim:
        names = {"top": str(host.top), "mark": note.mark, "victim": str(victim.pid)}
        told = {
            key: value.format(**names) if isinstance(value, str) else value
            for key, value in changes.items()
        }
        path = host.write(note, {"members": [[victim.pid, victim.start]]}, **told)
        (refused, *rest) = [one for one in host.sweep() if one.outcome != "left alone"]

        assert lives(victim)
    assert (refused.kind, refused.holder, refused.outcome) == ("journal", path.name, "refused")
    assert refused.why
    assert rest == []
    assert (outside / "1" / "file").exists()
    assert (outside / f"hive-{note.mark}" / "below" / "file").exists()
    assert note.home.exists()
    assert f"{path.name}.damaged" in host.files()
    assert path.name not in host.files()
    assert [one for one in host.sweep() if one.outcome == "refused"] == []


@pytest.mark.parametrize(
    "text",
    ["", "\0" * 100, "{", "[" * 100_000, "7", "[]"],
    ids=["empty", "zeros", "{", "[[", "7", "[]"],
)
def test_a_damaged_note_is_refused(host: Host, text: str) -> None:
    path = host.write(host.note())
    path.write_text(text)

    assert outcomes(host.sweep()) == {("journal", path.name, "refused")}
    assert host.files() == [f"{path.name}.damaged"]


def test_a_file_that_is_none_is_refused(host: Host) -> None:
    """A huge one, a link, a pipe that nobody writes, a directory."""
    made = [host.write(host.note(number)) for number in range(4)]
    huge, link, pipe, directory = made
    os.truncate(huge, journal.MOST_BYTES + 1)
    link.rename(host.top / "elsewhere")
    link.symlink_to(host.top / "elsewhere")
    for path in (pipe, directory):
        path.unlink()
    os.mkfifo(pipe)
    directory.mkdir()

    assert outcomes(host.sweep()) == {("journal", path.name, "refused") for path in made}
    assert host.files() == sorted(f"{path.name}.damaged" for path in made)
    assert (host.top / "elsewhere").exists()


@pytest.mark.parametrize(
    "tree",
    [
        {"shm": {"../../{top}/outside": 0}},
        {"shm": {"{top}/outside": 0}},
        {"shm": {"..": 0}},
        {"members": [[1, 0]]},
        {"members": "all"},
        {"mark": "ffffffffffffffff"},
    ],
    ids=str,
)
def test_a_hostile_record_is_refused_and_the_note_goes_on(host: Host, tree: dict[str, Any]) -> None:
    """What the note proves by itself is cleared."""
    outside = host.top / "outside"
    outside.touch()
    tree = {
        key: {
            name.format(top=host.top): outside.stat().st_ino if name != ".." else inode
            for name, inode in value.items()
        }
        if isinstance(value, dict)
        else value
        for key, value in tree.items()
    }
    note = host.note()
    host.write(note, tree)
    record = f"{note.mark}.tree.json"
    with running(HIVE_MARK=note.mark) as process:
        assert outcomes(host.sweep()) == {
            ("journal", record, "refused"),
            ("process", described(process), "ended"),
        }
    assert outside.exists()
    assert host.files() == [f"{record}.damaged"]


def test_a_name_in_a_directory_of_shared_memory_is_not_touched(host: Host) -> None:
    """hive cannot know whose the directory is."""
    directory = Path(guard.SHM, f"hivetest_{os.getpid()}")
    directory.mkdir()
    try:
        (directory / "file").touch()
        inode = (directory / "file").stat().st_ino
        host.write(host.note(), {"shm": {f"{directory.name}/file": inode}})

        assert host.sweep() == []
        assert (directory / "file").exists()
    finally:
        (directory / "file").unlink()
        directory.rmdir()


def test_a_record_without_its_note_is_left_alone(host: Host) -> None:
    name = "0" * 16 + ".tree.json"
    (host.ledger.directory / name).write_text('{"mark": "0000000000000000"}')
    (host.ledger.directory / "README").write_text("not hive's")

    assert outcomes(host.sweep()) == {("journal", name, "left alone")}
    assert host.files() == [name, "README"]


# ── What stays ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not Freezer.is_available(), reason=WHY_NOT)
def test_what_survives_sigkill_stays_on_record_until_it_is_gone(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "KILL_S", 0.3)
    note = host.note()
    host.write(note)
    note.home.mkdir()
    with Freezer() as freezer, running(HIVE_MARK=note.mark) as process:
        freezer.freeze(process.pid)
        found = host.sweep()
        (leak,) = host.ledger.leaks

        assert outcomes(found) == {("process", described(process), "stays")}
        assert (leak.kind, leak.holder, leak.mark) == ("process", described(process), note.mark)
        assert host.heard == [LeakFound("process", leak.holder, "llama-0", leak.how_to_clear)]
        assert note.home.exists()  # it may still use it
        assert f"{note.mark}.json" in host.files()

        freezer.thaw()
        wait_until(lambda: not lives(process), "its end")
        assert asyncio.run(host.ledger.recheck()) == []
    assert (host.homes(), host.files()) == ([], [])


# Without CAP_KILL (5) even root may not end a process of another user: PR_CAPBSET_DROP.
POWERLESS = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 5, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
SWEEP = """
import asyncio, sys
from pathlib import Path
from hive.workers.janitor import sweep
from hive.workers.ledger import Ledger
top = Path(sys.argv[1])
for one in asyncio.run(sweep(Ledger(top / "ledger", lambda _: None), top)): print(one)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_a_process_that_may_not_be_ended_stays_on_record(host: Host) -> None:
    with running(user=65534, command=("sh", "-c", "echo up; read line")) as process:
        note = host.note()
        host.write(note, {"members": [[process.pid, process.start]]})
        command = [sys.executable, "-c", POWERLESS, sys.executable, "-c", SWEEP, str(host.top)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)

        assert done.stdout.startswith(f"process {described(process)} of llama-0 stays: ")
        assert lives(process)
        assert f"{note.mark}.json" in host.files()
        # The life after that may end it.
        assert outcomes(host.sweep()) == {("process", described(process), "ended")}
    assert host.files() == []


@soon
def test_what_an_end_revealed_is_still_known_when_the_home_is_gone(host: Host) -> None:
    """The record that lay in a home is kept in the journal while something stays."""
    home = host.top / "w" / "3"
    home.mkdir()
    (host.top / "elsewhere").mkdir()
    note = host.note(3)
    record = EMPTY | {"mark": note.mark, "shm": {"psm_x": 7}}
    (home / "tree.json").write_text(json.dumps(record))
    mounting = ["mount", "-t", "tmpfs", "none", str(home)]
    (home / "t").mkdir()
    mounting[-1] = str(home / "t")
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        assert outcomes(host.sweep()) == {("directory", "w/3", "stays")}
        assert host.files() == [f"{note.mark}.json", f"{note.mark}.tree.json"]
        kept = journal.read_note(journal.file_of(host.ledger.directory, note.mark))
        assert journal.tree_of(host.ledger.directory, kept).shm == {"psm_x": 7}
    finally:
        subprocess.run(["umount", str(home / "t")], check=True)
    assert asyncio.run(host.ledger.recheck()) == []
    assert (host.homes(), host.files()) == ([], [])


def test_a_process_is_killed_only_if_it_is_the_very_one() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, bufsize=0) as cat:
        seen = guard.look_at(cat.pid)
        assert seen
        assert cat.stdin
        assert cat.stdout
        janitor.kill(seen._replace(start=seen.start + 1))
        cat.stdin.write(b"still here\n")
        assert cat.stdout.readline() == b"still here\n"
        janitor.kill(seen)
        assert cat.wait() == -signal.SIGKILL
    janitor.kill(seen)


def test_what_was_found_reads_as_a_line_of_the_log() -> None:
    assert str(Swept("shared_memory", "psm_1", "llama-0", "removed")) == (
        "shared memory psm_1 of llama-0 removed"
    )
    assert str(Swept("journal", "x.json", "", "refused", "it is too large")) == (
        "journal x.json refused: it is too large"
    )

"""What is left of a start: found by proof, given back where it is its own, told where it stays."""

import json
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hive.workers import cgroup, guard, journal, leftovers
from hive.workers.guard import Process
from hive.workers.journal import NO_TREE, Note, Tree
from hive.workers.leftovers import KINDS, Leak, described, members
from tests.patience import short_directory, wait_until
from tests.workers.blindness import blind

MARK = "0123456789abcdef"
HOME = Path("/run/hive/w/1")
QUIET = [sys.executable, "-I", "-S", "-c", "import signal; print(flush=True); signal.pause()"]


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        (directory / "w" / "1").mkdir(parents=True)
        yield directory / "w" / "1"


@pytest.fixture
def shm() -> Iterator[Path]:
    path = Path(guard.SHM, f"hivetest_{os.getpid()}")
    path.write_bytes(b"\0" * 4096)
    yield path
    path.unlink(missing_ok=True)


def note_of(home: Path, **facts: Any) -> Note:
    return journal.new("llama-0", home, MARK, **facts)


def tree_of(*processes: Process, **shm: int) -> Tree:
    members = [(p.pid, p.start) for p in processes]
    return Tree(mark=MARK, members=members, shm_before=frozenset(), shm=shm)


@contextmanager
def running(command: list[str] = QUIET, **env: str) -> Iterator[Process]:
    """A process that has said something; ended with the block."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=env, start_new_session=True
    ) as process:
        assert process.stdout
        process.stdout.readline()
        seen = guard.look_at(process.pid)
        assert seen is not None
        try:
            yield seen
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def pids(note: Note, tree: Tree = NO_TREE) -> list[int]:
    return [process.pid for process in members(note, tree)]


def found(home: Path, tree: Tree = NO_TREE, **facts: Any) -> list[Leak]:
    """Of a start that is on record, with its home."""
    return leftovers.leftovers(note_of(home, **facts), made(tree, home))


def made(tree: Tree, home: Path) -> Tree:
    about = os.lstat(home) if home.is_dir() else os.stat("/")
    return tree.model_copy(update={"home": (about.st_dev, about.st_ino)})


# ── Whose process it is ─────────────────────────────────────────────────────────────────────────


def test_a_process_with_the_mark_is_a_member(home: Path) -> None:
    with running(HIVE_MARK=MARK) as process:
        assert pids(note_of(home)) == [process.pid]


def test_a_process_that_wiped_its_environment_is_known_by_the_record(home: Path) -> None:
    with running() as process:
        assert pids(note_of(home)) == []
        assert pids(note_of(home), tree_of(process)) == [process.pid]
        assert pids(note_of(home, leader=(process.pid, process.start))) == [process.pid]


def test_what_a_member_started_belongs_to_it(home: Path) -> None:
    shell = ["sh", "-c", "env -i sleep 600 & echo; wait"]
    with running(shell, PATH=os.environ["PATH"], HIVE_MARK=MARK) as process:
        wait_until(lambda: "sleep" in [p.name for p in guard.descendants(process.pid)], "sleep")
        names = [p.name for p in members(note_of(home), NO_TREE)]

        assert sorted(names) == ["sh", "sleep"]


def test_a_stranger_that_got_the_pid_is_no_member(home: Path) -> None:
    with running() as process:
        reused = process._replace(start=process.start + 1)

        assert members(note_of(home, leader=(process.pid, reused.start)), tree_of(reused)) == []


def test_who_is_older_than_the_hive_that_started_it_is_no_member(home: Path) -> None:
    """A record that names the service manager or a shell is wrong, whoever wrote it."""
    with running() as process:
        note = note_of(home).model_copy(update={"hive": (process.pid, process.start + 1)})

        assert members(note, tree_of(process)) == []


def test_nobody_is_left_of_an_earlier_boot(home: Path) -> None:
    with running(HIVE_MARK=MARK) as process:
        note = note_of(home).model_copy(update={"boot": "of last week"})

        assert members(note, tree_of(process)) == []


def test_a_pid_of_another_container_means_nothing(home: Path) -> None:
    with running() as one, running(HIVE_MARK=MARK) as marked:
        note = note_of(home).model_copy(update={"pid_namespace": 1})

        assert pids(note, tree_of(one)) == [marked.pid]


def test_who_looks_is_never_a_member_nor_is_who_started_it(home: Path) -> None:
    """`hive sweep`, run from a shell that an engine's environment got into."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from hive.workers import journal, leftovers\n"
        "note = journal.new('llama-0', Path(sys.argv[1]), sys.argv[2])\n"
        "print(leftovers.members(note, journal.NO_TREE), sorted(leftovers.lineage()))\n"
    )
    inner = f'"{sys.executable}" -c "$1" "$2" {MARK}; true'
    done = subprocess.run(
        ["sh", "-c", inner, "sh", code, str(home)],
        env={**os.environ, "HIVE_MARK": MARK},
        capture_output=True,
        text=True,
        check=True,
    )
    nobody, above = done.stdout.split("] [")

    assert nobody == "["
    assert {1, os.getpid()} <= set(json.loads(f"[{above}"))


@pytest.fixture
def group() -> Iterator[guard.Group]:
    parent = cgroup.find()
    if parent is None:
        pytest.skip("no writable control groups (v2) here")
    made = cgroup.make(parent / f"hive-{MARK}")
    yield made
    made.kill()
    wait_until(lambda: not made.is_populated(), "the group to be empty")
    made.remove()


def test_who_is_in_the_group_is_a_member(home: Path, group: guard.Group) -> None:
    with running() as process:
        (group.path / "cgroup.procs").write_text(str(process.pid))

        assert pids(note_of(home, cgroup=group.path)) == [process.pid]
        (leak,) = found(home, cgroup=group.path)
        assert (leak.kind, leak.holder) == ("process", described(process))


def test_an_empty_group_is_removed_with_those_below_it(home: Path, group: guard.Group) -> None:
    (group.path / "below").mkdir()

    assert found(home, cgroup=group.path) == []
    assert not group.path.exists()


def test_a_directory_that_only_looks_like_a_group_is_not_touched(home: Path) -> None:
    fake = home.parent.parent / f"hive-{MARK}"
    (fake / "below").mkdir(parents=True)
    with running() as process:
        (fake / "cgroup.procs").write_text(str(process.pid))
        (fake / "cgroup.events").write_text("populated 1\n")

        assert members(note_of(home, cgroup=fake), NO_TREE) == []
        assert found(home, cgroup=fake) == []
        assert (fake / "below").exists()


def test_a_link_to_a_group_is_none(home: Path, group: guard.Group) -> None:
    link = home / "link"
    link.symlink_to(group.path)

    assert leftovers.is_control_group(group.path)
    assert not leftovers.is_control_group(link)
    assert not leftovers.is_control_group(group.path / "gone")


# ── Item by item ────────────────────────────────────────────────────────────────────────────────


def test_where_nothing_is_left_nothing_is_found(home: Path) -> None:
    home.rmdir()

    assert found(home) == []


def test_while_a_process_lives_nothing_that_it_uses_is_touched(home: Path, shm: Path) -> None:
    with running(HIVE_MARK=MARK) as process:
        (leak,) = found(home, tree_of(**{shm.name: shm.stat().st_ino}))

        assert home.exists()
        assert shm.exists()
    assert (leak.kind, leak.worker, leak.mark) == ("process", "llama-0", MARK)
    assert leak.holder == f"{process.pid} ({process.name})"
    assert f"kill -9 {process.pid}" in leak.how_to_clear


def test_a_guard_is_told_only_when_it_is_alone(home: Path) -> None:
    """It waits for those who survived SIGKILL: these are the leak."""
    with running(HIVE_MARK=MARK) as watcher:
        note = note_of(home, guard=(watcher.pid, watcher.start))
        with running(HIVE_MARK=MARK) as process:
            assert [x.holder for x in leftovers.leftovers(note, NO_TREE)] == [described(process)]
        assert [x.holder for x in leftovers.leftovers(note, NO_TREE)] == [described(watcher)]


def test_the_home_is_removed_with_all_that_is_in_it(home: Path) -> None:
    (home / "t" / "deep").mkdir(parents=True)
    (home / "t" / "deep" / "file").touch()
    with closing(socket.socket(socket.AF_UNIX)) as bound:
        bound.bind(str(home / "s"))

    assert found(home) == []
    assert not home.exists()


def test_a_home_that_a_later_start_has_is_its_own(home: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as bound:
        bound.bind(str(home / "s"))

        assert leftovers.leftovers(note_of(home), NO_TREE, is_home_taken=True) == []
        assert (home / "s").exists()


def test_what_stands_in_the_homes_place_is_told_and_not_followed(home: Path) -> None:
    outside = home.parent.parent / "outside"
    outside.mkdir()
    (outside / "file").touch()
    home.rmdir()
    home.symlink_to(outside)
    (leak,) = found(home)

    assert (leak.kind, leak.holder) == ("directory", "w/1")
    assert (outside / "file").exists()
    assert home.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_users_directory_in_the_homes_place_is_told_and_not_removed(home: Path) -> None:
    os.chown(home, 65534, -1)
    (leak,) = found(home)

    assert (leak.kind, leak.holder) == ("directory", "w/1")
    assert home.exists()


def test_links_in_the_home_are_not_followed(home: Path) -> None:
    outside = home.parent.parent / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (home / "t").symlink_to(outside)

    assert found(home) == []
    assert (outside / "file").exists()


def test_what_is_mounted_in_the_home_is_not_emptied(home: Path) -> None:
    there = home / "a mount"
    there.mkdir()
    mounting = ["mount", "-t", "tmpfs", "none", str(there)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (there / "file").touch()
        (leak,) = found(home)

        assert (leak.kind, leak.holder) == ("directory", "w/1")
        assert "Unmount" in leak.how_to_clear
        assert (there / "file").exists()
    finally:
        subprocess.run(["umount", str(there)], check=True)
    assert found(home) == []


def test_a_bound_socket_is_told_with_its_holder(home: Path) -> None:
    """Its file is gone with the home; who holds it still answers there."""
    code = (
        "import signal, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]);"
        "print(flush=True); signal.pause()"
    )
    with running([*QUIET[:-1], code, str(home / "s")]) as process:
        (leak,) = found(home)

        assert (leak.kind, leak.holder) == ("socket", "w/1/s")
        assert described(process) in leak.how_to_clear
        assert not home.exists()
    assert found(home) == []


def test_shared_memory_that_nobody_maps_is_removed(home: Path, shm: Path) -> None:
    assert found(home, tree_of(**{shm.name: shm.stat().st_ino})) == []
    assert not shm.exists()


@pytest.mark.parametrize(
    "changes",
    [{"boot": "of last week"}, {"shm_device": 1}],
    ids=["of an earlier boot", "of another container"],
)
def test_shared_memory_of_another_place_is_not_touched(
    home: Path, shm: Path, changes: dict[str, Any]
) -> None:
    note = note_of(home).model_copy(update=changes)

    assert leftovers.leftovers(note, tree_of(**{shm.name: shm.stat().st_ino})) == []
    assert shm.exists()


def test_shared_memory_of_the_same_name_is_not_touched(home: Path, shm: Path) -> None:
    assert found(home, tree_of(**{shm.name: shm.stat().st_ino + 1})) == []
    assert shm.exists()


def test_shared_memory_that_another_tree_of_this_hive_maps_is_that_trees(
    home: Path, shm: Path
) -> None:
    """Such as the KV tier's, which outlives the workers; it has the name on record itself."""
    with running(_mapping(shm)):
        assert found(home, tree_of(**{shm.name: shm.stat().st_ino})) == []
        assert shm.exists()


def test_shared_memory_that_a_stranger_maps_is_told_with_its_user(home: Path, shm: Path) -> None:
    """To a hive of its own, what this test started is a stranger."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from hive.workers import journal, leftovers\n"
        "note = journal.new('llama-0', Path(sys.argv[1]), sys.argv[2])\n"
        "shm = {sys.argv[3]: int(sys.argv[4])}\n"
        "tree = journal.Tree(mark=note.mark, members=[], shm_before=frozenset(), shm=shm)\n"
        "for leak in leftovers.leftovers(note, tree): print(leak.kind, leak.holder, leak.how_to_clear)"
    )
    where = [str(home), MARK, shm.name, str(shm.stat().st_ino)]
    with running(_mapping(shm)) as process:
        done = subprocess.run(
            [sys.executable, "-c", code, *where], capture_output=True, text=True, check=True
        )

        assert done.stdout.startswith(f"shared_memory {shm.name} End {described(process)}")
        assert shm.exists()


def _mapping(path: Path) -> list[str]:
    code = (
        "import mmap, signal, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 4096);"
        "print(flush=True); signal.pause()"
    )
    return [*QUIET[:-1], code, str(path)]


def test_a_look_that_fails_is_told_and_keeps_no_other_from_looking(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What could not be looked at is not proved given back (R144)."""
    monkeypatch.setattr(leftovers, "UNIX_SOCKETS", Path("/proc/net/not there"))
    with caplog.at_level(logging.WARNING):
        (leak,) = found(home)

    assert (leak.kind, leak.holder) == ("socket", "unknown")
    assert "FileNotFoundError" in leak.how_to_clear
    assert "what llama-0 left as socket cannot be seen" in caplog.text
    assert not home.exists()


def test_who_cannot_be_seen_is_not_known_and_nothing_is_touched(
    home: Path, shm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No descriptor is free: whoever lives may use the rest."""
    note, tree = note_of(home), made(tree_of(**{shm.name: shm.stat().st_ino}), home)
    with running(HIVE_MARK=MARK) as process:
        with blind():
            (leak,) = leftovers.leftovers(note, tree)
        assert (leak.kind, leak.holder) == ("process", "unknown")
        assert "who lives of llama-0 cannot be seen: Too many open files" in caplog.text
        assert home.exists()
        assert shm.exists()
        (leak,) = leftovers.leftovers(note, tree)
        assert leak.holder == described(process)


def test_a_home_that_is_another_directory_now_is_told_and_not_removed(home: Path) -> None:
    """As where somebody put a link to it, or another directory, in the place of one above."""
    tree = made(tree_of(), home)
    outside = home.parent.parent / "outside"
    (outside / "1").mkdir(parents=True)
    (outside / "1" / "file").touch()
    home.parent.rename(home.parent.parent / "moved")
    home.parent.symlink_to(outside)
    (leak,) = leftovers.leftovers(note_of(home), tree)

    assert (leak.kind, leak.holder) == ("directory", "w/1")
    assert (outside / "1" / "file").exists()


def test_a_home_that_is_not_on_record_is_removed_only_as_it_was_made(home: Path) -> None:
    """Nothing was started in it yet."""
    (home / "t").mkdir()
    (home / "file").touch()
    (leak,) = leftovers.leftovers(note_of(home), NO_TREE)
    assert leak.kind == "directory"
    (home / "file").unlink()

    assert leftovers.leftovers(note_of(home), NO_TREE) == []
    assert not home.exists()


def test_after_a_boot_the_devices_number_may_be_another(home: Path) -> None:
    (home / "file").touch()
    tree = tree_of().model_copy(update={"home": (1 << 40, home.stat().st_ino)})
    note = note_of(home)
    (leak,) = leftovers.leftovers(note, tree)
    assert leak.kind == "directory"

    assert leftovers.leftovers(note.model_copy(update={"boot": "of last week"}), tree) == []
    assert not home.exists()


def test_a_guard_is_known_by_its_record_and_not_by_its_name(home: Path) -> None:
    """Anybody may have the name; where nothing is on record, nothing else is known."""
    named = Process(7, 1, 7, "S", 70, leftovers.GUARD)

    assert leftovers.is_guard(named, note_of(home))
    assert leftovers.is_guard(named._replace(name="sh"), _guarded(home, (7, 70)))
    assert not leftovers.is_guard(named, _guarded(home, (8, 80)))


def _guarded(home: Path, one: tuple[int, int]) -> Note:
    return note_of(home).model_copy(update={"guard": one})


# ── Reaping, and what is shown ──────────────────────────────────────────────────────────────────


def test_a_member_that_has_ended_and_came_to_hive_is_reaped() -> None:
    """(R146)"""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    wait_until(lambda: (p := guard.look_at(pid)) and p.state == "Z", "its end")
    zombie = guard.look_at(pid)
    assert zombie is not None
    leftovers.reap(note_of(HOME), tree_of(zombie._replace(start=zombie.start + 1)))
    assert guard.look_at(pid) is not None
    leftovers.reap(note_of(HOME), tree_of(zombie))

    assert guard.look_at(pid) is None


def test_a_member_that_lives_is_not_waited_for() -> None:
    with running() as process:
        leftovers.reap(note_of(HOME), tree_of(process))


def test_a_leak_shows_no_path(home: Path) -> None:
    """An error never does (R076)."""
    home.rmdir()
    home.symlink_to("/")
    (leak,) = found(home)

    assert leak.kind in KINDS
    assert set(leak.view()) == {"kind", "holder", "worker", "mark", "how_to_clear", "since"}
    assert str(home.parent) not in json.dumps(leak.view())


def test_a_name_that_somebody_chose_is_made_printable() -> None:
    assert described(Process(7, 1, 1, "S", 1, "a\x1b[2J\nb")) == "7 (a?[2J?b)"


def test_memory_that_only_this_process_maps_is_nobodys_but_its_own(home: Path, shm: Path) -> None:
    """hive maps no engine's memory; whoever does is told."""
    with shm.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        (leak,) = found(home, tree_of(**{shm.name: shm.stat().st_ino}))

        assert leak.kind == "shared_memory"
        assert shm.exists()

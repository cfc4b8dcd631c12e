"""The guard's own means, on real processes and files; whole trees are in test_process."""

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.workers import cgroup, guard
from hive.workers.guard import Group, Log, OomKills, Process, Record
from tests.patience import short_directory, wait_until
from tests.workers.blindness import blind


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing until it is ended."""
    with subprocess.Popen(["sleep", "600"], env={"HIVE_MARK": "sleepy"}) as process:
        # Until the exec is done its environment and name are still ours.
        wait_until(lambda: guard.mark_of(process.pid) == "sleepy", "sleep to run")
        yield process
        process.kill()


def seen(pid: int) -> Process:
    process = guard.look_at(pid)
    assert process is not None
    return process


# ── Looking ─────────────────────────────────────────────────────────────────────────────────────


def test_a_process_is_described_as_the_kernel_does(sleeper: subprocess.Popen[bytes]) -> None:
    process = seen(sleeper.pid)

    assert process.ppid == os.getpid()
    assert process.session == os.getsid(0)
    assert process.state in "SRD"
    assert process.name == "sleep"
    assert process.pid in [child.pid for child in guard.descendants(os.getpid())]


def test_a_name_with_brackets_and_spaces_is_read_whole() -> None:
    code = "open('/proc/self/comm', 'w').write('a) R (b c'); print(flush=True); input()"
    command = [sys.executable, "-I", "-S", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        found = seen(process.pid)
        process.kill()

    assert found.name == "a) R (b c"
    assert found.ppid == os.getpid()


def test_what_is_gone_is_nothing() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()

    assert guard.look_at(process.pid) is None
    assert guard.mark_of(process.pid) is None
    assert guard.shared_memory(process.pid) == set()


def test_a_mark_is_read_from_the_environment_alone(sleeper: subprocess.Popen[bytes]) -> None:
    assert guard.mark_of(sleeper.pid) == "sleepy"
    with subprocess.Popen(["sleep", "600"], env={"XHIVE_MARK": "no"}) as other:
        wait_until(lambda: seen(other.pid).name == "sleep", "sleep to run")
        assert guard.mark_of(other.pid) is None
        other.kill()


def test_descendants_are_found_over_generations() -> None:
    with subprocess.Popen(["sh", "-c", "sh -c 'sleep 600; :'; :"], start_new_session=True) as top:
        wait_until(
            lambda: [below.name for below in guard.descendants(top.pid)] == ["sh", "sleep"],
            "child and grandchild",
        )
        os.killpg(top.pid, signal.SIGKILL)


# ── Signals ─────────────────────────────────────────────────────────────────────────────────────


def test_a_stranger_that_got_the_pid_is_never_signalled(sleeper: subprocess.Popen[bytes]) -> None:
    """Who a process is, is its pid and its start together."""
    process = seen(sleeper.pid)
    guard.send_signal(process._replace(start=process.start + 1), signal.SIGKILL)
    guard.send_signal(process, signal.SIGTERM)

    assert sleeper.wait(5) == -signal.SIGTERM


def test_signalling_what_is_gone_does_nothing() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()

    guard.send_signal(Process(process.pid, 1, 1, "S", 1, "true"), signal.SIGKILL)


def test_a_stopped_process_is_woken_to_end(sleeper: subprocess.Popen[bytes]) -> None:
    """TERM alone would wait until somebody continues it."""
    sleeper.send_signal(signal.SIGSTOP)
    wait_until(lambda: seen(sleeper.pid).state == "T", "the process to stop")
    guard.ask_to_end(seen(sleeper.pid))

    assert sleeper.wait(5) == -signal.SIGTERM


def test_pythons_resource_tracker_is_spared_for_a_moment() -> None:
    """It alone knows some names in /dev/shm, and removes them when the others are gone."""
    code = "import sys; print(flush=True); input()"
    command = [sys.executable, "-I", "-S", "-c", code, "multiprocessing.resource_tracker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracker:
        assert tracker.stdout
        tracker.stdout.readline()

        assert not guard.kill(seen(tracker.pid), 0.0)
        assert tracker.poll() is None
        assert guard.kill(seen(tracker.pid), guard.TRACKER_S)
        assert tracker.wait(5) == -signal.SIGKILL


def test_a_process_that_will_not_go_is_described_for_the_operator(
    sleeper: subprocess.Popen[bytes],
) -> None:
    assert guard.describe(seen(sleeper.pid)).keys() == {"pid", "name", "state", "wchan"}


def test_how_a_process_ended_is_known_until_it_is_reaped(sleeper: subprocess.Popen[bytes]) -> None:
    assert guard.ended_by(sleeper.pid) is None
    sleeper.send_signal(signal.SIGKILL)
    wait_until(lambda: seen(sleeper.pid).state == "Z", "the end")

    assert guard.ended_by(sleeper.pid) == signal.SIGKILL
    sleeper.wait()
    assert guard.ended_by(sleeper.pid) is None


def test_an_exit_is_no_signal() -> None:
    with subprocess.Popen(["sh", "-c", "exit 9"]) as process:
        wait_until(lambda: seen(process.pid).state == "Z", "the end")
        assert guard.ended_by(process.pid) == 0


# ── Control groups ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def group() -> Iterator[Group]:
    """A control group of this test's own."""
    parent = cgroup.find()
    if parent is None:
        pytest.skip("no writable cgroup v2 with cgroup.kill")
    made = cgroup.make(parent / f"hive-test{os.getpid()}")
    yield made
    made.kill()
    wait_until(lambda: not made.is_populated(), "the group to be empty")
    made.remove()


def test_a_group_knows_and_kills_its_members(
    group: Group, sleeper: subprocess.Popen[bytes]
) -> None:
    assert (group.pids(), group.is_populated()) == (set(), False)
    assert repr(group) == f"<Group {group.path} empty>"
    guard.tell_kernel(group.path / "cgroup.procs", str(sleeper.pid))
    assert (group.pids(), group.is_populated()) == ({sleeper.pid}, True)
    assert repr(group).endswith(" populated>")

    group.kill()
    assert sleeper.wait(5) == -signal.SIGKILL
    assert (group.pids(), group.is_populated()) == (set(), False)


def test_who_joins_takes_what_it_starts_along(group: Group) -> None:
    code = (
        "import subprocess, sys; from hive.workers.guard import Group; Group(sys.argv[1]).join(); "
        "print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(group.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        inside = group.pids()
        group.kill()

    assert inside == {process.pid, child}
    assert process.returncode == -signal.SIGKILL


def test_members_in_groups_of_their_own_making_are_members(
    group: Group, sleeper: subprocess.Popen[bytes]
) -> None:
    """Killed with the others, and their groups removed with the group."""
    inner = group.path / "a" / "b"
    inner.mkdir(parents=True)
    guard.tell_kernel(inner / "cgroup.procs", str(sleeper.pid))
    assert group.pids() == {sleeper.pid}
    group.remove()
    assert inner.exists()

    group.kill()
    assert sleeper.wait(5) == -signal.SIGKILL
    wait_until(lambda: not group.is_populated(), "the group to be empty")
    group.remove()
    assert not group.path.exists()


def test_a_member_of_the_group_belongs_to_the_tree_whoever_its_parent_is(
    group: Group, sleeper: subprocess.Popen[bytes]
) -> None:
    nobody = 1 << 30
    assert guard.members_of(nobody, group) == []
    guard.tell_kernel(group.path / "cgroup.procs", str(sleeper.pid))

    assert [process.pid for process in guard.members_of(nobody, group)] == [sleeper.pid]
    assert guard.members_of(nobody, None) == []
    # It is counted once, although it is below us, too.
    pids = [process.pid for process in guard.members_of(os.getpid(), group)]
    assert pids.count(sleeper.pid) == 1


def test_a_group_that_is_gone_has_nobody(tmp_path: Path) -> None:
    gone = Group(tmp_path / "gone")
    gone.join()
    gone.kill()
    gone.remove()

    assert (gone.pids(), gone.is_populated()) == (set(), False)
    with pytest.raises(FileNotFoundError):
        guard.tell_kernel(gone.path / "cgroup.kill", "1")


# ── Killed for memory ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """What the group around a tree's own would count, as the kernel writes it."""
    (tmp_path / "hive" / "hive-1").mkdir(parents=True)
    events = tmp_path / "hive" / "memory.events"
    events.write_text("low 0\nhigh 0\nmax 4\noom 3\noom_kill 2\noom_group_kill 9\n")
    return events


def count(events: Path, number: int) -> None:
    events.write_text(f"oom 7\noom_kill {number}\noom_group_kill 9\n")


def test_the_nearest_group_with_the_controller_counts(counted: Path) -> None:
    kills = OomKills(Group(counted.parent / "hive-1"))
    assert kills.path == counted
    assert not kills.any_lately()
    count(counted, 3)
    assert kills.any_lately()


def test_what_was_killed_long_ago_is_no_reason_now(counted: Path) -> None:
    kills = OomKills(Group(counted.parent / "hive-1"))
    began = kills.seen[0][0]
    count(counted, 3)
    kills.look(began + guard.OOM_S)
    assert kills.any_lately()
    kills.look(began + guard.OOM_S + 1)

    assert not kills.any_lately()
    assert len(kills.seen) <= 2


def test_without_a_group_the_host_counts() -> None:
    kills = OomKills(None)

    assert kills.path == Path("/proc/vmstat")
    assert kills.seen[0][1] == kills._count()


def test_a_count_that_cannot_be_read_is_no_reason(counted: Path) -> None:
    kills = OomKills(Group(counted.parent / "hive-1"))
    counted.unlink()

    assert not kills.any_lately()


# ── Shared memory ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def shm() -> Iterator[Path]:
    """A file in /dev/shm."""
    path = Path(guard.SHM) / f"hivetest_{os.getpid()}"
    path.write_bytes(bytes(4096))
    yield path
    path.unlink(missing_ok=True)


def holds(path: Path, *, written: bool = False) -> bool:
    return path.stat().st_ino in guard.shared_memory(os.getpid(), written=written)


def test_shared_memory_is_found_by_who_maps_it(shm: Path) -> None:
    with shm.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4096)
    with mapped:
        assert holds(shm)
        assert holds(shm, written=True)
    assert not holds(shm)


def test_shared_memory_is_found_by_who_has_it_open(shm: Path) -> None:
    with shm.open("r+b"):
        assert holds(shm, written=True)
    with shm.open("rb"):
        assert holds(shm)


def test_who_only_reads_shared_memory_does_not_write_it(shm: Path) -> None:
    """Weights and datasets lie there, too."""
    with shm.open("rb") as file, mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ):
        assert not holds(shm, written=True)
    with shm.open("rb") as file, mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_COPY):
        assert holds(shm)
        assert not holds(shm, written=True)


def test_what_a_process_writes_is_its_own_if_it_was_not_there_before(shm: Path) -> None:
    me, inode = seen(os.getpid()), shm.stat().st_ino
    with shm.open("r+b"):
        assert guard.written_by([me], frozenset()) == {shm.name: inode}
        assert guard.written_by([me], {inode}) == {}
        assert guard.written_by([me], None) == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_file_is_never_ours(shm: Path) -> None:
    os.chown(shm, 65534, -1)
    inode = shm.stat().st_ino
    with shm.open("r+b"):
        assert guard.written_by([seen(os.getpid())], frozenset()) == {}
    assert guard.remove_shared_memory({shm.name: inode}) == []
    assert shm.exists()


def test_what_lies_in_a_directory_of_shared_memory_is_never_ours(shm: Path) -> None:
    directory = shm.with_name(f"{shm.name}-model")
    directory.mkdir()
    path = directory / "model.safetensors"
    try:
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            assert guard.written_by([seen(os.getpid())], frozenset()) == {}
        name = f"{directory.name}/{path.name}"
        assert guard.remove_shared_memory({name: path.stat().st_ino}) == []
        assert path.exists()
    finally:
        path.unlink()
        directory.rmdir()


def test_a_link_in_the_place_of_shared_memory_stays(shm: Path, tmp_path: Path) -> None:
    shm.unlink()
    shm.symlink_to(tmp_path)

    assert guard.remove_shared_memory({shm.name: tmp_path.stat().st_ino}) == []
    assert guard.remove_shared_memory({shm.name: shm.lstat().st_ino}) == []
    assert shm.is_symlink()


def test_shared_memory_that_somebody_has_open_stays(shm: Path) -> None:
    with shm.open("rb"):
        assert guard.remove_shared_memory({shm.name: shm.stat().st_ino}) == []
    assert shm.exists()


# ── Nobody can look ─────────────────────────────────────────────────────────────────────────────


def test_who_cannot_look_does_not_say_that_nothing_is_there(shm: Path, group: Group) -> None:
    """No descriptor is free: a process that was not seen is not gone."""
    me, inode = os.getpid(), shm.stat().st_ino
    looks: tuple[Callable[[], object], ...] = (
        lambda: guard.look_at(me),
        lambda: list(guard.every_process()),
        lambda: guard.descendants(me),
        lambda: guard.mark_of(me),
        lambda: guard.shared_memory(me),
        lambda: guard.remove_shared_memory({shm.name: inode}),
        lambda: guard.is_resource_tracker(me),
        group.pids,
        group.is_populated,
        lambda: group.held(me),
    )
    with blind():
        for look in looks:
            with pytest.raises(OSError, match="Too many open files"):
                look()
    assert shm.exists()


# ── The home ────────────────────────────────────────────────────────────────────────────────────


def made(home: Path) -> tuple[int, int]:
    return home.stat().st_dev, home.stat().st_ino


def test_a_home_is_removed_with_all_that_is_in_it(tmp_path: Path) -> None:
    home, outside = tmp_path / "1", tmp_path / "outside"
    (home / "t" / "deep").mkdir(parents=True)
    (home / "t" / "deep" / "file").touch()
    outside.mkdir()
    (outside / "file").touch()
    (home / "link").symlink_to(outside)
    os.mkfifo(home / "pipe")
    guard.remove_home(home, made(home))

    assert not home.exists()
    assert (outside / "file").exists()


def test_another_directory_in_the_homes_place_is_not_removed(tmp_path: Path) -> None:
    home, other = tmp_path / "w" / "1", tmp_path / "other"
    home.mkdir(parents=True)
    before = made(home)
    (other / "1").mkdir(parents=True)
    (other / "1" / "file").touch()
    home.rename(tmp_path / "moved")
    home.symlink_to(other)
    guard.remove_home(home, before)
    assert home.is_symlink()

    home.unlink()
    home.parent.rmdir()
    home.parent.symlink_to(other)
    guard.remove_home(home, before)
    guard.remove_home(tmp_path / "gone", before)
    assert (other / "1" / "file").exists()


def test_what_is_mounted_in_a_home_is_not_emptied(tmp_path: Path) -> None:
    there = tmp_path / "1" / "a mount"
    there.mkdir(parents=True)
    mounting = ["mount", "-t", "tmpfs", "none", str(there)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (there / "file").touch()
        guard.remove_home(tmp_path / "1", made(tmp_path / "1"))
        assert (there / "file").exists()
    finally:
        subprocess.run(["umount", str(there)], check=True)
    guard.remove_home(tmp_path / "1", made(tmp_path / "1"))
    assert not (tmp_path / "1").exists()


# ── Shared memory, recorded ─────────────────────────────────────────────────────────────────────


def test_recorded_shared_memory_that_nobody_maps_is_removed(shm: Path) -> None:
    assert guard.remove_shared_memory({shm.name: shm.stat().st_ino}) == [shm.name]
    assert not shm.exists()


def test_shared_memory_that_somebody_maps_stays(shm: Path) -> None:
    with shm.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert guard.remove_shared_memory({shm.name: shm.stat().st_ino}) == []
    assert shm.exists()


def test_another_file_of_the_same_name_stays(shm: Path) -> None:
    assert guard.remove_shared_memory({shm.name: shm.stat().st_ino + 1}) == []
    assert shm.exists()


def test_a_recorded_name_that_is_gone_is_no_error() -> None:
    assert guard.remove_shared_memory({"hivetest_never_there": 1}) == []
    assert guard.remove_shared_memory({}) == []


def test_a_semaphore_is_found_although_its_name_changed() -> None:
    """glibc maps it under another name that it deletes: Python's locks, and vLLM's."""
    code = (
        "import multiprocessing as m; lock = m.get_context('spawn').Lock(); "
        "print(lock._semlock.name, flush=True); input()"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        name = f"sem.{process.stdout.readline().decode().strip().removeprefix('/')}"
        found = guard.shared_memory(process.pid)
        inode = Path(guard.SHM, name).stat().st_ino
        assert process.stdin
        process.stdin.close()

    assert inode in found


# ── The log ─────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.binary(min_size=1, max_size=100), max_size=60), st.integers(0, 4))
def test_a_log_is_bounded_and_keeps_the_newest(texts: list[bytes], keep: int) -> None:
    """Whatever an engine prints, it fills no disk."""
    most = 256
    with short_directory() as directory:
        log = Log(str(directory / "log"), most, keep)
        for text in texts:
            log.write(text)
        os.close(log.fd)
        files = sorted(directory.iterdir(), key=lambda path: path.suffix, reverse=True)
        sizes = [path.stat().st_size for path in files]
        kept = b"".join(path.read_bytes() for path in files)

    assert len(files) <= keep + 1
    assert b"".join(texts).endswith(kept)
    if keep:
        assert all(size <= most for size in sizes)
        assert len(kept) >= min(sum(map(len, texts)), most - 100)


def test_a_log_goes_on_where_an_earlier_start_ended(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for text in (b"one\n", b"two\n"):
        log = Log(str(path), 100, 1)
        log.write(text)
        os.close(log.fd)

    assert path.read_bytes() == b"one\ntwo\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError, match="symbolic links"):
        Log(str(tmp_path / "log"), 100, 1)


def test_a_log_is_no_pipe(tmp_path: Path) -> None:
    """Whoever writes into one waits for whoever does not read."""
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(OSError, match="it is a pipe"):
            Log(str(tmp_path / "log"), 100, 1)
    finally:
        os.close(reader)


def test_a_log_that_cannot_be_written_holds_nobody_up() -> None:
    """A full disk costs log lines, never the engine."""
    log = Log("/dev/full", 10**9, 1)
    log.write(b"lost\n")
    os.close(log.fd)


def recorded_in(directory: Path) -> dict[str, Any]:
    """What of a launch goes into the record."""
    record = str(directory / "tree.json")
    return {"record": record, "mark": "a mark", "cgroup": None, "made": [1, 2]}


# ── The record ──────────────────────────────────────────────────────────────────────────────────


def test_the_record_says_who_belongs_to_the_tree_and_what_it_writes(
    tmp_path: Path, shm: Path
) -> None:
    before = shm.with_name(f"{shm.name}-dataset")
    before.touch()
    shm.unlink()
    try:
        record = Record(recorded_in(tmp_path))
        shm.write_bytes(bytes(4096))
        me = seen(os.getpid())
        with before.open("r+b"), shm.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            record.update([me])
        record.update([me])
        content = json.loads((tmp_path / "tree.json").read_text())

        assert content["mark"] == "a mark"
        assert content["guard"] == os.getpid()
        assert content["members"] == [[me.pid, me.start]]
        assert content["cgroup"] is None
        assert content["home"] == [1, 2]
        assert content["shm"] == {shm.name: shm.stat().st_ino}
        assert before.stat().st_ino in content["shm_before"]
        assert os.listdir(tmp_path) == ["tree.json"]
    finally:
        before.unlink()


def test_a_name_that_is_gone_leaves_the_record(tmp_path: Path, shm: Path) -> None:
    """Else it would grow for as long as the engine lives."""
    shm.unlink()
    record = Record(recorded_in(tmp_path))
    shm.touch()
    with shm.open("r+b"):
        record.update([seen(os.getpid())])
    assert record.shm == {shm.name: shm.stat().st_ino}
    shm.unlink()
    record.update([])

    assert json.loads((tmp_path / "tree.json").read_text())["shm"] == {}


def test_the_record_is_written_only_when_something_changed(tmp_path: Path) -> None:
    path = tmp_path / "tree.json"
    record = Record(recorded_in(tmp_path))
    record.update([])
    before = path.stat().st_ino
    record.update([])
    assert path.stat().st_ino == before

    record.update([seen(os.getpid())])
    assert json.loads(path.read_text())["members"]


def test_shared_memory_that_is_mapped_later_is_recorded_then(tmp_path: Path, shm: Path) -> None:
    shm.unlink()
    record = Record(recorded_in(tmp_path))
    record.update([seen(os.getpid())])
    shm.write_bytes(bytes(4096))
    with shm.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        record.update([seen(os.getpid())])

    assert shm.name in json.loads((tmp_path / "tree.json").read_text())["shm"]


def test_a_record_that_cannot_be_written_is_no_reason_to_stop() -> None:
    Record(recorded_in(Path("/proc/nowhere"))).update([])


# ── The program ─────────────────────────────────────────────────────────────────────────────────


def test_a_guard_whose_hive_dies_before_the_launch_just_ends() -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", "-S", guard.__file__, str(theirs.fileno())]
    with theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
        ours.close()
        theirs.close()
        assert process.wait(5) == 0


def test_the_guard_needs_nothing_but_the_standard_library() -> None:
    """It is started without site-packages, and must stay small."""
    code = (
        "import runpy, sys; before = set(sys.modules); "
        "runpy.run_path(sys.argv[1], run_name='guard'); "
        "print(*sorted(m.partition('.')[0] for m in set(sys.modules) - before))"
    )
    command = [sys.executable, "-I", "-S", "-c", code, guard.__file__]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert set(loaded) <= sys.stdlib_module_names


def launch_in(directory: Path, **facts: object) -> dict[str, object]:
    """What hive tells a guard to start; its home exists."""
    home = directory / "home"
    home.mkdir()
    return {
        "argv": [sys.executable, "-c", "import time; time.sleep(60)"],
        "env": {},
        "cwd": "/",
        "home": str(home),
        "made": [home.stat().st_dev, home.stat().st_ino],
        "record": str(home / "tree.json"),
        "mark": "m",
        "vital": [],
        "nice": 0,
        "log": str(directory / "log"),
        "log_bytes": 1000,
        "log_files": 1,
        "grace_s": 5,
        "kill_s": 5,
        "cgroup": None,
        **facts,
    }


def told(launch: dict[str, object], *before: str) -> list[dict[str, object]]:
    """What a guard says that is told to end at once, run by the program `before`."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        end = {"do": "end", "grace_s": launch["grace_s"]}
        ours.sendall(b"".join(json.dumps(m).encode() + b"\n" for m in (launch, end)))
        command = [*before, sys.executable, "-I", "-S", guard.__file__, str(theirs.fileno())]
        subprocess.run(command, pass_fds=[theirs.fileno()], timeout=30, check=True)
        return [json.loads(line) for line in ours.recv(65536).splitlines()]


def test_an_end_that_comes_with_the_launch_is_obeyed_too(tmp_path: Path) -> None:
    """hive may be told to stop a worker before its guard has read what to start."""
    news = told(launch_in(tmp_path))

    assert [one["event"] for one in news] == ["started", "exited", "gone"]
    assert not (tmp_path / "home").exists()


def test_a_member_that_cannot_be_seen_is_killed_and_waited_for_by_the_group(
    tmp_path: Path, group: Group, sleeper: subprocess.Popen[bytes]
) -> None:
    """In another pid namespace it has no pid that a signal could be sent to."""
    unseen = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*unseen, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no pid namespace can be made")
    guard.tell_kernel(group.path / "cgroup.procs", str(sleeper.pid))
    news = told(launch_in(tmp_path, cgroup=str(group.path), grace_s=0), *unseen)

    assert news[-1]["event"] == "gone"
    assert news[-1]["how"] == "kill"
    assert sleeper.wait(0) == -signal.SIGKILL
    assert not group.path.exists()

"""The guard's own means, on real processes and files; whole trees are in test_process."""

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.workers import guard
from hive.workers.guard import Log, Process, Record
from tests.patience import short_directory, wait_until


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
    assert guard.shared_memory(process.pid) == {}


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


# ── Shared memory ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def shm() -> Iterator[Path]:
    """A file in /dev/shm."""
    path = Path(guard.SHM) / f"hivetest_{os.getpid()}"
    path.write_bytes(bytes(4096))
    yield path
    path.unlink(missing_ok=True)


def test_shared_memory_is_found_by_who_maps_it(shm: Path) -> None:
    with shm.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert guard.shared_memory(os.getpid())[shm.name] == shm.stat().st_ino
        shm.unlink()
        assert shm.name not in guard.shared_memory(os.getpid())


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


def test_a_log_that_cannot_be_written_holds_nobody_up() -> None:
    """A full disk costs log lines, never the engine."""
    log = Log("/dev/full", 10**9, 1)
    log.write(b"lost\n")
    os.close(log.fd)


# ── The record ──────────────────────────────────────────────────────────────────────────────────


def test_the_record_says_who_belongs_to_the_tree_and_what_it_maps(
    tmp_path: Path, shm: Path
) -> None:
    record = Record(str(tmp_path / "tree.json"), "a mark")
    me = seen(os.getpid())
    with shm.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        record.update([me])
    record.update([me])
    content = json.loads((tmp_path / "tree.json").read_text())

    assert content["mark"] == "a mark"
    assert content["guard"] == os.getpid()
    assert content["members"] == [[me.pid, me.start]]
    assert content["shm"][shm.name] == shm.stat().st_ino
    assert os.listdir(tmp_path) == ["tree.json"]


def test_the_record_is_written_only_when_something_changed(tmp_path: Path) -> None:
    path = tmp_path / "tree.json"
    record = Record(str(path), "a mark")
    record.update([])
    before = path.stat().st_ino
    record.update([])
    assert path.stat().st_ino == before

    record.update([seen(os.getpid())])
    assert json.loads(path.read_text())["members"]


def test_shared_memory_that_is_mapped_later_is_recorded_then(tmp_path: Path, shm: Path) -> None:
    record = Record(str(tmp_path / "tree.json"), "a mark")
    record.update([seen(os.getpid())])
    with shm.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        record.update([seen(os.getpid())])

    assert shm.name in json.loads((tmp_path / "tree.json").read_text())["shm"]


def test_a_record_that_cannot_be_written_is_no_reason_to_stop() -> None:
    Record("/proc/nowhere/tree.json", "a mark").update([])


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


def test_an_end_that_comes_with_the_launch_is_obeyed_too(tmp_path: Path) -> None:
    """hive may be told to stop a worker before its guard has read what to start."""
    home = tmp_path / "home"
    home.mkdir()
    launch = {
        "argv": [sys.executable, "-c", "import time; time.sleep(60)"],
        "env": {},
        "cwd": "/",
        "home": str(home),
        "record": str(home / "tree.json"),
        "mark": "m",
        "vital": [],
        "nice": 0,
        "log": str(tmp_path / "log"),
        "log_bytes": 1000,
        "log_files": 1,
        "grace_s": 5,
    }
    ours, theirs = socket.socketpair()
    with ours, theirs:
        end = {"do": "end", "grace_s": 5}
        ours.sendall(b"".join(json.dumps(m).encode() + b"\n" for m in (launch, end)))
        command = [sys.executable, "-I", "-S", guard.__file__, str(theirs.fileno())]
        done = subprocess.run(command, pass_fds=[theirs.fileno()], timeout=30, check=True)
        news = [json.loads(line)["event"] for line in ours.recv(65536).splitlines()]
    assert done.returncode == 0
    assert news == ["started", "exited", "gone"]
    assert not home.exists()

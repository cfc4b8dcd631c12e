"""Process trees behind their guard, with real processes: however it ends, nothing is left."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

from hive.errors import WorkerSpawnFailed
from hive.workers import cgroup, guard, process
from hive.workers.guard import Group, Process
from hive.workers.journal import NO_TREE
from hive.workers.process import (
    Exit,
    Gone,
    Launch,
    Orphans,
    Place,
    Tree,
    adopted,
    read_record,
)
from tests.doubles.unkillable import WHY_NOT, Freezer, hierarchy
from tests.patience import awaited, short_directory, until, wait_until
from tests.workers.blindness import blind

# Engines in miniature: each says "up" once it is what its name says.
QUIET = "print('up', flush=True); signal.pause()"
DEAF = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {QUIET}"
# A grandchild in a session of its own, without a parent, deaf, and without hive's mark.
ESCAPE = f"""
if os.fork():
    os.wait()
    signal.pause()
os.setsid()
if os.fork():
    os._exit(0)
os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", {"import os, signal; " + DEAF!r}], {{}})
"""
SHARE = f"""
import mmap
file = open("/dev/shm/" + os.environ["SHM_NAME"], "w+b")
file.truncate(4096)
mapped = mmap.mmap(file.fileno(), 4096)
{QUIET}
"""
# Always another process: whoever looks at one may find it gone. Its parent stays; its life and its
# number are bounded, lest a test that fails leaves it to the host.
RUNAWAY = """
if os.fork():
    print("up", flush=True)
    signal.pause()
os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deadline = time.monotonic() + 10
while time.monotonic() < deadline:
    if os.fork():
        os._exit(0)
    time.sleep(0.01)
"""
# Out of memory, in a group that has little of it.
GREEDY = """
with open(os.environ["SMALL"] + "/cgroup.procs", "w") as members:
    members.write("0")
taken = []
while True:
    taken.append(bytearray(1 << 20))
"""
LITTER = f"""
open(os.environ["TMPDIR"] + "/litter", "w").write("x")
{QUIET}
"""


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        (directory / "w").mkdir()
        yield directory


@pytest.fixture
def subreaper() -> Iterator[None]:
    """Orphans of a killed guard come to us, as they come to hive."""
    guard.become_subreaper()
    yield
    guard.prctl(guard.PR_SET_CHILD_SUBREAPER, 0)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """The leak gate: the processes, descriptors and shared memory of before (R153)."""
    before = children(), open_files(), set(os.listdir("/dev/shm"))
    yield
    wait_until(lambda: children() <= before[0], "every process to be gone and reaped")
    assert open_files() <= before[1]
    assert {name for name in os.listdir("/dev/shm") if name.startswith("hivetest")} <= before[2]


def children() -> set[int]:
    return {process.pid for process in guard.descendants(os.getpid())}


def open_files() -> set[str]:
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


def place_in(home: Path, name: str = "1", groups: Path | None = None) -> Place:
    return Place(home / "w" / name, home / f"{name}.log", groups=groups)


def launch(place: Place, code: str, vital: Sequence[str] = (), **env: str) -> Launch:
    argv = [sys.executable, "-I", "-S", "-c", f"import os, signal, sys, time\n{code}"]
    return Launch(argv, {"HIVE_MARK": place.mark, "TMPDIR": str(place.tmp), **env}, vital)


@asynccontextmanager
async def running(one: Launch, place: Place, ups: int = 1) -> AsyncIterator[Tree]:
    """A tree of which so many processes said that they are up; ended whatever the test does."""
    tree = await Tree.spawn(one, place)
    try:
        await until(lambda: place.log.read_text().count("up\n") >= ups, "the engine to be up")
        yield tree
    finally:
        await tree.end(0)


@asynccontextmanager
async def started(place: Place, code: str, **env: str) -> AsyncIterator[Tree]:
    async with running(launch(place, code, **env), place) as tree:
        yield tree


async def named(guard_pid: int, name: str) -> Process:
    """The member of a tree that has a name."""
    found = await until(
        lambda: [p for p in guard.descendants(guard_pid) if p.name == name], f"a process {name}"
    )
    return found[0]


async def members(place: Place, count: int) -> list[list[int]]:
    """What the guard has written down, once it is `count` processes."""

    def look() -> list[list[int]]:
        with suppress(OSError, ValueError):
            found: list[list[int]] = json.loads(place.record.read_text())["members"]
            return found if len(found) == count else []
        return []

    return await until(look, f"{count} recorded members")


# ── Ordinary ends ───────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_program_that_ends_by_itself_is_reported_with_its_status(home: Path) -> None:
    place = place_in(home)
    tree = await Tree.spawn(launch(place, "print('bye'); sys.exit(3)"), place)
    exit_, gone = await tree.exited, await tree.gone

    assert exit_ == Exit(code=3)
    assert (exit_.cause, str(exit_)) == ("crashed", "exit status 3")
    assert (gone.how, gone.killed, gone.removed) == ("exit", 0, ())
    assert not place.home.exists()
    assert place.log.read_text().splitlines()[1:] == ["bye"]
    assert place.log.read_text().startswith(guard.HEADER)


@awaited
async def test_an_end_without_an_error_is_an_end_all_the_same(home: Path) -> None:
    """Status 0 unasked is a crash: the tree says what happened, the worker judges it."""
    place = place_in(home)
    tree = await Tree.spawn(launch(place, ""), place)

    assert await tree.exited == Exit(code=0)
    assert (await tree.gone).how == "exit"


@awaited
async def test_an_engine_that_dies_of_a_signal_is_reported_with_it(home: Path) -> None:
    place = place_in(home)
    tree = await Tree.spawn(launch(place, "os.kill(os.getpid(), signal.SIGSEGV)"), place)
    exit_ = await tree.exited

    assert exit_ == Exit(signal=signal.SIGSEGV)
    assert (exit_.cause, str(exit_)) == ("signal", "signal SIGSEGV")
    assert exit_.status == 128 + signal.SIGSEGV
    await tree.gone


@awaited
async def test_an_engine_that_obeys_is_ended_by_term_alone(home: Path) -> None:
    """(R051)"""
    async with started(place_in(home), QUIET) as tree:
        gone = await tree.end(10)

        assert (gone.how, gone.killed) == ("term", 0)
        assert await tree.exited == Exit(signal=signal.SIGTERM)
        assert repr(tree).endswith(" gone>")


@awaited
async def test_an_engine_that_ignores_term_is_killed_after_the_grace(home: Path) -> None:
    """The graceful way first, the kill only then (R048, R051, R146)."""
    async with started(place_in(home), DEAF) as tree:
        gone = await tree.end(0.2)

        assert (gone.how, gone.killed) == ("kill", 1)
        assert await tree.exited == Exit(signal=signal.SIGKILL)


@awaited
async def test_a_stopped_engine_is_woken_to_end(home: Path) -> None:
    async with started(place_in(home), QUIET) as tree:
        os.kill(tree.pid, signal.SIGSTOP)
        await until(lambda: (now := guard.look_at(tree.pid)) and now.state == "T", "the stop")

        assert (await tree.end(10)).how == "term"


@awaited
async def test_ending_what_is_ending_or_gone_changes_nothing(home: Path) -> None:
    """Close is idempotent (R026)."""
    async with started(place_in(home), DEAF) as tree:
        first, second = await asyncio.gather(tree.end(0.2), tree.end(60))

        assert first is second
        assert await tree.end(0) is first


@awaited
async def test_a_shorter_grace_hurries_an_end_that_has_begun(home: Path) -> None:
    async with started(place_in(home), DEAF) as tree, asyncio.TaskGroup() as tasks:
        patient = tasks.create_task(tree.end(600))
        await asyncio.sleep(0)
        assert (await tree.end(0)).how == "kill"
        assert (await patient).how == "kill"


# ── Whatever the engine leaves behind ───────────────────────────────────────────────────────────


@awaited
async def test_a_grandchild_that_left_the_session_is_ended_too(home: Path) -> None:
    """Deaf, orphaned, without hive's mark: it is the guard's child all the same (R145, R153)."""
    place = place_in(home)
    async with started(place, ESCAPE) as tree:
        assert len(await members(place, 2)) == 2
        gone = await tree.end(0.2)

        assert (gone.how, gone.killed) == ("kill", 1)


@awaited
async def test_what_a_killed_leader_leaves_is_ended_without_being_asked(home: Path) -> None:
    place = place_in(home)
    async with running(launch(place, f"os.fork(); {QUIET}"), place, ups=2) as tree:
        os.kill(tree.pid, signal.SIGKILL)

        assert await tree.exited == Exit(signal=signal.SIGKILL)
        assert (await tree.gone).how == "term"


@awaited
async def test_the_end_of_a_vital_member_is_the_engines_end(home: Path) -> None:
    """vLLM's API server outlives its core by seconds: hive does not wait for it to notice."""
    place = place_in(home)
    code = f"os.fork() or open('/proc/self/comm', 'w').write('core 7'); {QUIET}"
    async with running(launch(place, code, vital=("core",)), place, ups=2) as tree:
        core = await named(tree.guard_pid, "core 7")
        # The guard looks once a second.
        await until(lambda: _watches(tree.guard_pid, core.pid), "the guard to watch it")
        os.kill(core.pid, signal.SIGKILL)
        exit_ = await tree.exited

        assert exit_.cause == "member_lost"
        assert str(exit_) == f"its process core 7 (pid {core.pid}) ended"
        assert guard.look_at(tree.pid) is not None


@awaited
async def test_a_child_that_is_called_like_its_vital_parent_is_not_vital(home: Path) -> None:
    """It has yet to become the program that the core starts; on a busy host that takes a while."""
    place = place_in(home)
    code = f"""
if not os.fork():
    open("/proc/self/comm", "w").write("core 7")
    os.fork()
{QUIET}
"""
    async with running(launch(place, code, vital=("core",)), place, ups=3) as tree:
        core = await named(tree.guard_pid, "core 7")
        await until(lambda: guard.descendants(core.pid), "its child")
        (child,) = guard.descendants(core.pid)
        assert child.name == core.name
        await members(place, 3)  # the guard has looked at all of them
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: (now := guard.look_at(child.pid)) and now.state == "Z", "its end")
        os.kill(core.pid, signal.SIGKILL)

        assert str(await tree.exited) == f"its process core 7 (pid {core.pid}) ended"


def _watches(guard_pid: int, pid: int) -> bool:
    """Whether the guard holds a pidfd of a process."""
    for fd in os.listdir(f"/proc/{guard_pid}/fdinfo"):
        with suppress(OSError):
            if f"Pid:\t{pid}\n" in Path(f"/proc/{guard_pid}/fdinfo/{fd}").read_text():
                return True
    return False


@awaited
async def test_temporary_files_and_the_socket_go_with_the_tree(home: Path) -> None:
    """(R145)"""
    place = place_in(home)
    async with started(place, LITTER) as tree:
        assert (place.tmp / "litter").exists()
        assert place.home.stat().st_mode & 0o777 == 0o700
        await tree.end(5)

        assert not place.home.exists()


@awaited
async def test_shared_memory_that_only_the_tree_mapped_is_removed_and_named(home: Path) -> None:
    name = f"hivetest_{os.getpid()}"
    async with started(place_in(home), SHARE, SHM_NAME=name) as tree:
        gone = await tree.end(5)

        assert gone.removed == (name,)
        assert not Path("/dev/shm", name).exists()


@awaited
async def test_an_engine_has_a_session_of_its_own(home: Path) -> None:
    """So Ctrl+C in hive's terminal reaches neither it nor its guard."""
    async with started(place_in(home), QUIET) as tree:
        ours, guards, engines = (os.getsid(pid) for pid in (0, tree.guard_pid, tree.pid))
        await tree.end(5)

        assert len({ours, guards, engines}) == 3


@awaited
async def test_an_engine_inherits_no_descriptor_and_no_variable(home: Path) -> None:
    place = place_in(home)
    code = "print(sorted(os.environ)); print(*os.listdir('/proc/self/fd'))"
    tree = await Tree.spawn(launch(place, code, EXTRA="1"), place)
    await tree.gone
    _, env, files = place.log.read_text().splitlines()

    assert set(eval(env)) - {"LC_CTYPE"} == {"EXTRA", "HIVE_MARK", "TMPDIR"}
    assert set(files.split()) == {"0", "1", "2", "3"}  # 3 is the listing itself


@awaited
async def test_while_it_lives_the_tree_is_on_record(home: Path) -> None:
    """For whoever must end it when the guard is killed too (R143)."""
    place = place_in(home)
    async with started(place, SHARE, SHM_NAME=(name := f"hivetest_{os.getpid()}")) as tree:
        engine = guard.look_at(tree.pid)
        assert engine is not None
        await until(lambda: read_record(place.record).shm, "the shared memory on record")
        record = read_record(place.record)

        assert record.members == [(engine.pid, engine.start)]
        assert record.home == (place.home.stat().st_dev, place.home.stat().st_ino)
        assert record.shm == {name: Path("/dev/shm", name).stat().st_ino}
        assert json.loads(place.record.read_text())["mark"] == place.mark
        assert json.loads(place.record.read_text())["guard"] == tree.guard_pid
        await tree.end(5)


def test_a_record_that_is_not_one_is_empty(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"members": [1], "shm": {}}', '{"members": []}'):
        (tmp_path / "tree.json").write_text(text)
        assert read_record(tmp_path / "tree.json") == NO_TREE
    assert read_record(tmp_path / "gone.json") == NO_TREE


@awaited
async def test_a_flood_of_output_is_bounded_on_disk(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LOG_BYTES", 100_000)
    monkeypatch.setattr(process, "LOG_FILES", 2)
    place = place_in(home)
    code = "for n in range(20000): print('line', n, 'x' * 50)"
    tree = await Tree.spawn(launch(place, code), place)
    await tree.gone
    files = sorted(home.glob("1.log*"))

    assert [path.name for path in files] == ["1.log", "1.log.1", "1.log.2"]
    assert all(path.stat().st_size <= 100_000 for path in files)
    assert "line 19999 " in files[0].read_text().splitlines()[-1]


@awaited
async def test_semaphores_go_with_the_tree_even_when_their_keeper_is_killed(home: Path) -> None:
    """Python's resource tracker removes them; killed with the engine, it cannot (R145)."""
    place = place_in(home)
    code = f"import multiprocessing\nlock = multiprocessing.get_context('spawn').Lock()\n{QUIET}"
    async with started(place, code) as tree:
        names = await until(lambda: read_record(place.record).shm, "the semaphore on record")
        (tracker,) = (
            p.pid for p in guard.descendants(tree.pid) if guard.is_resource_tracker(p.pid)
        )
        for pid in (tracker, tree.pid):
            os.kill(pid, signal.SIGKILL)
        gone = await tree.gone

        assert gone.removed == tuple(names)
        assert [name.startswith("sem.mp-") for name in names] == [True]


# ── Killed by the kernel ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small() -> Iterator[Path]:
    """A control group with little memory, for a process to put itself into."""
    v1, v2 = hierarchy("memory"), cgroup.find()
    name = f"hivetest-{os.getpid()}"
    if v1:
        path = v1 / name
        limits = {"memory.limit_in_bytes": 64 << 20, "memory.memsw.limit_in_bytes": 64 << 20}
    elif v2 and "memory" in (v2 / "cgroup.subtree_control").read_text().split():
        path = v2 / name
        limits = {"memory.max": 64 << 20, "memory.swap.max": 0}
    else:
        pytest.skip("no writable memory controller: the kernel kills nobody for memory")
    path.mkdir()
    for limit, most in limits.items():
        if (path / limit).exists():
            (path / limit).write_text(str(most))
    yield path
    wait_until(lambda: not (path / "cgroup.procs").read_text(), "the group to be empty")
    path.rmdir()


@awaited
async def test_an_engine_that_the_kernel_kills_for_memory_is_reported_so(
    home: Path, small: Path
) -> None:
    """(EH-004b)"""
    place = place_in(home)
    tree = await Tree.spawn(launch(place, GREEDY, SMALL=str(small)), place)
    exit_ = await tree.exited

    assert exit_ == Exit(signal=signal.SIGKILL, out_of_memory=True)
    assert exit_.cause == "out_of_memory"
    assert str(exit_) == "killed by the kernel for memory (out of host RAM)"
    await tree.gone


@awaited
async def test_a_vital_member_that_the_kernel_kills_for_memory_is_named(
    home: Path, small: Path
) -> None:
    """vLLM's core takes the memory, not its API server."""
    place = place_in(home)
    code = f"""
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
if not os.fork():
    open("/proc/self/comm", "w").write("core 7")
    signal.sigwait([signal.SIGUSR1])
{indent(GREEDY, "    ")}
{QUIET}
"""
    one = launch(place, code, vital=("core",), SMALL=str(small))
    async with running(one, place) as tree:
        core = await named(tree.guard_pid, "core 7")
        await until(lambda: _watches(tree.guard_pid, core.pid), "the guard to watch it")
        os.kill(core.pid, signal.SIGUSR1)
        exit_ = await tree.exited

        assert exit_.cause == "out_of_memory"
        assert str(exit_) == (
            f"its process core 7 (pid {core.pid}) was killed by the kernel for memory "
            "(out of host RAM)"
        )


@awaited
async def test_what_hive_kills_was_not_killed_for_memory(home: Path, small: Path) -> None:
    """Although the kernel killed somebody for memory a moment ago."""
    place = place_in(home)
    code = f"""
if not os.fork():
{indent(GREEDY, "    ")}
os.wait()
{DEAF}
"""
    async with running(launch(place, code, SMALL=str(small)), place) as tree:
        assert (await tree.end(0)).how == "kill"
        assert await tree.exited == Exit(signal=signal.SIGKILL)


# ── Starts that fail ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("program", ["/nowhere/engine", "/etc/passwd", "/tmp"])
@awaited
async def test_a_program_that_cannot_be_run_fails_at_once_and_leaves_nothing(
    home: Path, program: str
) -> None:
    place, before = place_in(home), children()
    with pytest.raises(WorkerSpawnFailed) as caught:
        await Tree.spawn(Launch([program], {}), place)
    await until(lambda: not place.home.exists(), "the home to be removed")
    await until(lambda: children() <= before, "the guard's end")

    assert "could not be run" in caught.value.message
    assert caught.value.public_details == {"expected": program}


@awaited
async def test_nothing_is_left_when_a_failed_start_is_reported(home: Path) -> None:
    """What the docstring of spawn says."""
    before = children()
    left = []
    for number in range(5):
        place = place_in(home, str(number))
        with pytest.raises(WorkerSpawnFailed):
            await Tree.spawn(Launch(["/nowhere/engine"], {}), place)
        left += [path for path in (place.home,) if path.exists()]
    await until(lambda: children() <= before, "the guards' end")

    assert left == []


@awaited
async def test_a_start_that_is_cancelled_leaves_nothing(home: Path) -> None:
    """(R024)"""
    for number in range(3):
        place = place_in(home, str(number))
        spawning = asyncio.ensure_future(Tree.spawn(launch(place, QUIET), place))
        await until(place.home.exists, "the start to begin")
        spawning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await spawning

        assert not place.home.exists()


@awaited
async def test_a_log_that_cannot_be_opened_fails_the_start(home: Path, subreaper: None) -> None:
    (home / "log").mkdir()  # in the way
    place, before = Place(home / "w" / "1", home / "log"), children()
    with pytest.raises(WorkerSpawnFailed, match="Is a directory"):
        await Tree.spawn(launch(place, QUIET), place)
    await until(lambda: not place.home.exists(), "the home to be removed")
    await until(lambda: children() <= before, "the guard's end")


# ── When the guard is killed ────────────────────────────────────────────────────────────────────


@awaited
async def test_a_tree_whose_guard_is_killed_is_ended_by_hive(home: Path, subreaper: None) -> None:
    """The engine dies with its guard; what is left is adopted, ended and reaped."""
    place = place_in(home)
    async with started(place, ESCAPE) as tree:
        await members(place, 2)
        tree._grace_s = 0.2
        os.kill(tree.guard_pid, signal.SIGKILL)
        exit_, gone = await tree.exited, await tree.gone

        assert exit_ == Exit(guard_lost=True)
        assert (exit_.cause, str(exit_)) == ("guard_lost", "its guard was killed")
        assert (gone.how, gone.killed) == ("kill", 1)
        assert not place.home.exists()


@awaited
async def test_shared_memory_of_a_tree_without_a_guard_is_removed(
    home: Path, subreaper: None
) -> None:
    name = f"hivetest_{os.getpid()}"
    place = place_in(home)
    async with started(place, SHARE, SHM_NAME=name) as tree:
        await until(lambda: read_record(place.record).shm, "the shared memory on record")
        os.kill(tree.guard_pid, signal.SIGKILL)

        assert (await tree.gone).removed == (name,)


@pytest.mark.parametrize("is_guard_killed", [False, True], ids=["guard", "takeover"])
@awaited
async def test_shared_memory_that_was_there_before_stays(
    home: Path, subreaper: None, is_guard_killed: bool
) -> None:
    """Somebody's data set, even if the engine writes into it."""
    dataset = Path("/dev/shm", f"hivetest_{os.getpid()}")
    dataset.write_bytes(b"precious")
    try:
        async with started(place_in(home), SHARE, SHM_NAME=dataset.name) as tree:
            if is_guard_killed:
                os.kill(tree.guard_pid, signal.SIGKILL)

            assert (await tree.end(5)).removed == ()
            assert dataset.exists()
    finally:
        dataset.unlink()


@pytest.mark.parametrize("is_guard_killed", [False, True], ids=["guard", "takeover"])
@awaited
async def test_another_directory_in_the_homes_place_is_not_removed(
    home: Path, subreaper: None, is_guard_killed: bool
) -> None:
    """Somebody put a link to it in the place of the homes' directory."""
    place, other = replace(place_in(home), records=home), home / "other"
    (other / "1").mkdir(parents=True)
    (other / "1" / "precious").touch()
    async with started(place, QUIET) as tree:
        (home / "w").rename(home / "moved")
        (home / "w").symlink_to(other)
        if is_guard_killed:
            os.kill(tree.guard_pid, signal.SIGKILL)
        await tree.end(5)

        assert (other / "1" / "precious").exists()


@awaited
async def test_a_takeover_looks_in_a_thread(
    home: Path, subreaper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host may have many processes, and every one of them is looked at."""
    lookers: set[str] = set()

    def watched(*args: Any) -> list[Process]:
        lookers.add(threading.current_thread().name)
        return adopted(*args)

    monkeypatch.setattr(process, "adopted", watched)
    place = place_in(home)
    async with started(place, ESCAPE) as tree:
        await members(place, 2)
        tree._grace_s = 0.1
        os.kill(tree.guard_pid, signal.SIGKILL)
        await tree.gone

    assert lookers
    assert threading.main_thread().name not in lookers


def test_looking_takes_a_tenth_of_the_time() -> None:
    now = time.monotonic()

    assert process.pause_after(now) == process.LOOK_S
    assert process.pause_after(now - 0.04) == pytest.approx(0.36, abs=0.05)
    assert process.pause_after(now - 60) == process.LONGEST_PAUSE_S


def test_a_tree_that_nobody_can_see_is_not_gone(home: Path) -> None:
    """No descriptor is free when hive takes it over: what is on record is read later, too."""
    place = place_in(home)
    place.home.mkdir()
    with subprocess.Popen(["sleep", "600"]) as member:
        one = guard.look_at(member.pid)
        assert one is not None
        record = {"mark": place.mark, "members": [[one.pid, one.start]], "shm": {}}
        place.record.write_text(json.dumps(record))
        orphans = Orphans(place, None, grace_s=0.0, kill_s=5.0)
        with blind(), pytest.raises(OSError, match="Too many open files"):
            orphans.look()
        assert orphans.gone is None
        assert member.poll() is None
        orphans.look()
        assert member.wait(5) == -signal.SIGKILL
        orphans.look()

    assert orphans.gone == Gone("kill", 1, ())


@awaited
async def test_a_guard_that_does_not_answer_is_killed_and_the_tree_ended(
    home: Path, subreaper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped guard holds nobody up for ever (R048)."""
    monkeypatch.setattr(process, "ANSWER_S", 0.1)
    place = place_in(home)
    async with running(replace(launch(place, DEAF), kill_s=0.2), place) as tree:
        os.kill(tree.guard_pid, signal.SIGSTOP)
        gone = await tree.end(0.1)

        assert await tree.exited == Exit(guard_lost=True)
        assert gone.how in ("term", "kill")  # the engine dies with its guard


@awaited
async def test_a_guard_that_is_told_to_end_ends_its_tree(home: Path) -> None:
    """As when the service manager ends everything at once."""
    async with started(place_in(home), QUIET) as tree:
        os.kill(tree.guard_pid, signal.SIGTERM)

        assert await tree.exited == Exit(signal=signal.SIGTERM)
        assert (await tree.gone).how == "term"


# ── In a control group ──────────────────────────────────────────────────────────────────────────


def group_of(place: Place) -> Path:
    assert place.group
    return place.group


@contextmanager
def somebody() -> Iterator[Process]:
    """A process that is neither ours nor the tree's to reap, and will be asked to end."""
    with subprocess.Popen(["sh", "-c", "sleep 600; exit $?"]) as parent:
        (child,) = wait_until(
            lambda: [p for p in guard.descendants(parent.pid) if p.name == "sleep"], "the sleep"
        )
        try:
            yield child
            assert parent.wait(10) == 128 + signal.SIGTERM
        finally:
            guard.send_signal(child, signal.SIGKILL)


@pytest.fixture
def groups() -> Path:
    """Where groups can be made; what this test makes there is gone after it."""
    found = cgroup.find()
    if found is None:
        pytest.skip("no writable cgroup v2 with cgroup.kill")
    return found


@awaited
async def test_an_engine_is_in_its_group_and_its_guard_is_not(home: Path, groups: Path) -> None:
    place = place_in(home, groups=groups)
    async with running(launch(place, f"os.fork(); {QUIET}"), place, ups=2) as tree:
        group = Group(group_of(place))
        assert group.pids() == {p.pid for p in guard.descendants(tree.guard_pid)}
        assert len(group.pids()) == 2
        assert (await tree.end(5)).how == "term"

        assert not group_of(place).exists()


@awaited
async def test_an_engine_that_ends_by_itself_leaves_no_group(home: Path, groups: Path) -> None:
    place = place_in(home, groups=groups)
    tree = await Tree.spawn(launch(place, "sys.exit(3)"), place)

    assert await tree.exited == Exit(code=3)
    assert (await tree.gone).how == "exit"
    assert not group_of(place).exists()


@awaited
async def test_an_engine_that_runs_away_from_every_look_is_killed_by_its_group(
    home: Path, groups: Path
) -> None:
    """A process that is always another one is never there when its signal comes."""
    place = place_in(home, groups=groups)
    async with started(place, RUNAWAY) as tree:
        assert (await tree.end(0)).how == "kill"
        assert not group_of(place).exists()


@awaited
async def test_groups_that_an_engine_makes_hold_nobody_up(home: Path, groups: Path) -> None:
    """They are in its own group, and go with it."""
    place = place_in(home, groups=groups)
    code = f"""
os.makedirs({str(place.group)!r} + "/a/b")
with open({str(place.group)!r} + "/a/b/cgroup.procs", "w") as members:
    members.write("0")
{DEAF}
"""
    async with started(place, code) as tree:
        assert (await tree.end(0.1)).how == "kill"
        assert not group_of(place).exists()


@awaited
async def test_whoever_is_in_the_group_is_ended_with_it(home: Path, groups: Path) -> None:
    """No descendant of the guard and without a mark: as after a guard's death."""
    place = place_in(home, groups=groups)
    with somebody() as other:
        async with started(place, QUIET) as tree:
            guard.tell_kernel(group_of(place) / "cgroup.procs", str(other.pid))
            assert (await tree.end(10)).how == "term"
            assert not group_of(place).exists()


@pytest.mark.parametrize("program", ["/nowhere/engine", "/etc/passwd"])
@awaited
async def test_a_start_that_fails_leaves_no_group(home: Path, groups: Path, program: str) -> None:
    place, before = place_in(home, groups=groups), children()
    with pytest.raises(WorkerSpawnFailed):
        await Tree.spawn(Launch([program], {}), place)
    await until(lambda: not place.home.exists(), "the home to be removed")
    await until(lambda: children() <= before, "the guard's end")

    assert not group_of(place).exists()


@awaited
async def test_a_guard_that_cannot_write_its_log_leaves_no_group(
    home: Path, groups: Path, subreaper: None
) -> None:
    (home / "1.log").mkdir()  # in the way
    place, before = place_in(home, groups=groups), children()
    with pytest.raises(WorkerSpawnFailed, match="Is a directory"):
        await Tree.spawn(launch(place, QUIET), place)
    await until(lambda: children() <= before, "the guard's end")

    assert not group_of(place).exists()


@awaited
async def test_where_no_group_can_be_made_the_tree_runs_without(home: Path) -> None:
    place = place_in(home, groups=home / "nowhere")
    async with started(place, ESCAPE) as tree:
        await members(place, 2)

        assert (await tree.end(0.1)).how == "kill"


@awaited
async def test_a_tree_whose_guard_is_killed_is_ended_by_its_group_too(
    home: Path, groups: Path, subreaper: None
) -> None:
    """Here the member is in nobody's record, bears no mark and has another parent."""
    place = place_in(home, groups=groups)
    with somebody() as other:
        async with started(place, RUNAWAY) as tree:
            guard.tell_kernel(group_of(place) / "cgroup.procs", str(other.pid))
            tree._grace_s = 0.2
            os.kill(tree.guard_pid, signal.SIGKILL)
            assert (await tree.gone).how == "kill"
            assert not group_of(place).exists()


# ── What survives SIGKILL ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def freezer() -> Iterator[Freezer]:
    if not Freezer.is_available():
        pytest.skip(WHY_NOT)
    with Freezer() as freezer:
        yield freezer


@pytest.fixture(params=["in a group", "without a group"])
def place(request: pytest.FixtureRequest, home: Path) -> Place:
    return place_in(home, groups=cgroup.find() if request.param == "in a group" else None)


@asynccontextmanager
async def beating() -> AsyncIterator[list[float]]:
    """How late the event loop was, each time that it was to do something."""
    late: list[float] = []

    async def beat() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.01
            await asyncio.sleep(0.01)
            late.append(loop.time() - due)

    task = asyncio.ensure_future(beat())
    yield late
    task.cancel()


@awaited
async def test_a_process_that_survives_sigkill_is_reported_and_waited_for_by_nobody(
    place: Place, freezer: Freezer
) -> None:
    """Nothing of it is given back while it lives; when the kernel lets it go, all is (R146)."""
    async with running(replace(launch(place, QUIET), kill_s=0.2), place) as tree, beating() as late:
        freezer.freeze(tree.pid)
        began = time.monotonic()
        assert await tree.end_or_survive(0.1) is None
        took_s = time.monotonic() - began
        (survivor,) = await tree.survived

        assert 0.3 <= took_s < 0.3 + guard.TICK_S + process.ANSWER_S
        assert (survivor["pid"], survivor["state"]) == (tree.pid, "D")
        assert survivor["name"] == "python" or survivor["name"].startswith("python3")
        assert survivor["wchan"]
        assert not tree.gone.done()
        assert place.home.exists()
        assert repr(tree).endswith(" alive>")
        assert max(late) < 1

        freezer.thaw()
        assert (await tree.gone).how == "kill"
        assert await tree.exited == Exit(signal=signal.SIGKILL)
    assert not place.home.exists()
    assert not (place.group and place.group.exists())


@awaited
async def test_only_who_survives_sigkill_is_named(place: Place, freezer: Freezer) -> None:
    one = replace(launch(place, f"os.fork(); {QUIET}"), kill_s=0.2)
    async with running(one, place, ups=2) as tree:
        freezer.freeze(tree.pid)
        assert await tree.end_or_survive(0) is None

        # Its child is dead, and only waits to be reaped by it.
        assert [child.state for child in guard.descendants(tree.pid)] == ["Z"]
        assert [member["pid"] for member in await tree.survived] == [tree.pid]
        assert await tree.end_or_survive(0) is None  # at once: it is known
        freezer.thaw()
        await tree.gone


@awaited
async def test_what_survives_its_guard_and_sigkill_is_reported_by_hive(
    place: Place, freezer: Freezer, subreaper: None
) -> None:
    async with running(replace(launch(place, QUIET), kill_s=0.2), place) as tree, beating() as late:
        await members(place, 1)
        freezer.freeze(tree.pid)
        tree._grace_s = 0.1
        os.kill(tree.guard_pid, signal.SIGKILL)
        (survivor,) = await tree.survived

        assert (survivor["pid"], survivor["state"]) == (tree.pid, "D")
        assert await tree.exited == Exit(guard_lost=True)
        assert max(late) < 1
        freezer.thaw()
        assert (await tree.gone).how == "kill"
    assert not place.home.exists()
    assert not (place.group and place.group.exists())


# ── When hive is killed ─────────────────────────────────────────────────────────────────────────

HIVE = """
import asyncio, sys
from pathlib import Path
from hive.workers.process import Launch, Place, Tree

async def main():
    groups = Path(sys.argv[6]) if sys.argv[6] else None
    place = Place(Path(sys.argv[1]), Path(sys.argv[2]), mark=sys.argv[3], groups=groups)
    env = {"HIVE_MARK": place.mark, "SHM_NAME": sys.argv[5]}
    tree = await Tree.spawn(Launch([sys.executable, "-I", "-S", "-c", sys.argv[4]], env), place, 0.1)
    print(tree.guard_pid, flush=True)
    await tree.gone

asyncio.run(main())
"""


class OtherHive:
    """A hive in a process of its own, to be killed; its orphans come to us and are reaped."""

    def __init__(self, place: Place, code: str) -> None:
        self.place = place
        self.shm = f"hivetest_{os.getpid()}"
        code = f"import os, signal, sys, time\n{code}"
        command = [sys.executable, "-c", HIVE, *map(str, (place.home, place.log)), place.mark]
        command += [code, self.shm, str(place.groups or "")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout
        self.guard_pid = int(self.process.stdout.readline())
        wait_until(lambda: "up\n" in place.log.read_text(), "the engine to be up")

    def tree(self) -> list[Process]:
        """Those who live; the dead ones are reaped, as init would."""
        known = [p for p in guard.every_process() if guard.mark_of(p.pid) == self.place.mark]
        for child in guard.descendants(os.getpid()):
            if child.state == "Z" and child.pid != self.process.pid:
                with suppress(ChildProcessError):
                    os.waitpid(child.pid, os.WNOHANG)
        return known

    def is_gone(self) -> bool:
        return not self.tree() and guard.look_at(self.guard_pid) is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


def test_when_hive_is_killed_the_guard_ends_the_tree(home: Path, subreaper: None) -> None:
    """(R153)"""
    hive = OtherHive(place_in(home), ESCAPE)
    hive.kill()
    wait_until(lambda: not hive.place.home.exists(), "the home to be removed")
    wait_until(hive.is_gone, "the tree's end")


def test_when_hive_is_killed_the_group_goes_too(home: Path, groups: Path, subreaper: None) -> None:
    hive = OtherHive(place_in(home, groups=groups), RUNAWAY)
    hive.kill()
    wait_until(lambda: not hive.place.home.exists(), "the home to be removed")
    wait_until(hive.is_gone, "the tree's end")

    assert not group_of(hive.place).exists()

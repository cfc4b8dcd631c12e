"""Steps about what an engine may leave: processes that cannot be killed, leaks, the journal."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_bdd import given, parsers, then, when

from hive.workers import cgroup, guard
from steps import leaks
from steps.driver import Hive
from steps.story import WORKER, Story, is_alive
from steps.waiting import must, until
from tests.doubles.unkillable import WHY_NOT, Freezer, hierarchy

LATEST_S = 0.7  # a probe that is answered later than this was kept waiting
SMALL_BYTES = 64 << 20  # what an engine may have before the kernel kills it
NO_GROUPS = "no writable control groups (v2): the kernel holds no engine's processes together"
NO_LIMIT = "no writable memory controller: the kernel kills nobody for memory"
# Another program: it maps the files that are named, says so, and ends with its input.
OTHER = """
import mmap, sys
files = [open(path, "r+b") for path in sys.argv[1:]]
held = [mmap.mmap(file.fileno(), 0) for file in files]
print("up", flush=True)
sys.stdin.read()
"""
MARK = "0123456789abcdef"  # of a start that hive never made


# ── a process that the kernel holds ─────────────────────────────────────────────────────────────


@pytest.fixture
def freezer(story: Story) -> Iterator[Freezer]:
    """Everything is thawed, and given back, before hive is stopped and looked at."""
    if not Freezer.is_available():
        pytest.skip(WHY_NOT)
    with Freezer() as freezer:
        yield freezer
    if story.hive.process and story.hive.process.poll() is None:
        must(lambda: story.hive.worker(WORKER)["state"] != "LOST", 15, "the end of what was lost")


@given("the engine hangs in the kernel")
def _(story: Story, freezer: Freezer) -> None:
    _hang(story, freezer)


@given("the worker is lost, for its engine hangs in the kernel")
def _(story: Story, freezer: Freezer) -> None:
    _hang(story, freezer)
    story.hive.ask("POST", f"/hive/v1/workers/{WORKER}/stop")
    story.hive.wait_state("LOST", WORKER)


def _hang(story: Story, freezer: Freezer) -> None:
    story.look_at_tree()
    pid = story.hive.worker(WORKER)["pid"]
    freezer.freeze(pid)
    story.kept["stuck"] = pid


@given("the kernel lets it go")
@when("the kernel lets it go")
def _(freezer: Freezer) -> None:
    freezer.thaw()


@then(parsers.parse("the worker is lost within {seconds:g} seconds"))
def _(story: Story, seconds: float) -> None:
    story.hive.wait_state("LOST", WORKER, within_s=seconds)


@then("the worker's reason names that process, and where it hangs")
def _(story: Story) -> None:
    reason = story.hive.worker(WORKER)["reason"]
    assert f"pid {story.kept['stuck']}, state D, in {_wchan(story)})" in reason, reason


@then('"hive leaks" names that process, and where it hangs')
def _(story: Story) -> None:
    leak = _leak(story, "process")
    assert leak["holder"].startswith(f"{story.kept['stuck']} (")
    assert f"state D, waiting in {_wchan(story)}." in leak["how_to_clear"]


@then("it still hangs")
def _(story: Story) -> None:
    stuck = guard.look_at(story.kept["stuck"])
    assert stuck
    assert stuck.state == "D"


def _wchan(story: Story) -> str:
    where = Path(f"/proc/{story.kept['stuck']}/wchan").read_text()
    assert where
    return where


class Prober:
    """Asks all the time whether hive is alive, as a service manager does; the slowest answer."""

    def __init__(self, hive: Hive) -> None:
        self._hive, self._is_over = hive, threading.Event()
        self.count, self.slowest_s = 0, 0.0
        self.trouble: list[str] = []
        self._thread = threading.Thread(target=self._probe, daemon=True)
        self._thread.start()

    def _probe(self) -> None:
        while not self._is_over.wait(0.02):
            began = time.monotonic()
            try:
                status = self._hive.ask("GET", "/livez", timeout_s=5).status
            except OSError as exc:
                self.trouble.append(repr(exc))
            else:
                self.trouble += [str(status)] if status != 200 else []
            self.count += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def end(self) -> None:
        self._is_over.set()
        self._thread.join(10)


@pytest.fixture
def prober(story: Story) -> Iterator[Prober]:
    prober = Prober(story.hive)
    yield prober
    prober.end()


@given("somebody asks all the time whether hive is alive")
def _(prober: Prober) -> None:
    must(lambda: prober.count, 5, "the first answer")


@then("every time there was an answer, at once")
def _(prober: Prober) -> None:
    prober.end()
    assert prober.count > 10
    assert prober.trouble == []
    assert prober.slowest_s < LATEST_S


# ── other programs ──────────────────────────────────────────────────────────────────────────────


class Others:
    """Programs and files that are not hive's; gone before hive is stopped and looked at."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.files: list[Path] = []
        self.sockets: list[socket.socket] = []

    def run(self, *maps: str) -> guard.Process:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", OTHER, *maps],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        leaks.started_pids.add(process.pid)
        self.processes.append(process)
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        seen = guard.look_at(process.pid)
        assert seen
        return seen

    def end_processes(self) -> None:
        while self.processes:
            self.processes.pop().communicate(b"", timeout=10)

    def end(self) -> None:
        self.end_processes()
        for sock in self.sockets:
            sock.close()
        for path in self.files:
            if path.is_dir() and not path.is_symlink():
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
            else:
                path.unlink(missing_ok=True)


@pytest.fixture
def others() -> Iterator[Others]:
    others = Others()
    yield others
    others.end()


@given("another program uses a part of the engine's shared memory")
def _(story: Story, others: Others) -> None:
    names = story.double.state["tree"]["shm"]
    must(lambda: all(name in story.hive.records for name in names), 5, "the guard's record")
    story.kept["shared"] = names[0]
    others.files.append(Path(guard.SHM, names[0]))
    story.kept["stranger"] = others.run(guard.SHM + names[0])


@when("that program ends")
@given("that program has ended")
def _(others: Others) -> None:
    others.end_processes()


@then("the other program is not touched")
def _(story: Story) -> None:
    assert is_alive(story.kept["stranger"])


# ── leaks ───────────────────────────────────────────────────────────────────────────────────────


@then('"hive leaks" names that memory and that program')
def _(story: Story) -> None:
    leak = _leak(story, "shared_memory")
    assert leak["holder"] == story.kept["shared"]
    stranger = story.kept["stranger"]
    assert f"End {stranger.pid} ({stranger.name})" in leak["how_to_clear"]


def _leak(story: Story, kind: str) -> Any:
    """The only leak of a kind that `hive leaks` shows; it ends with 1 when there is any."""
    ran = story.hive.cli("leaks", "--json")
    assert ran.code == 1
    (leak,) = [leak for leak in ran.json["leaks"] if leak["kind"] == kind]
    assert leak["worker"] == WORKER
    return leak


@given("the worker was stopped and looked at")
def _(story: Story) -> None:
    """Its leak is known, and everything else is gone."""
    story.look_at_tree()
    story.hive.ask("POST", f"/hive/v1/workers/{WORKER}/stop")
    story.hive.wait_state("STOPPED", WORKER)
    assert _leak(story, "shared_memory")


@then(parsers.parse("the metrics count {count:d} leak of {kind}"))
@then(parsers.parse("the metrics count {count:d} leaks of {kind}"))
def _(story: Story, count: int, kind: str) -> None:
    assert story.hive.metric("hive_leaks_total", kind=kind) == count


@then(parsers.parse("the error counts {count:d} leaked process, and says how to clean up"))
@then(parsers.parse("the error counts {count:d} leaked processes, and says how to clean up"))
def _(story: Story, count: int) -> None:
    details = story.hive.last_error["details"]
    assert details["leaked_processes"] == count
    assert details["leaked_temp_files"] == 0
    assert details["suggested_action"].startswith("Manual cleanup required")
    assert len(details["leaks"]) == 1


# ── the journal of a hive that was killed ───────────────────────────────────────────────────────


@given("the pid of its first process is another program's since")
def _(story: Story, others: Others) -> None:
    """As after a while: the journal's pid, but not its start."""
    stranger = story.kept["stranger"] = others.run()
    recorded = [stranger.pid, stranger.start - 1]
    note, record = _pages(story)
    _rewrite(note, leader=recorded)
    _rewrite(record, members=[*json.loads(record.read_text())["members"], recorded])


@given("the name of its shared memory is another program's since")
def _(story: Story, others: Others) -> None:
    name = min(story.shared_memory)
    story.shared_memory.remove(name)
    path = Path(guard.SHM, name)
    path.unlink()
    path.write_bytes(b"somebody else's")
    others.files.append(path)
    story.kept["foreign"] = path, path.stat().st_ino


@given("the guard's record of it is lost")
def _(story: Story) -> None:
    _pages(story)[1].unlink()


def _pages(story: Story) -> tuple[Path, Path]:
    """What hive and what the guard wrote down of the only start."""
    (record,) = (story.hive.state / "ledger").glob("*.tree.json")
    return record.with_name(record.name.replace(".tree", "")), record


def _rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@then("what is another program's is still there")
def _(story: Story) -> None:
    path, inode = story.kept["foreign"]
    assert os.lstat(path).st_ino == inode


@given(parsers.parse("a page of the journal that {is_wrong}"))
def _(story: Story, is_wrong: str) -> None:
    directory = story.hive.state / "ledger"
    directory.mkdir(mode=0o700, parents=True)
    os.chmod(story.hive.state, 0o700)
    victim = story.hive.home / "victim" / "1"
    victim.mkdir(parents=True)
    story.kept["foreign"] = victim, victim.stat().st_ino
    page = {
        "mark": MARK,
        "worker": WORKER,
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid_namespace": os.stat("/proc/self/ns/pid").st_ino,
        "shm_device": os.stat(guard.SHM).st_dev,
        "hive": [os.getpid(), 0],  # pid and start: this one has ended long ago
        "home": str(story.hive.runtime / "w" / "1"),
    }
    path = directory / f"{MARK}.json"
    WRONG_PAGES[is_wrong](path, page, victim)


def _is_a_link(path: Path, page: dict[str, Any], victim: Path) -> None:
    target = victim.with_name("page")
    target.write_text(json.dumps(page))
    path.symlink_to(target)


WRONG_PAGES: dict[str, Callable[[Path, dict[str, Any], Path], object]] = {
    "is cut off": lambda path, page, _: path.write_text(json.dumps(page)[:-9]),
    "is a link": _is_a_link,
    "names another program's directory": lambda path, page, victim: path.write_text(
        json.dumps(page | {"home": str(victim)})
    ),
    "names the host's first process": lambda path, page, _: path.write_text(
        json.dumps(page | {"leader": [1, 0]})
    ),
}


@then("that page is set aside, and the log says so")
def _(story: Story) -> None:
    directory = story.hive.state / "ledger"
    assert not (directory / f"{MARK}.json").exists()
    assert os.path.lexists(directory / f"{MARK}.json.damaged")
    said = [line["event"] for line in story.hive.log if line.get("level") == "warning"]
    assert any(f"journal {MARK}.json refused: " in line for line in said), said


# ── what lies in the runtime directory ──────────────────────────────────────────────────────────


@given(parsers.parse("another program's {thing} lies where the first engine's home would be"))
def _(story: Story, others: Others, thing: str) -> None:
    homes = story.hive.runtime / "w"
    homes.mkdir(mode=0o700, parents=True)
    os.chmod(story.hive.runtime, 0o700)
    path = homes / "1"
    others.files.append(path)
    match thing:
        case "socket":
            others.sockets.append(socket.socket(socket.AF_UNIX))
            others.sockets[-1].bind(str(path))
        case "directory":
            path.mkdir()
            (path / "s").write_text("its own")
        case "dead link":
            path.symlink_to("nowhere")
        case "file":
            path.write_text("its own")
    story.kept["foreign"] = path, os.lstat(path).st_ino


@then("the engine has a home of its own")
def _(story: Story) -> None:
    path, _ = story.kept["foreign"]
    assert [home.name for home in path.parent.iterdir() if home != path] == ["2"]


# ── control groups ──────────────────────────────────────────────────────────────────────────────


@given("hive may make control groups")
def _() -> None:
    if cgroup.find() is None:
        pytest.skip(NO_GROUPS)


@given("all of the engine is in one control group, which bears its mark")
def _(story: Story) -> None:
    story.look_at_tree()
    mark = guard.mark_of(story.hive.worker(WORKER)["pid"])
    (group,) = {_group_of(p.pid) for p in story.processes if p.name != "hive-guard"}
    assert group.name == f"hive-{mark}"
    story.kept["group"] = group


@then("that control group is gone")
def _(story: Story) -> None:
    group = story.kept["group"]
    must(lambda: not group.exists(), 5, f"the end of {group.name}")


def _group_of(pid: int) -> Path:
    """A process's control group (v2) directly below hive's own."""
    own = cgroup.find()
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    (name,) = (Path(line[3:]).name for line in lines if line.startswith("0::"))
    assert own
    assert name.startswith("hive-")
    return own / name


# ── killed by the kernel for memory ─────────────────────────────────────────────────────────────


@pytest.fixture
def small_memory() -> Iterator[Callable[[int], None]]:
    """Give a process little memory: in a group of v1, or in the group that hive made for it."""
    v1, v2 = hierarchy("memory"), cgroup.find()
    if v1:
        path = v1 / f"hivetest-{os.getpid()}"
        path.mkdir()
        limits = {"memory.limit_in_bytes": SMALL_BYTES, "memory.memsw.limit_in_bytes": SMALL_BYTES}
        _set(path, limits)
        yield lambda pid: guard.tell_kernel(path / "cgroup.procs", str(pid))
        assert until(lambda: not (path / "cgroup.procs").read_text(), 10), "somebody is in it"
        path.rmdir()
    elif v2 and "memory" in (v2 / "cgroup.subtree_control").read_text().split():
        limits = {"memory.max": SMALL_BYTES, "memory.swap.max": 0}
        yield lambda pid: _set(_group_of(pid), limits)
    else:
        pytest.skip(NO_LIMIT)


def _set(group: Path, limits: dict[str, int]) -> None:
    for name, most in limits.items():
        if (group / name).exists():
            (group / name).write_text(str(most))


@when("the engine takes more memory than it may have")
def _(story: Story, small_memory: Callable[[int], None]) -> None:
    story.look_at_tree()
    small_memory(story.hive.worker(WORKER)["pid"])
    story.double.die("greedy")

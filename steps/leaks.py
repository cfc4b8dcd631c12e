"""The leak gate: after every test nothing is left that was not there before it.

pytest's process is a child subreaper, so a process that any test left behind, however it hid, is
a descendant of it; environment marks and names are not needed to find it.
"""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hive.workers import guard
from steps.waiting import until

SETTLE_S = 8.0  # a tree that is just ending gets TERM, 5 s and KILL
# Started by one test for many others to use: these, and what they start, are no leaks.
shared_pids: set[int] = set()
# Children that somebody waits for; any other zombie child of ours is an orphan to reap.
started_pids: set[int] = set()


class Snapshot:
    """What a test may not add to: processes, shared memory, own descriptors, directories."""

    def __init__(self) -> None:
        self.processes = {(p.pid, p.start): p for p in _ours()}
        self.shm = _unmapped_shm()
        self.descriptors = _descriptors()

    def added_since(self, before: "Snapshot") -> list[str]:
        found = [
            f"process {p.pid} {p.name} (state {p.state}, parent {p.ppid})"
            for identity, p in self.processes.items()
            if identity not in before.processes
        ]
        found += [f"shared memory {name}" for name in sorted(self.shm - before.shm)]
        found += [
            f"descriptor {fd} -> {target}"
            for fd, target in self.descriptors.items()
            if before.descriptors.get(fd) != target
        ]
        return found


def _ours() -> list[guard.Process]:
    everything = list(guard.every_process())
    exempt = set(shared_pids)
    for pid in shared_pids:
        exempt |= {p.pid for p in guard.descendants(pid, everything)}
    return [p for p in guard.descendants(os.getpid(), everything) if p.pid not in exempt]


def _unmapped_shm() -> set[str]:
    """Engines' names in /dev/shm, less those that a process outside this test run maps.

    vLLM's semaphores (sem.*) are mapped by nobody, so whose they are cannot be told here: the
    shared engine's end is checked for them (steps/real.py), and no double makes any.
    """
    names = {n for n in os.listdir(guard.SHM) if n.startswith("psm_")}
    if names:
        mine = {p.pid for p in _ours()}
        for process in guard.every_process():
            if process.pid not in mine:
                names -= shm_of(process.pid)
    return names


def shm_of(pid: int) -> set[str]:
    """Names in /dev/shm that a process maps or has open."""
    inodes = guard.shared_memory(pid)
    return {name for name, inode in guard.names_in_shm().items() if inode in inodes}


def _descriptors() -> dict[int, str]:
    """This process's sockets, pipes and files in temporary places."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            # 0 to 2 are pytest's to swap about while it captures output.
            if int(fd) > 2 and target.startswith(("socket:", "pipe:", "/tmp/", "/dev/shm/")):
                found[int(fd)] = target
    return found


@pytest.fixture(scope="session", autouse=True)
def _orphans_come_here() -> None:
    guard.become_subreaper()


@pytest.fixture(autouse=True)
def leak_gate(request: pytest.FixtureRequest) -> Iterator[None]:
    """RESOURCE_LEAK_DETECTED for tests (R023, R153): what a test leaves fails it."""
    if request.node.get_closest_marker("engine") is not None:
        request.getfixturevalue("real_hive")  # started before the count begins
    before = Snapshot()
    yield
    found: list[str] = []

    def is_clean() -> bool:
        nonlocal found
        _reap_orphans()
        found = Snapshot().added_since(before)
        return not found

    if not until(is_clean, SETTLE_S):
        said = "; ".join(found)
        for pid, start in Snapshot().processes.keys() - before.processes.keys():
            process = guard.look_at(pid)
            if process and process.start == start:  # ours: a descendant that this test made
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for name in Snapshot().shm - before.shm:
            Path(guard.SHM, name).unlink(missing_ok=True)
        until(is_clean, 2)
        pytest.fail(
            f"RESOURCE_LEAK_DETECTED: {request.node.name} left behind: {said}", pytrace=False
        )


def _reap_orphans() -> None:
    """Collect ended processes that came to us when their own parent died.

    Children that a test started itself are its own to wait for: `subprocess` knows them.
    """
    for process in guard.descendants(os.getpid()):
        if process.state == "Z" and process.ppid == os.getpid() and process.pid not in started_pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a short name: a unix socket's path has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    yield path
    shutil.rmtree(path)

"""A process tree behind a guard, as hive sees it: started, watched, reliably ended, proved gone.

Promise 5. The guard ends the tree; where the guard itself was killed or does not answer, hive is
the next subreaper, adopts the tree and ends it by the same rules, reaping by pid (never any
child: asyncio's own children are not ours to reap).
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hive.errors import WorkerSpawnFailed
from hive.policy.windows import Identity
from hive.workers import cgroup, guard, journal
from hive.workers.guard import Group, Process
from hive.workers.journal import NO_TREE, Damaged

log = logging.getLogger(__name__)

LOG_BYTES = 8 * 1024 * 1024  # per file, one current and LOG_FILES older ones
LOG_FILES = 3
LOOK_S = 0.02  # how often an adopted tree is looked at
LONGEST_PAUSE_S = 0.5  # and how often at least, where a look takes long
START_S = 10.0  # the guard starts in milliseconds
ANSWER_S = 2.0  # what the guard may need beyond the grace and the kill before hive takes over


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start: arguments, the whole environment, and which members it cannot live without.

    `vital` are beginnings of process names (/proc/PID/comm, 15 characters). `nice` is how much the
    engine leaves the CPU to others. A member that is there `kill_s` after SIGKILL survived it.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    vital: Sequence[str] = ()
    nice: int = 0
    kill_s: float = guard.KILL_S
    # With a KV cache beside it: which model that is, and the path that its blocks are named by.
    identity: Identity | None = None
    kv_path: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """The directories and files of one start. `home` is removed whole after the end.

    `groups` is the control group (workers/cgroup.find) in which the tree gets one of its own.
    `records` is where the guard's record is kept, so that it outlives `home` (workers/ledger).
    """

    home: Path
    log: Path
    cwd: Path = Path("/")
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    groups: Path | None = None
    records: Path | None = None

    @property
    def socket(self) -> Path:
        return self.home / "s"

    @property
    def tmp(self) -> Path:
        return self.home / "t"

    @property
    def record(self) -> Path:
        return self.records / f"{self.mark}.tree.json" if self.records else self.home / "tree.json"

    @property
    def group(self) -> Path | None:
        return self.groups / f"hive-{self.mark}" if self.groups else None


@dataclass(frozen=True, slots=True)
class Exit:
    """How the engine's first process ended: an exit code, a signal, or unknown.

    Its cause is one of crashed (by itself, also with status 0), signal, out_of_memory (the
    kernel's OOM killer), member_lost and guard_lost; "asked" is the worker's to say.
    """

    code: int | None = None
    signal: int | None = None
    guard_lost: bool = False
    member: str | None = None  # a vital member ended while the first process lived on
    out_of_memory: bool = False

    @property
    def cause(self) -> str:
        if self.guard_lost:
            return "guard_lost"
        if self.out_of_memory:
            return "out_of_memory"
        if self.member is not None:
            return "member_lost"
        return "signal" if self.signal is not None else "crashed"

    @property
    def status(self) -> int | None:
        """As a shell tells it: 137 after SIGKILL (R063); None where nobody saw it."""
        return self.code if self.signal is None else 128 + self.signal

    def __str__(self) -> str:
        if self.guard_lost:
            return "its guard was killed"
        if self.out_of_memory:
            who = f"its process {self.member} was " if self.member else ""
            return f"{who}killed by the kernel for memory (out of host RAM)"
        if self.member is not None:
            return f"its process {self.member} ended"
        if self.signal is not None:
            try:
                return f"signal {signal.Signals(self.signal).name}"
            except ValueError:
                return f"signal {self.signal}"
        return f"exit status {self.code}"


@dataclass(frozen=True, slots=True)
class Gone:
    """The end of a tree: how it took place, and what had to be killed or removed."""

    how: str  # exit, term or kill
    killed: int
    removed: tuple[str, ...]


class Tree(asyncio.Protocol):
    """One tree. `started`, `exited` and `gone` are futures; `end` may be called any number of times.

    `exited` resolves when the engine is no more: its first process or a vital member ended.

    `survivors` is not empty while members outlive SIGKILL; `gone` then resolves when they go.
    """

    def __init__(self, place: Place) -> None:
        loop = asyncio.get_running_loop()
        self.place = place
        self.started: asyncio.Future[int] = loop.create_future()
        self.exited: asyncio.Future[Exit] = loop.create_future()
        self.gone: asyncio.Future[Gone] = loop.create_future()
        self.survived: asyncio.Future[list[dict[str, Any]]] = loop.create_future()
        # A failed start may have nobody left to hear of it: that is no forgotten exception.
        self.started.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._transport: asyncio.WriteTransport | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._received = b""
        self._report: Gone | None = None
        self._takeover: asyncio.Task[None] | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._grace_s = 5.0
        self._kill_s = guard.KILL_S
        self._group: Group | None = None
        self._made: tuple[int, int] | None = None  # the home: its device and inode

    @classmethod
    async def spawn(cls, launch: Launch, place: Place, grace_s: float = 5.0) -> "Tree":
        """Start `launch` under a guard.

        Raises WorkerSpawnFailed when the program cannot be run; nothing is left then.
        """
        tree = cls(place)
        tree._grace_s = grace_s
        tree._kill_s = launch.kill_s
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                tree._make_home()
                tree._make_group()
                command = [sys.executable, "-I", "-S", guard.__file__, str(theirs.fileno())]
                tree._guard = subprocess.Popen(  # noqa: ASYNC220 (a millisecond; watched by pidfd)
                    command,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    env={"HIVE_MARK": place.mark},
                )
            ours.setblocking(False)
            loop = asyncio.get_running_loop()
            tree._watch_guard(loop)
            await loop.create_connection(lambda: tree, sock=ours)
        except BaseException:
            ours.close()
            if tree._guard:
                tree._guard.kill()  # nothing was started yet: the guard waits for the launch
                tree._guard.wait()
            tree._remove_places()
            raise
        tree._send(
            argv=list(launch.argv),
            env=dict(launch.env),
            vital=list(launch.vital),
            nice=launch.nice,
            cwd=str(place.cwd),
            home=str(place.home),
            made=tree._made,
            record=str(place.record),
            cgroup=str(tree._group.path) if tree._group else None,
            mark=place.mark,
            log=str(place.log),
            log_bytes=LOG_BYTES,
            log_files=LOG_FILES,
            grace_s=grace_s,
            kill_s=launch.kill_s,
        )
        try:
            async with asyncio.timeout(START_S):
                await asyncio.shield(tree.started)
        except TimeoutError:
            tree._guard.kill()  # its end starts the takeover
            await asyncio.shield(tree.gone)
            raise WorkerSpawnFailed("The engine's guard did not answer at its start.") from None
        except asyncio.CancelledError:
            await asyncio.shield(tree.end(0))
            raise
        return tree

    @property
    def pid(self) -> int:
        """The pid of the engine's first process."""
        return self.started.result()

    @property
    def guard_pid(self) -> int:
        assert self._guard is not None
        return self._guard.pid

    async def end(self, grace_s: float) -> Gone:
        """TERM to every member, `grace_s` later KILL; returns when nothing is left.

        Waits as long as a member survives SIGKILL: bound it by watching `survived`.
        """
        if not self.gone.done():
            self._grace_s = grace_s
            self._send(do="end", grace_s=grace_s)
            if self._patience is None:
                patience_s = grace_s + self._kill_s + ANSWER_S
                loop = asyncio.get_running_loop()
                self._patience = loop.call_later(patience_s, self._give_up_on_guard)
        return await asyncio.shield(self.gone)

    async def end_or_survive(self, grace_s: float) -> Gone | None:
        """`end`, but None as soon as a member has survived SIGKILL: its end may never come."""
        ending = asyncio.ensure_future(self.end(grace_s))
        either: set[asyncio.Future[Any]] = {ending, self.survived}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return ending.result() if ending.done() else None
        finally:
            ending.cancel()  # only this wait for it

    def _make_home(self) -> None:
        self.place.home.mkdir(mode=0o700)
        about = os.lstat(self.place.home)
        self._made = (about.st_dev, about.st_ino)
        self.place.tmp.mkdir(mode=0o700)

    def _make_group(self) -> None:
        """Before the fork; without one the tree is known by descent, record and mark."""
        if path := self.place.group:
            try:
                self._group = cgroup.make(path)
            except OSError as exc:
                log.debug("no control group for tree %s: %s", self.place.mark, exc)

    def _remove_places(self) -> None:
        if self._group:
            self._group.remove()
        if self._made:
            guard.remove_home(self.place.home, self._made)

    # ── news from the guard ─────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not registered as asyncio's, so isinstance would say no.
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            self._hear(json.loads(line))

    def connection_lost(self, _exc: Exception | None) -> None:
        self._transport = None

    def _hear(self, news: dict[str, Any]) -> None:
        match news:
            case {"event": "started", "pid": pid}:
                _resolve(self.started, pid)
            case {"event": "spawn_failed", "error": error, "file": file}:
                failure = WorkerSpawnFailed(
                    f"The engine's program could not be run: {error}.", expected=file
                )
                if not self.started.done():
                    self.started.set_exception(failure)
                self._report = Gone("exit", 0, ())
            case {"event": "exited"}:
                code, number = news.get("code"), news.get("signal")
                was_oom = news.get("out_of_memory", False)
                _resolve(self.exited, Exit(code, number, out_of_memory=was_oom))
            case {"event": "member_lost", "pid": pid, "name": name, "out_of_memory": was_oom}:
                member = f"{name} (pid {pid})"
                _resolve(self.exited, Exit(member=member, out_of_memory=was_oom))
            case {"event": "survived", "members": members}:
                _resolve(self.survived, members)
            case {"event": "gone", "how": how, "killed": killed, "removed": removed}:
                # Believed, but not passed on before the guard itself has ended, too.
                self._report = Gone(how, killed, tuple(removed))

    def _send(self, **message: Any) -> None:
        if self._transport is not None:
            self._transport.write(json.dumps(message).encode() + b"\n")

    # ── when the guard is killed ────────────────────────────────────────────────────────────────

    def _watch_guard(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._guard is not None
        fd = os.pidfd_open(self._guard.pid)

        def ended() -> None:
            loop.remove_reader(fd)
            os.close(fd)
            assert self._guard is not None
            self._guard.wait()  # it has ended: this returns at once
            self._guard_ended()

        loop.add_reader(fd, ended)

    def _guard_ended(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
        if self._transport is not None:
            # The socket's end comes after everything that the guard said: wait for it.
            asyncio.get_running_loop().call_soon(self._guard_ended)
            return
        if self._report is not None:
            _resolve(self.exited, Exit(guard_lost=True))
            _resolve(self.gone, self._report)
            return
        log.warning("a guard was killed; hive ends its tree itself (mark %s)", self.place.mark)
        _resolve(self.exited, Exit(guard_lost=True))
        if not self.started.done():
            self.started.set_exception(WorkerSpawnFailed("The engine's guard ended at its start."))
        self._takeover = asyncio.get_running_loop().create_task(
            self._end_adopted(), name=f"adopted tree {self.place.mark}"
        )

    def _give_up_on_guard(self) -> None:
        if self.gone.done() or self.survived.done():
            return  # gone, or reported: waiting for the kernel is no fault of the guard
        log.warning("a guard does not answer; hive kills it (mark %s)", self.place.mark)
        assert self._guard is not None
        self._guard.kill()

    async def _end_adopted(self) -> None:
        """End the tree of a killed guard; its orphans are hive's children now."""
        orphans = Orphans(self.place, self._group, self._grace_s, self._kill_s)
        while True:
            began = time.monotonic()
            # Nobody could look (no descriptor is free): that proves nothing.
            with contextlib.suppress(OSError):
                await asyncio.to_thread(orphans.look)
            if orphans.gone:
                break
            if orphans.survivors:
                _resolve(self.survived, orphans.survivors)
            await asyncio.sleep(1.0 if self.survived.done() else pause_after(began))
        await asyncio.to_thread(self._remove_places)
        _resolve(self.gone, orphans.gone)

    def __repr__(self) -> str:
        state = "gone" if self.gone.done() else "exited" if self.exited.done() else "alive"
        return f"<Tree {self.place.mark} {state}>"


def _resolve(future: "asyncio.Future[Any]", value: object) -> None:
    if not future.done():
        future.set_result(value)


def pause_after(began: float) -> float:
    """Until the next look at all processes: however many there are, looking takes a tenth."""
    return min(max(LOOK_S, 9 * (time.monotonic() - began)), LONGEST_PAUSE_S)


class Orphans:
    """The tree of a killed guard, which hive ends itself, by the guard's rules.

    A look reads all of /proc: a thread's work, one at a time.
    """

    def __init__(self, place: Place, group: Group | None, grace_s: float, kill_s: float) -> None:
        self.gone: Gone | None = None
        self.survivors: list[dict[str, Any]] = []
        self._place, self._group, self._kill_s = place, group, kill_s
        self._record: journal.Tree | None = None
        self._recorded: set[journal.Identity] = set()
        self._shm: dict[str, int] = {}
        self._term_until = time.monotonic() + grace_s
        self._asked: set[int] = set()
        self._killed: set[int] = set()
        self._killed_group = False

    def look(self) -> None:
        """Ask, kill and reap who is there. Raises OSError when nobody could look."""
        if self._record is None:
            self._record = read_record(self._place.record)
            self._recorded |= set(self._record.members)
            self._shm |= self._record.shm
        found = adopted(self._place.mark, self._recorded, self._group)
        # Once ended, one is known by that alone: its environment is gone.
        self._recorded |= {(process.pid, process.start) for process in found}
        # Other zombies are their parents' to reap, and hold nothing.
        members = [p for p in found if p.state != "Z" or p.ppid == os.getpid()]
        self._shm |= guard.written_by(members, self._record.shm_before)
        if not members and not (self._group and self._group.is_populated()):
            how = "kill" if self._killed or self._killed_group else "term"
            removed = guard.remove_shared_memory(self._shm)
            self.gone = Gone(how, len(self._killed), tuple(removed))
            return
        late_s = time.monotonic() - self._term_until
        for process in members:
            self._end(process, late_s)
        if self._group and late_s >= guard.TRACKER_S:
            self._killed_group |= self._group.kill()
        if late_s > self._kill_s:
            self.survivors = [
                guard.describe(process) for process in members if process.state != "Z"
            ]

    def _end(self, process: Process, late_s: float) -> None:
        if process.state == "Z":
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
        elif late_s >= 0:
            if guard.kill(process, late_s):
                self._killed.add(process.pid)
        elif process.pid not in self._asked:
            guard.ask_to_end(process)
            self._asked.add(process.pid)


def read_record(path: Path) -> journal.Tree:
    """What a guard wrote down; nothing where that is unreadable. Raises OSError as journal does."""
    try:
        return journal.read_tree(path)
    except (FileNotFoundError, Damaged):
        return NO_TREE


def adopted(mark: str, recorded: set[tuple[int, int]], group: Group | None = None) -> list[Process]:
    """Living members of a tree that has lost its guard: by its record, its mark and its group.

    Descendants of members belong to it, too: a process may have wiped its environment.
    """
    everything = list(guard.every_process())
    inside = group.pids() if group else set()
    roots = {
        process.pid
        for process in everything
        if (process.pid, process.start) in recorded
        or process.pid in inside
        or (process.state == "Z" and group and group.held(process.pid))
        or guard.mark_of(process.pid) == mark
    }
    found = {process.pid: process for process in everything if process.pid in roots}
    for root in roots:
        found |= {process.pid: process for process in guard.descendants(root, everything)}
    return [process for process in found.values() if process.pid != os.getpid()]

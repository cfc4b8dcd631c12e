"""The guard: a small process that is an engine's parent and outlives nothing but its tree.

Run as `python -I -S guard.py FD` with a socket to hive on FD; standard library only. It is a
child subreaper, so grandchildren that leave the session or lose their parent come back to it; it
ends the whole tree (TERM, grace, KILL, reap) when hive asks, when the engine's leader ends, and
when the socket closes because hive died. hive itself uses the same functions for a tree whose
guard was killed. Where the tree has a control group (workers/cgroup), that is its second proof:
whoever is in it belongs to the tree, and nothing is gone before the group is empty.

Protocol, one JSON object a line. hive sends the launch first, then {"do": "end", "grace_s": 5}.
The guard reports started {pid, start}, spawn_failed {error}, exited {code | signal,
out_of_memory}, member_lost {pid, name, out_of_memory}, survived {members}, and gone {how, killed,
removed}.
"""

import contextlib
import ctypes
import errno
import json
import math
import os
import re
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
SHM = "/dev/shm/"  # noqa: S108 (the kernel's place for POSIX shared memory, not a temporary file)
TRACKER_S = 1.0  # what Python's resource tracker gets after KILL to remove shared memory
KILL_S = 5.0  # a process that is still there this long after SIGKILL survived it
OOM_S = 30.0  # the kernel kills for memory at once, but a process of many GiB takes long to end
HEADER = "=== hive: engine started "  # the line in the log that begins each start
SOON_S = 0.03  # from a new name in /dev/shm to the look at who maps it
IN_CREATE = 0x100
TICK_S = 1.0  # how often the tree's members and shared memory are recorded
ENDING_TICK_S = 0.02  # how often an ending tree is looked at
# Nobody could look just now, and what was not seen may well be there.
BLIND = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)


class Process(NamedTuple):
    """One line of /proc/PID/stat; `start` is in clock ticks since boot and tells reused pids."""

    pid: int
    ppid: int
    session: int
    state: str
    start: int
    name: str


def prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def be_nice(nice: int) -> None:
    """Leave the CPU to others, as a process and, where the kernel groups by session, as a group."""
    if nice:
        with contextlib.suppress(OSError):
            os.nice(nice)
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(nice))


def watch_shared_memory() -> int | None:
    """A descriptor that is readable when a name appears in /dev/shm; None where that is refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        return None
    if libc.inotify_add_watch(fd, SHM.encode(), IN_CREATE) < 0:
        os.close(fd)
        return None
    return int(fd)


def become_subreaper() -> None:
    """Orphaned descendants of this process become its children from now on."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


@contextlib.contextmanager
def if_seen() -> Iterator[None]:
    """Pass over what is gone or not ours to look at; who could not look at all gets OSError."""
    try:
        yield
    except OSError as exc:
        unless_gone(exc)


def unless_gone(why: OSError) -> None:
    if why.errno in BLIND:
        raise why


def proc_file(pid: int, name: str) -> bytes | None:
    """/proc/PID/name; None when the process is gone or not ours to look at. Raises OSError."""
    with if_seen():
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return None


def look_at(pid: int) -> Process | None:
    """What /proc says of `pid`, or None when it is gone.

    Raises OSError, like all that looks at processes here, when nobody could look (BLIND).
    """
    content = proc_file(pid, "stat")
    if content is None:
        return None
    text = content.decode(errors="replace")
    # The name is in brackets and may hold brackets and spaces itself.
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return Process(pid, int(fields[1]), int(fields[3]), fields[0], int(fields[19]), name)


def every_process() -> Iterator[Process]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (process := look_at(int(entry))):
            yield process


def descendants(root: int, processes: Iterable[Process] | None = None) -> list[Process]:
    """Every process below `root`, zombies included, nearest first."""
    children: dict[int, list[Process]] = {}
    for process in every_process() if processes is None else processes:
        children.setdefault(process.ppid, []).append(process)
    found: list[Process] = []
    pending = [root]
    while pending:
        below = children.get(pending.pop(0), [])
        found += below
        pending += [process.pid for process in below]
    return found


def mark_of(pid: int) -> str | None:
    """HIVE_MARK in the process's environment, or None when it has none or is not ours to read."""
    for entry in (proc_file(pid, "environ") or b"").split(b"\0"):
        if entry.startswith(b"HIVE_MARK="):
            return entry[10:].decode(errors="replace")
    return None


def shared_memory(pid: int, *, written: bool = False) -> set[int]:
    """Inodes of the files in /dev/shm that a process maps or has open; if `written`, to write.

    By inode, since glibc maps a named semaphore under a name that it deletes at once.
    """
    found: set[int] = set()
    with if_seen():
        device = os.stat(SHM).st_dev
        for inode, is_written in (*_mapped(pid, device), *_opened(pid, device)):
            if is_written or not written:
                found.add(inode)
    return found


def _mapped(pid: int, device: int) -> Iterator[tuple[int, bool]]:
    ours = f"{os.major(device):02x}:{os.minor(device):02x}"
    for line in (proc_file(pid, "maps") or b"").decode(errors="replace").splitlines():
        if SHM in line:
            _, how, _, where, inode, _ = line.split(None, 5)
            if where == ours:
                yield int(inode), how.endswith("s") and "w" in how  # "rw-s"


def _opened(pid: int, device: int) -> Iterator[tuple[int, bool]]:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        link = f"/proc/{pid}/fd/{fd}"
        with if_seen():
            # What is elsewhere is not touched: another file system may let one wait.
            if os.readlink(link).startswith(SHM) and (about := os.stat(link)).st_dev == device:
                yield about.st_ino, bool(os.lstat(link).st_mode & stat.S_IWUSR)


def names_in_shm() -> dict[str, int]:
    """What is in /dev/shm itself, each name with its inode. Raises OSError when nobody could look."""
    with if_seen(), os.scandir(SHM) as entries:
        return {entry.name: entry.inode() for entry in entries}
    return {}


def written_by(processes: Iterable[Process], before: Collection[int] | None) -> dict[str, int]:
    """Names in /dev/shm that these processes write, and that are theirs to leave behind.

    `before` is what was there when their tree was started; None: nobody knows, so nothing is.
    """
    if before is None:
        return {}
    inodes = {inode for p in processes for inode in shared_memory(p.pid, written=True)}
    if not inodes.difference(before):
        return {}
    names = names_in_shm().items()
    return {n: i for n, i in names if i in inodes and i not in before and is_ours(n, i)}


def is_ours(name: str, inode: int) -> bool:
    """Whether a name in /dev/shm is this very file, and a plain one of this user's."""
    try:
        about = os.lstat(SHM + name)
    except OSError:
        return False
    is_plain = stat.S_ISREG(about.st_mode) and "/" not in name
    return is_plain and about.st_ino == inode and about.st_uid == os.geteuid()


def send_signal(process: Process, number: int) -> None:
    """Signal a process, but never a stranger that got its pid."""
    now = look_at(process.pid)
    if now is not None and now.start == process.start:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, number)


def ask_to_end(process: Process) -> None:
    send_signal(process, signal.SIGTERM)
    # A stopped process acts on TERM only when it runs again.
    send_signal(process, signal.SIGCONT)


def is_resource_tracker(pid: int) -> bool:
    """Python's multiprocessing tracker: it ignores TERM, and ends once it has nobody to track."""
    return b"multiprocessing.resource_tracker" in (proc_file(pid, "cmdline") or b"")


def kill(process: Process, seconds_late: float) -> bool:
    """SIGKILL, but to a resource tracker only after TRACKER_S: it alone knows some names in
    /dev/shm (what nobody maps any more), and removes them when the others are gone."""
    if seconds_late < TRACKER_S and is_resource_tracker(process.pid):
        return False
    send_signal(process, signal.SIGKILL)
    return True


def describe(process: Process) -> dict[str, Any]:
    """What an operator needs to know of a process that will not go."""
    wchan = ""
    with contextlib.suppress(OSError):
        # 0: it runs, or it is not ours to know.
        wchan = Path(f"/proc/{process.pid}/wchan").read_text().removeprefix("0")
    return {"pid": process.pid, "name": process.name, "state": process.state, "wchan": wchan}


def remove_shared_memory(recorded: dict[str, int]) -> list[str]:
    """Unlink recorded names that are still the same file of ours and that nobody holds."""
    there = {name: inode for name, inode in recorded.items() if is_ours(name, inode)}
    if not there:
        return []
    held = {inode for process in every_process() for inode in shared_memory(process.pid)}
    removed = []
    for name, inode in there.items():
        if inode not in held:
            with contextlib.suppress(OSError):
                os.unlink(SHM + name)
                removed.append(name)
    return sorted(removed)


def mounts() -> list[tuple[str, str]]:
    """Every mount point with the type of its file system."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        found.append((point, after.split()[0]))
    return found


def is_mounted(home: str | Path) -> bool:
    """Whether something is mounted there, or below: then its content is another's."""
    place = f"{os.path.realpath(Path(home).parent)}/{Path(home).name}"
    return any(f"{point}/".startswith(f"{place}/") for point, _ in mounts())


def remove_home(home: str | Path, made: Sequence[int]) -> None:
    """Remove a worker's directory whole, if it is the one that was made (st_dev, st_ino).

    In its place, or in that of a directory above it, there may be another's by now.
    """
    with contextlib.suppress(OSError):
        fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            about = os.fstat(fd)
            if [about.st_dev, about.st_ino] != list(made) or is_mounted(home):
                return
            _empty(fd)
        finally:
            os.close(fd)
        os.rmdir(home)


def _empty(directory: int) -> None:
    with os.scandir(directory) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.name, ignore_errors=True, dir_fd=directory)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.name, dir_fd=directory)


def tell_kernel(path: Path, text: str) -> None:
    """Write into a file of the kernel's. Raises OSError, also where it has none of that name."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


class Group:
    """A control group (v2): whoever is in it stays in it, and so do its children.

    Which group may be used so is decided where it is made or read back (workers/cgroup).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def join(self) -> None:
        """Put the calling process in; where that is refused it runs on outside."""
        self._write("cgroup.procs", "0")

    def pids(self) -> set[int]:
        """Living members, those of sub-groups too. Zombies hold nothing and are not among them."""
        found: set[int] = set()
        for directory in self._directories():
            # A sub-group that is just being removed has nobody in it.
            with if_seen():
                found |= {int(pid) for pid in Path(directory, "cgroup.procs").read_text().split()}
        return found

    def is_populated(self) -> bool:
        """The kernel's word; it counts also who cannot be seen from here."""
        with if_seen():
            return "populated 1" in (self.path / "cgroup.events").read_text()
        return False

    def held(self, pid: int) -> bool:
        """Whether a process is, or was when it ended, in this group or in one beneath it."""
        for line in (proc_file(pid, "cgroup") or b"").decode(errors="replace").splitlines():
            if line.startswith("0::"):
                return self.path.name in line.removesuffix(" (deleted)").split("/")
        return False

    def kill(self) -> bool:
        """SIGKILL to every member at once: who is just forking does not get away either.

        False when there was nobody.
        """
        if not self.is_populated():
            return False
        self._write("cgroup.kill", "1")
        return True

    def remove(self) -> None:
        """Remove the group, and what sub-groups its members made; only what is empty goes."""
        with contextlib.suppress(OSError):
            for directory in self._directories():
                with contextlib.suppress(OSError):
                    os.rmdir(directory)

    def _directories(self) -> Iterator[str]:
        return (at for at, _, _ in os.walk(self.path, topdown=False, onerror=unless_gone))

    def _write(self, name: str, text: str) -> None:
        with contextlib.suppress(OSError):
            tell_kernel(self.path / name, text)

    def __repr__(self) -> str:
        return f"<Group {self.path} {'populated' if self.is_populated() else 'empty'}>"


def members_of(root: int, group: Group | None) -> list[Process]:
    """Every process below `root`, and everybody in the group wherever its parent is."""
    everything = list(every_process())
    found = descendants(root, everything)
    if group is not None:
        # Read after the processes: a pid that was given to a stranger since is not in it.
        others = group.pids() - {process.pid for process in found}
        found += [process for process in everything if process.pid in others]
    return found


def ended_by(pid: int) -> int | None:
    """The signal that ended a process, 0 for none; None when nobody can tell (it is reaped)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[49]) & 0x7F if fields[0] == "Z" else None


class OomKills:
    """Whether the kernel has killed for memory lately.

    Counted by the nearest group around the tree that has the memory controller, else for the
    whole host: then a process that somebody else killed at that time is taken for one of them.
    """

    def __init__(self, group: Group | None) -> None:
        around = (group.path, *group.path.parents) if group else ()
        events = [path for up in around if (path := up / "memory.events").exists()]
        self.path = events[0] if events else Path("/proc/vmstat")
        self.seen: deque[tuple[float, int]] = deque()
        self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Called about every TICK_S; what is older than OOM_S is forgotten."""
        self.seen.append((now, self._count()))
        while self.seen[0][0] < now - OOM_S:
            self.seen.popleft()

    def any_lately(self) -> bool:
        return self._count() > self.seen[0][1]

    def _count(self) -> int:
        with contextlib.suppress(OSError):
            for line in self.path.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return 0


class Log:
    """The engine's output in a file of at most `most_bytes`, with `keep` older ones beside it."""

    def __init__(self, path: str, most_bytes: int, keep: int) -> None:
        self.path, self.most_bytes, self.keep = path, most_bytes, keep
        self._open()

    def _open(self) -> None:
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        # A pipe in its place, which nobody reads, would block.
        self.fd = os.open(self.path, flags | os.O_NONBLOCK, 0o600)
        about = os.fstat(self.fd)
        if stat.S_ISFIFO(about.st_mode):
            os.close(self.fd)
            raise OSError(errno.EINVAL, "it is a pipe", self.path)
        self.size = about.st_size

    def write(self, text: bytes) -> None:
        # A full disk costs log lines, never the engine: it must not block on its own output.
        with contextlib.suppress(OSError):
            if self.size + len(text) > self.most_bytes:
                self._rotate()
            self.size += os.write(self.fd, text)

    def _rotate(self) -> None:
        for number in range(self.keep, 0, -1):
            older = f"{self.path}.{number - 1}" if number > 1 else self.path
            with contextlib.suppress(FileNotFoundError):
                os.replace(older, f"{self.path}.{number}")
        full, self.size = self.fd, 0  # 0: a rotation that fails is not tried again at each line
        self._open()  # first: where it fails, the old file stays open and takes the lines
        os.close(full)


class Record:
    """What the tree consists of, on disk, for whoever must end it when the guard is killed too.

    Made before the tree is started: what is in /dev/shm then is never the tree's.
    """

    def __init__(self, launch: dict[str, Any]) -> None:
        self.path = launch["record"]
        self.about = {
            "mark": launch["mark"],
            "guard": os.getpid(),
            "cgroup": launch["cgroup"],
            "home": launch["made"],
            "shm_before": sorted(set(names_in_shm().values())),
        }
        self.before = frozenset(self.about["shm_before"])
        self.shm: dict[str, int] = {}
        self._written: Any = None
        self.update([])

    def update(self, members: list[Process]) -> None:
        """Raises OSError when nobody could look at the members."""
        known = self.shm | written_by(members, self.before)
        self.shm = {name: inode for name, inode in known.items() if is_ours(name, inode)}
        content = {
            "members": sorted([p.pid, p.start] for p in members),
            "shm": self.shm,
        }
        if content != self._written:
            with contextlib.suppress(OSError):
                draft = self.path + ".new"
                Path(draft).write_text(json.dumps(self.about | content))
                os.replace(draft, self.path)
                self._written = content


class Guard:
    """One engine's parent; everything happens in one thread, in `run`."""

    def __init__(
        self, control: socket.socket, launch: dict[str, Any], received: bytes = b""
    ) -> None:
        self.control = control
        self.launch = launch
        self.log = Log(launch["log"], launch["log_bytes"], launch["log_files"])
        self.record = Record(launch)
        self.group = Group(launch["cgroup"]) if launch["cgroup"] else None
        self.oom_kills = OomKills(self.group)
        self.selector = selectors.DefaultSelector()
        self.received = received  # what hive sent right after the launch
        self.leader: subprocess.Popen[bytes] | None = None
        self.leader_over = False
        self.is_orphan = False  # hive is gone
        self.ends_at: float | None = None  # when TERM becomes KILL; None while all is well
        self.killing_since: float | None = None
        self.asked: set[tuple[int, int]] = set()  # (pid, start) that got TERM
        self.killed: set[tuple[int, int]] = set()
        self.killed_group = False
        self.told_survivors = False
        self.look_by = math.inf  # when the tree is to be looked at ahead of its turn
        self.watched: dict[int, tuple[int, str]] = {}  # pid -> pidfd and name of other members

    def run(self) -> int:
        wakeup_r, wakeup_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakeup_w, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        become_subreaper()
        if not self._start():
            return 1
        self.selector.register(self.control, selectors.EVENT_READ, self._on_control)
        self.selector.register(wakeup_r, selectors.EVENT_READ, lambda: drain_pipe(wakeup_r))
        # A name that is mapped and left between two ticks would be nobody's: look when one appears.
        appeared = watch_shared_memory()
        if appeared is not None:
            self.selector.register(
                appeared, selectors.EVENT_READ, lambda: self._look_soon(appeared)
            )
        next_look = 0.0
        self._obey(b"")
        while True:
            news = self._reap()
            now = time.monotonic()
            next_look = min(next_look, self.look_by)
            # Looking reads all of /proc, so a flood of output must not make it happen more often.
            if news or now >= next_look:
                with contextlib.suppress(OSError):  # nobody could look: that proves nothing
                    if self._look(now):
                        return 0
                self.look_by = math.inf
                idle = self.ends_at is None or self.told_survivors
                next_look = now + (TICK_S if idle else ENDING_TICK_S)
            was_ending = self.ends_at
            due = min(next_look, self.look_by)
            for key, _ in self.selector.select(max(0.0, due - time.monotonic())):
                key.data()
            if self.ends_at != was_ending:
                next_look = 0.0

    def _look(self, now: float) -> bool:
        """One look at the tree; True when it was ending and nothing is left of it."""
        if self.ends_at is not None:
            return self._advance_end(now)
        self._watch(members := members_of(os.getpid(), self.group))
        self.record.update(members)
        self.oom_kills.look(now)
        return False

    def _on_signal(self, number: int, _frame: object) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._begin_end(self.launch["grace_s"])

    def _start(self) -> bool:
        out_r, out_w = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(out_r, False)
        me = os.getpid()

        def die_with_the_guard() -> None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != me:  # the guard died before the line above
                os._exit(127)
            if self.group:
                self.group.join()
            be_nice(self.launch["nice"])

        try:
            # PDEATHSIG counts from the forking *thread*'s end, so this must be the main thread;
            # and the guard has no other, so a function between fork and exec is safe.
            self.leader = subprocess.Popen(
                self.launch["argv"],
                env=self.launch["env"],
                cwd=self.launch["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=out_w,
                stderr=out_w,
                start_new_session=True,
                preexec_fn=die_with_the_guard,  # noqa: PLW1509 (see above)
            )
        except OSError as exc:
            self._clean()
            self._tell("spawn_failed", error=exc.strerror or str(exc), file=exc.filename)
            return False
        finally:
            os.close(out_w)
        self.selector.register(out_r, selectors.EVENT_READ, lambda: self._on_output(out_r))
        self.out_r = out_r
        process = None
        with contextlib.suppress(OSError):
            process = look_at(self.leader.pid)
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.log.write(f"{HEADER}{now} pid {self.leader.pid}\n".encode())
        self._tell("started", pid=self.leader.pid, start=process.start if process else 0)
        return True

    def _watch(self, members: list[Process]) -> None:
        """Notice the end of members that the engine cannot live without, by name (`vital`).

        vLLM's API server lives on for seconds after its core died; an exit alone would tell late.
        A child has its parent's name until it becomes itself: a program that a busy core starts is
        no core, and its end is no loss.
        """
        vital = tuple(self.launch["vital"])
        names = {process.pid: process.name for process in members}
        for process in members:
            if not process.name.startswith(vital) or process.pid in self.watched:
                continue
            if names.get(process.ppid) == process.name:
                continue
            with contextlib.suppress(OSError):
                fd = os.pidfd_open(process.pid)
                self.watched[process.pid] = (fd, process.name)
                self.selector.register(fd, selectors.EVENT_READ, partial(self._lost, process.pid))

    def _lost(self, pid: int) -> None:
        fd, name = self.watched[pid]
        self.selector.unregister(fd)
        os.close(fd)
        if self.ends_at is None:
            self._read_rest()  # hive asks its last words as soon as it hears
            # Reaped already, it may have been anything: then the kernel's count decides alone.
            was_oom = ended_by(pid) in (signal.SIGKILL, None) and self.oom_kills.any_lately()
            self._tell("member_lost", pid=pid, name=name, out_of_memory=was_oom)

    def _look_soon(self, appeared: int) -> None:
        drain_pipe(appeared)
        self.look_by = min(self.look_by, time.monotonic() + SOON_S)

    def _tell(self, event: str, **facts: Any) -> None:
        if not self.is_orphan:
            with contextlib.suppress(OSError):
                self.control.sendall(json.dumps({"event": event, **facts}).encode() + b"\n")

    def _on_output(self, fd: int) -> None:
        try:
            text = os.read(fd, 65536)
        except BlockingIOError:
            return
        if text:
            self.log.write(text)
        else:
            self.selector.unregister(fd)

    def _on_control(self) -> None:
        try:
            more = self.control.recv(65536)
        except OSError:
            more = b""
        if not more:
            self.selector.unregister(self.control)
            self.is_orphan = True
            self._begin_end(self.launch["grace_s"])
            return
        self._obey(more)

    def _obey(self, more: bytes) -> None:
        self.received += more
        *lines, self.received = self.received.split(b"\n")
        for line in lines:
            asked = json.loads(line)
            if asked["do"] == "end":
                self._begin_end(asked["grace_s"])

    def _begin_end(self, grace_s: float) -> None:
        ends_at = time.monotonic() + grace_s
        if self.ends_at is None:
            with contextlib.suppress(OSError):
                self.record.update(members_of(os.getpid(), self.group))
        self.ends_at = ends_at if self.ends_at is None else min(self.ends_at, ends_at)

    def _reap(self) -> bool:
        """Collect every ended child (here, and only here, all of them are ours); True if any."""
        found = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return found
            if pid == 0:
                return found
            found = True
            if self.leader is not None and pid == self.leader.pid:
                self._read_rest()  # hive quotes the engine's last words as soon as it hears
                code = os.waitstatus_to_exitcode(status)
                self.leader.returncode = code
                self.leader_over = True
                if code >= 0:
                    self._tell("exited", code=code)
                else:
                    self._tell("exited", signal=-code, out_of_memory=self._was_oom_killed(code))
                # What the leader leaves behind has nobody to serve: end it.
                self._begin_end(self.launch["grace_s"])

    def _was_oom_killed(self, code: int) -> bool:
        assert self.leader is not None
        is_ours = self.leader.pid in {pid for pid, _ in self.killed}
        return code == -signal.SIGKILL and not is_ours and self.oom_kills.any_lately()

    def _advance_end(self, now: float) -> bool:
        """One look at an ending tree; True when nothing is left of it."""
        members = members_of(os.getpid(), self.group)
        if not members and not (self.group and self.group.is_populated()):
            how = "kill" if self.killed or self.killed_group else "term" if self.asked else "exit"
            self._read_rest()
            removed = self._clean()
            self._tell("gone", how=how, killed=len(self.killed), removed=removed)
            return True
        assert self.ends_at is not None
        if now >= min(self.look_by, self.ends_at) and self.killing_since is None:
            self.record.update(members)  # also what was made while it was ending
        self._end_each(members, now - self.ends_at)
        if self.group and now - self.ends_at >= TRACKER_S:
            # Also those who forked away from every look at them.
            self.killed_group |= self.group.kill()
        if now >= self.ends_at and self.killing_since is None:
            self.killing_since = now
        late_s = now - self.killing_since if self.killing_since else 0.0
        if late_s > self.launch["kill_s"] and not self.told_survivors:
            self.told_survivors = True
            alive = [process for process in members if process.state != "Z"]
            self._tell("survived", members=[describe(process) for process in alive])
        return False

    def _end_each(self, members: list[Process], late_s: float) -> None:
        """TERM, once, while there is time (`late_s` below 0); KILL after that."""
        for process in members:
            identity = (process.pid, process.start)
            if process.state == "Z":
                continue
            if late_s >= 0:
                if kill(process, late_s):
                    self.killed.add(identity)
            elif identity not in self.asked:
                ask_to_end(process)
                self.asked.add(identity)

    def _read_rest(self) -> None:
        with contextlib.suppress(OSError):
            # Bounded: what outlives the leader may go on printing.
            for _ in range(64):
                if not (text := os.read(self.out_r, 65536)):
                    break
                self.log.write(text)

    def _clean(self) -> list[str]:
        """Remove what the tree left: its shared memory, socket, temporary files and group."""
        removed = remove_shared_memory(self.record.shm)
        if self.group:
            self.group.remove()
        remove_home(self.launch["home"], self.launch["made"])
        return removed


def drain_pipe(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while len(os.read(fd, 4096)) == 4096:  # noqa: PLR2004 (the size just asked for)
            pass


def main() -> int:
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    prctl(PR_SET_NAME, ctypes.cast(ctypes.c_char_p(b"hive-guard"), ctypes.c_void_p).value or 0)
    text = b""
    while b"\n" not in text:
        more = control.recv(1 << 20)
        if not more:
            return 0  # hive died before it said what to start
        text += more
    first, _, rest = text.partition(b"\n")
    launch = json.loads(first)
    try:
        guard = Guard(control, launch, rest)
    except OSError as exc:  # no log can be written
        if launch["cgroup"]:
            Group(launch["cgroup"]).remove()
        remove_home(launch["home"], launch["made"])
        news = {"event": "spawn_failed", "error": exc.strerror, "file": exc.filename}
        control.sendall(json.dumps(news).encode() + b"\n")
        return 1
    return guard.run()


if __name__ == "__main__":
    os._exit(main())  # nothing is left to tidy, and hive waits for this process's end

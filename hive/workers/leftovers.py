"""What is still there of a start of a worker after its end: looked for item by item, given back
where it is provably this start's own, and a leak where it stays (R022, R023, R145).

Proof of a process is its (pid, start), the mark in its environment, membership in the control
group that bears the mark, or descent from one of these. Everything here blocks for milliseconds.
"""

import contextlib
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hive.workers import guard
from hive.workers.guard import Group, Process
from hive.workers.journal import Note, Tree, pid_namespace, shm_device
from hive.workers.process import adopted

log = logging.getLogger(__name__)

KINDS = ("process", "directory", "socket", "cgroup", "shared_memory", "vram")
UNIX_SOCKETS = Path("/proc/net/unix")
GUARD = "hive-guard"  # a guard's name, 15 characters at most


@dataclass(frozen=True, slots=True)
class Leak:
    """Something that was taken and is not given back; `since` is seconds of the epoch."""

    kind: str
    holder: str
    worker: str
    mark: str
    how_to_clear: str
    since: float = field(default_factory=time.time, compare=False)

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it the same leak when it is seen again."""
        return self.mark, self.kind, self.holder

    def view(self) -> dict[str, Any]:
        """The leak as the API shows it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.kind.replace('_', ' ')} {self.holder} of {self.worker}"


def members(note: Note, tree: Tree) -> list[Process]:
    """Living processes that are provably of this start; never this process or one above it."""
    if not note.is_of_this_boot:
        return []
    recorded = set()
    if note.pid_namespace == pid_namespace():
        eldest = note.hive[1] if note.hive else 0
        known = {*tree.members, note.guard, note.leader} - {None}
        # Who is older than the hive that started it was not started by it.
        recorded = {one for one in known if one and one[1] >= eldest}
    above = set(lineage())
    return [
        process
        for process in adopted(note.mark, recorded, group_of(note))
        if process.pid not in above and process.state not in ("Z", "X")
    ]


def group_of(note: Note) -> Group | None:
    """The start's control group, if it is there and really one."""
    if note.cgroup is not None and is_control_group(note.cgroup):
        return Group(note.cgroup)
    return None


def lineage() -> Iterator[int]:
    """This process, its parent, and so on up to init."""
    pid = os.getpid()
    while pid > 0:
        yield pid
        process = guard.look_at(pid)
        pid = process.ppid if process else 0


def is_guard(process: Process, note: Note) -> bool:
    """By what is on record; by its name, which anybody may have, only where that is not."""
    if note.guard is not None:
        return (process.pid, process.start) == note.guard
    return process.name == GUARD


def reap(note: Note, tree: Tree) -> None:
    """Collect members that came to hive when their guard was killed, and have ended (R146)."""
    for pid, start in tree.members:
        process = guard.look_at(pid)
        if (
            process
            and (process.start, process.state, process.ppid) == (start, "Z", os.getpid())
            and not is_guard(process, note)  # its end is waited for where it was started
        ):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def leftovers(note: Note, tree: Tree, *, is_home_taken: bool = False) -> list[Leak]:
    """Give back what can be given back; what stays.

    While a process lives only processes are reported, and nothing is touched: it uses the rest.
    `is_home_taken` says that a later start has the same home. What could not be looked at is not
    proved given back, and never keeps the rest from being looked at (R144).
    """
    try:
        living = members(note, tree)
    except OSError as exc:
        log.warning("who lives of %s cannot be seen: %s", note.worker, exc.strerror)
        return [unseen(note, "process", type(exc).__name__)]
    if living:
        # A guard waits for its tree: it is what holds something only when it is alone.
        shown = [p for p in living if not is_guard(p, note)] or living
        return [leak_of_process(note, process) for process in shown]
    looks: dict[str, Callable[[], Iterator[Leak]]] = {
        "cgroup": lambda: _control_group(note),
        "shared_memory": lambda: _shared_memory(note, tree),
    }
    if not is_home_taken:
        looks |= {"socket": lambda: _sockets(note), "directory": lambda: _directory(note, tree)}
    found: list[Leak] = []
    for kind, look in looks.items():
        try:
            found += look()
        except Exception as exc:  # a boundary: one look that fails is no reason to skip the others
            log.warning("what %s left as %s cannot be seen", note.worker, kind, exc_info=True)
            found.append(unseen(note, kind, type(exc).__name__))
    return found


def unseen(note: Note, kind: str, why: str) -> Leak:
    """What nobody could look at, such as where no descriptor is free: not known yet."""
    how = f"hive looks again. Find out why it cannot look at it: {why}."
    return leak(note, kind, "unknown", how)


def leak(note: Note, kind: str, holder: str, how: str) -> Leak:
    return Leak(kind, holder, note.worker, note.mark, how)


def leak_of_process(note: Note, process: Process) -> Leak:
    pid, where = process.pid, guard.describe(process)["wchan"]
    doing = f"{process.state}, waiting in {where}" if where.strip("0") else process.state
    how = (
        f"In state {doing}. See it with 'ps -o pid,user,stat,wchan,args -p {pid}' and end it with "
        f"'kill -9 {pid}', as root or its user; stuck in the kernel (state D), only a reboot ends it."
    )
    return leak(note, "process", described(process), how)


def described(process: Process) -> str:
    name = "".join(c if c.isprintable() else "?" for c in process.name)
    return f"{process.pid} ({name})"


# ── Item by item ────────────────────────────────────────────────────────────────────────────────


def _control_group(note: Note) -> Iterator[Leak]:
    group = group_of(note)
    if group is None:
        return
    group.remove()
    if group.path.exists():
        how = "End the processes in it (its cgroup.procs lists them), then remove it with 'rmdir'."
        yield leak(note, "cgroup", group.path.name, how)


def _shared_memory(note: Note, tree: Tree) -> Iterator[Leak]:
    if not names_there(note, tree):
        return
    guard.remove_shared_memory(tree.shm)
    there = names_there(note, tree)
    if not there:
        return
    everything = list(guard.every_process())
    held = {process: guard.shared_memory(process.pid) for process in everything}
    # Another tree of this hive that uses it has it on record itself.
    hive = {process.pid for process in guard.descendants(os.getpid(), everything)}
    for name, inode in sorted(there.items()):
        users = [process for process, inodes in held.items() if inode in inodes]
        if any(process.pid in hive for process in users):
            continue
        who = ", ".join(map(described, users))
        how = f"End {who}, which uses it; then" if who else "Nobody uses it:"
        yield leak(note, "shared_memory", name, f"{how} remove it from the host's shared memory.")


def names_there(note: Note, tree: Tree) -> dict[str, int]:
    """Recorded names in /dev/shm that are still the same files."""
    if not note.is_of_this_boot or note.shm_device != shm_device():
        return {}
    return {name: inode for name, inode in tree.shm.items() if guard.is_ours(name, inode)}


def _sockets(note: Note) -> Iterator[Leak]:
    """Bound sockets below the home: their holder lives, whoever that is now."""
    lines = UNIX_SOCKETS.read_text(errors="replace").splitlines()[1:]
    rows = [line.split(None, 7) for line in lines]
    for path, inode in sorted({(row[7], row[6]) for row in rows if row[7:]}):
        if path.startswith(f"{note.home}/"):
            who = ", ".join(map(described, _holders(f"socket:[{inode}]")))
            how = f"End {who}, which holds it." if who else "Find its holder with 'ss -xlp'."
            yield leak(
                note, "socket", f"w/{note.home.name}{path.removeprefix(str(note.home))}", how
            )


def _holders(target: str) -> list[Process]:
    """Processes with a descriptor of something."""
    found = []
    for process in guard.every_process():
        with contextlib.suppress(OSError):
            links = f"/proc/{process.pid}/fd"
            if any(_link(f"{links}/{fd}") == target for fd in os.listdir(links)):
                found.append(process)
    return found


def _link(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return None


def _directory(note: Note, tree: Tree) -> Iterator[Leak]:
    home = note.home
    try:
        about = os.lstat(home)
    except FileNotFoundError:
        return
    name = f"w/{home.name}"
    if guard.is_mounted(home):
        how = f"Unmount what is mounted in {name} below server.runtime_dir, then remove it."
        yield leak(note, "directory", name, how)
        return
    if stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid():
        _remove(note, tree, about)
    if os.path.lexists(home):
        how = f"Look what {name} below server.runtime_dir is, and remove it by hand."
        yield leak(note, "directory", name, how)


def _remove(note: Note, tree: Tree, about: os.stat_result) -> None:
    """Remove the home, if it is the one that was made."""
    if tree.home is not None:
        # A device's number is only good for one boot.
        device = tree.home[0] if note.is_of_this_boot else about.st_dev
        guard.remove_home(note.home, (device, tree.home[1]))
        return
    # Nothing was started in it: it is as empty as it was made, or another's.
    for directory in (note.home / "t", note.home):
        with contextlib.suppress(OSError):
            os.rmdir(directory)


# ── What the kernel tells ───────────────────────────────────────────────────────────────────────


def is_control_group(path: Path) -> bool:
    """Whether a directory is there, and really in the control groups' (v2) file system."""
    if not path.is_dir() or os.path.realpath(path) != str(path):
        return False
    around = [(point, kind) for point, kind in guard.mounts() if path.is_relative_to(point)]
    # The nearest one, and of several in one place the last, which covers the others.
    around.sort(key=lambda mount: len(mount[0]))
    return bool(around) and around[-1][1] == "cgroup2"

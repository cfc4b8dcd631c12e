"""What one start of the real engine takes, and what of that is still there."""

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from hive.workers import guard
from steps import leaks, real
from steps.driver import Hive
from steps.waiting import must


@dataclass(frozen=True)
class Start:
    """All that one start of the engine consists of."""

    number: int
    mark: str
    home: Path
    group: Path | None
    processes: frozenset[tuple[int, int]]  # pid, start
    sockets: frozenset[int]  # inodes
    shared_memory: frozenset[str]

    @classmethod
    def of(cls, hive: Hive) -> "Start":
        worker, tree = hive.worker(), hive.tree()
        mapped = {name for process in tree for name in leaks.shm_of(process.pid)}
        must(lambda: all(name in hive.records for name in mapped), 5, "the guard's record")
        record = json.loads(hive.records)
        (home,) = (hive.runtime / "w").iterdir()
        # No other real engine runs yet, so these are its own (steps/__init__.py has the order).
        nameless = real.semaphores()
        return cls(
            number=worker["starts"],
            mark=record["mark"],
            home=home,
            group=Path(record["cgroup"]) if record["cgroup"] else None,
            processes=frozenset((process.pid, process.start) for process in tree),
            sockets=frozenset(inode for process in tree for inode in _sockets_of(process.pid)),
            shared_memory=frozenset(mapped | record["shm"].keys() | nameless),
        )

    def left(self) -> list[str]:
        found = [
            f"process {process}"
            for process in guard.every_process()
            if (process.pid, process.start) in self.processes
            or guard.mark_of(process.pid) == self.mark
        ]
        found += [f"socket {line}" for line in _sockets(self.sockets, f"{self.home}/")]
        there = self.shared_memory & set(os.listdir(guard.SHM))
        found += [f"shared memory {name}" for name in sorted(there)]
        paths = [self.home, *([self.group] if self.group else [])]
        return found + [f"directory {path}" for path in paths if path.exists()]


def _sockets_of(pid: int) -> set[int]:
    links, found = Path(f"/proc/{pid}/fd"), set()
    for fd in os.listdir(links):
        with contextlib.suppress(OSError):  # closed meanwhile
            if match := re.match(r"socket:\[(\d+)", os.readlink(links / fd)):
                found.add(int(match[1]))
    return found


def _sockets(inodes: frozenset[int], home: str) -> list[str]:
    """What the kernel still has of these sockets, or of any that is bound in this directory."""
    return [
        f"{table} {line}"
        for table, column in (("unix", 6), ("tcp", 9), ("tcp6", 9))
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
        if int(line.split()[column]) in inodes or home in line
    ]

"""How much memory and disk this host has left, and the errors when that is too little."""

import errno
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hive.errors import InsufficientDisk, InsufficientRam
from hive.workers.footprint import MIB, Need, gib_down, gib_up

PROC = Path("/proc")
FILES = 64  # that a worker's start may make: its home, sockets, notes and compiled kernels


@dataclass(frozen=True, slots=True)
class Room:
    """Host memory that can be had, and what sets the limit."""

    bytes: int
    source: str


def available_ram(proc: Path = PROC) -> Room:
    """The kernel's MemAvailable, or what the tightest control group around hive leaves."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE)
    rooms = [Room(int(match[1]) * 1024, "MemAvailable")] if match else []
    rooms += (room for group in _memory_groups(proc) if (room := _group_room(group)))
    return min(rooms, key=lambda room: room.bytes)


def _mounts(proc: Path) -> Iterator[tuple[str, Path, str, str]]:
    """Of each mount: the directory of its file system, where it is, its type and options."""
    for line in (proc / "self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, _, options = right.split(" ", 2)  # the middle one may be empty
        yield root, Path(point.replace("\\040", " ")), kind, options


def _memory_groups(proc: Path) -> Iterator[Path]:
    """The control groups of this process that can limit memory, and those around them."""
    own = {}
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            own["cgroup" if controllers else "cgroup2"] = path
    for root, point, kind, options in _mounts(proc):
        if kind not in own or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        # In a container the mount shows a part of the tree, and the path may be the host's.
        inside = os.path.relpath(own[kind], root)
        group = point if inside.startswith("..") else point / inside
        yield from (g for g in (group, *group.parents) if g.is_relative_to(point))


def _group_room(group: Path) -> Room | None:
    """What is left below a group's limit, the page cache counted as free; None without a limit."""
    for limit, used, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            left = int((group / limit).read_text()) - int((group / used).read_text())
            lines = (group / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # the other version's name, or "max"
            continue
        stats = dict(line.split() for line in lines)
        cache = sum(int(stats.get(f"{prefix}{a}_file", 0)) for a in ("active", "inactive"))
        return Room(max(0, left + cache), f"the memory limit of control group {group}")
    return None


def check_ram(needs: Sequence[tuple[str, Need]], room: Room) -> InsufficientRam | None:
    """The error when workers that start together need more than there is, each with its need."""
    required = sum(need.bytes for _, need in needs)
    if required <= room.bytes:
        return None
    each = "; ".join(f"{name}: {need.source}" for name, need in needs)
    return InsufficientRam(
        f"Not enough host memory: {gib_up(required)}GB required, "
        f"{gib_down(room.bytes)}GB available ({room.source}). {each}.",
        action=f"Free {gib_up(required - room.bytes)} GiB of host memory, raise the limit that is "
        "named, or configure fewer or smaller models or a lower kv_cache_gib.",
        required_ram_mb=math.ceil(required / MIB),
        available_ram_mb=room.bytes // MIB,
    )


def why(exc: OSError, path: Path) -> str:
    """What the system says, and what it does not: that a disk with room has no inodes left."""
    said = exc.strerror or str(exc)
    if exc.errno == errno.ENOSPC and _inodes(os.statvfs(_there(path))) == 0:
        return f"{said}: its inodes are used up"
    return said


def _there(path: Path) -> Path:
    """The nearest directory to a path that exists."""
    return next(p for p in (path, *path.parents) if p.exists()).resolve()


def _inodes(about: os.statvfs_result) -> int | None:
    """How many files can be made; None on a file system without a limit."""
    return about.f_favail if about.f_files else None


def check_disk(path: Path, need_bytes: int, key: str, proc: Path = PROC) -> InsufficientDisk | None:
    """The error when a directory, which need not exist yet, has less than `need_bytes` left."""
    there = _there(path)
    about = os.statvfs(there)
    if not about.f_blocks:
        return None  # a tmpfs without a limit
    free, files = about.f_bavail * about.f_frsize, _inodes(about)
    lacks_files = files is not None and files < FILES
    if free >= need_bytes and not lacks_files:
        return None
    points = [(point, kind) for _, point, kind, _ in _mounts(proc) if there.is_relative_to(point)]
    # Of two mounts on one directory the later one is seen.
    point, kind = max(reversed(points), key=lambda mount: len(mount[0].parts))
    needs, has = f"{math.ceil(need_bytes / MIB)} MiB", f"{free // MIB} MiB"
    short, option = f"{math.ceil((need_bytes - free) / MIB)} MiB", "size"
    if lacks_files:
        needs, has, option = f"{FILES} new files", f"{files} inodes", "nr_inodes"
        short = f"{FILES - (files or 0)} inodes"
    grow = f", or enlarge it ('mount -o remount,{option}=… {point}')" if kind == "tmpfs" else ""
    return InsufficientDisk(
        f"server.{key}: {path} needs {needs}, but its file system "
        f"({kind} on {point}) has {has} left: {short} too little.",
        action=f"Free {short} on {point}{grow}, or set server.{key} to another file system.",
        required_disk_mb=math.ceil(need_bytes / MIB),
        available_disk_mb=free // MIB,
    )

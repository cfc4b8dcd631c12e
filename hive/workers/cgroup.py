"""Control groups (v2): where hive may make one for each worker, and which ones are its own.

Found, not assumed: a host may have the hierarchy mounted elsewhere, read-only, from another
namespace, or not at all. No controller is ever enabled, so hive may stay in its own group while
the workers' groups are beneath it, and nothing but those is touched.
"""

import contextlib
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hive.workers.guard import Group, tell_kernel

log = logging.getLogger(__name__)

TRIAL_S = 5.0  # for a process to be started, and to be ended by its group
MOST_BELOW = 256  # an engine may make groups of its own, but not so many that it holds hive up
DEEPEST = 8


def find(proc: Path = Path("/proc/self")) -> Path | None:
    """hive's own group, where a group for a worker can be made, joined and killed; else None.

    Tried with a process: what is mounted and writable may still refuse (rights, an old kernel).
    """
    try:
        candidates = list(own_groups(_read(proc / "mountinfo"), _read(proc / "cgroup")))
    except OSError as exc:
        log.debug("no control groups: %s", exc)
        return None
    for path in candidates:
        try:
            # A group of that name may be mounted here and still be another one than ours.
            if str(os.getpid()) not in _read(path / "cgroup.procs").split():
                log.debug("no control groups in %s: hive is not in it", path)
            elif works(path):
                return path
        except (OSError, subprocess.SubprocessError) as exc:
            log.debug("no control groups in %s: %s", path, exc)
    return None


def own_groups(mountinfo: str, membership: str) -> Iterator[Path]:
    """Where the group of /proc/PID/cgroup may be seen, by each v2 mount of /proc/PID/mountinfo.

    None where it lies outside of what this namespace shows ("/../…") or of what is mounted.
    """
    ours = [line[3:] for line in membership.splitlines() if line.startswith("0::")]
    if not ours or ".." in Path(ours[0]).parts:
        return
    for line in mountinfo.splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            root, at = (_plain(field) for field in mount.split(" ")[3:5])
            with contextlib.suppress(ValueError):
                yield Path(at) / Path(ours[0]).relative_to(root)


def works(parent: Path) -> bool:
    """Whether a group beneath `parent` takes a process, counts it and kills it.

    Raises OSError or SubprocessError where it does not.
    """
    group = make(parent / f"hive-{secrets.token_hex(8)}")
    try:
        # It ends with its input, so it does not outlive hive either.
        command = [sys.executable, "-I", "-S", "-c", "input()"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/", env={}
        ) as process:
            try:
                tell_kernel(group.path / "cgroup.procs", str(process.pid))
                counted = group.is_populated()
                tell_kernel(group.path / "cgroup.kill", "1")  # since Linux 5.14
                ended = process.wait(TRIAL_S)
            finally:
                process.kill()
        return counted and ended == -signal.SIGKILL and not group.is_populated()
    finally:
        group.remove()


def make(path: Path) -> Group:
    """Make a group for one worker. Raises OSError."""
    path.mkdir()
    for limit, most in (("cgroup.max.descendants", MOST_BELOW), ("cgroup.max.depth", DEEPEST)):
        with contextlib.suppress(OSError):
            tell_kernel(path / limit, str(most))
    return Group(path)


def _read(path: Path) -> str:
    return path.read_text(errors="surrogateescape")


def _plain(field: str) -> str:
    r"""A field of mountinfo, in which spaces and their like are octal (\040)."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)

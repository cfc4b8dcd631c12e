"""state_dir and runtime_dir: whose they are, and that one hive at a time holds them."""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hive.errors import ConfigInvalid
from hive.settings import Settings
from hive.workers.host import why

LOCK = "hive.lock"
KEYS = ("state_dir", "runtime_dir")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def both(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Each directory with its key in [server]."""
    yield from ((key, getattr(settings.server, key)) for key in KEYS)


def check_owner(key: str, path: Path) -> None:
    """What others may write proves nothing, and may be a trap. Raises ConfigInvalid, or OSError."""
    about = path.stat()
    if not stat.S_ISDIR(about.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if about.st_uid != os.geteuid():
        raise ConfigInvalid(
            f"server.{key}: {path} belongs to another user (uid {about.st_uid}).",
            action="Run this as the user that hive runs as. That user needs a directory of its own "
            f"for server.{key}.",
        )
    if about.st_mode & _OTHERS_WRITE:
        raise ConfigInvalid(
            f"server.{key}: others may write to {path} (mode {stat.S_IMODE(about.st_mode):04o}, "
            f"owner {about.st_uid}).",
            action=f"Set server.{key} to a directory that is hive's alone; if {path} is to be it, "
            f"run 'chmod go-w {path}'.",
        )


@contextmanager
def only_hive(key: str, path: Path) -> Iterator[None]:
    """Hold a directory while the block runs. Raises ConfigInvalid, also when another hive does."""
    with usable(key, path):
        fd = open_lock(path)
    try:
        with usable(key, path):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                raise ConfigInvalid(
                    f"server.{key}: another hive (pid {holder}) runs in {path}.",
                    action=f"Stop that hive, or set server.{key} to another directory.",
                ) from exc
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def open_lock(path: Path) -> int:
    """The lock file of a directory: neither a link to what is somebody's nor a pipe to wait for."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path / LOCK, flags, 0o600)
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"{LOCK} in it is a link") from exc
        raise
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.EINVAL, f"{LOCK} in it is not a file of its own")
    return fd


@contextmanager
def usable(key: str, path: Path) -> Iterator[None]:
    """The system's errors as the configuration's."""
    try:
        yield
    except OSError as exc:
        inside = Path(exc.filename).name if exc.filename not in (None, str(path)) else ""
        raise ConfigInvalid(
            f"server.{key}: {path} cannot be used: {f'{inside}: ' if inside else ''}"
            f"{why(exc, path)}.",
            action=f"Let hive's user write to that directory, on a disk with room, and remove a "
            f"{LOCK} that is no file; or set server.{key} to another one.",
        ) from exc

"""What is on disk of one start of a worker: written before the fork, read back with suspicion.

A file may be damaged, another hive's, or made by somebody who wishes the host ill: what is read
must have the shape of what is written, and nothing is done with it otherwise.
"""

import contextlib
import logging
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hive.workers import guard

log = logging.getLogger(__name__)

MOST_BYTES = 4 * 1024 * 1024  # of a file that is read; a tree of 10,000 processes needs 200 KiB
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
HOME_RECORD = "tree.json"  # where a guard writes its tree down when it is told nothing else

Pid = Annotated[int, Field(gt=1, lt=1 << 31)]  # never init
Start = Annotated[int, Field(ge=0)]  # clock ticks since boot
Identity = tuple[Pid, Start]
Inode = Annotated[int, Field(ge=0)]

T = TypeVar("T", bound="_Written")


class Damaged(Exception):
    """A file that is not what hive writes; the text says why, without its path or content."""


class _Written(BaseModel):
    # Unknown keys are a newer hive's.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Note(_Written):
    """One start: who began it, what it is known by, and what it was to take."""

    mark: str = Field(pattern=r"^[0-9a-f]{16}$")  # HIVE_MARK in its environment
    worker: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    boot: str = Field(max_length=64)  # of an earlier boot no process or shared memory is left
    pid_namespace: int  # pids mean nothing in another one
    shm_device: int  # /dev/shm is another one in another container
    hive: tuple[Annotated[int, Field(gt=0, lt=1 << 31)], Start] | None = None
    guard: Identity | None = None
    leader: Identity | None = None
    home: Path
    made: tuple[Inode, Inode] | None = None  # the home, when it was there
    shm_before: frozenset[Inode] | None = None  # what was in /dev/shm: never the tree's
    cgroup: Path | None = None
    devices: Mapping[str, Mapping[str, str | int | float | None]] = {}  # what was free before
    grace_s: float = Field(5.0, ge=0, le=86_400)  # what its guard gives the tree when hive dies
    since: float = 0.0  # seconds of the epoch

    @field_validator("home")
    @classmethod
    def _is_a_home(cls, home: Path) -> Path:
        if not home.is_absolute() or not (home.name.isascii() and home.name.isdigit()):
            raise ValueError("home is not a worker's")
        return home

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Note":
        if self.cgroup is not None and (
            not self.cgroup.is_absolute() or self.cgroup.name != f"hive-{self.mark}"
        ):
            raise ValueError("cgroup is not this worker's")
        if any(one and self.hive and one[1] < self.hive[1] for one in (self.guard, self.leader)):
            raise ValueError("a process is older than the hive that started it")
        return self

    @property
    def is_of_this_boot(self) -> bool:
        return self.boot == boot_id()


class Tree(_Written):
    """What the guard wrote down: the members of its tree and the shared memory that they wrote.

    And what was there before them: the home as it was made (st_dev, st_ino), and every file in
    /dev/shm. Where a record lacks one of these, nobody can tell what is the tree's.
    """

    mark: str = Field(pattern=r"^[0-9a-f]{16}$")
    cgroup: Path | None = None
    home: tuple[Inode, Inode] | None = None
    members: list[Identity]
    shm_before: frozenset[Inode] | None = None
    shm: dict[str, Inode]

    @field_validator("shm")
    @classmethod
    def _names_in_shm(cls, shm: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        if any({"", ".", ".."} & set(name.split("/")) or "\0" in name for name in shm):
            raise ValueError("a name that leads out of /dev/shm")
        before = info.data.get("shm_before")
        if before is None:
            return {}
        # Names in directories below it are left to whoever made the directories.
        return {n: inode for n, inode in shm.items() if "/" not in n and inode not in before}


NO_TREE = Tree(mark="0" * 16, members=[], shm={})


def boot_id() -> str:
    return BOOT_ID.read_text().strip()


def pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def shm_device() -> int:
    """The device of /dev/shm; 0 where there is none."""
    with contextlib.suppress(OSError):
        return os.stat(guard.SHM).st_dev
    return 0


def identity(pid: int) -> Identity | None:
    """A process as the journal knows it, or None when it is gone."""
    process = guard.look_at(pid)
    return (process.pid, process.start) if process else None


def new(worker: str, home: Path, mark: str, **facts: Any) -> Note:
    """A start that is about to be made.

    Raises ValueError (pydantic's ValidationError is one) when it could not be read back.
    """
    return Note(
        worker=worker,
        home=home,
        mark=mark,
        boot=boot_id(),
        pid_namespace=pid_namespace(),
        shm_device=shm_device(),
        shm_before=frozenset(guard.names_in_shm().values()),
        hive=identity(os.getpid()),
        since=time.time(),
        **facts,
    )


def file_of(directory: Path, mark: str) -> Path:
    return directory / f"{mark}.json"


def write(directory: Path, note: Note) -> None:
    """Whole or not at all, and on disk when this returns. Raises OSError."""
    directory.mkdir(mode=0o700, exist_ok=True)
    _write(file_of(directory, note.mark), note)


def write_tree(directory: Path, tree: Tree) -> None:
    """A tree's record in the guard's place, when there is no guard any more. Raises OSError."""
    _write(record_in(directory, tree.mark), tree)


def _write(path: Path, content: _Written) -> None:
    draft = path.with_name(f"{path.name}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
            file.write(content.model_dump_json().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def remove(directory: Path, mark: str) -> None:
    """Forget a start. The guard's record first: without the note nobody would know whose it is."""
    try:
        for one in (record_in(directory, mark), file_of(directory, mark)):
            for file in (one.with_name(f"{one.name}.new"), one):
                file.unlink(missing_ok=True)
    except OSError as exc:  # the next start's sweep finds nothing of it, and tries again
        log.warning("a start stays in the journal (mark %s): %s", mark, exc.strerror)


def record_in(directory: Path, mark: str) -> Path:
    """Where a guard writes its tree down when it is told to do so in the journal."""
    return directory / f"{mark}.tree.json"


def read_note(path: Path) -> Note:
    """The note in a file of this name. Raises Damaged, and OSError as `read_tree` does."""
    note = _parse(Note, path)
    if path.name != f"{note.mark}.json":
        raise Damaged("it has another's name")
    return note


def records_of(directory: Path, note: Note) -> tuple[Path, Path]:
    """Where the guard's record of a start can be: in the journal, or in its home."""
    return record_in(directory, note.mark), note.home / HOME_RECORD


def tree_of(directory: Path, note: Note) -> Tree:
    """What the guard of a start wrote down. Raises Damaged, and OSError when nobody could look."""
    for path in records_of(directory, note):
        with contextlib.suppress(FileNotFoundError):
            tree = read_tree(path)
            if tree.mark != note.mark:
                raise Damaged("it is another's")
            if tree.home is None and path.parent == note.home:  # the record proves it: it is in it
                about = os.lstat(note.home)
                tree = tree.model_copy(update={"home": (about.st_dev, about.st_ino)})
            return tree
    return unrecorded(note)


def unrecorded(note: Note) -> Tree:
    """A tree of which the guard's record is not there: what hive itself wrote down of it."""
    return Tree(mark=note.mark, members=[], shm={}, home=note.made, shm_before=note.shm_before)


def read_tree(path: Path) -> Tree:
    """A guard's record. Raises Damaged, FileNotFoundError, and OSError when nobody could look."""
    return _parse(Tree, path)


def _parse(kind: type[T], path: Path) -> T:
    try:
        return kind.model_validate_json(_read(path))
    except ValidationError as exc:
        first = exc.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"][:1]))
        raise Damaged(f"{where or 'content'}: {first['msg']}") from exc


def _read(path: Path) -> bytes:
    """The content of a plain file of ours; never a link's, never a wait for a pipe's."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as exc:
        if exc.errno in guard.BLIND:
            raise
        raise Damaged(f"it cannot be read: {exc.strerror}") from exc
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise Damaged("it is no plain file")
        if about.st_uid != os.geteuid():
            raise Damaged("it is another user's")
        if about.st_size > MOST_BYTES:
            raise Damaged("it is too large")
        return os.read(fd, MOST_BYTES)
    finally:
        os.close(fd)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

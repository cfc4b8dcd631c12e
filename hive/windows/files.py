"""A window's files: its manifest, and a hard link to each of its KV blocks. Everything blocks.

A window is a folder, named by its id, that appears whole or not at all: it is made under another
name, everything in it is on disk, then it is renamed. A block is LMCache's file under another
name: nothing is copied, and LMCache's tier may lose its own name for it.
"""

import contextlib
import errno
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blake3
import msgspec
from msgspec import structs

from hive.errors import (
    InsufficientDisk,
    StorageCorrupted,
    StorageQuotaExceeded,
    StorageReadFailed,
    StorageWriteFailed,
)
from hive.policy.windows import Identity
from hive.settings import open_regular
from hive.storage.catalogue import Window
from hive.storage.durable import renewed, synced, touched

MANIFEST = "manifest.json"
VERSION = 1
UNFINISHED = ".part"
MIB = 2**20
_NO_FILE = (errno.EISDIR, errno.ELOOP, errno.EINVAL)

BEYOND_REPAIR = (
    "Without its manifest nothing of the window can be recovered: delete it with "
    "'hive window delete --force', and freeze the session again."
)

Progress = Callable[[int], None]  # hears how many blocks are done


class Block(msgspec.Struct, frozen=True):
    """One file: its name in the folder, bytes, and blake3 in hexadecimal digits."""

    name: str
    size: int
    blake3: str


class Manifest(msgspec.Struct, frozen=True):
    """All that is needed to have a window again, also where the catalogue is lost.

    `blocks` are, for each chunk in order, one file for each worker of the engine.
    """

    version: int
    id: str
    owner: str
    name: str
    session_id: str
    model: str
    created_at: float
    salt: str
    tokens: list[int]
    hashes: list[str]
    blocks: list[list[Block]]
    identity: dict[str, Any]
    conversation: dict[str, Any]
    description: str = ""
    tags: list[str] = []
    parent_id: str | None = None

    @property
    def bytes(self) -> int:
        return sum(block.size for chunk in self.blocks for block in chunk)

    def window(self) -> Window:
        """Its row in the catalogue."""
        return Window(
            id=self.id,
            owner=self.owner,
            name=self.name,
            session_id=self.session_id,
            model=self.model,
            salt=self.salt,
            created_at=self.created_at,
            identity=self.identity,
            tokens=len(self.tokens),
            blocks=len(self.blocks),
            bytes=self.bytes,
            description=self.description,
            tags=tuple(self.tags),
            parent_id=self.parent_id,
        )


class _Sealed(msgspec.Struct):
    """As it is on disk: the manifest's own checksum before it."""

    blake3: str
    manifest: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Health:
    """Of each chunk of a window: whole, or what is wrong with the files of it.

    What cannot be read may be had again another day: nothing takes it out of the window but a
    block that replaces it.
    """

    missing: tuple[str, ...] = ()
    corrupt: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    @property
    def damaged(self) -> tuple[str, ...]:
        return self.corrupt + self.unreadable

    @property
    def is_whole(self) -> bool:
        return not (self.missing or self.damaged)


class WindowFiles:
    """Below `directory` (0700); `tier` is LMCache's, on the same file system."""

    def __init__(self, directory: Path, tier: Path) -> None:
        self.directory, self.tier = directory, tier
        # Folders of which a change may not be on disk, though nothing will say so again.
        self._doubted: set[Path] = set()

    def folder(self, window_id: str) -> Path:
        return self.directory / window_id

    # ── freeze ──────────────────────────────────────────────────────────────────────────────────

    def begin(self, window_id: str) -> Path:
        """An empty folder for what is being frozen. Raises StorageWriteFailed, InsufficientDisk."""
        part = self._unfinished(window_id)
        with writing(on=self.tier):
            self.directory.mkdir(mode=0o700, exist_ok=True)
            part.mkdir(mode=0o700, exist_ok=True)
        return part

    def take(
        self,
        part: Path,
        names: Sequence[Sequence[str]],
        told: Progress,
        taken: dict[int, list[Block]] | None = None,
    ) -> list[list[Block]]:
        """Link the tier's files of each chunk into a folder, and see each one safe on disk.

        `taken` remembers for the next attempt which chunks are: each one is tried, whatever is
        wrong with another (C28). Raises FileNotFoundError for one that is not in the tier any more,
        StorageWriteFailed; and at once what no repetition helps (C25).
        """
        taken = {} if taken is None else taken
        wrong: list[Exception] = []
        for at, chunk in enumerate(names):
            if at in taken:
                continue
            try:
                taken[at] = [self._taken(part, at, rank, name) for rank, name in enumerate(chunk)]
            except (FileNotFoundError, StorageWriteFailed) as exc:
                wrong.append(exc)
            told(len(taken))
        if wrong:
            raise wrong[0]
        return [taken[at] for at in range(len(names))]

    def _taken(self, part: Path, at: int, rank: int, name: str) -> Block:
        own, theirs = part / f"{at:06d}-{rank}", self.tier / name
        size = 0
        with writing(FileNotFoundError, on=self.tier, needs=lambda: size):
            own.unlink(missing_ok=True)  # of an attempt before
            size = theirs.stat().st_size
            os.link(theirs, own)
            return _saved(own, theirs)

    def put(self, part: Path, name: str, content: Iterable[bytes]) -> None:
        """A block that comes from elsewhere, on disk when this returns.

        Raises StorageWriteFailed, InsufficientDisk, and whatever `content` does.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with writing(), open(os.open(part / name, flags, 0o600), "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, part: Path, manifest: Manifest) -> Path:
        """Write the manifest and give the folder its name: from then on it is whole.

        Raises StorageWriteFailed, InsufficientDisk.
        """
        folder = self.folder(manifest.id)
        with writing(on=self.tier, needs=lambda: len(sealed(manifest))):
            if folder.is_dir():  # an attempt before came so far, and its sync has failed
                folder.rename(part)
            self._write_manifest(part, manifest)
            with synced(self.directory):
                part.rename(folder)
        return folder

    def _write_manifest(self, folder: Path, manifest: Manifest) -> None:
        new = folder / f"{MANIFEST}.new"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(sealed(manifest))
            file.flush()
            os.fsync(fd)
        with self._synced(folder):
            new.replace(folder / MANIFEST)

    @contextlib.contextmanager
    def _synced(self, folder: Path) -> Iterator[None]:
        """`synced`; where that has failed before, all of the folder is made anew."""
        try:
            with synced(folder):
                if folder in self._doubted:
                    renewed(folder)
                yield
        except OSError:
            self._doubted.add(folder)
            raise
        self._doubted.discard(folder)

    def rewrite(self, manifest: Manifest) -> None:
        """Replace the manifest of a window. Raises StorageWriteFailed."""
        with writing(on=self.tier, needs=lambda: len(sealed(manifest))):
            self._write_manifest(self.folder(manifest.id), manifest)

    def clone(self, manifest: Manifest, clone: Manifest) -> None:
        """Another window of the same blocks. Raises StorageWriteFailed, StorageCorrupted."""
        part = self.begin(clone.id)
        source = self.folder(manifest.id)
        try:
            with writing(on=self.tier):
                for block in _each(manifest):
                    with contextlib.suppress(FileNotFoundError):  # it is missing there as well
                        os.link(source / block.name, part / block.name)
            self.finish(part, clone)
        except BaseException:
            self.remove(clone.id)
            raise

    # ── what is there ───────────────────────────────────────────────────────────────────────────

    def manifest(self, window_id: str) -> Manifest:
        """Raises StorageCorrupted where it is damaged or gone, StorageReadFailed."""
        path = self.folder(window_id) / MANIFEST
        try:
            with open_regular(path, os.O_NOFOLLOW) as file:
                raw = file.read()
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise StorageCorrupted(
                "The window's manifest is missing.", action=BEYOND_REPAIR
            ) from exc
        except OSError as exc:
            raise StorageReadFailed(
                f"The window's manifest cannot be read: {exc.strerror}."
            ) from exc
        manifest = unsealed(raw)
        if manifest.version != VERSION or manifest.id != window_id:
            raise StorageCorrupted(
                f"The window's manifest is of version {manifest.version}, or another window's; "
                f"this hive reads version {VERSION}."
            )
        return manifest

    def health(
        self, manifest: Manifest, told: Progress, found: dict[int, Health] | None = None
    ) -> list[Health]:
        """Read every block. Raises StorageReadFailed.

        `found` remembers for the next attempt what is known of which chunk; those with something
        unreadable are looked at again.
        """
        found = {} if found is None else found
        for at, chunk in enumerate(manifest.blocks):
            if at not in found or found[at].unreadable:
                found[at] = self._health(self.folder(manifest.id), chunk)
            told(at + 1)
        return [found[at] for at in range(len(manifest.blocks))]

    def _health(self, folder: Path, chunk: Sequence[Block]) -> Health:
        missing, corrupt, unreadable = [], [], []
        for block in chunk:
            try:
                if _measured(folder / block.name) != block:
                    corrupt.append(block.name)
            except FileNotFoundError:
                missing.append(block.name)
            except OSError as exc:
                if exc.errno in _NO_FILE:
                    corrupt.append(block.name)
                elif exc.errno == errno.EIO:  # a broken sector, say, or a cable
                    unreadable.append(block.name)
                else:
                    raise StorageReadFailed(
                        f"Block {block.name} cannot be read: {exc.strerror}."
                    ) from exc
        return Health(tuple(missing), tuple(corrupt), tuple(unreadable))

    def shared(self, manifest: Manifest) -> int:
        """How many of its files are LMCache's as well. Raises StorageReadFailed."""
        folder = self.folder(manifest.id)
        with reading("The KV tier"):
            with os.scandir(self.tier) as entries:
                there = {entry.inode() for entry in entries}
            with os.scandir(folder) as entries:
                mine = {entry.inode() for entry in entries if entry.name != MANIFEST}
        return len(mine & there)

    def folders(self) -> set[str]:
        """The ids of all windows that have a folder. Raises StorageReadFailed."""
        with reading("The directory of windows"):
            return {
                entry.name
                for entry in self._entries()
                if entry.is_dir(follow_symlinks=False) and not entry.name.endswith(UNFINISHED)
            }

    def unfinished(self) -> list[str]:
        """The ids of those that are not whole, or not gone. Raises StorageReadFailed."""
        with reading("The directory of windows"):
            names = [entry.name for entry in self._entries()]
        return sorted(name.removesuffix(UNFINISHED) for name in names if name.endswith(UNFINISHED))

    def _entries(self) -> "list[os.DirEntry[str]]":
        try:
            with os.scandir(self.directory) as entries:
                return list(entries)
        except FileNotFoundError:  # nothing was frozen yet
            return []

    # ── thaw and repair ─────────────────────────────────────────────────────────────────────────

    def give_back(self, manifest: Manifest, chunk: int, names: Sequence[str]) -> int:
        """Put a whole chunk's blocks into the tier, under the names that engines look for.

        What is there already and is another file is replaced: nobody has checked it. How many
        were linked. Raises StorageWriteFailed.
        """
        linked = 0
        folder = self.folder(manifest.id)
        with writing(on=self.tier):
            for block, name in zip(manifest.blocks[chunk], names, strict=True):
                own, theirs = folder / block.name, self.tier / name
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samefile(own, theirs):
                        continue
                new = folder / f".{secrets.token_hex(4)}"
                os.link(own, new)
                try:
                    new.replace(theirs)
                finally:
                    new.unlink(missing_ok=True)
                linked += 1
        return linked

    def drop(self, manifest: Manifest, health: Health) -> None:
        """Take a chunk's corrupt blocks out of the window. Raises StorageWriteFailed."""
        folder = self.folder(manifest.id)
        with writing():
            for name in health.corrupt:
                own = folder / name
                if own.is_dir() and not own.is_symlink():
                    shutil.rmtree(own)
                else:
                    own.unlink(missing_ok=True)

    def expel(self, manifest: Manifest, health: Sequence[Health]) -> None:
        """Take damaged blocks out of the tier, by whichever name they are there.

        LMCache neither checks what it reads nor writes what is there. Raises StorageWriteFailed.
        """
        folder = self.folder(manifest.id)
        damaged = set()
        with writing():
            for name in (name for one in health for name in one.damaged):
                with contextlib.suppress(FileNotFoundError):
                    damaged.add((folder / name).stat(follow_symlinks=False).st_ino)
            with os.scandir(self.tier) as entries:
                for entry in entries:
                    if entry.inode() in damaged and entry.is_file(follow_symlinks=False):
                        Path(entry.path).unlink(missing_ok=True)

    def take_again(
        self, manifest: Manifest, chunk: int, names: Sequence[str], *, as_it_was: bool
    ) -> list[Block] | None:
        """The tier's files of a chunk into the window; with `as_it_was` only the very same bytes.

        None where they are not there, or not the same. Raises StorageWriteFailed.
        """
        folder = self.folder(manifest.id)
        found: list[Block] = []
        linked: list[Path] = []
        with writing(on=self.tier):
            try:
                for block, name in zip(manifest.blocks[chunk], names, strict=True):
                    new, theirs = folder / f".{secrets.token_hex(4)}", self.tier / name
                    try:
                        os.link(theirs, new)
                    except FileNotFoundError:
                        return None
                    linked.append(new)
                    # Of the link: another file may have the tier's name by now.
                    mine = structs.replace(_saved(new, theirs), name=block.name)
                    if as_it_was and mine != block:
                        return None
                    found.append(mine)
                with self._synced(folder):
                    for block, new in zip(found, linked, strict=True):
                        new.replace(folder / block.name)
            finally:
                for new in linked:  # one and the same file is not renamed
                    new.unlink(missing_ok=True)
        return found

    # ── the end ─────────────────────────────────────────────────────────────────────────────────

    def remove(self, window_id: str) -> None:
        """The folder, finished or not; removing it again does nothing. Raises StorageWriteFailed."""
        folder, unfinished = self.folder(window_id), self._unfinished(window_id)
        with writing():
            if not self.directory.is_dir():
                return
            try:
                with synced(self.directory):
                    with contextlib.suppress(FileNotFoundError):
                        # From this moment on it is no window, however far the rest comes.
                        folder.rename(unfinished)
                    with contextlib.suppress(FileNotFoundError):
                        if unfinished.is_dir() and not unfinished.is_symlink():
                            shutil.rmtree(unfinished)
                        else:
                            unfinished.unlink()
                    if folder in self._doubted:
                        touched(self.directory, unfinished.name)
            except OSError:
                self._doubted.add(folder)
                raise
            self._doubted -= {folder, unfinished}

    def _unfinished(self, window_id: str) -> Path:
        return self.directory / f"{window_id}{UNFINISHED}"

    def __repr__(self) -> str:
        return f"<WindowFiles {self.directory}>"


def made(
    window: Window,
    conversation: dict[str, Any],
    tokens: Sequence[int],
    hashes: Sequence[bytes],
    blocks: list[list[Block]],
    identity: Identity,
) -> Manifest:
    """The manifest of a window that is frozen just now."""
    return Manifest(
        version=VERSION,
        id=window.id,
        owner=window.owner,
        name=window.name,
        session_id=window.session_id,
        model=window.model,
        created_at=window.created_at,
        salt=window.salt,
        tokens=list(tokens),
        hashes=[one.hex() for one in hashes],
        blocks=blocks,
        identity=asdict(identity),
        conversation=conversation,
        description=window.description,
        tags=list(window.tags),
        parent_id=window.parent_id,
    )


def sealed(manifest: Manifest) -> bytes:
    """A manifest as it is on disk: with its own checksum before it."""
    raw = msgspec.json.encode(manifest)
    return msgspec.json.encode(_Sealed(blake3.blake3(raw).hexdigest(), msgspec.Raw(raw)))


def unsealed(raw: bytes) -> Manifest:
    """What `sealed` has made. Raises StorageCorrupted."""
    try:
        found = msgspec.json.decode(raw, type=_Sealed)
        if blake3.blake3(bytes(found.manifest)).hexdigest() != found.blake3:
            raise StorageCorrupted(
                "The window's manifest does not fit its checksum.", action=BEYOND_REPAIR
            )
        return msgspec.json.decode(found.manifest, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise StorageCorrupted(
            "The window's manifest cannot be understood.", action=BEYOND_REPAIR
        ) from exc


def _each(manifest: Manifest) -> Iterator[Block]:
    for chunk in manifest.blocks:
        yield from chunk


def _measured(path: Path, *, is_synced: bool = False) -> Block:
    """A file's size and checksum; `is_synced`: it is on disk when this returns.

    Raises OSError, _NotSynced.
    """
    # What is no file, or a link to one, is no block; and whoever reads it might never end.
    with open_regular(path, os.O_NOFOLLOW) as file:
        if is_synced:
            try:
                os.fsync(file.fileno())
            except OSError as exc:
                raise _NotSynced(exc.errno, exc.strerror) from exc
        told = blake3.blake3()
        while part := file.read(2**20):
            told.update(part)
        return Block(path.name, file.tell(), told.hexdigest())


class _NotSynced(OSError):
    """What was written is not on disk."""


def _saved(path: Path, *names: Path) -> Block:
    """`_measured`, and on disk; `names` are its other ones. What cannot be saved has none any more.

    The kernel tells of a lost write once. After that a sync of the same file would say that all is
    well, and its content be what was never written: it is stored anew, or not at all.
    """
    try:
        return _measured(path, is_synced=True)
    except OSError as exc:
        is_lost = isinstance(exc, _NotSynced) or exc.errno == errno.EIO
        if is_lost:  # and not only out of reach, for want of a descriptor, say
            for name in (path, *names):
                name.unlink(missing_ok=True)
        raise OSError(exc.errno, exc.strerror) from exc


def full(on: Path, needed: int) -> InsufficientDisk:
    """What a disk that is full lacks. `on` is a directory of it, `needed` are bytes."""
    about = os.statvfs(on)
    free = about.f_bavail * about.f_frsize
    told = f"{needed:,} bytes are needed and {free:,} are free"
    if free < needed:
        told += f", {needed - free:,} too little"
    elif about.f_files and not about.f_favail:
        told += ", but its inodes are used up"
    else:
        told += ", but it takes no more: a quota, perhaps, or what was there was taken meanwhile"
    return InsufficientDisk(
        f"The disk under server.state_dir is full: {told}.",
        action="Free space there, or delete old windows with 'hive window delete'.",
        required_disk_mb=math.ceil(needed / MIB),
        available_disk_mb=free // MIB,
        resource_info={"required_bytes": needed, "available_bytes": free},
    )


@contextlib.contextmanager
def writing(
    *but: type[OSError], on: Path | None = None, needs: Callable[[], int] = int
) -> Iterator[None]:
    """The system's errors as the storage's (R102, C25), `but` some.

    `on` is a directory of the disk that may be full, `needs` how many bytes were to be written, 0
    where nobody knows.
    """
    try:
        yield
    except but:
        raise
    except OSError as exc:
        if exc.errno == errno.EDQUOT:
            raise StorageQuotaExceeded("The disk quota of hive's user is used up.") from exc
        if exc.errno == errno.ENOSPC:
            with contextlib.suppress(OSError):  # it may have gone meanwhile
                if on is not None:
                    raise full(on, needs()) from exc
            raise InsufficientDisk(
                "The disk under server.state_dir is full.",
                action="Free space there, or delete old windows with 'hive window delete'.",
            ) from exc
        raise StorageWriteFailed(f"Failed to save context data: {exc.strerror}.") from exc


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """The system's errors as the storage's (R102); `what` begins the sentence."""
    try:
        yield
    except OSError as exc:
        raise StorageReadFailed(f"{what} cannot be read: {exc.strerror}.") from exc

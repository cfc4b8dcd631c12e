"""A window as one file, which may go elsewhere: its manifest and its blocks, compressed. Blocking.

A file begins with its header: what a list shows, and no salt, no token and nothing that was said. So
a list costs one short read a file, believes no file's name, and needs no second file that could get
lost. The header is a frame that zstd passes over; behind it is a tar, the manifest first and then
every block, of which each member is a zstd frame of its own: damage is in one of them, and is told by
its name. `zstd -dc FILE | tar -t` reads it as well.

Reading believes nothing. Nothing in a tar's own headers is obeyed: which members there are, how they
are named and how large they are is known from the manifest, and whatever is not byte for byte what
hive writes is refused. No more is ever unpacked than the manifest says, and every byte is covered by
a checksum.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import struct
import tarfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, BinaryIO, cast
from urllib.parse import quote

import blake3
import msgspec
import zstandard

from hive.errors import (
    HiveError,
    InsufficientDisk,
    PayloadTooLarge,
    StorageCorrupted,
    StorageQuotaExceeded,
    StorageReadFailed,
    StorageWriteFailed,
)
from hive.policy.windows import Identity
from hive.settings import open_regular
from hive.storage.durable import synced, touched
from hive.windows import files
from hive.windows.files import MANIFEST, Block, Manifest, Progress, sealed, unsealed

VERSION = 1
SUFFIX = ".tar.zst"
UNFINISHED = ".part"
TIMESTAMP = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z\Z")
_BLOCK = re.compile(r"[0-9]{6,9}-[0-9]{1,4}\Z")
_ID = re.compile(r"[0-9a-f]{32}\Z")
_SALT = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")  # it becomes part of files' names
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")

MOST_HEADER = 64 * 1024  # bytes
MOST_MANIFEST = 256 * 2**20
MOST_WINDOW = 2**23  # bytes that zstd may be told to keep; what hive writes needs less
LEVEL = 1  # KV blocks hardly shrink, whatever is tried
LEAST_FREE = 64 * 2**20  # bytes that a disk must have left beside what is to be written
_PIECE = 2**20
_MAGIC = 0x184D2A5B  # of a frame that zstd passes over
_FRAME = struct.Struct("<II")
_SECTOR = 512
_END = bytes(2 * _SECTOR)  # of a tar
_NO_FILE = (errno.EISDIR, errno.ELOOP, errno.EINVAL)

NOT_WHOLE = (
    "Restore another backup of it ('hive backup list'), or copy the file once more from where it came; "
    "'hive backup delete' removes this one."
)
FREE = "Free space there, or delete old backups with 'hive backup delete'."
MEND_FIRST = (
    "Mend the window with 'hive window repair WINDOW --attempt-recovery', then back it up again."
)

Pieces = Generator[bytes, None, None]
Put = Callable[[str, Pieces], None]  # a block's name, and its content


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of a backup without its content. `bytes` are the window's, `size` the file's."""

    version: int
    timestamp: str  # ISO 8601, UTC; of one window no two are the same
    owner: str
    name: str
    id: str
    session_id: str
    model: str
    frozen_at: float
    tokens: int
    blocks: int
    bytes: int
    description: str
    tags: list[str]
    manifest_bytes: int
    manifest: str  # the checksum of it as it is in the archive
    size: int
    body: str  # the checksum of all that follows the header

    @property
    def created_at(self) -> float:
        """Seconds since 1970."""
        return datetime.fromisoformat(self.timestamp).timestamp()


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    blake3: str
    header: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Found:
    """A backup in a directory; one that is not `is_whole` was cut off, or something was added."""

    path: Path
    header: Header
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file that may be a backup, and what is wrong with it."""

    file: str
    why: str


# ── what there is ───────────────────────────────────────────────────────────────────────────────


Known = dict[str, tuple[tuple[int, ...], Found]]  # by a file's name: which file it was, and what


def listed(directory: Path, known: Known | None = None) -> tuple[list[Found], list[Unreadable]]:
    """All backups in it, in no order. Raises StorageReadFailed.

    `known` is what was found before, and is kept for the next time: a file that is the same one as
    then is not opened again.
    """
    known = {} if known is None else known
    found: list[Found] = []
    unreadable: list[Unreadable] = []
    with _reading():
        names = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX))
    for name in names:
        try:
            which = _which(directory / name)
            before = known.get(name)
            one = before[1] if before and before[0] == which else looked_at(directory / name)
            known[name] = which, one
            found.append(one)
        except FileNotFoundError:
            continue  # it was deleted meanwhile
        except HiveError as exc:
            unreadable.append(Unreadable(os.fsencode(name).decode(errors="replace"), exc.message))
    for name in set(known).difference(one.path.name for one in found):
        known.pop(name, None)
    return found, unreadable


def _which(path: Path) -> tuple[int, ...]:
    """What a file has that another one of its name, or itself changed, has not."""
    with _reading(FileNotFoundError):
        about = path.stat(follow_symlinks=False)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def looked_at(path: Path) -> Found:
    """One of them. Raises StorageCorrupted, StorageReadFailed, FileNotFoundError."""
    with _opened(path) as file, _reading():
        header = _header(file)
        return Found(path, header, header.size == os.fstat(file.fileno()).st_size)


def tidied(directory: Path) -> list[str]:
    """Remove what an earlier life has not finished; a line for each.

    What another hive writes into the same directory just now is left. Raises StorageReadFailed.
    """
    done = []
    with _reading():
        names = sorted(os.listdir(directory))
    for name in names:
        if not name.endswith(SUFFIX + UNFINISHED):
            continue
        try:
            with open_regular(directory / name, os.O_NOFOLLOW | os.O_RDWR) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (directory / name).unlink(missing_ok=True)
        except BlockingIOError:
            continue
        except OSError as exc:
            done.append(f"the backup {name} was not finished, and cannot be removed: {exc}")
        else:
            done.append(f"the backup {name} was not finished: removed")
    return done


def remove(path: Path, *, is_again: bool = False) -> None:
    """Removing it again does nothing; `is_again`: an attempt before may have come so far that only
    its sync has failed. Raises StorageWriteFailed.
    """
    with _writing(), synced(path.parent):
        path.unlink(missing_ok=True)
        if is_again:
            touched(path.parent, f".{secrets.token_hex(8)}")


# ── write ───────────────────────────────────────────────────────────────────────────────────────


def write(directory: Path, folder: Path, manifest: Manifest, told: Progress) -> Found:
    """A backup of the window in `folder`: there whole and on disk, or not at all.

    Raises StorageCorrupted that names a damaged block, PayloadTooLarge, InsufficientDisk,
    StorageQuotaExceeded, StorageWriteFailed, StorageReadFailed.
    """
    raw = sealed(manifest)
    if len(raw) > MOST_MANIFEST:
        raise PayloadTooLarge(
            f"The window's manifest has {len(raw)} bytes; one in a backup has at most "
            f"{MOST_MANIFEST}.",
            action="Keep the conversation itself: a window of that size cannot be backed up.",
        )
    with _writing():
        _must_have_disk(directory, manifest.bytes + len(raw))
    with _writing(), _claimed(directory, manifest) as claim:
        header = _described(manifest, raw, claim.timestamp, 10**18, "0" * 64)
        length = len(_framed(header))  # with the longest numbers: the real ones fit into it
        claim.file.write(bytes(length))
        body = _Body(claim.file, zstandard.ZstdCompressor(level=LEVEL, write_checksum=False))
        body.member(MANIFEST, len(raw), _one(raw))
        for at, chunk in enumerate(manifest.blocks):
            for block in chunk:
                body.member(block.name, block.size, _heard(_content(folder, block), told, at))
            told(at + 1)
        body.frame(len(_END), _one(_END))
        header = _described(manifest, raw, claim.timestamp, length + body.size, body.hexdigest())
        claim.file.flush()
        os.pwrite(claim.file.fileno(), _framed(header, length), 0)
        os.fsync(claim.file.fileno())
        told(len(manifest.blocks))  # whoever waits for it no more says so now
        claim.commit()
    return Found(claim.final, header, is_whole=True)


def _must_have_disk(directory: Path, size: int) -> None:
    """Room for so many bytes and some more. Raises InsufficientDisk, OSError."""
    free = shutil.disk_usage(directory).free
    if free < size + LEAST_FREE:
        need = (size + LEAST_FREE) / 2**20
        raise InsufficientDisk(
            f"The disk under windows.backup_dir has {free / 2**20:.0f} MiB free, and {need:.0f} MiB "
            "are needed.",
            action=FREE,
            required_disk_mb=round(need),
            available_disk_mb=round(free / 2**20),
        )


def _heard(content: Pieces, told: Progress, done: int) -> Pieces:
    """Blocks may be large: whoever waits for it no more need not wait for one of them either."""
    with contextlib.closing(content):
        for piece in content:
            told(done)
            yield piece


def _one(piece: bytes) -> Pieces:
    yield piece


class _Claim:
    """A file's name that nobody else takes meanwhile, and the file that will have it."""

    def __init__(self, final: Path, timestamp: str) -> None:
        """Raises FileExistsError where somebody has that name, or is about to."""
        self.final, self.timestamp = final, timestamp
        self.part = final.with_name(final.name + UNFINISHED)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.part, flags, 0o600)
        self.file = open(fd, "wb")  # noqa: SIM115 (`undo` closes it)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is being written: `tidied`
            # Whoever has the final name had this one first, so nobody gets it from here on.
            is_taken = os.path.lexists(final)
        except BaseException:
            self.undo()
            raise
        if is_taken:
            self.undo()
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))

    def commit(self) -> None:
        try:
            with synced(self.final.parent):
                self.part.rename(self.final)
        except BaseException:
            self.final.unlink(missing_ok=True)
            raise

    def undo(self) -> None:
        with contextlib.suppress(OSError):
            self.part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what it has not written yet is not wanted any more
            self.file.close()


@contextlib.contextmanager
def _claimed(directory: Path, manifest: Manifest) -> Iterator[_Claim]:
    at = datetime.now(UTC)
    while True:
        timestamp = at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        final = directory / file_name(manifest.owner, manifest.name, timestamp)
        try:
            claim = _Claim(final, timestamp)
        except FileExistsError:
            at += timedelta(microseconds=1)
        else:
            break
    try:
        yield claim
    finally:
        claim.undo()


def file_name(owner: str, name: str, timestamp: str) -> str:
    """For people, and so that no two backups have the same; nothing is ever read from it."""
    compact = timestamp.replace("-", "").replace(":", "")
    # A comma is in none of the three: no two of them together look like two others.
    return f"{quote(name, safe='')},{quote(owner, safe='')},{compact}{SUFFIX}"


class _Body:
    """What follows the header: a tar, in frames; counted, and with its checksum."""

    def __init__(self, file: BinaryIO, compressor: zstandard.ZstdCompressor) -> None:
        self._file, self._compressor = file, compressor
        self._told = blake3.blake3()
        self.size = 0

    def member(self, name: str, size: int, content: Pieces) -> None:
        def whole() -> Pieces:
            yield _tar_header(name, size)
            yield from content
            yield bytes(-size % _SECTOR)

        self.frame(_SECTOR + size + -size % _SECTOR, whole())

    def frame(self, size: int, content: Pieces) -> None:
        frame = self._compressor.compressobj(size=size)
        with contextlib.closing(content):  # it may have a file open
            for piece in content:
                self._write(frame.compress(piece))
        self._write(frame.flush())

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._told.update(data)
        self.size += len(data)

    def hexdigest(self) -> str:
        return self._told.hexdigest()


def _content(folder: Path, block: Block) -> Pieces:
    """A block's bytes. Raises StorageCorrupted if they are not what was frozen, StorageReadFailed."""
    told = blake3.blake3()
    try:
        with open_regular(folder / block.name, os.O_NOFOLLOW) as file:
            if os.fstat(file.fileno()).st_size != block.size:
                raise _damaged(block, "has another size")
            left = block.size
            while left and (piece := file.read(min(left, _PIECE))):
                left -= len(piece)
                told.update(piece)
                yield piece
    except FileNotFoundError as exc:
        raise _damaged(block, "is missing") from exc
    except OSError as exc:
        if exc.errno in _NO_FILE:
            raise _damaged(block, "is no file") from exc
        raise StorageReadFailed(f"Block {block.name} cannot be read: {exc.strerror}.") from exc
    if left or told.hexdigest() != block.blake3:
        raise _damaged(block, "does not fit its checksum")


def _damaged(block: Block, what: str) -> StorageCorrupted:
    return StorageCorrupted(
        f"The window is damaged, and was not backed up: block {block.name} {what}.",
        action=MEND_FIRST,
    )


# ── read ────────────────────────────────────────────────────────────────────────────────────────


def manifest_of(found: Found) -> Manifest:
    """Checked by itself and against the header. Raises StorageCorrupted, StorageReadFailed."""
    with _archive(found) as archive:
        return archive.manifest


def unpack(found: Found, put: Put, told: Progress) -> None:
    """Hand every block to `put`, and check the file to its last byte.

    What was put is worth nothing where this raises: StorageCorrupted that names the damaged
    block, StorageReadFailed, and whatever `put` does.
    """
    with _archive(found) as archive:
        for at, chunk in enumerate(archive.manifest.blocks):
            for block in chunk:
                put(block.name, _heard(archive.content(block), told, at))
            told(at + 1)
        archive.must_end()


@contextlib.contextmanager
def _archive(found: Found) -> Iterator["_Archive"]:
    try:
        with _opened(found.path) as file:
            yield _Archive(file, found.header)
    except FileNotFoundError as exc:
        raise StorageReadFailed("The backup was deleted meanwhile.") from exc


class _Archive:
    """A file that is being read, from its beginning to its end. Raises as `unpack` does."""

    def __init__(self, file: BinaryIO, wanted: Header) -> None:
        with _reading():
            self._header = _header(file)
            size = os.fstat(file.fileno()).st_size
        if self._header != wanted:
            raise StorageReadFailed("The backup was replaced by another one meanwhile.")
        if size != self._header.size:
            what = "is cut off" if size < self._header.size else "has something behind its end"
            raise _broken(f"{what}: it has {size} of {self._header.size} bytes")
        self._source = _Source(file)
        self._reader = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW).stream_reader(
            cast("IO[bytes]", self._source), read_across_frames=True, closefd=False
        )
        self.manifest = self._manifest()

    def _manifest(self) -> Manifest:
        told = blake3.blake3()
        raw = bytearray()
        for piece in self._member(MANIFEST, self._header.manifest_bytes, "its manifest"):
            told.update(piece)
            raw += piece
        if told.hexdigest() != self._header.manifest:
            raise _broken("its manifest does not fit its checksum")
        try:
            manifest = unsealed(bytes(raw))
        except StorageCorrupted as exc:
            raise _broken("its manifest cannot be understood") from exc
        header = self._header
        if wrong := _what_is_wrong(manifest):
            raise _broken(f"its manifest is not one that hive writes ({wrong})")
        if header != _described(manifest, bytes(raw), header.timestamp, header.size, header.body):
            raise _broken("its header is of another window than its manifest")
        return manifest

    def content(self, block: Block) -> Pieces:
        """The bytes of the next one."""
        told = blake3.blake3()
        what = f"block {block.name}"
        for piece in self._member(block.name, block.size, what):
            told.update(piece)
            yield piece
        if told.hexdigest() != block.blake3:
            raise _broken(f"{what} does not fit its checksum")

    def must_end(self) -> None:
        """Nothing follows, and every byte was what was written once."""
        if self._read(len(_END), "its end") != _END or self._read(1, "its end"):
            raise _broken("something follows its last block")
        while self._source.read(_PIECE):
            pass
        if self._source.hexdigest() != self._header.body:
            raise _broken("it does not fit its checksum")

    def _member(self, name: str, size: int, what: str) -> Pieces:
        if self._read(_SECTOR, what) != _tar_header(name, size):
            raise _broken(f"something else is where {what} should be")
        left = size
        while left:
            piece = self._read(min(left, _PIECE), what)
            if not piece:
                raise _broken(f"it ends in {what}")
            left -= len(piece)
            yield piece
        padding = -size % _SECTOR
        if self._read(padding, what) != bytes(padding):
            raise _broken(f"something else follows {what}")

    def _read(self, size: int, what: str) -> bytes:
        """So many bytes, fewer at the end."""
        found = bytearray()
        try:
            with _reading():
                while len(found) < size and (piece := self._reader.read(size - len(found))):
                    found += piece
        except zstandard.ZstdError as exc:
            raise _broken(f"{what} cannot be unpacked") from exc
        return bytes(found)


class _Source:
    """A file, and the checksum of what was read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._told = blake3.blake3()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._told.update(data)
        return data

    def hexdigest(self) -> str:
        return self._told.hexdigest()


def _what_is_wrong(manifest: Manifest) -> str:
    """Of a manifest from elsewhere: what would make trouble later; empty: nothing."""
    blocks = [block for chunk in manifest.blocks for block in chunk]
    names = [block.name for block in blocks]
    try:
        identity = msgspec.convert(manifest.identity, Identity)
    except msgspec.ValidationError as exc:
        return f"identity: {exc}"
    wrong = {
        "version": manifest.version != files.VERSION,
        "id": not _ID.match(manifest.id),
        "salt": not _SALT.match(manifest.salt),
        "identity": set(manifest.identity) != {field.name for field in fields(Identity)},
        "blocks' names": not all(map(_BLOCK.match, names)) or len(set(names)) != len(names),
        "blocks' sizes": any(block.size < 0 for block in blocks),
        "blocks' checksums": not all(_DIGEST.match(block.blake3) for block in blocks),
        "blocks": any(len(chunk) != identity.tensor_parallel_size for chunk in manifest.blocks),
        "hashes": len(manifest.hashes) != len(manifest.blocks)
        or not all(map(_DIGEST.match, manifest.hashes)),
        "tokens": identity.chunk_tokens < 1
        or len(manifest.blocks) != len(manifest.tokens) // identity.chunk_tokens,
    }
    return ", ".join(name for name, is_wrong in wrong.items() if is_wrong)


# ── the header ──────────────────────────────────────────────────────────────────────────────────


def _described(manifest: Manifest, raw: bytes, timestamp: str, size: int, body: str) -> Header:
    return Header(
        version=VERSION,
        timestamp=timestamp,
        owner=manifest.owner,
        name=manifest.name,
        id=manifest.id,
        session_id=manifest.session_id,
        model=manifest.model,
        frozen_at=manifest.created_at,
        tokens=len(manifest.tokens),
        blocks=len(manifest.blocks),
        bytes=manifest.bytes,
        description=manifest.description,
        tags=manifest.tags,
        manifest_bytes=len(raw),
        manifest=blake3.blake3(raw).hexdigest(),
        size=size,
        body=body,
    )


def _framed(header: Header, length: int = 0) -> bytes:
    """As it is in the file; `length` is made up with spaces."""
    raw = msgspec.json.encode(header)
    text = msgspec.json.encode(_Sealed(blake3.blake3(raw).hexdigest(), msgspec.Raw(raw)))
    text = text.ljust(length - _FRAME.size)
    return _FRAME.pack(_MAGIC, len(text)) + text


def _header(file: BinaryIO) -> Header:
    """Read from the file's beginning; the rest is read from there on. Raises StorageCorrupted."""
    start = file.read(_FRAME.size)
    if len(start) < _FRAME.size:
        raise _broken("it ends before its header")
    magic, length = _FRAME.unpack(start)
    if magic != _MAGIC or length > MOST_HEADER:
        raise _broken("it does not begin with the header of a backup")
    text = file.read(length)
    try:
        found = msgspec.json.decode(text, type=_Sealed)
        if blake3.blake3(bytes(found.header)).hexdigest() != found.blake3:
            raise _broken("its header does not fit its checksum")
        version = msgspec.json.decode(found.header, type=_Version).version
        if version != VERSION:
            raise _broken(f"it is of version {version}, and this hive reads version {VERSION}")
        header = msgspec.json.decode(found.header, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise _broken("its header cannot be understood") from exc
    if not (TIMESTAMP.match(header.timestamp) and _is_time(header.timestamp)):
        raise _broken("its header has no timestamp")
    if not 0 <= header.manifest_bytes <= MOST_MANIFEST:
        raise _broken(f"its manifest has more than {MOST_MANIFEST} bytes")
    if start + text != _framed(header, len(start) + length):
        raise _broken("its header is not as hive writes it")
    return header


class _Version(msgspec.Struct):
    version: int


def _is_time(timestamp: str) -> bool:
    try:
        datetime.fromisoformat(timestamp)
    except ValueError:
        return False
    return True


# ── inside ──────────────────────────────────────────────────────────────────────────────────────


def _tar_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member.tobuf(tarfile.GNU_FORMAT)  # which has sizes beyond 8 GiB in the header itself


def _broken(what: str) -> StorageCorrupted:
    return StorageCorrupted(f"The backup is damaged: {what}.", action=NOT_WHOLE)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Raises FileNotFoundError, StorageReadFailed."""
    with _reading(FileNotFoundError):
        file = open_regular(path, os.O_NOFOLLOW)
    with file:
        yield file


@contextlib.contextmanager
def _reading(*but: type[OSError]) -> Iterator[None]:
    """The system's errors of the directory of backups as the storage's, `but` some."""
    try:
        yield
    except but:
        raise
    except OSError as exc:
        raise StorageReadFailed(
            f"The backup could not be read: {exc.strerror}.",
            action="See that windows.backup_dir is there, and hive's user may read it; then try "
            "again.",
        ) from exc


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.EDQUOT:
            raise StorageQuotaExceeded(
                "The disk quota of hive's user is used up.",
                action="Delete old backups with 'hive backup delete'.",
            ) from exc
        if exc.errno == errno.ENOSPC:
            raise InsufficientDisk(
                "The disk under windows.backup_dir is full.", action=FREE
            ) from exc
        raise StorageWriteFailed(
            f"The backup could not be written: {exc.strerror}.",
            action="See that windows.backup_dir is there, and hive's user may write to it; then "
            "try again.",
        ) from exc

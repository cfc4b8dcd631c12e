"""Backups of windows, and windows from backups: whole or not at all, for whoever may ask (R124-R126).

A backup is a file in `windows.backup_dir`, and the directory alone says which there are: one that an
operator copies into it is a backup of this hive. What a file is, and how it is checked, is
`archives`; what a window is, `operations`.
"""

import asyncio
import logging
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial

from msgspec import structs

from hive.errors import (
    ConcurrencyLimit,
    HiveError,
    InvalidParameter,
    NotFound,
    StorageCorrupted,
    StorageQuotaExceeded,
    WindowAlreadyExists,
)
from hive.settings import Settings
from hive.storage.catalogue import Window
from hive.windows import archives
from hive.windows.archives import Found, Header, Unreadable
from hive.windows.blocks import LEAST_DISK, Blocks
from hive.windows.files import Manifest, WindowFiles, full, reading
from hive.windows.operations import Windows, checked_name
from hive.windows.work import (
    LIMIT_S,
    Disk,
    Progress,
    Teller,
    in_thread,
    limited,
    retried,
    unheard,
)

log = logging.getLogger(__name__)

MOST_AT_ONCE = 2  # backups and restores: what they copy takes long
THREADS = 4  # for the disk of backups; the others look what there is
LOOK_S = 30.0  # what a list or a deletion may take: a disk that is far away may not answer
AGAIN_S = 5.0
BYTES_PER_S = 10 * 2**20  # the slowest disk that is waited for
OTHER_NAME = (
    "Restore it under another name: \"name\" in the body, or 'hive backup restore --name NEW'."
)


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks. `owner`: whose things are meant, None is everybody's, for an admin only."""

    name: str
    owner: str | None
    is_admin: bool


class Backups:
    """Of the windows of all keys."""

    def __init__(
        self, settings: Settings, windows: Windows, files: WindowFiles, blocks: Blocks
    ) -> None:
        self._windows, self._files, self._blocks = windows, files, blocks
        self.apply(settings)
        self.directory = settings.backup_dir
        self._running = 0
        # It may be far away: where it hangs, windows do not. What was left there and is not finished
        # goes when it comes back, or at the next start.
        self._disk = Disk("windows.backup_dir", THREADS)
        self._known: archives.Known = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """End what an earlier life left half done, beside what the block does.

        Whoever only serves models needs no backups, and does not wait for their disk.
        """
        async with asyncio.TaskGroup() as tasks:
            tidying = tasks.create_task(self.tidy(), name="tidy backups")
            try:
                yield
            finally:
                tidying.cancel()

    def apply(self, settings: Settings) -> None:
        """These limits and keys, from now on."""
        self._most = settings.windows.max_backups
        # Without keys everything is everybody's, and nobody's in particular.
        self._owners = {key.name for key in settings.auth.keys} or {""}

    async def tidy(self) -> None:
        """What is wrong is only told."""
        try:
            async with limited(LOOK_S, time.monotonic()):
                lines = await self._disk.run(archives.tidied, self.directory)
        except HiveError as exc:
            lines = [f"the directory of backups cannot be looked at: {exc.message}"]
        for line in lines:
            log.warning("%s", line)

    # ── look ────────────────────────────────────────────────────────────────────────────────────

    async def listed(
        self, owner: str | None, window: str | None = None
    ) -> tuple[list[Found], list[Unreadable]]:
        """The newest first; and, for an admin, the files that are no backups any more.

        Raises InvalidWindowName, StorageReadFailed.
        """
        if window is not None:
            checked_name(window)
        async with limited(LOOK_S, time.monotonic()):
            found, unreadable = await self._disk.run(archives.listed, self.directory, self._known)
        mine = [
            one
            for one in found
            if owner in (None, one.header.owner) and window in (None, one.header.name)
        ]
        mine.sort(key=lambda one: (one.header.timestamp, one.header.name), reverse=True)
        return mine, unreadable if owner is None else []

    # ── create and delete ───────────────────────────────────────────────────────────────────────

    async def create(self, owner: str | None, name: str, told: Progress = unheard) -> Found:
        """Every byte of the window is read, and compared, on its way.

        Raises WindowNotFound, InvalidStateTransition, StorageCorrupted that names a damaged block,
        StorageQuotaExceeded, InsufficientDisk, StorageWriteFailed; then there is no backup.
        """
        began = time.monotonic()
        window = await self._windows.window(owner, name)
        with self._one_more():
            async with (
                self._windows.noted("backup", name, window) as note,
                self._windows.alone(window),
            ):
                async with limited(LIMIT_S, began):
                    manifest = await self._blocks.manifest(window.id)
                await self._must_have_room(window.owner)
                tell = Teller(told, "write", len(manifest.blocks))
                write = partial(archives.write, self.directory, self._files.folder(window.id))
                try:
                    async with limited(_limit_s(manifest.bytes), began):
                        made = await retried(
                            "storage", lambda _: self._disk.run(write, manifest, tell, teller=tell)
                        )
                except StorageCorrupted:
                    await self._blocks.health(manifest, unheard)  # no engine may load it either
                    raise
                note.blocks, note.bytes = made.header.blocks, made.header.bytes
                return made

    async def _must_have_room(self, owner: str) -> None:
        found, _ = await self.listed(owner)
        if self._most and len(found) >= self._most:
            raise StorageQuotaExceeded(
                f"Storage quota exceeded: this key has {len(found)} backups, and may have "
                f"{self._most}.",
                action="Delete old backups with 'hive backup delete'.",
            )

    async def delete(self, asker: Asker, name: str, timestamp: str) -> None:
        """Raises NotFound."""
        found = await self._named(asker, name, timestamp)

        def remove(*, is_again: bool) -> None:
            for one in found:  # the same one may have been copied there twice
                archives.remove(one.path, is_again=is_again)

        async with limited(LOOK_S, time.monotonic()):
            await retried(
                "storage", lambda is_again: self._disk.run(partial(remove, is_again=is_again))
            )

    # ── restore ─────────────────────────────────────────────────────────────────────────────────

    async def restore(
        self,
        asker: Asker,
        name: str,
        *,
        timestamp: str | None = None,
        new_name: str | None = None,
        told: Progress = unheard,
    ) -> tuple[Window, Header]:
        """The window again, as any other: whether its blocks are of use, its next thaw says.

        The newest one where no timestamp is told. Raises InvalidWindowName, NotFound,
        InvalidParameter (whose it becomes is not clear), WindowAlreadyExists, StorageCorrupted that
        names what is damaged, StorageQuotaExceeded, InsufficientDisk; then nothing has happened.
        """
        began = time.monotonic()
        checked_name(name if new_name is None else new_name)
        wanted = await self._named(asker, name, timestamp, adopts=True)
        newest = max(wanted, key=lambda one: one.header.timestamp)
        owner = self._heir(asker, newest.header)
        with self._one_more():
            async with limited(LIMIT_S, began):
                manifest = await retried(
                    "storage", lambda _: self._disk.run(archives.manifest_of, newest)
                )
            again = structs.replace(
                manifest, id=secrets.token_hex(16), owner=owner, name=new_name or name
            )
            row = again.window()
            async with self._windows.noted("restore", row.name, row) as note:

                async def fill() -> None:
                    async with limited(_limit_s(row.bytes), began):
                        await self._filled(newest, again, told)

                try:
                    window = await self._windows.added(row, fill)
                except WindowAlreadyExists as exc:
                    raise WindowAlreadyExists(exc.message, action=OTHER_NAME) from exc
                note.blocks, note.bytes = window.blocks, window.bytes
                return window, newest.header

    async def _filled(self, found: Found, manifest: Manifest, told: Progress) -> None:
        tell = Teller(told, "read", len(manifest.blocks))

        def fill(*, is_again: bool) -> None:
            if is_again:
                self._files.remove(manifest.id)
            part = self._files.begin(manifest.id)
            needed = manifest.bytes + LEAST_DISK
            with reading("The directory of windows"):
                free = shutil.disk_usage(part).free
            if free < needed:
                raise full(part, needed)
            archives.unpack(found, partial(self._files.put, part), tell)
            self._files.finish(part, manifest)

        await retried(
            "storage", lambda is_again: in_thread(partial(fill, is_again=is_again), teller=tell)
        )

    # ── whose it is ─────────────────────────────────────────────────────────────────────────────

    async def _named(
        self, asker: Asker, name: str, timestamp: str | None, *, adopts: bool = False
    ) -> list[Found]:
        """All that may be meant, of one key, and one at least.

        With `adopts` an admin who says whose may mean who is to have what a key of another hive
        had; never what another key of this one has. Raises NotFound, InvalidParameter.
        """
        if timestamp is not None and not archives.TIMESTAMP.match(timestamp):
            raise InvalidParameter(
                "Invalid parameter: timestamp. It is one that 'hive backup list' shows, as "
                "2026-01-31T12:00:00.000000Z.",
                param="timestamp",
            )
        found, _ = await self.listed(None if asker.is_admin else asker.owner, name)
        preferred = asker.name if asker.owner is None else asker.owner
        theirs = [one for one in found if one.header.owner == preferred]
        if asker.owner is not None:
            found = [one for one in found if adopts and one.header.owner not in self._owners]
        found = [one for one in theirs or found if timestamp in (None, one.header.timestamp)]
        if not found:
            at = f" of {timestamp}" if timestamp else ""
            raise NotFound(
                f"There is no backup{at} of a window {name}.",
                action="'hive backup list' shows the backups that there are.",
            )
        if len({one.header.owner for one in found}) > 1:
            how = "timestamp" if adopts and asker.owner is not None else "owner"
            raise InvalidParameter(
                f"Invalid parameter: {how}. Several keys have a backup of a window of that name.",
                param=how,
                action=f"Say which one with its {how}; 'hive backup list' shows them.",
            )
        return found

    def _heir(self, asker: Asker, header: Header) -> str:
        """Whose the window becomes. Raises InvalidParameter."""
        if asker.owner is not None:
            owner = asker.owner
        elif header.owner in self._owners:
            owner = header.owner
        elif self._owners == {""}:
            owner = ""
        else:
            raise InvalidParameter(
                f"Invalid parameter: owner. The backup is of the key {header.owner!r}, which this "
                "hive does not have.",
                param="owner",
                action="Say whose it becomes with ?owner=KEY_NAME, or --owner KEY_NAME.",
            )
        if owner not in self._owners:
            raise InvalidParameter(
                f"Invalid parameter: owner. This hive has no key {owner!r}.",
                param="owner",
                action="Say a key's name: 'hive key list' shows them.",
            )
        return owner

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        if self._running >= MOST_AT_ONCE:
            raise ConcurrencyLimit(
                f"{self._running} backups or restores are under way, and no more are at once.",
                retry_after_s=AGAIN_S,
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def __repr__(self) -> str:
        return f"<Backups {self.directory}>"


def _limit_s(size: int) -> float:
    """What so many bytes may take: the disk may be a slow one, and elsewhere."""
    return LIMIT_S + size / BYTES_PER_S

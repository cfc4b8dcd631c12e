"""LMCache's tier of files, which never evicts: hive takes away what was not used for longest.

Only names that nothing else shares go: a block that a window links would give back no byte. What a
freeze or a thaw is about to need is left alone, too.
"""

import asyncio
import contextlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from hive.windows.files import reading, writing
from hive.windows.work import in_thread

log = logging.getLogger(__name__)

LOOK_S = 5.0
LOW = 0.9  # of the bound: so far it is cleared, or every look would find a little too much


class Tier:
    """`bound` is bytes of files that no window shares."""

    def __init__(self, directory: Path, bound: int) -> None:
        self.directory, self.bound = directory, bound
        self._held: Counter[str] = Counter()
        self._seen_at = 0  # when the directory had last changed as it was looked at

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        """These files stay while the block runs."""
        held = Counter(names)
        self._held.update(held)
        try:
            yield
        finally:
            self._held.subtract(held)
            self._held += Counter()  # forgets those that nobody holds

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which of these files are not there. Raises StorageReadFailed."""
        with reading("The KV tier"):
            return [name for name in names if not _is_there(self.directory / name)]

    def largest(self, beginning: str) -> int:
        """Bytes of the largest file whose name begins so; 0 where there is none.

        Raises StorageReadFailed.
        """
        sizes = [0]
        with reading("The KV tier"), os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.startswith(beginning):
                    with contextlib.suppress(FileNotFoundError):
                        sizes.append(entry.stat(follow_symlinks=False).st_size)
        return max(sizes)

    def free(self) -> int:
        """Bytes that the disk under it has left. Raises StorageReadFailed."""
        with reading("The KV tier"):
            return shutil.disk_usage(self.directory).free

    def expel(self, names: Iterable[str]) -> None:
        """Take these files out of it, where they are there. Raises StorageWriteFailed."""
        with writing():
            for name in names:
                (self.directory / name).unlink(missing_ok=True)

    @asynccontextmanager
    async def bounded(self) -> AsyncIterator[None]:
        """Keep it below its bound while the block runs."""

        async def keep() -> None:
            while True:
                await asyncio.sleep(LOOK_S)
                try:
                    await in_thread(self.clear)  # hive's end does not wait for it
                except OSError as exc:
                    log.warning("the KV tier cannot be looked at: %s", exc.strerror)

        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(keep(), name="bound the KV tier")
            try:
                yield
            finally:
                keeping.cancel()

    def look_again(self) -> None:
        """A window has gone: what it shared may be nobody else's now."""
        self._seen_at = 0

    def clear(self) -> int:
        """Take files away until it is below its bound; bytes that were freed. Raises OSError."""
        changed = self.directory.stat().st_mtime_ns
        if changed == self._seen_at:
            return 0
        total, files = 0, []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    about = entry.stat(follow_symlinks=False)
                    if about.st_nlink == 1 and entry.is_file(follow_symlinks=False):
                        total += about.st_size
                        used = max(about.st_atime, about.st_mtime)
                        files.append((used, entry.name, about.st_size))
        if total <= self.bound:
            self._seen_at = changed  # else what is held now may go at the next look
            return 0
        freed = 0
        for _, name, size in sorted(files):
            if total - freed <= self.bound * LOW:
                break
            if name not in self._held:
                with contextlib.suppress(FileNotFoundError):
                    (self.directory / name).unlink()
                freed += size
        log.info("the KV tier was cleared of %d MiB", freed // 2**20)
        return freed

    def __repr__(self) -> str:
        return f"<Tier {self.directory}>"


def _is_there(path: Path) -> bool:
    """Raises OSError where that cannot be known."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True

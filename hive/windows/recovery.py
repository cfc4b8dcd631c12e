"""What an earlier life left of windows: half-made ones go, lost ones are told (R107, C28).

A row is written before a folder and removed after it. So a folder without a row is nobody's, unless
the catalogue itself was lost: then windows are had again by their manifests.
"""

import asyncio
import logging
from pathlib import Path

from hive.errors import HiveError, StorageReadFailed, StoreUnreachable, WindowAlreadyExists
from hive.policy.windows import WindowState
from hive.storage.catalogue import Catalogue, Window
from hive.windows.files import WindowFiles

log = logging.getLogger(__name__)

IMPORTED = "imported"  # a mark of the catalogue: every window was had again that can be


async def recover(catalogue: Catalogue, files: WindowFiles) -> list[str]:
    """Bring catalogue and folders into step; a line for each thing that was done or found.

    Raises StoreUnreachable.
    """
    found: list[str] = []
    for state in (WindowState.FREEZING, WindowState.DELETING):
        for window in await catalogue.windows(None, state=state):
            what = "was not frozen whole" if state is WindowState.FREEZING else "was being deleted"
            if error := await _removed(files, window.id):
                found.append(f"window {window.name} {what}, and cannot be removed: {error}")
                continue
            await catalogue.remove_window(window.id)
            found.append(f"window {window.name} {what}: removed")
    rows = {window.id: window for window in await _all(catalogue)}
    folders = await asyncio.to_thread(files.folders)
    must_import = not await catalogue.has_mark(IMPORTED)
    is_whole = True
    for window_id in sorted(folders - set(rows)):
        if must_import:
            try:
                found.append(await _import(catalogue, files, window_id))
            except StorageReadFailed as exc:  # another time it may be read
                is_whole = False
                found.append(f"the folder {window_id} cannot be had again now: {exc.message}")
        else:
            found.append(f"the folder {window_id} belongs to no window: left as it is")
    found += [
        f"window {rows[window_id].name} has lost its folder: it cannot be thawed"
        for window_id in sorted(set(rows) - folders)
    ]
    if must_import and is_whole:
        await catalogue.set_mark(IMPORTED)
    for folder in await asyncio.to_thread(_unfinished, files):
        error = await _removed(files, folder.stem)
        what = f"cannot be removed: {error}" if error else "removed"
        found.append(f"the folder {folder.name} was not finished: {what}")
    return found


async def _removed(files: WindowFiles, window_id: str) -> str:
    """What keeps a folder from being removed; hive starts all the same."""
    try:
        await asyncio.to_thread(files.remove, window_id)
    except HiveError as exc:
        return exc.message
    return ""


async def _all(catalogue: Catalogue) -> list[Window]:
    windows: list[Window] = []
    begin = 0
    while page := await catalogue.windows(None, sort="name", is_descending=False, begin=begin):
        windows += page
        begin += len(page)
    return windows


def _unfinished(files: WindowFiles) -> list[Path]:
    if not files.directory.is_dir():
        return []
    return sorted(files.directory.glob("*.part"))


async def _import(catalogue: Catalogue, files: WindowFiles, window_id: str) -> str:
    """What became of it. Raises StoreUnreachable, StorageReadFailed."""
    try:
        manifest = await asyncio.to_thread(files.manifest, window_id)
        await catalogue.add_window(manifest.window())
    except WindowAlreadyExists:
        return f"the folder {window_id} has a window of a name that is taken: left as it is"
    except (StoreUnreachable, StorageReadFailed):
        raise
    except HiveError as exc:
        return f"the folder {window_id} cannot be had again: {exc.message}"
    return f"window {manifest.name} was had again by its manifest"

"""What an earlier life left of windows: half-made ones go, lost ones are told (R107, C28).

A row is written before a folder and removed after it. So a folder without a row is nobody's, unless
the catalogue itself was lost: then windows are had again by their manifests.
"""

import asyncio
import logging
from pathlib import Path

from hive.errors import HiveError, WindowAlreadyExists
from hive.policy.windows import WindowState
from hive.storage.catalogue import Catalogue, Window
from hive.windows.files import WindowFiles

log = logging.getLogger(__name__)

IMPORTING = ".importing"  # a file that is there until every window was had again


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
    is_new = await asyncio.to_thread(_must_import, files, is_new=catalogue.is_new and bool(folders))
    for window_id in sorted(folders - set(rows)):
        if is_new:
            found.append(await _import(catalogue, files, window_id))
        else:
            found.append(f"the folder {window_id} belongs to no window: left as it is")
    found += [
        f"window {rows[window_id].name} has lost its folder: it cannot be thawed"
        for window_id in sorted(set(rows) - folders)
    ]
    if is_new:
        (files.directory / IMPORTING).unlink(missing_ok=True)
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


def _must_import(files: WindowFiles, *, is_new: bool) -> bool:
    """Whether windows are to be had again by their manifests, now or since an earlier start."""
    marker = files.directory / IMPORTING
    if is_new:
        marker.touch(mode=0o600)
    return marker.exists()


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
    try:
        manifest = await asyncio.to_thread(files.manifest, window_id)
        await catalogue.add_window(manifest.window())
    except WindowAlreadyExists:
        return f"the folder {window_id} has a window of a name that is taken: left as it is"
    except HiveError as exc:
        return f"the folder {window_id} cannot be had again: {exc.message}"
    return f"window {manifest.name} was had again by its manifest"

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


async def recover(catalogue: Catalogue, files: WindowFiles) -> list[str]:
    """Bring catalogue and folders into step; a line for each thing that was done or found.

    Raises StoreUnreachable.
    """
    found: list[str] = []
    for state in (WindowState.FREEZING, WindowState.DELETING):
        for window in await catalogue.windows(None, state=state):
            await asyncio.to_thread(files.remove, window.id)
            await catalogue.remove_window(window.id)
            what = "was not frozen whole" if state is WindowState.FREEZING else "was being deleted"
            found.append(f"window {window.name} {what}: removed")
    rows = {window.id: window for window in await _all(catalogue)}
    folders = await asyncio.to_thread(files.folders)
    is_new = not rows and not await catalogue.sessions(None, most=1)
    for window_id in sorted(folders - set(rows)):
        if is_new:
            found.append(await _import(catalogue, files, window_id))
        else:
            found.append(f"the folder {window_id} belongs to no window: left as it is")
    found += [
        f"window {rows[window_id].name} has lost its folder: it cannot be thawed"
        for window_id in sorted(set(rows) - folders)
    ]
    for folder in await asyncio.to_thread(_unfinished, files):
        await asyncio.to_thread(files.remove, folder.stem)
        found.append(f"the folder {folder.name} was not finished: removed")
    return found


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

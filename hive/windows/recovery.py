"""What an earlier life left of windows: half-made ones go, lost ones are told (R107, C28).

A row is written before a folder and removed after it. So a folder without a row is nobody's, unless
the catalogue itself was lost: then windows are had again by their manifests.
"""

import logging

from hive.errors import HiveError, StorageReadFailed, StoreUnreachable, WindowAlreadyExists
from hive.policy.windows import WindowState
from hive.storage.catalogue import Catalogue
from hive.windows.files import WindowFiles
from hive.windows.work import in_thread

log = logging.getLogger(__name__)

IMPORTED = "imported"  # a mark of the catalogue: every window was had again that can be


async def recover(catalogue: Catalogue, files: WindowFiles) -> list[str]:
    """Bring catalogue and folders into step; a line for each thing that was done or found.

    Raises StoreUnreachable, StorageReadFailed.
    """
    found: list[str] = []
    for state in (WindowState.FREEZING, WindowState.DELETING):
        async for window in catalogue.every_window(state):
            what = "was not frozen whole" if state is WindowState.FREEZING else "was being deleted"
            if error := await _removed(files, window.id):
                found.append(f"window {window.name} {what}, and cannot be removed: {error}")
                continue
            await catalogue.remove_window(window.id)
            found.append(f"window {window.name} {what}: removed")
    rows = {window.id: window async for window in catalogue.every_window(WindowState.FROZEN)}
    folders = await in_thread(files.folders)
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
    for window_id in await in_thread(files.unfinished):
        error = await _removed(files, window_id)
        what = f"cannot be removed: {error}" if error else "removed"
        found.append(f"the folder {window_id}.part was not finished: {what}")
    return found


async def _removed(files: WindowFiles, window_id: str) -> str:
    """What keeps a folder from being removed; hive starts all the same."""
    try:
        await in_thread(files.remove, window_id)
    except HiveError as exc:
        return exc.message
    return ""


async def _import(catalogue: Catalogue, files: WindowFiles, window_id: str) -> str:
    """What became of it. Raises StoreUnreachable, StorageReadFailed."""
    try:
        manifest = await in_thread(files.manifest, window_id)
        await catalogue.add_window(manifest.window())
    except WindowAlreadyExists:
        return f"the folder {window_id} has a window of a name that is taken: left as it is"
    except (StoreUnreachable, StorageReadFailed):
        raise
    except HiveError as exc:
        return f"the folder {window_id} cannot be had again: {exc.message}"
    return f"window {manifest.name} was had again by its manifest"

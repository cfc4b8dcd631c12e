"""All that keeps windows, built and tied together: catalogue, files, sessions, operations."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from hive.events import Announcer
from hive.settings import Settings
from hive.storage.catalogue import GIB, opened
from hive.windows.backups import Backups
from hive.windows.blocks import Blocks
from hive.windows.engines import Engines
from hive.windows.files import WindowFiles
from hive.windows.operations import Windows
from hive.windows.recovery import recover
from hive.windows.sessions import Sessions
from hive.windows.tier import Tier
from hive.windows.work import in_thread
from hive.workers.fleet import Fleet
from hive.workers.site import WINDOWS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keeping:
    """What the gateway needs of it."""

    sessions: Sessions
    windows: Windows
    backups: Backups
    engines: Engines

    def apply(self, settings: Settings) -> None:
        """What may change while hive runs, from now on."""
        for part in (self.sessions, self.windows, self.backups, self.engines):
            part.apply(settings)


@asynccontextmanager
async def keeping(
    settings: Settings, fleet: Fleet, tier_directory: Path, announcer: Announcer
) -> AsyncIterator[Keeping]:
    """Open the catalogue, end what an earlier life left half done; `tier_directory` is LMCache's.

    Raises ConfigInvalid, StoreUnreachable.
    """
    state = settings.server.state_dir
    tier = Tier(tier_directory, int(settings.windows.kv_tier_gib * GIB))
    files = WindowFiles(state / WINDOWS, tier_directory)
    url = settings.windows.catalogue_url.get_secret_value()
    async with opened(state, url) as catalogue:
        for line in await recover(catalogue, files):
            log.warning("%s", line)
        sessions = Sessions(settings, catalogue, announcer)
        engines = Engines(settings, fleet)
        blocks = Blocks(files, tier, engines)
        windows = Windows(settings, catalogue, files, blocks, sessions, announcer)
        backups = Backups(settings, windows, files, blocks)
        await windows.count()
        await in_thread(tier.clear)
        async with sessions.running(), windows.running(), tier.bounded(), backups.running():
            yield Keeping(sessions, windows, backups, engines)

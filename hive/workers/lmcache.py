"""The `lmcache` engine: the server that keeps the KV cache of all engines with `windows = true`."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from hive.errors import WorkerSpawnFailed
from hive.settings import Model, Settings
from hive.workers.client import EngineClient
from hive.workers.command import cleaned_environment
from hive.workers.process import Launch, Place
from hive.workers.site import HOST, Site
from hive.workers.vllm import python_of

ID = "lmcache"
TEMPORARY = "tmp"  # in its directory of files: what it has not written whole
HEALTH_PATH = "/healthcheck"
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "PYTHONHASHSEED": "0",
}


def program_of(settings: Settings) -> list[str]:
    """The LMCache server's program. Raises WorkerSpawnFailed, or ConfigInvalid for a python."""
    configured = settings.windows.kv_server
    if configured:
        program = shutil.which(configured[0])
        if program is None:
            raise WorkerSpawnFailed(
                f"windows.kv_server: the program {configured[0]!r} is not there or is not "
                "executable.",
                action="Correct windows.kv_server, or remove it to use the engine's own LMCache.",
                expected=configured[0],
            )
        # Absolute, since it starts in another directory; a venv's python is a link.
        return [str(Path(program).absolute()), *configured[1:]]
    return [str(python_of(*_first_user(settings)).absolute()), "-m", "lmcache.cli.main"]


def _first_user(settings: Settings) -> tuple[str, Model]:
    """A model whose environment has LMCache."""
    users = [(name, model) for name, model in settings.models.items() if model.windows]
    with_own = [user for user in users if user[1].engine == "vllm"]
    return (with_own or users)[0]


class KvServer:
    """LMCache's server, as a worker runs it. The engine's Protocol without inference."""

    health_path = HEALTH_PATH
    has_gauges = False
    computing: tuple[str, ...] = ()

    def __init__(self, settings: Settings, site: Site) -> None:
        self._settings, self.site = settings, site
        self.address: str | None = site.url

    def launch(
        self,
        place: Place,
        devices: Sequence[str],  # noqa: ARG002
        visible: str | None,  # noqa: ARG002 (it needs none: engines copy their blocks themselves)
        total_bytes: int,  # noqa: ARG002
    ) -> Launch:
        site = self.site
        files = {"type": "fs", "base_path": str(site.tier), "relative_tmp_dir": TEMPORARY}
        argv = [
            *program_of(self._settings),
            "server",
            *("--host", HOST, "--port", str(site.port)),
            *("--http-host", HOST, "--http-port", str(site.http_port)),
            *("--l1-size-gb", f"{self._settings.windows.kv_ram_gib:g}"),
            *("--chunk-size", str(site.chunk_tokens)),
            *("--eviction-policy", "LRU"),
            # It holds no memory of a GPU: with the other mode it would keep dead workers' VRAM.
            *("--supported-transfer-mode", "engine_driven"),
            *("--l2-adapter", json.dumps(files)),
            # What is on disk is not kept in memory, too: a block whose file hive took away would
            # be there for engines and never be written again. The kernel caches files as well.
            *("--l2-store-policy", "skip_l1"),
        ]
        env = cleaned_environment(place, None, ENVIRONMENT)
        # What hive's own environment says of LMCache could change what it keeps, and where.
        foreign = [name for name in env if name.startswith("LMCACHE_") and name not in ENVIRONMENT]
        return Launch(argv, {name: value for name, value in env.items() if name not in foreign})

    async def probe(self, client: EngineClient) -> None:
        await client.must("GET", HEALTH_PATH)

    def __repr__(self) -> str:
        return f"<KvServer {self.site.address}>"

"""Where the one LMCache server of this hive listens, and where it keeps its files.

Its ports are chosen once: an engine is told them at its start, and LMCache may be started anew
meanwhile.
"""

import random
import socket
from dataclasses import dataclass
from pathlib import Path

from hive.errors import WorkerSpawnFailed
from hive.settings import Settings

HOST = "127.0.0.1"
TIER, WINDOWS = "kv", "windows"  # under server.state_dir, on one file system
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _HIGHEST = 10_000, 32_768
_TRIES = 200


@dataclass(frozen=True, slots=True)
class Site:
    """Where the LMCache server is, for who starts it and for who uses it."""

    state_dir: Path
    port: int  # of its message queue, for engines
    http_port: int
    chunk_tokens: int

    @property
    def tier(self) -> Path:
        """The directory of its files, one a block."""
        return self.state_dir / TIER

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.http_port}"

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"


def site_of(settings: Settings) -> Site | None:
    """Where it will be, on free ports; None where no model needs it."""
    if not any(model.windows for model in settings.models.values()):
        return None
    port, http_port = free_ports(2)
    return Site(settings.server.state_dir, port, http_port, settings.windows.kv_chunk_tokens)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody has now, below those of outgoing connections.

    Who connects anywhere cannot take one of them while LMCache is started anew.
    Raises WorkerSpawnFailed where there are none.
    """
    try:
        lowest_outgoing = int(_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        lowest_outgoing = _HIGHEST
    highest = lowest_outgoing if lowest_outgoing > _LOWEST + _TRIES else 65_536
    found: set[int] = set()
    for port in random.sample(range(_LOWEST, highest), _TRIES):
        with socket.socket() as attempt:
            try:
                attempt.bind((HOST, port))
            except OSError:
                continue
        found.add(port)
        if len(found) == count:
            return sorted(found)
    raise WorkerSpawnFailed(
        "No free ports were found on the loopback interface for the LMCache server.",
        action="See with 'ss -ltn' who takes so many ports.",
    )

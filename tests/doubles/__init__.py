"""Programs that stand in for the outside world."""

import sys
from pathlib import Path

ENGINE = Path(__file__).parent / "engine"
LMCACHE = Path(__file__).parent / "lmcache"


def lmcache_command(*flags: str) -> list[str]:
    """The LMCache double, as windows.kv_server wants it: hive adds LMCache's own arguments."""
    return [sys.executable, "-I", str(LMCACHE), *flags]


def engine_command(*flags: str) -> list[str]:
    """The engine double as a command line: isolated and without site, so that it starts quickly."""
    return [sys.executable, "-I", "-S", str(ENGINE), *flags]

"""Programs that stand in for the outside world."""

import sys
from pathlib import Path

ENGINE = Path(__file__).parent / "engine"


def engine_command(*flags: str) -> list[str]:
    """The engine double as a command line: isolated and without site, so that it starts quickly."""
    return [sys.executable, "-I", "-S", str(ENGINE), *flags]

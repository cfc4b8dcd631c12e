"""Where the managed engine environment lives, and whether it is whole."""

import ctypes
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

LOCK = Path(__file__).with_name("engine-cpu.lock.txt")
# The one Python that the lock file's set was run on; wheels of other versions were not tried.
PYTHON = "3.11"
MARKER = "complete.json"


@dataclass(frozen=True)
class Completed:
    """What the marker of a whole environment says."""

    lock_sha256: str
    python: str
    versions: dict[str, str]  # import name -> version, as imported in the environment
    completed_at: str


def lock_file() -> Path:
    return LOCK


def engines_dir() -> Path:
    """The directory of all managed environments, whether or not it exists."""
    chosen = os.environ.get("HIVE_ENGINES")
    if chosen:
        return Path(chosen).expanduser().absolute()
    systemd = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    if systemd:
        return Path(systemd) / "engines"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).absolute() / "hive" / "engines"


def home_in(engines: Path, lock: Path) -> Path:
    """Each lock file has an environment of its own: an upgrade never changes one in use."""
    return engines / f"cpu-{_sha256(lock)[:12]}-py{PYTHON.replace('.', '')}"


def managed_home() -> Path:
    return home_in(engines_dir(), lock_file())


def managed_python() -> Path | None:
    """The interpreter of the managed environment, if that is whole."""
    home = managed_home()
    return python_of(home) if completed(home) else None


def python_of(home: Path) -> Path:
    return home / "bin" / "python"


def completed(home: Path) -> Completed | None:
    """The marker of a whole environment; None for one that is absent, unfinished or broken."""
    try:
        marker = Completed(**json.loads((home / MARKER).read_bytes()))
        prefix = marker.lock_sha256[:12]
    except (OSError, ValueError, TypeError):
        return None
    # The interpreter is a link to the system's, which an upgrade of the system may have removed.
    is_whole = prefix in home.name.split("-") and os.access(python_of(home), os.X_OK)
    return marker if is_whole else None


def complete(home: Path, lock: Path, *, python: str, versions: dict[str, str]) -> Completed:
    """Declare an environment whole; the last step of building one."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    marker = Completed(_sha256(lock), python, versions, now)
    _flush(home)
    unfinished = home / f"{MARKER}.new"
    with unfinished.open("w") as file:
        json.dump(asdict(marker), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(home / MARKER)
    _fsync_dir(home)
    return marker


def revoke(home: Path) -> None:
    """Declare an environment unfinished; the first step of removing one."""
    if home.is_dir():
        (home / MARKER).unlink(missing_ok=True)
        _fsync_dir(home)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _flush(directory: Path) -> None:
    """A power cut must not leave the marker without the packages that it vouches for."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Not os.sync: that waits for every file system of the host, a dead network one included.
        if ctypes.CDLL(None, use_errno=True).syncfs(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))
    finally:
        os.close(fd)


def _fsync_dir(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

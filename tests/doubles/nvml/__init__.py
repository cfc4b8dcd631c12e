"""A stand-in for the NVIDIA driver's library, and the GPUs that it shows.

The real pynvml loads it as libnvidia-ml.so.1 and is answered from the directory NVML_DOUBLE, which
is read again at every call:

- `state`: `driver VERSION`; `gpu INDEX uuid=… name=… total_mib=…`, one line for each GPU (see
  `Gpu`); `fail FUNCTION CODE [INDEX]`; `hang FUNCTION [INDEX]`; `pids hidden`.
- `hold/UUID/PID`: the MiB that the process holds, for as long as it lives.
- `events`: lines `UUID XID`, appended.
"""

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tests.doubles.engine import vram

SOURCE = Path(__file__).with_name("nvml.c")
NAME = "libnvidia-ml.so.1"
COMPILE = (
    *("cc", "-std=c11", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror"),
    f"-Wl,-soname,{NAME}",
)


@functools.cache
def library() -> Path:
    """The built library, alone in a directory that is named after what it was built from.

    Two builds at once do not meet: each builds under a name of its own and renames.
    Raises CalledProcessError if the compiler refuses, FileNotFoundError if there is none.
    """
    made_from = SOURCE.read_bytes() + " ".join(COMPILE).encode()
    built = _cache() / hashlib.sha256(made_from).hexdigest()[:16] / NAME
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent, prefix="build-") as mine:
            half = Path(mine, NAME)
            subprocess.run([*COMPILE, "-o", half, SOURCE], check=True)
            half.replace(built)
    return built


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    for cache in (Path(home, "hive-doubles"), Path(tempfile.gettempdir(), "hive-doubles")):
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(cache, os.W_OK):
            return cache
    raise PermissionError("neither the cache nor the temporary directory can be written to")


def load() -> None:
    """Let this very process's pynvml find the double, which it otherwise finds by `Gpus.env`.

    It stays loaded; whoever sets no NVML_DOUBLE is told that no driver is loaded. Of no use once
    the real library was loaded: the loader hands out the one that came first.
    """
    ctypes.CDLL(str(library()))


@functools.cache
def functions() -> frozenset[str]:
    """What can fail and hang: NVML's functions without the suffix of their version."""
    return frozenset(re.findall(r'"(nvml\w+)"', SOURCE.read_text()))


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML shows it; -1 where an older or smaller one answers "not supported"."""

    uuid: str
    pci: str
    name: str = "NVIDIA H100"
    total_mib: int = vram.DEFAULTS["total_mib"]
    base_mib: int = vram.DEFAULTS["base_mib"]  # used with no process there
    temp: int = 40  # Celsius
    util: int = 0  # percent
    ecc: int = 0  # uncorrected errors; -1: no ECC
    remap_pending: int = 0
    remap_failed: int = 0
    retired_pending: int = -1  # of GPUs that retire pages instead of remapping rows
    mig: int = 0
    keeps: int = 0  # 1: memory of processes that ended is not given back
    lost: int = 0  # 1: counted still, but every call about it says that it is lost

    def line(self, index: int) -> str:
        said = {key: str(value).replace(" ", "_") for key, value in asdict(self).items()}
        return f"gpu {index} " + " ".join(f"{key}={value}" for key, value in said.items())


class Gpus:
    """The GPUs of one directory; each change is seen by the next NVML call of every process."""

    def __init__(self, directory: Path, driver: str = "580.95.05") -> None:
        self.directory = directory
        self._driver = driver
        self._gpus: dict[int, Gpu] = {}
        self._uuids: dict[int, str] = {}  # of those that were removed, too
        self._faults: list[str] = []
        (directory / "hold").mkdir(parents=True, exist_ok=True)
        (directory / "events").touch()
        self._write()

    def __repr__(self) -> str:
        return f"<Gpus {self._lines()}>"

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment, from its start, to see these GPUs."""
        places = [str(library().parent), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            "NVML_DOUBLE": str(self.directory.absolute()),
            "LD_LIBRARY_PATH": ":".join(filter(None, places)),
        }

    def add(self, index: int = 0, **fields: str | int) -> str:
        """Plug a GPU in, with `Gpu`'s fields; its UUID, which tells its index."""
        usual: dict[str, str | int] = {
            "uuid": f"GPU-{index:08d}-0000-0000-0000-000000000000",
            "pci": f"00000000:{0x17 + index:02X}:00.0",
        }
        gpu = Gpu(**usual | fields)  # type: ignore[arg-type]  # TypeError for an unknown field
        self._gpus[index] = gpu
        self._uuids[index] = gpu.uuid
        self._write()
        return gpu.uuid

    def change(self, index: int, **fields: str | int) -> None:
        """Change some of a GPU's fields."""
        self._gpus[index] = replace(self._gpus[index], **fields)  # type: ignore[arg-type]
        self._write()

    def remove(self, index: int) -> None:
        """Let a GPU vanish: not listed any more, and lost for those who know it.

        The numbers of those behind it close up, as after a driver's start without it.
        """
        del self._gpus[index]
        self._write()

    def fail(self, function: str, code: int, index: int | None = None) -> None:
        """Let a function return this NVML code, for one GPU or whatever it is asked about."""
        self._fault("fail", function, code, index)

    def hang(self, function: str, index: int | None = None) -> None:
        """Let calls of a function never return, not even after `heal`."""
        self._fault("hang", function, index)

    def hide_pids(self) -> None:
        """Show no processes, as in a container with a PID namespace of its own."""
        self._faults.append("pids hidden")
        self._write()

    def heal(self) -> None:
        """Take back every `fail`, `hang` and `hide_pids`."""
        self._faults.clear()
        self._write()

    def xid(self, index: int, number: int) -> None:
        """Report an Xid, as the driver does when a GPU or a program on it goes wrong."""
        with (self.directory / "events").open("a") as events:
            events.write(f"{self._uuids[index]} {number}\n")

    def hold(self, index: int, pid: int, mib: int) -> None:
        """Let a process hold VRAM for as long as it lives; 0 MiB: it is there with nothing."""
        vram.hold(str(self.directory), self._uuids[index], pid, mib)

    def release(self, index: int, pid: int) -> None:
        """Let a process give its VRAM back, or a GPU that keeps it (a reset does that)."""
        (self.directory / "hold" / self._uuids[index] / str(pid)).unlink()

    def used_mib(self, index: int) -> int:
        """Used memory as NVML shows it."""
        return vram.used_mib(str(self.directory), self._uuids[index])

    def _fault(self, word: str, function: str, *more: int | None) -> None:
        if function not in functions():
            raise ValueError(f"no function {function}; there are: {', '.join(sorted(functions()))}")
        said = (str(part) for part in more if part is not None)
        self._faults.append(" ".join((word, function, *said)))
        self._write()

    def _lines(self) -> list[str]:
        gpus = [self._gpus[index].line(index) for index in sorted(self._gpus)]
        return [f"driver {self._driver}", *gpus, *self._faults]

    def _write(self) -> None:
        half = self.directory / ".state"
        half.write_text("".join(line + "\n" for line in self._lines()))
        half.replace(self.directory / "state")

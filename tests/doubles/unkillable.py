"""A process that survives SIGKILL: frozen by the kernel, it dies only once it is thawed.

What hangs in a driver (state D) cannot be made on demand; the freezer of cgroup v1 makes the same
of any process. (That of v2 does not: it lets a killed process go.)
"""

import contextlib
import os
import secrets
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.patience import wait_until

LIMIT_S = 10.0
WHY_NOT = "no writable freezer of cgroup v1: no process can be made to survive SIGKILL"


def hierarchy(controller: str) -> Path | None:
    """Where a controller of cgroup v1 is mounted and groups can be made; else None."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, at, kind, options, *_ = line.split()
        if kind == "cgroup" and controller in options.split(",") and os.access(at, os.W_OK):
            return Path(at)
    return None


class Freezer:
    """`with Freezer() as freezer`: what was frozen is thawed at the end, also when a test fails.

    Whoever started a process reaps it: at the end it only goes on with what it was doing.
    """

    def __init__(self) -> None:
        self._top = hierarchy("freezer")
        self._group: Path | None = None

    @staticmethod
    def is_available() -> bool:
        return hierarchy("freezer") is not None

    def __enter__(self) -> Self:
        assert self._top, WHY_NOT
        self._group = self._top / f"hivetest-{secrets.token_hex(4)}"
        self._group.mkdir()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _exc: BaseException | None,
        _tb: TracebackType | None,
    ) -> None:
        assert self._top
        assert self._group
        self.thaw()
        deadline = time.monotonic() + LIMIT_S
        # Empty it: those that live go back to where they came from, those that die need a moment.
        while True:
            for pid in (self._group / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    (self._top / "cgroup.procs").write_text(pid)
            try:
                self._group.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def freeze(self, pid: int) -> None:
        """Stop a process where it is, with all of its threads; returns when it is frozen.

        Raises OSError when there is no such process.
        """
        assert self._group
        (self._group / "cgroup.procs").write_text(str(pid))
        state = self._group / "freezer.state"
        state.write_text("FROZEN")
        wait_until(lambda: state.read_text().strip() == "FROZEN", "the process to freeze", LIMIT_S)

    def thaw(self) -> None:
        """Let every frozen process go on, or die of the SIGKILL that it got meanwhile."""
        assert self._group
        (self._group / "freezer.state").write_text("THAWED")

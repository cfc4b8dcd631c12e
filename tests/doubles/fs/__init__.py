"""A disk that fails, for one process: a preloaded library, and the table of rules that it obeys.

The process is started with `Faults.env` in its environment, or by `Faults.starter`; what it starts
itself has a disk that works. Rules go on and off while it runs, and each tells how often it was met.
"""

import atexit
import errno
import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("faults.c")
COMPILE = ("cc", "-std=c2x", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror")
CALLS = {"open": 1, "read": 2, "write": 4, "sync": 8, "link": 16, "rename": 32, "connect": 64}
EVERYTHING = "|".join(CALLS)
HANGS_S = 10_000.0  # for longer than any test; until the rule is off

_HEAD, _NUMBER = struct.Struct("II"), struct.Struct("I")
_RULE = struct.Struct("IIiIIIIIQQQ192s")  # faults.c: Rule
_MOST = 32


@functools.cache
def library() -> Path:
    """The built library; it goes with this process. Skips the test where there is no compiler."""
    if shutil.which(COMPILE[0]) is None:
        pytest.skip("no C compiler (README, From source): a failing disk cannot be made")
    home = Path(tempfile.mkdtemp(prefix="hive-faults-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    built = home / "faults.so"
    ran = subprocess.run(
        [*COMPILE, "-o", built, SOURCE, "-ldl"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return built


@dataclass(frozen=True)
class Rule:
    """What happens to calls on paths that fit a pattern (`*` is any text, slashes too).

    `calls` are names of CALLS with `|` between them; a link and a rename fit by either path. Of
    those that fit each `every`-th is met, with `percent` probability, `most` times (0: no limit):
    it waits `delay_s`, then fails with `error`, or is done `shortened` (half is written) or
    `flipped` (one bit of what is read).
    """

    path: str
    calls: str = EVERYTHING
    error: int = 0
    every: int = 1
    most: int = 0
    percent: int = 100
    seed: int = 1
    delay_s: float = 0.0
    shortened: bool = False
    flipped: bool = False

    def packed(self, *, is_on: bool) -> bytes:
        calls = sum(CALLS[name] for name in self.calls.split("|"))
        path = self.path.encode()
        assert len(path) < 192, "the pattern is too long"
        how = self.shortened | self.flipped << 1
        return _RULE.pack(
            is_on, calls, self.error, how, self.every, self.most, self.percent, self.seed,
            int(self.delay_s * 1e9), 0, 0, path,
        )  # fmt: skip

    def __str__(self) -> str:
        what = errno.errorcode.get(self.error, "what is done otherwise")
        return f"{self.calls} on {self.path}: {what}"


class Meeting:
    """A rule that is on, and what it did so far."""

    def __init__(self, faults: "Faults", at: int, rule: Rule) -> None:
        self.rule = rule
        self._faults, self._at = faults, at

    @property
    def seen(self) -> int:
        """Calls that fitted its path and kind."""
        return self._faults.counts(self._at)[0]

    @property
    def fired(self) -> int:
        """Those that it was done to."""
        return self._faults.counts(self._at)[1]

    def end(self) -> None:
        self._faults.end(self._at)

    def __repr__(self) -> str:
        return f"<{self.rule}: {self.fired} of {self.seen}>"


class Faults:
    """The table of one process: a file, which need not outlive it."""

    def __init__(self, table: Path) -> None:
        self.table = table
        table.write_bytes(bytes(_HEAD.size + _MOST * _RULE.size))
        self._count = self._serial = 0

    @property
    def env(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(library()), "HIVE_FS_FAULTS": str(self.table)}

    @property
    def starter(self) -> tuple[str, ...]:
        """A command that becomes another one, with the library in it."""
        return ("env", *(f"{name}={value}" for name, value in self.env.items()))

    @contextmanager
    def on(self, *rules: Rule) -> Iterator[list[Meeting]]:
        """While the block runs. Every rule must be met: a fault that never was shows nothing."""
        met = [self.add(rule) for rule in rules]
        try:
            yield met
        finally:
            self.off()
        for one in met:
            assert one.fired, f"never met: {one}"

    def add(self, rule: Rule) -> Meeting:
        """On until `off`."""
        at = self._count
        assert at < _MOST, "too many rules at once"
        self._count += 1
        self._serial += 1
        self._write(_place(at), rule.packed(is_on=False))
        self._write(_place(at), _NUMBER.pack(self._serial))
        self._write(0, _NUMBER.pack(self._count))
        return Meeting(self, at, rule)

    def end(self, at: int) -> None:
        """Of one rule; what it did stays told until another takes its place."""
        self._write(_place(at), _NUMBER.pack(0))

    def off(self) -> None:
        """Every rule. A call that waits goes on."""
        for at in range(self._count):
            self.end(at)
        self._write(0, _NUMBER.pack(0))
        self._count = 0

    def counts(self, at: int) -> tuple[int, int]:
        with self.table.open("rb") as file:
            file.seek(_place(at))
            told = _RULE.unpack(file.read(_RULE.size))
        return told[9], told[10]

    def _write(self, at: int, told: bytes) -> None:
        """Who has the file mapped sees it at once."""
        with self.table.open("r+b", buffering=0) as file:
            file.seek(at)
            file.write(told)


def _place(at: int) -> int:
    return _HEAD.size + at * _RULE.size

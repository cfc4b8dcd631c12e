"""hive's own code in a process whose disk fails: asked in Python, answered by what it comes to."""

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.doubles.fs import Faults
from tests.patience import short_directory

PROGRAM = """
import asyncio, json, logging, sys
from pathlib import Path
home = Path(sys.argv[1])
logging.basicConfig(filename=home / "log", level=logging.INFO)
with asyncio.Runner() as runner:
    for line in sys.stdin:
        try:
            exec(json.loads(line), globals())
            answer = "", runner.run(asked())
        except BaseException as exc:
            answer = type(exc).__name__, str(exc)
        print(json.dumps(answer), flush=True)
"""


class Failed(Exception):
    """What was asked raised an error; its class and what it says."""

    def __init__(self, kind: str, says: str) -> None:
        super().__init__(f"{kind}: {says}")
        self.kind = kind


class Apart:
    """One such process; `home` is a directory of its own, `Path`, `asyncio` and `home` are there."""

    def __init__(self, faults: Faults) -> None:
        self.faults, self.home = faults, faults.table.parent
        self.process = subprocess.Popen(
            [*faults.starter, sys.executable, "-c", PROGRAM, str(self.home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, code: str) -> Any:
        """What the body of an async function returns; names declared global are kept.

        Raises Failed.
        """
        self.begin(code)
        return self.end()

    def begin(self, code: str) -> None:
        """`end` has its answer."""
        assert self.process.stdin
        body = f"async def asked():\n{textwrap.indent(textwrap.dedent(code), '    ')}"
        self.process.stdin.write(json.dumps(body) + "\n")
        self.process.stdin.flush()

    def end(self) -> Any:
        assert self.process.stdout
        kind, told = json.loads(self.process.stdout.readline())
        if kind:
            raise Failed(kind, told)
        return told

    def leave(self) -> tuple[int, float]:
        """Its exit status when it is asked no more, and how many seconds that took."""
        assert self.process.stdin
        self.process.stdin.close()
        began = time.monotonic()
        return self.process.wait(30), time.monotonic() - began

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()


@contextmanager
def apart() -> Iterator[Apart]:
    """One that runs while the block does."""
    with short_directory() as home:
        it = Apart(Faults(home / "faults"))
        assert it.process.stdin
        assert it.process.stdout
        try:
            yield it
        finally:
            it.faults.off()
            it.process.kill()
            it.process.wait()
            it.process.stdin.close()
            it.process.stdout.close()

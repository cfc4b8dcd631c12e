"""The samples of messages/ (its README tells their form)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hive.workers.diagnosis import Cause

MESSAGES = Path(__file__).parent / "messages"


@dataclass(frozen=True)
class Sample:
    name: str
    source: str
    cause: Cause | None
    sizes: dict[str, float]  # GiB
    lines: list[str]

    def __str__(self) -> str:
        return self.name


def samples(file: str) -> list[Sample]:
    """Those of one file, in its order."""
    parts = re.split(r"^## ", (MESSAGES / f"{file}.txt").read_text(), flags=re.MULTILINE)
    return list(_read(parts[1:]))


def _read(parts: list[str]) -> Iterator[Sample]:
    for part in parts:
        name, source, tells, *lines = part.rstrip("\n").split("\n")
        cause, *sizes = tells.removeprefix("# tells: ").split(" ")
        yield Sample(
            name,
            source.removeprefix("# from: "),
            None if cause == "nothing" else Cause(cause),
            {key: float(value) for key, _, value in (size.partition("=") for size in sizes)},
            lines,
        )

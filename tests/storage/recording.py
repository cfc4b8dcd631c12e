"""Journals that tests write, and what is in their files."""

from pathlib import Path

from hive.storage.audit import ACTIVE, HEAD, Facts, page
from hive.storage.audit_writer import Journal, News, now
from tests.patience import wait_until

SMALL = 0.001  # MiB: a rotation every few records


def facts(number: int) -> Facts:
    return {"action": f"n{number}", "detail": {}, "timestamp": now()}


class Kept:
    """A journal and what it told."""

    def __init__(self, directory: Path, max_mib: float = 10, keep: int = 10) -> None:
        self.directory = directory
        self.news: list[News] = []
        self.journal = Journal(directory, max_mib, keep, self.news.append)

    def write(self, count: int, one_by_one: bool = True) -> None:
        for number in range(count):
            self.journal.put(facts(number))
            if one_by_one:
                wait_until(lambda: not self.journal._owes, "the record, and the head that names it")

    def end(self) -> None:
        assert self.journal.close() == 0


def written(directory: Path, count: int, max_mib: float = 10, keep: int = 10) -> list[News]:
    kept = Kept(directory, max_mib, keep)
    kept.write(count, one_by_one=max_mib != 10)
    kept.end()
    return kept.news


def texts(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def actions(directory: Path) -> list[str]:
    return [one["action"] for one in reversed(page(directory, 10_000))]


def cut(directory: Path, lines: int, is_head_cut: bool = False) -> None:
    """Leave so many lines of the active file."""
    path = directory / ACTIVE
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))
    if is_head_cut:
        (directory / HEAD).unlink()

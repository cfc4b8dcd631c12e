"""The audit log's files in STATE/audit, as whoever looks reads them; `audit_writer` writes them.

`audit.jsonl` is written to, `audit-<first index>.jsonl` are older ones, `head.json` names the last
record, so that a tail that was cut off is missed. `verify` names what somebody changed for as long
as it is there.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from hive.policy.chain import START, ZEROS, Broken, Link, opened
from hive.settings import open_regular

Facts = dict[str, Any]

ACTIVE, HEAD = "audit.jsonl", "head.json"
OLDER = re.compile(r"audit-(\d{12})\.jsonl\Z")  # its group is the first index
DAMAGED = "chain.damaged"
EXPIRED = "chain.expired"  # the action of the record that says which files hive removed
LOOKS = 5  # at files that change while they are verified
BLOCK = 65_536  # bytes that are read at once from a file's end
MOST_LINE = 2**20  # bytes; hive's own are hundreds


@dataclass(frozen=True, slots=True)
class Problem:
    """The first thing that is wrong. `line` counts from 1; 0 and an index of -1: the file itself."""

    file: str
    line: int
    index: int
    what: str

    def __str__(self) -> str:
        if not self.line:
            return f"{self.file}: {self.what}"
        return f"{self.file}, line {self.line}, index {self.index}: {self.what}"


@dataclass(slots=True)
class Verdict:
    """What `verify` found. `unfinished` bytes at the end are a crash's, or being written."""

    records: int = 0
    files: int = 0
    first: int | None = None
    last: Link = START
    problem: Problem | None = None
    unfinished: int = 0


@dataclass(slots=True)
class Walk:
    """The way along the chain, file by file."""

    head: Link
    at: Link | None = None  # None: what comes first is taken as it is
    wanted: str | None = None  # a hash that is looked for, and not found yet
    verdict: Verdict = field(default_factory=Verdict)
    lines: int = 0  # whole ones of the last file …
    bytes: int = 0  # … and their bytes
    begins_after: str = ZEROS
    last_action: object = None
    expired: dict[int, str] = field(default_factory=dict)  # hash by last index that was removed
    told: Problem | None = None  # the first record by which hive itself says so

    @property
    def reached(self) -> int:
        return -1 if self.at is None else self.at.index


# ── verify ──────────────────────────────────────────────────────────────────────────────────────


def verify(directory: Path, wanted: str | None = None) -> Verdict:
    """Every record of every file, in order; `wanted` is a hash that one of them must have.

    Reads only, also while hive writes. Raises OSError when a file cannot be read.
    """
    for _ in range(LOOKS):
        before = _look(directory)
        verdict = _verified(directory, wanted)
        if verdict.problem is None or _look(directory) == before:
            break
    return verdict


def _look(directory: Path) -> object:
    """What changes when files come or go; a file that only grew is the same."""
    with contextlib.suppress(FileNotFoundError):
        return sorted((one.name, one.inode()) for one in os.scandir(directory) if _is_log(one.name))
    return None


def _is_log(name: str) -> bool:
    return name == ACTIVE or OLDER.match(name) is not None


def _verified(directory: Path, wanted: str | None) -> Verdict:
    try:
        head = read_head(directory)  # before the rest: what it names is written
    except FileNotFoundError:
        if not _look(directory) and wanted is None:
            return Verdict()  # nothing was ever recorded here
        return Verdict(problem=Problem(HEAD, 0, -1, "it is missing"))
    except ValueError:
        return Verdict(problem=Problem(HEAD, 0, -1, "it was changed: hive does not write it so"))
    walk = Walk(head, wanted=wanted)
    with contextlib.ExitStack() as files:
        for name, file in _opened_files(directory, files):
            walk_file(walk, name, file)
            if walk.verdict.problem:
                return walk.verdict
    walk.verdict.problem = _problem_of_all(walk)
    return walk.verdict


def _opened_files(directory: Path, files: contextlib.ExitStack) -> list[tuple[str, BinaryIO]]:
    """The oldest first; each once, though it may be renamed meanwhile."""
    found: dict[int, tuple[str, BinaryIO]] = {}

    def open_all(names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                file = files.enter_context(opened_regular(directory / name))
                found.setdefault(os.fstat(file.fileno()).st_ino, (name, file))

    open_all([ACTIVE])  # first: renamed meanwhile, it is the newest of the older ones
    with contextlib.suppress(FileNotFoundError):
        open_all(sorted(name for name in os.listdir(directory) if OLDER.match(name)))
    return sorted(found.values(), key=lambda one: (one[0] == ACTIVE, one[0]))


def opened_regular(path: Path) -> BinaryIO:
    """A file of the log, not a link to one. Raises OSError."""
    return open_regular(path, os.O_NOFOLLOW)


def walk_file(walk: Walk, name: str, file: Iterable[bytes]) -> None:
    """Follow the chain through a file's lines, to its end or to the first problem."""
    verdict = walk.verdict
    verdict.files += 1
    walk.lines = walk.bytes = 0
    for line in file:
        try:
            record, link = opened(line, walk.at)
            _must_be_named(name if not walk.lines else ACTIVE, link)
            _must_be_head(walk.head, link)
        except Broken as exc:
            is_torn = name == ACTIVE and not line.endswith(b"\n")
            if is_torn and walk.reached >= walk.head.index:  # more was never known to be written
                verdict.unfinished = len(line)
            else:
                index = _index_in(line) if walk.at is None else walk.at.index + 1
                verdict.problem = Problem(name, walk.lines + 1, index, str(exc))
            return
        walk.at = verdict.last = link
        walk.lines += 1
        walk.bytes += len(line)
        if verdict.first is None:
            verdict.first, walk.begins_after = link.index, record["previous_hash"]
        verdict.records += 1
        walk.last_action = record.get("action")
        if record.get("action") == EXPIRED:
            _note_expired(walk, record)
        if record.get("action") == DAMAGED and walk.told is None:
            what = f"here hive told of it: {_told_in(record)}"
            walk.told = Problem(name, walk.lines, link.index, what)
        if link.hash == walk.wanted:
            walk.wanted = None


def _must_be_named(name: str, link: Link) -> None:
    if (older := OLDER.match(name)) and int(older[1]) != link.index:
        raise Broken(f"the file has another's name: its first index is {link.index}")


def _must_be_head(head: Link, link: Link) -> None:
    if link.index == head.index and link.hash != head.hash:
        raise Broken(f"the record is another than the one that {HEAD} names")


def _note_expired(walk: Walk, record: Mapping[str, Any]) -> None:
    detail = record.get("detail")
    if isinstance(detail, dict) and type(detail.get("through")) is int:
        walk.expired[detail["through"]] = str(detail.get("hash"))


def _told_in(record: Mapping[str, Any]) -> str:
    detail = record.get("detail")
    return str(detail.get("problem")) if isinstance(detail, dict) else DAMAGED


def _index_in(line: bytes) -> int:
    found = re.search(rb'"index":(\d{1,15})\b', line)
    return int(found[1]) if found else 0


def _problem_of_all(walk: Walk) -> Problem | None:
    """What no single record shows: the beginning or the end is missing."""
    verdict, head = walk.verdict, walk.head
    first = verdict.first or 0
    before = Link(first - 1, walk.begins_after)
    if (first == 0 and before != START) or (
        first and walk.expired.get(before.index) != before.hash
    ):
        what = f"records 0 to {before.index} are missing, and no record says that hive removed them"
        return Problem(ACTIVE, 1, first, what)
    if verdict.last.index < head.index:
        what = f"the end is missing: {HEAD} names record {head.index}"
        return Problem(ACTIVE, walk.lines + 1, verdict.last.index + 1, what)
    if head.index < before.index or (head.index == before.index and head != before):
        return Problem(HEAD, 0, -1, f"it names record {head.index}, with another hash")
    if walk.wanted:
        return Problem(HEAD, 0, -1, f"no record has the hash {walk.wanted}")
    return walk.told  # what it speaks of may be gone since


def read_head(directory: Path) -> Link:
    """The last record, as it was written down beside. Raises OSError, ValueError."""
    with opened_regular(directory / HEAD) as file:
        text = file.read(4096)
    try:
        said = json.loads(text)
    except RecursionError:  # it nests too deeply
        raise ValueError(HEAD) from None
    index, digest = (
        (said.get("index"), said.get("hash")) if isinstance(said, dict) else (None, None)
    )
    if type(index) is not int or not isinstance(digest, str):  # type: True is 1, too
        raise ValueError(HEAD)
    link = Link(index, digest)
    if head_text(link) != text:
        raise ValueError(HEAD)
    return link


def head_text(link: Link) -> bytes:
    """What HEAD holds, to the byte."""
    return (json.dumps(asdict(link), sort_keys=True) + "\n").encode()


# ── look ────────────────────────────────────────────────────────────────────────────────────────


def page(directory: Path, most: int, before: int | None = None) -> list[Facts]:
    """The newest records, or the newest before an index; the newest first. They are not verified.

    Raises OSError when a file cannot be read.
    """
    return list(islice(_backwards(directory, before), most))


def _backwards(directory: Path, before: int | None) -> Iterator[Facts]:
    with contextlib.ExitStack() as files:
        for name, file in reversed(_opened_files(directory, files)):
            older = OLDER.match(name)
            if before is not None and older and int(older[1]) >= before:
                continue
            for line in lines_backwards(file):
                with contextlib.suppress(Broken):
                    record, link = opened(line + b"\n")
                    if before is None or link.index < before:
                        yield record


def lines_backwards(file: BinaryIO) -> Iterator[bytes]:
    """Whole lines without their ends, the last first; a bounded part of the file at once.

    A line that is longer than any of hive's is given up, with what stands before it.
    """
    position = os.fstat(file.fileno()).st_size
    held, is_end = b"", True
    while position and len(held) <= MOST_LINE:
        size = min(BLOCK, position)
        position -= size
        held = os.pread(file.fileno(), size, position) + held
        first, *lines = held.split(b"\n")
        if is_end and lines:  # what follows the last end of a line is not whole
            lines, is_end = lines[:-1], False
        yield from reversed(lines)
        held = first
    if held and not is_end and not position:
        yield held

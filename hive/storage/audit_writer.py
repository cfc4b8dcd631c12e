"""The audit log's writer: a thread of its own, whose files are those that `audit` reads.

What cannot be written is held, up to MOST_HELD records, tried again every RETRY_S, and the gap
becomes a record itself. What somebody changed is told and never removed, and the chain goes on.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from hive.policy.chain import START, Broken, Link, opened, sealed
from hive.storage.audit import (
    ACTIVE,
    DAMAGED,
    EXPIRED,
    HEAD,
    OLDER,
    Facts,
    Problem,
    Walk,
    head_text,
    lines_backwards,
    opened_regular,
    read_head,
    walk_file,
)
from hive.storage.durable import synced

log = logging.getLogger(__name__)

MIB = 2**20
MOST_HELD = 10_000  # records that wait for a disk that takes none
MOST_AT_ONCE = 256  # records of one write
RETRY_S = 1.0  # between two tries to write
STUCK_S = 5.0  # that a record may wait without any being written: then the disk hangs
CLOSE_S = 5.0  # that the end of hive waits for the last records
HANGS = "the disk does not answer"
TOO_MANY = "more came than could be written"
_BREATH, _BREATH_S = 32, 0.001  # records of an old file that are looked at between two pauses


@dataclass(frozen=True, slots=True)
class News:
    """What the writer has to tell: `state` is failing, writing (again) or damaged."""

    state: str
    reason: str
    late: int = 0  # records that were held meanwhile …
    lost: int = 0  # … and that were too many


class Journal:
    """Appends records from a thread of its own; `put` never waits and never fails.

    `told` hears, in that thread, when writing fails, when it works again and when the files are
    not as they were left.
    """

    def __init__(
        self,
        directory: Path,
        max_mib: float,
        keep: int,
        told: Callable[[News], None],
        retry_s: float = RETRY_S,
        stop: str | None = None,
        stuck_s: float = STUCK_S,
    ) -> None:
        """A file has at most `max_mib`, and so many older ones are kept, at least one.

        `stop` is the action of each life's last record: one that has none was killed.
        """
        self._directory = directory
        self._max_bytes, self._keep = int(max_mib * MIB), keep
        self._told, self._retry_s, self._stop = told, retry_s, stop
        self._stuck_s = stuck_s
        self._held: deque[Facts] = deque()
        self._since: float | None = None  # monotonic: so long the oldest one held is the oldest
        self._stuck_since: float | None = None  # the time of day since which nothing is written
        self._lost = 0
        self._lost_since = 0.0
        self._news: dict[str, News] = {}  # what is wrong, by what it is about
        self._is_closed = False
        self._changed = threading.Condition()
        # From here on the thread's own.
        self._fd = -1
        self._at = START
        self._head = START  # as it is on the disk
        self._size = 0  # bytes of the active file that are whole
        self._begins = 0  # its first index
        self._is_tidy = self._is_partial = self._was_open = False
        self._moved: Problem | None = None  # the file, by somebody else
        self._notes: list[Facts] = []  # of what was found here; before all that is held
        self._failing_since: float | None = None
        self._reason = ""
        self._said_gone: set[str] = set()  # files that are to go, and that a record says so of
        self._kept_back: set[str] = set()  # files that somebody changed: they stay …
        self._told_of: set[str] = set()  # … and that it was told of
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def put(self, facts: Facts) -> None:
        """Record these facts, which are JSON's own kinds, as soon as it can be done."""
        with self._changed:
            if len(self._held) >= MOST_HELD:
                self._lost_since = self._lost_since if self._lost else time.time()
                self._lost += 1
            else:
                if not self._held:
                    self._since = time.monotonic()
                self._held.append(facts)
            self._changed.notify_all()

    def limit(self, max_mib: float, keep: int) -> None:
        """From the next record on a file has at most so much, and so many older ones are kept."""
        with self._changed:
            self._max_bytes, self._keep = int(max_mib * MIB), keep
            self._is_tidy = False

    def look(self) -> None:
        """Tell of a disk that hangs: its thread cannot. To be called every second or so."""
        with self._changed:
            waited = 0.0 if self._since is None else time.monotonic() - self._since
            is_known = self._failing_since is not None or self._stuck_since is not None
            if waited < self._stuck_s or is_known:
                return
            self._stuck_since = time.time() - waited
        self._tell("writing", News("failing", HANGS))

    def tell_again(self) -> None:
        """What is wrong now, for those who did not listen yet when it was told."""
        for news in list(self._news.values()):
            self._told(news)

    def close(self, within_s: float = CLOSE_S) -> int:
        """Write what is held, and end; how many records the disk did not take in time."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(within_s)
        return len(self._held) + self._lost

    # ── the thread ──────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while self._is_needed():
            try:
                while self._write_some():
                    pass
            except Exception as exc:  # noqa: BLE001 (it is told, and tried again: this must not end)
                if not self._failed(exc):
                    break
        if self._fd >= 0:
            os.close(self._fd)

    def _is_needed(self) -> bool:
        """Wait for something to do; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._owes)
            return self._owes

    @property
    def _owes(self) -> bool:
        is_unsure = self._fd < 0 or self._failing_since is not None
        is_unsure = is_unsure or self._stuck_since is not None or self._lost > 0
        return bool(self._held or self._notes or is_unsure or self._head != self._at)

    def _tell(self, about: str, news: News) -> None:
        if news.state == "writing":
            self._news.pop(about, None)
        else:
            self._news[about] = news
        self._told(news)
        if news.state == "writing" and (left := self._news.get("removing")):
            self._told(left)  # not all is well

    def _failed(self, exc: Exception) -> bool:
        """Tell it once, and wait before the next try; False: hive ends meanwhile."""
        if self._failing_since is None:
            self._reason = type(exc).__name__
            if isinstance(exc, OSError):
                self._reason = exc.strerror or str(exc)
            else:  # a bug, or what nobody thought that a file could hold
                log.error("the audit log cannot be written", exc_info=exc)
            self._failing_since = self._stuck_since or time.time()
            self._tell("writing", News("failing", self._reason))
        with self._changed:
            return not self._changed.wait_for(lambda: self._is_closed, self._retry_s)

    def _write_some(self) -> bool:
        """Write the oldest of what is held; False when there is nothing. Raises OSError.

        After trouble, and where something was lost, a record of that comes before.
        """
        self._must_be_open()
        self._write_head()  # if it failed the last time
        with self._changed:
            batch = list(islice(self._held, MOST_AT_ONCE))
            late, lost, most, keep = len(self._held), self._lost, self._max_bytes, self._keep
            trouble, reason = self._trouble()
        notes, gap = self._notes, []
        if trouble is not None:
            if reason == TOO_MANY:  # nothing else has told it
                self._tell("writing", News("failing", reason))
            gap = [_gap(trouble, reason, late, lost)]
        if not (notes or gap or batch):
            return False
        if self._size >= most:
            self._rotate()
        gone, expired = self._too_old(keep)
        self._append([*notes, *gap, *expired, *batch])
        self._notes = []
        self._said_gone.update(path.name for path in gone)
        with self._changed:
            for _ in batch:
                self._held.popleft()
            self._since = time.monotonic() if self._held else None
            self._lost -= lost if gap else 0
            if gap:
                self._failing_since = self._stuck_since = None
        if gap:
            self._tell("writing", News("writing", reason, late, lost))
        self._write_head()
        self._remove(gone)
        self._is_tidy = True
        return True

    def _trouble(self) -> tuple[float | None, str]:
        """Since when something has been wrong, and what; with the lock."""
        if self._failing_since is not None:
            return self._failing_since, self._reason
        if self._stuck_since is not None:
            return self._stuck_since, HANGS
        return (self._lost_since, TOO_MANY) if self._lost else (None, "")

    def _append(self, batch: list[Facts]) -> None:
        """All of it or nothing. Raises OSError."""
        if self._is_partial:
            os.ftruncate(self._fd, self._size)
        lines, at = [], self._at
        for facts in batch:
            line, at = sealed(facts, at)
            lines.append(line)
        data = unwritten = b"".join(lines)
        self._is_partial = True
        while unwritten:
            unwritten = unwritten[os.write(self._fd, unwritten) :]
        os.fsync(self._fd)
        self._is_partial = False
        self._size += len(data)
        self._at = at

    def _write_head(self) -> None:
        if self._head != self._at:
            _write_head(self._directory, self._at)
            self._head = self._at

    # ── files ───────────────────────────────────────────────────────────────────────────────────

    def _must_be_open(self) -> None:
        """Open it, also when somebody has changed or removed it under hive's hand."""
        if self._fd >= 0:
            found = os.fstat(self._fd)
            grew = found.st_size > self._size if self._is_partial else False
            is_there = _is_at(self._directory / ACTIVE, found)
            if is_there and (found.st_size == self._size or grew):
                return
            if not is_there:
                what = "it was moved, replaced or removed while hive wrote it"
                self._moved = Problem(ACTIVE, 1, self._begins, what)
            os.close(self._fd)
            self._fd = -1
        self._open()

    def _open(self) -> None:
        """Go on where the last life ended: find its last whole record, and say what is wrong."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._directory.chmod(0o700)
        path, older = self._directory / ACTIVE, _older(self._directory)
        start = _last_link(older[-1]) if older else START
        if _begins_with_damage(path):  # which was told then, and `verify` finds
            start = None
        problem = self._find_head(is_new=not older and not os.path.lexists(path))
        if self._moved is not None:  # hive itself knows what it wrote last, whatever is there now
            self._head, problem = max(self._head, self._at), self._moved
        walk, torn = Walk(self._head, start), b""
        with contextlib.suppress(FileNotFoundError), opened_regular(path) as file:
            walk_file(walk, ACTIVE, file)
            torn = os.pread(file.fileno(), walk.verdict.unfinished, walk.bytes)
        self._at = walk.at or self._head
        if broken := walk.verdict.problem or self._cut_off(walk):
            problem = problem or broken
            self._set_aside(path, start)
            self._at, walk.bytes = max(self._at, self._head), 0
        with synced(self._directory):
            self._fd = os.open(path, _APPEND, 0o600)
            os.fchmod(self._fd, 0o600)
            os.ftruncate(self._fd, walk.bytes)
        self._size, self._is_partial, self._is_tidy = walk.bytes, False, False
        first = walk.verdict.first
        self._begins = first if walk.bytes and first is not None else self._at.index + 1
        if torn:
            self._notes.append(_note("chain.torn", "cut off", _about(torn)))
        is_known = problem is None and self._stop and not self._was_open
        if is_known and walk.last_action not in (None, self._stop):
            self._notes.append(_note("daemon.vanished", "its stop is not recorded", {}))
        self._was_open, self._moved = True, None
        if problem is not None:
            self._notes.insert(0, self._damage(problem))

    def _damage(self, problem: Problem) -> Facts:
        """Tell it; the record of it."""
        self._tell("files", News("damaged", str(problem)))
        return _note(DAMAGED, "damaged", {"problem": str(problem)})

    def _find_head(self, *, is_new: bool) -> Problem | None:
        """The last record as it was written down; from the first moment on there is one."""
        try:
            self._head = read_head(self._directory)
        except (FileNotFoundError, ValueError) as exc:
            self._head = START
            if not is_new:
                is_gone = isinstance(exc, FileNotFoundError)
                return Problem(HEAD, 0, -1, "it is missing" if is_gone else "it was changed")
            _write_head(self._directory, START)
        return None

    def _cut_off(self, walk: Walk) -> Problem | None:
        if self._at.index >= self._head.index:
            return None
        what = f"the end is missing: {HEAD} names record {self._head.index}"
        return Problem(ACTIVE, walk.lines + 1, self._at.index + 1, what)

    def _set_aside(self, path: Path, start: Link | None) -> None:
        """Keep what somebody changed as it is; `verify` finds it where it belongs."""
        first = (start or self._head).index + 1
        while (target := self._directory / f"audit-{first:012}.jsonl").exists():
            first += 1
        with contextlib.suppress(FileNotFoundError):
            path.rename(target)

    def _rotate(self) -> None:
        path = self._directory / ACTIVE
        with synced(self._directory):
            path.rename(self._directory / f"audit-{self._begins:012}.jsonl")
            os.close(self._fd)
            self._fd = -1  # if there is no new one, all is looked at again before the next try
            self._fd = os.open(path, _APPEND | os.O_EXCL, 0o600)
            self._size, self._begins = 0, self._at.index + 1
            self._is_tidy = self._is_partial = False

    def _too_old(self, keep: int) -> tuple[list[Path], list[Facts]]:
        """The files that are to go, and the records that say so of each before it does.

        What somebody changed is evidence: it stays, and is told. So does a file that tells of it.
        """
        older = [] if self._is_tidy else _older(self._directory)
        gone: list[Path] = []
        notes: list[Facts] = []
        for path, following in itertools.pairwise(older[: 1 - keep or None]):
            if path.name in self._kept_back:
                continue
            if path.name not in self._said_gone:
                end, problem = _end_of(path, following)
                if end is None:
                    self._kept_back.add(path.name)
                    if problem and problem.file not in self._told_of:
                        self._told_of.add(problem.file)
                        notes.append(self._damage(problem))
                    continue
                about = {"through": end.index, "hash": end.hash, "file": path.name}
                notes.append(_note(EXPIRED, "ok", about))
            gone.append(path)
        return gone, notes

    def _remove(self, gone: list[Path]) -> None:
        """In order: what is left has no hole. Where one cannot go, it is tried after the next file."""
        for path in gone:
            try:
                path.unlink(missing_ok=True)
            except OSError as exc:
                if "removing" not in self._news:
                    what = f"{path.name} cannot be removed: {exc.strerror}"
                    self._tell("removing", News("failing", what))
                return
            self._said_gone.discard(path.name)
        if gone and (stuck := self._news.get("removing")):
            self._tell("removing", News("writing", stuck.reason))

    def __repr__(self) -> str:
        return f"<Journal at {self._at.index}, {len(self._held)} held>"


_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


def _older(directory: Path) -> list[Path]:
    """The oldest first."""
    return [directory / name for name in sorted(os.listdir(directory)) if OLDER.match(name)]


def _end_of(path: Path, following: Path) -> tuple[Link | None, Problem | None]:
    """The last record of an old file, if all of it is as hive left it.

    None where it must stay; and what is wrong with it, where no record tells that yet.
    """
    walk = Walk(START, _link_before(path))
    try:
        with opened_regular(path) as file:
            walk_file(walk, path.name, _unhurried(file))
    except OSError as exc:
        return None, Problem(path.name, 0, -1, f"it cannot be read: {exc.strerror}")
    problem, end = walk.verdict.problem, _link_before(following)
    if problem is None and end is None:
        problem = Problem(following.name, 1, -1, "the record was changed, or cannot be read")
    if problem is None and walk.at != end:
        what = f"it does not lead to {following.name}"
        problem = Problem(path.name, walk.lines, walk.reached, what)
    if problem is None:
        return (None if walk.told else walk.at), None
    return None, None if _begins_with_damage(following) else problem


def _unhurried(file: BinaryIO) -> Iterator[bytes]:
    """Its lines; others get the interpreter meanwhile."""
    for number, line in enumerate(file, 1):
        yield line
        if number % _BREATH == 0:
            time.sleep(_BREATH_S)


def now() -> str:
    """A record's timestamp: ISO 8601, UTC, microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _note(action: str, outcome: str, detail: Facts) -> Facts:
    return {
        "timestamp": now(),
        "actor": "hive",
        "action": action,
        "target": "audit",
        "outcome": outcome,
        "request_id": None,
        "detail": detail,
    }


def _gap(since: float, reason: str, late: int, lost: int) -> Facts:
    began = datetime.fromtimestamp(since, UTC).isoformat(timespec="microseconds")
    return _note("chain.gap", reason, {"since": began, "late": late, "lost": lost})


def _about(torn: bytes) -> Facts:
    return {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}


def _write_head(directory: Path, link: Link) -> None:
    """Whole or not at all. Raises OSError."""
    draft = directory / f".{HEAD}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(draft, flags, 0o600)
    with open(fd, "wb") as file:
        file.write(head_text(link))
        file.flush()
        os.fsync(fd)
    draft.replace(directory / HEAD)


def _is_at(path: Path, file: os.stat_result) -> bool:
    """Whether a file that is open is still the one of this name."""
    with contextlib.suppress(FileNotFoundError):
        there = path.lstat()
        return (there.st_dev, there.st_ino) == (file.st_dev, file.st_ino)
    return False


def _last_link(path: Path) -> Link | None:
    """The last record's place; None where it cannot be read."""
    with contextlib.suppress(Broken, StopIteration, OSError), opened_regular(path) as file:
        return opened(next(lines_backwards(file)) + b"\n")[1]
    return None


def _begins_with_damage(path: Path) -> bool:
    with contextlib.suppress(Broken, OSError), opened_regular(path) as file:
        return opened(file.readline())[0].get("action") == DAMAGED
    return False


def _link_before(path: Path) -> Link | None:
    """The place of the record before a file's first one; None where it cannot be read."""
    with contextlib.suppress(Broken, OSError), opened_regular(path) as file:
        record, link = opened(file.readline())
        return Link(link.index - 1, record["previous_hash"])
    return None

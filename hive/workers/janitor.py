"""The janitor: clears what an earlier life of hive left, before anything starts.

Needed where hive and its guards were killed together; a guard that outlived its hive does the work
itself and is only waited for. Touched is what the journal of the same user's hive records *and*
what proves to be that: a pid with another start, a name in /dev/shm with another inode, a home
outside of the runtime directory or a file that is not as hive writes it belong to somebody else.
"""

import asyncio
import contextlib
import logging
import os
import re
import signal
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from hive.workers import guard, journal, leftovers
from hive.workers.guard import Group, Process
from hive.workers.journal import NO_TREE, Damaged, Identity, Note, Tree
from hive.workers.ledger import LOOK_S, SETTLE_S, Ledger
from hive.workers.leftovers import Leak, described
from hive.workers.process import ANSWER_S

log = logging.getLogger(__name__)

RUNS = "the hive that wrote it runs"
HIVE_S = 2.0  # an earlier hive that gave its locks back has ended within this
DRAFT = re.compile(r"[0-9a-f]{16}(\.tree)?\.json\.new")


@dataclass(frozen=True, slots=True)
class Swept:
    """One thing that was found: ended, removed, refused, left alone, or it stays."""

    kind: str
    holder: str
    worker: str
    outcome: str
    why: str = ""

    def __str__(self) -> str:
        whose = f" of {self.worker}" if self.worker else ""
        why = f": {self.why}" if self.why else ""
        return f"{self.kind.replace('_', ' ')} {self.holder}{whose} {self.outcome}{why}"


async def sweep(ledger: Ledger, runtime_dir: Path) -> list[Swept]:
    """Clear the journal of earlier lives and `runtime_dir`/w; what was found.

    The caller holds the locks of both directories (daemon.only_daemon). What cannot be cleared
    stays in the journal and is in `ledger.leaks` from now on.
    """
    notes, found = await asyncio.to_thread(_read, ledger.directory, runtime_dir / "w")
    over = await asyncio.gather(*map(_is_over, notes))
    for note, is_over in zip(list(notes), over, strict=True):
        if not is_over:
            notes.remove(note)
            if note.hive != journal.identity(os.getpid()):
                found.append(Swept("journal", note.mark, note.worker, "left alone", RUNS))
    # Every process first: one start may use what another one has on record.
    trees = await asyncio.gather(*(_end(ledger.directory, note, found) for note in notes))
    for note, tree in zip(notes, trees, strict=True):
        is_home_taken = any(n.home == note.home and n.since > note.since for n in notes)
        found += await _give_back(ledger, note, tree, is_home_taken=is_home_taken)
    return found


async def _give_back(ledger: Ledger, note: Note, tree: Tree, *, is_home_taken: bool) -> list[Swept]:
    """Remove what is left beside processes; forget the start, or keep what cannot be removed."""
    worker = note.worker
    before = await asyncio.to_thread(_holdings, note, tree, is_home_taken)
    leaks = await _leftovers(note, tree, is_home_taken)
    if leaks:
        await ledger.keep(note, tree, leaks)
    else:
        await asyncio.to_thread(journal.remove, ledger.directory, note.mark)
    after = await asyncio.to_thread(_holdings, note, tree, is_home_taken)
    removed = [Swept(*one, worker, "removed") for one in before if one not in after]
    return removed + [Swept(x.kind, x.holder, worker, "stays", x.how_to_clear) for x in leaks]


# ── What is recorded ────────────────────────────────────────────────────────────────────────────


def _read(directory: Path, homes: Path) -> tuple[list[Note], list[Swept]]:
    """The starts that are on record; what is not as hive writes it is set aside, and told."""
    notes: list[Note] = []
    found: list[Swept] = []
    for path in sorted(directory.glob("*")):
        if DRAFT.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()  # of a write that did not come to its end, so nothing followed it
        elif path.name.endswith(".json") and not path.name.endswith(".tree.json"):
            try:
                notes.append(_ours(journal.read_note(path), homes))
            except (Damaged, FileNotFoundError) as exc:
                found.append(_set_aside(path, str(exc)))
            except OSError as exc:  # another sweep may read it
                why = f"it cannot be read now: {exc.strerror}"
                found.append(Swept("journal", path.name, "", "left alone", why))
    known = {note.mark for note in notes}
    found += [
        Swept("journal", path.name, "", "left alone", "it is of no start that is known")
        for path in sorted(directory.glob("*.tree.json"))
        if path.name.removesuffix(".tree.json") not in known
    ]
    if homes.is_dir() and not homes.is_symlink():
        recorded = {note.home.name for note in notes}
        for home in sorted(homes.iterdir()):
            if home.name not in recorded:
                try:
                    notes.append(_ours(_older(home), homes))
                except Damaged as exc:
                    found.append(Swept("directory", f"w/{_name(home)}", "", "left alone", str(exc)))
    return notes, found


def _ours(note: Note, homes: Path) -> Note:
    """The note itself. Raises Damaged for a home or a group in a place where this hive makes none."""
    if homes.is_symlink():
        raise Damaged("the homes' directory is a link")
    if os.path.realpath(note.home.parent) != os.path.realpath(homes):
        raise Damaged("its home is not below server.runtime_dir")
    group = note.cgroup
    if group is not None and os.path.lexists(group) and not leftovers.is_control_group(group):
        raise Damaged("its control group is none")
    return note


def _set_aside(path: Path, why: str) -> Swept:
    with contextlib.suppress(OSError):
        os.rename(path, path.with_name(f"{path.name}.damaged"))
    return Swept("journal", _name(path), "", "refused", why)


def _name(path: Path) -> str:
    """A name that anybody may have chosen, for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in path.name[:100])


def _older(home: Path) -> Note:
    """A home that is in no journal but has its tree's record in it, as it once was. Damaged."""
    try:
        about = os.lstat(home)
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            raise Damaged("it is no directory of this user's")
        tree = journal.read_tree(home / journal.HOME_RECORD)
        note = journal.new("unknown", home, tree.mark, cgroup=tree.cgroup)
        is_of_this_boot = (home / journal.HOME_RECORD).stat().st_mtime >= _booted_at()
    except FileNotFoundError as exc:
        raise Damaged("it is not on record") from exc
    except ValueError as exc:
        raise Damaged("it is no home of a worker") from exc
    except OSError as exc:
        raise Damaged(f"it cannot be read now: {exc.strerror}") from exc
    return note.model_copy(
        update={"hive": None, "boot": note.boot if is_of_this_boot else "earlier"}
    )


def _booted_at() -> float:
    """Seconds of the epoch."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    return time.time()


async def _is_over(note: Note) -> bool:
    """Whether the hive that began a start has ended; waits for it up to HIVE_S."""
    give_up = time.monotonic() + HIVE_S
    while _hive_lives(note):
        if time.monotonic() > give_up or (note.hive and note.hive[0] == os.getpid()):
            return False
        await asyncio.sleep(LOOK_S)
    return True


def _hive_lives(note: Note) -> bool:
    """Also where nobody can see whether it does."""
    try:
        return bool(note.is_of_this_boot and note.hive and _lives(note.hive))
    except OSError:
        return True


def _lives(one: Identity) -> bool:
    process = guard.look_at(one[0])
    return process is not None and process.start == one[1] and process.state not in ("Z", "X")


# ── Processes ───────────────────────────────────────────────────────────────────────────────────


async def _end(directory: Path, note: Note, found: list[Swept]) -> Tree:
    """End every process of a start; what is on record of its tree then."""
    ending = Ending(directory, note, found)
    give_up = time.monotonic() + guard.KILL_S
    while True:
        try:
            if await asyncio.to_thread(ending.look):
                break
        except OSError as exc:
            if time.monotonic() > give_up:  # the audit tells it
                log.warning("nobody can see who is left of %s: %s", note.worker, exc.strerror)
                break
        await asyncio.sleep(LOOK_S)
    found += [Swept("process", described(p), note.worker, "ended") for p in ending.ended]
    return ending.tree


class Ending:
    """The end of a start whose hive is gone, look by look; a look blocks, and is for a thread.

    A guard that lives ends its tree itself: it gets its grace, and what comes after that, first.
    """

    def __init__(self, directory: Path, note: Note, found: list[Swept]) -> None:
        self.tree = NO_TREE
        self._directory, self._note, self._found = directory, note, found
        self._guard_until = time.monotonic() + note.grace_s + guard.KILL_S + ANSWER_S
        self._killing_since: float | None = None
        self._living: list[Process] = []
        self._killed: dict[Identity, Process] = {}

    @property
    def ended(self) -> list[Process]:
        living = {(p.pid, p.start) for p in self._living}
        return [process for one, process in self._killed.items() if one not in living]

    def look(self) -> bool:
        """Kill who is there; True when nobody is, or nothing helps. OSError: nobody could look."""
        self.tree = _tree(self._directory, self._note, self.tree, self._found)
        self._living = leftovers.members(self._note, self.tree)
        group = leftovers.group_of(self._note)
        if not self._living and not (group and group.is_populated()):
            return True
        now = time.monotonic()
        if self._killing_since is None:
            if now < self._guard_until and any(
                leftovers.is_guard(process, self._note) for process in self._living
            ):
                return False
            self._killing_since = now
        late_s = now - self._killing_since
        return late_s > guard.KILL_S or not self._kill(group, late_s)

    def _kill(self, group: Group | None, late_s: float) -> bool:
        """SIGKILL to each, noting what it shares; False when nobody there is ours to signal."""
        shm = guard.written_by(self._living, self.tree.shm_before)
        self.tree = self.tree.model_copy(update={"shm": self.tree.shm | shm})
        denied = 0
        for process in self._living:
            # It alone knows some names in /dev/shm, and removes them when the others are gone.
            if late_s < guard.TRACKER_S and guard.is_resource_tracker(process.pid):
                continue
            try:
                kill(process)
            except PermissionError:
                denied += 1
        self._killed |= {(p.pid, p.start): p for p in self._living}
        if group and late_s >= guard.TRACKER_S:
            group.kill()
        return not self._living or denied < len(self._living)


def _tree(directory: Path, note: Note, known: Tree, found: list[Swept]) -> Tree:
    """What the guard has on record now, and what is known already."""
    try:
        tree = journal.tree_of(directory, note)
    except Damaged as exc:
        there = [p for p in journal.records_of(directory, note) if os.path.lexists(p)]
        found += [_set_aside(path, str(exc)) for path in there[:1]]
        tree = journal.unrecorded(note)
    if not tree.members and not tree.shm and known.mark == note.mark:
        tree = known  # it is not there any more
    members = list({*tree.members, *known.members})
    return tree.model_copy(
        update={"mark": note.mark, "members": members, "shm": known.shm | tree.shm}
    )


def kill(process: Process) -> None:
    """SIGKILL to this very process: its descriptor cannot come to mean another. PermissionError."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(process.pid)
        try:
            now = guard.look_at(process.pid)
            if now and now.start == process.start:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


# ── Everything else ─────────────────────────────────────────────────────────────────────────────


async def _leftovers(note: Note, tree: Tree, is_home_taken: bool) -> list[Leak]:
    """What stays, when the kernel has had SETTLE_S to take back what it takes back itself."""
    if tree == NO_TREE:
        return [leftovers.unseen(note, "process", "its record cannot be read now")]
    give_up = time.monotonic() + SETTLE_S
    while True:
        found = await asyncio.to_thread(
            leftovers.leftovers, note, tree, is_home_taken=is_home_taken
        )
        if not found or found[0].kind == "process" or time.monotonic() > give_up:
            return found
        await asyncio.sleep(LOOK_S)


def _holdings(note: Note, tree: Tree, is_home_taken: bool) -> list[tuple[str, str]]:
    """What is there of a start beside processes, by kind and holder; for the log alone."""
    found = [("shared_memory", name) for name in leftovers.names_there(note, tree)]
    if not is_home_taken and os.path.lexists(note.home):
        found.append(("directory", f"w/{note.home.name}"))
    with contextlib.suppress(OSError):
        if group := leftovers.group_of(note):
            found.append(("cgroup", group.path.name))
    return found

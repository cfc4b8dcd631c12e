"""The ledger: what every start of a worker takes, until it is proved given back (promise 5).

A start is journalled before its fork (`intend`), completed after it (`started`) and audited after
its end (`audit`); the journal's file goes when nothing is left. What stays is a leak: announced
once, looked at again (`recheck`), told at shutdown (`error`). R022-R026, R143-R145, R148, R153.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from hive.errors import ResourceLeakDetected
from hive.events import Event, LeakCleared, LeakFound
from hive.workers import guard, journal, leftovers
from hive.workers.journal import Damaged, Note, Tree
from hive.workers.leftovers import Leak
from hive.workers.process import Place, pause_after

log = logging.getLogger(__name__)

SETTLE_S = 1.0  # what the kernel gets after a tree's end to take sockets and groups back
LOOK_S = 0.05

ACQUITTED = ("returned", "unproven")  # where pids are not visible nobody can prove more


class Entry:
    """One start in the ledger. `leaks` is what its last audit found."""

    def __init__(self, note: Note) -> None:
        self.note = note
        self.leaks: list[Leak] = []
        self.receipts: dict[str, str | Leak] = {}  # of each device, about its VRAM
        self.is_audited = False
        self.is_closed = False  # proved given back, or never begun: the journal knows it no more
        self.lock = Lock()  # held by the threads that read and write its files

    @property
    def mark(self) -> str:
        return self.note.mark

    def leak(self, kind: str, holder: str, how_to_clear: str) -> Leak:
        """A leak of this start, such as `receipt` takes."""
        return leftovers.leak(self.note, kind, holder, how_to_clear)

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"{len(self.leaks)} leaks"
        return f"<Entry {self.note.worker} {self.mark} {state}>"


class Ledger:
    """Every start that is not proved given back, in memory and in `directory` (0700)."""

    def __init__(self, directory: Path, announce: Callable[[Event], None]) -> None:
        self.directory = directory
        self._announce = announce
        self._open: dict[str, Entry] = {}

    @property
    def entries(self) -> list[Entry]:
        return list(self._open.values())

    @property
    def leaks(self) -> list[Leak]:
        return [leak for entry in self._open.values() for leak in entry.leaks]

    async def intend(
        self,
        worker_id: str,
        place: Place,
        *,
        cgroup: Path | None = None,
        devices: Mapping[str, Mapping[str, Any]] | None = None,
        grace_s: float = 5.0,
    ) -> Entry:
        """Put a start on disk before anything of it exists.

        `cgroup` is the group that the tree is to get, named hive-<mark>; `devices` maps each device
        that it will use to what was found there before; `grace_s` is what its guard gives the tree
        when hive dies. Raises OSError when it cannot be written, and ValueError (pydantic's
        ValidationError is one) when it could not be read back; nothing is left then.
        """
        facts = {"cgroup": cgroup, "devices": devices or {}, "grace_s": grace_s}
        note = await asyncio.to_thread(journal.new, worker_id, place.home, place.mark, **facts)
        entry = self._open[note.mark] = Entry(note)
        try:
            await asyncio.to_thread(self._write, entry)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._close, entry))
            self._open.pop(entry.mark, None)
            raise
        return entry

    async def started(self, entry: Entry, guard_pid: int, leader_pid: int) -> None:
        """Add the pids, with their start times. Raises OSError; the mark alone still proves."""
        leader = guard.look_at(leader_pid)
        made = None
        with contextlib.suppress(FileNotFoundError):  # it ended at once
            about = os.lstat(entry.note.home)
            made = about.st_dev, about.st_ino
        known = {
            "made": made,
            "guard": journal.identity(guard_pid),
            # One that has ended may be reaped already, and its pid another's.
            "leader": (leader_pid, leader.start) if leader and leader.ppid == guard_pid else None,
        }
        entry.note = entry.note.model_copy(update=known)
        await asyncio.to_thread(self._write, entry)

    def receipt(self, entry: Entry, device: str, outcome: str | Leak) -> None:
        """What became of a device's VRAM after the tree's end: "returned", "unproven" or a leak.

        Owed before the audit; a later receipt replaces an earlier one.
        """
        entry.receipts[device] = outcome
        if entry.is_audited:
            others = [leak for leak in entry.leaks if leak.kind != "vram"]
            self._publish(entry, [*others, *_vram(entry)])

    async def audit(self, entry: Entry) -> list[Leak]:
        """What the start has not given back after its end; nothing: it is over, and forgotten.

        Waits up to SETTLE_S for the kernel. Call it as often as you like. What nobody could look
        at is a leak, too, until a later look finds it given back: so this never raises.
        """
        began = time.monotonic()
        give_up = began + SETTLE_S
        while found := await self._look(entry):
            if time.monotonic() > give_up:
                break
            await asyncio.sleep(max(LOOK_S, pause_after(began)))
            began = time.monotonic()
        await self._settle(entry, found)
        return entry.leaks

    async def recheck(self) -> list[Leak]:
        """Look again at every leak that is known; those that are left."""
        for entry in self.entries:
            if entry.is_audited:
                await self._settle(entry, await self._look(entry))
        return self.leaks

    def error(self) -> ResourceLeakDetected | None:
        """What to end with when something is leaked (R022)."""
        leaks = self.leaks
        if not leaks:
            return None
        shown = "; ".join(map(str, leaks[:5])) + ("; …" if leaks[5:] else "")
        hows = list(dict.fromkeys(leak.how_to_clear for leak in leaks))
        return ResourceLeakDetected(
            f"Workers did not give back {len(leaks)} of the things that they took: {shown}.",
            action=f"Manual cleanup required: {' '.join(hows)}",
            leaked_processes=sum(leak.kind == "process" for leak in leaks),
            leaked_temp_files=sum(leak.kind in ("directory", "socket") for leak in leaks),
            leaks=[leak.view() for leak in leaks],
        )

    async def close(self) -> list[Leak]:
        """At shutdown, after the last tree's end: audit what nobody did; what is leaked."""
        async with asyncio.TaskGroup() as tasks:
            for entry in self.entries:
                tasks.create_task(self.audit(entry), name=f"audit:{entry.note.worker}")
        return self.leaks

    async def keep(self, note: Note, tree: Tree, found: Iterable[Leak]) -> None:
        """Go on with what an earlier life left and could not be cleared (workers/janitor)."""
        entry = self._open[note.mark] = Entry(note)
        entry.receipts = dict.fromkeys(note.devices, "unproven")
        try:
            await asyncio.to_thread(self._write, entry)
            if tree.mark == note.mark:  # else nobody could read what is on record
                await asyncio.to_thread(journal.write_tree, self.directory, tree)
        except OSError as exc:
            log.warning("what %s left cannot be journalled: %s", note.worker, exc.strerror)
        self._publish(entry, list(found))

    # ── the files, in threads ───────────────────────────────────────────────────────────────────

    async def _look(self, entry: Entry) -> list[Leak]:
        note = entry.note
        # A later start may have got the home of one that is gone but for something else.
        later = [other.note for other in self.entries if other.note.since > note.since]
        is_taken = any(other.home == note.home for other in later)
        return await asyncio.to_thread(self._look_now, entry, is_taken)

    def _look_now(self, entry: Entry, is_home_taken: bool) -> list[Leak]:
        with entry.lock:
            if entry.is_closed:
                return []
            note = entry.note
            try:
                tree = self._tree(note)
                leftovers.reap(note, tree)
                found = leftovers.leftovers(note, tree, is_home_taken=is_home_taken)
            except OSError as exc:
                log.warning("what %s left cannot be seen: %s", note.worker, exc.strerror)
                found = [leftovers.unseen(note, "process", type(exc).__name__)]
            return found + _vram(entry)

    def _tree(self, note: Note) -> Tree:
        try:
            return journal.tree_of(self.directory, note)
        except Damaged as exc:
            log.warning("what the guard of %s wrote down is lost: %s", note.worker, exc)
            return journal.unrecorded(note)

    def _write(self, entry: Entry) -> None:
        with entry.lock:  # a write whose waiter was cancelled must not come after the end
            if not entry.is_closed:
                journal.write(self.directory, entry.note)

    def _close(self, entry: Entry) -> None:
        with entry.lock:
            entry.is_closed = True
            journal.remove(self.directory, entry.mark)

    async def _settle(self, entry: Entry, found: list[Leak]) -> None:
        self._publish(entry, found)
        if not found and not entry.is_closed:
            await asyncio.to_thread(self._close, entry)
            self._open.pop(entry.mark, None)

    # ── what others hear ────────────────────────────────────────────────────────────────────────

    def _publish(self, entry: Entry, found: list[Leak]) -> None:
        """Keep what was found, and announce what is new and what is gone."""
        if entry.is_closed:
            return  # another audit was later, and found nothing
        entry.is_audited = True
        before = {leak.key: leak for leak in entry.leaks}
        entry.leaks = [before.get(leak.key, leak) for leak in found]
        for leak in entry.leaks:
            if leak.key not in before:
                self._announce(LeakFound(leak.kind, leak.holder, leak.worker, leak.how_to_clear))
        for key in before.keys() - {leak.key for leak in found}:
            gone = before[key]
            self._announce(LeakCleared(gone.kind, gone.holder, gone.worker))


def _vram(entry: Entry) -> list[Leak]:
    """Of each device a receipt is owed."""
    found = []
    for device in entry.note.devices:
        outcome = entry.receipts.get(device)
        if isinstance(outcome, Leak):
            found.append(outcome)
        elif outcome not in ACQUITTED:
            how = "See with 'hive devices' who uses the device, and end what an engine left there."
            found.append(entry.leak("vram", f"{device} (not proved returned)", how))
    return found

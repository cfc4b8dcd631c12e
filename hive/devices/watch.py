"""The devices that are configured: watched while hive runs, trusted until something says otherwise.

Xid events are heard as they come; where the driver refuses them, and for everything that has no
event, each device is read every second. A fault is told once to whoever owns the workers; from
then on the device is QUARANTINED, or LOST when it does not answer any more, until an operator
releases it. hive never chooses another device in its place (C6).
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hive.devices import faults
from hive.devices.lanes import DriverHung
from hive.devices.nvml import Device, DeviceLost, Driver, Holder, Reading
from hive.devices.preflight import describe, held, unhealthy
from hive.devices.xids import Ear
from hive.errors import Conflict, CudaDeviceFailed, DeviceError, GpuQuarantined, HiveError, NotFound
from hive.events import Announcer, DeviceMoved, DeviceRead, StrangerSeen, VramChecked, XidSeen

log = logging.getLogger(__name__)

POLL_S = 1.0  # how often each device is read
OWN_KILL_S = 10.0  # an application's Xid this soon after hive's own kill is the kill's echo
EVIDENCE_S = 30.0  # an application Xid explains a crash this much later
LOOK_S = 0.05  # how often the return of memory is looked at
TOLERANCE = 256 * 2**20  # bytes: the driver's own bookkeeping goes up and down by tens of MiB
XIDS_KEPT = 16
BLIND = "the driver's pids were never seen to be ours to read"


class Condition(StrEnum):
    OK = "OK"
    QUARANTINED = "QUARANTINED"
    LOST = "LOST"


class Receipt(StrEnum):
    """What is known of a worker's VRAM after its end."""

    RETURNED = "returned"
    UNPROVEN = "unproven"  # pids are not visible, or somebody else may have taken it
    KEPT = "kept"


@dataclass(slots=True)
class Watched:
    """One device and what is known of it."""

    device: Device
    condition: Condition = Condition.OK
    error: HiveError | None = None  # why it is not OK
    is_told: bool = False  # `on_fault` knows
    struck: HiveError | None = None  # the last that was told of it, and that no reading shows
    since: float = field(default_factory=time.time)
    reading: Reading | None = None
    read_at: float = 0.0
    ecc_errors: int | None = None  # that were there before: growth is a fault
    killed_at: float = float("-inf")  # hive's own last kill there
    pids_are_visible: bool | None = None  # None: no engine of ours was there yet
    hears_events: bool | None = None  # None: not tried yet
    look_now: asyncio.Event = field(default_factory=asyncio.Event)  # before its turn
    xids: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=XIDS_KEPT))
    known_pids: frozenset[int] = frozenset()  # there at the last look, hive's own or not


@dataclass(frozen=True, slots=True)
class Baseline:
    """A device's memory before a start, in bytes: what is free, and what others hold already."""

    free: int
    held: int


def _held_bytes(holders: Iterable[Holder]) -> int:
    return sum(holder.used_bytes or 0 for holder in holders)


FaultHeard = Callable[[Watched], None]


class Devices:
    """The configured GPUs by id; without any, nothing here ever asks a driver."""

    def __init__(
        self,
        driver: Driver,
        resolved: Mapping[str, Device],
        announcer: Announcer,
        *,
        poll_s: float = POLL_S,
    ) -> None:
        """`resolved` maps each configured name but "cpu" to its GPU (`nvml.resolve`)."""
        self._driver = driver
        self._announcer = announcer
        self._poll_s = poll_s
        self._names = {d.id: d for d in resolved.values()} | dict(resolved)
        self.watched = {d.uuid: Watched(d) for d in resolved.values()}
        # Set by whoever owns the workers, before `watching`.
        self.on_fault: FaultHeard = lambda _watched: None
        self.own_pids: Callable[[], Collection[int]] = frozenset

    # ── what workers ask ────────────────────────────────────────────────────────────────────────

    def of(self, names: Iterable[str]) -> list[Watched]:
        """The GPUs behind configured names; the CPU is none."""
        return [self.watched[self._names[name].uuid] for name in names if name != "cpu"]

    def find(self, name: str) -> Watched:
        """By id or UUID. Raises NotFound, which names the devices there are."""
        for watched in self.watched.values():
            if name in (watched.device.id, watched.device.uuid):
                return watched
        ids = sorted(w.device.id for w in self.watched.values())
        raise NotFound("No such device is configured here.", allowed=ids)

    def quarantined(self, names: Iterable[str]) -> GpuQuarantined | None:
        """The error for a request or a start on these devices, if one of them may not be used."""
        for watched in self.of(names):
            if watched.condition is not Condition.OK:
                assert watched.error is not None
                return GpuQuarantined(
                    f"Device {watched.device.id} is {watched.condition}: {watched.error.message}",
                    device=watched.device.id,
                    reason="quarantined",
                )
        return None

    async def ready_to_start(self, names: Iterable[str]) -> dict[str, Baseline]:
        """Look at a worker's devices right before its start; the baseline of each by UUID.

        Raises GpuQuarantined, and CudaDeviceFailed when one is lost, not healthy (both are faults,
        too) or held by somebody else's process, which is named.
        """
        baselines = {}
        for watched in self.of(names):
            if error := self.quarantined([watched.device.id]):
                raise error
            reading = await self._read(watched)
            if wrong := unhealthy(watched.device, reading):
                self._fail(watched, wrong, Condition.QUARANTINED)
                raise wrong
            if wrong := self._held(watched, reading):
                raise wrong
            baselines[watched.device.uuid] = Baseline(reading.free, _held_bytes(reading.holders))
        return baselines

    def _held(self, watched: Watched, reading: Reading) -> DeviceError | None:
        own = self.own_pids()
        # Where pids are another namespace's, hive's own engines look like strangers.
        if own and watched.pids_are_visible is False:
            return None
        if own and watched.pids_are_visible is None:
            # One that loads just now may be among them; it has no name here.
            nameless = {holder.pid for holder in reading.holders if not holder.name}
            return held(watched.device, reading, nameless.union(own))
        return held(watched.device, reading, own)

    def noting_kill(self, names: Iterable[str]) -> None:
        """hive ends an engine there: what the driver says of *it* in the next seconds is an echo."""
        for watched in self.of(names):
            watched.killed_at = time.monotonic()

    async def see_pids(
        self, names: Iterable[str], baselines: Mapping[str, Baseline], pids: Collection[int]
    ) -> None:
        """Learn, from a running engine, whether the driver's pids are ours to read."""
        for watched in self.of(names):
            with contextlib.suppress(HiveError):
                reading = await self._driver.reading(watched.device.uuid)
                self._note(watched, reading)
                if any(holder.pid in pids for holder in reading.holders):
                    watched.pids_are_visible = True
                    continue
                taken = baselines[watched.device.uuid].free - reading.free
                if taken > TOLERANCE and watched.pids_are_visible is None:
                    watched.pids_are_visible = False

    def evidence(self, names: Iterable[str]) -> str:
        """What the devices said in the last seconds, for the reason of a crash; or empty."""
        now = time.time()
        said = [
            f"Xid {xid} on {watched.device.id} ({faults.fault(xid).meaning})"
            for watched in self.of(names)
            for at, xid in watched.xids
            if now - at < EVIDENCE_S
        ]
        return "; ".join(dict.fromkeys(said))

    async def receipts(
        self,
        worker: str,
        names: Iterable[str],
        baselines: Mapping[str, Baseline],
        pids: Collection[int],
        *,
        within_s: float,
    ) -> dict[str, tuple[Receipt, str]]:
        """Whether a worker's VRAM came back, by device id, and why not; KEPT quarantines.

        `pids` are all that the worker's tree ever consisted of. Returned means: none of them is on
        the device, and free memory is back at the baseline but for what others took meanwhile.
        With `within_s` 0 a device is only looked at, and nothing is held against it.
        """
        receipts = {}
        began = time.monotonic()
        for watched in self.of(names):
            if (baseline := baselines.get(watched.device.uuid)) is None:
                continue
            # One deadline for all: while one is waited for, the others have the same time.
            outcome, left = await self._came_back(watched, baseline, pids, began + within_s)
            seconds = time.monotonic() - began
            if outcome is Receipt.KEPT and not within_s:
                outcome = Receipt.UNPROVEN
            receipts[watched.device.id] = (outcome, left)
            self._announcer.announce(
                VramChecked(worker, watched.device.id, str(outcome), seconds, left)
            )
            if outcome is Receipt.KEPT:
                error = CudaDeviceFailed(
                    f"VRAM of {worker} on {watched.device.id} did not come back within "
                    f"{within_s:g} s: {left}.",
                    action="End the process that is named, or reset the GPU; then release it with "
                    "'hive worker release'.",
                    device=watched.device.id,
                )
                self.quarantine(watched, error)
        return receipts

    async def _came_back(
        self, watched: Watched, baseline: Baseline, pids: Collection[int], until: float
    ) -> tuple[Receipt, str]:
        while True:
            try:
                reading = await self._driver.reading(watched.device.uuid)
            except HiveError as exc:
                return Receipt.UNPROVEN, exc.message
            self._note(watched, reading)
            ours = [holder for holder in reading.holders if holder.pid in pids]
            others = [holder for holder in reading.holders if holder.pid not in pids]
            if ours:
                watched.pids_are_visible = True
            missing = baseline.free - reading.free - (_held_bytes(others) - baseline.held)
            if not ours and missing <= TOLERANCE:
                if watched.pids_are_visible is False:
                    return Receipt.UNPROVEN, BLIND
                return Receipt.RETURNED, ""
            if time.monotonic() >= until:
                break
            await asyncio.sleep(LOOK_S)
        if ours:
            return Receipt.KEPT, "held by " + ", ".join(map(str, ours))
        if others:
            return Receipt.UNPROVEN, "also there: " + ", ".join(map(str, others))
        left = f"{missing / 2**20:.0f} MiB are held by no process that is known"
        if not watched.pids_are_visible:
            return Receipt.UNPROVEN, f"{left}, but {BLIND}"
        return Receipt.KEPT, left

    # ── conditions ──────────────────────────────────────────────────────────────────────────────

    def quarantine(
        self, watched: Watched, error: HiveError, condition: Condition = Condition.QUARANTINED
    ) -> None:
        """Do not use the device until it is released; the first reason is kept, unless it is worse."""
        watched.struck = error
        self._set_aside(watched, error, condition)

    def _set_aside(self, watched: Watched, error: HiveError, condition: Condition) -> None:
        if watched.condition not in (condition, Condition.LOST):
            self._move(watched, condition, error)

    async def release(self, watched: Watched) -> None:
        """Trust the device again, once it answers and looks healthy.

        Raises Conflict when it is not quarantined, and CudaDeviceFailed with what is still wrong,
        or went wrong while it was looked at.
        """
        if watched.condition is Condition.OK:
            raise Conflict(f"Device {watched.device.id} is not quarantined.", state="OK")
        struck = watched.struck
        reading = await self._driver.reading(watched.device.uuid)
        self._note(watched, reading)
        if wrong := unhealthy(watched.device, reading) or self._held(watched, reading):
            raise wrong
        if watched.struck is not None and watched.struck is not struck:
            watched.error = watched.struck
            raise watched.struck
        watched.ecc_errors, watched.is_told = reading.ecc_errors, False
        self._move(watched, Condition.OK, None)

    def _move(self, watched: Watched, new: Condition, error: HiveError | None) -> None:
        if watched.condition is new:  # by another release meanwhile
            return
        old, watched.condition, watched.error = watched.condition, new, error
        watched.since = time.time()
        self._announcer.announce(
            DeviceMoved(
                watched.device.id,
                str(old),
                str(new),
                error.code if error else "",
                error.message if error else "released",
            )
        )

    def fail(self, names: Iterable[str], error: HiveError) -> None:
        """An engine on these devices ended of a fault of theirs (its own words, or its start's)."""
        for watched in self.of(names):
            self._strike(watched, error)

    def lost(self, names: Iterable[str], error: HiveError) -> None:
        """A process hangs in the driver for ever: whoever runs there may go on, nobody starts."""
        for watched in self.of(names):
            self.quarantine(watched, error, Condition.LOST)

    def _strike(self, watched: Watched, error: HiveError) -> None:
        """A fault that no later reading shows: also a release that has begun must heed it."""
        watched.struck = error
        self._fail(watched, error, Condition.QUARANTINED)

    def _fail(self, watched: Watched, error: HiveError, condition: Condition) -> None:
        """A fault at run time: told once, also of a device that was set aside without one."""
        self._set_aside(watched, error, condition)
        if not watched.is_told:
            watched.is_told, watched.error = True, error
            self.on_fault(watched)

    # ── watching ────────────────────────────────────────────────────────────────────────────────

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Read and listen while the block runs; without devices nothing happens."""
        if not self.watched:
            yield
            return
        async with asyncio.TaskGroup() as tasks:
            watching = [
                tasks.create_task(work, name=f"device:{watched.device.id}")
                for watched in self.watched.values()
                for work in (self._poll(watched), self._hear(watched))
            ]
            yield
            for task in watching:
                task.cancel()

    async def _hear(self, watched: Watched) -> None:
        ear = Ear(self._driver, watched.device, self._poll_s)
        with ear.listening():
            while True:
                heard = await ear.news()
                for xid, count in heard.xids.items():
                    self._heard(watched, xid, count)
                if heard.error:
                    self._deaf(watched, heard.error)
                else:
                    watched.hears_events = True

    def _deaf(self, watched: Watched, error: HiveError) -> None:
        if isinstance(error, DeviceLost):
            watched.look_now.set()  # waiting for events tells it first
        if watched.hears_events is not False:
            watched.hears_events = False
            log.warning(
                "no Xid events of %s, it is only read every %g s: %s",
                watched.device.id,
                self._poll_s,
                error.message,
            )

    def _heard(self, watched: Watched, xid: int, count: int) -> None:
        known, device = faults.fault(xid), watched.device
        is_fault = known.kind is faults.Kind.DEVICE
        # What is wrong with the device itself is no kill's doing, whenever it comes.
        is_echo = not is_fault and time.monotonic() - watched.killed_at < OWN_KILL_S
        if not is_echo:
            watched.xids.append((time.time(), xid))
        self._announcer.announce(
            XidSeen(device.id, xid, str(known.kind), known.meaning, is_echo, count)
        )
        if is_fault:
            error = CudaDeviceFailed(
                f"Device {device.id} ({device.name}) failed: Xid {xid}, {known.meaning}.",
                action=known.action,
                device=device.id,
                xid=xid,
            )
            self._strike(watched, error)

    async def _poll(self, watched: Watched) -> None:
        while True:
            watched.look_now.clear()
            await self._look(watched)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await watched.look_now.wait()

    async def _read(self, watched: Watched) -> Reading:
        """A fresh reading; a device that cannot be read has failed. Raises CudaDeviceFailed."""
        device = watched.device
        try:
            reading = await self._driver.reading(device.uuid)
        except HiveError as exc:
            is_lost = isinstance(exc, DeviceLost | DriverHung)
            error = CudaDeviceFailed(
                f"Device {device.id} ({device.name}): {exc.message}",
                action=exc.suggested_action,
                device=device.id,
            )
            self._fail(watched, error, Condition.LOST if is_lost else Condition.QUARANTINED)
            raise error from exc
        self._note(watched, reading)
        return reading

    async def _look(self, watched: Watched) -> None:
        device = watched.device
        try:
            reading = await self._read(watched)
        except CudaDeviceFailed:
            return
        if watched.ecc_errors is None:
            watched.ecc_errors = reading.ecc_errors
        if wrong := unhealthy(device, reading):
            self._fail(watched, wrong, Condition.QUARANTINED)
        elif not watched.hears_events and (reading.ecc_errors or 0) > (watched.ecc_errors or 0):
            watched.ecc_errors = reading.ecc_errors
            error = CudaDeviceFailed(
                f"Device {device.id} ({device.name}) reports {reading.ecc_errors} uncorrectable "
                "ECC errors.",
                action=faults.RESET,
                device=device.id,
            )
            self._fail(watched, error, Condition.QUARANTINED)
        self._look_for_strangers(watched, reading)

    def _look_for_strangers(self, watched: Watched, reading: Reading) -> None:
        there = {holder.pid for holder in reading.holders}
        if new := there - watched.known_pids:
            if (own := self._own_if_known()) is None:
                return  # they are still new at the next look
            if not there.isdisjoint(own):
                watched.pids_are_visible = True
            for holder in reading.holders:
                # Without a name here it may be hive's own, by its pid in another namespace.
                is_nameable = holder.name or watched.pids_are_visible
                if holder.pid in new and holder.pid not in own and is_nameable:
                    self._announcer.announce(
                        StrangerSeen(
                            watched.device.id, holder.pid, holder.name, holder.used_bytes or 0
                        )
                    )
        watched.known_pids = frozenset(there)

    def _own_if_known(self) -> Collection[int] | None:
        """hive's own processes; None while nobody can look (no descriptor is left, say)."""
        try:
            return self.own_pids()
        except OSError:
            return None

    def _note(self, watched: Watched, reading: Reading) -> None:
        watched.reading, watched.read_at = reading, time.time()
        self._announcer.announce(
            DeviceRead(
                watched.device.id,
                reading.total,
                reading.used,
                reading.free,
                reading.temperature_c,
                reading.ecc_errors,
            )
        )

    # ── for operators ───────────────────────────────────────────────────────────────────────────

    def view(self, watched: Watched) -> dict[str, Any]:
        """The device as the API shows it; bytes, degrees Celsius."""
        own = set(self._own_if_known() or ())
        return {
            **describe(watched.device, watched.reading, own),
            "state": str(watched.condition),
            "reason": watched.error.message if watched.error else "",
            "error": watched.error.code if watched.error else None,
            "since": watched.since,
            "read_at": watched.read_at or None,
            "xids": [{"at": at, "xid": xid} for at, xid in watched.xids],
            "events": "event set" if watched.hears_events else "polling",
        }

    def __repr__(self) -> str:
        return f"<Devices {[f'{w.device.id} {w.condition}' for w in self.watched.values()]}>"

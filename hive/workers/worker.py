"""One worker: an engine's life from start to proved end; its task is the sole writer of its state.

Whoever wants something posts news into the inbox; the task looks the next state up in the
table (policy/lifecycle), announces the move and begins what the new state does.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hive.devices.watch import Baseline, Devices, Receipt, Watched
from hive.errors import (
    Conflict,
    CudaDeviceFailed,
    GpuVramExhausted,
    HiveError,
    InsufficientDisk,
    InsufficientRam,
    InternalError,
    KvServerUnreachable,
    LoadingTimeout,
    ResourceLeakDetected,
    ServiceUnavailable,
    WorkerCrashed,
    WorkerHung,
)
from hive.events import (
    Announcer,
    WorkerEnded,
    WorkerExited,
    WorkerMoved,
    WorkerReady,
    WorkerRestartPlanned,
    WorkerStarted,
)
from hive.policy.lifecycle import ON_THE_WAY, News, State, step
from hive.policy.restarts import RestartPolicy
from hive.settings import Timeouts
from hive.workers.client import ProbeFailed
from hive.workers.diagnosis import Cause, Diagnosis, diagnose, last_words
from hive.workers.host import why
from hive.workers.ledger import Entry, Ledger
from hive.workers.life import Life
from hive.workers.ports import Engine
from hive.workers.process import Exit, Place, Tree
from hive.workers.pulse import Pulse

POLL_S = (0.02, 0.5)  # first and longest pause between two looks at a loading engine
HINT_S = 30.0  # told to clients until a load time was measured
VRAM_S = 10.0  # what a driver may need to take the memory of a killed process back
VRAM_HOW = (
    "End the process that is named, or reset the GPU; then 'hive worker release' trusts the "
    "device again."
)


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What a worker is, decided before it exists."""

    id: str
    model: str
    devices: tuple[str, ...]
    visible: str | None  # CUDA_VISIBLE_DEVICES by UUID; None on the CPU
    engine: Engine
    timeouts: Timeouts
    restarts: RestartPolicy
    drain_s: float
    log: Path
    # Whatever else may be wrong before a start, with its GPUs as just read; blocking, raises.
    preflight: Callable[[Sequence[Watched]], None]
    alternatives: tuple[str, ...] = ()  # models that a VRAM error names
    # What must be there before it starts: waits, raises, and says which start of it that is.
    beside: Callable[[], Awaitable[int]] | None = None


log = logging.getLogger(__name__)

BEGINNING = frozenset({News.START_ASKED, News.RELEASED, News.RESTART_DUE})
# What follows when hive itself fails in a state.
UNFORESEEN = {
    State.STARTING: News.SPAWN_FAILED,
    State.LOADING: News.LOAD_EXPIRED,
    State.DRAINING: News.DRAINED,
    State.LOST: News.GONE,
}


@dataclass(slots=True)
class Message:
    news: News
    life: Life | None = None  # news about an earlier life is dropped
    reason: str = ""
    handled: "asyncio.Future[bool] | None" = None  # True: the state changed
    before: Callable[[], None] | None = None  # runs in the task, before the move …
    after: Callable[[], None] | None = None  # … and after it
    decide: Callable[[], tuple[News, str]] | None = None  # instead of `news` and `reason`


@dataclass(slots=True)
class Counts:
    starts: int = 0
    unasked: tuple[float, ...] = field(default_factory=tuple)  # times of restarts nobody asked for


class Worker:
    """See the module. `run` must be running for anything to happen."""

    def __init__(
        self,
        plan: WorkerPlan,
        new_place: Callable[[Path], Place],
        announcer: Announcer,
        devices: Devices,
        ledger: Ledger,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.plan = plan
        self.id, self.model = plan.id, plan.model
        self.state = State.STOPPED
        self.reason = ""
        self.error: HiveError | None = None  # why it is FAILED
        self.since = time.time()
        self.life: Life | None = None
        self.last_exit: str | None = None
        self.last_exit_code: int | None = None
        self.load_s: float | None = None  # the last measured load
        self.in_flight = 0  # slots held, an abort that is not confirmed included
        # Called with every change of the state, before anybody else hears of it.
        self.on_move: Callable[[Worker], None] = lambda _: None
        self.counts = Counts()
        self._new_place = new_place
        self._announcer = announcer
        self._devices = devices
        self._ledger = ledger
        self._chance = chance
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._wanted_up = False
        self._restart_asked = False
        self._is_retired = False  # hive is stopping
        self._is_fatal = False  # the failure cannot heal by starting again
        self._fault: HiveError | None = None  # of a device: the tree is killed without grace
        self._pause_s = 0.0
        self._unasked = False
        self._hurry = asyncio.Event()
        self._idle = asyncio.Event()
        self._moved = asyncio.Event()
        self._activity: asyncio.Task[None] | None = None
        self._idle.set()

    # ── what others ask ─────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Start, and forget earlier restarts. Raises Conflict when it is up or on the way."""

        def wanted() -> None:
            self._wanted_up = True
            # While STOPPING: what it was going to do next is changed to a start.
            self._restart_asked = self.state is State.STOPPING
            self.counts.unasked = ()
            self._hurry.set()

        self._must_serve_on()
        if self.state is State.QUARANTINED:
            raise self._conflict("start", "STOPPED or FAILED; release its device first")
        if self.state in (State.READY, State.LOADING, State.DRAINING, State.LOST):
            raise self._conflict("start", "STOPPED or FAILED")
        await self._post(News.START_ASKED, "start was asked", before=wanted)

    async def stop(self, *, drain: bool = True) -> None:
        """Drain (up to drain_s), then end the tree. Raises Conflict when there is nothing to stop."""

        def unwanted() -> None:
            self._wanted_up = False
            self._restart_asked = False

        if self.state in (State.STOPPED, State.LOST):
            raise self._conflict("stop", "running, starting or FAILED")
        news = News.STOP_ASKED if drain else News.HASTE_ASKED
        await self._post(news, "stop was asked", before=unwanted)

    async def restart(self) -> None:
        """Stop, then start; neither counts against the restart policy."""

        def again() -> None:
            self._wanted_up = True
            self._restart_asked = True
            self.counts.unasked = ()

        self._must_serve_on()
        if self.state in (State.LOST, State.QUARANTINED):
            raise self._conflict("restart", "anything but LOST or QUARANTINED")
        if self.state in (State.STOPPED, State.FAILED):
            await self.start()
        else:
            await self._post(News.STOP_ASKED, "restart was asked", before=again)
            if self.state in (State.STOPPED, State.FAILED):
                await self.start()  # it came to rest before it could be asked

    def device_failed(self, error: HiveError, *, for_good: bool) -> None:
        """A device of it failed: kill the tree at once, tell its requests `error`.

        `for_good`: hive ends; otherwise the worker waits, QUARANTINED, for its device's release.
        """

        def condemned() -> None:
            self._fault = error
            if for_good:
                self._wanted_up = self._restart_asked = False

        message = Message(News.DEVICE_FAILED, None, error.message, before=condemned)
        self._inbox.put_nowait(message)

    async def released(self) -> None:
        """Its devices are trusted again: start. Raises Conflict when it is not QUARANTINED."""

        def wanted() -> None:
            self._wanted_up = True
            self.counts.unasked = ()

        self._must_serve_on()
        if self.state is not State.QUARANTINED:
            raise self._conflict("release", "QUARANTINED")
        await self._post(News.RELEASED, "its device was released", before=wanted)

    def apply(self, *, timeouts: Timeouts, restarts: RestartPolicy, drain_s: float) -> None:
        """Other limits from now on; `load_s` and `kill_s` count from the engine's next start."""
        self.plan = replace(self.plan, timeouts=timeouts, restarts=restarts, drain_s=drain_s)
        if self.life and self.life.pulse:
            self.life.pulse.be_patient(timeouts.cleanup_s, _longest_s(timeouts))

    def retire(self) -> None:
        """hive is stopping: nothing starts this worker again, whoever asks."""
        self._is_retired = True

    def _must_serve_on(self) -> None:
        if self._is_retired:
            raise ServiceUnavailable(
                "hive is stopping and starts nothing any more.",
                reason="draining",
                retry_after_s=30,
                worker=self.id,
                model=self.model,
            )

    async def wait_idle(self) -> None:
        """Return when it has no request; the caller bounds the wait."""
        while self.in_flight:  # a slot may pass from one to the next at once
            await self._idle.wait()

    async def wait_for(self, *states: State) -> State:
        """Return when the worker is in one of `states`; the caller bounds the wait."""
        while self.state not in states:
            self._moved.clear()
            await self._moved.wait()
        return self.state

    def take(self) -> Life:
        """Count one request in; the life that it talks to. Only while READY."""
        assert self.state is State.READY
        assert self.life is not None
        self.in_flight += 1
        self._idle.clear()
        return self.life

    def give_back(self) -> None:
        """Count it out."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()

    @property
    def ready_in_s(self) -> float | None:
        """The hint for clients while the worker is on its way; None when it is not (contract)."""
        if self.state is State.STOPPING and self._wanted_up and not self._is_fatal:
            return HINT_S if self.load_s is None else self.load_s
        if self.state not in ON_THE_WAY:
            return None
        if self.load_s is None:
            return HINT_S
        elapsed = time.monotonic() - self.life.began if self.life else 0.0
        return max(0.5, self.load_s + self._pause_s - elapsed)

    def view(self) -> dict[str, Any]:
        """The worker as the API shows it."""
        tree = self.life.tree if self.life else None
        return {
            "id": self.id,
            "model": self.model,
            "state": str(self.state),
            "device": list(self.plan.devices)
            if len(self.plan.devices) > 1
            else self.plan.devices[0],
            "pid": tree.pid if tree else None,
            "guard_pid": tree.guard_pid if tree else None,
            "reason": self.reason,
            "since": self.since,
            "in_flight": self.in_flight,
            "starts": self.counts.starts,
            "unasked_restarts": len(self.counts.unasked),
            "load_seconds": round(self.load_s, 3) if self.load_s else None,
            "last_exit": self.last_exit,
            "last_exit_code": self.last_exit_code,
            "error": self.error.code if self.error else None,
        }

    # ── the task ────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Handle news until cancelled; a tree that exists then is ended first."""
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    self._handle(await self._inbox.get(), tasks)
        finally:
            if self.life and self.life.tree:
                await asyncio.shield(self.life.tree.end_or_survive(0))

    async def _post(
        self, news: News, reason: str, before: Callable[[], None] | None = None
    ) -> bool:
        handled: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait(Message(news, None, reason, handled, before))
        return await handled

    def _report(self, news: News, life: Life | None, reason: str = "") -> None:
        self._inbox.put_nowait(Message(news, life, reason))

    def _handle(self, message: Message, tasks: asyncio.TaskGroup) -> None:
        if message.life is not None and message.life is not self.life:
            return
        if message.before:
            message.before()
        news, reason = message.decide() if message.decide else (message.news, message.reason)
        old = new = self.state
        if not (self._is_retired and news in BEGINNING):  # it was asked just before
            new = step(old, news)
        if new is not old:
            self._move(new, reason, tasks)
        if message.after:
            message.after()
        if message.handled and not message.handled.done():
            message.handled.set_result(new is not old)

    def _move(self, new: State, reason: str, tasks: asyncio.TaskGroup) -> None:
        old, self.state = self.state, new
        self.reason, self.since = reason, time.time()
        if new in (State.STARTING, State.READY):
            self.error = None
        if new is State.READY:
            self._watch_pulse(tasks)
        self.on_move(self)
        is_bad = new in (State.FAILED, State.QUARANTINED, State.LOST)
        code = self.error.code if is_bad and self.error else ""
        self._announcer.announce(WorkerMoved(self.id, self.model, old, new, reason, code))
        self._moved.set()
        previous, self._activity = self._activity, None
        if previous:
            previous.cancel()
        doing = self._doing(new, previous)
        self._activity = tasks.create_task(doing, name=f"worker:{self.id}:{new}")

    async def _doing(self, state: State, previous: "asyncio.Task[None] | None") -> None:
        """What a state does, if anything; never begun where the state is left at once."""
        match state:
            case State.STARTING:
                await self._unless_it_fails(self._starting(), state)
            case State.LOADING:
                await self._unless_it_fails(self._loading(), state)
            case State.DRAINING:
                await self._unless_it_fails(self._draining(), state)
            case State.STOPPING:
                await self._unless_it_fails(self._stopping(previous), state)
            case State.LOST:
                await self._unless_it_fails(self._waiting_for_the_kernel(), state)

    def _watch_pulse(self, tasks: asyncio.TaskGroup) -> None:
        life, timeouts, engine = self.life, self.plan.timeouts, self.plan.engine
        assert life is not None
        assert life.tree is not None
        life.pulse = Pulse(
            life.client,
            life.tree.guard_pid,
            has_gauges=engine.has_gauges,
            vital=engine.computing,
            cleanup_s=timeouts.cleanup_s,
            longest_s=_longest_s(timeouts),
            hung=lambda why: self._hung(life, why),
            health_path=engine.health_path if engine.address else None,
        )
        tasks.create_task(life.pulse.run(), name=f"pulse:{self.id}")

    def _hung(self, life: Life, why: str) -> None:
        """The engine is there and does not work: end it, tell its requests, start another one."""

        def condemned() -> None:
            self.error = life.error = WorkerHung(
                f"Worker {self.id} hangs: {why}.", worker=self.id, model=self.model
            )

        self._inbox.put_nowait(Message(News.HUNG, life, f"hung: {why}", before=condemned))

    async def _unless_it_fails(self, activity: Coroutine[Any, Any, None], state: State) -> None:
        """The boundary: what nobody foresaw in one worker must not end the others (C19, R154)."""
        life = self.life
        try:
            await activity
        except Exception as exc:
            log.exception("worker %s: unforeseen, while %s", self.id, state)
            why = f"hive met an unforeseen {type(exc).__name__}; its log says where"
            self.error, self._is_fatal = InternalError(f"Worker {self.id}: {why}."), True
            life = life or self.life
            if state is not State.STOPPING:
                self._report(UNFORESEEN[state], None, why)
                return
            if life and life.tree and await life.tree.end_or_survive(0) is None:
                self._report(News.SURVIVED, life, why)
                return
            self.life = None
            self._inbox.put_nowait(Message(News.GONE, None, "", decide=self._what_follows))

    # ── what each state does ────────────────────────────────────────────────────────────────────

    async def _starting(self) -> None:
        if self._pause_s:
            self._hurry.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s):
                    await self._hurry.wait()
        self._is_fatal, self._fault = False, None
        devices = self._devices.of(self.plan.devices)
        cache_life = 0
        try:
            if self.plan.beside is not None:
                cache_life = await self._beside(self.plan.beside)
            baselines = await self._devices.ready_to_start(self.plan.devices)
            await asyncio.to_thread(self.plan.preflight, devices)
            place = self._new_place(self.plan.log)
        except HiveError as exc:
            # The host's memory and disks may have room again in a while: the restart policy's.
            self.error = exc
            passing = InsufficientRam | InsufficientDisk | KvServerUnreachable
            self._is_fatal = not isinstance(exc, passing)
            self._report(News.SPAWN_FAILED, None, exc.message)
            return
        except OSError as exc:
            self._report(News.SPAWN_FAILED, None, f"could not start: {why(exc, self.plan.log)}")
            return
        self.counts.starts += 1
        life = self.life = Life(self.counts.starts, place, self.model, self.plan.engine.address)
        life.baselines, life.cache_life = baselines, cache_life
        try:
            life.entry = await self._ledger.intend(
                self.id,
                place,
                cgroup=place.group,
                devices=_taken(devices, baselines),
                grace_s=self.plan.timeouts.cleanup_s,
            )
            smallest = min((one.reading.total for one in devices if one.reading), default=0)
            launch = await asyncio.to_thread(
                self.plan.engine.launch, place, self.plan.devices, self.plan.visible, smallest
            )
            life.launch = launch = replace(launch, kill_s=self.plan.timeouts.kill_s)
            life.tree = await Tree.spawn(launch, place, self.plan.timeouts.cleanup_s)
            await self._ledger.started(life.entry, life.tree.guard_pid, life.tree.pid)
        except HiveError as exc:
            self.error, self._is_fatal = exc, True
            self._report(News.SPAWN_FAILED, life, exc.message)
            return
        except (OSError, ValueError) as exc:
            said = why(exc, place.home) if isinstance(exc, OSError) else str(exc)
            self._report(News.SPAWN_FAILED, life, f"could not start: {said}")
            return
        life.tree.exited.add_done_callback(lambda done: self._exited(life, done.result()))
        self._announcer.announce(
            WorkerStarted(self.id, self.model, life.tree.pid, unasked=self._unasked)
        )
        self._report(News.SPAWNED, life, f"pid {life.tree.pid}")

    async def _beside(self, beside: Callable[[], Awaitable[int]]) -> int:
        """Wait for what must be there before. Raises KvServerUnreachable."""
        try:
            async with asyncio.timeout(self.plan.timeouts.load_s):
                return await beside()
        except TimeoutError as exc:
            raise KvServerUnreachable(
                f"The LMCache server was not ready within {self.plan.timeouts.load_s:g} s."
            ) from exc

    async def _loading(self) -> None:
        life = self.life
        assert life is not None
        finding = "no answer to the health check yet"
        pause_s, longest_s = POLL_S
        try:
            async with asyncio.timeout_at(
                asyncio.get_running_loop().time() + self.plan.timeouts.load_s
            ):
                while True:
                    if await life.client.is_healthy(self.plan.engine.health_path):
                        try:
                            await self.plan.engine.probe(life.client)
                            break
                        except ProbeFailed as exc:
                            finding = f"healthy, but the probe failed: {exc}"
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * 1.5, longest_s)
        except TimeoutError:
            self.error = LoadingTimeout(
                f"Worker {self.id} was not ready within {self.plan.timeouts.load_s:g} s: {finding}.",
                timeout_seconds=self.plan.timeouts.load_s,
                worker=self.id,
            )
            self._report(News.LOAD_EXPIRED, life, self.error.message)
            return
        self.load_s = time.monotonic() - life.began
        if life.baselines:
            await self._devices.see_pids(self.plan.devices, life.baselines, life.see_pids())
        self._announcer.announce(WorkerReady(self.id, self.model, self.load_s))
        self._report(News.ANSWERED, life, f"ready after {self.load_s:.1f} s")

    async def _draining(self) -> None:
        with contextlib.suppress(TimeoutError):
            if self.plan.drain_s:
                async with asyncio.timeout(self.plan.drain_s):
                    await self._idle.wait()
        self._report(News.DRAINED, self.life, "ending the engine")

    async def _stopping(self, previous: "asyncio.Task[None] | None") -> None:
        if previous is not None:
            # A start that was interrupted ends what it began before it is done.
            await asyncio.wait([previous])
        life = self.life
        if life:
            # Before the engine hears of it: asked to end, vLLM finishes its streams as if they
            # were complete. Closed here, each request learns that it was cut off, and why.
            life.was_asked = not life.over.done()
            if life.was_asked:
                life.error = self._fault or life.error
                life.over.set_result(Exit())
            await life.close()
            if life.baselines:
                life.see_pids()
                if life.was_asked:
                    self._devices.noting_kill(self.plan.devices)
        if life and life.tree:
            began = time.monotonic()
            # What hangs in a broken device does not end by being asked.
            grace_s = 0 if self._fault else self.plan.timeouts.cleanup_s
            gone = await life.tree.end_or_survive(grace_s)
            if gone is None:
                self.error = self._lost(life.tree.survived.result())
                self._devices.lost(self.plan.devices, self.error)
                if life.entry:
                    await self._ledger.audit(life.entry)  # told as a leak while it is there
                self._report(News.SURVIVED, life, self.error.message)
                return
            self._announcer.announce(
                WorkerEnded(
                    self.id,
                    self.model,
                    gone.how,
                    time.monotonic() - began,
                    gone.killed,
                    life.tree.pid,
                    self._why_ended(life),
                )
            )
        if life and life.entry:
            await self._account(life, life.entry)
        self.life = None
        # Decided where it is handled: what is asked until then still counts.
        self._inbox.put_nowait(Message(News.GONE, None, "", decide=self._what_follows))

    def _why_ended(self, life: Life) -> str:
        """In a word that quotes nobody: for the audit log."""
        if error := life.error or self._fault or self.error:
            return error.code
        return "asked" if life.was_asked else "exited"

    async def _account(self, life: Life, entry: Entry) -> None:
        """No process of the tree is left: is everything that it took back?

        VRAM is only looked at, not waited for, when hive ends because of a device: it went with
        the processes, and the driver of a broken device may answer late or never.
        """
        if life.baselines:
            if life.was_asked:
                self._devices.noting_kill(self.plan.devices)
            is_condemned = self._fault is not None and not self._wanted_up
            receipts = await self._devices.receipts(
                self.id,
                self.plan.devices,
                life.baselines,
                life.pids,
                within_s=0 if is_condemned else VRAM_S,
            )
            for device, (outcome, left) in receipts.items():
                if outcome is Receipt.KEPT:
                    leak = entry.leak("vram", f"{device}: {left}", VRAM_HOW)
                    self._ledger.receipt(entry, device, leak)
                elif outcome is Receipt.RETURNED:
                    self._ledger.receipt(entry, device, "returned")
                else:
                    self._ledger.receipt(entry, device, "unproven")
        await self._ledger.audit(entry)

    def _what_follows(self) -> tuple[News, str]:
        self._pause_s, self._unasked = 0.0, False
        if not self._wanted_up or self._is_retired:
            return News.GONE, self.reason
        if error := self._devices.quarantined(self.plan.devices):
            self.error = self._fault or self.error or error
            return News.QUARANTINE, error.message
        if self._restart_asked:
            self._restart_asked = False
            return News.RESTART_DUE, "restart was asked"
        if self._is_fatal:
            return News.GAVE_UP, self.reason
        return self._restart_or_give_up()

    def _restart_or_give_up(self) -> tuple[News, str]:
        now, policy = time.monotonic(), self.plan.restarts
        pause_s = policy.pause_s(self.counts.unasked, now, self._chance())
        recent = policy.recent(self.counts.unasked, now)
        if pause_s is None:
            why = (
                f"gave up after {len(recent)} restarts within {policy.window_s:g} s; "
                f"last: {self.reason}"
            )
            if self.error is None:
                self.error = WorkerCrashed(f"Worker {self.id} {why}.", worker=self.id)
            return News.GAVE_UP, why
        self.counts.unasked = (*recent, now)
        self._pause_s, self._unasked = pause_s, True
        count = len(self.counts.unasked)
        self._announcer.announce(
            WorkerRestartPlanned(self.id, self.model, pause_s, count, policy.starts)
        )
        return (
            News.RESTART_DUE,
            f"restart {count} of {policy.starts} in {pause_s:.1f} s; {self.reason}",
        )

    async def _waiting_for_the_kernel(self) -> None:
        life = self.life
        assert life is not None
        assert life.tree is not None
        await asyncio.shield(life.tree.gone)
        if life.entry:
            await self._account(life, life.entry)
        self.life, self._wanted_up = None, False
        self._report(News.GONE, None, "the process that had survived SIGKILL is gone")

    def _exited(self, life: Life, exit_: Exit) -> None:
        """The engine's first process ended (called by the tree)."""
        pid = life.tree.pid if life.tree else 0
        # What hive killed may end only when nobody waits for it any more (LOST).
        asked = life.was_asked or (self.state is State.STOPPING and life is self.life)
        self.last_exit, self.last_exit_code = str(exit_), exit_.status
        words = "" if asked else "; ".join(last_words(self.plan.log))
        reason = str(exit_) if not words else f"{exit_}; last output: {words}"
        if not asked:
            if said := self._devices.evidence(self.plan.devices):
                reason = f"{said}; {reason}"
            self.error = life.error = self._device_error()

        def tell() -> None:
            cause = exit_.cause
            if asked:
                cause = "hung" if isinstance(life.error, WorkerHung) else "asked"
            self._announcer.announce(
                WorkerExited(self.id, self.model, cause, str(exit_), asked=asked, pid=pid)
            )

        def resolve() -> None:
            if not life.over.done():
                life.over.set_result(exit_)

        message = Message(News.EXITED, life, f"crashed: {reason}", before=tell, after=resolve)
        self._inbox.put_nowait(message)
        if not asked and self.error:
            self._devices.fail(self.plan.devices, self.error)

    def _device_error(self) -> HiveError | None:
        """What the engine said of its devices, typed; an application's own fault is a crash."""
        if self.plan.devices == ("cpu",) or (found := diagnose(self.plan.log)) is None:
            return None
        named = ", ".join(self.plan.devices)
        match found.cause:
            case Cause.OUT_OF_MEMORY:
                return self._out_of_memory(named, found)
            case Cause.DEVICE_FAULT | Cause.NO_DEVICE:
                return CudaDeviceFailed(
                    f"Device {named} failed under worker {self.id}: {found.words}",
                    device=named,
                    worker=self.id,
                    model=self.model,
                )
        return None

    def _out_of_memory(self, device: str, found: Diagnosis) -> HiveError:
        """In the engine's own numbers, as far as it told them (R019)."""
        required, available = found.required_gib, found.available_gib
        measured = f"{found.words}"
        if required is not None and available is not None:
            measured = f"{required:g}GB required, {available:g}GB available: {found.words}"
        return GpuVramExhausted(
            f"GPU out of memory: {measured}",
            device=device,
            worker=self.id,
            model=self.model,
            required_vram_gb=required,
            available_vram_gb=available,
            required_vram_mb=None if required is None else round(required * 1024),
            available_vram_mb=None if available is None else round(available * 1024),
            alternative_models=list(self.plan.alternatives),
        )

    def _lost(self, members: list[dict[str, Any]]) -> HiveError:
        """The error of a tree that SIGKILL does not end: of its device, if it has one."""
        named = ", ".join(
            f"{m['name']} (pid {m['pid']}, state {m['state']}, in {m['wchan'] or 'the kernel'})"
            for m in members
        )
        kind = ResourceLeakDetected if self.plan.devices == ("cpu",) else CudaDeviceFailed
        return kind(
            f"Processes of worker {self.id} survive SIGKILL: {named}.",
            action="They hang in the kernel, on a GPU host mostly in its driver: look at the "
            "kernel log, then reset the GPU or reboot.",
            device=", ".join(self.plan.devices),
            worker=self.id,
            model=self.model,
        )

    def _conflict(self, action: str, needed: str) -> Conflict:
        return Conflict(
            f"Worker {self.id} is {self.state}; {action} needs it to be {needed}.",
            state=str(self.state),
            worker=self.id,
        )

    def __repr__(self) -> str:
        return f"<Worker {self.id} {self.state}>"


def _longest_s(timeouts: Timeouts) -> float:
    """So long an engine may have work and make no progress."""
    return max(timeouts.inference_s, timeouts.stall_s) + timeouts.cleanup_s


def _taken(
    devices: Iterable[Watched], baselines: Mapping[str, Baseline]
) -> dict[str, dict[str, str | int]]:
    """What the ledger writes down of each device before a start."""
    return {
        watched.device.id: {
            "uuid": watched.device.uuid,
            "free_bytes": baselines[watched.device.uuid].free,
        }
        for watched in devices
    }

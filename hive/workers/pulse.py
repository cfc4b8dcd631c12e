"""An engine's pulse: whether it gets on with its work, and when what was aborted has ended there.

Nothing is asked while the engine is idle. While requests run and bytes come from it, nothing is
asked either. One poller a worker, at most ten samples a second, only while an abort is open or
nothing has come for a while (design, Cancellation and Progress; R050).
"""

import asyncio
import contextlib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from hive.policy.progress import Progress, Signs, abort_is_lost, work_is_lost
from hive.workers import guard
from hive.workers.client import EngineClient, ProbeFailed

log = logging.getLogger(__name__)

FIRST_S = 0.02  # from an abort, or a sample, to the next: engines act after their current step
ABORT_S = 0.125  # between two samples while an abort is open, in the long run
BURST_S = 2 * ABORT_S  # what may be sampled early: with it never more than ten in a second
WATCH_S = 1.0  # between two looks while requests run
LISTENING_S = 5.0  # between two looks whether anybody listens
HEALTHY_S = 2.0  # … or whether what is not asked anything else is well
REFUSALS = 3  # in a row: nobody does
SAMPLE_S = 2.0  # for an answer to a sample
MEMBERS_S = 5.0  # how long the list of the tree's processes is believed
_TICKS = os.sysconf("SC_CLK_TCK")
_GAUGE = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|prompt_tokens_total|"
    r"generation_tokens_total)(?:\{[^}]*\})? ([0-9.eE+-]+)$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """The engine's own counts: requests that run or wait there, and what moves while they do."""

    requests: int
    counters: tuple[float, ...]


def read_sample(text: str) -> Sample | None:
    """From Prometheus' text; None where the engine publishes no such gauges."""
    found: dict[str, float] = {}
    for name, value in _GAUGE.findall(text):
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(value)):
                found[name] = found.get(name, 0.0) + number
    if "num_requests_running" not in found:
        return None
    requests = found.pop("num_requests_running") + found.pop("num_requests_waiting", 0.0)
    return Sample(round(requests), tuple(found[name] for name in sorted(found)))


@dataclass(slots=True, eq=False)
class Abort:
    """A request whose connection was closed; `done` hears yes or unknown, once."""

    asked_at: float
    weight: int
    done: Callable[[str], None]


class Pulse:
    """Of one life of a worker. Times are monotonic seconds; `weight` counts engine requests."""

    def __init__(
        self,
        client: EngineClient,
        root: int,
        *,
        has_gauges: bool,
        vital: Collection[str],
        cleanup_s: float,
        longest_s: float,
        hung: Callable[[str], None],
        health_path: str | None = None,
    ) -> None:
        """`root` is the guard's pid; `vital` are beginnings of the names of what computes.

        With `health_path` it is asked there whether it works: no requests of clients go to it, so
        nothing else would tell.

        `hung` hears why, once: an abort was not confirmed in `cleanup_s` and nothing moved, or
        work ran and nothing moved for `longest_s`.
        """
        self._client, self._root = client, root
        self._has_gauges, self._vital = has_gauges, tuple(vital)
        self._cleanup_s, self._longest_s = cleanup_s, longest_s
        self._hung = hung
        self._health_path = health_path
        self._rest_s = HEALTHY_S if health_path else LISTENING_S
        self.open_requests = 0  # of hive's there …
        self.open_weight = 0  # … and what the engine counts them as
        self.relayed = 0  # bytes of answers that came
        self._least = 0  # of open_weight while a sample is under way
        self._busy_since = 0.0
        self._aborts: list[Abort] = []
        self._progress = Progress(time.monotonic())
        self._seen_relayed = 0
        self._sampled_at = 0.0  # when it was asked for the last counts that it gave
        self._is_talking = False  # it answers, be it without counts
        self._members: tuple[int, ...] = ()
        self._members_at = -MEMBERS_S
        self._counters: tuple[float, ...] | None = None
        self._cpu_s, self._is_stopped = 0.0, False
        self._stirred = asyncio.Event()
        self._is_over = self._is_told = self._is_refused = False

    def be_patient(self, cleanup_s: float, longest_s: float) -> None:
        """Other limits from now on."""
        self._cleanup_s, self._longest_s = cleanup_s, longest_s

    # ── what requests tell ──────────────────────────────────────────────────────────────────────

    def began(self, weight: int) -> None:
        """A request of so many engine requests is sent."""
        if self.open_requests == 0:
            self._busy_since = time.monotonic()
            self._stirred.set()
        self.open_requests += 1
        self.open_weight += weight

    def ended(self, weight: int) -> None:
        """Its answer came to its end."""
        self.open_requests -= 1
        self.open_weight -= weight
        self._least = min(self._least, self.open_weight)

    def aborted(self, weight: int, done: Callable[[str], None]) -> None:
        """Its connection was closed before; `done` hears when the engine has ended it, too."""
        self.ended(weight)
        if self._is_over:
            done("yes")
        elif not self._has_gauges:
            done("unknown")
        else:
            self._aborts.append(Abort(time.monotonic(), weight, done))
            self._stirred.set()

    def refused(self) -> None:
        """A connection to it was refused."""
        self._is_refused = True
        self._stirred.set()

    def stop(self) -> None:
        """The engine is ending: nothing runs there any more."""
        self._is_over = True
        self._stirred.set()
        aborts, self._aborts = self._aborts, []
        for abort in aborts:
            abort.done("yes")

    # ── the poller ──────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Until `stop`."""
        looked_at = sampled_at = paid_until = 0.0
        listened_at = time.monotonic()
        while not self._is_over:
            self._stirred.clear()
            if self._is_refused or time.monotonic() - listened_at >= self._rest_s:
                await self._see_who_listens()
                listened_at = time.monotonic()
            if not self._aborts and not self.open_requests:
                await self._stirred_within(self._rest_s)
                looked_at = time.monotonic()
                continue
            due = looked_at + WATCH_S
            if self._aborts:
                first = max(sampled_at, self._aborts[0].asked_at) + FIRST_S
                due = min(due, max(first, paid_until - BURST_S))
            if (left := due - time.monotonic()) > 0:
                await self._stirred_within(left)
                continue
            looked_at = time.monotonic()
            try:
                if await self._look():
                    sampled_at = looked_at
                    paid_until = max(paid_until, looked_at) + ABORT_S
                self._judge()
            except Exception:  # the boundary: without a pulse the worker serves on
                log.exception("a look at an engine failed")

    async def _stirred_within(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stirred.wait()

    async def _see_who_listens(self) -> None:
        """Its process may be gone, or its socket, without its guard having said so."""
        self._is_refused = False
        for _ in range(REFUSALS):
            if self._is_over or await self._is_there():
                return
            await asyncio.sleep(ABORT_S)
        if self._health_path:
            self._condemn(f"it failed {REFUSALS} health checks in a row")
        else:
            self._condemn("nobody listens on its socket any more")

    async def _is_there(self) -> bool:
        if self._health_path:
            return await self._client.is_healthy(self._health_path)
        return await self._client.is_listening()

    async def _look(self) -> bool:
        """Look at it; whether it was asked for its counts."""
        is_silent = self.relayed == self._seen_relayed
        self._seen_relayed = self.relayed
        is_asked = self._has_gauges and (bool(self._aborts) or is_silent)
        if is_asked:
            asked_at, self._least = time.monotonic(), self.open_weight
            sample = await self._sample()
            if sample is not None:
                self._counters, self._sampled_at = sample.counters, asked_at
                self._confirm(sample.requests, asked_at)
        if is_silent:
            await self._find_members()
            self._cpu_s, self._is_stopped = cpu_of(self._members)
        else:
            self._is_stopped = False
        signs = Signs(self._counters, self._cpu_s, self.relayed, self._is_stopped)
        self._progress.see(signs, time.monotonic())
        return is_asked

    async def _sample(self) -> Sample | None:
        try:
            async with asyncio.timeout(SAMPLE_S):
                status, text = await self._client.ask("GET", "/metrics")
        except (TimeoutError, ProbeFailed):
            self._is_talking = False
            return None
        self._is_talking = True
        sample = read_sample(text.decode(errors="replace"))
        if sample is None and status in (200, 404):
            self._has_gauges = False  # it answers and has none: closed connections count
            self._give_up_on_aborts()
        return sample

    def _give_up_on_aborts(self) -> None:
        aborts, self._aborts = self._aborts, []
        for abort in aborts:
            abort.done("unknown")

    def _confirm(self, running: int, asked_at: float) -> None:
        """Of the aborts before `asked_at`, oldest first, as many as the count leaves no room for.

        What the engine runs beyond hive's open requests can only be aborted ones; which of them it
        does not tell, and it acts in order.
        """
        excess = max(0, running - self._least)
        pending = sum(abort.weight for abort in self._aborts)
        while self._aborts and self._aborts[0].asked_at < asked_at:
            pending -= self._aborts[0].weight
            if pending < excess:
                return
            self._aborts.pop(0).done("yes")

    def _judge(self) -> None:
        if self._is_over or self._is_told:
            return
        now, progress = time.monotonic(), self._progress
        asked_at = self._aborts[0].asked_at if self._aborts else now
        if self._aborts and abort_is_lost(asked_at, progress, now, self._cleanup_s):
            if self._is_talking and self._sampled_at < asked_at:
                self._give_up_on_aborts()  # nothing says that it still runs
                return
            why = f"it did not end a cancelled request within {self._cleanup_s:g} s"
        elif self.open_requests and work_is_lost(progress, self._busy_since, now, self._longest_s):
            why = f"it has requests and made no progress for {self._longest_s:g} s"
        else:
            return
        self._condemn(why)

    def _condemn(self, why: str) -> None:
        if not self._is_told and not self._is_over:
            self._is_told = True
            self._hung(why)

    # ── processes ───────────────────────────────────────────────────────────────────────────────

    async def _find_members(self) -> None:
        """The processes of the tree that compute; looked for from time to time."""
        if time.monotonic() - self._members_at < MEMBERS_S:
            return
        self._members_at = time.monotonic()
        try:
            members = await asyncio.to_thread(guard.descendants, self._root)
        except OSError:  # nobody can look just now
            return
        if self._vital:
            members = [p for p in members if p.name.startswith(self._vital)]
        elif self._has_gauges:
            members = []  # answering samples takes time, too
        self._members = tuple(process.pid for process in members)

    def __repr__(self) -> str:
        return f"<Pulse {self.open_weight} open, {len(self._aborts)} aborted>"


def cpu_of(pids: Iterable[int]) -> tuple[float, bool]:
    """Seconds of CPU time that processes have had, and whether one of them is stopped."""
    seconds, is_stopped = 0.0, False
    for pid in pids:
        with contextlib.suppress(OSError, IndexError, ValueError):
            after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2]
            state, *numbers = after_name.split()
            seconds += (int(numbers[10]) + int(numbers[11])) / _TICKS
            is_stopped = is_stopped or state in "Tt"
    return seconds, is_stopped

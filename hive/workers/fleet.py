"""All workers of this daemon: made from the settings, started together, stopped together.

The LMCache server, where a model needs it, is a worker, too: it is started before the engines that
use it and stopped after them. An engine does not find a server again that was started anew, so it
is restarted itself when it is idle; until then its cache is lost (LMCache #4642).
"""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from hive.devices.watch import Devices, Watched
from hive.errors import (
    Conflict,
    HiveError,
    KvServerUnreachable,
    ModelNotFound,
    NotFound,
    ServiceUnavailable,
)
from hive.events import Announcer
from hive.policy.lifecycle import AT_REST, State
from hive.policy.restarts import RestartPolicy
from hive.settings import Model, Settings
from hive.workers import guard, preflight
from hive.workers.admission import Door
from hive.workers.command import CommandEngine
from hive.workers.ledger import Ledger
from hive.workers.lmcache import ID as CACHE
from hive.workers.lmcache import KvServer
from hive.workers.ports import Engine
from hive.workers.process import Place
from hive.workers.site import Site, site_of
from hive.workers.vllm import VllmEngine
from hive.workers.worker import Worker, WorkerPlan

log = logging.getLogger(__name__)

RENEW_S = 0.5  # between two looks whether an engine's cache is lost


def engine_of(name: str, model: Model, kv: Site | None) -> Engine:
    kind = VllmEngine if model.engine == "vllm" else CommandEngine
    return kind(name, model, kv)


def _policy_of(settings: Settings) -> RestartPolicy:
    restarts = settings.restarts
    return RestartPolicy(
        restarts.starts, restarts.window_s, restarts.backoff_s, restarts.backoff_max_s
    )


class Fleet:
    """Workers by id; ids are <model>-<n> and stay the same across restarts."""

    def __init__(
        self,
        settings: Settings,
        devices: Devices,
        ledger: Ledger,
        announcer: Announcer,
        groups: Path | None = None,
    ) -> None:
        """`groups` is where each worker gets a control group of its own (workers/cgroup)."""
        self._settings = settings
        self._devices, self._ledger = devices, ledger
        devices.on_fault = self._device_failed
        devices.own_pids = self.pids
        self._groups = groups
        # The error of a device that hive ends with (gpu_error_policy = "exit").
        self.verdict: HiveError | None = None
        self.condemned = asyncio.Event()
        self._numbers = itertools.count(1)
        self.workers: dict[str, Worker] = {}
        self._of_model: dict[str, list[Worker]] = {}
        self.is_draining = False
        self.made_at = int(time.time())
        self.site = site_of(settings)
        self.cache: Worker | None = None  # the LMCache server
        self._cache_moved = asyncio.Event()
        self._renewal = {name: asyncio.Lock() for name in settings.models}
        self._policy = _policy_of(settings)
        if self.site is not None:
            plan = self._plan_of_cache(self.site)
            self.cache = Worker(plan, self._new_place, announcer, devices, ledger)
            self.cache.on_move = lambda _: self._cache_moved.set()
        for plan in self._plans():
            worker = Worker(plan, self._new_place, announcer, devices, ledger)
            self.workers[plan.id] = worker
            self._of_model.setdefault(plan.model, []).append(worker)
        self.doors = {
            name: Door(
                name,
                self._of_model[name],
                model.max_concurrent,
                model.queue_depth,
                settings.breaker,
                announcer,
            )
            for name, model in settings.models.items()
        }

    def _plans(self) -> Iterator[WorkerPlan]:
        settings = self._settings
        for name, model in settings.models.items():
            for number, devices in enumerate(model.workers):
                worker_id = f"{name}-{number}"
                visible = ",".join(one.device.uuid for one in self._devices.of(devices))
                yield WorkerPlan(
                    id=worker_id,
                    model=name,
                    devices=devices,
                    visible=visible or None,
                    engine=engine_of(name, model, self.site),
                    timeouts=settings.timeouts_of(model),
                    restarts=self._policy,
                    drain_s=settings.server.drain_s,
                    log=settings.server.state_dir / "logs" / f"{worker_id}.log",
                    preflight=partial(preflight.before_start, settings, name, devices),
                    alternatives=model.alternatives,
                    beside=self._cache_ready if model.windows else None,
                )

    def _plan_of_cache(self, site: Site) -> WorkerPlan:
        settings = self._settings
        return WorkerPlan(
            id=CACHE,
            model="",
            devices=("cpu",),
            visible=None,
            engine=KvServer(settings, site),
            timeouts=settings.timeouts,
            restarts=self._policy,
            drain_s=0,
            log=settings.server.state_dir / "logs" / f"{CACHE}.log",
            preflight=lambda _: preflight.before_cache(settings),
        )

    def _new_place(self, log: Path) -> Place:
        homes = self._settings.server.runtime_dir / "w"
        for directory in (homes.parent, homes):  # somebody may have tidied them away
            directory.mkdir(mode=0o700, exist_ok=True)
        home = homes / str(next(self._numbers))
        # Of a tree that is LOST, of an earlier life, or somebody else's; a dead link, too.
        while os.path.lexists(home):
            home = homes / str(next(self._numbers))
        return Place(home, log, groups=self._groups, records=self._ledger.directory)

    def apply(self, settings: Settings) -> None:
        """What may change while hive runs, from now on."""
        self._settings, self._policy = settings, _policy_of(settings)
        for worker in self.workers.values():
            model = settings.models[worker.model]
            worker.apply(
                timeouts=settings.timeouts_of(model),
                restarts=self._policy,
                drain_s=settings.server.drain_s,
            )
        if self.cache is not None:
            self.cache.apply(timeouts=settings.timeouts, restarts=self._policy, drain_s=0)
        for name, door in self.doors.items():
            door.apply(settings.models[name].queue_depth, settings.breaker)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Every worker's task; on the way out every tree is ended, all of them in parallel."""
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(worker.run(), name=f"worker:{worker.id}")
                for worker in self.everyone()
            ]
            running += [
                tasks.create_task(self._renewing(worker), name=f"renew:{worker.id}")
                for worker in self.workers.values()
                if worker.plan.beside is not None
            ]
            try:
                yield
            finally:
                # A worker's task that failed has cancelled the others, each of which ends its
                # own tree; then nobody is left to take a request to stop.
                if not any(task.done() for task in running):
                    await self.stop(drain=False)
                for task in running:
                    task.cancel()

    async def start(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for worker in self.everyone():
                tasks.create_task(worker.start(), name=f"start:{worker.id}")

    async def stop(self, *, drain: bool) -> None:
        """End every worker, in parallel; returns when each is at rest."""
        self.refuse()

        async def end(worker: Worker) -> None:
            if worker.state not in AT_REST:
                await worker.stop(drain=drain)
                await worker.wait_for(*AT_REST)

        async with asyncio.TaskGroup() as tasks:
            for worker in self.workers.values():
                tasks.create_task(end(worker), name=f"stop:{worker.id}")
        if self.cache is not None:  # an engine that ends stores what it still has
            await end(self.cache)

    def refuse(self) -> None:
        """Take no new requests from now on, send away whoever waits, start nothing any more."""
        self.is_draining = True
        for door in self.doors.values():
            door.shut()
        for worker in self.everyone():
            worker.retire()

    def everyone(self) -> list[Worker]:
        """The workers of all models, and the LMCache server before them."""
        return [*([self.cache] if self.cache else []), *self.workers.values()]

    # ── the LMCache server ──────────────────────────────────────────────────────────────────────

    async def _cache_ready(self) -> int:
        """Wait for the LMCache server; which start of it that is.

        Raises KvServerUnreachable while it will not come up by itself.
        """
        assert self.cache is not None
        while self.cache.state is not State.READY:
            is_yet_to_start = self.cache.state is State.STOPPED and not self.cache.counts.starts
            if self.cache.state in AT_REST and not is_yet_to_start:
                raise KvServerUnreachable(
                    f"The LMCache server is {self.cache.state}: {self.cache.reason}",
                    action="See 'hive worker show lmcache'; 'hive worker start lmcache' starts it.",
                )
            self._cache_moved.clear()
            await self._cache_moved.wait()
        return self.cache.counts.starts

    def has_cache(self, worker: Worker) -> bool:
        """Whether what it computes is stored: the LMCache that it was started beside is there."""
        cache, life = self.cache, worker.life
        return (
            cache is not None
            and cache.state is State.READY
            and life is not None
            and life.cache_life == cache.counts.starts
        )

    def cache_view(self, worker: Worker) -> str | None:
        """In a word, for operators: None for a worker without one."""
        if worker.plan.beside is None:
            return None
        if worker.state is not State.READY:
            return "none"
        return "ok" if self.has_cache(worker) else "lost"

    async def _renewing(self, worker: Worker) -> None:
        """Restart an engine whose LMCache was started anew, as soon as it is idle; one of a model at
        a time. One that failed for want of LMCache is started when that is back."""
        while True:
            await asyncio.sleep(RENEW_S)
            if self.is_draining or not self.cache_is_up:
                continue
            failed_for_it = isinstance(worker.error, KvServerUnreachable)
            with contextlib.suppress(Conflict, ServiceUnavailable):  # somebody stopped it just now
                if worker.state is State.FAILED and failed_for_it:
                    await worker.start()
                elif self.cache_view(worker) == "lost":
                    await self._renew(worker)

    async def _renew(self, worker: Worker) -> None:
        await worker.wait_idle()
        async with self._renewal[worker.model]:
            is_lost = self.cache_view(worker) == "lost" and self.cache_is_up
            if is_lost and not worker.in_flight and not self.is_draining:
                log.warning("worker %s is restarted: its LMCache was started anew", worker.id)
                await worker.restart()
                await worker.wait_for(State.READY, *AT_REST)

    @property
    def cache_is_up(self) -> bool:
        return self.cache is not None and self.cache.state is State.READY

    # ── devices ─────────────────────────────────────────────────────────────────────────────────

    def _device_failed(self, failed: Watched) -> None:
        """C8: end hive with every tree, or give up this device's workers until its release."""
        error = failed.error
        assert error is not None
        if self._settings.server.gpu_error_policy == "exit":
            self.refuse()
            for worker in self.workers.values():
                worker.device_failed(error, for_good=True)
            self.verdict = self.verdict or error
            self.condemned.set()
            return
        for worker in self.workers.values():
            if failed in self._devices.of(worker.plan.devices):
                worker.device_failed(error, for_good=False)

    async def release(self, *failed: Watched) -> None:
        """Trust devices again and start the workers that waited for them.

        Raises Conflict when none of them is quarantined, CudaDeviceFailed while one is broken or a
        process hangs there.
        """
        for worker in self.workers.values():
            hangs_there = any(one in failed for one in self._devices.of(worker.plan.devices))
            if worker.state is State.LOST and hangs_there and worker.error:
                raise worker.error
        for one in failed:
            await self._devices.release(one)
        for worker in self.workers.values():
            is_free = not self._devices.quarantined(worker.plan.devices)
            if worker.state is State.QUARANTINED and is_free:
                await worker.released()

    async def release_worker(self, worker: Worker) -> None:
        """Release every device of a QUARANTINED worker. Raises Conflict when it is not."""
        if worker.state is not State.QUARANTINED:
            raise Conflict(
                f"Worker {worker.id} is {worker.state}; release needs it to be QUARANTINED.",
                state=str(worker.state),
                worker=worker.id,
            )
        waiting = self._devices.of(worker.plan.devices)
        await self.release(*(one for one in waiting if one.error is not None))

    def pids(self) -> set[int]:
        """Every process that hive owns at this moment, guards included."""
        try:
            everything = list(guard.every_process())
        except OSError:  # nobody can look just now; what was seen before still counts
            everything = []
        found: set[int] = set()
        for worker in self.everyone():
            if worker.life:
                found |= worker.life.pids | worker.life.see_pids(everything)
        return found

    # ── requests ────────────────────────────────────────────────────────────────────────────────

    def of_model(self, model: str) -> list[Worker]:
        """The workers of a model. Raises ModelNotFound, which names the models there are."""
        workers = self._of_model.get(model)
        if workers is None:
            names = sorted(self._of_model)
            raise ModelNotFound(
                f"The requested model is not served here; served: {', '.join(names)}.",
                param="model",
                available_models=names,
            )
        return workers

    def worker(self, worker_id: str) -> Worker:
        found = {worker.id: worker for worker in self.everyone()}
        if worker_id not in found:
            raise NotFound(
                f"There is no such worker; there are: {', '.join(sorted(found))}.",
                action="Use one of these ids; 'hive worker list' shows them.",
                allowed=sorted(found),
            )
        return found[worker_id]

    def door(self, model: str) -> Door:
        """Where requests for a model get a slot. Raises ModelNotFound."""
        self.of_model(model)
        return self.doors[model]

    @property
    def can_serve(self) -> bool:
        """At least one worker would take a request: READY, its breaker not open, hive not stopping."""
        return any(door.room.open_workers for door in self.doors.values())

    def __repr__(self) -> str:
        return f"<Fleet {list(self.workers.values())}>"

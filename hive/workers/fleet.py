"""All workers of this daemon: made from the settings, started together, stopped together."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from hive.errors import ModelNotFound, NotFound, ServiceUnavailable
from hive.events import Announcer
from hive.policy.lifecycle import ON_THE_WAY, State
from hive.policy.restarts import RestartPolicy
from hive.settings import Model, Settings
from hive.workers.command import CommandEngine
from hive.workers.ports import Engine
from hive.workers.process import Place
from hive.workers.vllm import VllmEngine
from hive.workers.worker import Worker, WorkerPlan


def engine_of(name: str, model: Model) -> Engine:
    return VllmEngine(name, model) if model.engine == "vllm" else CommandEngine(name, model)


class Fleet:
    """Workers by id; ids are <model>-<n> and stay the same across restarts."""

    def __init__(self, settings: Settings, uuids: Mapping[str, str], announcer: Announcer) -> None:
        """`uuids` maps each configured device but "cpu" to what CUDA_VISIBLE_DEVICES takes."""
        self._settings = settings
        self._numbers = itertools.count(1)
        self.workers: dict[str, Worker] = {}
        self._of_model: dict[str, list[Worker]] = {}
        self.is_draining = False
        self.made_at = int(time.time())
        for plan in self._plans(uuids):
            worker = Worker(plan, self._new_place, announcer)
            self.workers[plan.id] = worker
            self._of_model.setdefault(plan.model, []).append(worker)

    def _plans(self, uuids: Mapping[str, str]) -> Iterator[WorkerPlan]:
        settings = self._settings
        restarts = settings.restarts
        policy = RestartPolicy(
            restarts.starts, restarts.window_s, restarts.backoff_s, restarts.backoff_max_s
        )
        for name, model in settings.models.items():
            for number, devices in enumerate(model.workers):
                worker_id = f"{name}-{number}"
                visible = ",".join(uuids[device] for device in devices if device != "cpu")
                yield WorkerPlan(
                    id=worker_id,
                    model=name,
                    devices=devices,
                    visible=visible or None,
                    engine=engine_of(name, model),
                    timeouts=settings.timeouts_of(model),
                    restarts=policy,
                    drain_s=settings.server.drain_s,
                    log=settings.server.state_dir / "logs" / f"{worker_id}.log",
                )

    def _new_place(self, log: Path) -> Place:
        homes = self._settings.server.runtime_dir / "w"
        for directory in (homes.parent, homes):  # somebody may have tidied them away
            directory.mkdir(mode=0o700, exist_ok=True)
        home = homes / str(next(self._numbers))
        while home.exists():  # of a tree that is LOST, or of an earlier life
            home = homes / str(next(self._numbers))
        return Place(home, log)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Every worker's task; on the way out every tree is ended, all of them in parallel."""
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(worker.run(), name=f"worker:{worker.id}")
                for worker in self.workers.values()
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
            for worker in self.workers.values():
                tasks.create_task(worker.start(), name=f"start:{worker.id}")

    async def stop(self, *, drain: bool) -> None:
        """End every worker, in parallel; returns when each is STOPPED, FAILED or LOST."""
        self.is_draining = True

        async def end(worker: Worker) -> None:
            at_rest = (State.STOPPED, State.FAILED, State.LOST)
            if worker.state not in at_rest:
                await worker.stop(drain=drain)
                await worker.wait_for(*at_rest)

        async with asyncio.TaskGroup() as tasks:
            for worker in self.workers.values():
                tasks.create_task(end(worker), name=f"stop:{worker.id}")

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
        worker = self.workers.get(worker_id)
        if worker is None:
            raise NotFound("There is no such worker.", allowed=sorted(self.workers))
        return worker

    def choose(self, model: str) -> Worker:
        """The READY worker of `model` with the fewest requests.

        Raises ModelNotFound, or ServiceUnavailable whose reason says why none can serve (C12).
        """
        workers = self.of_model(model)
        ready = [worker for worker in workers if worker.state is State.READY]
        if ready and not self.is_draining:
            return min(ready, key=lambda worker: worker.in_flight)
        raise unavailable(model, workers, is_draining=self.is_draining)

    def must_be_ready(self, worker: Worker) -> Worker:
        """`worker`, when it alone can serve a request. Raises like `choose`."""
        if worker.state is State.READY and not self.is_draining:
            return worker
        raise unavailable(worker.model, [worker], is_draining=self.is_draining)

    @property
    def can_serve(self) -> bool:
        """At least one model has a READY worker, and hive is not stopping."""
        ready = any(worker.state is State.READY for worker in self.workers.values())
        return ready and not self.is_draining

    def __repr__(self) -> str:
        return f"<Fleet {list(self.workers.values())}>"


def unavailable(model: str, workers: list[Worker], *, is_draining: bool) -> ServiceUnavailable:
    """Why no worker of a model can take a request now, and when one may (contract, Errors)."""
    hints = [hint for worker in workers if (hint := worker.ready_in_s) is not None]
    states = {worker.state for worker in workers}
    state = str(workers[0].state)
    if is_draining:
        return ServiceUnavailable(
            "hive is stopping and takes no new requests.",
            reason="draining",
            retry_after_s=30,
            model=model,
        )
    if hints:
        return ServiceUnavailable(
            f"Model {model} is loading.",
            reason="loading",
            retry_after_s=min(hints),
            model=model,
            state=state,
        )
    if states & {State.DRAINING, *ON_THE_WAY}:
        return ServiceUnavailable(
            f"Model {model} is draining.",
            reason="draining",
            retry_after_s=30,
            model=model,
            state=state,
        )
    if states <= {State.STOPPED, State.STOPPING}:
        return ServiceUnavailable(
            f"Model {model} is stopped.",
            reason="worker_stopped",
            action="An operator can start it with 'hive worker start'.",
            model=model,
            state=state,
        )
    return ServiceUnavailable(
        f"Model {model} has failed and is not restarted any more.",
        reason="worker_failed",
        action="An operator finds the cause with 'hive worker show' and starts it again.",
        model=model,
        state=state,
    )

"""Workers that stand in a state without an engine: put there by the test, followed by their door."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from hive.devices.nvml import Driver
from hive.devices.watch import Devices
from hive.events import Announcer
from hive.policy.admission import Ticket
from hive.policy.lifecycle import State
from hive.policy.restarts import RestartPolicy
from hive.settings import Model, Timeouts
from hive.workers.admission import Door, Permit
from hive.workers.client import EngineClient
from hive.workers.command import CommandEngine
from hive.workers.ledger import Ledger
from hive.workers.life import Life
from hive.workers.process import Place
from hive.workers.pulse import Pulse
from hive.workers.worker import Worker, WorkerPlan

NOWHERE = Path("/nowhere")


class HandPulse(Pulse):
    """An engine's pulse that confirms an abort when the test says so."""

    def __init__(self) -> None:
        super().__init__(
            EngineClient(NOWHERE, "m"),
            0,
            has_gauges=True,
            vital=(),
            cleanup_s=5,
            longest_s=30,
            hung=lambda _: None,
        )

    def confirm(self, how: str = "yes") -> None:
        """The oldest abort that is open."""
        self._aborts.pop(0).done(how)

    @property
    def aborted_weight(self) -> int:
        return sum(abort.weight for abort in self._aborts)


def worker_named(worker_id: str, announcer: Announcer | None = None) -> Worker:
    """Of the model that its id begins with; nothing of it runs."""
    announcer = announcer or Announcer()
    name = worker_id.rpartition("-")[0]
    model = Model.model_validate({"engine": "command", "device": "cpu", "command": ["x{socket}"]})
    plan = WorkerPlan(
        id=worker_id,
        model=name,
        devices=("cpu",),
        visible=None,
        engine=CommandEngine(name, model),
        timeouts=Timeouts(),
        restarts=RestartPolicy(0, 300, 1, 1),
        drain_s=0,
        log=NOWHERE,
        preflight=lambda _: None,
    )
    ledger = Ledger(NOWHERE, announcer.announce)
    devices = Devices(Driver(), {}, announcer)
    return Worker(plan, lambda log: Place(NOWHERE, log), announcer, devices, ledger)


def move(worker: Worker, state: State) -> None:
    """As its task would: its door hears of it."""
    worker.state = state
    worker.on_move(worker)


async def live(worker: Worker, pulse: Callable[[], Pulse] = HandPulse) -> Life:
    """A new life, READY."""
    worker.life = Life(worker.counts.starts + 1, Place(NOWHERE, NOWHERE), worker.model)
    worker.counts.starts += 1
    worker.life.pulse = pulse()
    move(worker, State.READY)
    return worker.life


async def die(worker: Worker, state: State = State.STOPPING) -> None:
    """Its engine ends, and whatever uses it is told."""
    life, worker.life = worker.life, None
    move(worker, state)
    if life is not None:
        await close(life)


async def close(life: Life) -> None:
    pulse = life.pulse
    await life.close()
    if pulse is not None:
        await pulse._client.close()


@asynccontextmanager
async def standing(worker: Worker, state: State = State.READY) -> AsyncIterator[Worker]:
    """The worker in `state`, with a life where it is READY."""
    if state is State.READY:
        await live(worker)
    else:
        move(worker, state)
    try:
        yield worker
    finally:
        if worker.life is not None:
            await close(worker.life)


async def admitted(door: Door, ticket: Ticket) -> Permit:
    """A slot, at once or after waiting for it."""
    return door.enter(ticket) or await door.wait(ticket)

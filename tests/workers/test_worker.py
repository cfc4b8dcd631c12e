"""One worker's life, on real processes: the engine double, and programs that fail at once."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest

from hive.devices.nvml import Driver
from hive.devices.watch import Devices
from hive.errors import Conflict, InternalError, ServiceUnavailable
from hive.events import (
    Announcer,
    Event,
    WorkerEnded,
    WorkerExited,
    WorkerMoved,
    WorkerReady,
    WorkerRestartPlanned,
    WorkerStarted,
)
from hive.policy.lifecycle import State
from hive.policy.restarts import RestartPolicy
from hive.settings import Model, Timeouts
from hive.workers import guard
from hive.workers.client import EngineClient
from hive.workers.command import CommandEngine
from hive.workers.ledger import Entry, Ledger
from hive.workers.life import EngineOver
from hive.workers.process import Launch, Place
from hive.workers.worker import HINT_S, Worker, WorkerPlan
from tests.doubles import engine_command
from tests.patience import awaited, short_directory, until, wait_until

E = TypeVar("E", bound=Event)

NEVER = RestartPolicy(starts=0, window_s=300, backoff_s=0.01, backoff_max_s=0.01)
TWICE = replace(NEVER, starts=2)
PATIENT = RestartPolicy(starts=5, window_s=300, backoff_s=600, backoff_max_s=600)


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """The leak gate (R153)."""
    guard.become_subreaper()
    before = {process.pid for process in guard.descendants(os.getpid())}
    yield
    wait_until(
        lambda: {process.pid for process in guard.descendants(os.getpid())} <= before,
        "every process to be gone",
    )
    guard.prctl(guard.PR_SET_CHILD_SUBREAPER, 0)


class Stage:
    """A worker, and everything that it announced."""

    def __init__(self, home: Path, worker: dict[str, Any], command: list[str]) -> None:
        self.events: list[Event] = []
        announcer = Announcer()
        announcer.listen(self.events.append)
        model = Model.model_validate(
            {"engine": "command", "device": "cpu", "command": command, "probe": "completion"}
        )
        self.numbers = 0
        self.home = home
        plan = WorkerPlan(
            id="m-0",
            model="m",
            devices=("cpu",),
            visible=None,
            engine=CommandEngine("m", model),
            timeouts=Timeouts(cleanup_s=0.5, load_s=100),
            restarts=NEVER,
            drain_s=10,
            log=home / "m-0.log",
            preflight=lambda _devices: None,
        )
        self.ledger = Ledger(home / "ledger", announcer.announce)
        devices = Devices(Driver(), {}, announcer)
        self.worker = Worker(
            replace(plan, **worker), self._place, announcer, devices, self.ledger, lambda: 0.0
        )

    def _place(self, log: Path) -> Place:
        self.numbers += 1
        return Place(self.home / str(self.numbers), log, records=self.ledger.directory)

    def heard(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def moves(self) -> list[str]:
        return [event.new for event in self.heard(WorkerMoved)]

    @property
    def pid(self) -> int:
        assert self.worker.life
        assert self.worker.life.tree
        return self.worker.life.tree.pid


def double(*flags: str) -> list[str]:
    return engine_command("--uds", "{socket}", "--model", "m", *flags)


FAILS = ["sh", "-c", "echo it will not work >&2; exit 3", "{socket}"]
AT_REST = (State.STOPPED, State.FAILED, State.LOST)


@asynccontextmanager
async def working(
    home: Path, *flags: str, command: list[str] | None = None, **plan: Any
) -> AsyncIterator[Stage]:
    """A worker whose task runs; at rest at the end."""
    stage = Stage(home, plan, command or double(*flags))
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(stage.worker.run(), name="worker")
        try:
            yield stage
        finally:
            if stage.worker.state not in AT_REST:
                await stage.worker.stop(drain=False)
                await stage.worker.wait_for(*AT_REST)
            running.cancel()


@asynccontextmanager
async def ready(home: Path, *flags: str, **plan: Any) -> AsyncIterator[Stage]:
    async with working(home, *flags, **plan) as stage:
        await stage.worker.start()
        await stage.worker.wait_for(State.READY, State.FAILED)
        assert stage.worker.state is State.READY, stage.worker.reason
        yield stage


# ── Starting and stopping ───────────────────────────────────────────────────────────────────────


@awaited
async def test_a_worker_becomes_ready_and_says_so(home: Path) -> None:
    async with ready(home) as stage:
        worker = stage.worker
        view = worker.view()

        assert stage.moves == ["STARTING", "LOADING", "READY"]
        assert [event.unasked for event in stage.heard(WorkerStarted)] == [False]
        assert stage.heard(WorkerReady)[0].load_s == worker.load_s
        assert (view["id"], view["model"], view["state"]) == ("m-0", "m", "READY")
        assert (view["device"], view["pid"], view["starts"]) == ("cpu", stage.pid, 1)
        assert repr(worker) == "<Worker m-0 READY>"


@awaited
async def test_a_worker_that_is_stopped_leaves_nothing(home: Path) -> None:
    """(R153)"""
    async with ready(home, "--tmp", "2", "--shm", "1", "--core") as stage:
        await stage.worker.stop()
        await stage.worker.wait_for(State.STOPPED)

        assert stage.moves[3:] == ["DRAINING", "STOPPING", "STOPPED"]
        assert [event.cause for event in stage.heard(WorkerExited)] == ["asked"]
        assert [event.how for event in stage.heard(WorkerEnded)] == ["term"]
        assert sorted(path.name for path in home.iterdir()) == ["ledger", "m-0.log"]
        assert list(stage.ledger.directory.iterdir()) == []
        assert stage.worker.view()["pid"] is None


@awaited
async def test_an_engine_that_ignores_term_is_killed_in_time(home: Path) -> None:
    """(R048, R051)"""
    async with ready(home, "--ignore-term", timeouts=Timeouts(cleanup_s=0.2)) as stage:
        await stage.worker.stop()
        await stage.worker.wait_for(State.STOPPED)
        (ended,) = stage.heard(WorkerEnded)

    assert ended.how == "kill"
    assert ended.stop_s >= 0.2


@awaited
async def test_what_makes_no_sense_in_a_state_is_refused_and_says_why(home: Path) -> None:
    async with working(home) as stage:
        with pytest.raises(Conflict, match="m-0 is STOPPED; stop needs"):
            await stage.worker.stop()
    async with ready(home) as stage:
        with pytest.raises(Conflict, match="m-0 is READY; start needs it to be STOPPED or FAILED"):
            await stage.worker.start()


@awaited
async def test_a_restart_is_a_stop_and_a_start_and_counts_as_neither(home: Path) -> None:
    """Nobody uses the policy up by asking: here it allows no start at all."""
    async with ready(home) as stage:
        before = stage.pid
        await stage.worker.restart()
        await stage.worker.wait_for(State.STARTING)
        await stage.worker.wait_for(State.READY)

        assert stage.pid != before
        assert [event.unasked for event in stage.heard(WorkerStarted)] == [False, False]
        assert stage.heard(WorkerRestartPlanned) == []
        assert stage.worker.view()["unasked_restarts"] == 0


@awaited
async def test_a_stopped_worker_can_be_restarted(home: Path) -> None:
    async with working(home) as stage:
        await stage.worker.restart()
        await stage.worker.wait_for(State.READY)


@awaited
async def test_a_worker_is_stopped_while_it_loads(home: Path) -> None:
    async with working(home, "--load-s", "600") as stage:
        await stage.worker.start()
        await stage.worker.wait_for(State.LOADING)
        await stage.worker.stop()
        await stage.worker.wait_for(State.STOPPED)

        assert stage.heard(WorkerReady) == []


# ── READY ───────────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_health_check_alone_makes_no_worker_ready(home: Path) -> None:
    """An engine may answer it while its generation hangs or fails."""
    journal = home / "journal"
    async with working(home, "--answer-status", "500", "--journal", str(journal)) as stage:
        await stage.worker.start()
        await until(lambda: journal.exists() and asked(journal, "/v1/completions") > 1, "probes")

        assert stage.worker.state is State.LOADING
        assert stage.heard(WorkerReady) == []


def asked(journal: Path, path: str) -> int:
    """How often the double was asked for a path."""
    return journal.read_text().count(f'"{path}"')


@awaited
async def test_an_engine_that_never_gets_up_is_given_up_in_time(home: Path) -> None:
    """The error names the limit (R049)."""
    limits = Timeouts(load_s=0.3, cleanup_s=0.5)
    async with working(home, "--health-status", "503", timeouts=limits) as stage:
        await stage.worker.start()
        await stage.worker.wait_for(State.FAILED)
        error = stage.worker.error

        assert error
        assert error.public_details == {"timeout_seconds": 0.3, "worker": "m-0"}
        assert "not ready within 0.3 s: no answer to the health check yet" in error.message


# ── Ends that nobody asked for ──────────────────────────────────────────────────────────────────


@awaited
async def test_a_crashed_worker_starts_again_by_itself(home: Path) -> None:
    async with ready(home, restarts=TWICE) as stage:
        before = stage.pid
        os.kill(before, signal.SIGKILL)
        await stage.worker.wait_for(State.STARTING)
        await stage.worker.wait_for(State.READY)
        (exited,) = stage.heard(WorkerExited)
        (planned,) = stage.heard(WorkerRestartPlanned)

        assert (exited.cause, exited.status, exited.asked) == ("signal", "signal SIGKILL", False)
        assert (planned.starts, planned.allowed) == (1, 2)
        assert [event.unasked for event in stage.heard(WorkerStarted)] == [False, True]
        assert stage.pid != before
        assert stage.worker.view()["unasked_restarts"] == 1


@awaited
async def test_an_engine_that_ends_with_status_0_unasked_has_crashed(home: Path) -> None:
    async with ready(home) as stage:
        os.kill(stage.pid, signal.SIGTERM)
        await stage.worker.wait_for(State.FAILED)
        (exited,) = stage.heard(WorkerExited)

        assert (exited.cause, exited.status, exited.asked) == ("crashed", "exit status 0", False)


@awaited
async def test_a_worker_whose_guard_is_killed_starts_again(home: Path) -> None:
    async with ready(home, restarts=TWICE) as stage:
        assert stage.worker.life
        assert stage.worker.life.tree
        os.kill(stage.worker.life.tree.guard_pid, signal.SIGKILL)
        await stage.worker.wait_for(State.STARTING)
        await stage.worker.wait_for(State.READY)

        assert [event.cause for event in stage.heard(WorkerExited)] == ["guard_lost"]


@awaited
async def test_after_too_many_crashes_it_stays_failed_and_says_why(home: Path) -> None:
    async with working(home, command=FAILS, restarts=TWICE) as stage:
        await stage.worker.start()
        await stage.worker.wait_for(State.FAILED)
        worker = stage.worker

        assert len(stage.heard(WorkerStarted)) == 3
        assert worker.error
        assert worker.error.code == "WORKER_CRASHED"
        assert "gave up after 2 restarts within 300 s" in worker.reason
        assert "exit status 3" in worker.reason
        assert worker.view()["last_exit"] == "exit status 3"
        assert worker.view()["last_exit_code"] == 3


@awaited
async def test_the_reason_of_a_crash_has_the_engines_last_words(home: Path) -> None:
    for _ in range(5):
        async with working(home, command=FAILS) as stage:
            await stage.worker.start()
            await stage.worker.wait_for(State.FAILED)

            assert "it will not work" in stage.worker.reason


@awaited
async def test_an_operators_start_forgets_earlier_restarts(home: Path) -> None:
    async with working(home, command=FAILS, restarts=TWICE) as stage:
        for count in (3, 6):
            await stage.worker.start()
            await stage.worker.wait_for(State.FAILED)
            assert len(stage.heard(WorkerStarted)) == count


@awaited
async def test_a_program_that_is_not_there_is_not_tried_again(home: Path) -> None:
    """Starting again cannot heal it."""
    command = ["/nowhere/engine", "{socket}"]
    async with working(home, command=command, restarts=TWICE) as stage:
        await stage.worker.start()
        await stage.worker.wait_for(State.FAILED)

        assert stage.heard(WorkerStarted) == []
        assert stage.worker.counts.starts == 1
        assert stage.worker.error
        assert stage.worker.error.code == "WORKER_SPAWN_FAILED"


@awaited
async def test_a_pause_before_a_restart_ends_when_an_operator_starts_or_stops(home: Path) -> None:
    async with working(home, command=FAILS, restarts=PATIENT) as stage:
        await stage.worker.start()
        await until(lambda: stage.heard(WorkerRestartPlanned), "a restart to be planned")
        await stage.worker.wait_for(State.STARTING)
        assert stage.heard(WorkerRestartPlanned)[0].delay_s == 600

        await stage.worker.start()
        await until(lambda: len(stage.heard(WorkerStarted)) == 2, "the second start")
        await until(lambda: len(stage.heard(WorkerRestartPlanned)) == 2, "the second crash")
        await stage.worker.wait_for(State.STARTING)

        await stage.worker.stop()
        await stage.worker.wait_for(State.STOPPED)


@awaited
async def test_a_start_during_a_stop_follows_it(home: Path) -> None:
    limits = Timeouts(cleanup_s=0.3)
    async with ready(home, "--ignore-term", timeouts=limits) as stage:
        await stage.worker.stop(drain=False)
        assert stage.worker.state is State.STOPPING
        await stage.worker.start()
        await stage.worker.wait_for(State.READY)

        assert [event.unasked for event in stage.heard(WorkerStarted)] == [False, False]


# ── Requests ────────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_stop_waits_for_what_is_in_flight(home: Path) -> None:
    async with ready(home) as stage:
        worker = stage.worker
        worker.take()
        worker.take()
        assert worker.in_flight == 2
        await worker.stop()
        worker.give_back()
        assert worker.state is State.DRAINING
        assert stage.heard(WorkerExited) == []
        worker.give_back()
        await worker.wait_for(State.STOPPED)

        assert worker.in_flight == 0


@awaited
async def test_a_stop_waits_no_longer_than_its_limit(home: Path) -> None:
    async with ready(home, drain_s=0.1) as stage:
        stage.worker.take()
        await stage.worker.stop()
        await stage.worker.wait_for(State.STOPPED)


@awaited
async def test_a_hasty_stop_ends_the_draining(home: Path) -> None:
    async with ready(home, drain_s=600) as stage:
        stage.worker.take()
        await stage.worker.stop()
        assert stage.worker.state is State.DRAINING
        await stage.worker.stop(drain=False)
        await stage.worker.wait_for(State.STOPPED)


@awaited
async def test_a_request_learns_at_once_that_its_engine_ended(home: Path) -> None:
    async with ready(home) as stage:
        life = stage.worker.take()
        os.kill(stage.pid, signal.SIGKILL)
        with pytest.raises(EngineOver):
            async with life.until_over():
                await asyncio.Event().wait()
        exit_ = await life.over_within(5)

        assert exit_
        assert exit_.signal == signal.SIGKILL
        assert not life.was_asked


@awaited
async def test_a_request_learns_that_its_engine_was_stopped_on_purpose(home: Path) -> None:
    async with ready(home, drain_s=0) as stage:
        life = stage.worker.take()
        assert await life.over_within(0) is None

        async def request() -> None:
            async with life.until_over():
                await stage.worker.stop()
                await asyncio.Event().wait()

        with pytest.raises(EngineOver):
            await request()

        assert life.was_asked


@awaited
async def test_whoever_follows_a_worker_hears_each_state_before_the_world_does(home: Path) -> None:
    """A request that comes for what was announced finds the door as it is."""
    stage = Stage(home, {}, double())
    heard: list[tuple[str, int]] = []
    stage.worker.on_move = lambda worker: heard.append((worker.state, len(stage.moves)))
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(stage.worker.run(), name="worker")
        await stage.worker.start()
        await stage.worker.wait_for(State.READY)
        await stage.worker.stop()
        await stage.worker.wait_for(State.STOPPED)
        running.cancel()

    assert heard == [(state, count) for count, state in enumerate(stage.moves)]


# ── Engines that hang ───────────────────────────────────────────────────────────────────────────


@awaited
async def test_an_engine_that_hangs_is_ended_and_started_again(home: Path) -> None:
    """Its requests are told why, and the exit is not one that hive wished for (R051)."""
    async with ready(home, restarts=TWICE) as stage:
        life = stage.worker.life
        assert life
        assert life.pulse
        life.pulse._hung("it has requests and made no progress for 30 s")
        with pytest.raises(EngineOver):
            async with life.until_over():
                await asyncio.Event().wait()
        assert life.error
        assert life.error.code == "WORKER_HUNG"
        assert "made no progress for 30 s" in life.error.message
        await stage.worker.wait_for(State.STARTING)
        await stage.worker.wait_for(State.READY)

        assert [event.cause for event in stage.heard(WorkerExited)] == ["hung"]
        assert [event.unasked for event in stage.heard(WorkerStarted)] == [False, True]
        assert stage.worker.life is not life


@awaited
async def test_news_that_an_earlier_life_hung_ends_nothing(home: Path) -> None:
    async with ready(home) as stage:
        life = stage.worker.life
        assert life
        assert life.pulse
        await stage.worker.restart()
        await stage.worker.wait_for(State.LOADING)
        await stage.worker.wait_for(State.READY)
        life.pulse._hung("late news")
        await stage.worker.stop()  # handled after it

        assert stage.worker.life is not life
        assert "hung" not in [event.cause for event in stage.heard(WorkerExited)]
        assert not any("late news" in event.reason for event in stage.heard(WorkerMoved))


@awaited
async def test_the_hint_is_the_measured_load_time_while_it_is_on_its_way(home: Path) -> None:
    """None when waiting is no help (R030, R058)."""
    async with working(home, "--load-s", "0.1") as stage:
        worker = stage.worker
        assert worker.ready_in_s is None
        await worker.start()
        assert worker.ready_in_s == HINT_S
        await worker.wait_for(State.READY)
        assert worker.ready_in_s is None

        await worker.restart()
        await worker.wait_for(State.LOADING)
        assert worker.load_s
        assert worker.ready_in_s
        assert 0 < worker.ready_in_s <= max(0.5, worker.load_s)
        await worker.wait_for(State.READY)


# ── hive stops ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("action", ["start", "restart", "release"])
@awaited
async def test_a_worker_of_a_hive_that_stops_starts_no_more(home: Path, action: str) -> None:
    async with working(home) as stage:
        worker = stage.worker
        worker.retire()
        asked = {"start": worker.start, "restart": worker.restart, "release": worker.released}
        with pytest.raises(ServiceUnavailable) as caught:
            await asked[action]()

        assert (caught.value.status, caught.value.details["reason"]) == (503, "draining")
        assert (worker.state, stage.moves) == (State.STOPPED, [])


@awaited
async def test_a_start_that_was_asked_just_before_is_not_obeyed(home: Path) -> None:
    """It lies in the inbox while hive begins to stop."""
    stage = Stage(home, {}, double())
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(stage.worker.start(), name="start")
        await until(stage.worker._inbox.qsize, "the start to be asked")
        stage.worker.retire()
        running = tasks.create_task(stage.worker.run(), name="worker")
        await asking
        running.cancel()

    assert (stage.worker.state, stage.moves) == (State.STOPPED, [])


@awaited
async def test_a_restart_that_was_asked_just_before_becomes_a_stop(home: Path) -> None:
    async with ready(home, restarts=TWICE) as stage:
        await stage.worker.restart()
        stage.worker.retire()
        await stage.worker.wait_for(State.STOPPED)

        assert stage.moves[3:] == ["DRAINING", "STOPPING", "STOPPED"]


@awaited
async def test_a_crash_while_hive_stops_is_followed_by_no_start(home: Path) -> None:
    async with ready(home, restarts=TWICE) as stage:
        stage.worker.retire()
        os.kill(stage.pid, signal.SIGKILL)
        await stage.worker.wait_for(State.STOPPED)

        assert stage.heard(WorkerRestartPlanned) == []
        assert len(stage.heard(WorkerStarted)) == 1


# ── What nobody foresaw ─────────────────────────────────────────────────────────────────────────


class Unforeseen(Exception):
    """A mistake in hive itself."""


def fails(*_: object) -> NoReturn:
    raise Unforeseen


class Unprobed(CommandEngine):
    """An engine whose probe is broken in hive."""

    async def probe(self, client: EngineClient) -> None:
        fails(client)


class Unlaunched(CommandEngine):
    """An engine that hive cannot describe."""

    def launch(
        self, place: Place, devices: tuple[str, ...], visible: str | None, total_bytes: int
    ) -> Launch:
        fails(place, devices, visible, total_bytes)


class Unaudited(Ledger):
    """A ledger that cannot tell what is left."""

    async def audit(self, entry: Entry) -> NoReturn:
        fails(entry)


def unforeseen(stage: Stage) -> bool:
    """Whether it is said as what it is: hive's own failure."""
    error = stage.worker.error
    return (
        isinstance(error, InternalError)
        and "unforeseen Unforeseen" in error.message
        and stage.worker.view()["error"] == "INTERNAL_ERROR"
    )


@awaited
async def test_what_nobody_foresaw_before_a_start_fails_this_worker(home: Path) -> None:
    """Starting again would not heal it (R154)."""
    async with working(home, preflight=fails, restarts=TWICE) as stage:
        await stage.worker.start()
        await stage.worker.wait_for(State.FAILED)

        assert stage.moves == ["STARTING", "STOPPING", "FAILED"]
        assert unforeseen(stage)
        assert stage.heard(WorkerRestartPlanned) == []


@pytest.mark.parametrize("kind", [Unlaunched, Unprobed])
@awaited
async def test_what_nobody_foresaw_during_a_start_fails_this_worker_and_leaves_nothing(
    home: Path, kind: type[CommandEngine]
) -> None:
    command = Model.model_validate({"engine": "command", "device": "cpu", "command": double()})
    async with working(home, engine=kind("m", command), restarts=TWICE) as stage:
        await stage.worker.start()
        await stage.worker.wait_for(State.FAILED)

        assert stage.moves[-2:] == ["STOPPING", "FAILED"]
        assert unforeseen(stage)
        assert stage.worker.life is None
        assert list(stage.ledger.directory.iterdir()) == []
        stage.worker.plan = replace(stage.worker.plan, engine=CommandEngine("m", command))
        await stage.worker.start()
        await stage.worker.wait_for(State.READY)
        assert stage.worker.error is None


@pytest.mark.parametrize("asked", [True, False], ids=["a stop", "a crash"])
@awaited
async def test_what_nobody_foresaw_during_an_end_ends_the_tree_all_the_same(
    home: Path, asked: bool
) -> None:
    async with ready(home, "--core", restarts=TWICE) as stage:
        life = stage.worker.life
        assert life
        assert life.tree
        members = {life.tree.guard_pid} | {
            process.pid for process in guard.descendants(life.tree.guard_pid)
        }
        stage.worker._ledger = Unaudited(stage.ledger.directory, stage.events.append)
        if asked:
            await stage.worker.stop()
        else:
            os.kill(stage.pid, signal.SIGKILL)
        await stage.worker.wait_for(State.STOPPED, State.FAILED)

        assert stage.worker.state is (State.STOPPED if asked else State.FAILED)
        assert unforeseen(stage)
        assert stage.worker.life is None
        assert not any(guard.look_at(pid) for pid in members)
        assert not life.wires.opened


@awaited
async def test_what_nobody_foresaw_lets_the_worker_be_started_again(home: Path) -> None:
    async with working(home, preflight=fails) as stage:
        for count in (1, 2):
            await stage.worker.start()
            await stage.worker.wait_for(State.STOPPING)
            await stage.worker.wait_for(State.FAILED)
            assert stage.moves.count("FAILED") == count
        stage.worker.plan = replace(stage.worker.plan, preflight=lambda _: None)
        await stage.worker.start()
        await stage.worker.wait_for(State.READY)

"""All workers of one hive: what each is planned to be, and which one takes a request."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hive.devices.nvml import Device, Driver
from hive.devices.watch import Devices
from hive.errors import HiveError, ModelNotFound, NotFound
from hive.events import Announcer, Event, WorkerMoved, WorkerStarted
from hive.policy.admission import Ticket
from hive.policy.lifecycle import AT_REST, State
from hive.settings import Settings
from hive.workers.admission import Permit
from hive.workers.command import CommandEngine
from hive.workers.fleet import Fleet
from hive.workers.ledger import Ledger
from hive.workers.preflight import prepare_directories
from hive.workers.vllm import VllmEngine
from hive.workers.worker import HINT_S, Worker
from tests.doubles import engine_command, lmcache_command
from tests.patience import awaited, short_directory, until
from tests.workers.standing import admitted, standing

COMMAND = engine_command("--uds", "{socket}", "--model", "{model}")
CPU = {"engine": "command", "device": "cpu", "command": COMMAND, "probe": "completion"}
TWICE = {**CPU, "device": None, "replicas": ["cpu", "cpu"]}
UUIDS = ("GPU-a", "GPU-b", "GPU-c")


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


def fleet_of(
    home: Path, models: dict[str, Any], announcer: Announcer | None = None, **sections: Any
) -> Fleet:
    server = {"state_dir": home / "s", "runtime_dir": home / "r", "drain_s": 7}
    settings = Settings.model_validate({"server": server, "models": models, **sections})
    prepare_directories(settings)
    announcer = announcer or Announcer()
    resolved = {f"cuda:{n}": Device(n, uuid, "a GPU") for n, uuid in enumerate(UUIDS)}
    devices = Devices(Driver(), resolved, announcer)
    ledger = Ledger(home / "s" / "ledger", announcer.announce)
    return Fleet(settings, devices, ledger, announcer)


async def let_in(fleet: Fleet, model: str = "m", pinned: str | None = None) -> Permit:
    return await admitted(fleet.door(model), Ticket(pinned=pinned))


async def refused(fleet: Fleet, model: str = "m", pinned: str | None = None) -> HiveError:
    with pytest.raises(HiveError) as caught:
        await let_in(fleet, model, pinned)
    return caught.value


# ── Plans ───────────────────────────────────────────────────────────────────────────────────────


def test_each_replica_is_a_worker_with_its_own_id_and_devices(home: Path) -> None:
    model = {"engine": "vllm", "path": "/m", "replicas": ["cuda:0", ["cuda:1", "cuda:2"]]}
    fleet = fleet_of(home, {"big": model, "small": CPU})
    plans = {worker_id: worker.plan for worker_id, worker in fleet.workers.items()}

    assert {i: (p.model, p.devices, p.visible) for i, p in plans.items()} == {
        "big-0": ("big", ("cuda:0",), "GPU-a"),
        "big-1": ("big", ("cuda:1", "cuda:2"), "GPU-b,GPU-c"),
        "small-0": ("small", ("cpu",), None),
    }
    assert isinstance(plans["big-0"].engine, VllmEngine)
    assert isinstance(plans["small-0"].engine, CommandEngine)


def test_a_plan_carries_the_settings_and_the_models_own_limits(home: Path) -> None:
    models = {"m": {**CPU, "timeouts": {"load_s": 11}}, "other": CPU}
    fleet = fleet_of(home, models, restarts={"starts": 2, "window_s": 60})
    plan = fleet.worker("m-0").plan

    assert (plan.timeouts.load_s, fleet.worker("other-0").plan.timeouts.load_s) == (11, 300)
    assert (plan.restarts.starts, plan.restarts.window_s, plan.drain_s) == (2, 60, 7)
    assert plan.log == home / "s" / "logs" / "m-0.log"


def test_a_directory_that_is_still_there_is_never_used_again(home: Path) -> None:
    """Of a tree that is LOST, or of a hive that was killed."""
    fleet = fleet_of(home, {"m": CPU})
    (home / "r" / "w" / "1").mkdir()
    (home / "r" / "w" / "2").mkdir()
    homes = [fleet._new_place(home / "log").home.name for _ in range(2)]

    assert homes == ["3", "4"]


# ── Which worker ────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def in_states(fleet: Fleet, *states: State) -> AsyncIterator[list[Worker]]:
    """The workers, put into these states by the test: none of them runs."""
    workers = list(fleet.workers.values())
    async with AsyncExitStack() as stack:
        for worker, state in zip(workers, states, strict=True):
            await stack.enter_async_context(standing(worker, state))
        yield workers


@awaited
async def test_the_ready_worker_with_the_fewest_requests_is_chosen(home: Path) -> None:
    fleet = fleet_of(home, {"m": {**TWICE, "replicas": ["cpu"] * 4}})
    async with in_states(fleet, State.READY, State.READY, State.READY, State.LOADING) as workers:
        held = [await let_in(fleet, pinned=f"m-{number}") for number in (0, 0, 1, 2, 2, 2)]
        assert [worker.in_flight for worker in workers] == [2, 1, 3, 0]

        assert (await let_in(fleet)).worker.id == "m-1"
        held[0].finished()
        assert (await let_in(fleet)).worker.id == "m-0"


@awaited
async def test_a_model_that_is_not_configured_is_answered_with_those_that_are(home: Path) -> None:
    fleet = fleet_of(home, {"b": CPU, "a": CPU})
    with pytest.raises(ModelNotFound) as caught:
        fleet.door("gpt-4")
    error = caught.value

    assert error.status == 404
    assert error.param == "model"
    assert error.public_details["available_models"] == ["a", "b"]
    assert "a, b" in error.message
    assert "gpt-4" not in error.message


def test_a_worker_that_does_not_exist_is_answered_with_those_that_do(home: Path) -> None:
    with pytest.raises(NotFound) as caught:
        fleet_of(home, {"m": TWICE}).worker("m-2")

    assert caught.value.details["allowed"] == ["m-0", "m-1"]


@awaited
async def test_each_model_has_the_slots_and_places_that_are_configured(home: Path) -> None:
    """(R054, R055)"""
    fleet = fleet_of(home, {"a": {**CPU, "max_concurrent": 3, "queue_depth": 0}, "b": CPU})
    room, other = fleet.door("a").room, fleet.door("b").room

    assert (room.slots, room.depth) == (3, 0)
    assert (other.slots, other.depth) == (64, 32)
    assert set(room.held) == {"a-0"}


@pytest.mark.parametrize(
    ("states", "reason", "hint_s"),
    [
        ([State.LOADING, State.FAILED], "loading", HINT_S),
        ([State.STARTING, State.STOPPED], "loading", HINT_S),
        ([State.DRAINING, State.STOPPED], "draining", 30),
        ([State.STOPPED, State.STOPPED], "worker_stopped", None),
        ([State.STOPPED, State.STOPPING], "worker_stopped", None),
        ([State.FAILED, State.STOPPED], "worker_failed", None),
        ([State.FAILED, State.LOST], "worker_failed", None),
        ([State.QUARANTINED, State.FAILED], "quarantined", None),
        ([State.LOADING, State.QUARANTINED], "loading", HINT_S),
    ],
)
@awaited
async def test_without_a_ready_worker_the_reason_and_the_time_to_come_back_are_told(
    home: Path, states: list[State], reason: str, hint_s: float | None
) -> None:
    """Only who may come back without an operator's help gets a time (C12)."""
    fleet = fleet_of(home, {"m": TWICE})
    async with in_states(fleet, *states):
        error = await refused(fleet)

    assert error.status == 503
    assert error.details["reason"] == reason
    assert error.details["model"] == "m"
    assert error.retry_after_s == hint_s
    if reason == "quarantined":
        assert error.code == "GPU_QUARANTINED"
        return
    assert error.details["state"] == states[0]
    assert error.retryable == (hint_s is not None)
    assert hint_s or "hive worker" in error.suggested_action


@awaited
async def test_the_hint_while_loading_is_the_soonest_of_the_workers(home: Path) -> None:
    fleet = fleet_of(home, {"m": TWICE})
    async with in_states(fleet, State.STARTING, State.STARTING) as (slow, quick):
        slow.load_s, quick.load_s = 20.0, 4.0

        assert (await refused(fleet)).retry_after_s == 4.0


@awaited
async def test_a_crashed_worker_that_will_start_again_counts_as_loading(home: Path) -> None:
    fleet = fleet_of(home, {"m": CPU})
    async with in_states(fleet, State.STOPPING) as (worker,):
        worker._wanted_up = True

        assert (await refused(fleet)).details["reason"] == "loading"


@awaited
async def test_a_hive_that_stops_takes_no_request_even_for_a_ready_worker(home: Path) -> None:
    fleet = fleet_of(home, {"m": CPU})
    async with in_states(fleet, State.READY):
        assert fleet.can_serve
        fleet.refuse()

        assert not fleet.can_serve
        for pinned in (None, "m-0"):
            error = await refused(fleet, pinned=pinned)
            assert error.details["reason"] == "draining"
            assert "hive is stopping" in error.message


@awaited
async def test_a_request_for_one_worker_is_never_given_to_another(home: Path) -> None:
    """A stored response lives in the engine that made it."""
    fleet = fleet_of(home, {"m": TWICE})
    async with in_states(fleet, State.READY, State.LOADING):
        for _ in range(3):
            assert (await let_in(fleet, pinned="m-0")).worker.id == "m-0"
        assert (await refused(fleet, pinned="m-1")).details["reason"] == "loading"


@awaited
async def test_hive_can_serve_as_long_as_one_model_can(home: Path) -> None:
    fleet = fleet_of(home, {"a": CPU, "b": CPU})
    assert not fleet.can_serve
    async with in_states(fleet, State.FAILED, State.READY):
        assert fleet.can_serve
    async with in_states(fleet, State.FAILED, State.DRAINING):
        assert not fleet.can_serve


# ── All of them together ────────────────────────────────────────────────────────────────────────


@awaited
async def test_workers_start_together_share_the_requests_and_stop_together(home: Path) -> None:
    fleet = fleet_of(home, {"m": TWICE})
    async with fleet.running():
        await fleet.start()
        for worker in fleet.workers.values():
            await worker.wait_for(State.READY, State.FAILED)
        assert fleet.can_serve
        first, second = await let_in(fleet), await let_in(fleet)
        assert {first.worker.id, second.worker.id} == {"m-0", "m-1"}
        first.finished()
        second.finished()
        await fleet.stop(drain=True)
        assert {worker.state for worker in fleet.workers.values()} == {State.STOPPED}

    assert list((home / "r" / "w").iterdir()) == []


@awaited
async def test_whoever_leaves_a_running_fleet_leaves_no_engine_behind(home: Path) -> None:
    fleet = fleet_of(home, {"m": CPU})
    async with fleet.running():
        await fleet.start()
        await fleet.worker("m-0").wait_for(State.LOADING, State.READY)

    assert fleet.worker("m-0").state is State.STOPPED
    assert list((home / "r" / "w").iterdir()) == []


@awaited
async def test_what_nobody_foresaw_in_one_worker_does_not_end_the_others(home: Path) -> None:
    """(R154)"""

    def fails(_devices: object) -> None:
        raise ZeroDivisionError

    fleet = fleet_of(home, {"bad": CPU, "good": CPU})
    bad, good = fleet.worker("bad-0"), fleet.worker("good-0")
    bad.plan = replace(bad.plan, preflight=fails)
    async with fleet.running():
        await fleet.start()
        await bad.wait_for(State.FAILED)
        await good.wait_for(State.READY)
        assert bad.error
        assert bad.error.code == "INTERNAL_ERROR"
        assert (await refused(fleet, "bad")).details["reason"] == "worker_failed"
        (await let_in(fleet, "good")).finished()


@awaited
async def test_a_fleet_that_stops_starts_none_of_its_workers(home: Path) -> None:
    """Whoever asks, and whatever the worker does."""
    fleet = fleet_of(home, {"m": {**TWICE, "replicas": ["cpu"] * 3}})
    async with in_states(fleet, State.STOPPED, State.FAILED, State.QUARANTINED) as workers:
        fleet.refuse()
        for worker in workers:
            ask = worker.released if worker.state is State.QUARANTINED else worker.start
            with pytest.raises(HiveError) as caught:
                await ask()
            assert (caught.value.status, caught.value.details["reason"]) == (503, "draining")
        with pytest.raises(HiveError) as caught:
            await fleet.release_worker(workers[2])
        assert caught.value.details["reason"] == "draining"


# ── The LMCache server beside them ──────────────────────────────────────────────────────────────

BESIDE = ("--kv", "{kv}", "--kv-model", "{kv_path}", "--kv-chunk", "{kv_chunk}")
KEPT = {**CPU, "command": [*COMMAND, *BESIDE], "windows": True}
SMALL = {"kv_ram_gib": 0.1, "kv_tier_gib": 0.01}
QUICK = {"backoff_s": 0.01, "backoff_max_s": 0.05}


def cached(
    home: Path, *flags: str, announcer: Announcer | None = None, **models: dict[str, Any]
) -> Fleet:
    """A fleet whose LMCache is the double with these flags."""
    windows = {**SMALL, "kv_server": lmcache_command(*flags)}
    given = models or {"m": KEPT}
    timeouts = {"cleanup_s": 1}
    return fleet_of(
        home, given, announcer, windows=windows, timeouts=timeouts, restarts={**QUICK, "starts": 9}
    )


@asynccontextmanager
async def up(fleet: Fleet) -> AsyncIterator[Worker]:
    """All of it READY; the LMCache server."""
    assert fleet.cache is not None
    async with fleet.running():
        await fleet.start()
        for worker in fleet.everyone():
            await worker.wait_for(State.READY, State.FAILED)
            assert worker.state is State.READY, worker.reason
        yield fleet.cache


def kill(worker: Worker) -> None:
    assert worker.life
    assert worker.life.tree
    os.kill(worker.life.tree.pid, signal.SIGKILL)


def test_without_windows_there_is_no_lmcache(home: Path) -> None:
    fleet = fleet_of(home, {"m": CPU})

    assert (fleet.site, fleet.cache, fleet.cache_is_up) == (None, None, False)
    assert fleet.everyone() == [fleet.worker("m-0")]
    assert fleet.cache_view(fleet.worker("m-0")) is None
    assert not fleet.has_cache(fleet.worker("m-0"))


def test_lmcache_is_a_worker_of_no_model_and_no_gpu(home: Path) -> None:
    fleet = cached(home, a=KEPT, b=CPU)
    assert fleet.cache is not None
    plan = fleet.cache.plan

    assert [worker.id for worker in fleet.everyone()] == ["lmcache", "a-0", "b-0"]
    assert fleet.worker("lmcache") is fleet.cache
    assert (plan.model, plan.devices, plan.visible, plan.drain_s) == ("", ("cpu",), None, 0)
    assert plan.log == home / "s" / "logs" / "lmcache.log"
    assert plan.beside is None
    assert fleet.worker("a-0").plan.beside is not None
    assert fleet.worker("b-0").plan.beside is None
    assert set(fleet.doors) == {"a", "b"}
    with pytest.raises(NotFound) as caught:
        fleet.worker("c-0")
    assert caught.value.details["allowed"] == ["a-0", "b-0", "lmcache"]


@awaited
async def test_an_engine_starts_when_lmcache_is_ready_and_others_do_not_wait(home: Path) -> None:
    told: list[Event] = []
    announcer = Announcer()
    announcer.listen(told.append)
    fleet = cached(home, "--load-s", "1", announcer=announcer, a=KEPT, b=CPU)
    async with up(fleet) as cache:
        started = [event.worker for event in told if isinstance(event, WorkerStarted)]
        ready = [e.worker for e in told if isinstance(e, WorkerMoved) and e.new == State.READY]
        assert sorted(started) == ["a-0", "b-0", "lmcache"]
        assert started.index("lmcache") < started.index("a-0")
        assert ready.index("lmcache") < ready.index("a-0")
        begun = next(n for n, e in enumerate(told) if getattr(e, "worker", "") == "a-0")
        assert begun < told.index(WorkerMoved("lmcache", "", "LOADING", "READY", cache.reason))
        a, b = fleet.worker("a-0"), fleet.worker("b-0")
        assert (fleet.cache_view(a), fleet.cache_view(b)) == ("ok", None)
        assert fleet.has_cache(a)
        assert fleet.cache_is_up
        assert cache.life is not None
        assert cache.life.tree is not None
        assert cache.life.tree.pid in fleet.pids()


@awaited
async def test_engines_end_before_their_lmcache(home: Path) -> None:
    """What they still have is stored then."""
    told: list[Event] = []
    announcer = Announcer()
    announcer.listen(told.append)
    fleet = cached(home, announcer=announcer)
    async with up(fleet):
        pass
    ended = [e.worker for e in told if isinstance(e, WorkerMoved) and e.new == State.STOPPED]

    assert ended == ["m-0", "lmcache"]
    assert list((home / "r" / "w").iterdir()) == []


@awaited
async def test_an_idle_engine_whose_lmcache_was_started_anew_is_restarted(home: Path) -> None:
    """It would never find it again by itself (LMCache #4642). One at a time."""
    fleet = cached(home, a={**KEPT, "device": None, "replicas": ["cpu", "cpu"]}, b=CPU)
    async with up(fleet) as cache:
        kill(cache)
        await cache.wait_for(State.STOPPING, State.STARTING)
        assert fleet.cache_view(fleet.worker("a-0")) == "lost"
        both = [fleet.worker("a-0"), fleet.worker("a-1")]
        await until(lambda: all(fleet.cache_view(one) == "ok" for one in both), "their restart")

        assert cache.counts.starts == 2
        assert [worker.counts.starts for worker in both] == [2, 2]
        assert [worker.counts.unasked for worker in both] == [(), ()]
        assert fleet.worker("b-0").counts.starts == 1


@awaited
async def test_an_engine_that_works_goes_on_and_is_restarted_when_it_is_done(home: Path) -> None:
    fleet = cached(home)
    async with up(fleet) as cache:
        worker = fleet.worker("m-0")
        permit = await let_in(fleet)
        for starts in (2, 3):
            kill(cache)
            await until(lambda: cache.counts.starts == starts, "its restart")  # noqa: B023
            await cache.wait_for(State.READY)
            assert (worker.state, worker.counts.starts) == (State.READY, 1)
            assert fleet.cache_view(worker) == "lost"
            assert not fleet.has_cache(worker)
        permit.finished()
        await until(lambda: fleet.has_cache(worker), "the engine's restart")

        assert worker.counts.starts == 2


@awaited
async def test_a_fleet_that_stops_restarts_nothing_for_its_cache(home: Path) -> None:
    fleet = cached(home)
    async with up(fleet) as cache:
        permit = await let_in(fleet)
        kill(cache)
        await until(lambda: cache.counts.starts == 2, "its restart")
        await cache.wait_for(State.READY)
        fleet.refuse()
        permit.finished()
        await fleet.stop(drain=True)

        assert fleet.worker("m-0").counts.starts == 1
        assert {worker.state for worker in fleet.everyone()} == {State.STOPPED}


@pytest.fixture
def broken(home: Path) -> Path:
    """An LMCache that ends at once for as long as this file is there."""
    (home / "broken").touch()
    return home / "broken"


def failing(home: Path, broken: Path, **restarts: Any) -> Fleet:
    script = f'if [ -e {broken} ]; then exit 1; fi; exec "$@"'
    windows = {**SMALL, "kv_server": ["sh", "-c", script, "sh", *lmcache_command()]}
    return fleet_of(home, {"m": KEPT}, windows=windows, restarts={**QUICK, **restarts})


@awaited
async def test_without_lmcache_an_engines_start_fails_and_is_tried_again(
    home: Path, broken: Path
) -> None:
    """As often as the restart policy allows, and no more."""
    fleet = failing(home, broken, starts=2)
    async with fleet.running():
        await fleet.start()
        worker = fleet.worker("m-0")
        await worker.wait_for(State.FAILED)
        assert worker.error is not None
        assert worker.error.code == "KV_SERVER_UNREACHABLE"
        assert "The LMCache server is FAILED" in worker.error.message
        assert "hive worker start lmcache" in worker.error.suggested_action
        assert len(worker.counts.unasked) == 2
        assert worker.counts.starts == 0
        assert fleet.cache_view(worker) == "none"
        assert (await refused(fleet)).details["reason"] == "worker_failed"


@awaited
async def test_an_engine_is_there_again_when_lmcache_is(home: Path, broken: Path) -> None:
    """Nobody has to start it: it is only tried again."""
    fleet = failing(home, broken, starts=0)
    worker, cache = fleet.worker("m-0"), fleet.cache
    assert cache is not None
    policy = replace(worker.plan.restarts, starts=1000)
    worker.plan = replace(worker.plan, restarts=policy)
    async with fleet.running():
        await fleet.start()
        await cache.wait_for(State.FAILED)
        await until(lambda: worker.counts.unasked, "the engine's start to fail")
        broken.unlink()
        await cache.start()
        await worker.wait_for(State.READY, *AT_REST)

        assert (worker.state, worker.counts.starts) == (State.READY, 1)
        assert fleet.cache_view(worker) == "ok"


@awaited
async def test_an_lmcache_that_does_not_become_ready_is_waited_for_so_long(home: Path) -> None:
    timeouts = {"load_s": 0.3}
    windows = {**SMALL, "kv_server": lmcache_command("--health-status", "503")}
    fleet = fleet_of(
        home,
        {"m": {**KEPT, "timeouts": timeouts}},
        windows=windows,
        restarts={**QUICK, "starts": 1},
    )
    async with fleet.running():
        await fleet.start()
        worker = fleet.worker("m-0")
        await worker.wait_for(State.FAILED)

        assert worker.error is not None
        assert worker.error.code == "KV_SERVER_UNREACHABLE"
        assert worker.counts.starts == 0


@awaited
async def test_an_lmcache_that_cannot_even_be_started_is_not_waited_for(home: Path) -> None:
    """Its program has gone, say: it is FAILED, and will not come up by itself."""
    windows = {**SMALL, "kv_server": ["no-such-program"]}
    fleet = fleet_of(home, {"m": KEPT}, windows=windows, restarts={**QUICK, "starts": 1})
    assert fleet.cache is not None
    async with fleet.running():
        await fleet.start()
        await fleet.cache.wait_for(State.FAILED)
        worker = fleet.worker("m-0")
        async with asyncio.timeout(2):
            await worker.wait_for(State.FAILED)

        assert worker.error is not None
        assert worker.error.code == "KV_SERVER_UNREACHABLE"

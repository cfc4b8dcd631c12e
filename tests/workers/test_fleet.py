"""All workers of one hive: what each is planned to be, and which one takes a request."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hive.devices.nvml import Device, Driver
from hive.devices.watch import Devices
from hive.errors import ModelNotFound, NotFound, ServiceUnavailable
from hive.events import Announcer
from hive.policy.lifecycle import State
from hive.settings import Settings
from hive.workers.command import CommandEngine
from hive.workers.fleet import Fleet
from hive.workers.ledger import Ledger
from hive.workers.preflight import prepare_directories
from hive.workers.vllm import VllmEngine
from hive.workers.worker import HINT_S, Worker
from tests.doubles import engine_command
from tests.patience import awaited, short_directory

COMMAND = engine_command("--uds", "{socket}", "--model", "{model}")
CPU = {"engine": "command", "device": "cpu", "command": COMMAND, "probe": "completion"}
TWICE = {**CPU, "device": None, "replicas": ["cpu", "cpu"]}
UUIDS = ("GPU-a", "GPU-b", "GPU-c")


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


def fleet_of(home: Path, models: dict[str, Any], **sections: Any) -> Fleet:
    server = {"state_dir": home / "s", "runtime_dir": home / "r", "drain_s": 7}
    settings = Settings.model_validate({"server": server, "models": models, **sections})
    prepare_directories(settings)
    announcer = Announcer()
    resolved = {f"cuda:{n}": Device(n, uuid, "a GPU") for n, uuid in enumerate(UUIDS)}
    devices = Devices(Driver(), resolved, announcer)
    ledger = Ledger(home / "s" / "ledger", announcer.announce)
    return Fleet(settings, devices, ledger, announcer)


def refused(fleet: Fleet, model: str = "m") -> ServiceUnavailable:
    with pytest.raises(ServiceUnavailable) as caught:
        fleet.choose(model)
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


def in_states(fleet: Fleet, *states: State) -> list[Worker]:
    """The workers, put into these states by the test: none of them runs."""
    workers = list(fleet.workers.values())
    for worker, state in zip(workers, states, strict=True):
        worker.state = state
    return workers


def test_the_ready_worker_with_the_fewest_requests_is_chosen(home: Path) -> None:
    fleet = fleet_of(home, {"m": {**TWICE, "replicas": ["cpu"] * 4}})
    workers = in_states(fleet, State.READY, State.READY, State.READY, State.LOADING)
    for worker, count in zip(workers, (2, 1, 3, 0), strict=True):
        worker.in_flight = count

    assert fleet.choose("m").id == "m-1"


def test_a_model_that_is_not_configured_is_answered_with_those_that_are(home: Path) -> None:
    fleet = fleet_of(home, {"b": CPU, "a": CPU})
    with pytest.raises(ModelNotFound) as caught:
        fleet.choose("gpt-4")
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
    ],
)
def test_without_a_ready_worker_the_reason_and_the_time_to_come_back_are_told(
    home: Path, states: list[State], reason: str, hint_s: float | None
) -> None:
    """Only who may come back without an operator's help gets a time (C12)."""
    fleet = fleet_of(home, {"m": TWICE})
    in_states(fleet, *states)
    error = refused(fleet)

    assert error.status == 503
    assert error.details["reason"] == reason
    assert error.details["model"] == "m"
    assert error.details["state"] == states[0]
    assert error.retry_after_s == hint_s
    assert error.retryable == (hint_s is not None)
    assert hint_s or "hive worker" in error.suggested_action


def test_the_hint_while_loading_is_the_soonest_of_the_workers(home: Path) -> None:
    fleet = fleet_of(home, {"m": TWICE})
    slow, quick = in_states(fleet, State.STARTING, State.STARTING)
    slow.load_s, quick.load_s = 20.0, 4.0

    assert refused(fleet).retry_after_s == 4.0


def test_a_crashed_worker_that_will_start_again_counts_as_loading(home: Path) -> None:
    fleet = fleet_of(home, {"m": CPU})
    (worker,) = in_states(fleet, State.STOPPING)
    worker._wanted_up = True

    assert refused(fleet).details["reason"] == "loading"


def test_a_hive_that_stops_takes_no_request_even_for_a_ready_worker(home: Path) -> None:
    fleet = fleet_of(home, {"m": CPU})
    (worker,) = in_states(fleet, State.READY)
    assert fleet.can_serve
    fleet.is_draining = True
    error = refused(fleet)

    assert not fleet.can_serve
    assert error.details["reason"] == "draining"
    assert "hive is stopping" in error.message
    with pytest.raises(ServiceUnavailable, match="hive is stopping"):
        fleet.must_be_ready(worker)


def test_a_request_for_one_worker_is_never_given_to_another(home: Path) -> None:
    fleet = fleet_of(home, {"m": TWICE})
    ready, loading = in_states(fleet, State.READY, State.LOADING)

    assert fleet.must_be_ready(ready) is ready
    with pytest.raises(ServiceUnavailable) as caught:
        fleet.must_be_ready(loading)
    assert caught.value.details["reason"] == "loading"


def test_hive_can_serve_as_long_as_one_model_can(home: Path) -> None:
    fleet = fleet_of(home, {"a": CPU, "b": CPU})
    assert not fleet.can_serve
    in_states(fleet, State.FAILED, State.READY)
    assert fleet.can_serve
    in_states(fleet, State.FAILED, State.DRAINING)
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
        first = fleet.choose("m")
        with first.lease():
            second = fleet.choose("m")
        assert {first.id, second.id} == {"m-0", "m-1"}
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

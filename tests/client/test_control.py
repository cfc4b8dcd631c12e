"""The control plane's resilience: repeated, answered otherwise and marked so, or told as it failed."""

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Any

import aiohttp
import pytest

from hive.client import control
from hive.client.control import CACHE, LIVE, ControlPlane, Result
from hive.client.rendering import workflow
from hive.client.repeating import tried_of
from hive.errors import (
    DaemonUnreachable,
    EngineUnreachable,
    Forbidden,
    HiveError,
    NotFound,
    OperationTimeout,
    RateLimited,
    StorageCorrupted,
    StorageWriteFailed,
)
from hive.policy.control import OPERATIONS, Operation
from hive.policy.retries import RETRIES, RetryPolicy
from tests.patience import awaited, until

READING = "window_list"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers of calls, a hundredth of the pauses."""
    for name in ("control.read", "control.default", "engine_timeout", "connect"):
        policy = RETRIES[name]
        soon = RetryPolicy(policy.calls, tuple(s / 100 for s in policy.delays))
        monkeypatch.setitem(RETRIES, name, soon)


@pytest.fixture
def plane() -> ControlPlane:
    return ControlPlane(chance=lambda: 0.0)


class Daemon:
    """Answers with what it is told, in this order; the last one for good."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.limits: list[float] = []

    @property
    def calls(self) -> int:
        return len(self.limits)

    async def __call__(self, limit_s: float) -> Any:
        self.limits.append(limit_s)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def told(error: HiveError) -> HiveError:
    """As the daemon says it."""
    error.details = {**error.details, "http_status": error.status}
    return error


def nobody() -> DaemonUnreachable:
    """Nothing was sent."""
    error = DaemonUnreachable()
    error.__cause__ = aiohttp.ClientConnectorError(
        connection_key=None,  # type: ignore[arg-type]
        os_error=ConnectionRefusedError(),
    )
    return error


def lost() -> DaemonUnreachable:
    """It was sent, and no answer came."""
    error = DaemonUnreachable()
    error.__cause__ = aiohttp.ServerDisconnectedError()
    return error


async def fails(work: Awaitable[Result]) -> HiveError:
    with pytest.raises(HiveError) as caught:
        await work
    return caught.value


@awaited
async def test_what_works_is_given_as_it_is(plane: ControlPlane) -> None:
    result = await plane.run(READING, Daemon({"windows": []}), "key")
    assert (result.data, result.source, result.is_degraded) == ({"windows": []}, LIVE, False)
    assert plane.counts[READING].told() == {
        "total_calls": 1,
        "total_errors": 0,
        "transient_errors": 0,
        "permanent_errors": 0,
        "retries_exhausted": 0,
        "error_rate": 0.0,
    }


@pytest.mark.parametrize(
    ("name", "error", "calls"),
    [
        (READING, told(EngineUnreachable()), 6),
        (READING, lost(), 6),
        (READING, nobody(), 3),
        (READING, told(OperationTimeout()), 2),
        (READING, told(StorageCorrupted()), 1),
        (READING, told(Forbidden()), 1),
        ("window_freeze", told(EngineUnreachable()), 4),
        ("window_freeze", nobody(), 3),
        ("window_freeze", lost(), 1),
        ("nothing of the kind", told(EngineUnreachable()), 4),
        ("chat", told(EngineUnreachable()), 1),
        (READING, told(StorageWriteFailed()), 1),
        ("window_freeze", told(StorageWriteFailed()), 1),
        ("chat", nobody(), 3),
    ],
)
@awaited
async def test_each_operation_is_tried_by_its_row(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture, name: str, error: HiveError, calls: int
) -> None:
    """R160, R163-R165, R173-R177, R211, C1: each repetition a warning, the end of them an error.

    What the daemon has tried itself is not tried again (R101).
    """
    daemon = Daemon(error)
    with caplog.at_level(logging.WARNING, "hive.client.control"):
        raised = await fails(plane.run(name, daemon, "key"))
    assert raised is error
    assert daemon.calls == calls == tried_of(raised).calls
    again = [line for line in caplog.messages if line.startswith(f"{name} failed, ")]
    assert [line.split(",")[1].split()[0] for line in again] == [
        f"{at}/{calls - 1}" for at in range(1, calls)
    ]
    ended = [one for one in caplog.records if "given up after" in one.getMessage()]
    assert [one.levelname for one in ended] == (["ERROR"] if calls > 1 else [])


@awaited
async def test_what_works_at_last_is_no_error(plane: ControlPlane) -> None:
    daemon = Daemon(told(EngineUnreachable()), lost(), {"windows": [1]})
    result = await plane.run(READING, daemon, "key")
    assert (result.data, result.is_degraded) == ({"windows": [1]}, False)
    assert plane.counts[READING].total_errors == 0


@awaited
async def test_a_pause_that_does_not_fit_is_not_begun(plane: ControlPlane) -> None:
    """C3, R162: the error says when it may be worth while."""
    error = told(RateLimited(retry_after_s=25.0))
    daemon = Daemon(error)
    began = time.monotonic()
    raised = await fails(plane.run(READING, daemon, "key"))
    assert time.monotonic() - began < 5
    assert (daemon.calls, tried_of(raised).next_delay_s) == (1, 25.0)


@awaited
async def test_what_takes_too_long_has_twice_as_long_the_second_time(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R210, R217"""
    row = Operation(0.05, 5.0, "control.read", changes=False)
    monkeypatch.setitem(OPERATIONS, READING, row)
    limits: list[float] = []

    async def hangs(limit_s: float) -> Any:
        limits.append(limit_s)
        await asyncio.sleep(limit_s)
        raise OperationTimeout

    raised = await fails(plane.run(READING, hangs, "key"))
    assert raised.message == f"{READING} exceeded 0.05s timeout"
    assert limits == [0.05, 0.1]
    assert raised.exit_code == 124


# ── what stands in ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", [told(EngineUnreachable()), told(NotFound())])
@awaited
async def test_another_operation_that_reads_stands_in_and_says_so(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture, error: HiveError
) -> None:
    """R168, R178, R179, R218, C6"""
    other = Daemon({"name": "w"})
    with caplog.at_level(logging.WARNING):
        result = await plane.run("window_status", Daemon(error), "k", {"window_list": other})
    assert (result.data, result.source, result.is_degraded) == ({"name": "w"}, "window_list", True)
    assert result.warnings[0].startswith(f"window_status failed ({error.code})")
    assert any("window_list is asked instead" in line for line in caplog.messages)


@awaited
async def test_where_that_fails_too_the_first_error_is_told(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    """R179"""
    first, second = told(EngineUnreachable()), told(StorageCorrupted())
    with caplog.at_level(logging.ERROR):
        raised = await fails(
            plane.run("window_status", Daemon(first), "k", {"window_list": Daemon(second)})
        )
    assert raised is first
    assert any(
        "window_list, asked instead of window_status, failed too" in m for m in caplog.messages
    )


@pytest.mark.parametrize("error", [told(StorageCorrupted()), told(Forbidden())])
@awaited
async def test_what_no_repetition_helps_has_no_stand_in(
    plane: ControlPlane, error: HiveError
) -> None:
    """R165, R166, R215: the caller must know of it, and a workflow stops there."""
    await plane.run("window_status", Daemon({"name": "w"}), "k")
    other = Daemon({"name": "w"})
    raised = await fails(plane.run("window_status", Daemon(error), "k", {"window_list": other}))
    assert (raised, other.calls) == (error, 0)
    assert workflow(raised, "window_status")["recovery_strategy"] == "abort"


@awaited
async def test_a_remembered_answer_is_marked_with_its_age(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    """R169, R180, R181, R212, R218, R258, C33, C37"""
    await plane.run(READING, Daemon({"windows": [1]}), "k")
    with caplog.at_level(logging.INFO):
        result = await plane.run(READING, Daemon(nobody()), "k")
    assert (result.data, result.source, result.is_degraded) == ({"windows": [1]}, CACHE, True)
    assert result.age_s >= 0
    assert result.warnings == ("Using cached data from 0 seconds ago (DAEMON_UNREACHABLE)",)
    assert any("answered from memory" in line for line in caplog.messages)
    assert plane.counts[READING].total_errors == 1


@awaited
async def test_a_remembered_answer_that_is_too_old_is_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """R181: a warning, and the error itself."""
    now = [1000.0]
    plane = ControlPlane(chance=lambda: 0.0, clock=lambda: now[0])
    await plane.run(READING, Daemon({"windows": [1]}), "k")
    now[0] += OPERATIONS[READING].cached_s - 1
    young = await plane.run(READING, Daemon(nobody()), "k")
    assert young.warnings == ("Using cached data from 5 minutes ago (DAEMON_UNREACHABLE)",)
    now[0] += 1
    error = nobody()
    with caplog.at_level(logging.WARNING):
        assert await fails(plane.run(READING, Daemon(error), "k")) is error
    assert any("too old to be given" in line for line in caplog.messages)


@awaited
async def test_nobody_gets_what_another_was_answered(plane: ControlPlane) -> None:
    await plane.run(READING, Daemon({"windows": ["ada's"]}), ("ada", "/windows"))
    for key in (("bob", "/windows"), ("ada", "/windows?tag=x")):
        error = nobody()
        assert await fails(plane.run(READING, Daemon(error), key)) is error


@pytest.mark.parametrize("name", [name for name, row in OPERATIONS.items() if row.changes])
@awaited
async def test_a_change_is_never_answered_from_memory(plane: ControlPlane, name: str) -> None:
    """C6"""
    await plane.run(name, Daemon({"done": True}), "k")
    error = nobody()
    raised = await fails(plane.run(name, Daemon(error), "k", {"window_list": Daemon({})}))
    assert raised is error
    assert plane.last(name, "k") is None


@awaited
async def test_how_it_was_is_no_answer_to_how_it_is(plane: ControlPlane) -> None:
    """R237: it is there for whoever says that it is old."""
    found = await plane.run("health_check", Daemon({"status": "ok"}), "k")
    plane.remember("health_check", "k", found.data)
    error = nobody()
    assert await fails(plane.run("health_check", Daemon(error), "k")) is error
    last = plane.last("health_check", "k")
    assert last is not None
    assert last[0] == {"status": "ok"}
    assert 0 <= last[1] < 60


@awaited
async def test_memory_is_bounded(plane: ControlPlane) -> None:
    for number in range(control.REMEMBERED + 10):
        await plane.run(READING, Daemon({"number": number}), number)
    assert plane.last(READING, 9) is None
    assert plane.last(READING, control.REMEMBERED + 9) is not None


@awaited
async def test_failures_are_counted_by_kind(plane: ControlPlane) -> None:
    """R183-R185"""
    await plane.run(READING, Daemon({}), "k")
    await fails(plane.run(READING, Daemon(told(StorageCorrupted())), "other"))
    await fails(plane.run(READING, Daemon(told(EngineUnreachable())), "other"))
    await fails(plane.run(READING, Daemon(told(Forbidden())), "other"))
    assert plane.counts[READING].told() == {
        "total_calls": 4,
        "total_errors": 3,
        "transient_errors": 1,
        "permanent_errors": 2,
        "retries_exhausted": 1,
        "error_rate": 0.75,
    }


@awaited
async def test_what_nobody_foresaw_is_raised_at_once(plane: ControlPlane) -> None:
    """R175"""
    for exc in (ValueError("x"), KeyError("x"), TypeError("x")):
        daemon = Daemon(exc)
        with pytest.raises(type(exc)):
            await plane.run(READING, daemon, "k")
        assert daemon.calls == 1


@awaited
async def test_a_cancel_ends_it_between_two_calls(plane: ControlPlane) -> None:
    daemon = Daemon(told(RateLimited(retry_after_s=10.0)))
    running = asyncio.ensure_future(plane.run(READING, daemon, "k"))
    await until(lambda: daemon.calls, "the first call")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert daemon.calls == 1

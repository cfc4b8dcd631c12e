"""What becomes of a call whose database is locked or away."""

import logging
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from hive.errors import StoreUnreachable
from hive.storage.trying import BUSY_S, POLICY, TURN_S, Locked, reached, tried
from tests.patience import awaited

BUSY = OperationalError("UPDATE", None, sqlite3.OperationalError("database is locked"))


def is_locked(exc: DBAPIError) -> bool:
    return "locked" in str(exc.orig)


@pytest.mark.parametrize(
    ("raised", "wanted"),
    [
        (BUSY, Locked),
        (OperationalError("x", None, sqlite3.OperationalError("disk I/O error")), StoreUnreachable),
        (IntegrityError("x", None, sqlite3.IntegrityError("locked")), IntegrityError),
        (PoolTimeout("no connection"), StoreUnreachable),
        (TimeoutError(), StoreUnreachable),
        (ConnectionResetError(), StoreUnreachable),
        (KeyError("hive's own"), KeyError),
    ],
)
def test_what_the_database_says_is_told_by_what_it_means(
    raised: Exception, wanted: type[Exception]
) -> None:
    with pytest.raises(wanted) as told, reached(is_locked):
        raise raised
    assert type(told.value) is wanted


@pytest.mark.parametrize("failures", range(6))
@awaited
async def test_a_locked_database_is_asked_four_times(
    failures: int, caplog: pytest.LogCaptureFixture
) -> None:
    """R161, C1: a warning before each call but the first; none is made after the last."""
    calls = 0

    async def call() -> str:
        nonlocal calls
        calls += 1
        if calls <= failures:
            raise Locked("by somebody")
        return "done"

    if failures < POLICY.calls:
        assert await tried(call) == "done"
    else:
        with pytest.raises(StoreUnreachable, match=r"4 calls have failed.* after 0\.1 s") as told:
            await tried(call)
        assert told.value.retry_after_s == pytest.approx(0.1)
        assert isinstance(told.value.__cause__, Locked)
    assert calls == min(failures + 1, POLICY.calls)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == min(failures, POLICY.calls - 1)
    assert all("by somebody" in record.message for record in warnings)


@awaited
async def test_nothing_else_is_tried_again() -> None:
    """What may have been done is not done twice."""
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        raise StoreUnreachable

    with pytest.raises(StoreUnreachable):
        await tried(call)
    assert calls == 1


@settings(max_examples=20)
@given(st.floats(0, 1))
def test_all_calls_together_take_little_more_than_one_may_wait(chance: float) -> None:
    pauses = sum(POLICY.delay_s(calls, chance) for calls in range(1, POLICY.calls))

    assert POLICY.calls * TURN_S + pauses <= BUSY_S * 1.1

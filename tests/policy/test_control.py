"""What clients may do about a failure: the table, and what it never allows (C6)."""

import pytest

from hive.errors import (
    CudaDeviceFailed,
    DaemonUnreachable,
    Forbidden,
    HiveError,
    InvalidCredentials,
    NotFound,
    OperationTimeout,
    RateLimited,
    ServiceUnavailable,
    StorageCorrupted,
    StorageWriteFailed,
    WindowNotFound,
    every_error,
)
from hive.policy.control import (
    DEFAULT,
    LIVE_S,
    OPERATIONS,
    Failure,
    classify,
    delay_s,
    may_repeat,
    operation,
    policy_of,
)
from hive.policy.retries import RETRIES

READING = OPERATIONS["window_list"]
CHANGING = OPERATIONS["window_freeze"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_only_what_reads_is_answered_otherwise_and_only_by_what_reads(name: str) -> None:
    """R178, R236, C6, C33: what changes anything, or generates tokens, has no stand-in and no memory.

    What stands in is another question to the same daemon: there is no other one to turn to.
    """
    row = OPERATIONS[name]
    if row.changes:
        assert (row.fallbacks, row.cached_s) == ((), 0.0)
    assert row.cached_s <= LIVE_S
    for other in row.fallbacks:
        assert not OPERATIONS[other].changes
        assert OPERATIONS[other].fallbacks == ()
    assert row.limit_s <= row.deadline_s
    assert row.retry is None or row.retry in RETRIES


def test_tokens_are_generated_once() -> None:
    assert policy_of(OPERATIONS["chat"], StorageWriteFailed()).calls == 1
    assert OPERATIONS["chat"].changes


def test_what_has_no_row_changes_something_for_all_that_is_known() -> None:
    """R177"""
    assert operation("nothing of the kind") is DEFAULT
    assert (DEFAULT.changes, DEFAULT.cached_s, DEFAULT.fallbacks) == (True, 0.0, ())


def test_the_rows_are_the_sources() -> None:
    """R173, R176: 5 repetitions from 0.5 s for what reads, 3 from 1 s for the rest.

    R216: 5 s for one call of what reads, which may be answered from memory, and stops nobody.
    """
    usual = OPERATIONS["window_list"]
    assert (usual.limit_s, usual.cached_s > 0, usual.changes) == (5.0, True, False)
    read, default = RETRIES["control.read"], RETRIES["control.default"]
    assert (read.calls, read.delays[0], default.calls, default.delays) == (
        6,
        0.5,
        4,
        (1.0, 2.0, 4.0),
    )


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (DaemonUnreachable(), Failure.TRANSIENT),
        (OperationTimeout(), Failure.TRANSIENT),
        (RateLimited(retry_after_s=3.0), Failure.TRANSIENT),
        (ServiceUnavailable(retry_after_s=1.0), Failure.TRANSIENT),
        (ServiceUnavailable(), Failure.PERMANENT),  # a worker that has failed
        (StorageWriteFailed(), Failure.TRANSIENT),
        (StorageCorrupted(), Failure.PERMANENT),
        (WindowNotFound(), Failure.PERMANENT),
        (CudaDeviceFailed(), Failure.PERMANENT),
        (InvalidCredentials(), Failure.UNAUTHORIZED),
        (Forbidden(), Failure.UNAUTHORIZED),
        (NotFound(), Failure.UNIMPLEMENTED),
    ],
)
def test_a_failure_is_classified_by_its_own_flag(error: HiveError, wanted: Failure) -> None:
    """R160-R168, R184, C14"""
    assert classify(error) is wanted


def test_no_failure_of_a_device_is_ever_repeated() -> None:
    """C6: the data plane has no second try."""
    seen = 0
    for cls in every_error():
        if cls.code.startswith(("CUDA_", "GPU_")):
            seen += 1
            for row in OPERATIONS.values():
                assert not may_repeat(row, cls(), is_answer=True)
    assert seen >= 5


def test_a_change_whose_answer_was_lost_is_not_made_again() -> None:
    """Nobody knows whether it happened; what only reads may be asked again."""
    error = DaemonUnreachable()
    assert may_repeat(READING, error, is_answer=False)
    assert not may_repeat(CHANGING, error, is_answer=False)
    assert may_repeat(CHANGING, error, is_answer=True)
    assert not may_repeat(READING, StorageCorrupted(), is_answer=True)


def test_what_timed_out_is_tried_once_more() -> None:
    """R095, R096"""
    for row in (READING, CHANGING):
        assert policy_of(row, OperationTimeout()).calls == 2
    assert policy_of(OPERATIONS["chat"], OperationTimeout()).calls == 1
    assert policy_of(READING, RateLimited()) is RETRIES["control.read"]


def test_what_the_daemon_asks_for_is_kept() -> None:
    """R162"""
    policy = RETRIES["control.read"]
    assert delay_s(policy, 1, RateLimited(retry_after_s=7.0), 0.0) == 7.0
    assert delay_s(policy, 3, RateLimited(retry_after_s=1.0), 0.0) == 2.0
    assert delay_s(policy, 2, StorageWriteFailed(), 0.0) == 1.0

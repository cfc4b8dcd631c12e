"""What a client of the HTTP API may do about a failure: one table, a row for each operation (R176).

Repeating, answering from another operation that only reads, or from memory: all of it is for the
control plane alone (C6). What generates tokens, or changes anything, has nothing of the kind but
repetition, and that only where the daemon said itself that nothing had happened.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from hive.errors import HiveError
from hive.policy.retries import ONCE, RETRIES, RetryPolicy

LIVE_S = 300.0  # how old a remembered answer about something that changes may be (C33, R181)
POLL_S, MOST_POLLS = 5.0, 60  # of what goes on though its answer was lost (R198)


class Failure(StrEnum):
    """What kind of failure it is, and so what helps (R160-R168, R184)."""

    TRANSIENT = "transient"  # the same may work in a moment
    PERMANENT = "permanent"  # the same fails again
    UNAUTHORIZED = "unauthorized"  # a person must see to it (R166)
    UNIMPLEMENTED = "unimplemented"  # this daemon has no such thing (R168)


@dataclass(frozen=True, slots=True)
class Operation:
    """One row. `limit_s` is of one call, `deadline_s` of all of them with the pauses between."""

    limit_s: float
    deadline_s: float
    retry: str | None = "control.default"  # a row of RETRIES; None: it is made once
    changes: bool = True
    cached_s: float = 0.0  # how old a remembered answer may be; 0: none is given
    fallbacks: tuple[str, ...] = ()  # in this order; only what reads, from only what reads (R178)


def _reading(cached_s: float = LIVE_S, fallbacks: tuple[str, ...] = ()) -> Operation:
    return Operation(5.0, 20.0, "control.read", False, cached_s, fallbacks)


_LONG = Operation(330.0, 330.0)  # the daemon itself takes 300 s at most (C15)
OPERATIONS: Mapping[str, Operation] = {
    "window_list": _reading(),
    "window_status": _reading(fallbacks=("window_list",)),
    "session_list": _reading(),
    "worker_list": _reading(),
    # Of parts that have 5 s each (R262).
    "cache_stats": Operation(6.0, 20.0, "control.read", False, LIVE_S),
    "get_metrics_data": _reading(),
    "health_check": _reading(cached_s=0.0),  # how it was is no answer to how it is
    "window_freeze": _LONG,
    "window_thaw": _LONG,
    "window_clone": _LONG,
    "window_delete": _LONG,
    "window_verify": Operation(330.0, 330.0, "control.read", changes=False),  # reads every byte
    "chat": Operation(600.0, 600.0, None),
}
DEFAULT = Operation(30.0, 60.0)  # what has no row (R177)

# The daemon has tried these itself, as often as its table says, before it told of them (R101).
_TRIED_THERE = ("STORAGE_WRITE_FAILED", "STORAGE_READ_FAILED")
_ONCE_MORE = ("ENGINE_TIMEOUT", "OPERATION_TIMEOUT")  # R095, R096


def operation(name: str) -> Operation:
    return OPERATIONS.get(name, DEFAULT)


def command(timeout_s: float, *, changes: bool) -> Operation:
    """Of a person at a command line, who waits so long and no longer."""
    return Operation(timeout_s, timeout_s, None if changes else "control.read", changes)


def classify(error: HiveError) -> Failure:
    """By the error's own flag, never by its status alone (C14)."""
    if error.code in ("UNAUTHORIZED", "INVALID_CREDENTIALS", "FORBIDDEN"):
        return Failure.UNAUTHORIZED
    if error.code in ("NOT_FOUND", "HTTP_ERROR"):
        return Failure.UNIMPLEMENTED
    if error.retryable or error.code == "DAEMON_UNREACHABLE":
        return Failure.TRANSIENT
    return Failure.PERMANENT


def may_repeat(row: Operation, error: HiveError, *, is_answer: bool) -> bool:
    """Whether the same call may be made again.

    `is_answer`: the daemon said it, or the call never left. What it has said of a change is true:
    the change is whole or has not happened (R107). Of one whose answer was lost nothing is known.
    """
    if error.code in _TRIED_THERE:
        return False
    return classify(error) is Failure.TRANSIENT and (is_answer or not row.changes)


def policy_of(row: Operation, error: HiveError) -> RetryPolicy:
    """How often and how far apart, for this error."""
    if row.retry is None:
        return ONCE
    return RETRIES["engine_timeout" if error.code in _ONCE_MORE else row.retry]


def delay_s(policy: RetryPolicy, calls: int, error: HiveError, chance: float) -> float:
    """Seconds before the next call; what the daemon asks for is kept (R162)."""
    return max(policy.delay_s(calls, chance), error.retry_after_s or 0.0)

"""A database that is away, and one that is locked: what becomes of a call (R161).

Whoever finds it locked has changed nothing and is tried again by the table; everything else that
keeps a database from answering is StoreUnreachable at once.
"""

import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
)

from hive.errors import StoreCredentialsRefused, StoreUnreachable
from hive.policy.retries import RETRIES, RetryPolicy

log = logging.getLogger(__name__)
T = TypeVar("T")

BUSY_S = 5.0  # in all, for what others do with the database to be over
POLICY = RETRIES["db_lock"]
TURN_S = BUSY_S / POLICY.calls  # of it for each call: the database itself waits so long
MOST_S = BUSY_S + sum(POLICY.delay_s(n, 1.0) for n in range(1, POLICY.calls))  # all calls together


class Locked(Exception):
    """Somebody else is at work in the database; what was begun was taken back whole."""


@contextmanager
def reached(is_locked: Callable[[DBAPIError], bool]) -> Iterator[None]:
    """Errors of the database that are not about what was asked.

    Raises Locked, StoreUnreachable; IntegrityError as it is.
    """
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as exc:
        if is_locked(exc):
            raise Locked(str(exc.orig)) from exc
        log.error("the catalogue's database failed: %s", exc.orig or exc)  # noqa: TRY400
        raise StoreUnreachable from exc
    except PermissionError as exc:  # who hive is, and not the server, is the reason
        log.error("the catalogue's database refuses hive: %s", exc)  # noqa: TRY400
        raise StoreCredentialsRefused from exc
    except (PoolTimeout, OSError) as exc:  # TimeoutError is one
        log.error("the catalogue's database does not answer: %r", exc)  # noqa: TRY400
        raise StoreUnreachable from exc


async def by_table(
    policy: RetryPolicy,
    call: Callable[[], Awaitable[T]],
    again: tuple[type[Exception], ...],
    tell: Callable[[RetryCallState], None],
    most_s: float = math.inf,
) -> T:
    """Its result, or that of a later call where it raised one of `again`; none begins after `most_s`.

    `tell` hears of each failure before the next call. Raises the last one.
    """

    async def once() -> T:  # tenacity awaits only what is a coroutine function
        return await call()

    retrying = AsyncRetrying(
        stop=stop_after_attempt(policy.calls) | stop_after_delay(most_s),
        wait=lambda state: policy.delay_s(state.attempt_number, random.random()),  # noqa: S311
        retry=retry_if_exception_type(again),
        before_sleep=tell,
        reraise=True,
    )
    return await retrying(once)


async def tried(call: Callable[[], Awaitable[T]]) -> T:
    """Its result, or that of a later call where the database was locked (C1, C4).

    Raises StoreUnreachable that names the next delay there would have been.
    """
    made = 1

    def tell(state: RetryCallState) -> None:
        nonlocal made
        made = state.attempt_number + 1
        error = state.outcome.exception() if state.outcome else None
        log.warning(
            "the catalogue is locked, call %d of %d, the next in %.3f s: %s",
            state.attempt_number,
            POLICY.calls,
            state.upcoming_sleep,
            error,
        )

    try:
        # What waited in line for its turn has waited: the whole of it is no longer than that.
        return await by_table(POLICY, call, (Locked,), tell, MOST_S)
    except Locked as exc:
        next_s = POLICY.delay_s(made, 0.0)
        raise StoreUnreachable(
            f"The catalogue's database is locked by another program: {made} calls have "
            f"failed, another one would follow after {next_s:g} s.",
            action="Send the request again; where it lasts, end the program that holds the lock.",
            retry_after_s=next_s,
        ) from exc

"""A database that is away, and one that is locked: what becomes of a call (R161).

Whoever finds it locked has changed nothing and is tried again by the table; everything else that
keeps a database from answering is StoreUnreachable at once.
"""

import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from hive.errors import StoreUnreachable
from hive.policy.retries import RETRIES

log = logging.getLogger(__name__)
T = TypeVar("T")

BUSY_S = 5.0  # in all, for what others do with the database to be over
POLICY = RETRIES["db_lock"]
TURN_S = BUSY_S / POLICY.calls  # of it for each call: the database itself waits so long


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
    except (PoolTimeout, OSError) as exc:  # TimeoutError is one
        log.error("the catalogue's database does not answer: %r", exc)  # noqa: TRY400
        raise StoreUnreachable from exc


async def tried(call: Callable[[], Awaitable[T]]) -> T:
    """Its result, or that of a later call where the database was locked (C1, C4).

    Raises StoreUnreachable that names the next delay there would have been.
    """

    async def once() -> T:  # tenacity awaits only what is a coroutine function
        return await call()

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning(
            "the catalogue is locked, call %d of %d, the next in %.3f s: %s",
            state.attempt_number,
            POLICY.calls,
            state.upcoming_sleep,
            error,
        )

    retrying = AsyncRetrying(
        stop=stop_after_attempt(POLICY.calls),
        wait=lambda state: POLICY.delay_s(state.attempt_number, random.random()),  # noqa: S311
        retry=retry_if_exception_type(Locked),
        before_sleep=tell,
        reraise=True,
    )
    try:
        return await retrying(once)
    except Locked as exc:
        next_s = POLICY.delay_s(POLICY.calls, 0.0)
        raise StoreUnreachable(
            f"The catalogue's database is locked by another program: {POLICY.calls} calls have "
            f"failed, another one would follow after {next_s:g} s.",
            action="Send the request again; where it lasts, end the program that holds the lock.",
            retry_after_s=next_s,
        ) from exc

"""A call that is made again where that may help, by the table; each repetition is told (C1, C3)."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception

from hive.client.http import is_told, was_not_sent
from hive.errors import HiveError, OperationTimeout
from hive.policy.control import Operation, delay_s, may_repeat, policy_of
from hive.policy.retries import ONCE, RETRIES, RetryPolicy

Ask = Callable[[float], Awaitable[Any]]  # hears how many seconds it may take


@dataclass(frozen=True, slots=True)
class Tried:
    """How often a call was made before it was given up, for whoever is told of it (C1)."""

    calls: int = 1
    most: int = 1
    next_delay_s: float | None = None  # that would have come next


TRIED = "tried"  # an attribute of an error that was given up


def tried_of(error: HiveError) -> Tried:
    """How often it was tried before it was told."""
    found = getattr(error, TRIED, None)
    return found if isinstance(found, Tried) else Tried()


@dataclass(slots=True)
class _Attempts:
    """One call and its repetitions."""

    row: Operation
    chance: Callable[[], float]
    until: float  # on the loop's clock
    calls: int = 0
    policy: RetryPolicy = field(default=ONCE)
    delay_s: float = 0.0
    error: HiveError | None = None

    def may_repeat(self, error: BaseException) -> bool:
        if not isinstance(error, HiveError):
            return False
        is_unsent = was_not_sent(error)
        self.error = error
        self.policy = RETRIES["connect"] if is_unsent else policy_of(self.row, error)
        self.delay_s = delay_s(self.policy, self.calls, error, self.chance())
        return may_repeat(self.row, error, is_answer=is_unsent or is_told(error))

    @property
    def are_over(self) -> bool:
        """C3: what does not fit into the deadline is not begun."""
        now = asyncio.get_running_loop().time()
        return not self.policy.allows(self.calls) or now + self.delay_s >= self.until

    @property
    def limit_s(self) -> float:
        """Twice as long after a timeout (R217), but no longer than there is time."""
        if self.calls == 1:
            return min(self.row.limit_s, self.row.deadline_s)
        limit_s = self.row.limit_s * (2 if isinstance(self.error, OperationTimeout) else 1)
        return min(limit_s, max(0.001, self.until - asyncio.get_running_loop().time()))

    @property
    def tried(self) -> Tried:
        return Tried(self.calls, self.policy.calls, round(self.delay_s, 3))


async def repeated(
    row: Operation,
    ask: Ask,
    tell: Callable[[HiveError, Tried], None],
    chance: Callable[[], float] = random.random,
) -> Any:
    """What `ask` gives at last; `tell` hears of each failure before the next call.

    Raises the last error, with what was tried: `tried_of`.
    """
    attempts = _Attempts(row, chance, asyncio.get_running_loop().time() + row.deadline_s)

    async def call() -> Any:
        attempts.calls += 1
        return await ask(attempts.limit_s)

    def before_the_next(_state: object) -> None:
        assert attempts.error is not None
        tell(attempts.error, attempts.tried)

    try:
        return await AsyncRetrying(
            stop=lambda _state: attempts.are_over,
            wait=lambda _state: attempts.delay_s,
            retry=retry_if_exception(attempts.may_repeat),
            before_sleep=before_the_next,
            reraise=True,
        )(call)
    except HiveError as error:
        setattr(error, TRIED, attempts.tried)
        raise

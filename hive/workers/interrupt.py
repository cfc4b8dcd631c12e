"""Blocks of code that somebody else may end: at a deadline, at an engine's end, at a cancel."""

import asyncio
from types import TracebackType
from typing import Self


class Interrupt:
    """`async with` it; whoever calls `end` first decides what is raised inside, at once.

    An `end` before the block raises at its beginning; one after it is too late and does nothing.
    """

    def __init__(self) -> None:
        self.cause: Exception | None = None
        self._limit: asyncio.Timeout | None = None

    def end(self, cause: Exception) -> None:
        """Raise `cause` in the block at its next chance to be cancelled."""
        if self.cause is not None:
            return
        self.cause = cause
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def __aenter__(self) -> Self:
        if self.cause is not None:
            raise self.cause
        self._limit = await asyncio.timeout(None).__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        limit, self._limit = self._limit, None
        assert limit is not None
        try:
            await limit.__aexit__(kind, error, trace)
        except TimeoutError as expired:
            if limit.expired() and self.cause is not None:
                raise self.cause from expired
            raise

    def __repr__(self) -> str:
        return f"<Interrupt {self.cause!r}>"

"""What was begun and must not be left half done."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def to_the_end(doing: Awaitable[T], hasten: Callable[[], None] | None = None) -> T:
    """Wait for it; cancelled meanwhile, wait all the same, and be cancelled then.

    `hasten` is called at the cancellation: the rest may be done sooner, or not at all.
    """
    future = asyncio.ensure_future(doing)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if hasten is not None:
            hasten()
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # nobody is there to be told
        raise

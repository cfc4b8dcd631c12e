"""Waiting with a deadline, for tests that watch real processes, sockets and files."""

import asyncio
import functools
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

LIMIT_S = 120.0  # only what hangs gets there
LOOK_S = 0.005

P = ParamSpec("P")
T = TypeVar("T")


def awaited(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Let an async test run to its end, within LIMIT_S."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(LIMIT_S):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


async def within(waiting: Awaitable[T], limit_s: float) -> T:
    """What is waited for, in so many seconds at most. Raises TimeoutError."""
    async with asyncio.timeout(limit_s):
        return await waiting


async def until(look: Callable[[], T], what: str, limit_s: float = 30.0) -> T:
    """What `look` finds as soon as it finds something; the event loop runs meanwhile."""
    deadline = time.monotonic() + limit_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(LOOK_S)
    return found


def wait_until(look: Callable[[], T], what: str, limit_s: float = 30.0) -> T:
    """`until` for tests without an event loop."""
    deadline = time.monotonic() + limit_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(LOOK_S)
    return found


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose name leaves room for a unix socket's path of 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path)

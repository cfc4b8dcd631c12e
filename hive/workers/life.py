"""One start of a worker: its process tree, its connections, and the requests that use it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

from hive.devices.watch import Baseline
from hive.errors import HiveError
from hive.workers import guard
from hive.workers.client import EngineClient
from hive.workers.interrupt import Interrupt
from hive.workers.ledger import Entry
from hive.workers.process import Exit, Launch, Place, Tree
from hive.workers.pulse import Pulse
from hive.workers.wire import Wires


class EngineOver(Exception):
    """The engine ended, or is being ended, while it was needed."""


class User(Protocol):
    """Who needs the engine, or time: an Interrupt, or a request's answer."""

    def end(self, cause: Exception) -> None:
        """It ends, because of that; only the first cause counts."""


class Life:
    """One start of a worker, from before the process to after the last member's end."""

    def __init__(self, number: int, place: Place, model: str, address: str | None = None) -> None:
        self.number = number
        self.place = place
        self.began = time.monotonic()
        self.tree: Tree | None = None
        self.client = EngineClient(place.socket, model, address)
        # The data path's own connections; they end with this life.
        self.wires = Wires(place.socket)
        # Resolved when the engine's end has been heard *and* the worker's state says so.
        self.over: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.was_asked = False  # hive ended it; it did not end by itself
        self.error: HiveError | None = None  # what its requests are told, where that is known
        self.baselines: dict[str, Baseline] = {}  # of its devices, before it was started
        self.entry: Entry | None = None  # in the ledger
        self.pids: set[int] = set()  # every process that it was ever seen to consist of
        self.pulse: Pulse | None = None  # from READY on
        self.launch: Launch | None = None  # how it was started
        self.cache_life = 0  # which start of the LMCache server it was started beside
        self._users: set[User] = set()
        self._is_closed = False

    async def close(self) -> None:
        """Interrupt every request (`until_over`), and close the connections."""
        self._is_closed = True
        for user in self._users:
            user.end(EngineOver())
        if self.pulse is not None:
            self.pulse.stop()
        await asyncio.sleep(0)  # they run first: a closed connection would tell them less
        await self.client.close()
        self.wires.close()

    def attach(self, user: User) -> None:
        """`user` is ended, with EngineOver, at once when the engine's end comes."""
        if self._is_closed:
            user.end(EngineOver())
        self._users.add(user)

    def detach(self, user: User) -> None:
        self._users.discard(user)

    @contextlib.asynccontextmanager
    async def until_over(self) -> AsyncIterator[None]:
        """Do something with this engine; raises EngineOver at once when the engine's end comes."""
        interrupt = Interrupt()
        self.attach(interrupt)
        try:
            async with interrupt:
                yield
        finally:
            self.detach(interrupt)

    def see_pids(self, everything: Iterable[guard.Process] | None = None) -> set[int]:
        """The processes that it consists of now; remembered for the account at its end."""
        if self.tree is None:
            return set()
        root = self.tree.guard_pid
        try:
            pids = {root} | {process.pid for process in guard.descendants(root, everything)}
        except OSError:  # nobody can look just now
            return set(self.pids)
        self.pids |= pids
        return pids

    async def over_within(self, seconds: float) -> Exit | None:
        """How the engine ended, if it ends within `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await asyncio.shield(self.over)
        return None

    def __repr__(self) -> str:
        return f"<Life {self.number} of {self.place.mark}>"

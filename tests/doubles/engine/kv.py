"""The engine's KV cache: its own prefix cache, and the LMCache double that is asked beside it.

What was asked for comes from tests/doubles/lmcache over a connection that is made at the start.
Once that is lost, or an answer came too late, nobody is asked again before the next start. (vLLM
would try again with its next heartbeat, every 10 s; a test would have to wait for that.)
"""

import asyncio
import json
from collections import deque
from collections.abc import Callable

from tests.doubles.engine.asks import Json, encoded
from tests.doubles.engine.knobs import Knobs

AGAIN_S = 0.05


class Lost(Exception):
    """The LMCache double is not there at the start, but has to be."""


class Kv(asyncio.Protocol):
    def __init__(self, knobs: Knobs, loop: asyncio.AbstractEventLoop) -> None:
        self.is_lost = False
        self._knobs = knobs
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._asked: deque[tuple[asyncio.TimerHandle, Callable[[int], None]]] = deque()
        # Its own cache is a tree with a chunk at every edge: (node, chunk) to the node after it.
        self._nodes: dict[tuple[int | str, tuple[int, ...]], int] = {}

    async def connect(self, stop: asyncio.Future[int]) -> None:
        """Make the model known there, as vLLM does when it has allocated its KV cache.

        Raises Lost when it has to be there and is not.
        """
        host, _, port = self._knobs.kv.rpartition(":")
        patience = self._loop.time() + self._knobs.kv_start_s
        while True:
            try:
                async with asyncio.timeout(self._knobs.kv_timeout_s):
                    await self._loop.create_connection(lambda: self, host, int(port))
            except OSError as exc:  # TimeoutError too
                if self._loop.time() < patience:
                    await asyncio.wait([stop], timeout=AGAIN_S)
                    if not stop.done():
                        continue
                self.is_lost = True
                if self._knobs.kv_start_s and not stop.done():
                    raise Lost(
                        f"Cannot reach the LMCache MP server at 'tcp://{self._knobs.kv}' within"
                        f" {self._knobs.kv_start_s}s."
                    ) from exc
                return
            self._ask("lookup", "", [], lambda _: None)
            return

    def look_up(self, salt: str, ids: list[int], then: Callable[[int, int], None]) -> None:
        """Tell of how many tokens the KV cache is there, and how many of them are stored there.

        Never of the whole prompt: its last token is computed for the sake of what follows it. Like
        vLLM, the own cache has whole blocks of the tokens before; LMCache may have all but one.
        """
        own = self._own_tokens(salt, ids[:-1])

        def answered(hit: int) -> None:
            then(max(own, min(hit, len(ids) - 1)), hit)

        self._ask("lookup", salt, ids, answered)

    def store(self, salt: str, ids: list[int], skip: int) -> int:
        """Keep the full chunks, in its own cache and there; the next store may skip that many."""
        size = self._knobs.kv_chunk
        end = len(ids) // size * size
        node: int | str = salt
        for begin in range(0, end, size):
            edge = (node, tuple(ids[begin : begin + size]))
            node = self._nodes.setdefault(edge, len(self._nodes))
        if end > skip:
            self._ask("store", salt, ids[:end], lambda _: None, skip=skip)
        return max(end, skip)

    def _own_tokens(self, salt: str, ids: list[int]) -> int:
        size, hit = self._knobs.kv_chunk, 0
        node: int | str | None = salt
        for begin in range(0, len(ids) - size + 1, size):
            assert node is not None
            node = self._nodes.get((node, tuple(ids[begin : begin + size])))
            if node is None:
                break
            hit += size
        return hit

    def _ask(
        self, op: str, salt: str, ids: list[int], then: Callable[[int], None], **more: object
    ) -> None:
        if self.is_lost or self._transport is None:
            then(0)
            return
        body = {"op": op, "model": self._knobs.kv_model, "workers": self._knobs.kv_workers}
        line = encoded(body | {"salt": salt, "tokens": ids} | more) + b"\n"
        late = self._loop.call_later(self._knobs.kv_timeout_s, self._lose)
        self._asked.append((late, then))
        self._transport.write(line)

    def _lose(self) -> None:
        self.is_lost = True
        if self._transport is not None:
            self._transport.abort()
        while self._asked:
            late, then = self._asked.popleft()
            late.cancel()
            then(0)

    # asyncio's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._lose()

    def data_received(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            if self._asked:
                late, then = self._asked.popleft()
                late.cancel()
                told: Json = json.loads(line)
                then(told.get("hit_tokens", 0))


class Prompt:
    """One prompt of a request: what of it is cached, and what of it and its answers was stored."""

    def __init__(self, kv: Kv, salt: str, ids: list[int]) -> None:
        self.ids = ids
        self.cached = 0
        self._kv = kv
        self._salt = salt
        self._stored = 0

    def look_up(self, then: Callable[[], None]) -> None:
        def found(cached: int, stored: int) -> None:
            self.cached, self._stored = cached, stored
            then()

        self._kv.look_up(self._salt, self.ids, found)

    def computed(self) -> None:
        self._stored = self._kv.store(self._salt, self.ids, self._stored)

    def ended(self, made: list[int]) -> None:
        """Store what was generated, but its last token: nothing was computed from that one."""
        self._kv.store(self._salt, self.ids + made[:-1], self._stored)

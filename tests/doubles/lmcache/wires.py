"""The port that engines talk to: JSON lines, a question each, answered in order.

    {"op": "lookup", "model": …, "workers": n, "salt": …, "tokens": […]}  ->  {"hit_tokens": k}
    {"op": "store", the same, "skip": tokens at the begin that are stored already}  ->  {}

Whatever cannot be understood is answered with {"error": …}. A connection makes its models known
to /cache/prefetches for as long as it lasts; a lookup of no tokens does only that.
"""

import asyncio
import json
from collections.abc import Callable

from tests.doubles.engine.asks import Json, encoded
from tests.doubles.lmcache.tier import Asked, Tier


class Engines:
    """What all connections share."""

    def __init__(self, tier: Tier, write: Callable[[list[str]], None]) -> None:
        self.tier = tier
        self.write = write
        self.connections: set[Wire] = set()

    def knows(self, model: str, workers: int) -> bool:
        return any((model, workers) in wire.models for wire in self.connections)


class Wire(asyncio.Protocol):
    """One engine's connection."""

    def __init__(self, engines: Engines) -> None:
        self.models: set[tuple[str, int]] = set()
        self._engines = engines
        self._buffer = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._engines.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._engines.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            try:
                answer = self._answer(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                answer = {"error": f"{type(exc).__name__}: {exc}"}
            self._transport.write(encoded(answer) + b"\n")

    def _answer(self, body: Json) -> Json:
        asked = Asked(body["model"], body["workers"], body["salt"], tuple(body["tokens"]))
        self.models.add((asked.model, asked.workers))
        if body["op"] == "lookup":
            return {"hit_tokens": self._engines.tier.hit_tokens(asked)}
        if body["op"] == "store":
            self._engines.write(self._engines.tier.store(asked, body.get("skip", 0)))
            return {}
        raise ValueError(f"no op {body['op']!r}")

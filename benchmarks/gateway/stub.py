"""A stub engine: as little work as a server can do, so that what is measured is what is between.

One asyncio protocol, no framework. A request's body says what to answer: `max_tokens` events (or
one plain answer), `seed` of them a second; seed 0 sends them at once and then nothing, for ever;
without a seed the answer ends after them. GET /left tells the monotonic seconds at which
clients left unanswered requests; GET /metrics and /health are what a gateway asks an engine.

Run: python -m benchmarks.gateway.stub [--uds PATH] [--port N]
"""

import argparse
import asyncio
import json
import re
import time
from typing import cast

import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_(?:completion_)?tokens": ?(\d+)')  # sglang-router writes the new one
_RATE = re.compile(rb'"seed": ?(\d+)')
_STREAM = re.compile(rb'"stream": ?true')
HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: stub\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_CHUNK = {
    "id": "chatcmpl-0123456789abcdef0123456789abcdef",
    "object": "chat.completion.chunk",
    "created": 1700000000,
    "model": "m",
    "choices": [{"index": 0, "delta": {"content": " token"}, "finish_reason": None}],
}
_WHOLE = {
    "id": "chatcmpl-0123456789abcdef0123456789abcdef",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "An answer of some words. " * 8},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 48, "total_tokens": 57},
}


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(payload), payload)


def _plain(payload: bytes, kind: bytes = b"application/json") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nserver: stub\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
    return head % (kind, len(payload)) + payload


EVENT = _chunk(b"data: " + json.dumps(_CHUNK).encode() + b"\n\n")
WHOLE = _plain(json.dumps(_WHOLE).encode())
MODELS = _plain(b'{"object": "list", "data": [{"id": "m", "object": "model"}]}')
METRICS = (
    b"vllm:num_requests_running %d\nvllm:num_requests_waiting 0\nvllm:generation_tokens_total %d\n"
)


class Engine:
    """What all connections share."""

    def __init__(self) -> None:
        self.running = self.tokens = 0
        self.left_at: list[float] = []


class Connection(asyncio.Protocol):
    """One client's; requests come one after the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None
        self._is_busy = self._is_paused = False
        self._left = 0  # events
        self._pace_s = self._next_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()

    def connection_lost(self, _exc: Exception | None) -> None:
        if self._is_busy:
            self._engine.left_at.append(time.monotonic())
            self._end()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[: end + 2]
            length = _LENGTH.search(head)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._received) < whole:
                return
            body, self._received = self._received[end + 4 : whole], self._received[whole:]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        engine = self._engine
        if head.startswith(b"GET"):
            path = head.split(b" ", 2)[1]
            if path == b"/metrics":
                answer = _plain(METRICS % (engine.running, engine.tokens), b"text/plain")
            elif path == b"/left":
                answer = _plain(json.dumps(engine.left_at).encode())
            else:
                answer = MODELS if path == b"/v1/models" else _plain(b"{}")
            self._transport.write(answer)
            return
        tokens, rate = _TOKENS.search(body), _RATE.search(body)
        self._left = int(tokens[1]) if tokens else 1
        self._is_busy = True
        engine.running += 1
        if not _STREAM.search(body):
            if rate is None:  # else silent
                self._transport.write(WHOLE)
                self._end()
            return
        if rate and int(rate[1]):
            self._pace_s, self._next_at = 1 / int(rate[1]), self._loop.time()
            self._transport.write(HEAD)
            self._tick()
        elif rate:
            if self._left:
                self._transport.write(HEAD + EVENT * self._left)
        else:
            self._transport.write(HEAD)
            self._flood()

    def _tick(self) -> None:
        now = self._loop.time()
        while self._next_at <= now and self._left > 0:
            self._transport.write(EVENT)  # each by itself, as an engine would
            self._left -= 1
            self._next_at += self._pace_s
        if self._left > 0:
            self._timer = self._loop.call_at(self._next_at, self._tick)
        else:
            self._transport.write(END)
            self._end()

    def _flood(self) -> None:
        while self._left > 0 and not self._is_paused:
            self._transport.write(EVENT)
            self._left -= 1
        if self._left <= 0 and self._is_busy:
            self._transport.write(END)
            self._end()

    def _end(self) -> None:
        self._is_busy = False
        self._engine.running -= 1
        self._left = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        if self._is_busy and not self._timer and self._left > 0:
            self._flood()


async def _serve(uds: str | None, port: int | None) -> None:
    engine = Engine()
    loop = asyncio.get_running_loop()
    servers = []
    if uds:
        servers.append(await loop.create_unix_server(lambda: Connection(engine), uds))
    if port is not None:
        server = await loop.create_server(lambda: Connection(engine), "127.0.0.1", port)
        print(server.sockets[0].getsockname()[1], flush=True)
        servers.append(server)
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds")
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    uvloop.run(_serve(args.uds, args.port))


if __name__ == "__main__":
    main()

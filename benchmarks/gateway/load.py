"""The clients: bare protocols that count what comes, so that they cost less than what is measured."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, cast

CHAT = "/v1/chat/completions"
KEY = "hive_benchbenchbenchbenchbench"  # what every client sends; hive checks it
WAIT_S = 10.0  # for an answer that must come
Address = tuple[str, int]


def body_of(model: str, **fields: Any) -> dict[str, Any]:
    """A chat of ordinary size."""
    said = [
        {"role": "system", "content": "You are a helpful assistant that answers in few words."},
        {"role": "user", "content": "What is the capital of France, and why is it the capital?"},
    ]
    return {"model": model, "messages": said, **fields}


def request_of(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"User-Agent: bench\r\nAccept: */*\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


class Connection(asyncio.Protocol):
    """One client's; whoever uses it says what is done with what comes."""

    def __init__(self, hear: Callable[[bytes], None]) -> None:
        self._hear = hear

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        made: socket.socket = transport.get_extra_info("socket")
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self._hear(data)


async def connected(address: Address, hear: Callable[[bytes], None]) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(hear), *address
    )
    return connection


class Closed:
    """Requests one after the other on one connection; answers with a Content-Length."""

    def __init__(self, request: bytes, status: bytes) -> None:
        self._request, self._status = request, status
        self.answers = 0
        self.wrong: list[bytes] = []
        self._received = b""
        self._missing = 0
        self.connection: Connection | None = None

    def ask(self) -> None:
        assert self.connection is not None
        self.connection.transport.write(self._request)

    def hear(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._received[:end].lower()
        at = head.find(b"\r\ncontent-length:")
        if at < 0:  # chunked: small answers end so
            if not self._received.endswith(b"0\r\n\r\n"):
                return
        elif len(self._received) < end + 4 + int(head[at + 17 :].split(b"\r\n", 1)[0]):
            return
        if not self._received.startswith(b"HTTP/1.1 " + self._status):
            self.wrong.append(self._received[:200])
        self._received = b""
        self.answers += 1
        self.ask()


async def answers(
    address: Address, request: bytes, *, clients: int, seconds: float, status: int
) -> int:
    """How many answers came; every client asks again when its answer is whole."""
    made = []
    for _ in range(clients):
        one = Closed(request, str(status).encode())
        one.connection = await connected(address, one.hear)
        made.append(one)
    for one in made:
        one.ask()
    await asyncio.sleep(seconds)
    for one in made:
        assert one.connection is not None
        one.connection.transport.abort()
    wrong = [text for one in made for text in one.wrong]
    assert not wrong, wrong[0]
    return sum(one.answers for one in made)


class Stream:
    """One streamed answer: its events are counted, its end is awaited."""

    def __init__(self) -> None:
        self.events = 0
        self.first_at = 0.0
        self.ended = asyncio.Event()
        self.began = asyncio.Event()
        self._tail = b""

    def hear(self, data: bytes) -> None:
        text = self._tail + data
        count = text.count(b"\ndata: ")
        if count:
            if not self.events:
                self.first_at = time.perf_counter()
                self.began.set()
            self.events += count
        self._tail = text[-6:]
        if b"[DONE]" in text:
            self.ended.set()


async def streams(
    address: Address, model: str, *, count: int, rate: int | None, events: int
) -> int:
    """Open so many streams at once, each of so many events at a pace; how many events came."""
    fields = {"max_tokens": events, "stream": True} | ({} if rate is None else {"seed": rate})
    request = request_of(CHAT, body_of(model, **fields))
    made = [Stream() for _ in range(count)]
    connections = [await connected(address, one.hear) for one in made]
    pause_s = 0.0 if not rate else 1 / rate / count
    for connection in connections:
        connection.transport.write(request)
        await asyncio.sleep(pause_s)  # not all in step
    limit_s = WAIT_S + (events / rate if rate else 60)
    async with asyncio.timeout(limit_s):
        for one in made:
            await one.ended.wait()
    for connection in connections:
        connection.transport.abort()
    total = sum(one.events for one in made)
    assert total == count * (events + 1), f"{total} events of {count * (events + 1)}"  # and [DONE]
    return total


async def first_event_s(address: Address, model: str, *, times: int) -> list[float]:
    """Seconds from a request to its first event, one after the other on one connection."""
    request = request_of(CHAT, body_of(model, max_tokens=2, seed=1000, stream=True))
    took = []
    current = Stream()

    def hear(data: bytes) -> None:
        current.hear(data)

    connection = await connected(address, hear)
    for _ in range(times):
        current = Stream()
        began = time.perf_counter()
        connection.transport.write(request)
        async with asyncio.timeout(WAIT_S):
            await current.ended.wait()
        took.append(current.first_at - began)
        await asyncio.sleep(0.002)  # the last chunk behind [DONE]
    connection.transport.abort()
    return took


class Held:
    """Streams that are open and silent."""

    def __init__(self) -> None:
        self._connections: list[Connection] = []

    async def open(self, address: Address, model: str, count: int) -> None:
        body = body_of(model, max_tokens=1, seed=0, stream=True)
        request = request_of(CHAT, body)
        made = [Stream() for _ in range(count)]
        for one in made:
            connection = await connected(address, one.hear)
            connection.transport.write(request)
            self._connections.append(connection)
        async with asyncio.timeout(60):
            for one in made:
                await one.began.wait()

    def close(self) -> None:
        for connection in self._connections:
            connection.transport.abort()
        self._connections.clear()


# What the engine and the client are doing when the client leaves: fields of the body.
SITUATIONS: dict[str, dict[str, Any]] = {
    "in the middle of a stream": {"stream": True, "max_tokens": 100_000, "seed": 50},
    "while the stream is silent": {"stream": True, "max_tokens": 1, "seed": 0},
    "before the first token": {"stream": True, "max_tokens": 0, "seed": 0},
    "in a request without a stream": {"max_tokens": 1, "seed": 0},
}


async def left_at(
    address: Address, engine: Address, model: str, fields: dict[str, Any], *, reset: bool
) -> float | None:
    """Seconds from a client's leaving to the engine's seeing it; None: never, in 2 s."""
    running = await running_at(engine)  # of those whose leaving nobody noticed
    before = await ask_json(engine, "/left")
    current = Stream()
    connection = await connected(address, current.hear)
    connection.transport.write(request_of(CHAT, body_of(model, **fields)))
    if fields.get("stream") and fields["max_tokens"]:
        async with asyncio.timeout(WAIT_S):
            await current.began.wait()
    await _runs(engine, running + 1)
    if reset:
        made: socket.socket = connection.transport.get_extra_info("socket")
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    at = time.monotonic()
    connection.transport.abort()
    while time.monotonic() < at + 2:
        after = await ask_json(engine, "/left")
        if len(after) > len(before):
            return float(after[-1]) - at
        await asyncio.sleep(0.005)
    return None


async def _runs(engine: Address, count: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while (now := await running_at(engine)) != count:
        assert time.monotonic() < deadline, f"the engine has {now} requests, not {count}"
        await asyncio.sleep(0.005)


async def running_at(engine: Address) -> int:
    text = (await _asked(engine, "/metrics")).decode()
    return int(text.partition("num_requests_running ")[2].split("\n", 1)[0])


async def ask_json(engine: Address, path: str) -> Any:
    return json.loads(await _asked(engine, path))


async def _asked(address: Address, path: str) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
    content = await reader.readexactly(length)
    writer.close()
    return content

"""Load: many clients in one event loop, each on a connection of its own, and every answer judged.

An HTTP client on bare streams: it costs little beside what it asks, sees every byte's time, and
can leave in any way and at any byte.
"""

import asyncio
import contextlib
import json
import os
import re
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from steps.driver import Double, Hive, chat_body
from steps.waiting import must

T = TypeVar("T")
CHAT = "/v1/chat/completions"
LONGEST_S = 30.0  # no request of a load takes longer: whoever still waits then is forgotten
REASONS = ("slots_busy", "queue_full", "queue_timeout")  # of a refusal for want of a place
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close that throws away what is under way


def run(load: Coroutine[Any, Any, T], within_s: float) -> T:
    """Run a load to its end, which must come by itself."""

    async def bounded() -> T:
        async with asyncio.timeout(within_s):
            return await load

    try:
        return asyncio.run(bounded())
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group


class Cut(Exception):
    """The connection ended before the answer did."""


@dataclass
class Reply:
    """An answer, or what has come of it."""

    status: int
    headers: dict[str, str]
    began: float
    body: bytearray = field(default_factory=bytearray)
    times: list[tuple[float, int]] = field(default_factory=list)  # of pieces, with their events
    ended_at: float = 0.0
    left: int | None = None  # bytes still to come; None: in chunks

    @property
    def seconds(self) -> float:
        return self.ended_at - self.began

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def events(self) -> list[str]:
        """The data of each whole event."""
        whole = self.body.decode(errors="replace").split("\n\n")[:-1]
        return [event.partition("data: ")[2] for event in whole]

    @property
    def error(self) -> dict[str, Any] | None:
        """The error that it is, or that its stream ends with."""
        with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
            found: dict[str, Any] = json.loads(self.events[-1] if self.is_stream else self.body)[
                "error"
            ]
            return found
        return None

    @property
    def code(self) -> str | None:
        return str(self.error["code"]) if self.error else None

    def texts(self, count: int = 1) -> list[str]:
        """The generated text of each choice; fails where a stream does not end as it should."""
        found = [""] * count
        if self.is_stream:
            *said, done = self.events
            assert done == "[DONE]", done
            events = [json.loads(event) for event in said]
        else:
            events = [json.loads(self.body)]
        for event in events:
            for choice in event["choices"]:
                part = choice.get("delta") or choice.get("message") or choice
                found[choice["index"]] += part.get("content") or part.get("text") or ""
        return found


class Line:
    """One client's connection, used again while the server keeps it."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self._port = port
        self._key = key
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._sock: socket.socket | None = None

    async def ask(
        self,
        path: str = CHAT,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
    ) -> Reply:
        """A request and its whole answer. Raises Cut, OSError, TimeoutError."""
        async with asyncio.timeout(LONGEST_S):
            reply = await self.begin(path, body, headers, method)
            while await self.more(reply):
                pass
            return reply

    async def begin(
        self,
        path: str = CHAT,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
    ) -> Reply:
        """A request, and the head of its answer."""
        began = await self.send(path, body, headers, method)
        return await self.head(began)

    async def send(
        self,
        path: str = CHAT,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
        part: float = 1.0,
    ) -> float:
        """Send a request, or the first part of one; when that was."""
        writer = self._writer
        if writer is None or writer.is_closing():
            writer = await self.open()
        content = b"" if body is None else body if isinstance(body, bytes) else _json(body)
        lines = [f"{method} {path} HTTP/1.1", "Host: hive", f"Content-Length: {len(content)}"]
        if content:
            lines.append("Content-Type: application/json")
        if self._key:
            lines.append(f"Authorization: Bearer {self._key}")
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        request = "\r\n".join([*lines, "", ""]).encode() + content
        began = time.monotonic()
        writer.write(request[: round(len(request) * part)])
        return began

    async def open(self, receive_bytes: int = 0) -> asyncio.StreamWriter:
        """Connect; a client that will not read has little room for what comes."""
        self.leave()
        self._sock = sock = socket.socket()
        try:
            sock.setblocking(False)
            if receive_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", self._port))
            self._reader, self._writer = await asyncio.open_connection(
                sock=sock, limit=1024 if receive_bytes else 2**18
            )
        except BaseException:
            sock.close()
            raise
        return self._writer

    async def head(self, began: float) -> Reply:
        """The head of the next answer."""
        assert self._reader is not None
        try:
            text = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError as exc:
            raise Cut("before the answer") from exc
        except ConnectionError as exc:
            raise Cut(f"before the answer: {exc!r}") from exc
        first, *lines = text.split("\r\n")[:-2]
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        reply = Reply(int(first.split(" ")[1]), headers, began)
        is_chunked = headers.get("transfer-encoding") == "chunked"
        reply.left = None if is_chunked else int(headers.get("content-length", 0))
        if reply.left == 0:
            self._ended(reply)
        return reply

    async def more(self, reply: Reply) -> bool:
        """Read on; False when the answer is whole."""
        assert self._reader is not None
        if reply.ended_at:
            return False
        try:
            if reply.left is None:
                size = int(await self._reader.readuntil(b"\r\n"), 16)
                piece = (await self._reader.readexactly(size + 2))[:-2]
            else:
                piece = await self._reader.read(min(reply.left, 65536))
                size = reply.left = reply.left - len(piece)
                if not piece:
                    raise Cut(f"{size} bytes before its end")
        except asyncio.IncompleteReadError as exc:
            raise Cut("in the middle") from exc
        except ConnectionError as exc:
            raise Cut(f"in the middle: {exc!r}") from exc
        reply.body += piece
        reply.times.append((time.monotonic(), piece.count(b"data: ")))
        if size == 0:
            self._ended(reply)
        return size != 0

    async def until_events(self, reply: Reply, count: int) -> bool:
        """Read so many events; False when the answer ended before."""
        while reply.body.count(b"\n\n") < count:
            if not await self.more(reply):
                return False
        return True

    def _ended(self, reply: Reply) -> None:
        reply.ended_at = time.monotonic()
        if reply.headers.get("connection", "").lower() == "close":
            self.leave()

    # ── leaving ─────────────────────────────────────────────────────────────────────────────────

    def leave(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    def reset(self) -> None:
        """Close it so that the other side is told of an error, not of an end."""
        if self._writer is not None:
            assert self._sock is not None
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.leave()

    def half_close(self) -> None:
        """Send no more, and go on reading."""
        assert self._writer is not None
        self._writer.write_eof()

    async def until_closed(self) -> None:
        """Wait for the other side's end, whatever still comes before it."""
        assert self._reader is not None
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(65536):
                pass


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()


# ── what is asked, and what may be answered ─────────────────────────────────────────────────────


def expected(tag: str, tokens: int) -> str:
    """The double's text for a request with that tag."""
    return "".join(f"{tag}:{k} " for k in range(tokens))


async def whole_chat(
    line: Line, model: str, tag: str, tokens: int, headers: Mapping[str, str] | None = None
) -> Reply:
    """A streamed chat; an answer to it is checked to the last token."""
    body = chat_body(model, tag, stream=True, max_tokens=tokens)
    reply = await line.ask(CHAT, body, headers)
    if reply.status == 200 and reply.error is None:
        assert reply.texts() == [expected(tag, tokens)], f"{tag}: {bytes(reply.body)!r}"
    return reply


def check_refusal(reply: Reply) -> dict[str, Any]:
    """A refusal for want of a place says all that it must (R057, R058); its details."""
    error = reply.error
    assert error is not None, bytes(reply.body)
    details: dict[str, Any] = error["details"]
    assert (reply.status, error["code"]) == (503, "SERVICE_UNAVAILABLE"), bytes(reply.body)
    assert details["reason"] == reply.headers["x-hive-reason"], details
    assert details["reason"] in REASONS, details
    seconds = int(reply.headers["retry-after"])
    assert 1 <= seconds <= 30, seconds
    assert details["retry_after_seconds"] == seconds, details
    assert 0 <= float(reply.headers["retry-after-ms"]) <= 1000 * seconds, reply.headers
    assert reply.headers["x-should-retry"] == "true", reply.headers
    return details


# ── what must be at rest ────────────────────────────────────────────────────────────────────────


def unrest(hive: Hive, doubles: Mapping[str, Double]) -> list[str]:
    """What is not zero though nobody asks: permits by each count that there is of them.

    `doubles` are the engines by worker id.
    """
    text = hive.ask("GET", "/metrics").body.decode()
    found = [
        line
        for line in text.splitlines()
        if line.startswith(("hive_in_flight{", "hive_waiting{")) and not line.endswith(" 0.0")
    ]
    found += [
        f"worker {worker}"
        for worker in hive.workers
        if worker["state"] != "READY" or worker["in_flight"] or worker["waiting"]
    ]
    listed = hive.ask("GET", "/hive/v1/requests").json["requests"]
    found += [f"listed {one}" for one in listed]
    for worker_id, double in doubles.items():
        state = double.state
        if state["running"] or state["waiting"]:
            found.append(f"engine {worker_id}: {state['running']} + {state['waiting']}")
    return found


def must_rest(hive: Hive, doubles: Mapping[str, Double], within_s: float, said: str = "") -> None:
    """Everything is back to zero, by hive's counts and by the engines'."""
    found: list[str] = []

    def is_so() -> bool:
        found[:] = unrest(hive, doubles)
        return not found

    must(is_so, within_s, lambda: f"rest {said}; {'; '.join(found)}")


def uncaught(hive: Hive) -> list[str]:
    """Lines of hive's log that tell of what nobody foresaw."""
    return [
        line
        for line in hive.log_text.splitlines()
        if '"exception":' in line or '"level": "critical"' in line or not line.startswith("{")
    ]


def rss_mb(hive: Hive) -> float:
    assert hive.process is not None
    text = Path(f"/proc/{hive.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) / 1024


def descriptors(hive: Hive) -> int:
    assert hive.process is not None
    return len(os.listdir(f"/proc/{hive.process.pid}/fd"))


async def all_of(tasks: list[Coroutine[Any, Any, None]]) -> None:
    """Run them together; the first that fails ends the others."""
    async with asyncio.TaskGroup() as group:
        for task in tasks:
            group.create_task(task)


async def event(is_so: Callable[[], Awaitable[bool]], within_s: float, what: str) -> None:
    """Wait for something, looking often, without holding up the loop."""
    loop = asyncio.get_running_loop()
    until = loop.time() + within_s
    while not await is_so():
        assert loop.time() < until, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.01)

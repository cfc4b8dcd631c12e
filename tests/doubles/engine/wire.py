"""HTTP/1.1 on a unix socket: requests in, answers and chunked streams out, as uvicorn does it."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

HEAD_LIMIT = 256 * 1024
PHRASES = {
    100: "Continue",
    200: "OK",
    202: "Accepted",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    422: "Unprocessable Entity",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}
JSON = "application/json"
SSE = "text/event-stream; charset=utf-8"
LAST_CHUNK = b"0\r\n\r\n"


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""
    started: float = field(default_factory=time.monotonic)
    is_answered: bool = False

    @property
    def keeps_alive(self) -> bool:
        return self.headers.get("connection", "").lower() != "close"


class Handler(Protocol):
    """What gets the requests of all connections."""

    def head_came(self, request: Request, connection: "Connection") -> None:
        """The body is still to come; it may be answered already."""

    def request_came(self, request: Request, connection: "Connection") -> None:
        """It is complete; answer it now or later, through the connection."""


class Connection(asyncio.Protocol):
    """One client; it is asked one thing at a time."""

    def __init__(self, handler: Handler, everyone: set["Connection"]) -> None:
        self.on_gone: Callable[[], None] | None = None  # for the request being answered
        self.on_drained: Callable[[], None] | None = None
        self.is_full = False
        self.is_gone = False
        self._handler = handler
        self._everyone = everyone
        self._buffer = bytearray()
        self._body = bytearray()  # of a chunked request
        self._reading: Request | None = None
        self._answering: Request | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._everyone.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.is_gone = True
        self._everyone.discard(self)
        gone, self.on_gone = self.on_gone, None
        if gone is not None:
            gone()

    def eof_received(self) -> None:
        # A half-closed client is gone. Not close(): that would wait until the client has read.
        self._transport.abort()

    def pause_writing(self) -> None:
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False
        if self.on_drained is not None:
            self.on_drained()

    # Requests in

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._advance()

    def _advance(self) -> None:
        while self._answering is None and not self._transport.is_closing():
            try:
                request = self._read()
            except ValueError:
                request = Request("", "", {"connection": "close"})
                self._answering = request
                self.answer(400, b"Invalid HTTP request received.", "text/plain; charset=utf-8")
            if request is None:
                return
            if not request.is_answered:  # it may have been before its body was here
                self._answering = request
                self._handler.request_came(request, self)

    def _read(self) -> Request | None:
        """The next complete request."""
        if self._reading is None:
            self._reading = self._read_head()
            if self._reading is None:
                return None
            if self._reading.headers.get("expect", "").lower() == "100-continue":
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._handler.head_came(self._reading, self)
        request = self._reading
        if not self._read_body(request):
            return None
        self._reading = None
        return request

    def _read_head(self) -> Request | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_LIMIT:
                raise ValueError("no end of the head")
            return None
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        method, path, _version = lines[0].split(" ")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return Request(method, path, headers)

    def _read_body(self, request: Request) -> bool:
        if "transfer-encoding" in request.headers:
            return self._read_chunks(request)
        length = int(request.headers.get("content-length", 0))
        if len(self._buffer) < length:
            return False
        request.body = bytes(self._buffer[:length])
        del self._buffer[:length]
        return True

    def _read_chunks(self, request: Request) -> bool:
        while (line_end := self._buffer.find(b"\r\n")) >= 0:
            size = int(self._buffer[:line_end].partition(b";")[0], 16)
            end = line_end + 2 + size
            if size == 0:
                # Trailers, if any, end like a head does.
                if (finish := self._buffer.find(b"\r\n\r\n", line_end)) < 0:
                    return False
                del self._buffer[: finish + 4]
                request.body = bytes(self._body)
                self._body.clear()
                return True
            if len(self._buffer) < end + 2:
                return False
            self._body += self._buffer[line_end + 2 : end]
            del self._buffer[: end + 2]
        return False

    # Answers out

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def answer(
        self,
        status: int,
        body: bytes = b"",
        kind: str = JSON,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.write(head(status, kind, {"content-length": str(len(body)), **(headers or {})}) + body)
        self.finish()

    def open_stream(self) -> None:
        self.write(head(200, SSE, {"transfer-encoding": "chunked"}))

    def send(self, events: list[bytes]) -> None:
        self.write(b"".join(map(chunk, events)))

    def close_stream(self) -> None:
        self.write(LAST_CHUNK)
        self.finish()

    def finish(self) -> None:
        """The request is answered; the next one may come."""
        self.on_gone = self.on_drained = None
        request = self._answering or self._reading
        self._answering = None
        if request is None or self.is_gone:
            return
        request.is_answered = True
        if not request.keeps_alive:
            self.hang_up()
        elif self._buffer and self._reading is None:
            self._advance()

    def hang_up(self) -> None:
        """Close once what was written is out."""
        self._transport.close()

    def drop(self) -> None:
        """Close now."""
        self._transport.abort()


def head(status: int, kind: str, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {PHRASES.get(status, 'Unknown')}"]
    lines.append(time.strftime("date: %a, %d %b %Y %H:%M:%S GMT", time.gmtime()))
    lines.append("server: uvicorn")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append(f"content-type: {kind}\r\n\r\n")
    return "\r\n".join(lines).encode("latin-1")


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)

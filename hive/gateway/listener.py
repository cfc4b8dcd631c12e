"""Where clients connect: the socket, the connections on it, and how many there may be."""

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import cast

from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.http_exceptions import LineTooLong

from hive.errors import AddressInUse, ConfigInvalid, HiveError, HttpError, InternalError
from hive.events import Announcer, ConnectionRefused, DaemonMoved, request_id_var
from hive.gateway import problems
from hive.gateway.line import Line
from hive.settings import Settings

Entrance = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
BACKLOG = 1024
UNREAD_S = 75.0  # as long as an idle connection is kept
LINGER_S = 1.0  # for a client that is turned away to stop sending
RESERVED = 32  # descriptors kept back for workers, logs and devices, and an eighth of all
CLOSE_S = 2.0  # for handlers to end after their workers did


@asynccontextmanager
async def listening(
    app: web.Application,
    settings: Settings,
    announcer: Announcer,
    inherited: socket.socket | None = None,
    most_connections: int = 1 << 20,
    entrance: Callable[[Entrance], Entrance] | None = None,
    unread_s: float = UNREAD_S,
) -> AsyncIterator[Callable[[Settings], None]]:
    """Accept connections while the block runs, on the inherited socket where there is one.

    What is yielded takes other settings, for connections that come from then on.

    `entrance` makes of aiohttp's own handler of requests what they meet first. Who takes nothing
    for `unread_s` is cut off.

    Beyond `most_connections` a client is told so and let go: descriptors are kept back for workers.

    Raises AddressInUse, or ConfigInvalid when the host cannot be bound.
    """
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,  # a client that leaves cancels its request
        auto_decompress=False,
        shutdown_timeout=CLOSE_S,
        keepalive_timeout=75,
    )
    await runner.setup()
    made = runner.server
    assert made is not None
    if entrance is not None:
        made.request_handler = entrance(made.request_handler)

    def accept() -> asyncio.BaseProtocol:
        if len(made.connections) >= most_connections:
            announcer.announce(ConnectionRefused(most_connections))
            return TooMany()
        inner = made()
        inner.__class__ = Inner
        return Line(inner)

    server: asyncio.Server | None = None
    try:
        sock = inherited or bind(settings)
        drop_who_does_not_read(sock, settings, unread_s)
        server = await asyncio.get_running_loop().create_server(accept, sock=sock, backlog=BACKLOG)
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        announcer.announce(DaemonMoved("listening", f"http://{shown}:{port}"))
        yield lambda new: drop_who_does_not_read(sock, new, unread_s)
    finally:
        if server is not None:
            server.close()
        await runner.cleanup()


def drop_who_does_not_read(sock: socket.socket, settings: Settings, unread_s: float) -> None:
    """Let the kernel end a connection whose other end takes nothing of what was sent to it.

    A relayed stream has its own limit, stall_s; this is for everything else, answers to requests
    that nobody reads included, and for what is left when hive has closed a connection.
    """
    stalls_s = (settings.timeouts_of(model).stall_s for model in settings.models.values())
    unread_s = max((unread_s, *stalls_s))
    with contextlib.suppress(OSError):  # no TCP socket
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(unread_s * 1000))


class Inner(web.RequestHandler):
    """aiohttp's protocol, but that it refuses what is no HTTP as everything is refused: coded, without
    repeating what was sent."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 (it quotes the request)
    ) -> web.StreamResponse:
        """The answer, after which the connection is closed. Raises ConnectionError where one has begun."""
        request_id = os.urandom(16).hex()
        token = request_id_var.set(request_id)
        try:
            self.log_exception("Error handling request", exc_info=exc)
        finally:
            request_id_var.reset(token)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        error: HiveError
        if isinstance(exc, LineTooLong):
            said = "A line of the request's head is too long."
            action = "Send shorter headers, and what is long in the body."
            error = HttpError(said, status=status, action=action)
        elif isinstance(exc, HttpProcessingError) or status < HTTPStatus.INTERNAL_SERVER_ERROR:
            error = HttpError("What was sent is no HTTP request that hive can read.", status=status)
        else:
            error = InternalError()
        response = problems.response(error, request_id)
        response.headers["X-Request-Id"], response.headers["Server"] = request_id, "hive"
        response.force_close()
        return response


class TooMany(asyncio.Protocol):
    """Answers one connection too many, without a request having been read."""

    ANSWER = (
        b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nretry-after-ms: 1000\r\n"
        b"X-Hive-Reason: connections_full\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        answering = cast(asyncio.WriteTransport, transport)  # uvloop's own class is none by name
        answering.write(self.ANSWER)
        # Closed with something unread, the connection would be reset, and the answer lost.
        if answering.can_write_eof():
            answering.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, answering.abort)


def raise_descriptor_limit() -> int:
    """Take as many descriptors as hive may have; how many of them clients may use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    most = soft if soft != resource.RLIM_INFINITY else 1 << 20
    # A request in flight takes two: its client's and its engine's.
    return max(1, (most - max(RESERVED, most // 8)) // 2)


def bind(settings: Settings) -> socket.socket:
    """The listening socket of server.host and server.port. Raises AddressInUse, ConfigInvalid."""
    host, port = settings.server.host, settings.server.port
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as exc:
        raise ConfigInvalid(
            f"server.host: {host!r} is no address of this host: {exc.strerror}.",
            action="Set server.host to an address of this host, such as 127.0.0.1.",
        ) from exc
    family, kind, protocol, _, address = infos[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise AddressInUse(f"Port {port} of {host} is in use by another program.") from exc
        raise ConfigInvalid(
            f"server.host, server.port: cannot listen on {host}:{port}: {exc.strerror}.",
            action="Set server.host and server.port to an address that hive may listen on.",
        ) from exc
    sock.setblocking(False)
    return sock

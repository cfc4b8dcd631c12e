"""Where clients connect: which socket, how many connections, and what one too many is told."""

import asyncio
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import uvloop
from aiohttp import web

from hive.errors import AddressInUse, ConfigInvalid, HiveError
from hive.events import Announcer, ConnectionRefused, DaemonMoved, Event
from hive.gateway.listener import RESERVED, bind, listening, raise_descriptor_limit
from hive.settings import Settings
from tests.patience import awaited, until

uvloop.run(asyncio.sleep(0))  # its first loop opens a pipe of libuv's own, for good

REQUEST = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


def settings(port: int = 0, host: str = "127.0.0.1", stall_s: float = 60) -> Settings:
    model = {"engine": "command", "device": "cpu", "command": ["x{socket}"]}
    key = {"name": "k", "sha256": "0" * 64}
    server = {"host": host, "port": port}
    return Settings.model_validate(
        {
            "server": server,
            "models": {"m": model},
            "auth": {"keys": [key]},
            "timeouts": {"stall_s": stall_s},
        }
    )


class Listening:
    """A listener of a small application, and what it announced."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.announcer = Announcer()
        self.announcer.listen(self.events.append)
        self.ended: list[str] = []
        self.asked = asyncio.Event()
        self.app = web.Application()
        self.app.router.add_get("/", self._well)
        self.app.router.add_get("/never", self._never)

    async def _well(self, _request: web.Request) -> web.Response:
        return web.Response(text="well")

    async def _never(self, _request: web.Request) -> web.Response:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.append("cancelled")
        raise AssertionError

    @property
    def urls(self) -> list[str]:
        return [
            event.detail
            for event in self.events
            if isinstance(event, DaemonMoved) and event.state == "listening"
        ]

    @property
    def port(self) -> int:
        return int(self.urls[0].rpartition(":")[2])

    async def connects(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def answers(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that was served, and stays open."""
        reader, writer = await self.connects()
        writer.write(REQUEST)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert await reader.readexactly(4) == b"well"
        return reader, writer


@asynccontextmanager
async def listens(made: Settings | None = None, **options: Any) -> AsyncIterator[Listening]:
    it = Listening()
    async with listening(it.app, made or settings(), it.announcer, **options):
        yield it


# ── What is no HTTP ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"my-secret\r\n\r\n", "no HTTP request"),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX-A: my-secret\0\r\n\r\n", "no HTTP request"),
        (b"GET /my-secret HTTP/7.7\r\n\r\n", "no HTTP request"),
        (b"GET http://[my-secret/ HTTP/1.1\r\nHost: h\r\n\r\n", "no HTTP request"),
        (b"GET /" + b"my-secret" * 1000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", "too long"),
    ],
)
@awaited
async def test_what_is_no_http_is_refused_as_everything_is(sent: bytes, said: str) -> None:
    """R027, R032, R076: coded, with an id, without a word of what was sent or of what hive is made of."""
    async with listens() as it:
        reader, writer = await it.connects()
        writer.write(sent)
        answer = await reader.read()
        writer.close()

    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert (error["code"], error["details"]["http_status"]) == ("HTTP_ERROR", 400)
    assert said in error["message"]
    assert f"X-Request-Id: {error['details']['request_id']}".encode() in head
    assert b"Server: hive" in head
    assert b"my-secret" not in answer


@awaited
async def test_what_goes_wrong_outside_of_every_handler_is_told_bare() -> None:
    """(R027)"""

    def broken(_routed: object) -> Any:
        async def enter(_request: web.BaseRequest) -> web.StreamResponse:
            raise RuntimeError("my-secret")

        return enter

    async with listens(entrance=broken) as it:
        reader, writer = await it.connects()
        writer.write(REQUEST)
        answer = await reader.read()
        writer.close()

    assert answer.startswith(b"HTTP/1.1 500 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "INTERNAL_ERROR"
    assert b"my-secret" not in answer


# ── Who does not read ───────────────────────────────────────────────────────────────────────────


@awaited
async def test_who_asks_and_never_reads_is_cut_off() -> None:
    """Else a few such clients would hold all the connections there are, for ever."""
    async with listens(settings(stall_s=0.5), unread_s=0.5) as it:
        _, writer = await it.connects()
        transport = writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()

        def asks_on() -> bool:
            if transport.get_write_buffer_size() < 100_000:
                transport.write(REQUEST * 100)
            return transport.is_closing()

        await until(asks_on, "the end of the connection")
        writer.close()


# ── The socket ──────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_it_says_where_once_clients_can_connect() -> None:
    async with listens() as it:
        assert it.urls == [f"http://127.0.0.1:{it.port}"]
        _, writer = await it.answers()
        writer.close()


@awaited
async def test_afterwards_nobody_can_connect_and_every_connection_is_closed() -> None:
    async with listens() as it:
        reader, writer = await it.answers()

    assert await reader.read() == b""
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await it.connects()


@awaited
async def test_whatever_still_runs_afterwards_is_cancelled() -> None:
    async with listens() as it:
        reader, writer = await it.connects()
        writer.write(REQUEST.replace(b" / ", b" /never "))
        await it.asked.wait()

    assert it.ended == ["cancelled"]
    assert await reader.read() == b""
    writer.close()


@awaited
async def test_a_client_that_leaves_cancels_its_request() -> None:
    async with listens() as it:
        _, writer = await it.connects()
        writer.write(REQUEST.replace(b" / ", b" /never "))
        await it.asked.wait()
        writer.transport.abort()
        await until(lambda: it.ended, "the end of its handler")


@awaited
async def test_an_inherited_socket_is_used_instead_of_the_configured_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        sock = socket.create_server(("127.0.0.1", 0))
        sock.setblocking(False)
        port = sock.getsockname()[1]
        async with listens(settings(taken.getsockname()[1]), inherited=sock) as it:
            assert it.urls == [f"http://127.0.0.1:{port}"]
            _, writer = await it.answers()
            writer.close()
        assert sock.fileno() == -1


@awaited
async def test_an_address_that_is_taken_is_told_and_nothing_is_announced() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        it = Listening()
        with pytest.raises(AddressInUse, match=f"Port {port} of 127.0.0.1 is in use"):
            async with listening(it.app, settings(port), it.announcer):
                pytest.fail("it was let in")

    assert it.events == []


def test_a_port_that_was_left_just_now_can_be_taken_again() -> None:
    """Connections that linger there do not keep hive from starting (TIME_WAIT)."""
    with bind(settings()) as sock:
        port = sock.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            sock.setblocking(True)
            sock.accept()[0].close()
            assert client.recv(1) == b""
    with bind(settings(port)) as again:
        assert again.getsockname()[1] == port


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("192.0.2.1", "cannot listen on 192.0.2.1:"),
        ("hive-has-no-such-name.invalid", "is no address of this host"),
    ],
)
def test_an_address_of_another_host_is_told_by_its_setting(host: str, says: str) -> None:
    with pytest.raises(ConfigInvalid, match=says) as caught:
        bind(settings(host=host))

    assert "server.host" in caught.value.message
    assert "Set server.host" in caught.value.suggested_action


@awaited
async def test_an_address_of_ip_6_is_shown_as_urls_show_it() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    async with listens(settings(host="::1")) as it:
        assert it.urls == [f"http://[::1]:{it.port}"]


# ── How many ────────────────────────────────────────────────────────────────────────────────────


async def one_too_many(it: Listening, *, sends: bytes) -> bytes:
    reader, writer = await it.connects()
    writer.write(sends)
    try:
        return await reader.read()
    finally:
        writer.close()


async def limit_is_kept() -> None:
    async with listens(most_connections=2) as it:
        held = [await it.answers() for _ in range(2)]
        for sends in (b"", REQUEST, REQUEST * 3):
            for _ in range(10):
                answer = await one_too_many(it, sends=sends)
                head, _, body = answer.partition(b"\r\n\r\n")
                status, *lines = head.decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines)
                assert status == "HTTP/1.1 503 Service Unavailable"
                assert headers["x-hive-reason"] == "connections_full"
                assert headers["retry-after"] == "1"
                assert headers["retry-after-ms"] == "1000"
                assert headers["connection"] == "close"
                assert (headers["content-length"], body) == ("0", b"")
        refused = [event for event in it.events if isinstance(event, ConnectionRefused)]
        assert refused == [ConnectionRefused(2)] * 30
        for _, writer in held:
            writer.write(REQUEST)  # those that were let in go on
        for reader, _ in held:
            assert (await reader.readuntil(b"well")).startswith(b"HTTP/1.1 200 ")
        held.pop()[1].close()
        while True:
            reader, writer = await it.connects()
            writer.write(REQUEST)
            first = await reader.readline()
            writer.close()
            if b" 200 " in first:
                break
        held[0][1].close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_connection_too_many_is_answered_and_closed(run: Callable[[Any], None]) -> None:
    """And as soon as another one has gone there is room again (R057)."""
    run(limit_is_kept())


@awaited
async def test_a_usual_client_understands_what_it_is_told() -> None:
    async with listens(most_connections=1) as it:
        _, writer = await it.answers()

        def ask() -> tuple[int, str | None, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", it.port, timeout=10)
            try:
                connection.request("GET", "/")
                answer = connection.getresponse()
                return answer.status, answer.headers["X-Hive-Reason"], answer.read()
            finally:
                connection.close()

        assert await asyncio.to_thread(ask) == (503, "connections_full", b"")
        writer.close()


# ── Descriptors ─────────────────────────────────────────────────────────────────────────────────

RAISES = """
import json, resource, sys
from hive.gateway.listener import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
print(json.dumps([raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "clients"),
    [(64, 1024, 448), (256, 256, 112), (64, 64, 16), (40, 40, 4), (33, 33, 1)],
)
def test_hive_takes_as_many_descriptors_as_it_may_and_keeps_some_back(
    soft: int, hard: int, clients: int
) -> None:
    """Two for a request, an eighth (32 at least) for everything else; a client at least."""
    done = subprocess.run(
        [sys.executable, "-c", RAISES, str(soft), str(hard)],
        capture_output=True,
        text=True,
        check=True,
        cwd=os.getcwd(),
    )

    assert json.loads(done.stdout) == [clients, hard, hard]
    assert clients == max(1, (hard - max(RESERVED, hard // 8)) // 2)


@contextmanager
def soft_limit(most: int) -> Iterator[int]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, before[1]), before[1]))
    try:
        yield before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_of_this_process_is_raised_to_its_hard_one() -> None:
    with soft_limit(512) as hard:
        raise_descriptor_limit()

        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_an_error_of_the_listener_is_one_that_hive_can_tell() -> None:
    assert issubclass(AddressInUse, HiveError)
    assert AddressInUse.exit_code == 70

"""The connections to an engine: what comes on one, and when another request may use it."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from hive.policy.framing import Chunks, Head, Length, Malformed, UntilClosed
from hive.workers.wire import Wire, Wires
from tests.patience import awaited, short_directory, until, within

GET = b"GET / HTTP/1.1\r\nHost: engine\r\n\r\n"
uvloop.new_event_loop().close()  # libuv keeps a pipe of its own from the first one on
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Heard:
    """A taker that remembers, and says where an answer ends, as the relay does."""

    def __init__(self) -> None:
        self.wire: Wire | None = None
        self.head: Head | None = None
        self.body = b""
        self.why: list[Exception | None] = []
        self.ended = asyncio.Event()
        self._framing: Chunks | Length | UntilClosed

    def begins(self, head: Head) -> None:
        self.head, self._framing = head, head.body()
        if head.length == 0:
            self._end(is_clean=True)

    def data(self, data: bytes) -> None:
        end = self._framing.feed(data)
        self.body += data if end < 0 else data[:end]
        if end >= 0:
            self._end(is_clean=end == len(data))

    def _end(self, *, is_clean: bool) -> None:
        if self.wire is not None:
            self.wire.release(is_clean=is_clean)
        self.ended.set()

    def broke(self, why: Exception | None) -> None:
        self.why.append(why)
        self.ended.set()


class Engine:
    """A raw server on a unix socket, which answers each request with the next of `answers`.

    An answer is bytes, or several with a pause between them; None closes the connection.
    """

    def __init__(self, answers: list[list[bytes | None]]) -> None:
        self.answers = answers
        self.asked: list[bytes] = []
        self.connections = self.closed = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            self.closed += 1

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        for piece in self.answers.pop(0) if self.answers else [OK]:
            if piece is None:
                return False
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)  # so that each is a piece of its own
        return True


@asynccontextmanager
async def engine(*answers: list[bytes | None]) -> AsyncIterator[tuple[Engine, Wires]]:
    with short_directory() as home:
        it = Engine(list(answers))
        server = await asyncio.start_unix_server(it.serve, home / "s")
        wires = Wires(home / "s")
        try:
            yield it, wires
        finally:
            wires.close()
            server.close()
            await until(lambda: not wires.opened and it.closed == it.connections, "their end")


async def asks(wires: Wires, *, is_head: bool = False) -> Heard:
    heard = Heard()
    heard.wire = wires.take() or await wires.connect(5)
    heard.wire.ask(GET, b"", heard, is_head=is_head)
    await within(heard.ended.wait(), 5)
    return heard


@awaited
async def test_a_connection_is_used_again_after_an_exact_end() -> None:
    async with engine() as (it, wires):
        for _ in range(3):
            heard = await asks(wires)
            assert (heard.body, heard.why) == (b"ok", [])
        assert (it.connections, len(it.asked)) == (1, 3)
        assert repr(wires) == "<Wires 1 open, 1 idle>"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\nwhat is this?",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n\r\n",
    ],
    ids=["another answer", "a body where there is none", "close", "HTTP/1.0", "an empty line"],
)
@awaited
async def test_a_connection_with_anything_behind_the_end_is_not_used_again(answer: bytes) -> None:
    async with engine([answer]) as (it, wires):
        assert (await asks(wires)).why == []
        assert not wires.idle
        assert (await asks(wires)).body == b"ok"
        assert it.connections == 2


@awaited
async def test_what_comes_unasked_closes_the_connection() -> None:
    async with engine([OK, b"HTTP/1.1 200 OK\r\n\r\n"]) as (it, wires):
        await asks(wires)
        await until(lambda: not wires.opened, "the connection's end")
        assert wires.take() is None
        assert (await asks(wires)).body == b"ok"
        assert it.connections == 2


@awaited
async def test_the_last_one_used_is_the_next_one_and_idle_ones_are_closed() -> None:
    """An engine closes idle ones; hive must be the first, or a request would be lost on one."""
    async with engine() as (_, wires):
        several = [await wires.connect(5) for _ in range(3)]
        for one in several:
            heard = Heard()
            heard.wire = one
            one.ask(GET, b"", heard, is_head=False)
            await heard.ended.wait()
        assert wires.take() is several[2]
        await until(lambda: wires.opened == {several[2]}, "the idle ones' end")
        assert wires.take() is None


@awaited
async def test_one_that_the_engine_closed_is_not_taken() -> None:
    async with engine([OK, None]) as (_, wires):
        await asks(wires)
        await until(lambda: not wires.opened, "the connection's end")
        assert wires.take() is None


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@awaited
async def test_informational_answers_are_passed_over(size: int) -> None:
    raw = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK
    async with engine([raw[at : at + size] for at in range(0, len(raw), size)]) as (_, wires):
        heard = await asks(wires)
        assert heard.head
        assert (heard.head.status, heard.body) == (200, b"ok")
        assert len(wires.idle) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"what?\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
    ],
    ids=["no status", "101", "two framings", "no size", "endless"],
)
@awaited
async def test_what_is_not_http_is_told_and_its_connection_dropped(answer: bytes) -> None:
    async with engine([answer]) as (_, wires):
        heard = await asks(wires)
        assert isinstance(heard.why[0], Malformed)
        await until(lambda: not wires.opened, "the connection's end")


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", OK[:-1]])
@awaited
async def test_an_engine_that_breaks_off_is_told_once(sent: bytes) -> None:
    async with engine([sent, None] if sent else [None]) as (_, wires):
        heard = await asks(wires)
        assert heard.wire
        assert (heard.why, heard.wire.has_answered) == ([None], bool(sent))


@awaited
async def test_an_answer_to_head_has_no_body() -> None:
    async with engine([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"]) as (it, wires):
        heard = await asks(wires, is_head=True)
        assert (heard.body, heard.why) == (b"", [])
        await asks(wires)
        assert it.connections == 1


@awaited
async def test_whoever_aborts_hears_nothing_more() -> None:
    async with engine([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n12"]) as (it, wires):
        heard = Heard()
        heard.wire = await wires.connect(5)
        heard.wire.ask(GET, b"", heard, is_head=False)
        await until(lambda: heard.body, "the first bytes")
        heard.wire.abort()
        await until(lambda: not wires.opened, "the connection's end")
        assert heard.why == []
        assert repr(heard.wire) == "<Wire idle, 1 uses>"
        assert it.connections == 1


@awaited
async def test_a_paused_one_takes_nothing_until_it_goes_on() -> None:
    piece = b"x" * 4_000_000
    async with engine([b"HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n", piece]) as (_, wires):
        heard = Heard()
        heard.wire = await wires.connect(5)
        heard.wire.ask(GET, b"", heard, is_head=False)
        heard.wire.pause()
        heard.wire.pause()
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert len(heard.body) < len(piece)
        heard.wire.resume()
        heard.wire.resume()
        await within(heard.ended.wait(), 5)
        assert heard.body == piece


@awaited
async def test_an_engine_that_has_not_read_the_request_keeps_no_connection() -> None:
    """What is left of it would be the beginning of the next one."""
    with short_directory() as home:
        left = asyncio.Event()

        async def answers_early(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(OK)
            await left.wait()
            writer.transport.abort()

        server = await asyncio.start_unix_server(answers_early, home / "s", limit=1024)
        wires = Wires(home / "s")
        heard = Heard()
        heard.wire = await wires.connect(5)
        heard.wire.ask(GET, b"x" * 20_000_000, heard, is_head=False)
        await within(heard.ended.wait(), 5)
        assert not wires.idle
        left.set()
        server.close()
        await until(lambda: not wires.opened, "the connections' end")


def nobody(home: Path) -> None:
    """No socket at all."""


def deaf(home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(home / "s"))


@pytest.mark.parametrize("make", [nobody, deaf])
@awaited
async def test_where_nobody_listens_there_is_no_connection(make: Callable[[Path], None]) -> None:
    with short_directory() as home:
        make(home)
        wires = Wires(home / "s")
        with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
            await wires.connect(5)
        assert not wires.opened


@awaited
async def test_one_that_comes_about_after_the_end_is_closed_at_once() -> None:
    async with engine() as (it, wires):
        wires.close()
        wire = await wires.connect(5)
        assert wire.is_closing
        await until(lambda: it.closed, "its end")


def test_a_full_backlog_is_waited_for_and_no_fault() -> None:
    """The engine is busy, not gone. (On hive's own loop: asyncio's takes that for a connection.)"""
    uvloop.run(waits_for_a_full_backlog())


async def waits_for_a_full_backlog() -> None:
    with short_directory() as home, contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(home / "s"))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                one = opened.enter_context(socket.socket(socket.AF_UNIX))
                one.setblocking(False)
                one.connect(str(home / "s"))
        wires = Wires(home / "s")
        with pytest.raises(TimeoutError):
            await wires.connect(0.05)
        async with asyncio.TaskGroup() as tasks:
            connecting = tasks.create_task(wires.connect(5))
            await asyncio.sleep(0)
            opened.enter_context(listener.accept()[0])
            wire = await connecting
        wire.abort()
        await until(lambda: not wires.opened, "the connection's end")

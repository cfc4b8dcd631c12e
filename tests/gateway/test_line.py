"""A client's connection before aiohttp's own protocol."""

import asyncio
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request

from hive.gateway.line import Line, line_of, sent
from tests.patience import awaited, until


class Inner(asyncio.Protocol):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.told.append("made")

    def data_received(self, data: bytes) -> None:
        self.told.append(data)

    def eof_received(self) -> bool | None:
        self.told.append("eof")
        return True

    def connection_lost(self, _exc: Exception | None) -> None:
        self.told.append("lost")

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")


class Waiter:
    """Writes to a client, and hears when it is full."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def full(self) -> None:
        self.heard.append("full")

    def has_room(self) -> None:
        self.heard.append("room")


@awaited
async def test_everything_reaches_what_is_behind_it_and_the_writer_hears_of_room() -> None:
    inner, waiter = Inner(), Waiter()
    line = Line(inner)
    line.writer = waiter
    server = await asyncio.get_running_loop().create_server(lambda: line, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    await until(lambda: inner.told, "the connection")
    transport = inner.transport
    assert isinstance(transport, asyncio.Transport)
    assert line_of(transport) is line
    writer.write(b"hello")
    await until(lambda: b"hello" in inner.told, "the bytes")
    transport.write(b"x" * 50_000_000)
    assert line.is_full
    await reader.readexactly(50_000_000)
    await until(lambda: not line.is_full, "room")
    writer.write_eof()
    await until(lambda: "eof" in inner.told, "the half-closed connection")
    transport.abort()
    await until(lambda: "lost" in inner.told, "its end")
    writer.close()
    server.close()

    assert inner.told == ["made", b"hello", "pause", "resume", "eof", "lost"]
    assert waiter.heard == ["full", "room"]


@pytest.mark.parametrize("is_kept", [True, False])
@awaited
async def test_of_a_sent_answer_aiohttp_writes_nothing(is_kept: bool) -> None:
    answer = sent(200, is_kept=is_kept)
    assert answer is sent(200, is_kept=is_kept)
    assert (answer.status, answer.prepared, answer.keep_alive) == (200, True, is_kept)
    assert await answer.prepare(make_mocked_request("GET", "/")) is None
    await answer.write_eof()

"""hive's own small requests to an engine: what counts as listening, healthy, and an answer."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web

from hive.workers.client import EngineClient, ProbeFailed
from tests.patience import awaited, short_directory

uvloop.run(asyncio.sleep(0))  # its first loop opens a pipe of libuv's own, for good
EITHER_LOOP = pytest.mark.parametrize("run", [asyncio.run, uvloop.run])


@pytest.fixture
def path() -> Iterator[Path]:
    with short_directory() as home:
        yield home / "s"


async def listens(path: Path) -> bool:
    async with EngineClient(path, "m") as client:
        return await client.is_listening()


# ── Who listens ─────────────────────────────────────────────────────────────────────────────────


@EITHER_LOOP
def test_where_there_is_no_socket_nobody_listens(path: Path, run: Callable[[Any], bool]) -> None:
    assert not run(listens(path))


@EITHER_LOOP
def test_a_socket_that_a_dead_engine_left_is_nobody(path: Path, run: Callable[[Any], bool]) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    assert path.exists()

    assert not run(listens(path))


@EITHER_LOOP
def test_who_never_accepts_a_connection_listens(path: Path, run: Callable[[Any], bool]) -> None:
    """It is busy with a step, say."""
    with socket.socket(socket.AF_UNIX) as slow:
        slow.bind(str(path))
        slow.listen(8)

        assert run(listens(path))


@EITHER_LOOP
def test_who_has_no_room_for_another_connection_listens(
    path: Path, run: Callable[[Any], bool]
) -> None:
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket(socket.AF_UNIX))
        full.bind(str(path))
        full.listen(0)
        clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        for client in clients:
            client.setblocking(False)
        clients[0].connect(str(path))
        with pytest.raises(BlockingIOError):
            clients[1].connect(str(path))

        assert run(listens(path))


# ── Requests ────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def engine(path: Path) -> AsyncIterator[EngineClient]:
    """One whose answers say their own status, and that breaks off when asked to."""

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/breaks":
            assert request.transport
            request.transport.abort()
        return web.Response(status=int(request.query.get("status", 200)), text="said")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    async with EngineClient(path, "m") as client:
        yield client
    await runner.cleanup()


@awaited
async def test_only_200_is_healthy(path: Path) -> None:
    async with engine(path) as client:
        assert await client.is_healthy("/health")
        for status in (204, 404, 500, 503):
            assert not await client.is_healthy(f"/health?status={status}")
        assert not await client.is_healthy("/breaks")
    async with EngineClient(path, "m") as client:
        assert not await client.is_healthy("/health")


@awaited
async def test_any_status_is_an_answer_and_a_broken_one_is_none(path: Path) -> None:
    async with engine(path) as client:
        assert await client.ask("GET", "/x?status=404") == (404, b"said")
        with pytest.raises(ProbeFailed, match="GET /breaks: "):
            await client.ask("GET", "/breaks")
    async with EngineClient(path, "m") as client:
        with pytest.raises(ProbeFailed, match="GET /x: "):
            await client.ask("GET", "/x")


@awaited
async def test_an_answer_is_read_as_it_was_sent_up_to_so_many_bytes(path: Path) -> None:
    async with engine(path) as client:
        assert await client.read("/x?status=404", 5, 4) == (404, b"said")
        assert (await client.read("/x?status=302", 5, 4))[0] == 302
        with pytest.raises(ProbeFailed, match="GET /x: more than 3 bytes"):
            await client.read("/x", 5, 3)
        with pytest.raises(ProbeFailed, match="GET /breaks: "):
            await client.read("/breaks", 5, 4)
        await client.close()
        with pytest.raises(ProbeFailed, match="GET /x: "):
            await client.read("/x", 5, 4)


@awaited
async def test_what_must_succeed_tells_the_status_that_it_got(path: Path) -> None:
    async with engine(path) as client:
        assert await client.must("POST", "/x?status=201", {}) == b"said"
        with pytest.raises(ProbeFailed, match="status 500"):
            await client.must("POST", "/x?status=500", {})


@awaited
async def test_an_answer_is_waited_for_so_long_and_no_longer(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen(8)
        async with EngineClient(path, "m") as client:
            began = time.monotonic()
            with pytest.raises(ProbeFailed, match="POST /x: TimeoutError"):
                await client.ask("POST", "/x", {}, within_s=0.2)

            assert 0.15 < time.monotonic() - began < 30


# ── Over TCP ────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def on_tcp(path: Path) -> AsyncIterator[tuple[EngineClient, web.AppRunner]]:
    """One that has no unix socket: the path leads nowhere."""
    bodies: list[bytes] = []

    async def answer(request: web.Request) -> web.Response:
        bodies.append(await request.read())
        return web.Response(status=int(request.query.get("status", 200)), body=bodies[-1])

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with EngineClient(path, "m", address) as client:
        yield client, runner
    await runner.cleanup()


@awaited
async def test_who_has_an_address_is_asked_there(path: Path) -> None:
    async with on_tcp(path) as (client, _):
        assert await client.is_listening()
        assert await client.is_healthy("/healthcheck")
        assert not await client.is_healthy("/healthcheck?status=503")
        assert await client.ask("POST", "/x?status=422", {"a": 1}) == (422, b'{"a": 1}')


@awaited
async def test_who_is_gone_from_his_address_neither_listens_nor_answers(path: Path) -> None:
    async with on_tcp(path) as (client, runner):
        await runner.cleanup()

        assert not await client.is_listening()
        assert not await client.is_healthy("/healthcheck")
        with pytest.raises(ProbeFailed, match="GET /x: "):
            await client.ask("GET", "/x")


@awaited
async def test_who_is_busy_at_his_address_listens(path: Path) -> None:
    with socket.socket() as slow:
        slow.bind(("127.0.0.1", 0))
        slow.listen(8)
        address = f"http://127.0.0.1:{slow.getsockname()[1]}"
        async with EngineClient(path, "m", address) as client:
            assert await client.is_listening()
            with pytest.raises(ProbeFailed, match="GET /x: TimeoutError"):
                await client.ask("GET", "/x", within_s=0.1)

"""Large bodies: what names its model early goes to the engine as it comes, and is held nowhere."""

import asyncio
import hashlib
import io
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from hive.errors import WorkerCrashed
from hive.events import RequestAborted, RequestEnded, RequestRetried
from hive.gateway.bodies import EARLY_BYTES, MIB
from tests.gateway.serving import Serving, serving
from tests.gateway.test_answer import answering, client, dies
from tests.patience import awaited, until

SEED = 20261121
FORM = {"Content-Type": "multipart/form-data; boundary=frontier"}
PATH = "/v1/audio/transcriptions"
LARGE = 8 * MIB
SMALL_HOLD = {"max_buffered_mib": 1.0}  # of all bodies together: less than one of them


def form(audio: bytes, model: str = "m", *, is_first: bool = True) -> bytes:
    named = (
        b'--frontier\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
        + model.encode()
        + b"\r\n"
    )
    file = (
        b'--frontier\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%s\r\n'
        % audio
    )
    return (named + file if is_first else file + named) + b"--frontier--\r\n"


def recording(size: int = LARGE) -> bytes:
    return random.Random(SEED).randbytes(size)


async def cut(body: bytes, seed: int = SEED) -> AsyncIterator[bytes]:
    """Its length is not announced, and its pieces are of any size."""
    chance = random.Random(seed)
    while body:
        size = chance.randint(1, 300_000)
        yield body[:size]
        body = body[size:]


class Listener:
    """An engine that takes everything, and says what came."""

    def __init__(self) -> None:
        self.most_held = 0
        self.requests = 0
        self.it: Serving

    async def hears(self, request: web.Request) -> web.Response:
        self.requests += 1
        digest, count = hashlib.sha256(), 0
        async for part in request.content.iter_any():
            digest.update(part)
            count += len(part)
            self.most_held = max(self.most_held, self.it.gateway._inference._intake.held)
        return web.json_response(
            {
                "sha256": digest.hexdigest(),
                "bytes": count,
                "length": request.headers.get("Content-Length"),
            }
        )


async def send(it: Serving, data: Any) -> tuple[int, Any]:
    data = io.BytesIO(data) if isinstance(data, bytes) else data
    async with it.session.post(PATH, data=data, headers=FORM) as answer:
        return answer.status, await answer.json(content_type=None)


@pytest.mark.parametrize("is_announced", [True, False])
@awaited
async def test_more_than_hive_may_hold_reaches_the_engine_byte_for_byte(is_announced: bool) -> None:
    engine = Listener()
    async with serving(engine.hears, server=SMALL_HOLD) as it:
        engine.it = it
        body = form(recording())
        status, told = await send(it, body if is_announced else cut(body))

        assert status == 200
        assert told == {
            "sha256": hashlib.sha256(body).hexdigest(),
            "bytes": len(body),
            "length": str(len(body)) if is_announced else None,
        }
        assert engine.most_held <= 2 * EARLY_BYTES
        assert it.heard(RequestEnded)[0].bytes_in == len(body)
        assert it.gateway._inference._intake.held == it.door.in_flight == 0


@awaited
async def test_where_the_model_comes_behind_the_file_the_body_is_held() -> None:
    """… up to the bound of all that are held."""
    engine = Listener()
    async with serving(engine.hears, server={"max_buffered_mib": 16.0}) as it:
        engine.it = it
        body = form(recording(), is_first=False)
        status, told = await send(it, body)

        assert (status, told["sha256"]) == (200, hashlib.sha256(body).hexdigest())
        assert engine.most_held == len(body)
    async with serving(engine.hears, server=SMALL_HOLD) as it:
        status, told = await send(it, cut(body))

        assert (status, told["error"]["details"]["reason"]) == (503, "bodies_full")
        assert engine.requests == 1


@awaited
async def test_an_unknown_model_is_refused_before_the_rest_comes() -> None:
    engine = Listener()
    async with serving(engine.hears, server=SMALL_HOLD) as it:
        status, told = await send(it, form(recording(), "other"))

        assert (status, told["error"]["code"]) == (404, "MODEL_NOT_FOUND")
        assert engine.requests == it.gateway._inference._intake.held == 0


@awaited
async def test_one_that_grows_too_large_on_its_way_is_refused() -> None:
    engine = Listener()
    async with serving(engine.hears, server={"max_body_mib": 1.0}) as it:
        engine.it = it
        status, told = await send(it, cut(form(recording())))

        assert (status, told["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")
        await until(lambda: it.pulse.aborted_weight, "the abort")
        it.pulse.confirm()
        assert it.door.in_flight == 0


def beginning(length: int = LARGE) -> bytes:
    """A head, and enough of its body to be sent on."""
    body = form(recording(2 * EARLY_BYTES)).removesuffix(b"\r\n--frontier--\r\n")
    head = f"POST {PATH} HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n"
    head += f"Content-Type: {FORM['Content-Type']}\r\n\r\n"
    return head.encode() + body


@awaited
async def test_one_that_stops_coming_is_ended_at_the_engine_too() -> None:
    """(R049)"""
    left = asyncio.Event()

    async def engine(request: web.Request) -> web.Response:
        try:
            await request.read()
        finally:
            left.set()
        raise AssertionError

    async with serving(engine, server={"body_s": 0.3}) as it, client(it) as (reader, writer):
        writer.write(beginning())
        head = await reader.readuntil(b"\r\n\r\n")
        await left.wait()

        assert b" 504 " in head
        assert it.heard(RequestEnded)[0].code == "REQUEST_TIMEOUT"
        it.pulse.confirm()
        assert it.door.in_flight == 0


@awaited
async def test_a_client_that_leaves_in_the_middle_is_a_cancellation() -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def engine(request: web.Request) -> web.Response:
        try:
            await request.content.readany()
            asked.set()
            await request.read()
        finally:
            left.set()
        raise AssertionError

    async with serving(engine) as it:
        async with client(it) as (_, writer):
            writer.write(beginning())
            await asked.wait()
        await left.wait()
        await until(lambda: it.pulse.aborted_weight, "the abort")
        it.pulse.confirm()

        assert it.heard(RequestAborted)[0].confirmed == "yes"
        assert it.door.in_flight == it.gateway._inference._intake.held == 0


@awaited
async def test_an_engine_that_answers_early_is_heard_and_its_connection_not_used_again() -> None:
    """The rest of the body would be the next request's beginning."""
    refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}"
    async with serving(None) as it:
        heads = asyncio.Queue[bytes]()

        async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heads.put_nowait(await reader.readuntil(b"\r\n\r\n"))
            writer.write(refusal)
            await reader.read(-1)  # until hive hangs up
            writer.close()
            heads.put_nowait(b"hung up")

        listener = await asyncio.start_unix_server(engine, it.place.socket)
        async with client(it) as (reader, writer):
            writer.write(beginning())
            head = await reader.readuntil(b"\r\n\r\n")

            assert b" 400 " in head
            assert (await heads.get()).startswith(f"POST {PATH} ".encode())
            assert await heads.get() == b"hung up"
            assert not it.life.wires.idle
            assert it.door.in_flight == 0
        listener.close()


@awaited
async def test_a_body_that_was_sent_in_part_is_not_sent_again() -> None:
    """An engine that breaks off may have acted on it (C4)."""
    async with answering([None]) as (it, engine), client(it) as (reader, writer):
        writer.write(beginning(length=2 * EARLY_BYTES + 10**6))
        writer.write(bytes(10**6))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)

        assert b" 502 " in head
        assert len(engine.asked) <= 1
        assert engine.connections == 1
        assert it.heard(RequestRetried) == []
        it.pulse.confirm()
        assert it.door.in_flight == 0


@awaited
async def test_an_engine_that_dies_meanwhile_is_told_as_it_is() -> None:
    """(R097)"""
    async with serving(None) as it:

        async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            dies(it)
            writer.close()

        listener = await asyncio.start_unix_server(engine, it.place.socket)
        async with client(it) as (reader, writer):
            writer.write(beginning())
            head = await reader.readuntil(b"\r\n\r\n")

            assert f" {WorkerCrashed.status} ".encode() in head
            assert it.heard(RequestEnded)[0].code == WorkerCrashed.code
            assert it.heard(RequestAborted) == []
        listener.close()


@awaited
async def test_an_engine_that_does_not_read_slows_its_client_down() -> None:
    goes_on = asyncio.Event()
    engine = Listener()

    async def slow(request: web.Request) -> web.Response:
        await goes_on.wait()
        return await engine.hears(request)

    async with serving(slow, server={"max_body_mib": 64.0}) as it, client(it) as (reader, writer):
        engine.it = it
        body = form(recording(4 * LARGE))
        writer.write(
            f"POST {PATH} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n"
            f"Content-Type: {FORM['Content-Type']}\r\n\r\n".encode()
        )
        writer.write(body)
        taken = -1

        def is_stuck() -> bool:
            nonlocal taken
            before, taken = taken, len(body) - writer.transport.get_write_buffer_size()
            return taken == before

        await until(lambda: it.door.in_flight, "its slot")
        await until(is_stuck, "the client waits")
        assert taken < 3 * LARGE  # the rest is in the kernel's buffers
        passage = it.gateway._traffic.views()[0]
        assert passage["phase"] == "waiting"
        goes_on.set()
        head = await reader.readuntil(b"\r\n\r\n")
        told = await reader.read(1000)

        assert b" 200 " in head
        assert hashlib.sha256(body).hexdigest().encode() in told

"""Large bodies: what names its model early goes to the engine as it comes, and is held nowhere."""

import asyncio
import contextlib
import hashlib
import io
import random
import re
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvloop
from aiohttp import web

from hive.errors import WorkerCrashed
from hive.events import RequestAborted, RequestEnded, RequestRetried
from hive.gateway.bodies import EARLY_BYTES, MIB
from tests.gateway.serving import Serving, serving
from tests.gateway.test_answer import answering, client, dies
from tests.patience import awaited, until, within

SEED = 20261121
uvloop.new_event_loop().close()  # libuv keeps a pipe of its own from the first one on
FORM = {"Content-Type": "multipart/form-data; boundary=frontier"}
PATH = "/v1/audio/transcriptions"
TIMES = 60
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
        assert free_at_once(it)


def free_at_once(it: Serving) -> bool:
    """The engine never had the whole request, so there is nothing that it must end first."""
    return it.door.in_flight == it.pulse.aborted_weight == it.gateway._inference._intake.held == 0


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
        assert free_at_once(it)


@awaited
async def test_a_client_that_leaves_in_the_middle_leaves_nothing() -> None:
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
        await until(lambda: it.heard(RequestEnded), "its end")

        assert it.heard(RequestEnded)[0].status == 499
        assert it.heard(RequestAborted) == []
        assert free_at_once(it)


@awaited
async def test_an_engine_that_answers_early_is_heard_and_its_connection_not_used_again() -> None:
    """The rest of the body would be the next request's beginning."""
    sent = beginning().partition(b"\r\n\r\n")[2]
    refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}"
    async with serving(None) as it:
        heads = asyncio.Queue[bytes]()

        async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heads.put_nowait(await reader.readuntil(b"\r\n\r\n"))
            await reader.readexactly(len(sent))  # nothing waits anywhere, and it is not all
            writer.write(refusal)
            await reader.read(-1)  # until hive hangs up
            writer.close()
            heads.put_nowait(b"hung up")

        listener = await asyncio.start_unix_server(engine, it.place.socket)
        async with client(it) as (reader, writer):
            writer.write(beginning())
            head = await reader.readuntil(b"\r\n\r\n")

            assert b" 400 " in head
            assert not it.life.wires.idle
            assert (await heads.get()).startswith(f"POST {PATH} ".encode())
            assert await heads.get() == b"hung up"
            assert it.door.in_flight == 0
        listener.close()


@awaited
async def test_a_body_that_was_sent_in_part_is_not_sent_again() -> None:
    """An engine that breaks off may have acted on it (C4)."""
    async with answering([None]) as (it, engine), client(it) as (reader, writer):
        writer.write(beginning(length=2 * EARLY_BYTES + 10**6))
        writer.write(bytes(10**6))
        head = await within(reader.readuntil(b"\r\n\r\n"), 20)

        assert b" 502 " in head
        assert len(engine.asked) <= 1
        assert engine.connections == 1
        assert it.heard(RequestRetried) == []
        it.pulse.confirm()  # it had all of it
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


# ── whose slowness it is ────────────────────────────────────────────────────────────────────────


@awaited
async def test_until_the_engine_has_it_all_it_is_no_work_of_the_engine() -> None:
    """Else a slow client would make the engine look hung, and other aborts look confirmed."""
    came, goes_on = asyncio.Event(), asyncio.Event()

    async def engine(request: web.Request) -> web.Response:
        await request.content.readany()
        came.set()
        await request.read()
        await goes_on.wait()
        return web.json_response({})

    body = form(recording(2 * EARLY_BYTES))
    async with serving(engine) as it, client(it) as (reader, writer):
        writer.write(whole_head(len(body)) + body[:-10])
        await came.wait()
        assert (it.door.in_flight, it.pulse.open_weight) == (1, 0)
        writer.write(body[-10:])
        await until(lambda: it.pulse.open_weight, "the engine's work")
        goes_on.set()

        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        assert it.pulse.open_weight == it.door.in_flight == 0


def whole_head(length: int) -> bytes:
    return (
        f"POST {PATH} HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n"
        f"Content-Type: {FORM['Content-Type']}\r\n\r\n"
    ).encode()


LIMITS = {"request_s": 5.0, "inference_s": 0.4, "cleanup_s": 0.5, "queue_s": 0.5, "stall_s": 0.4}


@awaited
async def test_the_engines_time_begins_when_it_has_everything() -> None:
    engine = Listener()
    body = form(recording(2 * EARLY_BYTES))
    async with serving(engine.hears, timeouts=LIMITS) as it, client(it) as (reader, writer):
        engine.it = it
        began = time.monotonic()
        writer.write(whole_head(len(body)) + body[:-10])
        await until(lambda: time.monotonic() > began + 2 * LIMITS["inference_s"], "its pause's end")
        writer.write(body[-10:])

        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")


@awaited
async def test_an_upload_has_the_requests_limit_too() -> None:
    """(R047)"""
    limits = LIMITS | {"request_s": 1.5}
    engine = Listener()
    async with serving(engine.hears, timeouts=limits) as it, client(it) as (reader, writer):
        engine.it = it
        writer.write(beginning())
        head = await reader.readuntil(b"\r\n\r\n")

        assert b" 504 " in head
        assert it.heard(RequestEnded)[0].code == "REQUEST_TIMEOUT"
        assert free_at_once(it)


@awaited
async def test_an_engine_that_takes_nothing_has_its_limit() -> None:
    stuck = asyncio.Event()

    async def engine(_request: web.Request) -> web.Response:
        await stuck.wait()
        return web.Response()

    body = form(recording(2 * LARGE))
    async with serving(engine, timeouts=LIMITS) as it, client(it) as (reader, writer):
        writer.write(whole_head(len(body)) + body)
        head = await reader.readuntil(b"\r\n\r\n")

        assert b" 504 " in head
        assert it.heard(RequestEnded)[0].code == "INFERENCE_TIMEOUT"
        assert free_at_once(it)
        stuck.set()


@awaited
async def test_slow_clients_leave_half_of_the_slots_to_others() -> None:
    """What would take more is held until it is whole, as any other body."""
    engine = Listener()
    body = form(recording(2 * EARLY_BYTES))
    async with (
        serving(engine.hears, {"max_concurrent": 4}) as it,
        client(it) as (one, first),
        client(it) as (_, second),
        client(it) as (other, third),
    ):
        engine.it = it
        for writer in (first, second):
            writer.write(whole_head(len(body)) + body[:-10])
        await until(lambda: it.door.in_flight == 2, "their slots")
        third.write(whole_head(len(body)) + body[:-10])
        intake = it.gateway._inference._intake
        await until(lambda: intake.held >= len(body) - 10, "the third one")
        assert it.door.in_flight == 2
        assert (await it.chat())[0].status == 200
        for writer in (third, first):
            writer.write(body[-10:])

        assert b" 200 " in await other.readuntil(b"\r\n\r\n")
        assert b" 200 " in await one.readuntil(b"\r\n\r\n")


@awaited
async def test_no_slow_client_is_the_probe_of_a_broken_worker() -> None:
    """(R009)"""
    broken = True

    async def engine(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({}, status=500 if broken else 200)

    body = form(recording(2 * EARLY_BYTES))
    settings = {"failures": 1, "cooldown_s": 0.1}
    async with serving(engine, breaker=settings) as it, client(it) as (reader, writer):
        assert (await it.chat())[0].status == 500
        broken = False
        await until(lambda: it.door.room.open_workers, "its second chance")
        writer.write(whole_head(len(body)) + body[:-10])
        await until(lambda: it.gateway._inference._intake.held >= len(body) - 10, "the upload")
        assert (await it.chat())[0].status == 200
        writer.write(body[-10:])

        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")


@pytest.mark.parametrize("how", ["queued", "sent on"])
@pytest.mark.parametrize("is_reset", [True, False])
@awaited
async def test_a_client_that_leaves_while_nothing_is_read_from_it_is_noticed(
    how: str, is_reset: bool
) -> None:
    stuck = asyncio.Event()

    async def engine(_request: web.Request) -> web.Response:
        await stuck.wait()
        return web.Response()

    body = form(recording(2 * LARGE))
    model = {"max_concurrent": 2, "queue_depth": 1}
    holders = 2 if how == "queued" else 0
    async with serving(engine, model) as it, asyncio.TaskGroup() as tasks:
        for _ in range(holders):
            tasks.create_task(it.chat())
        await until(lambda: it.door.in_flight == holders, "their slots")
        async with client(it) as (_, writer):
            # Behind more than the kernel takes, an end without a reset would wait as well.
            writer.write(whole_head(len(body)) + body if is_reset else beginning())
            await until(lambda: it.door.waiting if holders else it.door.in_flight, "its turn")
            if is_reset:
                made = writer.get_extra_info("socket")
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            began = time.monotonic()
            await until(lambda: it.heard(RequestEnded), "its end")

        assert time.monotonic() < began + 2
        assert it.heard(RequestEnded)[0].status == 499
        assert it.gateway._inference._intake.held < 100  # of who holds the slots
        assert (it.door.waiting, it.door.in_flight) == (0, holders)
        stuck.set()


@pytest.mark.parametrize("has_read", [1, 200_000, 400_000, 700_000])
def test_what_an_engine_said_before_it_hung_up_is_heard(has_read: int) -> None:
    """A write that fails must not hide the answer that is there to be read (uvicorn closes)."""
    uvloop.run(answers_early(has_read))


async def answer_to_pieces(it: Serving, body: bytes) -> bytes:
    """Of a client that goes on sending while it waits."""
    async with client(it) as (reader, writer), asyncio.TaskGroup() as tasks:

        async def goes_on() -> None:
            writer.write(whole_head(len(body)))
            with contextlib.suppress(ConnectionError):
                for at in range(0, len(body), 8192):
                    writer.write(body[at : at + 8192])
                    await writer.drain()
                    await asyncio.sleep(0)

        sending = tasks.create_task(goes_on())
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length
        content = await reader.readexactly(int(length[1]))
        sending.cancel()
    return head + content


async def answers_early(has_read: int) -> None:
    told = b'{"error": {"message": "no such path"}}'
    answer = b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"

    def engine(listener: socket.socket) -> None:
        for _ in range(TIMES):
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):
                got = 0
                while got < has_read:
                    got += len(connection.recv(65536))
                connection.sendall(answer % (len(told), told))

    body = form(recording(MIB))
    async with serving(None) as it:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(it.place.socket))
            listener.listen(8)
            listener.settimeout(10)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(asyncio.to_thread(engine, listener))
                for _ in range(TIMES):
                    assert told in await answer_to_pieces(it, body)
        assert it.breaker == "closed"
        assert it.door.breakers["m-0"].count == 0

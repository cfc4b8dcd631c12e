"""Answers byte for byte, whatever an engine sends and however: a raw engine, a raw client."""

import asyncio
import contextlib
import json
import random
import re
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from hive.errors import WorkerCrashed
from hive.gateway.answer import begun_mark
from hive.gateway.traffic import Passage
from hive.policy.framing import Chunks, chunk
from hive.policy.retries import RETRIES, RetryPolicy
from hive.workers.process import Exit
from tests.gateway.serving import CHAT, Serving, serving
from tests.patience import awaited, until, within

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
LAST = b"0\r\n\r\n"
EVENT = b'data: {"id": 1}\n\n'
FAILS = b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n'
SEED = 20261121
Script = list[bytes | float | asyncio.Event | Callable[[], None] | None]


class RawEngine:
    """Answers each request with its script: bytes; seconds to wait; an event; a call;
    None hangs up.

    The last script is for all further requests, too.
    """

    def __init__(self, scripts: tuple[Script, ...]) -> None:
        self.scripts = list(scripts)
        self.asked: list[bytes] = []
        self.connections = self.ended = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"Content-Length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                self.asked.append(head + body)
                for step in self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]:
                    if step is None:
                        return
                    if isinstance(step, bytes):
                        writer.write(step)
                        await writer.drain()
                        await asyncio.sleep(0)
                    elif isinstance(step, float):
                        await asyncio.sleep(step)
                    elif isinstance(step, asyncio.Event):
                        await step.wait()
                    else:
                        step()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            self.ended += 1


@asynccontextmanager
async def answering(
    *scripts: Script,
    timeouts: dict[str, float] | None = None,
    breaker: dict[str, float] | None = None,
    server: dict[str, float] | None = None,
    model: dict[str, Any] | None = None,
) -> AsyncIterator[tuple[Serving, RawEngine]]:
    engine = RawEngine(scripts)
    async with serving(
        None, model, timeouts=timeouts or {}, breaker=breaker or {}, server=server or {}
    ) as it:
        life = it.life
        listener = await asyncio.start_unix_server(engine.serve, it.place.socket)
        try:
            yield it, engine
        finally:
            life.wires.close()
            await until(lambda: engine.ended == engine.connections, "its connections' end")
            listener.close()


def request(version: bytes = b"1.1", fields: bytes = b"") -> bytes:
    body = json.dumps(CHAT).encode()
    return (
        b"POST /v1/chat/completions HTTP/%s\r\nHost: h\r\nX-Request-Id: r\r\n%sContent-Length: %d"
        b"\r\n\r\n%s" % (version, fields, len(body), body)
    )


@asynccontextmanager
async def client(it: Serving) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def asked(it: Serving, sent: bytes = b"") -> tuple[bytes, bytes]:
    """Head and body of what a client gets until its connection ends."""
    async with client(it) as (reader, writer):
        writer.write(sent or request(fields=b"Connection: close\r\n"))
        head, _, body = (await within(reader.read(-1), 20)).partition(b"\r\n\r\n")
        return head + b"\r\n", body


def payload(body: bytes) -> bytes:
    found: list[bytes] = []
    assert Chunks().feed(body, found) == len(body)
    return b"".join(found)


def dies(it: Serving) -> None:
    """The engine's process ends by itself."""
    it.life.over.set_result(Exit(None, signal.SIGKILL))


# ── unchanged ───────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_stream_cut_at_every_byte_arrives_byte_for_byte() -> None:
    body = chunk(EVENT) + b"5;x=y\r\ndata:\r\n" + chunk(b" \xff\n\n") + b"0\r\nX-T: y\r\n\r\n"
    raw = STREAM + body
    for cut in range(1, len(raw)):
        async with answering([raw[:cut], 0.001, raw[cut:]]) as (it, engine):
            head, got = await asked(it)
            assert got == body, cut
            assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
            assert (it.door.in_flight, engine.connections) == (0, 1)


@awaited
async def test_a_plain_answer_cut_at_every_byte_arrives_byte_for_byte() -> None:
    raw = b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN % 6 + b'{"a":1'
    for cut in range(1, len(raw)):
        async with answering([raw[:cut], 0.001, raw[cut:]]) as (it, _):
            head, got = await asked(it)
            assert (got, b"Content-Length: 6\r\n" in head) == (b'{"a":1', True), cut


@pytest.mark.parametrize("number", range(8))
@awaited
async def test_random_streams_through_random_readers_arrive_byte_for_byte(number: int) -> None:
    """Sizes, cuts and pauses of both sides at random; several on one connection."""
    chance = random.Random(f"{SEED} {number}")
    size = chance.choice((1, 20, 3000, 70_000))
    chunks = [chance.randbytes(chance.randint(1, size)) for _ in range(chance.randint(1, 200))]
    body = b"".join(chunk(part.replace(b"error", b"eRror")) for part in chunks) + LAST
    raw, script = STREAM + body, Script()
    while raw:
        cut = chance.choice((1, 7, 1000, 100_000))
        script.append(raw[:cut])
        raw = raw[cut:]
        if chance.random() < min(0.2, 20 / len(chunks)):
            script.append(chance.uniform(0, 0.003))
    async with answering(script) as (it, engine), client(it) as (reader, writer):
        for _ in range(3):
            writer.write(request())
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"Transfer-Encoding: chunked" in head
            got = b""
            while len(got) < len(body):
                piece = await reader.read(chance.choice((10, 5000, 300_000)))
                assert piece
                got += piece
                if chance.random() < 0.01:
                    await asyncio.sleep(chance.uniform(0, 0.005))
            assert got == body
        assert it.door.in_flight == 0
        assert engine.connections <= 3


@awaited
async def test_an_answer_until_its_connection_ends_gets_chunks() -> None:
    """Else a client could not tell its end from a broken connection."""
    script: Script = [b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nab", 0.01, b"cd", None]
    async with answering(script) as (it, _):
        head, body = await asked(it)
        assert b"Transfer-Encoding: chunked\r\n" in head
        assert (payload(body), body[-5:]) == (b"abcd", LAST)
        assert it.door.breakers["m-0"].count == 0


@awaited
async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    async with answering([STREAM + chunk(EVENT), 0.01, chunk(EVENT) + LAST]) as (it, _):
        head, body = await asked(it, request(b"1.0"))
        assert b"Transfer-Encoding" not in head
        assert b"Connection: close\r\n" in head
        assert body == EVENT * 2


@pytest.mark.parametrize("status", [204, 304, 200])
@awaited
async def test_an_answer_without_a_body_ends_at_its_head(status: int) -> None:
    length = b"Content-Length: 0\r\n" if status == 200 else b""
    async with answering([b"HTTP/1.1 %d x\r\n%s\r\n" % (status, length)]) as (it, engine):
        async with client(it) as (reader, writer):
            for _ in range(3):
                writer.write(request())
                head = await within(reader.readuntil(b"\r\n\r\n"), 5)
                assert head.startswith(b"HTTP/1.1 %d" % status)
        assert engine.connections == 1
        assert it.door.in_flight == 0


@awaited
async def test_pipelined_requests_are_answered_one_after_the_other() -> None:
    async with answering([PLAIN % 2, b"ok"]) as (it, engine), client(it) as (reader, writer):
        writer.write(request() * 5)
        for _ in range(5):
            await within(reader.readuntil(b"\r\n\r\nok"), 5)
        assert len(engine.asked) == 5


@awaited
async def test_hops_and_credentials_do_not_reach_the_engine() -> None:
    fields = (
        b"Authorization: Bearer x\r\nCookie: a=b\r\nX-Api-Key: y\r\nTE: trailers\r\n"
        b"Connection: close, X-Hop\r\nX-Hop: 1\r\nX-Kept: \xe4\r\nx-kept: 2\r\nExpect: \r\n"
    )
    async with answering([PLAIN % 2, b"ok"]) as (it, engine):
        await asked(it, request(fields=fields))
        names = [
            line.partition(b":")[0] for line in engine.asked[0].split(b"\r\n\r\n")[0].splitlines()
        ]
        assert names[1:] == [b"Host", b"X-Kept", b"x-kept", b"X-Request-Id", b"Content-Length"]
        assert b"X-Kept: \xe4\r\n" in engine.asked[0]


@awaited
async def test_the_absolute_form_of_a_path_is_sent_as_a_path() -> None:
    asking = request(fields=b"Connection: close\r\n").replace(
        b"POST /v1/chat/completions", b"POST http://h/v1/chat/completions?a=%2F"
    )
    async with answering([PLAIN % 2, b"ok"]) as (it, engine):
        await asked(it, asking)
        assert engine.asked[0].startswith(b"POST /v1/chat/completions?a=%2F HTTP/1.1\r\n")


# ── broken ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "answer",
    [
        b"what?\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok",
        STREAM + b"zz\r\n",
    ],
)
@awaited
async def test_nonsense_is_a_bad_gateway_and_nothing_of_it_reaches_the_next_one(
    answer: bytes,
) -> None:
    async with answering([answer], [PLAIN % 2, b"ok"]) as (it, engine):
        head, body = await asked(it)
        assert head.startswith(b"HTTP/1.1 502 ")
        assert json.loads(body)["error"]["code"] == "BAD_GATEWAY"
        assert (await asked(it))[1] == b"ok"
        assert engine.connections == 2


@awaited
async def test_a_stream_that_turns_into_nonsense_is_cut() -> None:
    """An error is added only where the client is between two events."""
    async with answering([STREAM + chunk(EVENT), 0.01, b"zz\r\n"]) as (it, _):
        _, body = await asked(it)
        assert body.startswith(chunk(EVENT) + b"")
        assert payload(body).endswith(b"\n\n")
        assert b"BAD_GATEWAY" in payload(body)
    async with answering([STREAM + b"5\r\nhello", 0.01, None]) as (it, _):
        assert (await asked(it))[1] == b"5\r\nhello"


@awaited
async def test_a_connection_closed_as_it_was_used_again_is_replaced_at_once() -> None:
    well: Script = [PLAIN % 2, b"ok"]
    async with answering(well, [None], well) as (it, engine), client(it) as (reader, writer):
        writer.write(request())
        await reader.readuntil(b"ok")
        assert len(it.life.wires.idle) == 1
        writer.write(request())
        assert b"200 OK" in await within(reader.readuntil(b"ok"), 5)
        assert (engine.connections, len(engine.asked)) == (2, 3)
        assert it.door.breakers["m-0"].count == 0


# ── what an engine says as it dies ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("piece", "held"),
    [
        (b'data: {"id":1}\n\n', 0),
        (b'data: {"id":1}\n\ndata: {"err', 11),
        (b'data: {"id":1}\n\ndata: {"id', 0),
        (b"data: x\n\neven", 4),
        (b"d", 1),
        (b"", 0),
    ],
)
def test_an_error_cut_by_the_pieces_end_is_held_until_it_is_whole(piece: bytes, held: int) -> None:
    assert begun_mark(piece) == held


@pytest.mark.parametrize(
    "body",
    [
        [chunk(EVENT), 0.01, chunk(FAILS)],
        [chunk(EVENT), 0.01, chunk(EVENT) + chunk(FAILS)],
        [chunk(EVENT), 0.01, chunk(EVENT + FAILS)],
        [chunk(EVENT), 0.01, chunk(FAILS)[:-9], 0.01, chunk(FAILS)[-9:]],
    ],
    ids=["alone", "behind another", "in another's chunk", "in two pieces"],
)
@awaited
async def test_a_dying_engines_own_error_is_replaced_by_hives(body: Script) -> None:
    """R065 and the contract's coded error, as the last event of whole chunks."""
    async with answering([STREAM, *body, lambda: dies(it)]) as (it, _):
        text = payload((await asked(it))[1])
        sent = b"".join(part for part in body if isinstance(part, bytes)).count(EVENT)
        assert text.startswith(EVENT * sent + b"event: error\ndata: {")
        assert b"EngineCore died" not in text
        assert WorkerCrashed.code.encode() in text


@pytest.mark.parametrize("body", [chunk(EVENT) + chunk(FAILS), chunk(FAILS), chunk(EVENT + FAILS)])
@awaited
async def test_what_dies_before_anything_was_sent_is_told_by_a_status(body: bytes) -> None:
    async with answering([STREAM + body, lambda: dies(it)]) as (it, _):
        head, told = await asked(it)
        assert head.startswith(b"HTTP/1.1 502 ")
        assert json.loads(told)["error"]["code"] == WorkerCrashed.code


@awaited
async def test_a_dying_engine_in_the_middle_of_a_chunk_is_a_cut() -> None:
    """The chunk has begun for the client: no event of hive's can be in it."""
    begun = chunk(EVENT) + b"%x\r\n" % len(FAILS)
    async with answering([STREAM + begun, 0.01, FAILS, lambda: dies(it)]) as (it, _):
        assert (await asked(it))[1] == begun


@pytest.mark.parametrize("size", [3, 1000])
@awaited
async def test_a_living_engines_own_error_is_passed_on_unchanged(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive.gateway.relay.EXIT_S", 0.02)
    body = chunk(EVENT) + chunk(FAILS) + chunk(b"data: [DONE]\n\n") + LAST
    script: Script = [STREAM]
    for at in range(0, len(body), size):
        script += [body[at : at + size], 0.0005]
    async with answering(script) as (it, _):
        assert (await asked(it))[1] == body


@awaited
async def test_words_that_only_look_like_an_error_are_no_error() -> None:
    """In the middle of a line, and in what an answer quotes."""
    said = b'data: {"text": "event: error data: {\\"error\\""}\n\n'
    body = chunk(said) + LAST
    cut = body.index(b"event")
    async with answering([STREAM, body[:cut], 0.01, body[cut:]]) as (it, _):
        began = asyncio.get_running_loop().time()
        assert (await asked(it))[1] == body
        assert asyncio.get_running_loop().time() - began < 0.9  # nobody waited for its end


@awaited
async def test_a_dead_cores_500_becomes_hives_error() -> None:
    said = b'{"error": {"message": "EngineCore encountered an issue"}}'
    raw = (PLAIN % len(said)).replace(b"200 OK", b"500 Internal Server Error")
    async with answering([raw, said[:9], 0.01, said[9:], lambda: dies(it)]) as (it, _):
        head, body = await asked(it)
        assert head.startswith(b"HTTP/1.1 502 ")
        assert json.loads(body)["error"]["code"] == WorkerCrashed.code


# ── slow clients ────────────────────────────────────────────────────────────────────────────────


STALL = {"stall_s": 0.3}


async def full(it: Serving, writer: asyncio.StreamWriter) -> None:
    """A client that asks and does not read: its window is as small as it can be."""
    writer.write(request())
    await until(lambda: any(p.has_read for p in passages(it)), "a full connection")


def passages(it: Serving) -> list[Passage]:
    return list(it.gateway._traffic._passages.values())


@awaited
async def test_a_client_that_reads_nothing_is_cut_off_and_nothing_more_is_written() -> None:
    body = b"".join(chunk(b"data: " + b"x" * 60_000 + b"\n\n") for _ in range(300)) + LAST
    async with answering([STREAM, body], timeouts=STALL) as (it, _), client(it) as (reader, writer):
        await full(it, writer)
        await until(lambda: not passages(it), "its end")
        with contextlib.suppress(ConnectionError):
            got = await within(reader.read(-1), 10)
            assert b"499" not in got
            assert len(got) < len(body)
        assert it.pulse.aborted_weight == 1
        it.pulse.confirm()
        assert it.door.in_flight == 0


@awaited
async def test_a_client_that_reads_slowly_has_its_answer_and_holds_no_slot() -> None:
    """The engine is done: the rest is between hive and the client."""
    size = 6 * 2**20
    script: Script = [PLAIN % size, b"x" * size]
    async with answering(script, timeouts=STALL) as (it, _), client(it) as (reader, writer):
        await full(it, writer)
        assert it.door.in_flight == 0
        got = await reader.readuntil(b"\r\n\r\n")
        left = size
        while left:
            piece = await reader.read(min(left, 200_000))
            assert piece, f"{left} bytes are missing"
            left -= len(piece)
            await asyncio.sleep(0.02)
        assert b"200 OK" in got


@awaited
async def test_an_engines_end_does_not_touch_an_answer_that_is_whole() -> None:
    size = 6 * 2**20
    script: Script = [PLAIN % size, b"x" * size]
    async with answering(script) as (it, _), client(it) as (reader, writer):
        await full(it, writer)
        await it.life.close()
        await reader.readuntil(b"\r\n\r\n")
        assert len(await within(reader.readexactly(size), 20)) == size


# ── what an attempt says of its worker ──────────────────────────────────────────────────────────


@awaited
async def test_a_probe_closes_the_breaker_with_its_first_bytes_and_may_fail_later() -> None:
    """Its stream may be long: nobody else waits for its end (R006, C5)."""
    broken: Script = [b"HTTP/1.1 500 x\r\nContent-Length: 1\r\n\r\nx"]
    go_on = asyncio.Event()
    stream: Script = [STREAM + chunk(EVENT), go_on, None]
    limits = {"failures": 1, "cooldown_s": 0.05}
    async with answering(broken, stream, breaker=limits) as (it, _), client(it) as (reader, writer):
        await asked(it)
        assert it.breaker == "open"
        await until(lambda: it.door.room.open_workers, "the cooldown's end")
        writer.write(request())
        await reader.readuntil(EVENT)
        assert it.breaker == "closed"
        go_on.set()
        await until(lambda: it.breaker == "open", "the fault of what follows")


@awaited
async def test_one_request_is_one_fault_however_often_it_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else one that its engine cannot bear would keep all others out."""
    monkeypatch.setitem(RETRIES, "network", RetryPolicy(5, (0.01,)))
    async with answering([None], breaker={"failures": 2, "cooldown_s": 60}) as (it, engine):
        head, _ = await asked(it)
        assert head.startswith(b"HTTP/1.1 502 ")
        assert (len(engine.asked), it.breaker) == (5, "closed")
        await asked(it)
        assert it.breaker == "open"


@awaited
async def test_a_body_is_let_go_with_the_answers_first_byte() -> None:
    """Long streams of large requests must not keep others out."""
    go_on = asyncio.Event()
    room = {"max_buffered_mib": 1.5 * len(json.dumps(CHAT)) / 2**20}  # for one at a time
    stream: Script = [STREAM + chunk(EVENT), go_on, LAST]
    async with (
        answering(stream, [PLAIN % 2, b"ok"], server=room) as (it, _),
        client(it) as (reader, writer),
    ):
        writer.write(request(fields=b"Connection: close\r\n"))
        await reader.readuntil(EVENT)
        another = request(fields=b"Connection: close\r\n").replace(b"Id: r", b"Id: s")
        assert (await asked(it, another))[1] == b"ok"
        go_on.set()
        await reader.read(-1)


# ── what a session hears of it ──────────────────────────────────────────────────────────────────

WINDOWS = {"windows": True, "command": ["x{socket}", "{kv}"]}


class Talk:
    """A session of its own for each request."""

    def __init__(self, it: Serving) -> None:
        assert it.kept is not None
        self.it, self.sessions = it, it.kept.sessions
        self.id = ""

    async def ask(self, path: bytes, body: dict[str, object]) -> tuple[bytes, bytes]:
        """What the client gets: head and body."""
        self.id = (await self.sessions.create("", "m")).id
        raw = json.dumps({"model": "m", **body}).encode()
        head = b"POST %s HTTP/1.1\r\nHost: h\r\nX-Hive-Session: %s\r\nConnection: close\r\n"
        length = b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)
        return await asked(self.it, head % (path, self.id.encode()) + length)

    async def heard(self) -> Any:
        """The last message of what was written down; None where nothing was."""
        await self.sessions.recorded(self.id)
        told = await self.sessions._catalogue.conversation(self.id, None)
        if told is None:
            return None
        return told["body"].get("prompt") or told["body"]["messages"][-1]


def sse(*events: object) -> bytes:
    """As one stream of events; a str goes as it is."""
    texts = [one if isinstance(one, str) else json.dumps(one) for one in events]
    return b"".join(b"data: %b\n\n" % text.encode() for text in texts)


def delta(reason: str | None = None, **told: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": told, "finish_reason": reason}]}


def call(at: int, **told: object) -> dict[str, object]:
    return delta(tool_calls=[{"index": at, **told}])


USER = [{"role": "user", "content": "häng an"}]
CHAT_PATH, TEXT_PATH, MESSAGES_PATH = b"/v1/chat/completions", b"/v1/completions", b"/v1/messages"
CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": "ä"}'}},
    {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}},
]
SAID: dict[str, tuple[bytes, dict[str, object], bytes, object]] = {
    "chat": (
        CHAT_PATH,
        {"messages": USER, "stream": True},
        sse(
            delta(role="assistant", content=""),
            delta(content="hä"),
            {"choices": [{"index": 1, "delta": {"content": "another"}, "finish_reason": None}]},
            delta(content=None),
            delta("stop", content="llo"),
            {"choices": [], "usage": {"prompt_tokens_details": None}},
            "[DONE]",
        ),
        {"role": "assistant", "content": "hällo"},
    ),
    "tool calls": (
        CHAT_PATH,
        {"messages": USER, "stream": True, "tools": []},
        sse(
            call(0, id="c1", type="function", function={"name": "f", "arguments": ""}),
            call(0, function={"arguments": '{"a": '}),
            call(1, id="c2", type="function", function={"name": "g"}),
            call(0, function={"arguments": '"ä"}'}),
            delta("tool_calls"),
            "[DONE]",
        ),
        {"role": "assistant", "content": "", "tool_calls": CALLS},
    ),
    "completion": (
        TEXT_PATH,
        {"prompt": "one ", "stream": True},
        sse(
            {"choices": [{"index": 0, "text": "two ", "finish_reason": None}]},
            {"choices": [{"index": 0, "text": "three", "finish_reason": "length"}]},
            "[DONE]",
        ),
        "one two three",
    ),
    "messages": (
        MESSAGES_PATH,
        {"messages": USER, "stream": True, "max_tokens": 9},
        sse(
            {"type": "message_start", "message": {}},
            {
                "type": "content_block_start",
                "index": 0,
                "content_block": {"type": "text", "text": ""},
            },
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": "ä"},
            },
            {
                "type": "content_block_start",
                "index": 1,
                "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}},
            },
            {
                "type": "content_block_delta",
                "index": 1,
                "delta": {"type": "input_json_delta", "partial_json": '{"a":'},
            },
            {
                "type": "content_block_delta",
                "index": 1,
                "delta": {"type": "input_json_delta", "partial_json": " 1}"},
            },
            {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {}},
            {"type": "message_stop"},
        ),
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "ä"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
            ],
        },
    ),
}


@pytest.mark.parametrize("kind", SAID)
@awaited
async def test_a_streamed_answer_is_heard_whole_however_it_comes(kind: str) -> None:
    """C.5: what a session goes on with is what its client got, byte for byte, tool calls too."""
    path, body, said, wanted = SAID[kind]
    chance = random.Random(f"{SEED} {kind}")
    for size in (1, 2, 7, 60, 100_000):
        pieces = [said[at : at + size] for at in range(0, len(said), size)]
        raw = b"".join(chunk(piece) for piece in pieces) + LAST
        cut = chance.randint(1, len(raw) - 1)
        script: Script = [STREAM, 0.001, raw[:cut], 0.001, raw[cut:]]
        async with answering(script, model=WINDOWS) as (it, engine):
            talk = Talk(it)
            _, got = await talk.ask(path, body)
            assert got == raw
            assert await talk.heard() == wanted
            assert b'"cache_salt":"' in engine.asked[0]
            assert repr(talk.sessions) == "<Sessions 0 in use>"


@pytest.mark.parametrize("ending", ["a length", "the connection's end"])
@awaited
async def test_a_plain_answer_is_heard_whole_however_it_comes(ending: str) -> None:
    told = {"choices": [{"message": {"content": "hä"}, "finish_reason": "stop"}], "usage": None}
    said = json.dumps(told, ensure_ascii=False).encode()
    head = PLAIN % len(said)
    script: Script = [head, *(said[at : at + 3] for at in range(0, len(said), 3))]
    if ending == "the connection's end":
        script[0] = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
        script.append(None)
    async with answering(script, model=WINDOWS) as (it, _):
        talk = Talk(it)
        _, got = await talk.ask(CHAT_PATH, {"messages": USER})
        assert json.loads(payload(got) if ending != "a length" else got) == told
        assert await talk.heard() == {"role": "assistant", "content": "hä"}


@pytest.mark.parametrize(
    "script",
    [
        [STREAM, chunk(sse(delta(content="a"))), None],
        [STREAM, chunk(sse(delta("abort", content="a"), "[DONE]")) + LAST],
        [STREAM, chunk(sse(delta("stop", content="a"))) + LAST],
        [STREAM, chunk(sse(delta(content="a"), "[DONE]")) + LAST],
        [STREAM, chunk(sse(delta("stop"), "[DONE]") + b"data: {\n\n") + LAST],
        [STREAM, chunk(sse(delta("stop", content="a")) + b"data: \xff\n\n" + sse("[DONE]")) + LAST],
        [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}"],
        [PLAIN % 2, b"no"],
    ],
    ids=["cut", "aborted", "not done", "no reason", "no JSON", "no text", "refused", "no object"],
)
@awaited
async def test_an_answer_that_is_not_whole_is_no_part_of_a_conversation(script: Script) -> None:
    """R107: a session goes on from its last whole answer."""
    async with answering(script, model=WINDOWS) as (it, _):
        talk = Talk(it)
        await talk.ask(CHAT_PATH, {"messages": USER, "stream": True})
        await until(lambda: repr(talk.sessions) == "<Sessions 0 in use>", "its end")
        assert await talk.heard() is None


@awaited
async def test_a_living_engines_own_error_ends_the_answer_and_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hive.gateway.relay.EXIT_S", 0.02)
    body = chunk(sse(delta(content="a"))) + chunk(FAILS) + chunk(sse("[DONE]")) + LAST
    script: Script = [STREAM, *(body[at : at + 9] for at in range(0, len(body), 9))]
    async with answering(script, model=WINDOWS) as (it, _):
        talk = Talk(it)
        assert (await talk.ask(CHAT_PATH, {"messages": USER}))[1] == body
        assert await talk.heard() is None


@awaited
async def test_of_a_request_that_is_sent_again_only_the_last_answer_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """R001: the one that its client got."""
    monkeypatch.setattr("hive.gateway.relay.EXIT_S", 0.02)
    monkeypatch.setitem(RETRIES, "network", RetryPolicy(5, (0.01,)))
    path, body, said, wanted = SAID["chat"]
    whole: Script = [STREAM, chunk(said) + LAST]
    async with answering([None], [None], whole, model=WINDOWS) as (it, engine):
        talk = Talk(it)
        assert (await talk.ask(path, body))[1] == chunk(said) + LAST
        assert len(engine.asked) == 3
        salts = {re.findall(rb'"cache_salt":"([^"]{22})"', one)[0] for one in engine.asked}
        assert len(salts) == 1
        assert await talk.heard() == wanted

"""The way of the bytes: through hive they are the engine's own, each once and in order."""

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from hive.events import RequestAborted, RequestExpired
from steps.driver import Double, Hive, chat_body
from steps.waiting import must
from tests.gateway.serving import Engine, serving
from tests.patience import awaited, until

CHAT = "/v1/chat/completions"
STREAMS = 200
TOKENS, MANY_TOKENS = 60, 5000
LONGEST_S = 600
BODIES = {
    CHAT: chat_body("m", "abc", max_tokens=7),
    "/v1/completions": {"model": "m", "prompt": "tag=abc", "max_tokens": 7},
    "/v1/messages": chat_body("m", "abc", max_tokens=7),
    "/v1/responses": {"model": "m", "input": "tag=abc", "max_output_tokens": 7},
}
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "trailer"}


@pytest.fixture
def served(hive: Hive) -> Hive:
    hive.model("m")
    hive.start()
    return hive


@pytest.fixture
def direct(served: Hive) -> "Direct":
    return Direct(served.control("m"))


class Direct:
    """The engine double itself, asked past hive."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ask(self, path: str, body: object) -> tuple[dict[str, str], bytes]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.path))
            return raw(sock, path, body)


def raw(sock: socket.socket, path: str, body: object, extra: str = "", version: str = "1.1") -> (
    tuple[dict[str, str], bytes]
):  # fmt: skip
    """One request on a raw connection: headers and everything after them, until the close."""
    sock.settimeout(20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/{version}\r\nHost: engine\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n{extra}\r\n"
    )
    sock.sendall(head.encode() + data)
    got = b""
    while piece := sock.recv(65536):
        got += piece
    top, _, rest = got.partition(b"\r\n\r\n")
    status, *lines = top.decode().split("\r\n")
    headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
    return {**headers, ":status": status.split(" ", 1)[1]}, rest


def through(hive: Hive, path: str, body: object, extra: str = "", version: str = "1.1") -> (
    tuple[dict[str, str], bytes]
):  # fmt: skip
    with socket.create_connection(("127.0.0.1", hive.port)) as sock:
        return raw(sock, path, body, extra, version)


def chunks(body: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(body):
        begin = body.index(b"\r\n", at) + 2
        end = begin + int(body[at : begin - 2], 16)
        yield body[begin:end]
        at = end + 2
        assert body[end:at] == b"\r\n"


def same(body: bytes) -> bytes:
    """Less what no two answers of an engine have in common: ids and the time of making."""
    body = re.sub(rb"(chatcmpl|cmpl|resp|msg)([-_])[0-9a-f]+", rb"\1\2ID", body)
    return re.sub(rb'("created(?:_at)?"):\d+', rb"\1:0", body)


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_is_the_engines_own_byte_for_byte(served: Hive, direct: Direct, path: str) -> None:
    body = {**BODIES[path], "stream": True}
    headers, sent = through(served, path, body)
    own_headers, own = direct.ask(path, body)
    assert same(b"".join(chunks(sent))) == same(b"".join(chunks(own)))
    assert list(chunks(sent))[-1] == b""  # the last chunk: it says that it is whole
    assert headers["content-type"] == own_headers["content-type"]
    assert headers[":status"] == own_headers[":status"]


@pytest.mark.parametrize("path", BODIES)
def test_a_whole_answer_is_the_engines_own_byte_for_byte(
    served: Hive, direct: Direct, path: str
) -> None:
    headers, sent = through(served, path, BODIES[path])
    own_headers, own = direct.ask(path, BODIES[path])
    assert same(sent) == same(own)
    assert headers["content-length"] == own_headers["content-length"]
    mine = {k: v for k, v in headers.items() if k not in {*HOP_BY_HOP, "x-request-id", "date"}}
    theirs = {k: v for k, v in own_headers.items() if k not in {*HOP_BY_HOP, "date"}}
    assert mine == theirs


def test_an_engines_error_is_its_own_byte_for_byte(served: Hive, direct: Direct) -> None:
    body = {"model": "m"}
    headers, sent = through(served, CHAT, body)
    own_headers, own = direct.ask(CHAT, body)
    assert sent == own
    assert headers[":status"] == own_headers[":status"] == "400 Bad Request"


def test_each_token_is_a_chunk_of_its_own_as_it_comes(hive: Hive) -> None:
    hive.model("m", "--token-s", "0.1")
    hive.start()
    _, sent = through(hive, CHAT, chat_body("m", "abc", stream=True, max_tokens=10))
    pieces = list(chunks(sent))
    # The opening, a token each, and the end: as many as the engine made, none held back.
    assert len(pieces) >= 11
    assert all(piece.endswith(b"\n\n") for piece in pieces[:-1])


@awaited
async def read_all(hive: Hive, tokens: int) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=LONGEST_S)
    async with aiohttp.ClientSession(hive.url, connector=connector, timeout=timeout) as session:

        async def read(number: int) -> None:
            body = chat_body("m", f"s{number}", stream=True, max_tokens=tokens)
            async with session.post(CHAT, json=body) as answer:
                assert answer.status == 200
                events = (await answer.read()).decode().split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""]
            made = [json.loads(event[6:])["choices"][0] for event in events[:-2]]
            assert made[0]["delta"] == {"role": "assistant", "content": ""}
            told = [choice["delta"]["content"] for choice in made[1:]]
            assert told == [f"s{number}:{k} " for k in range(tokens)]
            assert [choice["finish_reason"] for choice in made[-2:]] == [None, "length"]

        async with asyncio.TaskGroup() as tasks:
            for number in range(STREAMS):
                tasks.create_task(read(number), name=f"client {number}")


@pytest.mark.timeout(LONGEST_S + 60)
@pytest.mark.parametrize("pace", ["0", "0.01"])
def test_two_hundred_streams_at_once_get_every_token_once_and_in_order(
    hive: Hive, pace: str, pytestconfig: pytest.Config
) -> None:
    """A million events in `make soak`: none is lost, doubled or altered."""
    tokens = MANY_TOKENS if pytestconfig.getoption("soak") else TOKENS
    hive.model(
        "m",
        *("--token-s", pace, "--burst", "7", "--max-running", str(STREAMS)),
        max_concurrent=STREAMS,
    )
    hive.start()
    read_all(hive, tokens)
    assert hive.metric("hive_requests_total", model="m", status="200") == STREAMS
    assert hive.metric("hive_in_flight", model="m") == 0


# ── clients of all kinds ────────────────────────────────────────────────────────────────────────


def test_a_slow_reader_slows_its_engine_down_and_costs_hive_no_memory(hive: Hive) -> None:
    tokens = 30_000
    hive.model("m", "--event-bytes", "1000", "--burst", "50")
    hive.start()
    assert hive.process
    status = Path(f"/proc/{hive.process.pid}/status")
    body = json.dumps(chat_body("m", "abc", stream=True, max_tokens=tokens)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with hive.send_raw(head + body) as sock:
        double = Double(hive.control("m"))
        made, before_mib = -1, resident_mib(status)

        def is_stuck() -> bool:
            nonlocal made
            before, made = made, double_tokens(double)
            return made == before > 0

        must(is_stuck, 10, "the engine waits for its reader")
        assert made < tokens / 2
        assert resident_mib(status) < before_mib + 10  # of an answer of 30
        assert hive.chat().status == 200  # the others do not wait
        sock.settimeout(20)
        got = bytearray()
        while not got.endswith(b"0\r\n\r\n"):
            got += sock.recv(1 << 20)
    text = b"".join(chunks(bytes(got).partition(b"\r\n\r\n")[2])).decode()
    assert re.findall(r"abc:(\d+) ", text) == [str(k) for k in range(tokens)]


def double_tokens(double: Double) -> int:
    connection = double.ask_text("GET", "/metrics")
    found = re.search(r"^vllm:generation_tokens_total\{.*\} (\S+)$", connection, re.MULTILINE)
    assert found
    return int(float(found[1]))


def resident_mib(status: Path) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
    assert found
    return int(found[1]) / 1024


def test_a_client_of_http_1_0_gets_the_stream_without_chunks(served: Hive) -> None:
    body = chat_body("m", "abc", stream=True, max_tokens=4)
    headers, sent = through(served, CHAT, body, version="1.0")
    assert "transfer-encoding" not in headers
    assert sent.endswith(b"data: [DONE]\n\n")
    assert re.findall(rb"abc:(\d) ", sent) == [b"0", b"1", b"2", b"3"]


def test_a_client_that_waits_for_100_continue_is_told_to_go_on(served: Hive) -> None:
    headers, _ = through(served, CHAT, chat_body("m"), "Expect: 100-continue\r\n")
    assert headers[":status"] == "100 Continue"


def test_one_connection_carries_many_requests(served: Hive) -> None:
    connection = served.connect()
    try:
        for number in range(5):
            body = json.dumps(chat_body("m", f"n{number}", stream=number % 2 == 0))
            connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200
            assert f"n{number}:0 ".encode() in answer.read()
    finally:
        connection.close()


# ── headers ─────────────────────────────────────────────────────────────────────────────────────


def test_the_engine_gets_the_clients_headers_less_credentials_and_hops(served: Hive) -> None:
    extra = (
        "Authorization: Bearer secret\r\nX-Api-Key: secret\r\nCookie: a=secret\r\n"
        "X-Request-Id: mine\r\nX-Custom: kept\r\nAccept: text/event-stream\r\nTE: trailers\r\n"
    )
    through(served, CHAT, chat_body("m"), extra)
    told = Double(served.control("m")).requests[-1]["headers"]
    assert told["x-custom"] == "kept"
    assert told["accept"] == "text/event-stream"
    assert told["x-request-id"] == "mine"
    assert told["content-type"] == "application/json"
    assert not told.keys() & {"authorization", "x-api-key", "cookie", "te"}
    assert "secret" not in json.dumps(told)


def test_the_query_of_the_path_reaches_the_engine(served: Hive) -> None:
    headers, _ = through(served, CHAT + "?beta=true", chat_body("m"))
    assert headers[":status"] == "200 OK"


def test_the_engine_gets_the_body_byte_for_byte(served: Hive) -> None:
    body = b'{ "model" : "m",\t"messages":[{"role":"user","content":"\\u00e9 tag=b"}], "x":1e2 }'
    through(served, CHAT, body)
    assert Double(served.control("m")).requests[-1]["body"] == body.decode()


# ── what an attempt says of its worker ──────────────────────────────────────────────────────────


def answers(status: int) -> Engine:
    async def engine(_request: web.Request) -> web.Response:
        return web.Response(status=status, text="x")

    return engine


async def breaks_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b"data: {}\n\n")
    assert request.transport
    request.transport.close()
    return response


def breaker(failures: int) -> dict[str, object]:
    return {"failures": failures, "cooldown_s": 60}


@pytest.mark.parametrize("status", [500, 502, 504])
@awaited
async def test_an_engines_failure_is_a_fault(status: int) -> None:
    """(R006, C5)"""
    async with serving(answers(status), breaker=breaker(2)) as it:
        for _ in range(2):
            answer, _ = await it.chat()
            assert answer.status == status
        assert it.breaker == "open"
        answer, told = await it.chat()

        assert (answer.status, told["error"]["code"]) == (503, "CIRCUIT_BREAKER_OPEN")


@pytest.mark.parametrize("status", [400, 404, 422, 429, 503])
@awaited
async def test_a_refusal_of_the_engine_says_nothing_of_it(status: int) -> None:
    """The caller's fault, or back-pressure (C5, C12)."""
    async with serving(answers(status), breaker=breaker(1)) as it:
        it.door.breakers["m-0"].count = 1
        assert (await it.chat())[0].status == status

        assert (it.breaker, it.door.breakers["m-0"].count) == ("closed", 1)


@awaited
async def test_an_answer_is_a_success() -> None:
    async with serving(breaker=breaker(2)) as it:
        it.door.breakers["m-0"].count = 1
        assert (await it.chat())[0].status == 200

        assert it.door.breakers["m-0"].count == 0


@awaited
async def test_where_nobody_listens_it_is_a_fault_and_is_looked_into() -> None:
    """(R006, C5)"""
    async with serving(None, breaker=breaker(1)) as it:
        answer, told = await it.chat(X_Hive_Timeout="0.5")  # too little for a second attempt

        assert (answer.status, told["error"]["code"]) == (503, "RETRY_BACKOFF")
        assert it.breaker == "open"
        assert it.pulse._is_refused
        assert it.pulse.open_weight == it.door.in_flight == 0
        assert it.heard(RequestAborted) == []


@awaited
async def test_a_connection_that_takes_too_long_is_counted_and_is_a_fault() -> None:
    """It is one of a request's limits (R047)."""
    limits = {"connect_s": 1e-6}
    async with serving(timeouts=limits, breaker=breaker(1)) as it:
        answer, told = await it.chat(X_Hive_Timeout="0.5")

        assert (answer.status, told["error"]["code"]) == (503, "RETRY_BACKOFF")
        assert "did not accept the connection within 1e-06 s" in told["error"]["message"]
        assert it.metric("hive_timeouts_total", model="m", phase="connect") == 1
        assert [event.phase for event in it.heard(RequestExpired)] == ["connect"]
        assert it.breaker == "open"
        assert it.pulse.open_weight == it.door.in_flight == 0


@awaited
async def test_an_answer_that_the_engine_breaks_off_is_a_fault_and_no_cancellation() -> None:
    """Its slot is free when the engine has ended it, too."""
    async with serving(breaks_off, breaker=breaker(1)) as it:
        answer, _ = await it.chat()

        assert answer.status == 200
        assert it.breaker == "open"
        assert (it.pulse.aborted_weight, it.door.in_flight) == (1, 1)
        it.pulse.confirm()
        assert it.door.in_flight == 0
        assert it.heard(RequestAborted) == []
        assert it.metric("hive_cancellations_total", model="m", confirmed="yes") == 0


@awaited
async def test_a_client_that_leaves_is_a_cancellation_and_says_nothing_of_the_worker() -> None:
    asked = asyncio.Event()

    async def engine(_request: web.Request) -> web.Response:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with serving(engine, breaker=breaker(1)) as it, asyncio.TaskGroup() as tasks:
        it.door.breakers["m-0"].count = 1
        asking = tasks.create_task(it.chat())
        await asked.wait()
        asking.cancel()
        await until(lambda: it.pulse.aborted_weight, "the abort")
        assert it.door.in_flight == 1
        it.pulse.confirm()

        assert it.door.in_flight == 0
        assert it.door.breakers["m-0"].count == 1
        assert it.metric("hive_cancellations_total", model="m", confirmed="yes") == 1

"""A request's body within its bounds, over a real connection, and the model that it names."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import example, given
from hypothesis import strategies as st

from hive.errors import HiveError, HttpError, ValidationFailed
from hive.gateway.bodies import MIB, Asked, Intake, asked_in
from hive.gateway.traffic import Passage
from hive.settings import Server
from tests.patience import awaited, until

JSON = "application/json"
Client = TestClient[web.Request, web.Application]


def asked(body: bytes, content_type: str, path: str = "/v1/completions") -> Asked:
    return asked_in(body, content_type, path)


class Receiver:
    """A handler that takes bodies in and holds them until `release` is set."""

    def __init__(self, **server: float) -> None:
        self.intake = Intake(Server.model_validate(server))
        self.release = asyncio.Event()
        self.release.set()
        self.ended = 0
        self.own_s: float | None = None  # the caller's own limit

    async def handle(self, request: web.Request) -> web.Response:
        try:
            passage = Passage("id", request.method, request.path)
            body = await self.intake.receive(request, passage, self.own_s)
            try:
                await self.release.wait()
                return web.json_response({"bytes": len(body.data)})
            finally:
                body.release()
        except HiveError as error:
            return web.json_response(
                {"code": error.code, **error.public_details}, status=error.status
            )
        finally:
            self.ended += 1

    @asynccontextmanager
    async def served(self) -> AsyncIterator[Client]:
        app = web.Application(client_max_size=0)
        app.router.add_post("/", self.handle)
        async with TestClient(TestServer(app, handler_cancellation=True)) as client:
            yield client


async def pieces(count: int, size: int) -> AsyncIterator[bytes]:
    """A chunked body: its length is not announced."""
    for _ in range(count):
        yield b"x" * size


@awaited
async def test_a_body_within_the_bounds_is_received_whole() -> None:
    receiver = Receiver(max_body_mib=1)
    async with receiver.served() as client:
        for body in (b"", b"x" * MIB, pieces(16, MIB // 16)):
            answer = await client.post("/", data=body)
            assert answer.status == 200

        assert (await answer.json())["bytes"] == MIB
        assert receiver.intake.held == 0


@awaited
async def test_a_body_that_announces_too_much_is_refused_before_it_is_read() -> None:
    receiver = Receiver(max_body_mib=0.5)
    async with receiver.served() as client:
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
        head = await reader.readuntil(b"\r\n")
        writer.close()

    assert b" 413 " in head
    assert receiver.intake.held == 0


@awaited
async def test_a_body_that_grows_too_large_is_refused_when_it_does() -> None:
    receiver = Receiver(max_body_mib=0.5)
    async with receiver.served() as client:
        answer = await client.post("/", data=pieces(40, MIB // 16))

        assert answer.status == 413
        assert (await answer.json())["max_body_mib"] == 0.5
    assert receiver.intake.held == 0


@awaited
async def test_a_body_that_does_not_come_is_given_up_in_time() -> None:
    """504 with the phase and its limit (R049)."""
    receiver = Receiver(body_s=0.1)
    async with receiver.served() as client:
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        text = await reader.readuntil(b"}")
        writer.close()

    assert text.startswith(b"HTTP/1.1 504 ")
    assert json.loads(text.partition(b"\r\n\r\n")[2]) == {
        "code": "REQUEST_TIMEOUT",
        "phase": "body",
        "timeout_seconds": 0.1,
    }
    assert receiver.intake.held == 0


@awaited
async def test_all_bodies_together_stay_within_their_bound() -> None:
    """The one too many is refused with a hint, the others are served (R040)."""
    receiver = Receiver(max_body_mib=1, max_buffered_mib=1.5)
    receiver.release.clear()
    async with receiver.served() as client, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(client.post("/", data=b"x" * MIB))
        await until(lambda: receiver.intake.held == MIB, "the first body to be held")
        second = await client.post("/", data=b"x" * MIB)
        assert second.status == 503

        await until(lambda: receiver.intake.held == MIB, "the second body's room to be given back")
        receiver.release.set()
        assert (await first).status == 200
    assert receiver.intake.held == 0


@awaited
async def test_a_client_that_leaves_in_the_middle_leaves_nothing_held() -> None:
    """(R153)"""
    receiver = Receiver()
    async with receiver.served() as client:
        _, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        await until(lambda: receiver.intake.held == 3, "the beginning to arrive")
        writer.transport.abort()
        await until(lambda: receiver.ended, "the handler's end")

    assert receiver.intake.held == 0


@awaited
async def test_a_compressed_body_is_refused_as_415() -> None:
    """Engines take plain bodies, and a small one could unfold beyond every bound (R042)."""
    receiver = Receiver()
    async with receiver.served() as client:
        answer = await client.post("/", data=b"x", headers={"Content-Encoding": "gzip"})

        assert answer.status == 415
        assert (await answer.json())["code"] == HttpError.code


# ── The model that a body names ─────────────────────────────────────────────────────────────────


def refusal(body: bytes, content_type: str = JSON) -> ValidationFailed:
    with pytest.raises(ValidationFailed) as caught:
        asked(body, content_type)
    return caught.value


@given(st.text(min_size=1, max_size=100), st.dictionaries(st.text(), st.integers()))
def test_the_model_is_found_among_any_other_fields(name: str, others: dict[str, int]) -> None:
    body = {**others, "model": name, "messages": [{"role": "user", "content": "hello"}]}

    assert asked(json.dumps(body).encode(), JSON).model == name
    assert asked(json.dumps(body, ensure_ascii=False).encode(), "").model == name


@pytest.mark.parametrize(
    ("body", "finding", "param"),
    [
        (b"", "no body", None),
        (b"{", "not valid JSON", None),
        (b"not json", "not valid JSON", None),
        (b'{"model": "a"} x', "not valid JSON", None),
        (b'{"model": "\\ud800"}', "not valid JSON", None),
        (b"[]", "must be a JSON object, not array", None),
        (b'"a"', "must be a JSON object, not str", None),
        (b"null", "must be a JSON object, not null", None),
        (b"{}", "'model' is missing", "model"),
        (b'{"models": "a"}', "'model' is missing", "model"),
        (b'{"model": 1}', "'model' must be a string, not int", "model"),
        (b'{"model": null}', "'model' must be a string, not null", "model"),
        (b'{"model": ["a"]}', "'model' must be a string, not array", "model"),
        (b'{"model": ""}', "'model' must not be empty", "model"),
    ],
)
def test_a_body_without_a_usable_model_is_refused_with_the_reason(
    body: bytes, finding: str, param: str | None
) -> None:
    """(R033, R156)"""
    error = refusal(body)

    assert finding in error.message
    assert error.param == param
    assert error.status == 400


def test_a_model_that_is_not_utf_8_is_refused_too() -> None:
    """(R033)"""
    assert "not valid JSON" in refusal(b'{"model": "\xff"}').message


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b'{"model": "' + b"[" * 50)
@example(b"[" * 100_000)
@example(b'{"x":' * 20_000)
def test_any_other_bytes_are_refused_or_name_a_model(body: bytes) -> None:
    """Never an unforeseen exception, whatever a client sends (R154)."""
    try:
        assert asked(body, JSON).model
    except ValidationFailed as error:
        assert error.message


@given(st.text("qxz", min_size=8, max_size=40), st.sampled_from(["{", "[", '"', "1", ""]))
def test_a_refusal_never_repeats_what_was_sent(private: str, start: str) -> None:
    """(R076)"""
    for body in (f"{start}{private}", json.dumps([private]), json.dumps({"prompt": private})):
        assert private not in refusal(body.encode()).message


# ── How it is asked, and for how many of the engine's own requests ──────────────────────────────


@pytest.mark.parametrize(
    ("fields", "is_stream"),
    [
        ('"stream":true', True),
        ('"stream" : true ', True),
        ('"stream":\n\ttrue\n', True),
        ('"stream":false', False),
        ('"stream":null', False),
        ('"stream":"yes"', False),
        ('"stream":{"a":true}', False),
        ('"streams":true', False),
        ('"stream_options":{"include_usage":true}', False),
    ],
)
def test_a_stream_is_asked_for_by_true_alone(fields: str, is_stream: bool) -> None:
    assert asked(f'{{"model":"m",{fields}}}'.encode(), JSON) == Asked("m", is_stream)


CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@pytest.mark.parametrize(
    ("path", "fields", "weight"),
    [
        (CHAT, {}, 1),
        (CHAT, {"n": 4}, 4),
        (CHAT, {"n": 0}, 1),
        (CHAT, {"n": -3}, 1),
        (CHAT, {"n": None}, 1),
        (CHAT, {"n": "4"}, 1),
        (CHAT, {"n": 2.5}, 1),
        (CHAT, {"n": [1, 2]}, 1),
        (CHAT, {"n": 10**30}, 1),
        (CHAT, {"messages": [{"role": "user", "content": "a"}] * 5}, 1),
        (CHAT, {"documents": [{"text": "a"}] * 5}, 1),  # of retrieval: part of the prompt
        (COMPLETIONS, {"prompt": "a, b"}, 1),
        (COMPLETIONS, {"prompt": ["a", "b", "c"]}, 3),
        (COMPLETIONS, {"prompt": ["a"]}, 1),
        (COMPLETIONS, {"prompt": []}, 1),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, 1),
        (COMPLETIONS, {"prompt": [[1, 2, 3], [4, 5]]}, 2),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 3}, 6),
        (COMPLETIONS, {"prompt": ["a"] * 1000, "n": 1000}, 100_000),
        (EMBEDDINGS, {"input": ["a", "b"], "n": 7}, 2),
        (EMBEDDINGS, {"input": [1, 2, 3]}, 1),
        ("/pooling", {"input": ["a", "b"]}, 2),
        ("/v1/rerank", {"documents": ["a", "b", "c"], "query": "d"}, 3),
        ("/score", {"text_1": "a", "text_2": ["b", "c"]}, 2),
        ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 9}, 1),
        ("/tokenize", {"prompt": "a"}, 0),
        ("/v1/messages", {"n": 5}, 1),
    ],
    ids=str,
)
def test_a_body_weighs_as_many_requests_as_the_engine_makes_of_it(
    path: str, fields: dict[str, Any], weight: int
) -> None:
    """Else the engine's count of them would never agree with hive's (R050)."""
    assert asked(json.dumps({"model": "m", **fields}).encode(), JSON, path).weight == weight
    spaced = json.dumps({"model": "m", **fields}, indent=3, separators=(" , ", " : "))
    assert asked(spaced.encode(), JSON, path).weight == weight


@awaited
async def test_the_callers_own_limit_counts_while_its_body_comes() -> None:
    receiver = Receiver(body_s=30)
    receiver.own_s = 0.05
    async with receiver.served() as client:

        async def slow() -> AsyncIterator[bytes]:
            yield b"x"
            await until(lambda: receiver.ended, "the end of its time", limit_s=10)

        answer = await client.post("/", data=slow())
        told = await answer.json()

        assert (answer.status, told["code"]) == (504, "REQUEST_TIMEOUT")
        assert (told["phase"], told["timeout_seconds"]) == ("request", 0.05)
        assert receiver.intake.held == 0


JSONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSONS, JSONS, JSONS, JSONS, JSONS)
def test_what_else_a_body_says_is_left_to_the_engine(
    n: object, prompt: object, texts: object, documents: object, stream: object
) -> None:
    """Nothing that hive itself looks at, besides the model, is a reason to refuse."""
    body = {"n": n, "prompt": prompt, "input": texts, "documents": documents, "stream": stream}
    found = asked(json.dumps({**body, "model": "m"}).encode(), JSON)

    assert found.model == "m"
    assert 1 <= found.weight <= 100_000
    assert found.is_stream is (stream is True)


def test_a_form_is_one_request() -> None:
    assert asked(form(('name="model"', b"whisper")), BOUNDARY) == Asked("whisper")


BOUNDARY = "multipart/form-data; boundary=frontier"


def form(*parts: tuple[str, bytes]) -> bytes:
    text = b"".join(
        b"--frontier\r\nContent-Disposition: form-data; "
        + head.encode()
        + b"\r\n\r\n"
        + content
        + b"\r\n"
        for head, content in parts
    )
    return text + b"--frontier--\r\n"


@given(st.binary(max_size=2000))
def test_the_model_of_a_form_is_found_beside_any_file(content: bytes) -> None:
    """Speech is sent as a form."""
    file = ('name="file"; filename="a.wav"', content.replace(b"--frontier", b""))
    named = ('name="model"', b"whisper")

    assert asked(form(file, named), BOUNDARY).model == "whisper"
    assert asked(form(named, file), BOUNDARY).model == "whisper"


NAMED = form(('name="model"', b"whisper"))


@pytest.mark.parametrize(
    "body",
    [
        form(("name=model", b"whisper")),
        b"a preamble with --frontier in it\r\n" + NAMED,
        form(('name="file"; filename="a"', b"x\r\n--frontiers\r\n")).removesuffix(
            b"--frontier--\r\n"
        )
        + NAMED,
        form(('name="file"\r\nX-Y: z; name="model"', b"another")).removesuffix(b"--frontier--\r\n")
        + NAMED,
        NAMED.replace(b"--frontier\r\n", b"--frontier \t\r\n"),
    ],
)
def test_a_form_is_read_as_its_engine_will_read_it(body: bytes) -> None:
    assert asked(body, BOUNDARY).model == "whisper"


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; boundary="frontier"',
        "multipart/form-data; xboundary=other; boundary=frontier",
        "Multipart/Form-Data; charset=x; BOUNDARY=frontier",
    ],
)
def test_a_boundary_may_be_written_in_several_ways(content_type: str) -> None:
    assert asked(form(('name="model"', b"whisper")), content_type).model == "whisper"


@pytest.mark.parametrize(
    ("body", "content_type", "finding"),
    [
        (form(('name="file"', b"x")), BOUNDARY, "'model' is missing"),
        (b"", BOUNDARY, "'model' is missing"),
        (b"--frontier", BOUNDARY, "'model' is missing"),
        (b"--frontier\r\nname=model", BOUNDARY, "'model' is missing"),
        (form(('name="model"', b"")), BOUNDARY, "'model' must be a name"),
        (form(('name="model"', b"x" * 300)), BOUNDARY, "'model' must be a name"),
        (form(('name="model"', b"\xff")), BOUNDARY, "'model' must be UTF-8"),
        (b"", "multipart/form-data", "no boundary"),
    ],
)
def test_a_form_without_a_usable_model_is_refused(
    body: bytes, content_type: str, finding: str
) -> None:
    """(R033)"""
    assert finding in refusal(body, content_type).message


@given(st.binary(max_size=300))
def test_any_other_form_is_refused_or_names_a_model(body: bytes) -> None:
    try:
        assert asked(b"--frontier\r\n" + body, BOUNDARY).model
    except ValidationFailed as error:
        assert error.message

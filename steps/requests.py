"""Steps about clients: what they ask for, and what they get."""

import re
from typing import Any

from pytest_bdd import given, parsers, then, when

from steps.driver import chat_body
from steps.story import CHAT, MODEL, Story
from steps.waiting import must

SECRET_WORDS = "the quick brown secret"
BOUNDARY = "form-boundary"
AUDIO = b"RIFF" + bytes(range(256)) * 40
# Each kind of inference: its path and a body.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, chat_body(MODEL, "abc", max_tokens=5)),
    "completion": ("/v1/completions", {"model": MODEL, "prompt": "tag=abc", "max_tokens": 4}),
    "embedding": ("/v1/embeddings", {"model": MODEL, "input": ["one", "two"]}),
    "message": ("/v1/messages", chat_body(MODEL, "abc", max_tokens=4)),
    "response": ("/v1/responses", {"model": MODEL, "input": "tag=abc"}),
    "score": ("/score", {"model": MODEL, "text_1": "one", "text_2": ["two", "three"]}),
    "reranking": ("/rerank", {"model": MODEL, "query": "one", "documents": ["two", "three"]}),
    "tokenization": ("/tokenize", {"model": MODEL, "prompt": "abc"}),
}
# What "a client sends …" means: bodies that hive must refuse itself.
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "something that is not JSON": b'{"model": "llama", the quick brown secret',
    "a list instead of an object": b'["the quick brown secret"]',
    "an object without a model": b'{"prompt": "the quick brown secret"}',
    "a number as the model": b'{"model": 7411, "prompt": "the quick brown secret"}',
    "an empty name as the model": b'{"model": "", "prompt": "the quick brown secret"}',
    "a number that JSON does not have": b'{"model": "llama", "temperature": NaN}',
    "something nested 100000 deep": b'{"model": "llama", "x": ' + b"[" * 100_000,
    "two documents in one": b'{"model": "llama"} {"model": "llama"}',
}


def form(model: str | None, audio: bytes = AUDIO, *, is_model_first: bool = False) -> bytes:
    """A multipart form with a file, and the model before it or, as some clients do, after it."""
    file = [
        f"--{BOUNDARY}".encode(),
        b'Content-Disposition: form-data; name="file"; filename="a.wav"',
        b"Content-Type: audio/wav",
        b"",
        audio,
    ]
    named = [f"--{BOUNDARY}".encode(), b'Content-Disposition: form-data; name="model"', b""]
    named = [] if model is None else [*named, model.encode()]
    lines = [*named, *file] if is_model_first else [*file, *named]
    return b"\r\n".join([*lines, f"--{BOUNDARY}--".encode(), b""])


# ── asking ──────────────────────────────────────────────────────────────────────────────────────


@when(parsers.re(r"a client asks for an? (?P<kind>\w+)"))
def _(story: Story, kind: str) -> None:
    path, body = KINDS[kind]
    story.ask("POST", path, body)


@when(parsers.re(r"a client asks for a (?P<kind>chat|completion|message|response) as a stream"))
def _(story: Story, kind: str) -> None:
    path, body = KINDS[kind]
    story.begin(path, {**body, "stream": True}).wait_for_end()


@when(parsers.parse('a client asks "{model}" for a chat'))
def _(story: Story, model: str) -> None:
    story.ask("POST", CHAT, chat_body(model))


@when(parsers.parse("a client sends {what} in place of a request"))
def _(story: Story, what: str) -> None:
    story.sent = BODIES[what]
    story.ask("POST", CHAT, story.sent)


@when(parsers.parse('a client sends a recording to be written down by "{model}"'))
def _(story: Story, model: str) -> None:
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    story.ask("POST", "/v1/audio/transcriptions", form(model), Content_Type=kind)


@when(parsers.parse('a client sends a recording of {mib:d} MiB for "{model}", the model {where}'))
def _(story: Story, mib: int, model: str, where: str) -> None:
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    body = form(model, bytes(mib * 2**20), is_model_first=where == "first")
    story.ask("POST", "/v1/audio/transcriptions", body, Content_Type=kind)


@when("a client sends a recording without a model")
def _(story: Story) -> None:
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    story.ask("POST", "/v1/audio/transcriptions", form(None), Content_Type=kind)


@when("a client sends a body of 2 MiB")
def _(story: Story) -> None:
    story.ask("POST", CHAT, chat_body(MODEL, "x" * 2 * 2**20))


@when("a client sends 2 MiB without saying how much it will be")
def _(story: Story) -> None:
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    story.sockets.append(story.hive.send_raw(head + piece * 32 + b"0\r\n\r\n"))


@when("a client sends a compressed body")
def _(story: Story) -> None:
    story.ask("POST", CHAT, b"\x1f\x8b whatever", Content_Encoding="gzip")


@when("a client sends half of a body and then nothing more")
def _(story: Story) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n".encode()
    story.sockets.append(story.hive.send_raw(head + b'{"model": "llama",'))


@given(parsers.parse("{count:d} clients that have sent half a megabyte each and are not done"))
def _(story: Story, count: int) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n".encode()
    story.sockets += [story.hive.send_raw(head + b"x" * 500_000) for _ in range(count)]


@when(parsers.parse('a client asks for a chat with the request id "{request_id}"'))
def _(story: Story, request_id: str) -> None:
    story.ask("POST", CHAT, chat_body(MODEL), X_Request_Id=request_id)


@given(parsers.parse('a chat is streaming with the request id "{request_id}"'))
def _(story: Story, request_id: str) -> None:
    story.begin(X_Request_Id=request_id).wait_for_events(3)


@when(parsers.parse('a client gets "{path}"'))
def _(story: Story, path: str) -> None:
    story.ask("GET", path)


@when(parsers.parse('a client sends "{method}" to "{path}"'))
def _(story: Story, method: str, path: str) -> None:
    story.ask(method, path)


@when("a client asks for that response again by its id")
def _(story: Story) -> None:
    story.kept["answer"] = story.answer.json
    story.ask("GET", f"/v1/responses/{story.answer.json['id']}")


@given("a chat is streaming")
@when("another client asks for a streamed chat")
def _(story: Story) -> None:
    story.begin().wait_for_events(3)


@given("a chat waits for its first token")
def _(story: Story) -> None:
    story.begin()
    story.double.wait_running(1)


@given("a chat is being generated that is not streamed")
def _(story: Story) -> None:
    story.begin(CHAT, chat_body(MODEL))
    story.double.wait_running(1)


@given(parsers.parse("{count:d} chats are streaming"))
def _(story: Story, count: int) -> None:
    for _number in range(count):
        story.begin().wait_for_events(3)


@when(parsers.parse("{count:d} clients ask for a streamed chat at once"))
def _(story: Story, count: int) -> None:
    for _number in range(count):
        story.begin()


@when("the client leaves")
def _(story: Story) -> None:
    story.client.leave()


@when(parsers.parse("a client asks for {count:d} chats in turn"))
def _(story: Story, count: int) -> None:
    for number in range(count):
        story.ask("POST", CHAT, chat_body(MODEL, f"c{number}"))


@when("a client asks for a chat about something secret")
def _(story: Story) -> None:
    story.sent = SECRET_WORDS.encode()
    story.ask("POST", CHAT, chat_body(MODEL, SECRET_WORDS))


# ── getting ─────────────────────────────────────────────────────────────────────────────────────


@then(parsers.parse("it is refused with {status:d} {code}"))
def _(story: Story, status: int, code: str) -> None:
    assert (story.answer.status, story.answer.code) == (status, code), story.answer.body


@then(parsers.parse('the reason is "{reason}"'))
def _(story: Story, reason: str) -> None:
    assert story.answer.headers["x-hive-reason"] == reason
    assert story.answer.error["details"]["reason"] == reason


@then("it is told when to come back")
def _(story: Story) -> None:
    after = int(story.answer.headers["retry-after"])
    assert 1 <= after <= 30
    assert story.answer.error["details"]["retry_after_seconds"] == after
    exactly = int(story.answer.headers["retry-after-ms"])
    assert after - 1 < exactly / 1000 <= after or exactly < 1000 or after == 30
    assert story.answer.headers["x-should-retry"] == "true"


@then("it is not told to come back")
def _(story: Story) -> None:
    assert "retry-after" not in story.answer.headers
    assert "retry_after_seconds" not in story.answer.error["details"]
    assert story.answer.headers["x-should-retry"] == "false"


@then("it is told what to do")
def _(story: Story) -> None:
    assert story.answer.error["message"]
    assert story.answer.error["details"]["suggested_action"]
    assert story.answer.error["details"]["request_id"] == story.answer.headers["x-request-id"]


@then(parsers.parse("the answer is {status:d}"))
def _(story: Story, status: int) -> None:
    assert story.answer.status == status, story.answer.body


@then(parsers.parse('the answer names "{text}"'))
def _(story: Story, text: str) -> None:
    assert text in story.answer.body.decode()


@then(parsers.parse('the answer has the header "{name}" with "{value}"'))
def _(story: Story, name: str, value: str) -> None:
    assert story.answer.headers.get(name.lower()) == value, story.answer.headers


@then("the answer repeats nothing of what was sent")
def _(story: Story) -> None:
    answer = story.answer
    said = answer.body.decode().replace(answer.headers["x-request-id"], "")  # it has any digits
    assert SECRET_WORDS not in said
    assert "7411" not in said


@then(parsers.parse('the answer has the request id "{request_id}"'))
def _(story: Story, request_id: str) -> None:
    assert story.answer.headers["x-request-id"] == request_id


@then("the answer has a request id that hive made")
def _(story: Story) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", story.answer.headers["x-request-id"])


@then("the same response is in the answer")
def _(story: Story) -> None:
    assert story.answer.json["id"] == story.kept["answer"]["id"]
    assert story.answer.json["output"] == story.kept["answer"]["output"]


@then("the answer says how long the recording is")
def _(story: Story) -> None:
    assert story.answer.json["text"] == f"{len(AUDIO)} bytes"


@then(parsers.parse("the answer says that the recording is {mib:d} MiB long"))
def _(story: Story, mib: int) -> None:
    assert story.answer.json["text"] == f"{mib * 2**20} bytes"


@then(parsers.parse("the client is answered with {status:d} {code}"))
def _(story: Story, status: int, code: str) -> None:
    got = b""
    while code.encode() not in got:
        piece = story.sockets[-1].recv(65536)
        assert piece, got
        got += piece
    assert got.startswith(f"HTTP/1.1 {status} ".encode()), got


# ── streams ─────────────────────────────────────────────────────────────────────────────────────


@then(parsers.parse("{count:d} tokens arrive, all of them and in order"))
def _(story: Story, count: int) -> None:
    tag = f"c{len(story.clients) - 1}"
    story.client.wait_for_end()
    assert story.client.text == "".join(f"{tag}:{k} " for k in range(count))


@then(parsers.parse("each of them gets its own {count:d} tokens, all of them and in order"))
def _(story: Story, count: int) -> None:
    for number, client in enumerate(story.clients):
        client.wait_for_end()
        assert client.text == "".join(f"c{number}:{k} " for k in range(count))


@then("the stream is complete")
def _(story: Story) -> None:
    story.client.wait_for_end()
    assert story.client.is_whole
    assert story.client.events[-1] == "[DONE]"


@then("the first token arrived long before the last")
def _(story: Story) -> None:
    story.client.wait_for_end()
    assert story.client.times[-1] - story.client.times[0] > 0.2


@then(parsers.parse("the stream ends with the error {code}"))
def _(story: Story, code: str) -> None:
    story.client.wait_for_end()
    assert story.client.is_whole
    assert story.client.last_error, story.client.body
    assert story.client.last_error["code"] == code, story.client.last_error


@then("the stream has no end mark")
def _(story: Story) -> None:
    assert "[DONE]" not in story.client.events


@then("the stream is cut off, without an error and without an end")
def _(story: Story) -> None:
    story.client.wait_for_end()
    assert not story.client.is_whole
    assert story.client.last_error is None
    assert b"event: error" not in story.client.body
    assert b"[DONE]" not in story.client.body


@then(parsers.parse("the client knows within {seconds:g} seconds"))
def _(story: Story, seconds: float) -> None:
    story.client.wait_for_end(seconds + 5)
    assert story.client.ended_at is not None
    assert story.client.ended_at - story.happened_at < seconds


@then("the stream goes on")
def _(story: Story) -> None:
    already = len(story.client.events)
    must(lambda: len(story.client.events) > already + 2, 3, "more tokens")

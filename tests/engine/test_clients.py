"""The official SDKs against the real vLLM through hive: what vLLM answers arrives unchanged."""

import http.client
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from steps.driver import Hive
from steps.waiting import must
from tests.engine.raw import exchange

pytestmark = pytest.mark.engine

SAY: Any = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["ok", "name", "n"],
    "properties": {
        "ok": {"type": "boolean"},
        "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
}
LIGHT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["on", "room"],
    "properties": {
        "on": {"type": "boolean"},
        "room": {"type": "string", "enum": ["kitchen", "hall"]},
    },
}


@pytest.fixture
def client(real_hive: Hive) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_hive.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(real_hive: Hive) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=real_hive.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=SAY, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_a_request_is_found_in_the_engines_log_by_its_id_and_not_by_its_words(
    real_hive: Hive,
) -> None:
    body = {"model": "m", "prompt": "the quick brown secret", "max_tokens": 2}
    headers = {"X-Request-Id": "night-call.7"}
    assert real_hive.ask("POST", "/v1/completions", body, headers).status == 200

    def logged() -> str:
        return real_hive.ask("GET", "/hive/v1/workers/m-0/logs?lines=500").body.decode()

    must(lambda: "Received request cmpl-night-call.7" in logged(), 10, logged)
    assert "quick brown" not in logged()


def test_a_completion_is_answered(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="m", prompt="once", max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_a_stream_has_the_whole_answer_and_its_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="m", messages=SAY, max_tokens=40, temperature=0)
    stream = client.chat.completions.create(
        model="m",
        messages=SAY,
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for event in stream:
        text += (event.choices[0].delta.content or "") if event.choices else ""
        usage = event.usage or usage
    assert text == whole.choices[0].message.content
    assert usage == whole.usage


def test_log_probabilities_arrive(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=SAY, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content
    assert all(len(token.top_logprobs) == 3 for token in content)


def test_a_tool_is_called(client: openai.OpenAI) -> None:
    tools: Any = [
        {
            "type": "function",
            "function": {"name": "set_light", "strict": True, "parameters": LIGHT},
        }
    ]
    answer: Any = client.chat.completions.create(
        model="m",
        messages=SAY,
        max_tokens=300,
        temperature=1,
        seed=1,
        tool_choice="required",
        tools=tools,
    )
    call = answer.choices[0].message.tool_calls[0].function
    assert call.name == "set_light"
    assert json.loads(call.arguments)["room"] in ("kitchen", "hall")


def test_an_answer_follows_a_json_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m",
        messages=SAY,
        max_tokens=200,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
        },
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"ok", "name", "n"}


def test_embeddings_of_a_generating_model_get_the_engines_own_refusal(
    client: openai.OpenAI, real_hive: Hive
) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="m", input="hello")
    body = {"model": "m", "input": "hello"}
    assert (
        caught.value.response.content
        == exchange(engine_socket(real_hive), "/v1/embeddings", body).body
    )


def test_a_stored_response_is_found_at_the_worker_that_made_it(client: openai.OpenAI) -> None:
    made = client.responses.create(model="m", input="hello", max_output_tokens=8)
    assert client.responses.retrieve(made.id).id == made.id
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_unknown")


def test_an_unknown_model_is_a_proper_exception(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="served: m") as caught:
        client.chat.completions.create(model="nope", messages=SAY)
    assert caught.value.code == "MODEL_NOT_FOUND"


def test_an_anthropic_message_is_answered(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model="m", messages=SAY, max_tokens=8)
    assert answer.type == "message"
    assert answer.usage.output_tokens > 0


def test_an_anthropic_stream_is_whole(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model="m", messages=SAY, max_tokens=8) as stream:
        events = [event.type for event in stream]
    assert events[0] == "message_start"
    assert events[-1] == "message_stop"


def test_an_unknown_model_is_a_proper_exception_for_anthropic_too(
    claude: anthropic.Anthropic,
) -> None:
    with pytest.raises(anthropic.NotFoundError, match="served: m"):
        claude.messages.create(model="nope", messages=SAY, max_tokens=8)


def engine_socket(hive: Hive) -> Path:
    """Where the worker's engine itself listens, past hive."""
    (home,) = (hive.runtime / "w").iterdir()
    return home / "s"


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("/v1/chat/completions", {"messages": SAY}),
        ("/v1/chat/completions", {"messages": SAY, "stream": True}),
        ("/v1/completions", {"prompt": "once"}),
        ("/v1/completions", {"prompt": "once", "stream": True}),
        ("/v1/messages", {"messages": SAY}),
        ("/v1/messages", {"messages": SAY, "stream": True}),
        ("/tokenize", {"prompt": "once"}),
        ("/v1/chat/completions", {"messages": "wrong"}),
        ("/v1/chat/completions", {"messages": SAY, "max_tokens": 10**6}),
    ],
)
def test_hives_answer_is_the_engines_byte_for_byte(
    real_hive: Hive, path: str, extra: dict[str, Any]
) -> None:
    """Status, type and every byte of the body; only the second of creation may differ.

    A busy vLLM tells two tokens in one event of a stream: where they are cut is no part of it.
    """
    body = {"model": "m", "max_tokens": 24, "temperature": 0, **extra}
    direct = exchange(engine_socket(real_hive), path, body, request_id="same-id")
    through = exchange(("127.0.0.1", real_hive.port), path, body, request_id="same-id")
    assert through.status == direct.status
    assert through.content_type == direct.content_type
    assert _comparable(through.body) == _comparable(direct.body)
    assert len(through.body) > 20


TEXT = re.compile(rb'("(?:text|content)":")((?:[^"\\]|\\.)*)"')


def _comparable(body: bytes) -> list[tuple[bytes, bytes]]:
    """Its events (of a whole answer: one), each without its text, and the text of those alike."""
    found: list[tuple[bytes, bytes]] = []
    for event in re.sub(rb'"created":\d+', b'"created":0', body).split(b"\n\n"):
        rest, text = TEXT.sub(rb'\1"', event), b"".join(said for _, said in TEXT.findall(event))
        if found and found[-1][0] == rest:
            text = found.pop()[1] + text
        found.append((rest, text))
    return found


def test_a_client_that_leaves_frees_the_engines_slot(real_hive: Hive) -> None:
    """Promise 4, seen in vLLM's own gauge."""
    stream = real_hive.chat_stream(max_tokens=15_000, ignore_eos=True)
    stream.wait_for_events(3)
    assert running(real_hive) == 1
    stream.leave()
    must(lambda: running(real_hive) == 0, 5, "vLLM runs nothing any more")


def running(hive: Hive) -> float:
    connection = http.client.HTTPConnection("engine", timeout=5)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(engine_socket(hive)))
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)

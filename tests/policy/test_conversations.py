"""What requests and answers say: whatever they look like, and whatever a client tries."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hive.errors import InvalidParameter
from hive.policy.conversations import (
    KINDS,
    PATHS,
    SALT,
    Heard,
    Kind,
    conversation,
    heard_in,
    is_one_prompt,
    kind_of,
    messages_of,
    next_bodies,
    read_object,
    salted,
)
from tests.doubles.engine.asks import Ask
from tests.doubles.engine.shapes import Chat, Completion, Messages, Shape

USER = {"role": "user", "content": "hello"}
SHAPES: dict[Kind, type[Shape]] = {
    Kind.CHAT: Chat,
    Kind.COMPLETION: Completion,
    Kind.MESSAGES: Messages,
}
ASKED: dict[Kind, dict[str, Any]] = {
    Kind.CHAT: {"messages": [USER]},
    Kind.COMPLETION: {"prompt": "hello"},
    Kind.MESSAGES: {"messages": [USER], "max_tokens": 9},
}
kinds = pytest.mark.parametrize("kind", Kind)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text()
values = st.recursive(
    scalars | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.text() | st.sampled_from([SALT, "model", "prompt", "messages", "\\u005f", SALT.upper()])


# ── Endpoints ───────────────────────────────────────────────────────────────────────────────────


def test_each_endpoint_with_a_conversation_has_a_kind() -> None:
    assert {kind_of(path) for path in KINDS} == set(Kind)
    assert all(kind_of(PATHS[kind]) is kind for kind in Kind)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/v1/chat/completions/", ""])
def test_an_endpoint_without_a_conversation_takes_no_session(path: str) -> None:
    with pytest.raises(InvalidParameter, match="X-Hive-Session") as caught:
        kind_of(path)

    assert caught.value.param == "X-Hive-Session"
    assert caught.value.details["allowed"] == sorted(KINDS)


# ── The salt ────────────────────────────────────────────────────────────────────────────────────


def encoded(key: str, escapes: Iterable[bool]) -> str:
    """A JSON string of which some characters are escaped though they need not be."""
    return '"' + "".join(map(written, key, escapes)) + '"'


def written(character: str, is_escaped: bool) -> str:
    if is_escaped:
        units = character.encode("utf-16-be", "surrogatepass")
        pairs = (units[at : at + 2].hex() for at in range(0, len(units), 2))
        return "".join(f"\\u{pair}" for pair in pairs)
    return json.dumps(character, ensure_ascii=False)[1:-1]


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """JSON objects as nobody writes them: keys twice, escaped, and white space anywhere."""
    blank = st.text(" \t\r\n", max_size=2)
    members = []
    for name in draw(st.lists(names, min_size=1, max_size=5)):
        escapes = draw(st.lists(st.booleans(), min_size=len(name), max_size=len(name)))
        value = json.dumps(draw(values), ensure_ascii=draw(st.booleans()))
        parts = [encoded(name, escapes), ":", value]
        members.append("".join(draw(blank) + part + draw(blank) for part in parts))
    return f"{draw(blank)}{{{','.join(members)}}}{draw(blank)}".encode()


@given(bodies(), st.text(min_size=1), st.sampled_from([Kind.CHAT, Kind.MESSAGES]))
def test_the_salt_is_hives_and_the_rest_is_what_came(body: bytes, salt: str, kind: Kind) -> None:
    """By Python's own parser, which takes the last of two equal keys as the engine does."""
    asked = json.loads(body)
    if SALT in asked:
        with pytest.raises(InvalidParameter):
            salted(body, salt, kind)
        return
    made = salted(body, salt, kind)

    assert json.loads(made) == {**asked, SALT: salt}
    before, _, rest = body.partition(b"{")
    assert made.startswith(before + b"{")
    assert made.endswith(b"," + rest)


@given(bodies(), st.binary(max_size=3), st.integers(0, 200))
def test_no_body_smuggles_a_salt_of_its_own(body: bytes, noise: bytes, at: int) -> None:
    """Not even one that is a little broken: whatever a parser reads of it has hive's."""
    body = body[:at] + noise + body[at:]
    try:
        made = salted(body, "hives-own", Kind.CHAT)
    except InvalidParameter:
        return
    pairs: list[Any] = json.loads(made, object_pairs_hook=lambda them: them)
    assume(len(pairs) > 0)

    assert [value for key, value in pairs if key == SALT] == ["hives-own"]


@pytest.mark.parametrize(
    "body",
    [
        '{"cache_salt": "mine"}',
        '{"cache_salt": null}',
        '{"cache\\u005fsalt": "mine"}',
        '{"\\u0063\\u0061\\u0063\\u0068\\u0065_salt": "mine"}',
        '{"a": 1, "cache_salt": "one", "cache_salt": "two"}',
        ' \n{ "messages" : [] , "cache_salt" : "mine" }',
        '{"cache_salt": "mine", "model": "m"}',
    ],
)
@kinds
def test_a_body_with_its_own_salt_is_refused(body: str, kind: Kind) -> None:
    """Else it could read, or fill, another session's cache."""
    with pytest.raises(InvalidParameter, match="In a session hive sets it") as caught:
        salted(body.encode(), "s", kind)

    assert caught.value.param == SALT
    assert "X-Hive-Session" in caught.value.suggested_action


@pytest.mark.parametrize(
    "body",
    [
        {"metadata": {SALT: "x"}},
        {"messages": [{"role": "user", "content": SALT}]},
        {"Cache_salt": "x", "cache_salt ": "y"},
    ],
)
def test_what_only_looks_like_the_salt_is_none(body: dict[str, Any]) -> None:
    assert json.loads(salted(json.dumps(body).encode(), "s", Kind.CHAT)) == {**body, SALT: "s"}


@pytest.mark.parametrize("body", [b"{}", b" { } "])
def test_an_object_without_a_member_is_salted_too(body: bytes) -> None:
    assert json.loads(salted(body, "s", Kind.CHAT)) == {SALT: "s"}


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"[]",
            b"null",
            b'"{"',
            b"{",
            b'{"a"}',
            b"{}{}",
            b'{"a":1}x',
            b"\xff",
            b'{"\xff":1}',
        ),
        *(b'\xef\xbb\xbf{"a": 1}', '{"a": 1}'.encode("utf-16"), '{"a": 1}'.encode("utf-32")),
        *(b'{"a": NaN}', b"[" * 100_000, b'{"a":' * 100_000),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    """Also what the engine's parser would take: another encoding, numbers that are none."""
    for act in (read_object, lambda one: salted(one, "s", Kind.CHAT)):
        with pytest.raises(InvalidParameter, match="no JSON object"):
            act(body)


@pytest.mark.parametrize(
    ("prompt", "is_one"),
    [
        ("", True),
        ("hello", True),
        ([1, 2, 3], True),
        ([], False),
        (["a"], False),
        (["a", "b"], False),
        ([[1, 2]], False),
        ([1, "a"], False),
        ([True], False),
        ([1.0], False),
        (None, False),
        ({"prompt": "a"}, False),
    ],
)
def test_a_session_has_one_prompt_in_a_completion(prompt: Any, *, is_one: bool) -> None:
    """Of several prompts none is the conversation."""
    assert is_one_prompt(prompt) is is_one
    body = json.dumps({"prompt": prompt}).encode()
    if is_one:
        assert json.loads(salted(body, "s", Kind.COMPLETION)) == {SALT: "s", "prompt": prompt}
    else:
        with pytest.raises(InvalidParameter, match="one text, or one list of token ids") as caught:
            salted(body, "s", Kind.COMPLETION)
        assert caught.value.param == "prompt"


# ── What the engine says, as the double words it ────────────────────────────────────────────────


def shape(kind: Kind, cached: int | None = None, **asked: Any) -> Shape:
    ask: Ask = SHAPES[kind].read({**ASKED[kind], **asked})
    ask.cached_tokens = cached
    return SHAPES[kind](ask, "m", 0)


def said(made: Shape, tokens: int, kind: Kind) -> Any:
    text = made.text(0, tokens)
    if kind is Kind.COMPLETION:
        return text
    content = [{"type": "text", "text": text}] if kind is Kind.MESSAGES else text
    return {"role": "assistant", "content": content}


def streamed(made: Shape, tokens: int, reason: str = "stop") -> bytes:
    parts = range(made.ask.parts)
    events = [made.token(part, k) for k in range(tokens - 1) for part in parts]
    return b"".join([*made.opening(), *events, *made.closing(tokens, reason)])


USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


@kinds
@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("cached", [None, 0, 32])
def test_a_whole_answer_is_heard(kind: Kind, reason: str, cached: int | None) -> None:
    made = shape(kind, cached)
    answer = json.dumps(made.whole(5, reason)).encode()

    assert heard_in(kind, answer, is_stream=False) == Heard(said(made, 5, kind), cached)


@kinds
@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("cached", [None, 0, 32])
def test_a_whole_stream_says_the_same(kind: Kind, reason: str, cached: int | None) -> None:
    made = shape(kind, cached, **USAGE)

    heard = heard_in(kind, streamed(made, 5, reason), is_stream=True)
    assert heard == Heard(said(made, 5, kind), cached)


@kinds
def test_line_ends_are_as_the_engine_likes_them(kind: Kind) -> None:
    made = shape(kind, **USAGE)
    answer = streamed(made, 3)
    wanted = heard_in(kind, answer, is_stream=True)

    assert wanted is not None
    assert heard_in(kind, answer.replace(b"\n", b"\r\n"), is_stream=True) == wanted
    assert heard_in(kind, b": a comment\n\n" + answer, is_stream=True) == wanted
    assert heard_in(kind, answer.replace(b"data: ", b"data:"), is_stream=True) == wanted


@kinds
@given(part=st.data())
def test_a_stream_that_is_cut_off_anywhere_is_not_whole(kind: Kind, part: st.DataObject) -> None:
    made = shape(kind, **USAGE)
    answer = streamed(made, 4)
    whole = answer.rstrip(b"\n")
    if kind is Kind.MESSAGES:  # it is over with the reason to stop; vLLM sends no [DONE]
        whole = whole[: whole.index(b'"message_delta"')]
    cut = answer[: part.draw(st.integers(0, len(whole) - 1))]

    assert heard_in(kind, cut, is_stream=True) is None


@pytest.mark.parametrize("kind", [Kind.CHAT, Kind.COMPLETION])
def test_what_comes_after_done_is_no_answer(kind: Kind) -> None:
    answer = streamed(shape(kind), 2)

    assert heard_in(kind, answer + b'data: {"choices": []}\n\n', is_stream=True) is None
    assert heard_in(kind, answer.replace(b"data: [DONE]\n\n", b""), is_stream=True) is None


def test_vllms_own_messages_stream_has_no_done() -> None:
    made = shape(Kind.MESSAGES, 16, **USAGE)
    answer = streamed(made, 2).replace(b"data: [DONE]\n\n", b"")

    assert b"[DONE]" not in answer
    heard = heard_in(Kind.MESSAGES, answer, is_stream=True)
    assert heard == Heard(said(made, 2, Kind.MESSAGES), 16)


@pytest.mark.parametrize("kind", [Kind.CHAT, Kind.COMPLETION])
def test_of_several_answers_the_first_is_the_conversation(kind: Kind) -> None:
    made = shape(kind, n=3)
    whole = json.dumps(made.whole(3, "stop")).encode()
    wanted = Heard(said(made, 3, kind), None)

    assert heard_in(kind, whole, is_stream=False) == wanted
    assert heard_in(kind, streamed(made, 3), is_stream=True) == wanted


@kinds
def test_an_engine_that_died_has_not_answered(kind: Kind) -> None:
    """It ends its stream politely, with an error before [DONE] (docs/engines.md, Death)."""
    made = shape(kind)
    begun = b"".join([*made.opening(), made.token(0, 0), *made.failing(500, "EngineCore died")])
    plain = b'{"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}'

    assert heard_in(kind, begun, is_stream=True) is None
    assert heard_in(kind, plain, is_stream=False) is None


def events(*told: Any, name: bool = False) -> bytes:
    lines = []
    for one in told:
        if name and isinstance(one, dict):
            lines.append(f"event: {one['type']}\n")
        lines.append(f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n")
    return "".join(lines).encode()


def delta(content: str | None = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    """An event of a chat, as vLLM 0.32.0 words it."""
    given = ({} if content is None else {"content": content}) | more
    ending = {"logprobs": None, "finish_reason": reason, "stop_reason": None, "token_ids": None}
    choice = {"index": 0, "delta": given, **ending}
    return {
        "id": "chatcmpl-x",
        "object": "chat.completion.chunk",
        "model": "m",
        "choices": [choice],
    }


def test_what_was_aborted_is_not_whole() -> None:
    """So does vLLM end everything when it is told to stop."""
    chat = events(delta("", role="assistant"), delta("a"), delta("", "abort"), "[DONE]")
    message = {"role": "assistant", "content": "a"}
    plain = {"choices": [{"index": 0, "message": message, "finish_reason": "abort"}]}
    text = {"choices": [{"index": 0, "text": "a", "finish_reason": "abort"}]}

    assert heard_in(Kind.CHAT, chat, is_stream=True) is None
    assert heard_in(Kind.CHAT, json.dumps(plain).encode(), is_stream=False) is None
    assert heard_in(Kind.COMPLETION, json.dumps(text).encode(), is_stream=False) is None
    assert heard_in(Kind.COMPLETION, events(text, "[DONE]"), is_stream=True) is None


def test_an_aborted_message_has_no_reason_to_stop() -> None:
    plain = {"type": "message", "role": "assistant", "content": [], "usage": {"input_tokens": 1}}
    told = [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": None}, "usage": {"output_tokens": 1}},
        {"type": "message_stop"},
    ]

    assert heard_in(Kind.MESSAGES, json.dumps(plain).encode(), is_stream=False) is None
    assert heard_in(Kind.MESSAGES, events(*told, name=True), is_stream=True) is None


def piece(index: int, arguments: str, name: str | None = None) -> dict[str, Any]:
    """A part of a tool call: who is called comes with the first one only."""
    function = {"arguments": arguments} | ({"name": name} if name else {})
    first = {"id": f"chatcmpl-tool-{index}", "type": "function"} if name else {}
    return {"index": index, **first, "function": function}


def call(index: int, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"chatcmpl-tool-{index}", "type": "function", "function": function}


@given(st.lists(st.text(max_size=3), max_size=6), st.lists(st.text(max_size=3), max_size=6))
def test_tool_calls_that_come_in_pieces_are_put_together(one: list[str], other: list[str]) -> None:
    pieces = [piece(0, "", "set_light"), piece(1, "", "ring")]
    for number in range(max(len(one), len(other))):
        pieces += [
            piece(at, text[number]) for at, text in ((0, one), (1, other)) if number < len(text)
        ]
    told = [delta("", role="assistant"), *(delta(tool_calls=[part]) for part in pieces)]
    heard = heard_in(Kind.CHAT, events(*told, delta(None, "tool_calls"), "[DONE]"), is_stream=True)

    assert heard is not None
    calls = [call(0, "set_light", "".join(one)), call(1, "ring", "".join(other))]
    assert heard.message == {"role": "assistant", "content": "", "tool_calls": calls}


def test_tool_calls_of_a_plain_answer_are_sent_back_as_they_are() -> None:
    calls = [call(0, "set_light", '{"on": false, "room": "kitchen"}')]
    message = {"role": "assistant", "content": None, "tool_calls": calls, "reasoning": "hm"}
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    heard = heard_in(Kind.CHAT, json.dumps(answer).encode(), is_stream=False)

    assert heard == Heard({"role": "assistant", "content": "", "tool_calls": calls}, None)


def test_thoughts_stay_with_whoever_had_them_in_a_chat() -> None:
    told = [delta(reasoning="hm "), delta(reasoning="yes"), delta("done", "stop"), "[DONE]"]
    heard = heard_in(Kind.CHAT, events(*told), is_stream=True)

    assert heard == Heard({"role": "assistant", "content": "done"}, None)


def test_a_message_of_several_blocks_is_put_together() -> None:
    def begin(index: int, **block: Any) -> dict[str, Any]:
        return {"type": "content_block_start", "index": index, "content_block": block}

    def more(index: int, **part: str) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": index, "delta": part}

    told = [
        {"type": "message_start", "message": {"role": "assistant", "content": []}},
        {"type": "ping"},
        begin(0, type="thinking", thinking=""),
        more(0, type="thinking_delta", thinking="h"),
        more(0, type="thinking_delta", thinking="m"),
        more(0, type="signature_delta", signature="x"),
        begin(1, type="text", text=""),
        more(1, type="text_delta", text="so "),
        begin(2, type="tool_use", id="t1", name="ring", input={}),
        more(1, type="text_delta", text="be it"),
        more(2, type="input_json_delta", partial_json='{"of'),
        more(2, type="input_json_delta", partial_json='ten": 3}'),
        begin(3, type="tool_use", id="t2", name="stop", input={}),
        more(3, type="input_json_delta", partial_json=""),
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {}},
        {"type": "message_stop"},
    ]
    heard = heard_in(Kind.MESSAGES, events(*told, name=True), is_stream=True)

    assert heard is not None
    assert heard.cached_tokens is None
    assert heard.message == {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "hm"},
            {"type": "text", "text": "so be it"},
            {"type": "tool_use", "id": "t1", "name": "ring", "input": {"often": 3}},
            {"type": "tool_use", "id": "t2", "name": "stop", "input": {}},
        ],
    }


@pytest.mark.parametrize("details", [None, {}, {"cached_tokens": None}, {"cached_tokens": "9"}])
def test_an_engine_that_does_not_tell_of_its_cache_says_nothing(details: Any) -> None:
    choice = {"index": 0, "text": "a", "finish_reason": "stop"}
    for usage in (None, {"prompt_tokens_details": details}):
        answer = json.dumps({"choices": [choice], "usage": usage}).encode()

        assert heard_in(Kind.COMPLETION, answer, is_stream=False) == Heard("a", None)


BROKEN = [b"", b"{", b"[]", b"null", b'{"choices": []}', b'{"choices": [null]}', b'{"choices": 5}']
BROKEN += [b'{"choices": [{"finish_reason": "stop"', b'{"stop_reason": "end_turn"}', b"\xff"]
BROKEN += [b'{"content": [], "stop_reason": "end_turn", "usage": null}', b"[" * 100_000]


@kinds
@pytest.mark.parametrize("answer", BROKEN)
def test_an_answer_that_is_not_understood_is_none(kind: Kind, answer: bytes) -> None:
    assert heard_in(kind, answer, is_stream=False) is None
    for stream in (answer, b"data: " + answer + b"\n\n", b"data: " + answer + b"\n\ndata: [DONE]"):
        assert heard_in(kind, stream, is_stream=True) is None


@given(st.binary(), st.sampled_from(Kind), st.booleans())
def test_no_bytes_make_it_fail(answer: bytes, kind: Kind, is_stream: bool) -> None:
    heard_in(kind, answer, is_stream=is_stream)
    heard_in(kind, b"data: " + answer + b"\n\ndata: [DONE]\n\n", is_stream=True)


words = st.sampled_from(
    [
        *("choices", "index", "delta", "message", "text", "content", "tool_calls", "function"),
        *("name", "arguments", "usage", "prompt_tokens_details", "cached_tokens", "type", "id"),
        *("content_block", "error", "finish_reason", "stop_reason", "partial_json", "thinking"),
    ]
)
leaves = scalars | st.sampled_from(
    ["stop", "abort", "content_block_start", "content_block_delta", "message_delta", 0, [], {}]
)
nearly = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=5),
    max_leaves=16,
)


@given(st.lists(st.dictionaries(words, nearly, max_size=6), max_size=5), st.sampled_from(Kind))
def test_nor_does_anything_that_is_nearly_an_answer(told: list[Any], kind: Kind) -> None:
    heard_in(kind, events(*told, "[DONE]"), is_stream=True)
    for one in told:
        heard_in(kind, json.dumps(one).encode(), is_stream=False)


# ── The conversation ────────────────────────────────────────────────────────────────────────────

ONE_ANSWERS = {
    "model": "m",
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 5,
    "temperature": 0.5,
    "seed": 1,
    "continue_final_message": True,
    "add_generation_prompt": False,
    "n": 1,
    "stop": ["x"],
    "user": "me",
    SALT: "salt",
}
KEPT = {"tools": [{"type": "function"}], "chat_template_kwargs": {"x": 1}, "unheard_of": [1]}


@pytest.mark.parametrize("kind", [Kind.CHAT, Kind.MESSAGES])
def test_a_conversation_is_the_last_request_and_its_answer(kind: Kind) -> None:
    """Without what was about that one answer alone; what hive does not know is kept."""
    answer = {"role": "assistant", "content": "hi"}
    request = json.dumps({**ONE_ANSWERS, **KEPT, "messages": [USER]}).encode()
    told = conversation(kind, request, Heard(answer, 3))

    assert told == {"kind": kind, "body": {**KEPT, "messages": [USER, answer]}}
    assert type(told["kind"]) is str
    assert json.loads(json.dumps(told)) == told  # it goes into the catalogue, and into a manifest
    assert messages_of(told) == [USER, answer]


def test_a_completions_conversation_is_its_text() -> None:
    request = json.dumps({**ONE_ANSWERS, "prompt": "once ", "echo": False}).encode()
    told = conversation(Kind.COMPLETION, request, Heard("upon", None))

    assert told == {"kind": "completion", "body": {"prompt": "once upon"}}
    assert messages_of(told) == [{"role": "assistant", "content": "once upon"}]


def test_of_token_ids_the_answers_text_cannot_be_a_part() -> None:
    told = conversation(Kind.COMPLETION, b'{"prompt": [5, 6]}', Heard("upon", None))

    assert told["body"] == {"prompt": [5, 6]}
    assert next_bodies(told, "m") == [{"prompt": [5, 6], "model": "m", "max_tokens": 1}]


@pytest.mark.parametrize("kind", [Kind.CHAT, Kind.MESSAGES])
def test_the_next_requests_go_on_in_different_ways(kind: Kind) -> None:
    """Not even with the same first character: what they begin with is the conversation alone."""
    body = {**KEPT, "messages": [USER, {"role": "assistant", "content": "hi"}]}
    asked = next_bodies({"kind": str(kind), "body": body}, "m")
    last = [one["messages"][-1] for one in asked]

    for one in asked:
        assert one == {**body, "model": "m", "max_tokens": 1, "messages": one["messages"]}
        assert one["messages"][:-1] == body["messages"]
    assert len(last) == 2
    assert all(one["role"] == "user" for one in last)
    assert last[0]["content"][0] != last[1]["content"][0]
    assert body["messages"] == [USER, {"role": "assistant", "content": "hi"}]  # as it was


@given(
    st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text()}), max_size=3),
    st.dictionaries(st.text(), values, max_size=3),
    st.text(),
)
def test_to_go_on_is_to_ask_the_same_again_and_more(
    messages: list[Any], more: dict[str, Any], text: str
) -> None:
    answer = {"role": "assistant", "content": text}
    request = {**more, "messages": messages}
    told = conversation(Kind.CHAT, json.dumps(request).encode(), Heard(answer, None))
    again = conversation(Kind.CHAT, json.dumps(told["body"]).encode(), Heard(answer, None))

    assert messages_of(told) == [*messages, answer]
    assert messages_of(again) == [*messages, answer, answer]
    assert {**told["body"], "messages": 0} == {**again["body"], "messages": 0}
    assert set(told["body"]) <= set(request)

"""What a session's requests and answers say, and what of it is the conversation. Pure.

A conversation is what the engine would be sent to go on: the last answered request, and the answer
as its client will send it back. JSON in, JSON out; what hive does not know it keeps as it is.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from hive.errors import InvalidParameter

SALT = "cache_salt"


class Kind(StrEnum):
    """Of an endpoint that has a conversation."""

    CHAT = "chat"
    COMPLETION = "completion"
    MESSAGES = "messages"


KINDS = {
    "/v1/chat/completions": Kind.CHAT,
    "/v1/completions": Kind.COMPLETION,
    "/v1/messages": Kind.MESSAGES,
}
PATHS = {kind: path for path, kind in KINDS.items()}

# How one answer is made and sent, which the next request may have otherwise: no part of the
# conversation. What else a request has may change how it is rendered, and is kept.
_OF_ONE_ANSWER = frozenset(
    {
        *("model", "stream", "stream_options", "n", "best_of", "max_tokens", "seed", "user"),
        *("max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "min_tokens", "stop"),
        *("stop_sequences", "stop_token_ids", "logprobs", "top_logprobs", "prompt_logprobs"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "echo"),
        *("ignore_eos", "request_id", "priority", "return_token_ids", "response_format", "suffix"),
        *("continue_final_message", "add_generation_prompt"),
        *("metadata", "store", "service_tier", "structured_outputs", "kv_transfer_params", SALT),
    }
)
_DATA, _DONE = b"data:", b"[DONE]"
_encode = msgspec.json.Encoder().encode
_object = msgspec.json.Decoder(dict[str, Any])


@dataclass(frozen=True, slots=True)
class Heard:
    """A whole answer: the message to send back, and what the engine says of its cache."""

    message: Any  # a dict for chat and messages, a str for a completion
    cached_tokens: int | None  # None where the answer does not tell


def kind_of(path: str) -> Kind:
    """Raises InvalidParameter for an endpoint without a conversation."""
    kind = KINDS.get(path)
    if kind is None:
        raise InvalidParameter(
            "Invalid parameter: X-Hive-Session. This endpoint has no conversation.",
            param="X-Hive-Session",
            allowed=sorted(KINDS),
            action="Send the header with chat completions, completions or messages only.",
        )
    return kind


def salted(body: bytes, salt: str, kind: Kind) -> bytes:
    """A request's body with the session's salt in front; the rest of it byte for byte as it came.

    The salt is what keeps sessions apart, so a body that brings its own is refused, and so is one
    that asks for what a conversation cannot have. Raises InvalidParameter.
    """
    asked = read_object(body)
    if SALT in asked:
        raise InvalidParameter(
            f"Invalid parameter: {SALT}. In a session hive sets it.",
            param=SALT,
            action=f"Leave {SALT} out, or send the request without X-Hive-Session.",
        )
    for name in ("echo", "continue_final_message"):
        if asked.get(name):
            raise InvalidParameter(
                f"Invalid parameter: {name}. In a session an answer is what follows the prompt.",
                param=name,
                action=f"Send the request without {name}.",
            )
    if kind is Kind.COMPLETION and not is_one_prompt(asked.get("prompt")):
        raise InvalidParameter(
            "Invalid parameter: prompt. In a session it is one text, or one list of token ids.",
            param="prompt",
            action="Send one prompt in each request of a session.",
        )
    begin = body.index(b"{") + 1
    more = b"," if asked else b""
    return b"%b%b%b%b" % (body[:begin], _encode({SALT: salt})[1:-1], more, body[begin:])


def read_object(body: bytes) -> dict[str, Any]:
    """Raises InvalidParameter for what is no JSON object."""
    try:
        return _object.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidParameter(
            "Invalid parameter: the body is no JSON object that can be read.",
            action="Send a JSON object, encoded as UTF-8.",
        ) from exc


def is_one_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, list) and bool(prompt) and all(type(one) is int for one in prompt)


def conversation(kind: Kind, request: bytes, heard: Heard) -> dict[str, Any]:
    """What to go on with: the kind, and the body of the next request without its new part."""
    body = {key: value for key, value in read_object(request).items() if key not in _OF_ONE_ANSWER}
    if kind is Kind.COMPLETION:
        # Of token ids the answer's text cannot be a part: it ends with the prompt.
        if isinstance(body["prompt"], str):
            body["prompt"] += heard.message
    else:
        body["messages"] = [*body.get("messages", ()), heard.message]
    return {"kind": str(kind), "body": body}


def messages_of(told: dict[str, Any]) -> list[Any]:
    """What an owner gets back of a conversation: its messages, or its text as one."""
    body = told["body"]
    if told["kind"] == Kind.COMPLETION:
        return [{"role": "assistant", "content": body["prompt"]}]
    return list(body["messages"])


def next_bodies(told: dict[str, Any], model: str) -> list[dict[str, Any]]:
    """Requests that go on with a conversation in different ways.

    The tokens that all of them begin with are those of every next request, whatever a chat
    template does at the end of a prompt, or to an answer that is not the last one.
    """
    body = {**told["body"], "model": model, "max_tokens": 1}
    if told["kind"] == Kind.COMPLETION:
        return [body]
    return [
        {**body, "messages": [*body["messages"], {"role": "user", "content": text}]}
        for text in ("a", "0 b")
    ]


# ── Answers ─────────────────────────────────────────────────────────────────────────────────────


def heard_in(kind: Kind, answer: bytes, *, is_stream: bool) -> Heard | None:
    """The answer that a body holds; None for one that is not whole, or not understood."""
    try:
        if not is_stream:
            return _plain(kind, _object.decode(answer))
        events = [*_events(answer)]
        if kind is Kind.MESSAGES:
            return _message_of_events(events)
        if not events or events[-1] is not None:  # without [DONE]
            return None
        return _choice_of_events(kind, [event for event in events if event is not None])
    except (msgspec.DecodeError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def _plain(kind: Kind, body: dict[str, Any]) -> Heard | None:
    if kind is Kind.MESSAGES:
        if not body.get("stop_reason"):
            return None
        said = {"role": "assistant", "content": body["content"]}
        return Heard(said, body["usage"].get("cache_read_input_tokens"))
    choice = body["choices"][0]
    if choice["finish_reason"] == "abort":
        return None
    if kind is Kind.COMPLETION:
        return Heard(choice["text"], _cached(body.get("usage")))
    return Heard(_said(choice["message"]), _cached(body.get("usage")))


def _said(message: dict[str, Any]) -> dict[str, Any]:
    """As clients send it back: what was said and called; thoughts stay with who had them."""
    said: dict[str, Any] = {"role": "assistant", "content": message.get("content") or ""}
    if calls := message.get("tool_calls"):
        said["tool_calls"] = calls
    return said


def _cached(usage: dict[str, Any] | None) -> int | None:
    details = (usage or {}).get("prompt_tokens_details") or {}
    told = details.get("cached_tokens")
    return told if isinstance(told, int) else None


def _events(answer: bytes) -> list[dict[str, Any] | None]:
    """The JSON of each event; None for [DONE]."""
    found: list[dict[str, Any] | None] = []
    for line in answer.replace(b"\r\n", b"\n").split(b"\n"):
        if line.startswith(_DATA):
            data = line.removeprefix(_DATA).strip()
            found.append(None if data == _DONE else _object.decode(data))
    return found


def _choice_of_events(kind: Kind, events: list[dict[str, Any]]) -> Heard | None:
    text: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    cached, is_whole = None, False
    for event in events:
        if "error" in event:
            return None
        told = _cached(event.get("usage"))
        cached = cached if told is None else told
        for choice in event.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            if choice.get("finish_reason") == "abort":
                return None
            is_whole = is_whole or choice.get("finish_reason") is not None
            if kind is Kind.COMPLETION:
                text.append(choice.get("text") or "")
                continue
            delta = choice.get("delta") or {}
            text.append(delta.get("content") or "")
            for part in delta.get("tool_calls") or ():
                _add_call(calls, part)
    if not is_whole:
        return None
    if kind is Kind.COMPLETION:
        return Heard("".join(text), cached)
    message = {"content": "".join(text), "tool_calls": [calls[at] for at in sorted(calls)]}
    return Heard(_said(message), cached)


def _add_call(calls: dict[int, dict[str, Any]], part: dict[str, Any]) -> None:
    """A tool call comes in pieces: its name first, then its arguments bit by bit."""
    function = part.get("function") or {}
    blank = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
    call = calls.setdefault(part.get("index", 0), blank)
    call["id"] = part.get("id") or call["id"]
    call["function"]["name"] = function.get("name") or call["function"]["name"]
    call["function"]["arguments"] += function.get("arguments") or ""


def _message_of_events(events: list[Any]) -> Heard | None:
    blocks: dict[int, dict[str, Any]] = {}
    inputs: dict[int, str] = {}
    cached: int | None = None
    stop_reason: str | None = None
    for event in events:
        match event:
            case {"type": "error"}:
                return None
            case {"type": "content_block_start", "index": at, "content_block": block}:
                blocks[at] = dict(block)
            case {"type": "content_block_delta", "index": at, "delta": {"text": text}}:
                blocks[at]["text"] = blocks[at].get("text", "") + text
            case {"type": "content_block_delta", "index": at, "delta": {"partial_json": text}}:
                inputs[at] = inputs.get(at, "") + text
            case {"type": "content_block_delta", "index": at, "delta": {"thinking": text}}:
                blocks[at]["thinking"] = blocks[at].get("thinking", "") + text
            case {"type": "message_delta", "delta": delta}:
                stop_reason = delta.get("stop_reason") or stop_reason
                cached = (event.get("usage") or {}).get("cache_read_input_tokens", cached)
    if not stop_reason:
        return None
    for at, text in inputs.items():
        blocks[at]["input"] = msgspec.json.decode(text or "{}")
    content = [blocks[at] for at in sorted(blocks)]
    return Heard({"role": "assistant", "content": content}, cached)

"""An error as clients get it: OpenAI-shaped body, headers, and the event inside a stream (C11)."""

import asyncio
import json
import secrets
from functools import lru_cache
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import HttpVersion11, web

from hive.errors import HiveError
from hive.gateway.line import Sent, sent
from hive.policy import redaction

MOST_MADE = 1024  # refusals that are kept ready
_EXACT = "retry-after-ms"


def body(error: HiveError, request_id: str | None = None) -> dict[str, Any]:
    """contract's body; both OpenAI's and Anthropic's clients make an exception of it."""
    details: dict[str, Any] = {
        "suggested_action": for_clients(error.suggested_action),
        "retryable": error.retryable,
        "request_id": request_id,
        "timestamp": error.timestamp.isoformat(),
        "http_status": error.status,
        "category": str(error.family),
        "severity": str(error.severity),
        "retry_after_seconds": error.retry_after_seconds,
        "number": error.number,
        **_redacted(error.public_details),
    }
    return {
        "type": "error",
        "error": {
            "message": for_clients(error.message),
            "type": error.kind,
            "code": error.code,
            "param": error.param,
            "details": {k: v for k, v in details.items() if v is not None},
        },
    }


# The same few sentences, most of the time.
for_clients = lru_cache(1024)(redaction.for_clients)


def _redacted(value: Any) -> Any:
    match value:
        case str():
            return for_clients(value)
        case dict():
            return {k: _redacted(v) for k, v in value.items()}
        case list() | tuple():
            return [_redacted(v) for v in value]
    return value


def headers(error: HiveError) -> dict[str, str]:
    """Retry-After and its exact form, the machine-readable reason, and what to authenticate by."""
    found = {"x-should-retry": "true" if error.retryable else "false"}
    if error.retry_after_s is not None:
        found["Retry-After"] = str(error.retry_after_seconds)
        found[_EXACT] = str(_milliseconds(error.retry_after_s))
    if reason := error.details.get("reason"):
        found["X-Hive-Reason"] = str(reason)
    if error.status == HTTPStatus.UNAUTHORIZED:
        found["WWW-Authenticate"] = "Bearer"
    if error.status == HTTPStatus.METHOD_NOT_ALLOWED:
        found["Allow"] = ", ".join(error.details.get("allowed", ()))
    return found


def _milliseconds(seconds: float) -> int:
    return round(max(0.0, seconds) * 1000)


def response(error: HiveError, request_id: str | None) -> web.Response:
    return web.json_response(body(error, request_id), status=error.status, headers=headers(error))


def write(
    error: HiveError, request: web.Request, transport: asyncio.Transport, request_id: str
) -> Sent:
    """The answer, written at once: refusals are most when hive has least time for them."""
    first, before_id, before_time, rest = _parts(error)
    own_id, at = request_id.encode(), error.timestamp.isoformat().encode()
    content = b"".join((before_id, own_id, before_time, at, rest))
    is_kept = bool(request.keep_alive)
    more = ""
    if error.retry_after_s is not None:
        more = f"retry-after-ms: {_milliseconds(error.retry_after_s)}\r\n"
    if not is_kept:
        more += "Connection: close\r\n"
    elif request.version < HttpVersion11:
        more += "Connection: keep-alive\r\n"
    own = f"{more}X-Request-Id: {request_id}\r\nContent-Length: {len(content)}\r\n\r\n"
    transport.write(b"".join((first, own.encode(), content)))
    return sent(error.status, is_kept=is_kept)


def _parts(error: HiveError) -> tuple[bytes, bytes, bytes, bytes]:
    """The head but for what is each answer's own; the body before its id, its time, and the rest.

    The same few refusals are told again and again: each is made once.
    """
    told = error.message, error.suggested_action, error.param, error.retry_after_seconds
    key = _encode((error.code, error.status, error.retryable, *told, error.public_details))
    found = _made.get(key)
    if found is None:
        if len(_made) >= MOST_MADE:
            _made.clear()
        found = _made[key] = _taken_apart(error)
    return found


def _taken_apart(error: HiveError) -> tuple[bytes, bytes, bytes, bytes]:
    lines = [f"HTTP/1.1 {error.status} {_phrase(error.status)}"]
    lines += (f"{name}: {value}" for name, value in headers(error).items() if name != _EXACT)
    lines += ("Server: hive", "Content-Type: application/json; charset=utf-8", "")
    before_id, _, text = _encode(body(error, _OWN_ID)).partition(_OWN_ID.encode())
    before_time, _, rest = text.partition(error.timestamp.isoformat().encode())
    return "\r\n".join(lines).encode(), before_id, before_time, rest


_made: dict[bytes, tuple[bytes, bytes, bytes, bytes]] = {}
_OWN_ID = secrets.token_hex(16)  # stands for a request's


_encode = msgspec.json.Encoder().encode


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:  # 499, which nobody has registered
        return "Client Closed Request"


def event(error: HiveError, request_id: str | None) -> bytes:
    """The error as the last event of a stream that has begun."""
    text = json.dumps(body(error, request_id), separators=(",", ":"))
    return f"event: error\ndata: {text}\n\n".encode()

"""A request's body, received within its bounds, and the model it names."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
from aiohttp import web

from hive.errors import (
    HttpError,
    PayloadTooLarge,
    RequestCancelled,
    RequestTimeout,
    ServiceUnavailable,
    ValidationFailed,
)
from hive.settings import Server

MIB = 2**20
_BOUNDARY = re.compile(r'boundary="?([^";,]{1,200})"?', re.IGNORECASE)
_FIELD_NAME = re.compile(rb'(?:[;\s])name="([^"]*)"')
_LIST = re.compile(rb"\s*\[\s*(\S)")
_MODEL_BYTES = 256


_MOST_WEIGHT = 100_000


class _Named(msgspec.Struct):
    """The fields of a JSON body that hive itself looks at; the engine judges all but the model."""

    model: str
    stream: msgspec.Raw = msgspec.Raw(b"")
    n: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    documents: msgspec.Raw = msgspec.Raw(b"")


_decoder = msgspec.json.Decoder(_Named)
_items = msgspec.json.Decoder(list[msgspec.Raw])


@dataclass(frozen=True, slots=True)
class Asked:
    """What hive needs to know of a body: `weight` is how many requests the engine makes of it."""

    model: str
    is_stream: bool = False
    weight: int = 1


class Intake:
    """Receives bodies; all that are held at once stay below `max_buffered_mib`."""

    def __init__(self, server: Server) -> None:
        self._most = int(server.max_body_mib * MIB)
        self._most_together = int(server.max_buffered_mib * MIB)
        self._body_s = server.body_s
        self.held = 0  # bytes

    @asynccontextmanager
    async def receive(self, request: web.Request) -> AsyncIterator[bytes]:
        """The whole body; its room is given back when the block ends.

        Raises PayloadTooLarge, RequestTimeout (phase body), HttpError 415, ServiceUnavailable.
        """
        encoding = request.headers.get("Content-Encoding", "").lower() or "identity"
        if encoding != "identity":
            raise HttpError(
                "The body has a Content-Encoding; hive and its engines take plain bodies only.",
                status=415,
                action="Send the body without Content-Encoding.",
            )
        if (request.content_length or 0) > self._most:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(self._body_s):
                    async for part in request.content.iter_any():
                        size += len(part)
                        self.held += len(part)
                        parts.append(part)
                        if size > self._most:
                            raise self._too_large()
                        if self.held > self._most_together:
                            raise ServiceUnavailable(
                                "Too many request bodies are being received.",
                                reason="bodies_full",
                                retry_after_s=1.0,
                            )
            except TimeoutError:
                raise RequestTimeout(
                    f"The request's body did not arrive within {self._body_s:g} s.",
                    phase="body",
                    timeout_seconds=self._body_s,
                    action="Send the body faster, or raise server.body_s.",
                ) from None
            except web.RequestPayloadError as exc:
                raise ValidationFailed("The request's body is not valid HTTP.") from exc
            except ConnectionError as exc:
                raise RequestCancelled from exc
            body = b"".join(parts)
            parts.clear()  # else a body is held twice
            yield body
        finally:
            self.held -= size

    def _too_large(self) -> PayloadTooLarge:
        most = self._most / MIB
        return PayloadTooLarge(
            f"The request's body is larger than {most:g} MiB.", max_body_mib=most
        )


def asked_in(body: bytes, content_type: str) -> Asked:
    """What a body asks for. Raises ValidationFailed that says what is wrong, never echoing."""
    if content_type.lower().startswith("multipart/"):
        return Asked(_model_in_multipart(body, content_type))
    if not body:
        raise ValidationFailed("The request has no body; a JSON object with 'model' is needed.")
    try:
        named = _decoder.decode(body)
    except msgspec.ValidationError as exc:
        raise _not_as_needed(str(exc)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ValidationFailed(
            f"The request's body is not valid JSON: {_without_prefix(str(exc))}.",
            action="Send a JSON object, encoded as UTF-8.",
        ) from None
    except RecursionError:
        raise ValidationFailed("The request's body is nested too deeply.") from None
    if not named.model:
        raise ValidationFailed("'model' must not be empty.", param="model")
    texts = _count(named.prompt) * _count(named.input) * _count(named.documents)
    n = bytes(named.n)
    weight = texts * max(1, int(n) if n.isdigit() and len(n) < len(str(_MOST_WEIGHT)) else 1)
    is_stream = bytes(named.stream) == b"true"
    return Asked(named.model, is_stream, min(weight, _MOST_WEIGHT))


def _count(texts: msgspec.Raw) -> int:
    """How many texts there are: a list has several, a list of token ids is one."""
    first = _LIST.match(bytes(memoryview(texts)[:64]))
    if not first or first[1].isdigit():
        return 1
    try:
        return max(1, len(_items.decode(texts)))
    except (msgspec.DecodeError, RecursionError):
        return 1


def _without_prefix(text: str) -> str:
    return text.removeprefix("JSON is malformed: ").rstrip(".")


def _not_as_needed(finding: str) -> ValidationFailed:
    """msgspec's finding ("Expected `str`, got `int` - at `$.model`") in a client's words."""
    if "missing required field" in finding:
        return ValidationFailed(
            "The request does not name a model: 'model' is missing.", param="model"
        )
    _, _, got = finding.partition(", got ")
    got = got.partition(" - at ")[0]
    if "$.model" in finding:
        return ValidationFailed(f"'model' must be a string, not {got.strip('`')}.", param="model")
    return ValidationFailed(f"The body must be a JSON object, not {got.strip('`') or 'this'}.")


def _model_in_multipart(body: bytes, content_type: str) -> str:
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        raise ValidationFailed("The multipart body has no boundary in its Content-Type.")
    for head, content in _parts(body, boundary[1].strip().encode(errors="surrogateescape")):
        name = _FIELD_NAME.search(head)
        if name and name[1] == b"model":
            if not content or len(content) > _MODEL_BYTES:
                raise ValidationFailed("'model' must be a name.", param="model")
            try:
                return content.decode()
            except UnicodeDecodeError:
                raise ValidationFailed("'model' must be UTF-8.", param="model") from None
    raise ValidationFailed(
        "The form does not name a model: the field 'model' is missing.", param="model"
    )


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Head and content of each part; found by searching, so that a large file costs nothing."""
    delimiter = b"--" + boundary
    at = body.find(delimiter)
    while at >= 0:
        begin = at + len(delimiter)
        if body[begin : begin + 2] == b"--":
            return
        at = body.find(b"\r\n" + delimiter, begin)
        head_end = body.find(b"\r\n\r\n", begin)
        if at < 0 or head_end < 0 or head_end > at:
            return
        yield body[begin:head_end], body[head_end + 4 : at]
        at += 2

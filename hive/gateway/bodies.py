"""A request's body, received within its bounds, and the model it names."""

import asyncio
import math
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import msgspec
from aiohttp import StreamReader, web

from hive.errors import (
    HttpError,
    PayloadTooLarge,
    RequestCancelled,
    RequestTimeout,
    ServiceUnavailable,
    ValidationFailed,
)
from hive.gateway.line import Leaving
from hive.gateway.traffic import Passage
from hive.settings import Server
from hive.workers.interrupt import Interrupt

MIB = 2**20
_BOUNDARY = re.compile(r'(?:^|[;\s])boundary="?([^";,]{1,200})"?', re.IGNORECASE)
_FIELD_NAME = re.compile(
    rb'(?:^|\n)content-disposition:[^\r\n]*?[;\s]name=(?:"([^"]*)"|([^\s;"]+))', re.IGNORECASE
)
_LIST = re.compile(rb"\s*\[\s*(\S)")
_MODEL_BYTES = 256
EARLY_BYTES = 256 * 1024  # of a body that need not be held whole
_MOST_WEIGHT = 100_000
_UNCOUNTED = frozenset({"tokenize", "detokenize"})  # the engine runs nothing for them
_OF_INPUTS = frozenset({"embeddings", "pooling", "classify"})
_OF_PAIRS = frozenset({"rerank", "score"})


class _Named(msgspec.Struct):
    """The fields of a JSON body that hive itself looks at; the engine judges all but the model."""

    model: str
    stream: msgspec.Raw = msgspec.Raw(b"")
    n: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    documents: msgspec.Raw = msgspec.Raw(b"")
    text_1: msgspec.Raw = msgspec.Raw(b"")
    text_2: msgspec.Raw = msgspec.Raw(b"")


_decoder = msgspec.json.Decoder(_Named)
_items = msgspec.json.Decoder(list[msgspec.Raw])


class Asked(NamedTuple):
    """What hive needs to know of a body: `weight` is how many requests the engine makes of it."""

    model: str
    is_stream: bool = False
    weight: int = 1


class Body:
    """A request's body; what is held of it counts against `max_buffered_mib` until it is released.

    `data` is all of it, or its beginning: then `rest` is what has not come yet, and once
    the beginning was sent it is spent, and cannot be sent again.
    """

    __slots__ = ("_intake", "_size", "data", "is_spent", "leaving", "rest")

    def __init__(self, intake: "Intake") -> None:
        self._intake = intake
        self._size = 0
        self.data = b""
        self.rest: Rest | None = None
        self.is_spent = False
        self.leaving: Leaving | None = None  # looks for it from the time when it is not read

    def grows(self, size: int) -> None:
        """More of it has come. Raises PayloadTooLarge, ServiceUnavailable."""
        self._size += size
        self._intake.has_more(size, self._size)

    def end(self) -> None:
        """Its request is over."""
        self.release()
        if self.leaving is not None:
            self.leaving.cancel()

    def release(self) -> None:
        """What is held of it is needed no more; releasing it again does nothing."""
        self._intake.held -= self._size
        self._size, self.data = 0, b""


class Rest:
    """What is still to come of a body."""

    def __init__(
        self,
        content: StreamReader,
        left_s: float,
        judge: Callable[[int], None],
        late: Callable[[], RequestTimeout],
    ) -> None:
        """It is `late` when it was waited for `left_s` seconds; `judge` raises at too many bytes."""
        self._content, self._left_s = content, left_s
        self._judge, self._late = judge, late
        self._come = 0  # bytes

    async def part(self) -> bytes:
        """The next part of it; empty: that was all.

        Raises PayloadTooLarge, RequestTimeout, ValidationFailed, RequestCancelled.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, self._left_s)):
                part = await self._content.readany()
        except TimeoutError:
            raise self._late() from None
        except web.RequestPayloadError as exc:
            raise ValidationFailed("The request's body is not valid HTTP.") from exc
        except ConnectionError as exc:
            raise RequestCancelled from exc
        self._left_s -= time.monotonic() - began  # not while it waits for a slot, or its engine
        self._come += len(part)
        self._judge(self._come)
        return part


class Intake:
    """Receives bodies; all that are held at once stay below `max_buffered_mib`."""

    def __init__(self, server: Server) -> None:
        self.held = 0  # bytes
        self.apply(server)

    def apply(self, server: Server) -> None:
        """These limits, from now on."""
        self._most = int(server.max_body_mib * MIB)
        self._most_together = int(server.max_buffered_mib * MIB)
        self._body_s = server.body_s

    async def receive(
        self,
        request: web.Request,
        passage: Passage,
        own_s: float | None = None,
        *,
        is_known: bool = False,
    ) -> Body:
        """The body; of a large one its beginning, EARLY_BYTES or a little more, where that says
        who gets it, or where `is_known` says that this is known.

        `own_s` is the caller's own limit, seconds from its arrival.

        Raises PayloadTooLarge, RequestTimeout (phase body, or request), HttpError 415,
        ServiceUnavailable, or what cancelled the request.
        """
        encoding = request.headers.get("Content-Encoding")
        if encoding and encoding.lower() != "identity":
            raise HttpError(
                "The body has a Content-Encoding; hive and its engines take plain bodies only.",
                status=415,
                action="Send the body without Content-Encoding.",
            )
        if (request.content_length or 0) > self._most:
            raise self._too_large()
        body = Body(self)
        try:
            content = request.content
            if content.is_eof() and content.exception() is None:  # it came with the head
                data = content.read_nowait()
                body.grows(len(data))
                body.data = data
            else:
                await self._gather(request, passage, own_s, body, is_known=is_known)
        except BaseException:
            body.release()
            raise
        return body

    async def _gather(
        self,
        request: web.Request,
        passage: Passage,
        own_s: float | None,
        body: Body,
        *,
        is_known: bool,
    ) -> None:
        own_left_s = math.inf if own_s is None else own_s + passage.began - time.monotonic()
        late = partial(self._late, passage, own_s if own_left_s < self._body_s else None)
        rest = Rest(request.content, min(self._body_s, own_left_s), self.judge_size, late)

        def is_enough(early: bytes) -> bool:
            return is_known or _names_model(early, request)

        if await self._take(rest, body, passage, is_enough):
            body.rest = rest
            assert request.transport is not None
            body.leaving = Leaving(request.transport)

    async def hold(self, body: Body, passage: Passage) -> None:
        """Receive the rest of a body after all. Raises like `receive`."""
        if body.rest is not None:
            await self._take(body.rest, body, passage, None)
            body.rest = None

    async def _take(
        self,
        rest: Rest,
        body: Body,
        passage: Passage,
        is_enough: Callable[[bytes], bool] | None,
    ) -> bool:
        """Until that was all, or its first EARLY_BYTES are enough; whether they are."""
        parts = [body.data]
        size = 0
        interrupt = Interrupt()
        with passage.ended_by(interrupt):
            async with interrupt:
                while part := await rest.part():
                    body.grows(len(part))
                    parts.append(part)
                    size += len(part)
                    if is_enough is not None and size >= EARLY_BYTES:
                        body.data = b"".join(parts)
                        if is_enough(body.data):
                            return True
                        parts, is_enough = [body.data], None
        body.data = b"".join(parts)
        return False

    def judge_size(self, size: int) -> None:
        """Raises PayloadTooLarge for a body of `size` bytes."""
        if size > self._most:
            raise self._too_large()

    def has_more(self, size: int, of_one: int) -> None:
        """So much more is held, and so much of one body. Raises PayloadTooLarge, ServiceUnavailable."""
        self.held += size
        self.judge_size(of_one)
        if self.held > self._most_together:
            raise ServiceUnavailable(
                "Too many request bodies are being received.",
                reason="bodies_full",
                retry_after_s=1.0,
            )

    def _late(self, passage: Passage, own_s: float | None) -> RequestTimeout:
        if own_s is None:
            return RequestTimeout(
                f"The request's body did not arrive within {self._body_s:g} s.",
                phase="body",
                timeout_seconds=self._body_s,
                action="Send the body faster, or raise server.body_s.",
            )
        return RequestTimeout(
            "The request's own deadline passed before its body was there.",
            phase="request",
            timeout_seconds=max(0.0, own_s),
            elapsed_seconds=round(time.monotonic() - passage.began, 3),
        )

    def _too_large(self) -> PayloadTooLarge:
        most = self._most / MIB
        return PayloadTooLarge(
            f"The request's body is larger than {most:g} MiB.", max_body_mib=most
        )


def asked_in(body: bytes, content_type: str, path: str) -> Asked:
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
    is_stream = bytes(named.stream) == b"true"
    return Asked(named.model, is_stream, min(_weight(named, path), _MOST_WEIGHT))


def _weight(named: _Named, path: str) -> int:
    """How many requests the engine makes of it; which fields say so depends on the path."""
    leaf = path.rpartition("/")[2]
    if leaf in _UNCOUNTED:
        return 0
    if leaf == "completions":
        n = bytes(named.n)
        choices = int(n) if n.isdigit() and len(n) < len(str(_MOST_WEIGHT)) else 1
        is_chat = path.endswith("/chat/completions")
        return max(1, choices) * (1 if is_chat else _count(named.prompt))
    if leaf in _OF_INPUTS:
        return _count(named.input)
    if leaf in _OF_PAIRS:
        return max(_count(named.documents), _count(named.text_1), _count(named.text_2))
    return 1


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
    for head, begin, end in _parts(body, boundary[1].strip().encode(errors="surrogateescape")):
        name = _FIELD_NAME.search(head)
        if name and b"model" in name.groups():
            content = body[begin : min(end, begin + _MODEL_BYTES + 1)]
            if not content or len(content) > _MODEL_BYTES:
                raise ValidationFailed("'model' must be a name.", param="model")
            try:
                return content.decode()
            except UnicodeDecodeError:
                raise ValidationFailed("'model' must be UTF-8.", param="model") from None
    raise ValidationFailed(
        "The form does not name a model: the field 'model' is missing.", param="model"
    )


def _names_model(early: bytes, request: web.Request) -> bool:
    """Whether the beginning of a form says which model it is for."""
    content_type = request.headers.get("Content-Type", "")
    if not content_type.lower().startswith("multipart/"):
        return False
    try:
        return bool(_model_in_multipart(early, content_type))
    except ValidationFailed:  # perhaps it comes later
        return False


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each whole part: its head, and where its content is; a large file is searched once."""
    line = b"--" + re.escape(boundary) + rb"(?=--|[ \t]*\r\n)"
    first = re.match(line, body)
    begin = first.end() if first else -1
    for found in re.compile(b"\r\n" + line).finditer(body, max(0, begin)):
        if begin >= 0:
            head_end = body.find(b"\r\n\r\n", begin, found.start())
            if head_end < 0:
                return
            yield body[begin:head_end], head_end + 4, found.start()
        begin = found.end()
        if body[begin : begin + 2] == b"--":
            return

"""The way of the bytes: a request to its worker's engine, the answer back to the client.

The answer passes unchanged. Its head is held until the first piece of its body is there, so an
engine that dies before saying anything still becomes a proper status; after that an error becomes
the last event of the stream, or, inside an event, a connection closed without its last chunk.
"""

import asyncio
import re
import time
from collections.abc import Callable

import aiohttp
from aiohttp import HttpVersion11, hdrs, web
from multidict import CIMultiDict
from yarl import URL

from hive.errors import (
    BadGateway,
    GatewayTimeout,
    HiveError,
    ServiceUnavailable,
    WorkerCrashed,
)
from hive.events import RequestExpired
from hive.gateway import problems
from hive.gateway.traffic import Passage
from hive.policy.deadlines import Phase
from hive.workers.admission import Permit
from hive.workers.life import EngineOver, Life

TELL_S = 2.0  # for a client to take the error that ends its stream
EXIT_S = 1.0  # how long a broken answer waits to learn whether the engine's process ended
WHOLE_BYTES = 8 * 2**20  # an answer of known length up to this is sent in one piece
_HOP_BY_HOP = frozenset(
    h.lower()
    for h in (
        hdrs.CONNECTION,
        hdrs.KEEP_ALIVE,
        hdrs.PROXY_AUTHENTICATE,
        hdrs.PROXY_AUTHORIZATION,
        hdrs.TE,
        hdrs.TRAILER,
        hdrs.TRANSFER_ENCODING,
        hdrs.UPGRADE,
    )
)
# What an engine needs not know: the caller's credentials end here.
_NOT_FORWARDED = _HOP_BY_HOP | {
    "host",
    "content-length",
    "expect",
    "authorization",
    "x-api-key",
    "cookie",
    "x-request-id",
}
# An engine that lost its core reports it in the stream and ends a moment later.
_MARKS = (b'data: {"error"', b"event: error")
_ENGINE_ERROR = re.compile(rb'(?:\A|(?<=\n))(?:data: \{"error"|event: error)')
_CORE_IS_DEAD = re.compile(rb"EngineCore|EngineDead")  # vLLM's own words in its last 500
_CALLERS_FAULT = b'"code": 4'  # … but a 4xx found while streaming is the request's own
SERVER_ERROR, BACK_PRESSURE = 500, 503

Observer = Callable[[bytes], None]


class Unanswered(Exception):
    """Nothing of an answer was sent, so the request may be sent again: to another worker, and
    where `may_repeat`, after a pause, to the same one. `error` is what to tell else."""

    def __init__(self, error: HiveError, *, may_repeat: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.may_repeat = may_repeat


class Relay:
    """Forwards one request at a time to a life's engine; holds no state between requests."""

    async def forward(
        self,
        request: web.Request,
        body: bytes,
        permit: Permit,
        passage: Passage,
        weight: int = 1,
        observe: Observer | None = None,
    ) -> web.StreamResponse:
        """Send the request on and the answer back; the permit is closed, or closes by itself.

        `observe` gets the first piece of a good answer. Raises HiveError or Unanswered while
        nothing was sent; returns a response that has been sent, else. Cancelling, or a limit that
        passes, closes the engine's connection at once.
        """
        downstream = _Downstream(request, passage)
        error: HiveError
        cancelled: str | None = passage.request_id
        try:
            return await self._exchange(request, body, permit, downstream, weight, observe)
        except ClientLeft:
            raise
        except Unanswered as exc:
            cancelled = None
            if downstream.response is None:
                raise
            error = exc.error
        except HiveError as exc:
            error = exc
        finally:
            permit.aborted(cancelled)  # does nothing where the answer is whole
        if downstream.response is None:
            raise error
        passage.code = error.code
        await downstream.fail(error)
        return downstream.response

    async def _exchange(
        self,
        request: web.Request,
        body: bytes,
        permit: Permit,
        downstream: "_Downstream",
        weight: int,
        observe: Observer | None,
    ) -> web.StreamResponse:
        life, passage = permit.life, downstream.passage
        assert passage.clock is not None
        connect_s = passage.clock.deadline.limits.connect_s
        permit.began(weight)
        try:
            async with (
                passage.clock.running(),
                life.until_over(),
                life.session.request(
                    request.method,
                    # As it was sent: another reading of dots or escapes would be another path.
                    _engine_url(request),
                    data=body or None,
                    headers=self._forwarded(request, passage),
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
                    allow_redirects=False,
                ) as answer,
            ):
                try:
                    return await self._pass_on(answer, permit, downstream, observe)
                finally:
                    answer.close()  # cancelled or done: an abort is the connection's end
        except aiohttp.ServerTimeoutError:
            permit.judge(fault=True)
            permit.finished()
            permit.door.announcer.announce(
                RequestExpired(passage.request_id, permit.door.model, Phase.CONNECT)
            )
            timeout = GatewayTimeout(
                f"The engine did not accept the connection within {connect_s:g} s.",
                phase="connect",
                timeout_seconds=connect_s,
                model=passage.model,
            )
            raise Unanswered(timeout, may_repeat=True) from None
        except ClientLeft:
            raise
        except WorkerCrashed as exc:
            raise Unanswered(exc, may_repeat=False) from exc
        except (aiohttp.ClientError, ConnectionError, EngineOver) as exc:
            if isinstance(exc, aiohttp.ClientConnectorError) and life.pulse is not None:
                life.pulse.refused()
            error = await self._why_it_broke_off(life, passage, exc)
            # What hive ended itself is no fault of the worker.
            permit.judge(fault=None if isinstance(error, ServiceUnavailable) else True)
            if isinstance(exc, aiohttp.ClientConnectorError):
                permit.finished()
            is_transient = isinstance(
                exc, aiohttp.ClientConnectorError | aiohttp.ServerDisconnectedError
            ) and isinstance(error, BadGateway)
            raise Unanswered(error, may_repeat=is_transient) from exc

    def _forwarded(self, request: web.Request, passage: Passage) -> CIMultiDict[str]:
        headers = CIMultiDict(
            (name, value)
            for name, value in request.headers.items()
            if name.lower() not in _NOT_FORWARDED
        )
        headers["X-Request-Id"] = passage.request_id
        return headers

    async def _pass_on(
        self,
        answer: aiohttp.ClientResponse,
        permit: Permit,
        downstream: "_Downstream",
        observe: Observer | None,
    ) -> web.StreamResponse:
        passage, life, pulse = downstream.passage, permit.life, permit.life.pulse
        assert pulse is not None
        piece = await answer.content.readany()
        core_is_dead = answer.status == SERVER_ERROR and _CORE_IS_DEAD.search(piece)
        if core_is_dead and (crash := await self._crash(life, passage)):
            raise crash
        if observe and answer.status < 300:  # noqa: PLR2004
            observe(piece)
        is_stream = answer.content_type == "text/event-stream"
        length = answer.content_length
        if length is not None and length <= WHOLE_BYTES and not is_stream:
            piece += await answer.content.read()
        response = await downstream.begin(answer, self._returned(answer, passage))
        held = b""
        while piece:
            pulse.relayed += len(piece)
            piece, held = held + piece, b""
            if is_stream and (found := _ENGINE_ERROR.search(piece)):
                await downstream.send(piece[: found.start()])
                piece = piece[found.start() :]
                if _CALLERS_FAULT not in piece and (crash := await self._crash(life, passage)):
                    raise crash
            elif is_stream and (most := begun_mark(piece)):
                piece, held = piece[:-most], piece[-most:]
            await downstream.send(piece)
            piece = await answer.content.readany()
        # The engine is done with it; a client that reads slowly needs no slot.
        judge_by(answer.status, permit)
        permit.finished()
        await downstream.send(held)
        await downstream.finish()
        return response

    def _returned(self, answer: aiohttp.ClientResponse, passage: Passage) -> CIMultiDict[str]:
        headers = CIMultiDict(
            (name, value)
            for name, value in answer.headers.items()
            if name.lower() not in _HOP_BY_HOP
        )
        headers["X-Request-Id"] = passage.request_id
        headers.setdefault("Server", "hive")  # else the library would name itself and its version
        return headers

    async def _crash(self, life: Life, passage: Passage) -> HiveError | None:
        """The error to tell if the engine's process is ending; None if it lives on."""
        exit_ = await life.over_within(EXIT_S)
        if exit_ is None:
            return None
        if life.error is not None:
            return life.error  # of its device: no other request would fare better
        if life.was_asked:
            return ServiceUnavailable(
                "The worker was stopped before the answer was complete.",
                reason="draining",
                retry_after_s=30,
                model=passage.model,
            )
        return WorkerCrashed(
            f"The engine's process ended while it was answering ({exit_}).",
            cause=exit_.cause,
            exit_status=exit_.code,
            signal=exit_.signal,
            worker=passage.worker,
            model=passage.model,
        )

    async def _why_it_broke_off(
        self, life: Life, passage: Passage, exc: BaseException
    ) -> HiveError:
        if crash := await self._crash(life, passage):
            return crash
        if isinstance(exc, aiohttp.ClientConnectorError):
            what = "accepts no connection"
        elif isinstance(exc, aiohttp.ServerDisconnectedError):
            what = "closed the connection without an answer"
        elif isinstance(exc, aiohttp.ClientResponseError):
            what = "sent something that is not HTTP"
        else:
            what = "broke its answer off"
        return BadGateway(f"The engine {what}.", worker=passage.worker, model=passage.model)


def judge_by(status: int, permit: Permit) -> None:
    """4xx are the caller's; the engine's own 429 and 503 are back-pressure (C5, C12)."""
    is_neutral = 400 <= status < SERVER_ERROR or status == BACK_PRESSURE  # noqa: PLR2004
    permit.judge(fault=None if is_neutral else status >= SERVER_ERROR)


def begun_mark(piece: bytes) -> int:
    """How many last bytes may be the beginning of an engine's error, cut by the piece's end."""
    last_line = piece[piece.rfind(b"\n") + 1 :]
    return len(last_line) if any(mark.startswith(last_line) for mark in _MARKS) else 0


def _engine_url(request: web.Request) -> URL:
    return URL.build(
        scheme="http",
        host="engine",
        path=request.rel_url.raw_path,
        query_string=request.rel_url.raw_query_string,
        encoded=True,
    )


class ClientLeft(ConnectionError):
    """The client's connection is gone; there is nobody to tell."""


class _Downstream:
    """The client's side of one answer: knows whether the last event was sent whole."""

    def __init__(self, request: web.Request, passage: Passage) -> None:
        self._request = request
        self.passage = passage
        self.response: web.StreamResponse | None = None  # None until its head was sent
        self._is_stream = False
        self._end = b"\n\n"  # the last bytes sent; nothing sent is a whole number of events

    async def begin(
        self, answer: aiohttp.ClientResponse, headers: CIMultiDict[str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        if answer.content_length is None and self._request.version >= HttpVersion11:
            response.enable_chunked_encoding()  # HTTP/1.0 has no chunks: closed at the end
        self._is_stream = answer.content_type == "text/event-stream"
        try:
            await response.prepare(self._request)
        except ConnectionError as exc:
            raise ClientLeft from exc
        self.response = response
        self.passage.status = response.status
        self.passage.first_byte = time.monotonic()
        assert self.passage.clock is not None
        self.passage.clock.first_byte(is_stream=self._is_stream)
        return response

    async def send(self, piece: bytes) -> None:
        if not piece or self.response is None:
            return
        # Noted before the wait for a slow client, which an engine's end may interrupt.
        self.passage.bytes_out += len(piece)
        self._end = (self._end + piece[-4:])[-4:]
        assert self.passage.clock is not None
        self.passage.clock.byte()
        self.passage.waits_for_client = True
        try:
            await self.response.write(piece)
        except ConnectionError as exc:
            raise ClientLeft from exc
        self.passage.waits_for_client = False
        self.passage.clock.byte()

    async def finish(self) -> None:
        assert self.response is not None
        try:
            await self.response.write_eof()
        except ConnectionError as exc:
            raise ClientLeft from exc

    async def fail(self, error: HiveError) -> None:
        """The error as the last event; inside an event, or without events, only a cut tells."""
        if self._is_stream and self._end.endswith((b"\n\n", b"\r\n\r\n")):
            try:
                async with asyncio.timeout(TELL_S):
                    await self.send(problems.event(error, self.passage.request_id))
                    await self.finish()
            except TimeoutError:  # it does not read
                if self._request.transport is not None:
                    self._request.transport.abort()
        elif self._request.transport is not None:
            # Without the last chunk or the rest of the length: visibly incomplete.
            self._request.transport.close()

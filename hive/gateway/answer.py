"""One answer on its way: what comes on the engine's connection is written to the client's."""

import asyncio
import re
import time
from collections.abc import Callable

from aiohttp import HttpVersion11, web

from hive.errors import HiveError
from hive.gateway import problems
from hive.gateway.bodies import Body
from hive.gateway.line import Sent, line_of, sent
from hive.gateway.traffic import Passage
from hive.policy.framing import Chunks, Framing, Head, Malformed, UntilClosed, chunk
from hive.workers.admission import Permit
from hive.workers.wire import Wire

TELL_S = 2.0  # for a client to take the error that ends its stream
WHOLE_BYTES = 8 * 2**20  # an answer of known length up to this is sent in one piece
SUSPECT_BYTES = 64 * 1024  # of a failure, which may tell of the engine's own end
SERVER_ERROR, BACK_PRESSURE = 500, 503
# An engine that lost its core reports it in the stream and ends a moment later.
_MARKS = (b'data: {"error"', b"event: error")
_MARK = re.compile(rb'(?:\A|(?<=\n))(?:data: \{"error"|event: error)')
_CALLERS_FAULT = b'"code": 4'  # … but a 4xx found while streaming is the request's own
_CORE_IS_DEAD = re.compile(rb"EngineCore|EngineDead")  # vLLM's own words in its last 500
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
_LAST_CHUNK = b"0\r\n\r\n"
_LINE_FEED = 10


class NoAnswer(Exception):
    """The engine's connection did not come about, broke, or brought what is not HTTP."""

    def __init__(self, what: str, *, is_silent: bool = False) -> None:
        """`what` the engine did; `is_silent`: it said nothing before."""
        super().__init__(what)
        self.what, self.is_silent = what, is_silent


class ClientLeft(ConnectionError):
    """The client's connection is gone; there is nobody to tell."""


class Answer:
    """Of one request; on another connection to the engine where the first one says nothing.

    It is the Taker of what the engine sends, the Writer on its client's Line, and a User of time
    and of the engine. Its request waits on `is_suspicious`, which whatever ends the answer ends.
    """

    def __init__(
        self,
        request: web.Request,
        passage: Passage,
        permit: Permit,
        body: Body,
        observe: Callable[[bytes], None] | None,
    ) -> None:
        """`observe` gets the first piece of a good answer. Raises ClientLeft."""
        transport, clock, pulse = request.transport, passage.clock, permit.life.pulse
        assert clock is not None
        assert pulse is not None
        if transport is None:
            raise ClientLeft
        self.sent: Sent | None = None  # once its first byte is on the way to the client
        self.passage, self.permit = passage, permit
        self._request, self._transport, self._observe = request, transport, observe
        self._request_body = body
        self._clock, self._pulse, self._line = clock, pulse, line_of(transport)
        self._witness = passage.witness
        self._deadline = clock.deadline
        self._wire: Wire | None = None
        self._loop = asyncio.get_running_loop()
        self._turn: asyncio.Future[bool] = self._loop.create_future()
        self._cause: Exception | None = None
        self._head: Head | None = None
        self._body: Framing
        self._pieces: list[bytes] | None = None  # of an answer that is sent whole
        self._gathered = self._most = 0  # bytes of them
        self._held = b""  # what may be the beginning of a mark
        self._suspect: tuple[bytes, int] | None = None  # bytes, and where in them the mark is
        self._tail = b""  # the last piece of its events; six bytes of it at least
        self._is_stream = False  # of events, an error can be added to it
        self._is_chunked = False  # as the client gets it …
        self._is_recoded = False  # … which is not how it comes
        self._is_ended = False
        self._unread = 0  # bytes that wait for the client

    # ── for its request ─────────────────────────────────────────────────────────────────────────

    def asks(self, wire: Wire, head: bytes) -> None:
        """Send the request; what comes back, or ends it, is the next turn."""
        if isinstance(self._cause, NoAnswer):  # of an earlier connection
            self._cause, self._turn = None, self._loop.create_future()
        self._wire, self._line.writer = wire, self
        self._clock.attach(self)
        self.permit.life.attach(self)
        if self._cause is None:
            wire.ask(
                head,
                self._request_body.data,
                self,
                is_head=self._request.method == "HEAD",
                is_whole=self._request_body.rest is None,
            )

    async def is_suspicious(self) -> bool:
        """Wait for the next turn: False at the answer's end, when the client has taken it.

        True: the engine says what it says when it dies; `goes_on` is for one that lives.
        Raises NoAnswer, EngineOver, or the error of what ended the request.
        """
        return await self._turn

    def goes_on(self) -> None:
        """The engine lives: what it said is passed on as it is."""
        self._turn = self._loop.create_future()
        if self._cause is not None:
            self._turn.set_exception(self._cause)
            return
        if self._pieces is not None:
            self._writes(b"".join(self._pieces))
            self._ends()
            return
        assert self._suspect is not None
        assert self._wire is not None
        (data, _), self._suspect = self._suspect, None
        try:
            self._passes_on(data, is_believed=True)
        except Malformed as exc:
            self.broke(exc)
        if not self._line.is_full and not self._is_ended:
            self._wire.resume()

    def is_taken(self) -> None:
        """The engine has taken more of the request: its time begins again."""
        self._clock.got_slot()

    def close(self) -> None:
        """Whatever is still under way is over: the engine learns of it by its connection's end."""
        if self._wire is not None and not self._is_ended:
            self._wire.abort()
        self._clock.detach()
        self.permit.life.detach(self)
        self._line.writer = None
        self.passage.has_read = None
        if not self._turn.done():
            self._turn.cancel()
        elif not self._turn.cancelled():
            self._turn.exception()  # perhaps nobody was left to raise it to

    async def fail(self, error: HiveError) -> Sent:
        """The error as the last event; inside an event, or without events, only a cut tells."""
        assert self.sent is not None
        if self._is_ended:  # it is whole, and its client does not take it
            self._transport.abort()
            return self.sent
        if self._suspect is not None:
            self._writes(self._before_the_mark(*self._suspect))
        if not self._is_between_events:
            # Without the rest of its length or chunks: visibly incomplete.
            self._transport.close()
            self._loop.call_later(TELL_S, self._transport.abort)  # it may not read
            return self.sent
        event = problems.event(error, self.passage.request_id)
        self._writes(chunk(event) + _LAST_CHUNK if self._is_chunked else event)
        if self._line.is_full:
            self._turn, self._is_ended = self._loop.create_future(), True
            self._line.writer = self
            try:
                async with asyncio.timeout(TELL_S):
                    await self._turn
            except TimeoutError:  # it does not read
                self._transport.abort()
            finally:
                self._line.writer = None
        return self.sent

    # ── what ends it ────────────────────────────────────────────────────────────────────────────

    def end(self, cause: Exception) -> None:
        """A limit, a cancel, or the engine's end."""
        if self._cause is None:
            self._cause = cause
            if not self._turn.done():
                self._turn.set_exception(cause)

    def broke(self, why: Exception | None) -> None:
        """The engine's connection is gone; for an answer without a length that is its end."""
        assert self._wire is not None
        if isinstance(why, Malformed):
            self.end(NoAnswer("sent something that is not HTTP"))
        elif not self._wire.has_answered:
            self.end(NoAnswer("closed the connection without an answer", is_silent=True))
        elif self._head is None or not isinstance(self._body, UntilClosed) or why is not None:
            self.end(NoAnswer("broke its answer off"))
        elif self._suspect is None:
            if self._held:
                self._writes(self._taken(self._held)[1])
            if self._is_chunked:
                self._writes(_LAST_CHUNK)
            self._ends()

    # ── what the engine sends ───────────────────────────────────────────────────────────────────

    def begins(self, head: Head) -> None:
        """Nothing is sent before something of the body is there."""
        if self._witness is not None:
            self._witness.begins()
        self._head, self._body = head, head.body()
        has_chunks = self._request.version >= HttpVersion11 and head.length is None
        self._is_chunked, self._is_recoded = has_chunks, has_chunks is not head.is_chunked
        self._is_stream = head.is_stream and head.length is None
        self._tail = b"\n\n\r\n" if has_chunks else b"\n\n"  # none are a whole number of events
        if head.length is not None and head.length <= WHOLE_BYTES and not head.is_stream:
            self._pieces, self._most = [], WHOLE_BYTES
        elif head.status == SERVER_ERROR and not head.is_stream:
            self._pieces, self._most = [], SUSPECT_BYTES
        if head.length == 0:
            self._releases(is_clean=True)
            self._writes(b"")
            self._ends()

    def data(self, data: bytes) -> None:
        """Pass it on, or gather it: a small answer is sent in one piece."""
        self._pulse.relayed += len(data)
        self._deadline.last_byte_at = time.monotonic()
        if self._pieces is not None:
            self._gathers(data)
        else:
            self._passes_on(self._held + data if self._held else data)

    def _gathers(self, data: bytes) -> None:
        assert self._head is not None
        assert self._pieces is not None
        end, out = self._taken(data)
        self._pieces.append(out)
        self._gathered += len(out)
        if end < 0:
            if self._gathered > self._most:
                whole, self._pieces = b"".join(self._pieces), None
                self._writes(whole)
            return
        self._releases(is_clean=end == len(data))
        if self._is_chunked and self._is_recoded:
            self._pieces.append(_LAST_CHUNK)
        whole = b"".join(self._pieces)
        if self._head.status == SERVER_ERROR and _CORE_IS_DEAD.search(whole):
            self._suspects()
            return
        self._writes(whole)
        self._ends()

    def _passes_on(self, data: bytes, *, is_believed: bool = False) -> None:
        self._held = b""
        if self._is_stream:
            if b"error" in data and not is_believed and (at := self._mark_in(data)) is not None:
                self._suspect = data, at
                self._suspects()
                return
            if data[-1] != _LINE_FEED and (count := begun_mark(data)):
                data, self._held = data[:-count], data[-count:]
                if not data:
                    return
        if self._is_recoded or self._witness is not None:
            end, out = self._taken(data)
        elif (end := self._body.feed(data)) < 0:
            out = data
        else:
            out = data[:end]
        if end < 0:
            self._writes(out)
            return
        self._releases(is_clean=end == len(data))
        self._writes(out)
        self._ends()

    def _mark_in(self, data: bytes) -> int | None:
        """Where the engine says that it fails, which it may say as it dies."""
        found = _MARK.search(data)
        if found is None or _CALLERS_FAULT in data[found.start() :]:
            return None
        if found.start() == 0 and not self._tail.endswith(b"\n"):
            return None  # in the middle of a line
        return found.start()

    def _taken(self, data: bytes) -> tuple[int, bytes]:
        """Where in it the body ends (-1: not yet), and what the client gets of it."""
        if not self._is_recoded and self._witness is None:
            end = self._body.feed(data)
            return end, data if end < 0 else data[:end]
        payload: list[bytes] = []
        end = self._body.feed(data, payload)
        out = b"".join(payload)
        if self._witness is not None:
            self._witness.heard(out)
            if not self._is_recoded:
                return end, data if end < 0 else data[:end]
        return end, chunk(out) if out and self._is_chunked else out

    def _suspects(self) -> None:
        if self._wire is not None and not self._is_ended:
            self._wire.pause()
        if not self._turn.done():
            self._turn.set_result(True)

    def _before_the_mark(self, data: bytes, at: int) -> bytes:
        """What the client gets of a piece whose rest says that the engine fails."""
        try:
            _, out = self._taken(data[:at])
        except Malformed:
            return b""
        body = self._body
        if self._is_recoded or not isinstance(body, Chunks) or body.chunk_at < 0:
            return out
        # The chunk that the mark is in has not begun for the client: it gets a shorter one.
        payload = out[out.index(b"\r\n", body.chunk_at) + 2 :]
        self._body = Chunks()
        return out[: body.chunk_at] + (chunk(payload) if payload else b"")

    def _releases(self, *, is_clean: bool) -> None:
        self._is_ended = True
        if self._wire is not None:
            self._wire.release(is_clean=is_clean)

    def _ends(self) -> None:
        """The engine is done with it; a client that reads slowly needs no slot."""
        assert self._head is not None
        self._is_ended = True
        if self._witness is not None:
            self._witness.ended(self._head.status, is_stream=self._head.is_stream)
        judge_by(self._head.status, self.permit)
        self.permit.finished()
        self.permit.life.detach(self)
        if not self._line.is_full and not self._turn.done():
            self._turn.set_result(False)

    # ── what the client gets ────────────────────────────────────────────────────────────────────

    def _writes(self, out: bytes) -> None:
        if out:
            self.passage.bytes_out += len(out)
            if self._is_stream:
                self._tail = out if len(out) > 5 else self._tail[-6:] + out  # noqa: PLR2004
        if self.sent is None:
            out = self._first(out)
        if out and not self._transport.is_closing():  # else its request is about to be cancelled
            self._transport.write(out)

    def _first(self, out: bytes) -> bytes:
        """The head before the first piece, in one write."""
        head, passage, request = self._head, self.passage, self._request
        assert head is not None
        if self._observe is not None and head.status < 300:  # noqa: PLR2004
            self._observe(out)
        is_kept = request.keep_alive and (self._is_chunked or head.length is not None)
        own = f"X-Request-Id: {passage.request_id}\r\n"
        if not head.has_server:
            own += "Server: hive\r\n"
        if self._is_chunked:
            own += "Transfer-Encoding: chunked\r\n"
        if not is_kept:
            own += "Connection: close\r\n"
        elif request.version < HttpVersion11:
            own += "Connection: keep-alive\r\n"
        if head.status < 400:  # noqa: PLR2004
            self.permit.answers()
        self._request_body.release()  # nobody sends it again
        self.sent = sent(head.status, is_kept=is_kept)
        passage.status = head.status
        passage.first_byte = time.monotonic()
        self._clock.first_byte(is_stream=head.is_stream, is_last=self._is_ended)
        if self._line.is_full:  # of an answer before it
            self.full()
        return b"%s%s\r\n%s" % (head.opening, own.encode(), out)

    @property
    def _is_between_events(self) -> bool:
        """Whether an event can be added."""
        if not self._is_stream:
            return False
        if not self._is_chunked:
            return self._tail.endswith(_EVENT_ENDS)
        body = self._body
        if isinstance(body, Chunks) and not self._is_recoded and not body.is_between:
            return False
        return self._tail.removesuffix(b"\r\n").endswith(_EVENT_ENDS)

    def full(self) -> None:
        """It does not read: neither is read what the engine says."""
        self._unread = self._waiting_bytes
        self.passage.has_read = self._has_read
        self._clock.look()
        if self._wire is not None and not self._is_ended:
            self._wire.pause()

    def has_room(self) -> None:
        """It has read what there was."""
        self.passage.has_read = None
        self._clock.byte()
        if self._is_ended:
            if not self._turn.done():
                self._turn.set_result(False)
        elif self._wire is not None and self._suspect is None:
            self._wire.resume()

    def _has_read(self) -> bool:
        """Whether it has read anything since it was asked last."""
        before, self._unread = self._unread, self._waiting_bytes
        return self._unread < before

    @property
    def _waiting_bytes(self) -> int:
        """What hive has written and the client has not taken."""
        transport = self._transport
        return 0 if transport.is_closing() else transport.get_write_buffer_size()

    def __repr__(self) -> str:
        return f"<Answer {self.passage.request_id} {self.sent.status if self.sent else 'to come'}>"


def judge_by(status: int, permit: Permit) -> None:
    """4xx are the caller's; the engine's own 429 and 503 are back-pressure (C5, C12)."""
    is_neutral = 400 <= status < SERVER_ERROR or status == BACK_PRESSURE  # noqa: PLR2004
    permit.judge(fault=None if is_neutral else status >= SERVER_ERROR)


def begun_mark(piece: bytes) -> int:
    """How many last bytes may be the beginning of an engine's error, cut by the piece's end."""
    last_line = piece[piece.rfind(b"\n") + 1 :]
    return len(last_line) if any(mark.startswith(last_line) for mark in _MARKS) else 0

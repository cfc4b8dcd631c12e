"""The way of the bytes: a request to its worker's engine, the answer back to the client.

The answer's body passes unchanged, chunk framing included, from the engine's connection to the
client's: no task, future or buffer for what comes. Its head is held until the first piece of its
body is there, so an engine that dies before saying anything still becomes a proper status; after
that an error becomes the last event of the stream, or, inside an event, a connection closed
without its last chunk.
"""

import asyncio
import functools
import time
from collections.abc import Callable

from aiohttp import web

from hive.errors import BadGateway, GatewayTimeout, HiveError, ServiceUnavailable, WorkerCrashed
from hive.events import RequestExpired
from hive.gateway import upload
from hive.gateway.answer import Answer, NoAnswer
from hive.gateway.bodies import Body, Rest
from hive.gateway.traffic import Passage
from hive.policy.breaker import BreakerState
from hive.policy.deadlines import Phase
from hive.policy.framing import chunk
from hive.workers.admission import Permit
from hive.workers.life import EngineOver, Life
from hive.workers.wire import Wire

EXIT_S = 1.0  # how long a broken answer waits to learn whether the engine's process ended
# What an engine needs not know: hops, and the caller's credentials, end here.
_NOT_FORWARDED = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade host content-length expect authorization x-api-key cookie "
    b"x-request-id".split()
)

Observer = Callable[[bytes], None]


class Unanswered(Exception):
    """Nothing of an answer was sent, so the request may be sent again: to another worker, and
    where `may_repeat`, after a pause, to the same one. `error` is what to tell else."""

    def __init__(self, error: HiveError, *, may_repeat: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.may_repeat = may_repeat


class Relay:
    """Forwards requests to lives' engines; holds no state between requests."""

    async def forward(
        self,
        request: web.Request,
        body: Body,
        permit: Permit,
        passage: Passage,
        weight: int = 1,
        observe: Observer | None = None,
    ) -> web.StreamResponse:
        """Send the request on and the answer back; the permit is closed, or closes by itself.

        `observe` gets the first piece of a good answer. Raises HiveError or Unanswered while
        nothing was sent; returns what has been sent, else. Cancelling, or a limit that passes,
        closes the engine's connection at once.
        """
        answer = Answer(request, passage, permit, body, observe)
        if body.rest is None:
            permit.began(weight)
        cancelled: str | None = passage.request_id
        try:
            if body.rest is None:
                await self._exchange(request, body, answer)
            else:
                all_sent = functools.partial(permit.began, weight)
                await self._exchange_as_it_comes(request, body, body.rest, answer, all_sent)
        except Unanswered as exc:
            cancelled = None
            if answer.sent is None:
                if body.is_spent:
                    raise exc.error from exc
                raise
            error = exc.error
        except HiveError as exc:
            if answer.sent is None:
                raise
            error = exc
        else:
            assert answer.sent is not None
            return answer.sent
        finally:
            answer.close()
            permit.aborted(cancelled)  # does nothing where the answer is whole
        passage.code = error.code
        return await answer.fail(error)

    async def _exchange(self, request: web.Request, body: Body, answer: Answer) -> None:
        """Until the client has the whole answer. Raises Unanswered, or what ends the request."""
        permit, passage = answer.permit, answer.passage
        head = _head(request, len(body.data), passage.request_id)
        wire = permit.life.wires.take()
        while True:
            is_reused = wire is not None
            if wire is None:
                wire = await self._connected(permit, passage)
            answer.asks(wire, head)
            try:
                await self._answered(answer)
            except (NoAnswer, EngineOver) as exc:
                if is_reused and isinstance(exc, NoAnswer) and exc.is_silent:
                    wire = None  # it was closed just as it was used again: that says nothing
                    continue
                raise await _broken(exc, permit, passage) from exc
            except WorkerCrashed as exc:
                raise Unanswered(exc, may_repeat=False) from exc
            return

    async def _answered(self, answer: Answer) -> None:
        """Until the client has it. Raises NoAnswer, EngineOver, WorkerCrashed, or what ended it."""
        while await answer.is_suspicious():
            if crash := await _crash(answer.permit.life, answer.passage):
                raise crash
            answer.goes_on()

    async def _exchange_as_it_comes(
        self,
        request: web.Request,
        body: Body,
        rest: Rest,
        answer: Answer,
        all_sent: Callable[[], None],
    ) -> None:
        """As `_exchange`, of a large body that is not held: nothing of it is sent twice."""
        permit, passage = answer.permit, answer.passage
        # A connection of its own: on one that was used the engine's hanging up would be a failure.
        wire = await self._connected(permit, passage)
        length = request.content_length
        if length is None:
            body.data = chunk(body.data)
        answer.asks(wire, _head(request, length, passage.request_id))
        body.is_spent = True
        body.release()
        failure: Exception | None = None
        async with asyncio.TaskGroup() as tasks:
            pouring = tasks.create_task(
                upload.pour(rest, wire, answer, all_sent, is_chunked=length is None)
            )
            try:
                await self._answered(answer)
            except Exception as exc:  # noqa: BLE001 (a group would wrap it)
                failure = exc
            pouring.cancel()  # an engine may answer before it has everything
        if isinstance(failure, NoAnswer | EngineOver):
            raise await _broken(failure, permit, passage) from failure
        if isinstance(failure, WorkerCrashed):
            raise Unanswered(failure, may_repeat=False) from failure
        if failure is not None:
            raise failure

    async def _connected(self, permit: Permit, passage: Passage) -> Wire:
        """A new connection. Raises Unanswered where there is none in time."""
        life = permit.life
        assert passage.clock is not None
        connect_s = passage.clock.deadline.limits.connect_s
        try:
            async with passage.clock.running(), life.until_over():
                return await life.wires.connect(connect_s)
        except TimeoutError:
            _blame(permit, passage)
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
        except EngineOver as exc:
            raise await _broken(exc, permit, passage) from exc
        except OSError as exc:
            if life.pulse is not None:
                life.pulse.refused()
            refusal = NoAnswer("accepts no connection", is_silent=True)
            unanswered = await _broken(refusal, permit, passage)
            permit.finished()
            raise unanswered from exc


async def _broken(exc: NoAnswer | EngineOver, permit: Permit, passage: Passage) -> Unanswered:
    """What to tell of an answer that did not come, or not to its end."""
    error = await _crash(permit.life, passage)
    may_repeat = False
    if error is None:
        what = exc.what if isinstance(exc, NoAnswer) else "broke its answer off"
        error = BadGateway(f"The engine {what}.", worker=passage.worker, model=passage.model)
        may_repeat = isinstance(exc, NoAnswer) and exc.is_silent
    if isinstance(error, ServiceUnavailable):  # hive ended it
        permit.judge(fault=None)
    else:
        _blame(permit, passage)
    return Unanswered(error, may_repeat=may_repeat)


def _blame(permit: Permit, passage: Passage) -> None:
    """A fault of the worker; many attempts of one request are one (R006)."""
    worker = permit.worker.id
    is_new = worker not in passage.blamed
    passage.blamed.add(worker)
    is_closed = permit.door.breakers[worker].state is BreakerState.CLOSED
    permit.judge(fault=True if is_new or not is_closed else None)


async def _crash(life: Life, passage: Passage) -> HiveError | None:
    """The error to tell if the engine's process is ending; None if it lives on."""
    assert passage.clock is not None
    left_s = EXIT_S
    if passage.first_byte is None:
        left_s = min(EXIT_S, max(0.0, passage.clock.deadline.answer_by - time.monotonic()))
    exit_ = await life.over_within(left_s)
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


def _head(request: web.Request, length: int | None, request_id: str) -> bytes:
    """The request's head as the engine gets it; a body without a `length` in bytes is chunked."""
    lines = [_first_lines(request.method, _target(request))]
    dropped = _NOT_FORWARDED
    if "Connection" in request.headers:
        named = request.headers.getall("Connection")
        dropped |= {
            part.strip().lower().encode(errors="surrogateescape")
            for one in named
            for part in one.split(",")
        }
    lines += [
        b"%s: %s\r\n" % field for field in request.raw_headers if field[0].lower() not in dropped
    ]
    own = f"X-Request-Id: {request_id}\r\n"
    if length is None:
        own += "Transfer-Encoding: chunked\r\n"
    elif length or request.method == "POST":
        own += f"Content-Length: {length}\r\n"
    lines.append(f"{own}\r\n".encode())
    return b"".join(lines)


def _target(request: web.Request) -> str:
    """As it was sent: another reading of dots or escapes would be another path."""
    sent = request.raw_path
    if sent.startswith("/"):
        return sent.partition("#")[0]
    url = request.rel_url  # the absolute form, which proxies get
    query = f"?{url.raw_query_string}" if url.raw_query_string else ""
    return f"{url.raw_path}{query}"


@functools.lru_cache(1024)
def _first_lines(method: str, target: str) -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: engine\r\n".encode(errors="surrogateescape")

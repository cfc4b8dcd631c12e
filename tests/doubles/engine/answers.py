"""One inference request on its way: what was seen of it, and its answer, token by token."""

import os
import time
from dataclasses import InitVar, dataclass, field
from typing import Protocol

from tests.doubles.engine.asks import Json, encoded, error
from tests.doubles.engine.knobs import Knobs
from tests.doubles.engine.kv import Kv, Prompt
from tests.doubles.engine.scheduler import Generation, Scheduler
from tests.doubles.engine.shapes import Shape
from tests.doubles.engine.tokens import text_ids
from tests.doubles.engine.tracebacks import DEAD
from tests.doubles.engine.wire import JSON, Connection, Request, chunk, head

BODY_KEPT = 64 * 1024


class Desk(Protocol):
    """Where requests are taken in and reported back."""

    scheduler: Scheduler
    knobs: Knobs

    def faults(self, seen: "Seen") -> Knobs: ...

    def must_die(self, answer: "Answer") -> None: ...

    def ended(self, answer: "Answer") -> None: ...


@dataclass
class Seen:
    """One request, for tests to recount."""

    number: int
    request: InitVar[Request]
    wall: float = field(default_factory=time.time)
    first_byte: float | None = None
    finished: float | None = None
    finished_wall: float | None = None
    outcome: str = "open"  # finished, refused, aborted, failed
    status: int | None = None
    tokens: int = 0

    def __post_init__(self, request: Request) -> None:
        self.method, self.path, self.headers = request.method, request.path, request.headers
        self.started = request.started
        # Not the request itself: a thousand large bodies would be kept.
        self.body_bytes, self.body = len(request.body), request.body[:BODY_KEPT]

    def end(self, outcome: str, status: int | None, tokens: int = 0) -> None:
        self.finished, self.finished_wall = time.monotonic(), time.time()
        self.outcome, self.status, self.tokens = outcome, status, tokens

    def as_dict(self) -> Json:
        return {
            "number": self.number,
            "pid": os.getpid(),
            "method": self.method,
            "path": self.path,
            "headers": self.headers,
            "body_bytes": self.body_bytes,
            "body": self.body.decode(errors="replace"),
            "started": self.started,
            "started_wall": self.wall,
            "first_byte": self.first_byte,
            "finished": self.finished,
            "finished_wall": self.finished_wall,
            "outcome": self.outcome,
            "status": self.status,
            "tokens": self.tokens,
        }


class Answer:
    """One inference request's way out: its tokens, in its shape, to its client."""

    def __init__(self, desk: Desk, seen: Seen, shape: Shape, connection: Connection) -> None:
        ask = shape.ask
        self.shape = shape
        self.seen = seen
        self.streams = ask.stream
        self.reason = "stop" if ask.max_tokens is None else "length"
        self.generation = Generation(
            desk.scheduler,
            self,
            desk.faults(seen),
            prompt_tokens=ask.prompt_tokens,
            target=ask.max_tokens or max(desk.knobs.tokens, 1),
            parts=ask.parts,
            reason=self.reason,
        )
        self._desk = desk
        self._connection = connection
        self._head_is_out = False
        self._prompts: list[Prompt] = []
        self._is_computed = False
        connection.on_gone = self._gone
        connection.on_drained = self.generation.resume

    def look_up(self, kv: Kv, salt: str, ids: list[list[int]]) -> None:
        """Ask what of its prompts is cached; it waits for its turn when that is known."""
        scheduler, left = self._desk.scheduler, len(ids)
        self._prompts = [Prompt(kv, salt, one) for one in ids]

        def found() -> None:
            nonlocal left
            left -= 1
            # Of many prompts, vLLM tells of the last one.
            self.shape.ask.cached_tokens = self._prompts[-1].cached
            if not left and not self.generation.is_over:
                scheduler.submit(self.generation)

        scheduler.hold(self.generation)
        for prompt in self._prompts:
            prompt.look_up(found)

    def open(self) -> None:
        """vLLM sends the head of a stream before the request has a seat."""
        if not self._head_is_out:
            self._head_is_out = True
            self._connection.open_stream()

    def tokens(self, first: int, end: int) -> bool:
        if not self._is_computed:
            self._is_computed = True
            for prompt in self._prompts:
                prompt.computed()
        if self.streams:
            self._begin()
            if first < end:
                token, parts = self.shape.token, range(self.generation.parts)
                self._connection.send([token(part, k) for k in range(first, end) for part in parts])
        return not self._connection.is_full

    def finished(self) -> None:
        self._store()
        made = self.generation.generated
        if self.streams:
            self._connection.send(self.shape.closing(made, self.reason))
            self._end("finished", 200)
            self._connection.close_stream()
        else:
            self._end("finished", 200)
            self._connection.answer(200, encoded(self.shape.whole(made, self.reason)))

    def must_die(self) -> None:
        self._desk.must_die(self)

    def engine_died(self) -> None:
        self.generation.fail()
        self._end("failed", 200 if self._head_is_out else 500)
        if self._head_is_out:
            self._connection.send(self.shape.failing(500, DEAD))
            self._connection.close_stream()
        else:
            self._connection.answer(500, encoded(error(500, DEAD)))

    def cut(self) -> None:
        """Write the first half of what would come next."""
        done = self.generation.generated
        if self.streams:
            self._begin()
            next_ = chunk(self.shape.token(0, done))
        else:
            body = encoded(self.shape.whole(done, self.reason))
            next_ = head(200, JSON, {"content-length": str(len(body))}) + body
        self._connection.write(next_[: len(next_) // 2])

    def hang_up(self) -> None:
        self._connection.hang_up()

    def _begin(self) -> None:
        if self.seen.first_byte is None:
            self.seen.first_byte = time.monotonic()
            self.open()
            if opening := self.shape.opening():
                self._connection.send(opening)

    def _store(self) -> None:
        if self._is_computed:
            for part in range(self.generation.parts if self._prompts else 0):
                text = self.shape.text(part, self.generation.generated)
                self._prompts[part // self.shape.ask.n].ended(text_ids(text))

    def _gone(self) -> None:
        self._store()
        self.generation.abort()
        self._end("aborted", 200 if self._head_is_out else None)

    def _end(self, outcome: str, status: int | None) -> None:
        self.seen.end(outcome, status, self.generation.generated)
        self._desk.ended(self)

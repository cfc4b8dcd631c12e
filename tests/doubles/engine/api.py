"""The double's endpoints: vLLM's, and its own under /double for the tests."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tests.doubles.engine.answers import Answer, Seen
from tests.doubles.engine.asks import (
    Json,
    Refused,
    encoded,
    error,
    multipart,
    new_id,
    salt_of,
    words,
)
from tests.doubles.engine.knobs import DIE_HOWS, Knobs
from tests.doubles.engine.kv import Kv
from tests.doubles.engine.once import Embeddings, Pooling, Rerank, Score, Transcription
from tests.doubles.engine.responses import Responses
from tests.doubles.engine.scheduler import Scheduler
from tests.doubles.engine.shapes import Chat, Completion, Messages, Shape
from tests.doubles.engine.tracebacks import DEAD
from tests.doubles.engine.tree import log, say
from tests.doubles.engine.wire import JSON, LAST_CHUNK, SSE, Connection, Request, chunk, head

SEEN = 1000
TEXT = "text/plain; charset=utf-8"
NO_FAULTS = Knobs()
INFERENCE: dict[str, type[Shape]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completion,
    "/v1/responses": Responses,
    "/v1/messages": Messages,
    "/v1/embeddings": Embeddings,
    "/v1/audio/transcriptions": Transcription,
    "/pooling": Pooling,
    "/score": Score,
    "/v1/score": Score,
    "/rerank": Rerank,
    "/v1/rerank": Rerank,
    "/v2/rerank": Rerank,
}


RENDER = "/render"
# What a body of other types than vLLM's models have comes to here; they refuse it with 400.
WRONG_TYPES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Host(Protocol):
    """The process around the endpoints."""

    def die(self, how: str, answers: list[Answer]) -> None:
        """Die in that way; hanging up is for these answers alone."""

    def knobs_turned(self, names: set[str]) -> None: ...

    def state(self) -> Json: ...


class Api:
    """Hands every request to its endpoint."""

    def __init__(self, knobs: Knobs, scheduler: Scheduler, host: Host) -> None:
        self.knobs = knobs
        self.scheduler = scheduler
        self.host = host
        self.kv = Kv(knobs, scheduler.loop) if knobs.kv else None
        self.answers: dict[Answer, None] = {}
        self.responses: dict[str, Json] = {}
        self.is_dead = False  # EngineCore is
        self.healthy_from = math.inf
        self.seen: deque[Seen] = deque(maxlen=SEEN)
        self.counts: dict[str, int] = {}
        self._inference_requests = 0
        self._leaked: list[int] = []
        self._adapters: dict[str, str] = {}
        self._created = int(time.time())
        self._journal: int | None = None
        if knobs.journal:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._journal = os.open(knobs.journal, flags, 0o600)
        self._routes: dict[tuple[str, str], Callable[[Request, Connection], None]] = {
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/version"): lambda _, c: _reply(c, {"version": "0.32.0+double"}),
            ("GET", "/load"): lambda _, c: _reply(c, {"server_load": 0}),
            ("GET", "/v1/models"): self._models,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("POST", "/v1/chat/completions/render"): self._render,
            ("POST", "/v1/completions/render"): self._render,
            ("POST", "/v1/messages/render"): self._render,
            ("POST", "/v1/load_lora_adapter"): self._load_adapter,
            ("POST", "/v1/unload_lora_adapter"): self._unload_adapter,
            ("GET", "/double/requests"): self._requests,
            ("GET", "/double/state"): lambda _, c: _reply(c, self.host.state()),
            ("GET", "/double/knobs"): lambda _, c: _reply(c, self.knobs.as_dict()),
            ("POST", "/double/knobs"): self._turn,
            ("POST", "/double/die"): self._die,
        }

    # Requests in

    def head_came(self, request: Request, connection: Connection) -> None:
        spared = self._inference_requests < self.knobs.good_requests
        if not self.knobs.early_answer or spared:
            return
        if request.method == "POST" and request.path in INFERENCE:
            self._refused(self._see(request), 413)
            if self.knobs.early_answer == "close":
                request.headers["connection"] = "close"
            connection.answer(413, encoded(error(413, "Request Entity Too Large")))

    def request_came(self, request: Request, connection: Connection) -> None:
        request.path, _, _ = request.path.partition("?")
        count = f"{request.method} {request.path}"
        self.counts[count] = self.counts.get(count, 0) + 1
        try:
            if request.method == "POST" and request.path in INFERENCE:
                self._infer(request, connection)
            elif (request.method, request.path) in self._routes:
                self._listed(request)
                self._routes[request.method, request.path](request, connection)
            elif request.path.startswith("/v1/responses/"):
                self._listed(request)
                self._stored(request, connection)
            else:
                self._listed(request)
                known = any(path == request.path for _, path in self._routes)
                known = known or request.path in INFERENCE
                status, told = (405, "Method Not Allowed") if known else (404, "Not Found")
                _reply(connection, {"detail": told}, status)
        except Refused as refused:
            _reply(connection, refused.body, refused.status)
        except WRONG_TYPES as exc:
            _reply(connection, error(400, f"1 validation error: {type(exc).__name__}"), 400)

    def faults(self, seen: Seen) -> Knobs:
        return self.knobs if seen.number > self.knobs.good_requests else NO_FAULTS

    def must_die(self, answer: Answer) -> None:
        self.host.die(self.knobs.die_how, [answer])

    def ended(self, answer: Answer) -> None:
        self.answers.pop(answer, None)
        made, shape = answer.generation.generated, answer.shape
        if isinstance(shape, Responses) and answer.seen.outcome == "finished":
            self.responses[shape.id] = shape.whole(made, answer.reason)
            if len(self.responses) > SEEN:
                del self.responses[next(iter(self.responses))]
        self.write_down("request", answer.seen.as_dict)

    def engine_died(self) -> None:
        self.is_dead = True
        for answer in list(self.answers):
            answer.engine_died()

    def write_down(self, what: str, facts: Callable[[], Json]) -> None:
        if self._journal is not None:
            os.write(self._journal, encoded({"what": what, **facts()}) + b"\n")

    def _see(self, request: Request) -> Seen:
        self._inference_requests += 1
        seen = Seen(self._inference_requests, request)
        self.seen.append(seen)
        return seen

    def _listed(self, request: Request) -> None:
        """List what is neither inference nor a poll."""
        if request.path not in ("/health", "/metrics") and not request.path.startswith("/double/"):
            seen = Seen(0, request)
            seen.end("finished", None)
            self.seen.append(seen)

    # Inference

    def _infer(self, request: Request, connection: Connection) -> None:
        seen = self._see(request)
        faults = self.faults(seen)
        if faults.fd_leak:
            self._leaked.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        if faults.cuda_error is not None and seen.number > faults.cuda_error:
            self.host.die("cuda", [])
        if faults.hang_up:
            self.knobs.hang_up -= 1
            self._refused(seen, None)
            connection.hang_up()
            return
        if faults.malformed:
            self._refused(seen, None)
            connection.write(_malformed(faults.malformed))
            connection.hang_up()
            return
        if faults.answer_status:
            code, _, retry_after = faults.answer_status.partition(":")
            self._refused(seen, int(code))
            headers = {"retry-after": retry_after} if retry_after else None
            body = encoded(error(int(code), "The engine double was told to answer so."))
            connection.answer(int(code), body, headers=headers)
            return
        try:
            shape = self._shape(request)
        except Refused as refused:
            self._refused(seen, refused.status)
            raise
        if self.knobs.log_prompts:
            told = f"Received request {shape.id}: prompt: {shape.ask.prompts!r}"
            say(1, log("APIServer", "INFO", told))
        answer = Answer(self, seen, shape, connection)
        self.answers[answer] = None
        if answer.streams and not faults.silent:
            answer.open()
        ids = shape.ids(shape.ask.body) if self.kv is not None else None
        if self.kv is not None and ids is not None:
            answer.look_up(self.kv, salt_of(shape.ask.body), ids)
        else:
            self.scheduler.submit(answer.generation)

    def _refused(self, seen: Seen, status: int | None) -> None:
        seen.end("refused", status)
        self.write_down("request", seen.as_dict)

    def _shape(self, request: Request) -> Shape:
        if self.is_dead:
            raise Refused(500, DEAD)
        try:
            return self._shape_of(request)
        except WRONG_TYPES as exc:
            raise Refused(400, f"1 validation error: {type(exc).__name__}") from exc

    def _shape_of(self, request: Request) -> Shape:
        kind = INFERENCE[request.path.removesuffix(RENDER)]
        body = (_form if kind is Transcription else _json)(request)
        salt_of(body)
        ask = kind.read(body)
        if self.kv is not None and (ids := kind.ids(body)) is not None:
            ask.prompt_tokens = max(sum(map(len, ids)), 1)
        names = (self.knobs.model, *self._adapters)
        if self.knobs.model and ask.model not in ("", *names):
            raise Refused(404, f"The model `{ask.model}` does not exist.", "model")
        limit, wanted = self.knobs.max_model_len, ask.prompt_tokens + (ask.max_tokens or 0)
        if limit and wanted > limit:
            raise Refused(
                400,
                f"This model's maximum context length is {limit} tokens. However, your request"
                f" has {ask.prompt_tokens} input tokens and asks for {ask.max_tokens} output tokens.",
                "input_tokens",
            )
        return kind(ask, ask.model or self.knobs.model or "double", self.knobs.event_bytes)

    def _stored(self, request: Request, connection: Connection) -> None:
        id_, _, action = request.path.removeprefix("/v1/responses/").partition("/")
        if id_ not in self.responses:
            raise Refused(404, f"Response with id '{id_}' not found.")
        if request.method == "DELETE":
            del self.responses[id_]
            _reply(connection, {"id": id_, "object": "response", "deleted": True})
        elif request.method == "POST" and action == "cancel":
            raise Refused(400, "Cannot cancel a synchronous response.")
        else:
            _reply(connection, self.responses[id_])

    # The rest of vLLM

    def _render(self, request: Request, connection: Connection) -> None:
        """What would be generated from: every prompt as vLLM's GenerateRequest."""
        shape = self._shape(request)
        body, prompts = shape.ask.body, shape.ids(shape.ask.body) or []
        base = request.headers.get("x-request-id", new_id(""))
        prefix = "cmpl-" if isinstance(shape, Completion) else "chatcmpl-"
        made = []
        for index, ids in enumerate(prompts):
            if not ids:
                raise Refused(400, "No token_ids rendered")
            room = max((self.knobs.max_model_len or 16384) - len(ids), 0)
            made.append(
                {
                    "request_id": prefix + base + (f"-{index}" if len(prompts) > 1 else ""),
                    "token_ids": ids,
                    "token_offsets": None,
                    "features": None,
                    "content_parts": None,
                    # Those at their defaults are left out; output_kind: deltas, or the end alone.
                    "sampling_params": {
                        "max_tokens": min(shape.ask.max_tokens or room, room),
                        "output_kind": 1 if shape.ask.stream else 2,
                        "skip_clone": True,
                    },
                    "model": body.get("model"),
                    "reasoning_ended": None,
                    "reasoning_parser_kwargs": None,
                    "return_token_ids": None,
                    "output_mode": "tokens",
                    "stream": shape.ask.stream,
                    "stream_options": body.get("stream_options") if shape.ask.stream else None,
                    "cache_salt": body.get("cache_salt"),
                    "priority": body.get("priority", 0),
                    "kv_transfer_params": None,
                    "ec_transfer_params": None,
                }
            )
        _reply(connection, made if isinstance(shape, Completion) else made[0])

    def _health(self, request: Request, connection: Connection) -> None:  # noqa: ARG002
        ready = time.monotonic() >= self.healthy_from and not self.is_dead
        status, wait_s = (self.knobs.health_status if ready else 503), self.knobs.health_s
        if wait_s == 0:
            connection.answer(status)
        elif not math.isinf(wait_s):
            later = self.scheduler.loop.call_later(wait_s, connection.answer, status)
            connection.on_gone = later.cancel

    def _metrics(self, request: Request, connection: Connection) -> None:  # noqa: ARG002
        status, wait_s = self.knobs.metrics_status, self.knobs.metrics_s

        def answer() -> None:
            body = self.scheduler.metrics().encode() if status == 200 else b""
            connection.answer(status, body, "text/plain; version=1.0.0; charset=utf-8")

        if wait_s == 0:
            answer()
        elif not math.isinf(wait_s):
            later = self.scheduler.loop.call_later(wait_s, answer)
            connection.on_gone = later.cancel

    def _models(self, request: Request, connection: Connection) -> None:  # noqa: ARG002
        name = self.knobs.model or "double"
        limit = self.knobs.max_model_len or 16384
        more: Json = {"object": "model", "created": self._created, "owned_by": "vllm"}
        models = [{"id": name, **more, "root": name, "parent": None, "max_model_len": limit}]
        for adapter, path in self._adapters.items():
            models.append({"id": adapter, **more, "root": path, "parent": name})
        _reply(connection, {"object": "list", "data": models})

    def _tokenize(self, request: Request, connection: Connection) -> None:
        body = _json(request)
        tokens = list(words(body.get("prompt", body.get("messages"))).encode())
        limit = self.knobs.max_model_len or 16384
        made = {"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": None}
        _reply(connection, made)

    def _detokenize(self, request: Request, connection: Connection) -> None:
        try:
            prompt = bytes(_json(request)["tokens"]).decode(errors="replace")
        except (KeyError, TypeError, ValueError) as exc:
            raise Refused(400, f"tokens: {exc}", "tokens") from exc
        _reply(connection, {"prompt": prompt})

    def _load_adapter(self, request: Request, connection: Connection) -> None:
        body = _json(request)
        name, path = body.get("lora_name"), body.get("lora_path")
        if not name or not path:
            raise Refused(400, "Both 'lora_name' and 'lora_path' must be provided.")
        self._adapters[name] = path
        connection.answer(200, f"Success: LoRA adapter '{name}' added successfully.".encode(), TEXT)

    def _unload_adapter(self, request: Request, connection: Connection) -> None:
        name = _json(request).get("lora_name")
        if self._adapters.pop(name or "", None) is None:
            raise Refused(404, f"The lora adapter '{name}' cannot be found.")
        told = f"Success: LoRA adapter '{name}' removed successfully."
        connection.answer(200, told.encode(), TEXT)

    # For the tests

    def _requests(self, request: Request, connection: Connection) -> None:  # noqa: ARG002
        connection.answer(200, encoded([seen.as_dict() for seen in self.seen]))

    def _turn(self, request: Request, connection: Connection) -> None:
        changes = _json(request)
        try:
            self.knobs.set(changes)
        except ValueError as exc:
            raise Refused(400, str(exc)) from exc
        self.host.knobs_turned(set(changes))
        _reply(connection, self.knobs.as_dict())

    def _die(self, request: Request, connection: Connection) -> None:
        how = _json(request).get("how", self.knobs.die_how)
        if how not in DIE_HOWS:
            raise Refused(400, f"how: one of {', '.join(DIE_HOWS)}")
        _reply(connection, {"how": how}, 202)
        self.host.die(how, list(self.answers))


def _form(request: Request) -> Json:
    return multipart(request.body, request.headers.get("content-type", ""))


def _json(request: Request) -> Json:
    try:
        body = json.loads(request.body)
    except ValueError as exc:
        raise Refused(400, f"JSON decode error: {exc}") from exc
    if not isinstance(body, dict):
        raise Refused(400, "Input should be a valid dictionary")
    return body


def _reply(connection: Connection, body: object, status: int = 200) -> None:
    connection.answer(status, encoded(body))


def _malformed(kind: str) -> bytes:
    if kind == "status-line":
        return b"HTTP/one point one 2OO Fine\r\ncontent-length: 0\r\n\r\n"
    if kind == "chunk-size":
        event = chunk(b'data: {"choices":[]}\n\n')
        return head(200, SSE, {"transfer-encoding": "chunked"}) + event + b"zz\r\n" + event
    short = b'{"choices":[]'
    return head(200, JSON, {"content-length": str(len(short) + 1000)}) + short + LAST_CHUNK

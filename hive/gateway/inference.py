"""Inference: the model that a request names, a slot of a worker of it, and the relay."""

import contextlib
import functools
import logging
import re
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from aiohttp import web

from hive.errors import (
    InferenceTimeout,
    NotFound,
    RequestTimeout,
    SessionNotFound,
    ValidationFailed,
)
from hive.events import Announcer, RequestAdmitted, RequestExpired
from hive.gateway import wishes
from hive.gateway.answer import ClientLeft
from hive.gateway.auth import Caller, taken
from hive.gateway.bodies import Asked, Body, Intake, asked_in
from hive.gateway.clock import Clock
from hive.gateway.relay import Relay, Unanswered
from hive.gateway.retrying import Retries
from hive.gateway.traffic import Passage
from hive.policy import conversations
from hive.policy.admission import Ticket
from hive.policy.deadlines import Deadline, Due, Limits, Phase
from hive.settings import Settings
from hive.workers.admission import Door, Permit
from hive.workers.fleet import Fleet

if TYPE_CHECKING:
    from hive.windows.sessions import Sessions, Visit

log = logging.getLogger(__name__)

PATHS = ("/tokenize", "/detokenize", "/rerank", "/score", "/pooling")
_RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,128})"')
_REMEMBERED = 10_000  # responses whose worker is known


class Inference:
    """Handlers of the OpenAI surface; everything that is not routing is the engine's."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        announcer: Announcer,
        sessions: "Sessions | None" = None,
    ) -> None:
        """`sessions` there are only where a model has windows."""
        self._sessions = sessions
        self._settings = settings
        self._fleet = fleet
        self._announcer = announcer
        self._intake = Intake(settings.server)
        self._relay = Relay()
        self._limits = _limits_of(settings)
        # Of a response's id, who made it and for which key.
        self._makers: OrderedDict[str, tuple[str, str | None]] = OrderedDict()

    def apply(self, settings: Settings) -> None:
        """These limits for requests that begin from now on."""
        self._settings, self._limits = settings, _limits_of(settings)
        self._intake.apply(settings.server)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self.models, allow_head=False),
            web.get("/v1/models/{model:.+}", self.model, allow_head=False),
            *(
                web.route(method, path, self.stored_response)
                for method in ("GET", "POST", "DELETE")
                for path in ("/v1/responses/{id}", "/v1/responses/{id}/{rest:.+}")
            ),
            web.post("/v1/{rest:.+}", self.infer),
            *(web.post(path, self.infer) for path in PATHS),
        ]

    @staticmethod
    def takes(request: web.BaseRequest) -> bool:
        """Whether `infer` is its handler; as the routes say, but in less time than they need."""
        path = request.raw_path
        if request.method != "POST" or "Expect" in request.headers:
            return False
        if path.startswith("/v1/"):
            return not path.startswith("/v1/responses/") and len(path) > len("/v1/")
        return path in PATHS

    async def stored_response(self, request: web.Request) -> web.StreamResponse:
        """To the worker that made the response, which alone can know it; for who asked for it."""
        caller: Caller = request["caller"]
        worker_id, owner = self._makers.get(request.match_info["id"], (None, None))
        if worker_id is None or owner != caller.name:
            raise NotFound(
                "No such response is known here.",
                action="A stored response lives in the engine that made it, until it restarts.",
            )
        return await self.infer(request, worker_id)

    async def infer(self, request: web.Request, pinned: str | None = None) -> web.StreamResponse:
        """To a worker of the model that the body names, when one has a slot.

        Or to `pinned`. Where nothing was answered yet it is perhaps sent again (C1-C4).
        """
        raw_path = request.raw_path
        if "%" in raw_path and "%" in raw_path.partition("?")[0]:
            # The engine would decode it, and find another endpoint than the one that was judged.
            raise NotFound("There is nothing at this path.")
        passage: Passage = request["passage"]
        quota = taken(request["caller"])
        try:
            own_s = wishes.own_limit_s(request.headers, passage.began)
            visit: Visit | None = None
            body = await self._intake.receive(request, passage, own_s, is_known=pinned is not None)
            try:
                passage.bytes_in = len(body.data)
                if pinned is None:
                    asked = self._asked(request, body.data)
                else:
                    asked = Asked(self._fleet.worker(pinned).model, weight=0)
                door = self._fleet.door(asked.model)
                passage.model = asked.model  # only configured names become a label
                if body.rest is not None and not door.takes_upload():
                    await self._intake.hold(body, passage)
                    passage.bytes_in = len(body.data)
                ticket = self._ticket(request, pinned)
                if ticket.session is not None:
                    visit = await self._visit(request, ticket.session, asked.model, body)
                clock = passage.clock = self._clock(passage, asked, door, own_s)
                attempt = functools.partial(
                    self._attempt, request, body, asked, door, passage, clock
                )
                with door.uploading() if body.rest else contextlib.nullcontext():
                    try:
                        return await attempt(ticket)
                    except Unanswered as first:
                        failure = first
                        retries = Retries(self._announcer, passage, door, ticket, clock)
                    return await retries.after(failure, attempt)
            finally:
                body.end()
                if visit is not None:
                    visit.leave()
        finally:
            quota.give_back()

    async def _visit(
        self, request: web.Request, session_id: str, model: str, body: Body
    ) -> "Visit":
        """The session that a request belongs to: its salt goes into the body, its answer is heard.

        Raises SessionNotFound, SessionNotActive, InvalidParameter; the visit must be left.
        """
        if self._sessions is None:
            raise SessionNotFound(f"Session not found: {session_id}")
        caller: Caller = request["caller"]
        passage: Passage = request["passage"]
        kind = conversations.kind_of(request.path)
        data = body.data
        visit = await self._sessions.enter(session_id, caller.name or "", model, kind, data)
        try:
            salted = conversations.salted(data, visit.session.salt, kind)
            body.grows(len(salted) - len(data))
            body.data = salted
        except BaseException:
            visit.leave()
            raise
        passage.witness = visit
        return visit

    def _ticket(self, request: web.Request, pinned: str | None) -> Ticket:
        caller: Caller = request["caller"]
        return Ticket(
            wishes.priority(request.headers, caller.priority, caller.highest),
            pinned=pinned,
            session=wishes.session(request.headers),
        )

    async def _attempt(
        self,
        request: web.Request,
        body: Body,
        asked: Asked,
        door: Door,
        passage: Passage,
        clock: Clock,
        ticket: Ticket,
    ) -> web.StreamResponse:
        clock.check()
        permit = door.enter(ticket) or await self._waited_for(door, ticket, clock)
        clock.got_slot()
        worker = passage.worker = permit.worker.id
        queue_s = ticket.granted - ticket.arrived
        self._announcer.announce(RequestAdmitted(passage.request_id, door.model, worker, queue_s))
        remember = None
        if passage.path == "/v1/responses":
            remember = functools.partial(self._remember, (worker, passage.key))
        return await self._relay.forward(request, body, permit, passage, asked.weight, remember)

    def _clock(self, passage: Passage, asked: Asked, door: Door, own_s: float | None) -> Clock:
        limits = self._limits[door.model]
        if own_s is not None and own_s > limits.request_s:
            log.warning("a caller may shorten its deadline of %g s only", limits.request_s)
        deadline = Deadline(limits, passage.began, asked.is_stream, own_s)

        def expired(due: Due) -> Exception | None:
            if due.phase is Phase.STALL and passage.has_read and passage.has_read():
                return None  # slowly, but it reads
            if passage.is_uploading and due.phase in (Phase.FIRST_TOKEN, Phase.INFERENCE):
                if time.monotonic() < deadline.answer_by:
                    clock.got_slot()  # the engine waits for the client
                    return None
                due = Due(due.at, Phase.REQUEST, deadline.answer_by - deadline.arrived)
            error = self._error_of(due, deadline, passage, door)
            self._announcer.announce(RequestExpired(passage.request_id, door.model, due.phase))
            return error

        clock = Clock(deadline, expired)
        if passage.cause is not None:
            clock.cancel(passage.cause)
        return clock

    def _error_of(self, due: Due, deadline: Deadline, passage: Passage, door: Door) -> Exception:
        """C13: what took too long, how long it may take, and how long it took."""
        now = time.monotonic()
        since = deadline.slot_at or deadline.arrived
        match due.phase:
            case Phase.QUEUE:
                return door.queue_timeout(due.limit_s)
            case Phase.REQUEST:
                late = f"No answer had begun {due.limit_s:g} s after the request's arrival."
                return RequestTimeout(
                    late if due.limit_s else "The request's deadline had passed at its arrival.",
                    phase=due.phase,
                    timeout_seconds=due.limit_s,
                    elapsed_seconds=round(now - deadline.arrived, 3),
                    model=door.model,
                    worker=passage.worker,
                )
            case Phase.STALL if passage.has_read is not None:
                return ClientLeft(f"the client read nothing for {due.limit_s:g} s")
            case Phase.STALL:
                since, what = deadline.last_byte_at, "sent nothing more for"
            case Phase.TOTAL:
                what = "had not ended its stream after"
            case _:
                what = "had not answered after"
        return InferenceTimeout(
            f"The engine {what} {due.limit_s:g} s.",
            phase=due.phase,
            timeout_seconds=due.limit_s,
            elapsed_seconds=round(now - since, 3),
            model=door.model,
            worker=passage.worker,
        )

    async def _waited_for(self, door: Door, ticket: Ticket, clock: Clock) -> Permit:
        permit = None
        try:
            async with clock.running():
                permit = await door.wait(ticket)
        except BaseException:
            if permit is not None:  # its limit passed just then
                permit.finished()
            door.leave(ticket)  # or before it began to wait
            raise
        return permit

    def _asked(self, request: web.Request, body: bytes) -> Asked:
        if request.path.endswith("load_lora_adapter") and len(self._settings.models) == 1:
            # Its body names an adapter, not a model.
            return Asked(next(iter(self._settings.models)))
        try:
            return asked_in(body, request.headers.get("Content-Type", ""), request.path)
        except ValidationFailed as exc:
            if exc.param == "model":
                exc.details = {**exc.details, "allowed": sorted(self._settings.models)}
            raise

    def _remember(self, made: tuple[str, str | None], first: bytes) -> None:
        if found := _RESPONSE_ID.search(first[:4096]):
            self._makers[found[1].decode()] = made
            while len(self._makers) > _REMEMBERED:
                self._makers.popitem(last=False)

    async def models(self, _request: web.Request) -> web.Response:
        """Every configured model, whether it can serve now or not."""
        data = [self._model_card(name) for name in self._settings.models]
        return web.json_response({"object": "list", "data": data})

    async def model(self, request: web.Request) -> web.Response:
        """One configured model, and the states of its workers."""
        name = request.match_info["model"]
        self._fleet.of_model(name)
        return web.json_response(self._model_card(name))

    def _model_card(self, name: str) -> dict[str, object]:
        states = [str(worker.state) for worker in self._fleet.of_model(name)]
        return {
            "id": name,
            "object": "model",
            "created": self._fleet.made_at,
            "owned_by": "hive",
            "states": states,
        }


def _limits_of(settings: Settings) -> dict[str, Limits]:
    """Of each model."""
    fields = Limits.__dataclass_fields__
    return {
        name: Limits(**{field: getattr(settings.timeouts_of(model), field) for field in fields})
        for name, model in settings.models.items()
    }

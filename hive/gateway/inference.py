"""Inference: find the model that a request names, lease its worker, relay."""

import re
from collections import OrderedDict

from aiohttp import web

from hive.errors import NotFound, ValidationFailed
from hive.events import Announcer, RequestArrived
from hive.gateway.bodies import Intake, model_in
from hive.gateway.relay import Relay
from hive.gateway.traffic import Passage
from hive.settings import Settings
from hive.workers.fleet import Fleet
from hive.workers.worker import Worker

PATHS = ("/tokenize", "/detokenize", "/rerank", "/score", "/pooling")
_RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,128})"')
_REMEMBERED = 10_000  # responses whose worker is known


class Inference:
    """Handlers of the OpenAI surface; everything that is not routing is the engine's."""

    def __init__(self, settings: Settings, fleet: Fleet, announcer: Announcer) -> None:
        self._settings = settings
        self._fleet = fleet
        self._announcer = announcer
        self._intake = Intake(settings.server)
        self._relay = Relay()
        self._makers: OrderedDict[str, str] = OrderedDict()  # response id -> worker id

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

    async def infer(self, request: web.Request) -> web.StreamResponse:
        """To a READY worker of the model that the body names."""
        passage: Passage = request["passage"]
        async with self._intake.receive(request) as body:
            passage.bytes_in = len(body)
            name = self._model_of(request, body)
            self._fleet.of_model(name)  # only configured names become a label
            passage.model = name
            worker = self._fleet.choose(name)
            return await self._ask(request, body, worker, passage)

    async def stored_response(self, request: web.Request) -> web.StreamResponse:
        """To the worker that made the response, which alone can know it."""
        passage: Passage = request["passage"]
        worker_id = self._makers.get(request.match_info["id"])
        if worker_id is None:
            raise NotFound(
                "No such response is known here.",
                action="A stored response lives in the engine that made it, until it restarts.",
            )
        async with self._intake.receive(request) as body:
            passage.bytes_in = len(body)
            worker = self._fleet.worker(worker_id)
            passage.model = worker.model
            return await self._ask(request, body, self._fleet.must_be_ready(worker), passage)

    async def _ask(
        self, request: web.Request, body: bytes, worker: Worker, passage: Passage
    ) -> web.StreamResponse:
        with worker.lease() as life:
            passage.worker = worker.id
            self._announcer.announce(RequestArrived(passage.request_id, worker.model, passage.path))
            remember = None
            if request.path == "/v1/responses":
                remember = lambda first: self._remember(first, worker.id)  # noqa: E731
            connect_s = worker.plan.timeouts.connect_s
            return await self._relay.forward(request, body, life, passage, connect_s, remember)

    def _model_of(self, request: web.Request, body: bytes) -> str:
        if request.path.endswith("load_lora_adapter") and len(self._settings.models) == 1:
            return next(iter(self._settings.models))  # its body names an adapter, not a model
        try:
            return model_in(body, request.headers.get("Content-Type", ""))
        except ValidationFailed as exc:
            if exc.param == "model":
                exc.details = {**exc.details, "allowed": sorted(self._settings.models)}
            raise

    def _remember(self, first: bytes, worker_id: str) -> None:
        if found := _RESPONSE_ID.search(first[:4096]):
            self._makers[found[1].decode()] = worker_id
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

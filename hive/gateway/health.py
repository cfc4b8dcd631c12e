"""How hive and each of its parts is, asked at this moment: engines, LMCache, the catalogue (R121-R123)."""

import asyncio
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from hive.devices.watch import Condition, Devices
from hive.errors import (
    EngineUnreachable,
    HiveError,
    InvalidParameter,
    KvServerUnreachable,
    ModelNotFound,
)
from hive.gateway import shapes
from hive.gateway.openapi import described
from hive.gateway.queries import OfModel
from hive.policy.lifecycle import State
from hive.workers.fleet import Fleet
from hive.workers.ledger import Ledger
from hive.workers.worker import Worker

if TYPE_CHECKING:
    from hive.windows.keeping import Keeping


class Health:
    """Handlers of /hive/v1/health; nothing is remembered, everything is asked."""

    def __init__(
        self, fleet: Fleet, devices: Devices, ledger: Ledger, keeping: "Keeping | None"
    ) -> None:
        self._fleet, self._devices, self._ledger = fleet, devices, ledger
        self._keeping = keeping

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/hive/v1/health", self.health, allow_head=False),
            web.get("/hive/v1/health/engine", self.engine, allow_head=False),
            web.get("/hive/v1/health/lmcache", self.lmcache, allow_head=False),
        ]

    @described({200: shapes.Health})
    async def health(self, _request: web.Request) -> web.Response:
        """Every component with what was found: status ok, degraded (something is wrong), or down."""
        asked: dict[str, Awaitable[dict[str, Any]]] = {
            f"engine {worker.id}": _told(self._ask_engine(worker))
            for worker in self._fleet.workers.values()
        }
        if self._keeping is not None:
            asked["lmcache"] = _told(self._keeping.engines.is_cache_well())
            asked["catalogue"] = _told(_timed(self._keeping.windows.count()))
        found = dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))
        for watched in self._devices.watched.values():
            is_ok = watched.condition is Condition.OK
            found[f"device {watched.device.id}"] = {"ok": is_ok, "found": str(watched.condition)}
        if leaks := len(self._ledger.leaks):
            found["leaks"] = {"ok": False, "found": f"{leaks} not given back"}
        is_well = all(one["ok"] for one in found.values())
        status = "ok" if is_well else "degraded" if self._fleet.can_serve else "down"
        return web.json_response({"status": status, "components": found})

    @described(
        {200: shapes.EnginesHealth}, query=OfModel, errors=[ModelNotFound, EngineUnreachable]
    )
    async def engine(self, request: web.Request) -> web.Response:
        """Ask the engines alone (?model=): 200 when each answers, else CWM-5001."""
        model = request.query.get("model")
        workers = self._fleet.of_model(model) if model else list(self._fleet.workers.values())
        found = [await self._ask_engine(worker) for worker in workers]
        answers = {worker.id: round(s, 4) for worker, s in zip(workers, found, strict=True)}
        return web.json_response({"status": "ok", "seconds": answers})

    @described({200: shapes.CacheHealth}, errors=[InvalidParameter, KvServerUnreachable])
    async def lmcache(self, _request: web.Request) -> web.Response:
        """Ask LMCache alone: 200 when it answers, else CWM-5002."""
        if self._keeping is None:
            raise InvalidParameter(
                "Invalid parameter: lmcache. No model is served with windows = true.",
                action="Set windows = true for a model to have LMCache beside it.",
            )
        seconds = await self._keeping.engines.is_cache_well()
        return web.json_response({"status": "ok", "seconds": round(seconds, 4)})

    async def _ask_engine(self, worker: Worker) -> float:
        """Seconds until it answered its health check. Raises EngineUnreachable."""
        life = worker.life
        if worker.state is not State.READY or life is None:
            raise EngineUnreachable(
                f"Cannot connect to inference server: worker {worker.id} is {worker.state}.",
                worker=worker.id,
            )
        began = time.monotonic()
        if not await life.client.is_healthy(worker.plan.engine.health_path):
            raise EngineUnreachable(
                f"Cannot connect to inference server: worker {worker.id} does not answer.",
                worker=worker.id,
            )
        return time.monotonic() - began


async def _timed(work: Awaitable[object]) -> float:
    began = time.monotonic()
    await work
    return time.monotonic() - began


async def _told(work: Awaitable[float]) -> dict[str, Any]:
    """What it came to, for one component of many."""
    try:
        return {"ok": True, "seconds": round(await work, 4)}
    except HiveError as exc:
        return {"ok": False, "code": exc.code, "found": exc.message}

"""What is wrong now, and whether whoever is on call was told: escalations and the outbox."""

from typing import Any, Protocol

from aiohttp import web

from hive.gateway import shapes
from hive.gateway.openapi import described


class Told(Protocol):
    """What telemetry knows; the gateway does not see it otherwise."""

    @property
    def service_level(self) -> str:
        """full, degraded, critical or down (R263)."""

    async def view(self) -> dict[str, Any]:
        """What is open, and the outbox: shapes.Alerts."""


class AlertsApi:
    """The handler of /hive/v1/alerts."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/hive/v1/alerts", self.alerts)]

    @described({200: shapes.Alerts})
    async def alerts(self, _request: web.Request) -> web.Response:
        """What escalated and is not over, and which messages to the webhook wait, and why."""
        return web.json_response(await self._told.view())

"""POST /hive/v1/reload: the settings, read again."""

from collections.abc import Awaitable, Callable
from typing import TypedDict

from aiohttp import web

from hive.errors import ConfigInvalid, Conflict, ReloadRefused
from hive.gateway.openapi import described

Reload = Callable[[str], Awaitable[list[str]]]


class Reloaded(TypedDict):
    changed: list[str]


class ReloadApi:
    """The handler; what it does is hive/reload.py."""

    def __init__(self, reload: Reload) -> None:
        self._reload = reload

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/hive/v1/reload", self.reload)]

    @described({200: Reloaded}, errors=[ConfigInvalid, ReloadRefused, Conflict])
    async def reload(self, _request: web.Request) -> web.Response:
        """As SIGHUP: read the configuration again; all that may change does, or nothing."""
        return web.json_response({"changed": await self._reload("HTTP")})

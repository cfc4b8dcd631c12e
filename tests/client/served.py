"""Something that answers in the daemon's place."""

from typing import Any

from aiohttp import web


class Served:
    """A daemon that answers as it is told, on a port of its own."""

    def __init__(self, answer: Any) -> None:
        app = web.Application()
        app.router.add_route("*", "/{any:.*}", answer)
        self._runner = web.AppRunner(app)

    async def __aenter__(self) -> dict[str, Any]:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        return {"url": f"http://127.0.0.1:{port}", "api_key": "k", "timeout_s": 5.0}

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

"""The real gateway on its real listener; its workers stand, their engine is a handler of the test."""

import contextlib
import hashlib
import socket
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from aiohttp import web
from aiohttp.web_exceptions import NotAppKeyWarning

from hive.daemon import windows_kept
from hive.devices.nvml import Driver
from hive.devices.watch import Devices
from hive.events import Announcer, DaemonMoved, Event
from hive.gateway.app import Gateway
from hive.gateway.audit import AuditApi
from hive.gateway.listener import listening
from hive.gateway.reload import Reload, ReloadApi
from hive.policy.lifecycle import State
from hive.settings import Settings
from hive.telemetry.alerts import DEAF_TO, Alerts
from hive.telemetry.engines import Scrape, answering
from hive.telemetry.metrics import Metrics
from hive.windows.keeping import Keeping
from hive.workers.fleet import Fleet
from hive.workers.ledger import Ledger
from hive.workers.life import Life
from hive.workers.preflight import prepare_directories
from hive.workers.process import Place
from hive.workers.worker import Worker
from tests.patience import short_directory
from tests.workers.standing import HandPulse, close, move

E = TypeVar("E", bound=Event)
Engine = Callable[[web.Request], Awaitable[web.StreamResponse]]
CHAT = {"model": "m", "messages": []}


async def nothing_new(_by: str) -> list[str]:
    return []


class Serving:
    """A gateway without processes, a client of it, and everything that it announced."""

    def __init__(self, home: Path, model: dict[str, Any], sections: dict[str, Any]) -> None:
        self.home = home
        self.events: list[Event] = []
        self.announcer = Announcer()
        self.announcer.listen(self.events.append)
        server = {"state_dir": home / "state", "runtime_dir": home / "run", "port": 0, "body_s": 30}
        server |= sections.pop("server", {})
        command = {"engine": "command", "device": "cpu", "command": ["x{socket}"]}
        self.settings = Settings.model_validate(
            {**sections, "server": server, "models": {"m": {**command, **model}}}
        )
        prepare_directories(self.settings)
        devices = Devices(Driver(), {}, self.announcer)
        ledger = Ledger(home / "state" / "ledger", self.announcer.announce)
        self.fleet = Fleet(self.settings, devices, ledger, self.announcer)
        self.door = self.fleet.door("m")
        self.metrics = Metrics([("m-0", "m")], rooms=self.fleet.doors)
        self.announcer.listen(self.metrics.hear)
        self.alerts = Alerts(self.settings, self.announcer)
        self.announcer.listen(self.alerts.hear, deaf_to=DEAF_TO)
        self._devices, self._ledger = devices, ledger
        self.place = Place(home, home / "log")
        self.gateway: Gateway
        self.kept: Keeping | None = None  # where the model has windows
        self.reload: Reload = nothing_new  # what POST /hive/v1/reload does
        self.session: aiohttp.ClientSession

    def open(self, kept: Keeping | None) -> None:
        self.kept = kept
        self.gateway = Gateway(
            self.settings,
            self.fleet,
            self._devices,
            self._ledger,
            self.announcer,
            Scrape(self.metrics, lambda: answering(self.fleet.everyone())).text,
            lambda: None,
            self.alerts,
            kept,
            (AuditApi(self.home / "state" / "audit"), ReloadApi(self._reload)),
        )

    async def _reload(self, by: str) -> list[str]:
        return await self.reload(by)

    @property
    def worker(self) -> Worker:
        return self.fleet.worker("m-0")

    @property
    def life(self) -> Life:
        assert self.worker.life
        return self.worker.life

    @property
    def pulse(self) -> HandPulse:
        assert isinstance(self.life.pulse, HandPulse)
        return self.life.pulse

    @property
    def breaker(self) -> str:
        return self.door.breakers["m-0"].state

    @property
    def port(self) -> int:
        (told,) = [event for event in self.heard(DaemonMoved) if event.state == "listening"]
        return int(told.detail.rpartition(":")[2])

    def heard(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[aiohttp.ClientResponse, Any]:
        """One request, whole: its answer, and what the answer's JSON says."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(method, path, json=body, headers=named) as answer:
            told = None
            with contextlib.suppress(ValueError):
                told = await answer.json(content_type=None)
            return answer, told

    async def chat(self, **headers: str) -> tuple[aiohttp.ClientResponse, Any]:
        return await self.ask("POST", "/v1/chat/completions", CHAT, **headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 10)


async def well(_request: web.Request) -> web.Response:
    return web.json_response({"object": "chat.completion"})


@asynccontextmanager
async def serving(
    engine: Engine | None = well,
    model: dict[str, Any] | None = None,
    most_connections: int = 1 << 20,
    **sections: Any,
) -> AsyncIterator[Serving]:
    """`engine` answers on the socket of the worker, which is READY; without one nobody listens.

    `model` are settings of the model "m", `sections` other sections of hive.toml.
    """
    app = web.Application()
    runner = web.AppRunner(app, handler_cancellation=True)
    if engine is not None:
        app.router.add_route("*", "/{path:.*}", engine)
    await runner.setup()
    with short_directory() as home, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotAppKeyWarning)  # request["passage"]
        it = Serving(home, model or {}, sections)
        if it.fleet.site is not None:
            it.fleet.site.tier.mkdir(mode=0o700, exist_ok=True)
        async with windows_kept(it.settings, it.fleet, it.announcer) as kept:
            it.open(kept)
            if engine is not None:
                await web.UnixSite(runner, str(it.place.socket)).start()
            life = it.worker.life = Life(1, it.place, "m")
            life.pulse = HandPulse()
            move(it.worker, State.READY)
            listener = listening(
                it.gateway.app,
                it.settings,
                it.announcer,
                most_connections=most_connections,
                entrance=it.gateway.entrance,
            )
            url = "http://127.0.0.1"
            try:
                async with listener, aiohttp.ClientSession(f"{url}:{it.port}") as session:
                    it.session = session
                    yield it
            finally:
                it.fleet.refuse()
                if it.worker.life is not None:
                    await close(it.worker.life)
                await runner.cleanup()


def key(name: str, *scopes: str) -> dict[str, Any]:
    """Of [auth]; `bearer` is what its owner sends."""
    secret = hashlib.sha256(secret_of(name).encode()).hexdigest()
    return {"name": name, "sha256": secret, "scopes": list(scopes or ("inference",))}


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret_of(name)}"}


def secret_of(name: str) -> str:
    return f"hive-{name}-{'x' * 32}"

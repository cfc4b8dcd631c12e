"""What operators ask: liveness, readiness, metrics, state, workers and their logs, events."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypedDict

import msgspec
from aiohttp import web

from hive import __version__
from hive.devices.watch import Devices, Watched
from hive.errors import (
    CudaDeviceFailed,
    ModelNotFound,
    NotFound,
    ServiceUnavailable,
    StorageReadFailed,
    ValidationFailed,
)
from hive.gateway import shapes
from hive.gateway.alerts import Told
from hive.gateway.auth import Caller
from hive.gateway.openapi import EVENTS, TEXT, described
from hive.gateway.queries import OfModel, whole_number
from hive.gateway.stream import EventStream, Streams
from hive.gateway.traffic import Passage, Traffic
from hive.policy.redaction import for_clients, without_secrets
from hive.workers.diagnosis import log_files, open_log, read_tail
from hive.workers.fleet import Fleet
from hive.workers.ledger import Ledger
from hive.workers.worker import Worker

API_VERSION = "v1"
KEEPALIVE_S = 15.0  # a comment line, so that proxies keep an idle stream open
FOLLOW_S = 0.25  # how often a followed log is looked at
LOG_LINES = 200
LOG_LINES_MOST = 100_000
LOG_BYTES_MOST = 8 * 2**20
PIECE_LINES = 1000  # that are redacted in one go, while nothing else runs
HELD_BYTES = 256 * 1024  # of a followed line that does not end
SECRET_BYTES = 1024  # longer than any secret

# Of an Accept header: the text that it prefers, and its content type.
MetricsText = Callable[[str], Awaitable[tuple[bytes, str]]]
OPENMETRICS = "application/openmetrics-text"


class LogWanted(TypedDict, total=False):
    lines: Annotated[
        int, msgspec.Meta(ge=0, le=LOG_LINES_MOST, description="So many of the last ones; 200.")
    ]
    follow: Annotated[
        str, msgspec.Meta(description="1 or true: what is written from now on, until hive ends.")
    ]


class Admin:
    """Handlers of /livez, /readyz, /metrics and /hive/v1."""

    def __init__(
        self,
        fleet: Fleet,
        devices: Devices,
        ledger: Ledger,
        traffic: Traffic,
        events: EventStream,
        streams: Streams,
        metrics: MetricsText,
        drain: Callable[[], None],
        alerts: Told,
    ) -> None:
        self._drain, self._alerts = drain, alerts
        self._fleet, self._traffic = fleet, traffic
        self._devices, self._ledger = devices, ledger
        self._events, self._streams, self._metrics = events, streams, metrics
        self._began = time.time()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/livez", self.livez),
            web.get("/readyz", self.readyz),
            web.get("/metrics", self.metrics),
            web.get("/hive/v1/status", self.status),
            web.get("/hive/v1/requests", self.requests),
            web.delete("/hive/v1/requests/{request_id}", self.cancel),
            web.post("/hive/v1/drain", self.drain),
            web.get("/hive/v1/events", self.events, allow_head=False),
            web.get("/hive/v1/workers", self.workers),
            web.get("/hive/v1/workers/{id}", self.worker),
            web.get("/hive/v1/workers/{id}/logs", self.logs, allow_head=False),
            web.post("/hive/v1/workers/{id}/{action:start|stop|restart|drain|release}", self.act),
            web.get("/hive/v1/devices", self.devices),
            web.get("/hive/v1/devices/{id}", self.device),
            web.post("/hive/v1/devices/{id}/release", self.release),
            web.get("/hive/v1/leaks", self.leaks),
        ]

    @described({200: shapes.Livez})
    async def livez(self, _request: web.Request) -> web.Response:
        """The event loop runs; nothing else is claimed."""
        return web.json_response(
            {"status": "alive", "version": __version__, "api_version": API_VERSION}
        )

    @described(
        {200: shapes.Readiness, 503: shapes.Readiness}, query=OfModel, errors=[ModelNotFound]
    )
    async def readyz(self, request: web.Request) -> web.Response:
        """200 while at least one model can serve; with ?model=NAME, while that one can."""
        models = self._models()
        name = request.query.get("model")
        if name is not None:
            self._fleet.of_model(name)
            models = {name: models[name]}
        is_ready = not self._fleet.is_draining and any(m["ready"] for m in models.values())
        status = "ready" if is_ready else "draining" if self._fleet.is_draining else "unavailable"
        found: dict[str, Any] = {"status": status, "models": models}
        if watched := self._devices.watched.values():
            found["devices"] = {one.device.id: str(one.condition) for one in watched}
        return web.json_response(found, status=200 if is_ready else 503)

    def _models(self) -> dict[str, dict[str, Any]]:
        models: dict[str, dict[str, Any]] = {}
        for worker in self._fleet.workers.values():
            model = models.setdefault(worker.model, {"ready": False, "workers": {}})
            model["ready"] = model["ready"] or self._fleet.door(worker.model).serves(worker)
            model["workers"][worker.id] = str(worker.state)
        return models

    @described({200: str}, content=(TEXT, OPENMETRICS))
    async def metrics(self, request: web.Request) -> web.Response:
        """hive's metrics and its engines', in Prometheus' text format or OpenMetrics."""
        text, content_type = await self._metrics(request.headers.get("Accept", ""))
        return web.Response(body=text, headers={"Content-Type": content_type})

    @described({200: shapes.DaemonStatus})
    async def status(self, _request: web.Request) -> web.Response:
        """The daemon, its models and the states of their workers."""
        return web.json_response(
            {
                "version": __version__,
                "pid": os.getpid(),
                "began": self._began,
                "uptime_seconds": round(time.time() - self._began, 1),
                "ready": self._fleet.can_serve,
                "draining": self._fleet.is_draining,
                "in_flight": sum(w.in_flight for w in self._fleet.workers.values()),
                "service_level": self._alerts.service_level,
                "models": self._models(),
            }
        )

    @described({200: shapes.Requests})
    async def requests(self, request: web.Request) -> web.Response:
        """What is in flight: everything for an admin, a caller's own otherwise."""
        caller: Caller = request["caller"]
        views = self._traffic.views(None if caller.may("admin") else caller.name)
        passage: Passage = request["passage"]
        others = [view for view in views if view["request_id"] != passage.request_id]
        return web.json_response({"requests": others})

    @described({204: None}, errors=[NotFound])
    async def cancel(self, request: web.Request) -> web.Response:
        """End a request: its engine is told at once, its client gets REQUEST_CANCELLED."""
        caller: Caller = request["caller"]
        self._traffic.cancel(
            request.match_info["request_id"], caller.name, may_all=caller.may("admin")
        )
        return web.Response(status=204)

    @described({202: shapes.Draining})
    async def drain(self, _request: web.Request) -> web.Response:
        """As SIGTERM: refuse what is new, let what runs finish within drain_s, end with 0."""
        self._fleet.refuse()
        self._drain()
        return web.json_response({"status": "draining"}, status=202)

    @described({200: str}, content=EVENTS, headers={"Last-Event-ID": "Go on after this event."})
    async def events(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events; resumes after Last-Event-ID."""
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        with self._events.reader(request.headers.get("Last-Event-ID")) as queue:
            await self._tell(queue, request, response)
        return response

    async def _tell(
        self,
        queue: "asyncio.Queue[bytes | None]",
        request: web.Request,
        response: web.StreamResponse,
    ) -> None:
        async with self._streams.open(request, response):
            await response.write(b": hive events\n\n")
            while True:
                try:
                    async with asyncio.timeout(KEEPALIVE_S):
                        message = await queue.get()
                except TimeoutError:
                    message = b": still here\n\n"
                if message is None:
                    break
                await response.write(message)

    @described({200: shapes.Workers})
    async def workers(self, _request: web.Request) -> web.Response:
        """Every worker: id, model, state, device, reason and more; the LMCache server, too."""
        return web.json_response({"workers": [self._view(w) for w in self._fleet.everyone()]})

    @described({200: shapes.WorkerView})
    async def worker(self, request: web.Request) -> web.Response:
        """One worker."""
        return web.json_response(self._view(self._find(request)))

    @described({202: shapes.WorkerView}, errors=[ServiceUnavailable, CudaDeviceFailed])
    async def act(self, request: web.Request) -> web.Response:
        """202 once the worker has left its old state."""
        worker = self._find(request)
        actions: dict[str, Callable[[], Awaitable[None]]] = {
            "start": worker.start,
            "stop": worker.stop,
            "restart": worker.restart,
            "drain": worker.stop,
            "release": lambda: self._fleet.release_worker(worker),
        }
        await actions[request.match_info["action"]]()
        return web.json_response(self._view(worker), status=202)

    def _view(self, worker: Worker) -> dict[str, Any]:
        """A worker; its reason may quote the engine, so it is redacted like an answer."""
        view = worker.view()
        if worker is not self._fleet.cache:
            view |= self._fleet.door(worker.model).view(worker)
        if (cache := self._fleet.cache_view(worker)) is not None:
            view["cache"] = cache
        return {**view, "reason": for_clients(view["reason"])}

    def _find(self, request: web.Request) -> Worker:
        return self._fleet.worker(request.match_info["id"])

    @described({200: shapes.Devices})
    async def devices(self, _request: web.Request) -> web.Response:
        """The configured GPUs: condition, memory, processes, the last Xids."""
        views = [self._device_view(watched) for watched in self._devices.watched.values()]
        return web.json_response({"devices": views})

    @described({200: shapes.DeviceView})
    async def device(self, request: web.Request) -> web.Response:
        """One GPU, by its id or UUID."""
        return web.json_response(self._device_view(self._devices.find(request.match_info["id"])))

    @described({202: shapes.DeviceView}, errors=[ServiceUnavailable, CudaDeviceFailed])
    async def release(self, request: web.Request) -> web.Response:
        """Trust a quarantined GPU again: 202 once the workers that waited for it start."""
        watched = self._devices.find(request.match_info["id"])
        await self._fleet.release(watched)
        return web.json_response(self._device_view(watched), status=202)

    def _device_view(self, watched: Watched) -> dict[str, Any]:
        workers = [
            worker.id
            for worker in self._fleet.workers.values()
            if watched in self._devices.of(worker.plan.devices)
        ]
        return {**self._devices.view(watched), "workers": workers}

    @described({200: shapes.Leaks})
    async def leaks(self, _request: web.Request) -> web.Response:
        """What workers left behind and has not been given back since."""
        return web.json_response({"leaks": [leak.view() for leak in await self._ledger.recheck()]})

    # ── logs ────────────────────────────────────────────────────────────────────────────────────

    @described(
        {200: str}, content=TEXT, query=LogWanted, errors=[ValidationFailed, StorageReadFailed]
    )
    async def logs(self, request: web.Request) -> web.StreamResponse:
        """The end of a worker's log (?lines=N, 200), and what follows (?follow=1)."""
        worker = self._find(request)
        lines = _whole_number(request.query.get("lines", str(LOG_LINES)), "lines", LOG_LINES_MOST)
        path = worker.plan.log
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        # Open first, then read up to where it stands: nothing is lost or told twice between.
        with await asyncio.to_thread(_opened, path) as file:
            pieces, position = await asyncio.to_thread(_last_lines, path, file.fileno(), lines)
            is_followed = request.query.get("follow") in ("1", "true")
            async with self._streams.open(request, response, is_endless=is_followed):
                for piece in pieces:
                    await response.write(await asyncio.to_thread(_shown, piece))
                file.seek(position)
                if is_followed:
                    await self._follow(path, file.fileno(), response)
        return response

    async def _follow(self, path: Path, fd: int, response: web.StreamResponse) -> None:
        fd = os.dup(fd)
        held = b""
        try:
            while not self._streams.closing.is_set():
                if text := os.read(fd, 65536):
                    whole, held = _whole_lines(held + text)
                    if whole:
                        await response.write(_shown(whole))
                    continue
                if newer := await _rotated(path, fd):
                    with newer:
                        os.dup2(newer.fileno(), fd, inheritable=False)
                    continue
                try:
                    async with asyncio.timeout(FOLLOW_S):
                        await self._streams.closing.wait()
                except TimeoutError:
                    continue
        finally:
            os.close(fd)


def _opened(path: Path) -> BinaryIO:
    try:
        return open_log(path)
    except FileNotFoundError as exc:
        raise NotFound(
            "There is no log of this worker: it was never started, or the log was removed."
        ) from exc
    except OSError as exc:
        raise StorageReadFailed(
            f"This worker's log cannot be read: {exc.strerror}.",
            action="Remove what stands in its place under server.state_dir, then restart the worker.",
        ) from exc


def _last_lines(path: Path, fd: int, lines: int) -> tuple[list[bytes], int]:
    """The last lines of all files of a log, in pieces, and the position that they end at in `fd`."""
    size = os.fstat(fd).st_size
    begin = max(0, size - LOG_BYTES_MOST)
    text = os.pread(fd, size - begin, begin) if lines else b""
    if begin:  # a line that is not whole may begin with half a secret
        text = text.partition(b"\n")[2] or text[SECRET_BYTES:]
    for older in reversed([p for p in log_files(path) if p != path]):
        if text.count(b"\n") >= lines or len(text) >= LOG_BYTES_MOST // 2:
            break
        text = read_tail(older, LOG_BYTES_MOST - len(text)) + text
    kept = text.splitlines(keepends=True)[-lines:] if lines else []
    return [b"".join(kept[at : at + PIECE_LINES]) for at in range(0, len(kept), PIECE_LINES)], size


def _whole_lines(text: bytes) -> tuple[bytes, bytes]:
    """What may be shown, and what is held until its line ends or gets too long for that."""
    end = text.rfind(b"\n") + 1
    if not end and len(text) > HELD_BYTES:
        end = text.rfind(b" ") + 1 or len(text)
    return text[:end], text[end:]


def _shown(text: bytes) -> bytes:
    return without_secrets(text.decode(errors="replace")).encode()


async def _rotated(path: Path, fd: int) -> BinaryIO | None:
    """The log's new file, once there is one."""
    try:
        if os.lstat(path).st_ino == os.fstat(fd).st_ino:
            return None
        return await asyncio.to_thread(open_log, path)
    except OSError:
        return None


def _whole_number(text: str, name: str, most: int) -> int:
    number = whole_number(text, 0, most)
    if number is None:
        raise ValidationFailed(f"'{name}' must be a whole number from 0 to {most}.", param=name)
    return number

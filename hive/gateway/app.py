"""The web application: every request gets an id, a caller, and an answer or a coded error."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from hive.devices.watch import Devices
from hive.errors import (
    Forbidden,
    HiveError,
    HttpError,
    InternalError,
    NotFound,
    RequestCancelled,
    ServiceUnavailable,
    Unauthorized,
)
from hive.events import COUNTED, Announcer, KeyRefused, request_id_var
from hive.gateway import problems
from hive.gateway.admin import Admin, MetricsText
from hive.gateway.alerts import AlertsApi, Told
from hive.gateway.answer import ClientLeft
from hive.gateway.auth import Doorkeeper
from hive.gateway.health import Health
from hive.gateway.inference import Inference
from hive.gateway.line import sent
from hive.gateway.listener import Entrance
from hive.gateway.openapi import OpenApi
from hive.gateway.stream import EventStream, Streams
from hive.gateway.traffic import Passage, Traffic
from hive.settings import Settings
from hive.workers.admission import DRAINING_HINT_S
from hive.workers.fleet import Fleet
from hive.workers.ledger import Ledger

if TYPE_CHECKING:
    from hive.windows.keeping import Keeping

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_CONTINUE = "100-continue"
_OF_WINDOWS = ("/hive/v1/sessions", "/hive/v1/windows", "/hive/v1/backups")


class Api(Protocol):
    """Handlers that somebody else made."""

    def routes(self) -> list[web.RouteDef]: ...


class Gateway:
    """Builds the application and holds its parts together."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        devices: Devices,
        ledger: Ledger,
        announcer: Announcer,
        metrics: MetricsText,
        drain: Callable[[], None],
        alerts: Told,
        keeping: "Keeping | None" = None,
        apis: Sequence[Api] = (),
    ) -> None:
        """`drain` is what a SIGTERM does; `keeping` is there where a model has windows.

        `apis` are served beside what is the gateway's own.
        """
        self._announcer = announcer
        self._doorkeeper = Doorkeeper(settings.auth.keys)
        self._traffic = Traffic(announcer)
        stream = EventStream()
        announcer.listen(stream.hear, deaf_to=COUNTED)
        self._streams = Streams(self._doorkeeper.admit)
        self._admin = Admin(
            fleet, devices, ledger, self._traffic, stream, self._streams, metrics, drain, alerts
        )
        self._has_windows = keeping is not None
        sessions = keeping.sessions if keeping else None
        self._inference = Inference(settings, fleet, announcer, sessions)
        self.app = web.Application(middlewares=[self._answer])
        self.app.on_response_prepare.append(_sign_a_stream)
        self.app.add_routes([*self._admin.routes(), *self._inference.routes()])
        self.app.add_routes(Health(fleet, devices, ledger, keeping).routes())
        own: tuple[Api, ...] = (OpenApi(), AlertsApi(alerts))
        for api in (*own, *apis):
            self.app.add_routes(api.routes())
        if keeping is not None:
            # With them comes the database's library, which a hive without windows does without.
            from hive.gateway.backups import BackupsApi  # noqa: PLC0415
            from hive.gateway.windows import WindowsApi  # noqa: PLC0415

            windows = WindowsApi(keeping.sessions, keeping.windows)
            backups = BackupsApi(windows, keeping.windows, keeping.backups)
            self.app.add_routes([*windows.routes(), *backups.routes()])

    def apply(self, settings: Settings) -> None:
        """What may change while hive runs, for requests that come from now on.

        What runs goes on to its end; streams that have none end with their key.
        """
        self._doorkeeper.apply(settings.auth.keys)
        self._streams.judge()
        self._inference.apply(settings)

    def entrance(self, routed: Entrance) -> Entrance:
        """What every request meets first: inference goes past aiohttp's routing, the rest there."""
        inference = self._inference

        def enter(request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
            assert isinstance(request, web.Request)
            if inference.takes(request):
                return self._answer(request, inference.infer)
            if request.headers.get("Expect", "").lower() not in ("", _CONTINUE):
                return self._answer(request, _unexpected)  # aiohttp would refuse it by itself
            return routed(request)

        return enter

    def close_streams(self) -> None:
        """End event streams and followed logs, which would never end by themselves."""
        self._streams.close()

    async def finish(self, by: float) -> None:
        """Let every request have its answer until `by` (monotonic seconds), then end them all."""
        try:
            async with asyncio.timeout(max(0.0, by - time.monotonic())):
                await self._traffic.ended()
        except TimeoutError:
            self._traffic.cancel_all(
                ServiceUnavailable(
                    "hive stopped before the request was answered.",
                    reason="draining",
                    retry_after_s=DRAINING_HINT_S,
                )
            )

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Outermost: nothing gets past here but an answer, or a client's leaving."""
        with self._traffic.passage(request) as passage:
            token = request_id_var.set(passage.request_id)
            request["passage"] = passage
            try:
                response = await self._respond(request, handler, passage)
            except (asyncio.CancelledError, ClientLeft) as exc:
                passage.code = RequestCancelled.code
                passage.status = RequestCancelled.status
                if isinstance(exc, ClientLeft):
                    if request.transport is not None:
                        request.transport.abort()
                    return sent(RequestCancelled.status, is_kept=False)  # nobody reads it
                raise
            finally:
                request_id_var.reset(token)
            passage.status = response.status
            return response

    async def _respond(
        self, request: web.Request, handler: Handler, passage: Passage
    ) -> web.StreamResponse:
        try:
            caller = self._doorkeeper.admit(request)
            request["caller"] = caller
            passage.key = caller.name
            self._traffic.refuse_duplicate(request, passage)  # ids are not told to strangers
            response = await handler(request)
        except HiveError as exc:
            error = exc.with_traceback(None)  # else it and this frame keep each other
        except web.HTTPException as exc:
            error = self._from_aiohttp(exc, request.path)
        except (asyncio.CancelledError, ClientLeft):
            raise
        except ConnectionError as exc:  # a reader of events or of a log left
            raise ClientLeft from exc
        except Exception:  # the boundary: an unforeseen error is logged whole and told bare (C19)
            log.exception("unexpected error in a request")
            error = InternalError("hive met an unexpected condition while handling the request.")
        else:
            if not response.prepared:
                _sign(response, passage)
            return response
        passage.code = error.code
        if isinstance(error, Unauthorized | Forbidden):
            self._announcer.announce(_refused(error, passage))
        transport = request.transport
        if transport is None or transport.is_closing() or request.method == "HEAD":
            return _sign(problems.response(error, passage.request_id), passage)
        return problems.write(error, request, transport, passage.request_id)

    def _from_aiohttp(self, exc: web.HTTPException, path: str) -> HiveError:
        """404 and 405 of the router, and whatever else aiohttp itself refuses, in hive's shape."""
        if isinstance(exc, web.HTTPNotFound):
            if path.startswith(_OF_WINDOWS) and not self._has_windows:
                return NotFound(
                    "hive keeps no sessions, windows or backups: no model has windows = true.",
                    action="Set windows = true for a model, and start hive again.",
                )
            return NotFound("There is nothing at this path.")
        if isinstance(exc, web.HTTPMethodNotAllowed):
            allowed = sorted(exc.allowed_methods)
            return HttpError(
                f"This path takes {', '.join(allowed)} only.", status=405, allowed=allowed
            )
        return HttpError(f"The request was refused: {exc.reason}.", status=exc.status)


def _refused(error: HiveError, passage: Passage) -> KeyRefused:
    key, fingerprint = error.details.get("key"), error.details.get("fingerprint")
    return KeyRefused(error.code, passage.key or key or "", fingerprint or "")


async def _unexpected(_request: web.Request) -> web.StreamResponse:
    raise HttpError(
        "hive knows no other Expect than 100-continue.",
        status=HTTPStatus.EXPECTATION_FAILED,
        action="Send the request without Expect.",
    )


def _sign(response: web.StreamResponse, passage: Passage) -> web.StreamResponse:
    response.headers["X-Request-Id"] = passage.request_id
    response.headers["Server"] = "hive"  # not the library and its version
    return response


async def _sign_a_stream(request: web.Request, response: web.StreamResponse) -> None:
    """A handler that streams sends the head by itself."""
    if (passage := request.get("passage")) is not None:
        _sign(response, passage)

"""Sessions and windows over HTTP: /hive/v1/sessions and /hive/v1/windows.

A key sees its own ones only; another's do not exist for it. An admin may see everybody's, and says
with ?owner=KEY_NAME whose where names are not enough.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypedDict, TypeVar

import msgspec
from aiohttp import web

from hive.errors import (
    BlockNotFound,
    CircuitBreakerOpen,
    ConcurrencyLimit,
    EngineTimeout,
    EngineUnreachable,
    Forbidden,
    GpuQuarantined,
    HiveError,
    InsufficientDisk,
    InvalidParameter,
    InvalidSessionId,
    InvalidStateTransition,
    InvalidWindowName,
    KvServerUnreachable,
    ModelIncompatible,
    ModelNotFound,
    OperationTimeout,
    RateLimited,
    RequestCancelled,
    RequestTimeout,
    SchemaInvalid,
    ServiceUnavailable,
    SessionAlreadyFrozen,
    SessionIsolation,
    SessionNotActive,
    SessionNotFound,
    StorageCorrupted,
    StorageQuotaExceeded,
    StorageReadFailed,
    StorageWriteFailed,
    StoreUnreachable,
    ValidationFailed,
    WindowAlreadyExists,
    WindowNotFound,
    WorkerCrashed,
    WorkerHung,
)
from hive.gateway import problems, shapes
from hive.gateway.auth import Caller, taken
from hive.gateway.openapi import EVENTS, JSON, described
from hive.gateway.queries import whole_number
from hive.gateway.traffic import Passage
from hive.policy.windows import SessionState, WindowState
from hive.storage.catalogue import MOST_PAGE, Window
from hive.windows import sessions as of_sessions
from hive.windows.operations import Report, Status, Windows
from hive.windows.sessions import Sessions
from hive.windows.work import Progress, unheard
from hive.workers.interrupt import Interrupt

BODY_BYTES = 1024 * 1024
BODY_S = 10.0  # for the few bytes of one to arrive
PAGE = 100
MOST_AT_ONCE = 16  # freezes, thaws, checks and repairs
MOST_OFFSET = 10**9
SORTS = ("created_at", "name", "tokens", "bytes")
_AT = re.compile(r" - at `\$\.?([A-Za-z_]*)")

Tag = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Tags = Annotated[list[Tag], msgspec.Meta(max_length=32)]
Description = Annotated[str, msgspec.Meta(max_length=1024)]


class NewSession(msgspec.Struct, forbid_unknown_fields=True):
    model: str


class NewWindow(msgspec.Struct, forbid_unknown_fields=True):
    session_id: str
    name: str
    keep_active: bool = False
    description: Description = ""
    tags: Tags = []


class ThawWanted(msgspec.Struct, forbid_unknown_fields=True):
    session_id: str | None = None
    require_full: bool = False


class CloneWanted(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class OfOwner(TypedDict, total=False):
    owner: Annotated[
        str,
        msgspec.Meta(description="Whose, for an admin: the name of a key. Without it everybody's."),
    ]


Limit = Annotated[int, msgspec.Meta(ge=1, le=MOST_PAGE, description=f"At most so many; {PAGE}.")]
Offset = Annotated[int, msgspec.Meta(ge=0, le=MOST_OFFSET, description="Not the first so many.")]


class SessionsWanted(OfOwner, total=False):
    state: SessionState
    limit: Limit


class WindowsWanted(OfOwner, total=False):
    model: str
    session_id: str
    tag: str
    state: Annotated[WindowState, msgspec.Meta(description="FROZEN ones, where it is not told.")]
    sort: Literal["created_at", "name", "tokens", "bytes"]
    order: Annotated[Literal["asc", "desc"], msgspec.Meta(description="desc, if it is not told.")]
    limit: Limit
    offset: Offset


OF_A_BODY = (SchemaInvalid, InvalidParameter, ValidationFailed, RequestTimeout)
OF_AN_OWNER = (Forbidden, StoreUnreachable)
OF_A_SESSION = (*OF_AN_OWNER, InvalidSessionId, SessionNotFound)
OF_A_WINDOW = (*OF_AN_OWNER, InvalidWindowName, WindowNotFound)
# Of what reads and writes blocks, and asks engine and LMCache.
OF_AN_OPERATION = (
    *(InvalidParameter, InvalidStateTransition, RateLimited, RequestCancelled),
    *(ConcurrencyLimit, ServiceUnavailable, CircuitBreakerOpen, GpuQuarantined),
    *(EngineUnreachable, EngineTimeout, WorkerCrashed, WorkerHung, KvServerUnreachable),
    *(StorageReadFailed, StorageWriteFailed, InsufficientDisk, OperationTimeout),
)

B = TypeVar("B", bound=msgspec.Struct)


class WindowsApi:
    """Handlers; what they do is hive/windows."""

    def __init__(self, sessions: Sessions, windows: Windows) -> None:
        self._sessions, self._windows = sessions, windows
        self._running = 0

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/hive/v1/sessions", self.new_session),
            web.get("/hive/v1/sessions", self.sessions, allow_head=False),
            web.get("/hive/v1/sessions/{id}", self.session, allow_head=False),
            web.delete("/hive/v1/sessions/{id}", self.delete_session),
            web.post("/hive/v1/windows", self.freeze),
            web.get("/hive/v1/windows", self.windows, allow_head=False),
            web.get("/hive/v1/windows/{name}", self.window, allow_head=False),
            web.delete("/hive/v1/windows/{name}", self.delete),
            web.post("/hive/v1/windows/{name}/thaw", self.thaw),
            web.post("/hive/v1/windows/{name}/clone", self.clone),
            web.post("/hive/v1/windows/{name}/verify", self.verify),
            web.post("/hive/v1/windows/{name}/repair", self.repair),
        ]

    # ── sessions ────────────────────────────────────────────────────────────────────────────────

    @described(
        {201: shapes.SessionView}, body=NewSession, errors=[*OF_A_BODY, *OF_AN_OWNER, ModelNotFound]
    )
    async def new_session(self, request: web.Request) -> web.Response:
        """Begin a conversation with a model: 201, the session."""
        wanted = await body_of(request, NewSession)
        session = await self._sessions.create(caller_of(request).name or "", wanted.model)
        return web.json_response(of_sessions.view(session), status=201)

    @described(
        {200: shapes.Sessions}, query=SessionsWanted, errors=[*OF_AN_OWNER, InvalidParameter]
    )
    async def sessions(self, request: web.Request) -> web.Response:
        """The caller's, the last used first (?state=)."""
        state = _choice(request, "state", tuple(SessionState))
        found = await self._sessions.listed(
            owner_of(request),
            state=SessionState(state) if state else None,
            most=number_of(request, "limit", PAGE, MOST_PAGE, 1),
        )
        return web.json_response({"sessions": [of_sessions.view(one) for one in found]})

    @described({200: shapes.SessionWithMessages}, query=OfOwner, errors=OF_A_SESSION)
    async def session(self, request: web.Request) -> web.Response:
        """One of them, with its messages."""
        session = await self._sessions.find(request.match_info["id"], owner_of(request))
        messages = await self._sessions.messages(session)
        return web.json_response({**of_sessions.view(session), "messages": messages})

    @described({204: None}, query=OfOwner, errors=[*OF_A_SESSION, InvalidStateTransition])
    async def delete_session(self, request: web.Request) -> web.Response:
        """Nobody goes on with it; its windows stay."""
        await self._sessions.delete(request.match_info["id"], owner_of(request))
        return web.Response(status=204)

    # ── windows ─────────────────────────────────────────────────────────────────────────────────

    @described(
        {201: shapes.WindowView},
        body=NewWindow,
        query=OfOwner,
        content=(JSON, EVENTS),
        errors=[
            *OF_A_BODY,
            *OF_A_SESSION,
            *OF_AN_OPERATION,
            InvalidWindowName,
            SessionNotActive,
            SessionAlreadyFrozen,
            WindowAlreadyExists,
            StorageQuotaExceeded,
        ],
    )
    async def freeze(self, request: web.Request) -> web.StreamResponse:
        """Freeze a session into a window: 201, the window."""
        wanted = await body_of(request, NewWindow)

        async def work(told: Progress) -> dict[str, Any]:
            window = await self._windows.freeze(
                owner_of(request),
                wanted.session_id,
                wanted.name,
                keep_active=wanted.keep_active,
                description=wanted.description,
                tags=wanted.tags,
                told=told,
            )
            return view(window)

        return await self.answer(request, work, status=201)

    @described({200: shapes.Windows}, query=WindowsWanted, errors=[*OF_AN_OWNER, InvalidParameter])
    async def windows(self, request: web.Request) -> web.Response:
        """The caller's, in pages (?model=, session_id=, tag=, state=, sort=, order=, limit=, offset=)."""
        query = request.query
        state = _choice(request, "state", tuple(WindowState))
        begin, most = (
            number_of(request, "offset", 0, MOST_OFFSET),
            number_of(request, "limit", PAGE, MOST_PAGE, 1),
        )
        found = await self._windows.windows(
            owner_of(request),
            model=query.get("model"),
            session_id=query.get("session_id"),
            tag=query.get("tag"),
            state=WindowState(state) if state else WindowState.FROZEN,
            sort=_choice(request, "sort", SORTS) or "created_at",
            is_descending=(_choice(request, "order", ("asc", "desc")) or "desc") == "desc",
            begin=begin,
            most=most + 1,
        )
        more = {"next_offset": begin + most} if len(found) > most else {}
        return web.json_response({"windows": [view(one) for one in found[:most]], **more})

    @described({200: shapes.WindowStatus}, query=OfOwner, errors=OF_A_WINDOW)
    async def window(self, request: web.Request) -> web.Response:
        """One of them: its receipt, its family, and how much of it the KV cache has at hand."""
        owner, name = await self._named(request)
        return web.json_response(_status(await self._windows.status(owner, name)))

    @described({204: None}, query=OfOwner, errors=[*OF_A_WINDOW, InvalidStateTransition])
    async def delete(self, request: web.Request) -> web.Response:
        """Its blocks go, unless a clone shares them."""
        owner, name = await self._named(request)
        await self._windows.delete(owner, name)
        return web.Response(status=204)

    @described(
        {200: shapes.Thawed},
        body=ThawWanted,
        query=OfOwner,
        content=(JSON, EVENTS),
        errors=[
            *OF_A_BODY,
            *OF_A_WINDOW,
            *OF_A_SESSION,
            *OF_AN_OPERATION,
            BlockNotFound,
            StorageCorrupted,
            ModelIncompatible,
            SessionIsolation,
        ],
    )
    async def thaw(self, request: web.Request) -> web.StreamResponse:
        """Go on where it was frozen: the session, the messages, and what is usable of the cache."""
        wanted = await body_of(request, ThawWanted)
        owner, name = await self._named(request)

        async def work(told: Progress) -> dict[str, Any]:
            thawed = await self._windows.thaw(
                owner,
                name,
                session_id=wanted.session_id,
                require_full=wanted.require_full,
                told=told,
            )
            return {
                "session_id": thawed.session.id,
                "model": thawed.session.model,
                "messages": thawed.messages,
                "receipt": thawed.receipt,
                "warnings": thawed.warnings,
            }

        return await self.answer(request, work)

    @described(
        {201: shapes.WindowView},
        body=CloneWanted,
        query=OfOwner,
        content=(JSON, EVENTS),
        errors=[
            *OF_A_BODY,
            *OF_A_WINDOW,
            *OF_AN_OPERATION,
            WindowAlreadyExists,
            StorageCorrupted,
            StorageQuotaExceeded,
        ],
    )
    async def clone(self, request: web.Request) -> web.StreamResponse:
        """A second window of the same blocks: 201."""
        wanted = await body_of(request, CloneWanted)
        owner, name = await self._named(request)

        async def work(_: Progress) -> dict[str, Any]:
            return view(await self._windows.clone(owner, name, wanted.name))

        return await self.answer(request, work, status=201)

    @described(
        {200: shapes.WindowReport},
        query=OfOwner,
        content=(JSON, EVENTS),
        errors=[*OF_A_WINDOW, *OF_AN_OPERATION, StorageCorrupted],
    )
    async def verify(self, request: web.Request) -> web.StreamResponse:
        """Read every byte of it, and compare."""
        owner, name = await self._named(request)

        async def work(told: Progress) -> dict[str, Any]:
            return _report(await self._windows.verify(owner, name, told))

        return await self.answer(request, work)

    @described(
        {200: shapes.WindowReport},
        query=OfOwner,
        content=(JSON, EVENTS),
        errors=[*OF_A_WINDOW, *OF_AN_OPERATION, StorageCorrupted, ModelIncompatible],
    )
    async def repair(self, request: web.Request) -> web.StreamResponse:
        """Find or compute again what is damaged of it."""
        owner, name = await self._named(request)

        async def work(told: Progress) -> dict[str, Any]:
            return _report(await self._windows.repair(owner, name, told))

        return await self.answer(request, work)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    async def _named(self, request: web.Request) -> tuple[str | None, str]:
        """Whose window of that name is meant, and the name: an admin's own goes first."""
        owner, name = owner_of(request), request.match_info["name"]
        if owner is None:
            own = caller_of(request).name or ""
            if await self._windows.has_own(own, name):
                return own, name
        return owner, name

    async def answer(
        self,
        request: web.Request,
        work: Callable[[Progress], Awaitable[dict[str, Any]]],
        status: int = 200,
    ) -> web.StreamResponse:
        """The result as JSON; for who accepts event streams with what is done on the way."""
        passage: Passage = request["passage"]
        interrupt = Interrupt()
        quota = taken(caller_of(request))
        try:
            with self._one_more(), passage.ended_by(interrupt):
                async with interrupt:
                    if "text/event-stream" not in request.headers.get("Accept", ""):
                        return web.json_response(await work(unheard), status=status)
                    return await _streamed(request, work, passage.request_id)
        finally:
            quota.give_back()

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        if self._running >= MOST_AT_ONCE:
            raise ConcurrencyLimit(retry_after_s=2.0)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


async def _streamed(
    request: web.Request,
    work: Callable[[Progress], Awaitable[dict[str, Any]]],
    request_id: str,
) -> web.StreamResponse:
    """Events: `progress` {phase, done, total}, then `result`, or `error` as in a broken stream."""
    news: asyncio.Queue[tuple[str, int, int] | None] = asyncio.Queue()
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
    )
    await response.prepare(request)

    async def run() -> bytes:
        try:
            result = await work(lambda *one: news.put_nowait(one))
        except HiveError as exc:
            request["passage"].code = exc.code
            return problems.event(exc, request_id)
        finally:
            news.put_nowait(None)
        return b"event: result\ndata: %b\n\n" % json.dumps(result).encode()

    left: ConnectionError | None = None
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(run(), name="window operation")
        try:
            while (one := await news.get()) is not None:
                told = dict(zip(("phase", "done", "total"), one, strict=True))
                await response.write(b"event: progress\ndata: %b\n\n" % json.dumps(told).encode())
            await response.write(await running)
        except ConnectionError as exc:  # a group would wrap it
            left = exc
            running.cancel()
    if left is not None:
        raise left
    await response.write_eof()
    return response


def view(window: Window) -> dict[str, Any]:
    """A window as the API shows it: no salt, no path (R076)."""
    return {
        "name": window.name,
        "state": str(window.state),
        "session_id": window.session_id,
        "owner": window.owner or None,
        "model": window.model,
        "created_at": window.created_at,
        "tokens": window.tokens,
        "blocks": window.blocks,
        "bytes": window.bytes,
        "description": window.description,
        "tags": list(window.tags),
        "identity": {k: v for k, v in window.identity.items() if k != "path"},
        "receipt": window.receipt,
    }


def _status(status: Status) -> dict[str, Any]:
    return {
        **view(status.window),
        "lineage": {"ancestors": status.ancestors, "clones": status.clones},
        "cache": {"files_in_tier": status.files_in_tier},
    }


def _report(report: Report) -> dict[str, Any]:
    return {
        "name": report.name,
        "whole": report.is_whole,
        "blocks": report.blocks,
        "blocks_whole": report.whole,
        "missing": report.missing,
        "corrupt": report.corrupt,
        "recovered": report.recovered,
        "recomputed": report.recomputed,
    }


def caller_of(request: web.Request) -> Caller:
    caller: Caller = request["caller"]
    if not (caller.may("inference") or caller.may("admin")):
        raise Forbidden("This key does not have the inference scope.", required_scope="inference")
    return caller


def owner_of(request: web.Request) -> str | None:
    """Whose things are meant; None: everybody's."""
    caller = caller_of(request)
    told = request.query.get("owner")
    if caller.may("admin"):
        return told
    if told is not None and told != caller.name:
        raise Forbidden("Only an admin sees what other keys have.", required_scope="admin")
    return caller.name or ""


async def body_of(request: web.Request, kind: type[B]) -> B:
    """Raises SchemaInvalid, InvalidParameter that names the field, ValidationFailed."""
    text = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.content.iter_any():
                text += part
                if len(text) > BODY_BYTES:
                    raise ValidationFailed(f"The body has more than {BODY_BYTES} bytes.")
    except TimeoutError as exc:
        raise RequestTimeout(
            f"The request's body did not arrive within {BODY_S:g} s.",
            phase="body",
            timeout_seconds=BODY_S,
            action="Send the body faster.",
        ) from exc
    except web.RequestPayloadError as exc:
        raise ValidationFailed("The request's body is not valid HTTP.") from exc
    try:
        return msgspec.json.decode(bytes(text) or b"{}", type=kind)
    except msgspec.ValidationError as exc:
        found = _AT.search(str(exc))
        what = str(exc).partition(" - at ")[0]
        if found and found[1]:
            raise InvalidParameter(
                f"Invalid parameter: {found[1]}. {what}.", param=found[1]
            ) from None
        raise SchemaInvalid(
            f"The body does not have the expected shape: {what}.",
            allowed=list(kind.__struct_fields__),
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise SchemaInvalid("The request's body is not valid JSON.") from None


def _choice(request: web.Request, name: str, allowed: tuple[str, ...]) -> str | None:
    told = request.query.get(name)
    if told is not None and told not in allowed:
        raise InvalidParameter(
            f"Invalid parameter: {name}. It is one of {', '.join(allowed)}.",
            param=name,
            allowed=list(allowed),
        )
    return told


def number_of(request: web.Request, name: str, default: int, most: int, least: int = 0) -> int:
    told = request.query.get(name)
    if told is None:
        return default
    number = whole_number(told, least, most)
    if number is None:
        raise InvalidParameter(
            f"Invalid parameter: {name}. It is a whole number from {least} to {most}.", param=name
        )
    return number

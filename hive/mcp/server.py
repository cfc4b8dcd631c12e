"""The protocol's side: lists of tools and resources, calls, and errors in S0's envelope (R111)."""

import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from mcp import MCPError, types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server
from pydantic import ValidationError

from hive import __version__
from hive.client.control import ControlPlane, Result
from hive.client.http import place
from hive.client.rendering import envelope, is_retryable, workflow
from hive.client.repeating import tried_of
from hive.errors import DaemonUnreachable, HiveError, InternalError, InvalidParameter
from hive.mcp.caller import Caller
from hive.mcp.tools import TOOLS, Arguments, Status, Tool, cache_stats, health_check, window_status
from hive.mcp.tools import Owned as Nothing

log = logging.getLogger(__name__)

INSTRUCTIONS = (
    "hive serves language models on this host and keeps their contexts. A session is a "
    "conversation (chat with new_session, or session_list). window_freeze keeps a session's KV "
    "cache under a name; window_thaw gives it back, and the next answer need not compute it again. "
    "An error's text is JSON: error (a code), message, retryable. An answer with degraded = true "
    "is not, or not wholly, from the daemon at this moment: source and warnings say what it is."
)
JSON = "application/json"
_LOGGED = ("session_id", "window_name", "new_name", "model", "owner", "keep_active", "require_full")
_HOUR_S = 3600.0

Context = ServerRequestContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """A resource: what is read at an address."""

    name: str
    help: str
    read: Callable[[Caller, str], Awaitable[Result]]


async def _sessions(caller: Caller, _name: str) -> Result:
    return await caller.ask("session_list", "GET", place("sessions"))


async def _session(caller: Caller, name: str) -> Result:
    return await caller.ask("session_status", "GET", place("sessions", name))


async def _windows(caller: Caller, _name: str) -> Result:
    return await caller.ask("window_list", "GET", place("windows"))


async def _window(caller: Caller, name: str) -> Result:
    return await window_status(caller, Status(window_name=name))


async def _cache(caller: Caller, _name: str) -> Result:
    return await cache_stats(caller, Nothing())


async def _health(caller: Caller, _name: str) -> Result:
    return await health_check(caller, Arguments())


PLACES = {
    "hive://sessions": Place("sessions", "The sessions, the last used first.", _sessions),
    "hive://windows": Place("windows", "The windows, the newest first.", _windows),
    "hive://cache": Place("cache", "The KV cache: LMCache, windows, what thaws gave.", _cache),
    "hive://health": Place("health", "How hive and each of its parts is.", _health),
}
TEMPLATES = {
    "hive://sessions/{id}": Place("session", "One session with its messages.", _session),
    "hive://windows/{name}": Place("window", "One window with its last receipt.", _window),
}


@dataclass(slots=True)
class Hive:
    """Handlers of the protocol's requests; `api_key` is for callers that bring none of their own."""

    url: str | None
    api_key: str | None = field(repr=False)
    plane: ControlPlane = field(default_factory=ControlPlane)

    def server(self) -> "Server[Any]":
        return Server(
            "hive",
            version=__version__,
            title="hive",
            instructions=INSTRUCTIONS,
            on_list_tools=self.list_tools,
            on_call_tool=self.call_tool,
            on_list_resources=self.list_resources,
            on_list_resource_templates=self.list_templates,
            on_read_resource=self.read_resource,
        )

    # ── tools ───────────────────────────────────────────────────────────────────────────────────

    async def list_tools(self, _ctx: Context, _params: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[_described(tool) for tool in TOOLS.values()])

    async def call_tool(
        self, ctx: Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        """Whatever goes wrong with a call is its result; only an unknown tool is not a call."""
        tool = TOOLS.get(params.name)
        if tool is None:
            raise MCPError(
                types.INVALID_PARAMS, f"Unknown tool: {params.name}; there are {', '.join(TOOLS)}."
            )
        given = params.arguments or {}
        caller = self._caller(ctx)
        try:
            result = await tool.does(caller, _arguments(tool, given))
        except HiveError as error:
            _note(tool.name, given, error)
            return _failed(tool, error, caller)
        except Exception:
            log.exception("%s met what nobody foresaw", tool.name)
            return _failed(tool, InternalError(), caller)
        told = {
            "result": result.data,
            "source": result.source,
            "degraded": result.is_degraded,
            "warnings": list(result.warnings),
        }
        if result.age_s:
            told["age_seconds"] = result.age_s
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=json.dumps(told, ensure_ascii=False))],
            structured_content=told,
        )

    # ── resources ───────────────────────────────────────────────────────────────────────────────

    async def list_resources(self, _ctx: Context, _params: Any) -> types.ListResourcesResult:
        return types.ListResourcesResult(
            resources=[
                types.Resource(uri=uri, name=one.name, description=one.help, mime_type=JSON)
                for uri, one in PLACES.items()
            ]
        )

    async def list_templates(
        self, _ctx: Context, _params: Any
    ) -> types.ListResourceTemplatesResult:
        return types.ListResourceTemplatesResult(
            resource_templates=[
                types.ResourceTemplate(
                    uri_template=uri, name=one.name, description=one.help, mime_type=JSON
                )
                for uri, one in TEMPLATES.items()
            ]
        )

    async def read_resource(
        self, ctx: Context, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        uri = str(params.uri)
        one, name = _found(uri)
        try:
            result = await one.read(self._caller(ctx), name)
        except HiveError as error:
            _note(uri, {}, error)
            told = {"uri": uri, **json.loads(envelope(error))}
            raise MCPError(types.INTERNAL_ERROR, told["message"], told) from error
        told = {
            "result": result.data,
            "source": result.source,
            "degraded": result.is_degraded,
            "warnings": list(result.warnings),
        }
        text = json.dumps(told, ensure_ascii=False)
        return types.ReadResourceResult(
            contents=[types.TextResourceContents(uri=uri, text=text, mime_type=JSON)]
        )

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _caller(self, ctx: Context) -> Caller:
        """Over HTTP everybody brings a key of their own; nobody borrows this program's."""
        if ctx.request is None:
            key = self.api_key
        else:
            headers = ctx.request.headers
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")

        async def report(phase: str, done: int, total: int) -> None:
            await ctx.session.report_progress(float(done), float(total) if total else None, phase)

        return Caller(self.plane, self.url, key or None, report)


def _described(tool: Tool) -> types.Tool:
    return types.Tool(
        name=tool.name,
        description=tool.help,
        input_schema=tool.takes.model_json_schema(),
        annotations=types.ToolAnnotations(
            read_only_hint=not tool.changes,
            destructive_hint=tool.destroys,
            open_world_hint=False,
        ),
    )


def _arguments(tool: Tool, given: dict[str, Any]) -> Arguments:
    """Raises InvalidParameter that names the first field that cannot be used (R082)."""
    try:
        return tool.takes.model_validate(given)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "arguments"
        raise InvalidParameter(
            f"Invalid parameter: {name}",
            param=name,
            action=f"{first['msg']}; {tool.name} takes {', '.join(tool.takes.model_fields)}.",
        ) from exc


def _found(uri: str) -> tuple[Place, str]:
    """What is read there, and the name in the address. Raises MCPError."""
    if uri in PLACES:
        return PLACES[uri], ""
    try:
        parts = urlsplit(uri)
    except ValueError:
        parts = urlsplit("")
    name = unquote(parts.path.removeprefix("/"))
    template = f"hive://{parts.netloc}/{{{'id' if parts.netloc == 'sessions' else 'name'}}}"
    if parts.scheme == "hive" and template in TEMPLATES and name.strip("."):
        return TEMPLATES[template], name
    there = ", ".join((*PLACES, *TEMPLATES))
    raise MCPError(
        types.INVALID_PARAMS, f"No such resource: {uri}; there are {there}.", {"uri": uri}
    )


def _failed(tool: Tool, error: HiveError, caller: Caller) -> types.CallToolResult:
    """The envelope for agents, and the whole story beside it for workflows (R250)."""
    cached = None
    if isinstance(error, DaemonUnreachable) and tool.name == "health_check":
        last = caller.plane.last(tool.name, caller.key("GET", place("health")))
        if last is not None:  # R237, R238: how it was, told as such
            data, age_s = last
            cached = {
                "last_validated": f"{age_s:.0f} seconds ago",
                "age_hours": round(age_s / _HOUR_S, 3),
                "still_valid": False,
                "data": data,
            }
    return types.CallToolResult(
        content=[types.TextContent(type="text", text=envelope(error, changes=tool.changes))],
        structured_content=workflow(error, tool.name, cached, changes=tool.changes),
        is_error=True,
    )


def _short(value: Any) -> str | bool:
    """Of a parameter, for the log: names and flags, and no more than a name may have."""
    return value if isinstance(value, bool) else value[:128] if isinstance(value, str) else "?"


def _note(tool: str, given: dict[str, Any], error: HiveError) -> None:
    """One line of the log for a call that failed (R182): what was said in it is nobody's business.

    A daemon that nobody reaches, however often, is for a person to see to (R197).
    """
    level = logging.getLevelName(error.level.upper())
    if isinstance(error, DaemonUnreachable) and tried_of(error).calls > 1:
        level = logging.CRITICAL
    log.log(
        level if isinstance(level, int) else logging.WARNING,
        "%s failed: %s %s (retryable %s, calls %d, request %s, params %s)",
        tool,
        error.number or error.code,
        error.message,
        is_retryable(error),
        tried_of(error).calls,
        error.details.get("request_id"),
        json.dumps({name: _short(given[name]) for name in _LOGGED if name in given}),
        exc_info=error if log.isEnabledFor(logging.DEBUG) else None,
    )

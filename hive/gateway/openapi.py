"""hive's own surface as an OpenAPI 3.1 document, made from the routes and what stands at their handlers.

A route is described where its handler is written: `@described` says what it takes and answers, its
docstring what it does, auth.needed_scope who may. Inference is not here: what `/v1/…` takes is the
engine's to say.
"""

import inspect
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from hive import __version__
from hive.errors import (
    Conflict,
    Forbidden,
    HiveError,
    InternalError,
    NotFound,
    RequestTimeout,
    SchemaInvalid,
    Unauthorized,
    ValidationFailed,
)
from hive.gateway import shapes
from hive.gateway.auth import needed_scope

PATH = "/hive/v1/openapi.json"
_OWN = re.compile(r"/hive/v1/|/(?:livez|readyz|metrics)\Z")
_CHOICES = re.compile(r"\(\?P<(\w+)>([\w|]+)\)")
_VARIABLE = re.compile(r"\{(\w+)\}")
_REFERENCES = re.compile(r" \((?:[RC]\d+[-, ]*)+\)")  # to requirements and decisions
JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
_REF = "#/components/schemas/{name}"
ABOUT = """\
What operators and owners of context windows ask hive itself. With a key configured, everything but
/livez and /readyz needs one; the scopes that an operation needs stand at its security, none of them
where any key will do. A path of GET without a stream takes HEAD as well. Every answer has
X-Request-Id. An error's `code` is one of those named at its status; docs/errors.md explains all of them.

Whatever the path, a request can be refused before it is looked at: 400 for what is not HTTP, 404
NOT_FOUND, 405 HTTP_ERROR, and 503 without a body when there are too many connections.
Sessions, windows and backups are there when a model has windows.
"""

F = TypeVar("F", bound=Callable[..., Awaitable[web.StreamResponse]])
Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Description:
    """What a handler takes and answers; see `described`."""

    answers: Mapping[int, Any]
    errors: tuple[type[HiveError], ...]
    body: Any
    query: Any
    headers: Mapping[str, str]
    content: tuple[str, ...]

    @property
    def types(self) -> list[Any]:
        told = (*self.answers.values(), self.body, self.query)
        return [one for one in told if one is not None]


_descriptions: dict[Callable[..., Any], Description] = {}


def described(
    answers: Mapping[int, Any],
    *,
    errors: Sequence[type[HiveError]] = (),
    body: Any = None,
    query: Any = None,
    headers: Mapping[str, str] | None = None,
    content: str | tuple[str, ...] = JSON,
) -> Callable[[F], F]:
    """Beside a handler: its good answers by status (a type; None without a body), and its errors.

    `body` is the type that the handler decodes, `query` a type with a field for each parameter,
    `headers` tell what the handler reads of them. What every handler can answer is added: 401, 403,
    404 of paths with variables, 409 of a request id that is in flight, 400 and 504 of bodies, 500.
    """

    def note(handler: F) -> F:
        types = (content,) if isinstance(content, str) else content
        _descriptions[handler] = Description(
            answers, tuple(errors), body, query, headers or {}, types
        )
        return handler

    return note


@dataclass(frozen=True, slots=True)
class Served:
    """A route as it is told to people: `choices` are what some variables of its path can be."""

    method: str
    path: str
    choices: Mapping[str, list[str]]
    handler: Callable[..., Any]

    @property
    def scope(self) -> str | None:
        return needed_scope(self.path)

    @property
    def what(self) -> str:
        """The first line of its handler's docstring, without references to requirements."""
        line = inspect.cleandoc(self.handler.__doc__ or "").partition("\n")[0]
        return _REFERENCES.sub("", line)

    @property
    def is_own(self) -> bool:
        """hive's own surface, which the document describes."""
        return _OWN.match(self.path) is not None

    @property
    def description(self) -> Description | None:
        return _descriptions.get(self.handler)


def served(app: web.Application) -> Iterator[Served]:
    """Every route; HEAD, which aiohttp adds to GETs, is not told."""
    for route in app.router.routes():
        if route.method == "HEAD":
            continue
        assert route.resource is not None
        info = route.resource.get_info()
        path = str(info.get("path") or info["formatter"])
        pattern = info["pattern"].pattern if "pattern" in info else ""
        choices = {name: told.split("|") for name, told in _CHOICES.findall(pattern)}
        handler = getattr(route.handler, "__func__", route.handler)
        yield Served(route.method, path, choices, handler)


def undescribed(app: web.Application) -> list[str]:
    """Own routes without a description, and descriptions without a route."""
    own = [one for one in served(app) if one.is_own]
    found = [f"{one.method} {one.path}" for one in own if one.description is None]
    routed = {one.handler for one in own}
    return found + [one.__qualname__ for one in _descriptions if one not in routed]


def document(app: web.Application) -> Schema:
    """The OpenAPI 3.1 document of the own routes that `app` serves."""
    found = [(one, told) for one in served(app) if one.is_own and (told := one.description)]
    types = {id(kind): kind for _, told in found for kind in told.types}
    made, schemas = msgspec.json.schema_components(
        [*types.values(), shapes.Error], ref_template=_REF
    )
    schema_of = dict(zip(types, made[:-1], strict=True))
    paths: dict[str, Schema] = {}
    queries = set()
    for one, told in sorted(found, key=lambda pair: (pair[0].path, pair[0].method)):
        parameters: list[Schema] = []
        if told.query is not None:
            name = schema_of[id(told.query)]["$ref"].rpartition("/")[2]
            queries.add(name)
            parameters = list(_query_parameters(schemas[name]))
        operation = _operation(one, told, parameters, schema_of)
        paths.setdefault(one.path, {})[one.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "hive", "version": __version__, "description": ABOUT},
        "paths": paths,
        "components": {
            "schemas": {name: it for name, it in sorted(schemas.items()) if name not in queries},
            "parameters": _PARAMETERS,
            "headers": _HEADERS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


_PARAMETERS: Schema = {
    "RequestId": {
        "name": "X-Request-Id",
        "in": "header",
        "description": "The request's name in answers, logs and engines: 1 to 128 of letters, digits, "
        "'.', '_' and '-'. hive makes one in place of any other.",
        "schema": {"type": "string"},
    }
}
_HEADERS: Schema = {
    "RequestId": {
        "description": "The request's id.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    },
    "RetryAfter": {
        "description": "Whole seconds until it is worth trying again; absent when waiting is no help.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 30},
    },
    "RetryAfterMs": {
        "description": "The same, unrounded, in milliseconds.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "Reason": {"description": "The reason, as in the body.", "schema": {"type": "string"}},
    "ShouldRetry": {
        "description": "Whether the same request can succeed later without anybody's doing.",
        "required": True,
        "schema": {"type": "string", "enum": ["true", "false"]},
    },
    "Authenticate": {"required": True, "schema": {"type": "string", "enum": ["Bearer"]}},
}


def _header(name: str) -> Schema:
    return {"$ref": f"#/components/headers/{name}"}


def _query_parameters(schema: Schema) -> Iterator[Schema]:
    for name, about in schema["properties"].items():
        own = dict(about)
        told = {"description": text} if (text := own.pop("description", "")) else {}
        own.pop("default", None)
        yield {"name": name, "in": "query", **told, "schema": own}


def _operation(
    one: Served, told: Description, parameters: list[Schema], schema_of: Mapping[int, Schema]
) -> Schema:
    variables = _VARIABLE.findall(one.path)
    for name in variables:
        choices: Schema = {"enum": one.choices[name]} if name in one.choices else {}
        schema = {"type": "string", **(choices or {"minLength": 1})}
        parameters.append({"name": name, "in": "path", "required": True, "schema": schema})
    for name, about in told.headers.items():
        text = {"type": "string"}
        parameters.append({"name": name, "in": "header", "description": about, "schema": text})
    parameters.append({"$ref": "#/components/parameters/RequestId"})
    found: Schema = {
        "operationId": f"{one.handler.__module__.rpartition('.')[2]}_{one.handler.__name__}",
        "summary": one.what,
        "tags": [one.path.removeprefix("/hive/v1").split("/")[1]],
        "security": _security(one.scope),
        "parameters": parameters,
    }
    if told.body is not None:
        content = {JSON: {"schema": schema_of[id(told.body)]}}
        found["requestBody"] = {"content": content, "required": _is_needed(told.body)}
    found["responses"] = _responses(one, told, schema_of, has_variables=bool(variables))
    return found


def _is_needed(body: Any) -> bool:
    """No body is an empty object, which will do where every member has a default."""
    return any(field.required for field in msgspec.structs.fields(body))


def _security(scope: str | None) -> list[Schema]:
    if scope is None:
        return []
    needed = [] if scope == "any" else [scope]
    return [{"bearer": needed}, {"key": needed}]


def _responses(
    one: Served,
    told: Description,
    schema_of: Mapping[int, Schema],
    *,
    has_variables: bool,
) -> Schema:
    found: dict[str, Schema] = {}
    for status, kind in told.answers.items():
        answer: Schema = {"description": _phrase(status), "headers": {"X-Request-Id": _id()}}
        if kind is not None:
            schemas = {JSON: schema_of[id(kind)]}
            answer["content"] = {
                content: {"schema": schemas.get(content, {"type": "string"})}
                for content in told.content
            }
        found[str(status)] = answer
    for status, classes in _by_status(one, told, has_variables=has_variables).items():
        refused = _refusal(status, classes)
        if str(status) in found:  # /readyz says no in its own words
            schema = found[str(status)]["content"][JSON]
            schema["schema"] = {"anyOf": [schema["schema"], refused["content"][JSON]["schema"]]}
        else:
            found[str(status)] = refused
    return dict(sorted(found.items()))


def _by_status(
    one: Served, told: Description, *, has_variables: bool
) -> dict[int, list[type[HiveError]]]:
    classes: set[type[HiveError]] = {*told.errors, Conflict, InternalError}
    if one.scope is not None:
        classes.add(Unauthorized)
    if one.scope not in (None, "any"):
        classes.add(Forbidden)
    if has_variables:
        classes.add(NotFound)
    if told.body is not None:
        classes |= {SchemaInvalid, ValidationFailed, RequestTimeout}
    found: dict[int, list[type[HiveError]]] = {}
    for cls in sorted(classes, key=lambda cls: cls.code):
        found.setdefault(cls.status, []).append(cls)
    return found


def _refusal(status: int, classes: Sequence[type[HiveError]]) -> Schema:
    codes = [cls.code for cls in classes]
    headers = {"X-Request-Id": _id(), "x-should-retry": _header("ShouldRetry")}
    if any(cls.retryable for cls in classes):
        headers |= {
            "Retry-After": _header("RetryAfter"),
            "retry-after-ms": _header("RetryAfterMs"),
            "X-Hive-Reason": _header("Reason"),
        }
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = _header("Authenticate")
    schema = {
        "allOf": [
            {"$ref": _REF.format(name="Error")},
            {"properties": {"error": {"properties": {"code": {"enum": codes}}}}},
        ]
    }
    # Written while a stream's request is refused, too: an error is always JSON.
    said = "; ".join(f"{cls.code}: {cls.summary.rstrip('.')}" for cls in classes)
    return {
        "description": f"{said}.",
        "headers": headers,
        "content": {JSON: {"schema": schema}},
    }


def _id() -> Schema:
    return _header("RequestId")


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase


class OpenApi:
    """The document, for whoever writes a client."""

    def __init__(self) -> None:
        self._made = b""

    def routes(self) -> list[web.RouteDef]:
        return [web.get(PATH, self.openapi)]

    @described({200: dict[str, Any]})
    async def openapi(self, request: web.Request) -> web.Response:
        """This surface, as served here, as an OpenAPI 3.1 document."""
        if not self._made:
            self._made = json.dumps(document(request.app)).encode()
        return web.Response(body=self._made, content_type=JSON)

"""Requests to the daemon, with its errors turned back into hive's."""

import contextlib
import json
import math
import os
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from hive.errors import ConfigInvalid, DaemonUnreachable, HiveError, OperationTimeout, by_code
from hive.settings import DEFAULT_FILES, text_of

NO_CONTENT = 204
_PASSING = (429, 502, 503, 504)  # of a proxy before the daemon
EVENTS = "text/event-stream"


def address(url: str | None) -> str:
    """The daemon's URL: as given, else from the configuration, else the default port."""
    if url:
        return (url if "://" in url else f"http://{url}").rstrip("/")
    named = os.environ.get("HIVE_CONFIG")
    file = Path(named) if named else next((p for p in DEFAULT_FILES if p.is_file()), None)
    server: Any = {}
    if file is not None:
        # `hive check` tells what is wrong with it; here only the address matters.
        with contextlib.suppress(ConfigInvalid, ValueError, RecursionError):
            server = tomllib.loads(text_of(file)).get("server")
    given = server if isinstance(server, dict) else {}
    host = os.environ.get("HIVE_SERVER__HOST", str(given.get("host", "127.0.0.1")))
    port = os.environ.get("HIVE_SERVER__PORT", given.get("port", 7411))
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 (not bound here)
    return f"http://{host}:{port}"


def place(*parts: str, **query: object) -> str:
    """Where something of hive's own is; parts and values may be anything, None is left out."""
    path = "/".join(quote(part, safe="", errors="surrogateescape") for part in parts)
    asked = {name: value for name, value in query.items() if value is not None}
    more = f"?{urlencode(asked, errors='surrogateescape')}" if asked else ""
    return f"/hive/v1/{path}{more}"


async def asked(method: str, path: str, **daemon: Any) -> Any:
    """One request; the decoded JSON, None where there is none.

    Raises HiveError as the daemon told it, DaemonUnreachable, OperationTimeout.
    """
    async with opened(method, path, **daemon) as answer:
        return None if answer.status == NO_CONTENT else await answer.json()


async def watched(
    method: str, path: str, told: Callable[[str, int, int], None], **daemon: Any
) -> Any:
    """One request, of whose progress `told` hears phase, done and total; else as `asked`."""
    kind, data = "", b""
    async with opened(method, path, headers={"Accept": EVENTS}, **daemon) as answer:
        if answer.content_type != EVENTS:
            raise told_error(b"", answer.status)
        async for kind, data in events(answer.content):  # to its end: who leaves is noticed
            if kind == "progress":
                one = json.loads(data)
                told(one["phase"], one["done"], one["total"])
    if kind == "result":
        return json.loads(data)
    if kind == "error":
        raise told_error(data, answer.status)
    raise _cut_off(address(daemon["url"]))


async def events(content: Any) -> AsyncIterator[tuple[str, bytes]]:
    """Kind and data of each event; the data is one line, however long."""
    rest = bytearray()
    async for piece in content.iter_any():
        seen = max(0, len(rest) - 1)
        rest += piece
        while (end := rest.find(b"\n\n", seen)) >= 0:
            fields = dict(line.partition(b": ")[::2] for line in bytes(rest[:end]).split(b"\n"))
            yield fields.get(b"event", b"").decode(), fields.get(b"data", b"")
            del rest[: end + 2]
            seen = 0


def was_not_sent(error: BaseException) -> bool:
    """Nobody listened, so nothing of a request has arrived anywhere: it may be sent again."""
    import aiohttp

    is_connecting = isinstance(error.__cause__, aiohttp.ClientConnectorError)
    return isinstance(error, DaemonUnreachable) and is_connecting


def is_told(error: HiveError) -> bool:
    """The daemon has said it, and not only nobody answered."""
    return "http_status" in error.details


@asynccontextmanager
async def opened(
    method: str,
    path: str,
    *,
    url: str | None,
    api_key: str | None,
    timeout_s: float,
    is_endless: bool = False,
    accept: tuple[int, ...] = (),
    **kwargs: Any,
) -> AsyncIterator[Any]:
    import aiohttp

    base = address(url)
    limit = aiohttp.ClientTimeout(total=None if is_endless else timeout_s, sock_connect=timeout_s)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with (
            aiohttp.ClientSession(timeout=limit, headers=headers) as session,
            session.request(method, base + path, allow_redirects=False, **kwargs) as answer,
        ):
            if answer.status >= 300 and answer.status not in accept:  # noqa: PLR2004
                after = answer.headers.get("Retry-After")
                raise told_error(await answer.read(), answer.status, after)
            yield answer
    except TimeoutError as exc:  # before ClientError: aiohttp's timeouts are both
        raise OperationTimeout(
            f"The daemon did not answer within {timeout_s:g} s.",
            action="Look at the daemon's log, or allow more time with --timeout.",
        ) from exc
    except (
        aiohttp.ClientConnectionError,
        aiohttp.InvalidURL,
        aiohttp.NonHttpUrlClientError,
    ) as exc:
        raise DaemonUnreachable(f"The hive daemon cannot be reached at {base}.") from exc
    except aiohttp.ClientPayloadError as exc:
        raise _cut_off(base) from exc
    except (aiohttp.ClientError, ValueError) as exc:  # no HTTP, or no JSON
        raise not_hives("something") from exc


def _cut_off(base: str) -> DaemonUnreachable:
    return DaemonUnreachable(
        f"The hive daemon at {base} ended in the middle of its answer.",
        action="Start it with 'hive serve'; then look how far it came before you try again.",
    )


class _Told(HiveError):
    """An error of a code that this version of hive does not know."""


def not_hives(what: str) -> HiveError:
    """An answer of something else that listens there."""
    return _Told(
        f"The daemon answered with {what} that is not hive's.",
        action="Check that --url names a hive daemon.",
    )


def told_error(text: bytes, status: int, retry_after: str | None = None) -> HiveError:
    """The daemon's error, as the class that it was there; or of what stands before it."""
    try:
        told = json.loads(text)["error"]
        details = dict(told.get("details", {}))
        code, message = str(told["code"]), str(told["message"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        error = not_hives(f"status {status} and something")
        error.retryable = status in _PASSING  # type: ignore[misc]
        error.retry_after_s = _seconds(retry_after)
        return error
    kind = by_code(code)
    cls = _Told if kind is None or code == "HTTP_ERROR" else kind
    error = cls(message, action=details.get("suggested_action"), param=told.get("param"))
    error.details = details
    error.retry_after_s = _seconds(details.get("retry_after_seconds"))
    error.retryable = details.get("retryable", cls.retryable) is True  # type: ignore[misc]
    return error


def _seconds(told: object) -> float | None:
    """As a header or a body says it; what is no number of seconds is nothing."""
    try:
        seconds = float(str(told))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None

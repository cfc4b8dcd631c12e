"""The CLI's way to the daemon: HTTP, with its errors turned back into hive's."""

import asyncio
import codecs
import contextlib
import json
import math
import os
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import click

from hive.errors import ConfigInvalid, DaemonUnreachable, HiveError, OperationTimeout, by_code
from hive.policy.retries import RETRIES
from hive.settings import DEFAULT_FILES, text_of

TIMEOUT_S = 30.0
PATIENT_S = 330.0  # for what the daemon itself may take 300 s for
LONGEST_S = 86_400.0
NO_CONTENT = 204
EVENTS = "text/event-stream"


class Duration(click.FloatRange):
    """Seconds as an option's value: no less than `min`, and no number that is none."""

    name = "seconds"

    def __init__(self, *, min_open: bool = True) -> None:
        super().__init__(0, LONGEST_S, min_open=min_open)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


def _key(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value and not value.isprintable():
        raise click.BadParameter("a key has no line breaks or control characters")
    return value


def daemon_options(command: Any, timeout_s: float = TIMEOUT_S) -> Any:
    """--url, --api-key and --timeout of every command that talks to the daemon."""
    for option in (
        click.option(
            "--timeout",
            "timeout_s",
            type=Duration(),
            default=timeout_s,
            show_default=True,
            help="Seconds to wait for the daemon.",
        ),
        click.option(
            "--api-key",
            envvar="HIVE_API_KEY",
            callback=_key,
            help="Key to authenticate with (or HIVE_API_KEY).",
        ),
        click.option(
            "--url",
            envvar="HIVE_URL",
            help="The daemon's address (or HIVE_URL); default: from the configuration file.",
        ),
    ):
        command = option(command)
    return command


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


def patient_options(command: Any) -> Any:
    """The same for a command that may take minutes."""
    return daemon_options(command, PATIENT_S)


def place(*parts: str, **query: object) -> str:
    """Where something of hive's own is; parts and values may be anything, None is left out."""
    path = "/".join(quote(part, safe="", errors="surrogateescape") for part in parts)
    asked = {name: value for name, value in query.items() if value is not None}
    more = f"?{urlencode(asked, errors='surrogateescape')}" if asked else ""
    return f"/hive/v1/{path}{more}"


def call(
    method: str, path: str, *, url: str | None, api_key: str | None, timeout_s: float, **kwargs: Any
) -> Any:
    """One request; the decoded JSON. Raises HiveError as the daemon told it, or DaemonUnreachable."""

    async def ask() -> Any:
        async with opened(
            method, path, url=url, api_key=api_key, timeout_s=timeout_s, **kwargs
        ) as answer:
            return None if answer.status == NO_CONTENT else await answer.json()

    return asyncio.run(persistently(ask))


def watch(
    method: str,
    path: str,
    told: Callable[[str, int, int], None],
    *,
    url: str | None,
    api_key: str | None,
    timeout_s: float,
    **kwargs: Any,
) -> Any:
    """One request, of whose progress `told` hears phase, done and total; else as `call`."""

    async def ask() -> Any:
        kind, data = "", b""
        async with opened(
            method,
            path,
            url=url,
            api_key=api_key,
            timeout_s=timeout_s,
            headers={"Accept": EVENTS},
            **kwargs,
        ) as answer:
            if answer.content_type != EVENTS:
                raise _told(b"", answer.status)
            async for kind, data in _events(answer.content):  # to its end: who leaves is noticed
                if kind == "progress":
                    one = json.loads(data)
                    told(one["phase"], one["done"], one["total"])
        if kind == "result":
            return json.loads(data)
        if kind == "error":
            raise _told(data, answer.status)
        raise _cut_off(address(url))

    return asyncio.run(persistently(ask))


async def _events(content: Any) -> AsyncIterator[tuple[str, bytes]]:
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


async def persistently(ask: Callable[[], Awaitable[Any]]) -> Any:
    """Ask again while nobody listens: the table's row "connect"; each failure is told (C1, R005)."""
    import aiohttp
    from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

    policy = RETRIES["connect"]

    def was_not_sent(exc: BaseException) -> bool:
        is_connecting = isinstance(exc.__cause__, aiohttp.ClientConnectorError)
        return isinstance(exc, DaemonUnreachable) and is_connecting

    def tell(state: RetryCallState) -> None:
        click.echo(
            f"hive: attempt {state.attempt_number} of {policy.calls} found no daemon; the next one "
            f"follows in {state.upcoming_sleep:g} s",
            err=True,
        )

    return await AsyncRetrying(
        stop=stop_after_attempt(policy.calls),
        wait=lambda state: policy.delay_s(state.attempt_number, 0.0),
        retry=retry_if_exception(was_not_sent),
        before_sleep=tell,
        reraise=True,
    )(ask)


def follow(
    path: str,
    show: Callable[[str], None],
    *,
    url: str | None,
    api_key: str | None,
    timeout_s: float,
    params: dict[str, str],
) -> None:
    """Show a text answer as it arrives, until it ends."""

    async def read() -> None:
        async with opened(
            "GET",
            path,
            url=url,
            api_key=api_key,
            timeout_s=timeout_s,
            params=params,
            is_endless=True,
        ) as answer:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            async for piece in answer.content.iter_any():
                show(decoder.decode(piece))

    asyncio.run(read())


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
            session.request(method, base + path, **kwargs) as answer,
        ):
            if answer.status >= 400 and answer.status not in accept:  # noqa: PLR2004
                raise _told(await answer.read(), answer.status)
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


def _cut_off(base: str) -> DaemonUnreachable:
    return DaemonUnreachable(
        f"The hive daemon at {base} ended in the middle of its answer.",
        action="Start it with 'hive serve'; then look how far it came before you try again.",
    )


class _Told(HiveError):
    """An error of a code that this version of hive does not know."""


def _told(text: bytes, status: int) -> HiveError:
    """The daemon's error, as the class that it was there."""
    try:
        told = json.loads(text)["error"]
        details = told.get("details", {})
        code, message = told["code"], told["message"]
    except (ValueError, KeyError, TypeError):
        return _Told(
            f"The daemon answered with status {status} and something that is not hive's.",
            action="Check that --url names a hive daemon.",
        )
    kind = by_code(code)
    cls = _Told if kind is None or code == "HTTP_ERROR" else kind
    error = cls(message, action=details.get("suggested_action"))
    error.details = details
    return error

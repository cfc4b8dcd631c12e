"""The options of every command that asks the daemon, and how it asks."""

import asyncio
import codecs
import math
from collections.abc import Callable
from typing import Any

import click

from hive.client.http import asked, opened, was_not_sent, watched
from hive.client.repeating import Ask, Tried, repeated
from hive.errors import HiveError
from hive.policy.control import command

TIMEOUT_S = 30.0
PATIENT_S = 330.0  # for what the daemon itself may take 300 s for
LONGEST_S = 86_400.0


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


def patient_options(command: Any) -> Any:
    """The same for a command that may take minutes."""
    return daemon_options(command, PATIENT_S)


def call(method: str, path: str, *, timeout_s: float, **daemon: Any) -> Any:
    """One request; the decoded JSON. Raises HiveError as the daemon told it, or DaemonUnreachable."""
    return _asked(
        method, timeout_s, lambda limit_s: asked(method, path, timeout_s=limit_s, **daemon)
    )


def watch(
    method: str,
    path: str,
    told: Callable[[str, int, int], None],
    *,
    timeout_s: float,
    **daemon: Any,
) -> Any:
    """One request, of whose progress `told` hears phase, done and total; else as `call`."""
    return _asked(
        method, timeout_s, lambda limit_s: watched(method, path, told, timeout_s=limit_s, **daemon)
    )


def _asked(method: str, timeout_s: float, ask: Ask) -> Any:
    """What only reads is asked again as the table says; a change only where nobody listened.

    The operator sees each failure, and may break it off (R005).
    """

    def tell(error: HiveError, tried: Tried) -> None:
        what = "found no daemon" if was_not_sent(error) else f"failed: {error.message}"
        click.echo(
            f"hive: attempt {tried.calls} of {tried.most} {what}; the next one follows in "
            f"{tried.next_delay_s:g} s",
            err=True,
        )

    row = command(timeout_s, changes=method != "GET")
    return asyncio.run(repeated(row, ask, tell, lambda: 0.0))


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

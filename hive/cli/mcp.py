"""`hive mcp`: hive's tools for agents, over stdio or HTTP."""

import importlib.util
import json
import os
import sys
from typing import Any

import click

from hive.errors import ConfigInvalid


def _key(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value and not value.isprintable():
        raise click.BadParameter("a key has no line breaks or control characters")
    return value


def _url(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value and "@" in value:
        raise click.BadParameter("name no user or password in it; a key goes into HIVE_API_KEY")
    return value


@click.command()
@click.option(
    "--transport",
    type=click.Choice(["stdio", "http"]),
    default="stdio",
    show_default=True,
    help="stdio: for the client that starts this program; http: streamable HTTP at /mcp.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="http: a loopback address.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=7412, show_default=True, help="http: its port."
)
@click.option(
    "--url",
    envvar="HIVE_URL",
    callback=_url,
    help="The daemon's address (or HIVE_URL); default: from the configuration file.",
)
@click.option(
    "--api-key",
    envvar="HIVE_API_KEY",
    callback=_key,
    help="stdio: key to authenticate with (or HIVE_API_KEY); over http each client sends its own.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least level of the log on stderr.",
)
def mcp(api_key: str | None, **options: Any) -> None:
    """Serve hive's tools to agents (Model Context Protocol), as a client of the daemon's HTTP API.

    The daemon need not run yet: a tool says so as long as it cannot be reached.
    """
    if importlib.util.find_spec("mcp") is None:
        raise ConfigInvalid(
            "The MCP library is not installed beside hive.",
            action="Install hive with its extra: pip install 'hive[mcp]'.",
        )
    environment = dict(os.environ)
    environment.pop("HIVE_API_KEY", None)
    if api_key:
        environment["HIVE_API_KEY"] = api_key  # not an argument: those are everybody's to read
    sys.stdout.flush()
    # A program of its own: neither the daemon nor another command ever has the library in it.
    arguments = [sys.executable, "-m", "hive.mcp", json.dumps(options)]
    os.execve(sys.executable, arguments, environment)  # noqa: S606 (no shell is meant)

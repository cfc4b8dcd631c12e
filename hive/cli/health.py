"""`hive health` and `hive test-connection`: how hive's parts are, asked at this moment."""

import asyncio
from typing import Any

import click

from hive.cli.client import daemon_options
from hive.cli.output import json_option, print_json, print_table, say
from hive.client.http import asked, place


@click.command()
@click.option(
    "--verbose", is_flag=True, help="Each engine, LMCache, the catalogue and devices, too."
)
@daemon_options
@json_option
def health(verbose: bool, as_json: bool, **daemon: Any) -> int:
    """Say ok, degraded (something is wrong) or down (no model can serve); exit 0 for ok alone."""
    found = _ask(place("health"), daemon)
    if as_json:
        print_json(found)
    else:
        say(found["status"])
        if verbose:
            rows = [
                (name, "ok" if one["ok"] else "failed", _what(one))
                for name, one in found["components"].items()
            ]
            print_table(("component", "", "found"), rows)
    return 0 if found["status"] == "ok" else 1


@click.command("test-connection")
@click.option("--engine", is_flag=True, help="Ask every engine, without LMCache.")
@click.option("--lmcache", is_flag=True, help="Ask LMCache, without an engine.")
@click.option("--model", help="With --engine: the engines of this model only.")
@daemon_options
@json_option
def test_connection(
    engine: bool, lmcache: bool, model: str | None, as_json: bool, **daemon: Any
) -> None:
    """Ask the engines or LMCache alone for a sign of life; exit 1 if one gives none."""
    if engine == lmcache:
        raise click.UsageError("Say what to test: --engine or --lmcache.")
    if lmcache and model is not None:
        raise click.UsageError("--model goes with --engine: every model has the same LMCache.")
    part = "engine" if engine else "lmcache"
    found = _ask(place("health", part, model=model), daemon)
    if as_json:
        print_json(found)
        return
    seconds = found["seconds"] if engine else {part: found["seconds"]}
    print_table((part, "", "seconds"), [(name, "ok", s) for name, s in seconds.items()])


def _ask(path: str, daemon: dict[str, Any]) -> Any:
    """Once: whether there is a daemon is a part of the question."""
    return asyncio.run(asked("GET", path, **daemon))


def _what(component: dict[str, Any]) -> str:
    if "seconds" in component:
        return f"answered in {component['seconds']:g} s"
    code = f"{component['code']}: " if "code" in component else ""
    return f"{code}{component['found']}"

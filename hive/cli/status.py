"""`hive status`, `hive health` and `hive test-connection`: how the daemon and its engines are."""

import asyncio
import time
from typing import Any

import click

from hive.cli.client import call, daemon_options, opened
from hive.cli.output import json_option, print_json, print_table, say

SERVICE_UNAVAILABLE = 503


@click.command()
@daemon_options
@json_option
def status(as_json: bool, **daemon: Any) -> None:
    """Show the daemon, its models and workers."""
    found = call("GET", "/hive/v1/status", **daemon)
    if as_json:
        print_json(found)
        return
    state = "draining" if found["draining"] else "ready" if found["ready"] else "not ready"
    say(
        f"hive {found['version']}, pid {found['pid']}, {state}, up "
        f"{found['uptime_seconds']:.0f} s, {found['in_flight']} requests in flight"
    )
    rows = [
        (name, "yes" if model["ready"] else "no", worker, state)
        for name, model in found["models"].items()
        for worker, state in model["workers"].items()
    ]
    print_table(("model", "ready", "worker", "state"), rows)


@click.command()
@click.option("--verbose", is_flag=True, help="Each model and worker, too.")
@daemon_options
@json_option
def health(verbose: bool, as_json: bool, **daemon: Any) -> int:
    """Exit 0 when at least one model can serve, 1 when none can, 255 without a daemon."""

    async def ask() -> Any:
        async with opened("GET", "/readyz", accept=(SERVICE_UNAVAILABLE,), **daemon) as answer:
            return await answer.json()

    found = asyncio.run(ask())
    if as_json:
        print_json(found)
    else:
        say(found["status"])
        if verbose:
            rows = [
                (name, worker, state)
                for name, model in found["models"].items()
                for worker, state in model["workers"].items()
            ]
            print_table(("model", "worker", "state"), rows)
    return 0 if found["status"] == "ready" else 1


@click.command("test-connection")
@click.option("--engine", is_flag=True, help="Ask each engine for its smallest piece of work.")
@daemon_options
@json_option
def test_connection(engine: bool, as_json: bool, **daemon: Any) -> int:
    """Have every READY engine answer one small request through hive; exit 1 if one does not."""
    if not engine:
        raise click.UsageError("Say what to test: --engine.")
    models = call("GET", "/hive/v1/status", **daemon)["models"]
    results = [_try(name, model, daemon) for name, model in models.items()]
    if as_json:
        print_json({"connections": results})
    else:
        rows = [
            (r["model"], "ok" if r["ok"] else "failed", r["answer"], r["seconds"]) for r in results
        ]
        print_table(("model", "", "answer", "seconds"), rows)
    return 0 if all(r["ok"] for r in results) else 1


def _try(name: str, model: dict[str, Any], daemon: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    status = 0
    if not model["ready"]:
        answer = f"not ready: {', '.join(model['workers'].values())}"
    else:
        status, answer = asyncio.run(_tokenize(name, daemon))
    return {
        "model": name,
        "ok": 200 <= status < 300,  # noqa: PLR2004
        "answer": answer,
        "seconds": round(time.monotonic() - began, 3),
    }


async def _tokenize(name: str, daemon: dict[str, Any]) -> tuple[int, str]:
    """A whole request through hive to the engine that costs no generation."""
    body = {"model": name, "prompt": "a"}
    async with opened(
        "POST", "/tokenize", json=body, accept=tuple(range(400, 600)), **daemon
    ) as answer:
        if answer.status < 400:  # noqa: PLR2004
            return answer.status, f"status {answer.status}"
        try:
            told = (await answer.json())["error"]
            return answer.status, f"{told['code']}: {told['message']}"
        except (ValueError, KeyError, TypeError):
            return answer.status, f"status {answer.status}"

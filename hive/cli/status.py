"""`hive status`: the daemon, its models and their workers."""

from typing import Any

import click

from hive.cli.client import call, daemon_options
from hive.cli.output import json_option, print_json, print_table, say


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
        f"hive {found['version']}, pid {found['pid']}, {state}, "
        f"service level {found['service_level']}, up "
        f"{found['uptime_seconds']:.0f} s, {found['in_flight']} requests in flight"
    )
    rows = [
        (name, "yes" if model["ready"] else "no", worker, state)
        for name, model in found["models"].items()
        for worker, state in model["workers"].items()
    ]
    print_table(("model", "ready", "worker", "state"), rows)

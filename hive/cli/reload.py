"""`hive reload`: the daemon reads its configuration again."""

from typing import Any

import click

from hive.cli.client import call, daemon_options
from hive.cli.output import json_option, print_json, say
from hive.errors import DaemonUnreachable


@click.command()
@daemon_options
@json_option
def reload(as_json: bool, **daemon: Any) -> None:
    """Put the changed configuration in force without a restart, all of it or nothing.

    Exit code 1, and nothing has changed, when the configuration is invalid or a key was changed that
    needs a restart; every such key is named. docs/configuration.md says which keys can be reloaded.
    """
    try:
        found = call("POST", "/hive/v1/reload", **daemon)
    except DaemonUnreachable as exc:
        exc.suggested_action = (
            "Start it with 'hive serve'; if server.host or server.port was changed since it started, "
            "name its old address with --url."
        )
        raise
    if as_json:
        print_json(found)
    elif found["changed"]:
        say("\n".join(f"changed: {key}" for key in found["changed"]))
    else:
        say("nothing is different")

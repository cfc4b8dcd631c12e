"""`hive backup`: windows as files that can be kept elsewhere, and windows from such files."""

import sys
from typing import Any

import click

from hive.cli.client import call, daemon_options, watch
from hive.cli.output import (
    clock,
    json_option,
    print_json,
    print_table,
    progress,
    say,
    size_of,
)
from hive.client.http import place
from hive.errors import InvalidParameter

LONG_S = 3600.0  # the disk may be a slow one

owner_option = click.option("--owner", help="With an admin's key: the key whose it is.")


def _reachable(_ctx: click.Context, param: click.Parameter, value: str) -> str:
    """What no URL carries to the daemon is refused as the daemon would."""
    if not value.strip("."):
        raise InvalidParameter(f"Invalid parameter: {param.name}.", param=param.name)
    return value


window_option = click.option(
    "--window", required=True, callback=_reachable, help="The name of the window."
)


def long_options(command: Any) -> Any:
    """Of a command that may take an hour."""
    return daemon_options(command, LONG_S)


@click.group()
def backup() -> None:
    """A backup is a window as one file, in the daemon's directory for them (windows.backup_dir).

    It holds what protects its session: it is for hive's user alone, and never sent anywhere. Copied
    into another hive's directory it is a backup of that one, too.
    """


@backup.command()
@click.argument("window")
@owner_option
@long_options
@json_option
def create(window: str, owner: str | None, as_json: bool, **daemon: Any) -> None:
    """Back WINDOW up. Every block is read and checked on its way."""
    with progress(window) as told:
        path = place("backups", owner=owner)
        found = watch("POST", path, told, json={"window": window}, **daemon)
    if as_json:
        print_json(found)
        return
    size = size_of(found["file_bytes"])
    say(f"{found['window']}: backed up, {found['tokens']} tokens, {size}")
    say(f"timestamp: {found['timestamp']}")


@backup.command("list")
@click.option("--window", help="Only those of this window.")
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="As many at most."
)
@click.option(
    "--offset",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Leave out so many first.",
)
@owner_option
@daemon_options
@json_option
def list_(
    window: str | None, limit: int, offset: int, owner: str | None, as_json: bool, **daemon: Any
) -> None:
    """List the backups, the newest first."""
    path = place("backups", window=window, limit=limit, offset=offset, owner=owner)
    found = call("GET", path, **daemon)
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one["window"],
            one["timestamp"],
            one["owner"],
            one["model"],
            one["tokens"],
            one["blocks"],
            size_of(one["file_bytes"]),
            clock(one["frozen_at"]),
            "" if one["whole"] else "not whole: it cannot be restored",
        )
        for one in found["backups"]
    ]
    columns = ("window", "timestamp", "owner", "model", "tokens", "blocks", "size", "frozen", "")
    print_table(columns, rows)
    for one in found.get("unreadable", ()):
        say(f"hive: {one['file']}: {one['why']}", err=True)
    if "next_offset" in found:
        say(f"hive: there are more: --offset {found['next_offset']}", err=True)


@backup.command()
@window_option
@click.option("--timestamp", help="Which backup of it; else the newest one.")
@click.option("--name", help="Give the window this name, where its own is taken.")
@owner_option
@long_options
@json_option
def restore(
    window: str,
    timestamp: str | None,
    name: str | None,
    owner: str | None,
    as_json: bool,
    **daemon: Any,
) -> None:
    """Have a window again from its backup; `hive window status` shows it then.

    With an admin's key --owner is also who gets what a key of another hive had.
    """
    body = {"window": window, "timestamp": timestamp, "name": name}
    with progress(window) as told:
        path = place("backups", "restore", owner=owner)
        found = watch("POST", path, told, json=body, **daemon)
    if as_json:
        print_json(found)
        return
    size = size_of(found["bytes"])
    at = found["backup"]["timestamp"]
    say(f"{found['name']}: restored, {found['tokens']} tokens, {size}, as of {at}")
    say(f"to see it: hive window status {found['name']}")


@backup.command()
@window_option
@click.option("--timestamp", required=True, callback=_reachable, help="Which backup of it.")
@click.option("--force", is_flag=True, help="Do not ask; needed where there is no terminal.")
@owner_option
@daemon_options
@json_option
def delete(
    window: str, timestamp: str, force: bool, owner: str | None, as_json: bool, **daemon: Any
) -> int:
    """Delete one backup of a window; the window stays. On a terminal it asks first."""
    if not force:
        if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
            raise click.UsageError(
                "There is no terminal to ask on: --force deletes without asking."
            )
        say(f"Delete the backup of {window} of {timestamp}? [y/N] ", err=True, end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("hive: nothing was deleted", err=True)
            return 1
    call("DELETE", place("backups", window, timestamp, owner=owner), **daemon)
    if as_json:
        print_json({"window": window, "timestamp": timestamp, "deleted": True})
    else:
        say(f"{window}: the backup of {timestamp} was deleted")
    return 0

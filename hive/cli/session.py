"""`hive session …`: the conversations that windows are frozen from."""

from typing import Any

import click

from hive.cli.client import call, daemon_options
from hive.cli.output import clock, json_option, print_json, print_table, say
from hive.client.http import place
from hive.errors import InvalidSessionId
from hive.policy.windows import SessionState

owner_option = click.option("--owner", help="With an admin's key: the key whose it is.")


def _reachable(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    """What no URL carries to the daemon is refused as the daemon would."""
    if not value.strip("."):
        raise InvalidSessionId(param="session_id")
    return value


id_argument = click.argument("session_id", metavar="ID", callback=_reachable)


@click.group()
def session() -> None:
    """Sessions are conversations: requests name theirs with the header X-Hive-Session."""


@session.command("list")
@click.option(
    "--state",
    type=click.Choice([str(state) for state in SessionState], case_sensitive=False),
    help="Only those in this state.",
)
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="As many at most."
)
@owner_option
@daemon_options
@json_option
def list_(state: str | None, limit: int, owner: str | None, as_json: bool, **daemon: Any) -> None:
    """List the sessions, the last used first."""
    found = call("GET", place("sessions", state=state, limit=limit, owner=owner), **daemon)
    if as_json:
        print_json(found)
        return
    rows = [
        (s["id"], s["state"], s["model"], s["owner"], clock(s["created_at"]), clock(s["used_at"]))
        for s in found["sessions"]
    ]
    print_table(("session", "state", "model", "owner", "created", "used"), rows)


@session.command()
@id_argument
@owner_option
@daemon_options
@json_option
def show(session_id: str, owner: str | None, as_json: bool, **daemon: Any) -> None:
    """Show one session; --json has its messages, too."""
    found = call("GET", place("sessions", session_id, owner=owner), **daemon)
    if as_json:
        print_json(found)
        return
    rows = [
        ("session", found["id"]),
        ("state", found["state"]),
        ("model", found["model"]),
        ("owner", found["owner"]),
        ("created", clock(found["created_at"])),
        ("used", clock(found["used_at"])),
        ("messages", len(found["messages"])),
    ]
    print_table(("", ""), rows)


@session.command()
@click.argument("model")
@daemon_options
@json_option
def new(model: str, as_json: bool, **daemon: Any) -> None:
    """Begin a session with MODEL, and print its id."""
    found = call("POST", place("sessions"), json={"model": model}, **daemon)
    if as_json:
        print_json(found)
    else:
        say(found["id"])


@session.command()
@id_argument
@owner_option
@daemon_options
@json_option
def delete(session_id: str, owner: str | None, as_json: bool, **daemon: Any) -> None:
    """Delete a session; windows that were frozen from it stay."""
    call("DELETE", place("sessions", session_id, owner=owner), **daemon)
    if as_json:
        print_json({"id": session_id, "deleted": True})
    else:
        say(f"{session_id}: deleted")

"""`hive window …`: contexts that were frozen, and what else is done with them."""

import sys
from collections.abc import Sequence
from typing import Any

import click

from hive.cli.client import call, daemon_options, patient_options, watch
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
from hive.errors import (
    DaemonUnreachable,
    HiveError,
    InvalidWindowName,
    StorageCorrupted,
    WindowNotFound,
)

PAGE = 1000
NAMED = 3  # of the damaged blocks in a line for people
ANY = click.IntRange(0)

owner_option = click.option("--owner", help="With an admin's key: the key whose it is.")


def _reachable(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """What no URL carries to the daemon is refused as the daemon would."""
    if value is not None and not value.strip("."):
        raise InvalidWindowName(param="name")
    return value


name_argument = click.argument("name", callback=_reachable)


@click.group()
def window() -> None:
    """Windows are frozen contexts: a session goes on where it stood, without computing it again."""


# ── freeze and thaw ─────────────────────────────────────────────────────────────────────────────


@window.command()
@click.argument("session_id", metavar="SESSION")
@click.argument("name")
@click.option("--keep-active", is_flag=True, help="The session goes on taking requests.")
@click.option("--description", default="", help="What it is, for people.")
@click.option("--tag", "tags", multiple=True, help="A word to find it by; may be given again.")
@owner_option
@patient_options
@json_option
def freeze(
    session_id: str,
    name: str,
    keep_active: bool,
    description: str,
    tags: tuple[str, ...],
    owner: str | None,
    as_json: bool,
    **daemon: Any,
) -> None:
    """Freeze SESSION into a window of that NAME."""
    body = {
        "session_id": session_id,
        "name": name,
        "keep_active": keep_active,
        "description": description,
        "tags": tags,
    }
    with progress(name) as told:
        found = watch("POST", place("windows", owner=owner), told, json=body, **daemon)
    if as_json:
        print_json(found)
    else:
        size = size_of(found["bytes"])
        say(
            f"{found['name']}: frozen, {found['tokens']} tokens, {_blocks(found['blocks'])}, {size}"
        )


@window.command()
@name_argument
@click.option("--session", "session_id", help="Go on in this one, which it was frozen from.")
@click.option("--require-full", is_flag=True, help="Fail where a part would be computed again.")
@owner_option
@patient_options
@json_option
def thaw(
    name: str,
    session_id: str | None,
    require_full: bool,
    owner: str | None,
    as_json: bool,
    **daemon: Any,
) -> None:
    """Go on where a window was frozen, in a new session unless one is named.

    --json has the messages, too.
    """
    body = {"session_id": session_id, "require_full": require_full}
    path = place("windows", name, "thaw", owner=owner)
    with progress(name) as told:
        found = watch("POST", path, told, json=body, **daemon)
    if as_json:
        print_json(found)
        return
    say(f"session: {found['session_id']}")
    say(f"context: {_promised(found['receipt'])}")
    for warning in found["warnings"]:
        say(f"warning: {warning}")


# ── what there is ───────────────────────────────────────────────────────────────────────────────


@window.command("list")
@click.option("--model", help="Only those of this model.")
@click.option("--session", "session_id", help="Only those frozen from this session.")
@click.option("--tag", help="Only those with this tag.")
@click.option(
    "--sort",
    type=click.Choice(["created_at", "name", "tokens", "bytes"]),
    default="created_at",
    show_default=True,
)
@click.option("--order", type=click.Choice(["asc", "desc"]), default="desc", show_default=True)
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="As many at most."
)
@click.option("--offset", type=ANY, default=0, show_default=True, help="Leave out so many first.")
@owner_option
@daemon_options
@json_option
def list_(as_json: bool, **options: Any) -> None:
    """List the windows, the latest first."""
    daemon = {name: options.pop(name) for name in ("url", "api_key", "timeout_s")}
    found = call("GET", place("windows", **options), **daemon)
    if as_json:
        print_json(found)
        return
    rows = [
        (
            w["name"],
            w["owner"],
            w["model"],
            w["session_id"],
            w["tokens"],
            w["blocks"],
            size_of(w["bytes"]),
            clock(w["created_at"]),
            ", ".join(w["tags"]),
        )
        for w in found["windows"]
    ]
    columns = ("window", "owner", "model", "session", "tokens", "blocks", "size", "frozen", "tags")
    print_table(columns, rows)
    if "next_offset" in found:
        say(f"hive: there are more: --offset {found['next_offset']}", err=True)


@window.command()
@name_argument
@owner_option
@daemon_options
@json_option
def status(name: str, owner: str | None, as_json: bool, **daemon: Any) -> None:
    """Show one window: its model and family, what the cache has of it, and how its last thaw went."""
    found = call("GET", place("windows", name, owner=owner), **daemon)
    if as_json:
        print_json(found)
        return
    in_tier = found["cache"]["files_in_tier"]
    rows = [
        ("window", found["name"]),
        ("state", found["state"]),
        ("description", found["description"]),
        ("tags", ", ".join(found["tags"])),
        ("owner", found["owner"]),
        ("session", found["session_id"]),
        ("model", found["model"]),
        *((k.replace("_", " "), v) for k, v in found["identity"].items()),
        ("frozen", clock(found["created_at"])),
        ("tokens", found["tokens"]),
        ("blocks", found["blocks"]),
        ("size", size_of(found["bytes"])),
        ("files in the KV tier", "not known" if in_tier is None else in_tier),
        ("cloned from", ", ".join(found["lineage"]["ancestors"])),
        ("clones", ", ".join(found["lineage"]["clones"])),
        ("last thaw", _last_thaw(found["receipt"])),
    ]
    print_table(("", ""), rows)


# ── clone and delete ────────────────────────────────────────────────────────────────────────────


@window.command()
@name_argument
@click.argument("new")
@owner_option
@daemon_options
@json_option
def clone(name: str, new: str, owner: str | None, as_json: bool, **daemon: Any) -> None:
    """Make a window NEW of the same blocks, which cost nothing twice."""
    path = place("windows", name, "clone", owner=owner)
    found = call("POST", path, json={"name": new}, **daemon)
    if as_json:
        print_json(found)
    else:
        say(f"{found['name']}: cloned from {name}, {_blocks(found['blocks'])}")


@window.command()
@name_argument
@click.option("--force", is_flag=True, help="Do not ask; needed where there is no terminal.")
@owner_option
@daemon_options
@json_option
def delete(name: str, force: bool, owner: str | None, as_json: bool, **daemon: Any) -> int:
    """Delete a window, whole or damaged. On a terminal it asks first."""
    path = place("windows", name, owner=owner)
    if not force:
        if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
            raise click.UsageError(
                "There is no terminal to ask on: --force deletes without asking."
            )
        found = call("GET", path, **daemon)
        what = f"window {name} ({found['tokens']} tokens, {size_of(found['bytes'])})"
        say(f"Delete {what}? What is in it is lost. [y/N] ", err=True, end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("hive: nothing was deleted", err=True)
            return 1
    call("DELETE", path, **daemon)
    if as_json:
        print_json({"name": name, "deleted": True})
    else:
        say(f"{name}: deleted")
    return 0


# ── diagnose and repair ─────────────────────────────────────────────────────────────────────────


@window.command()
@click.argument("name", required=False, callback=_reachable)
@click.option("--check-integrity", is_flag=True, help="Read every block, and compare.")
@owner_option
@patient_options
@json_option
def diagnose(
    name: str | None, check_integrity: bool, owner: str | None, as_json: bool, **daemon: Any
) -> int:
    """Find damaged windows: exit 1 if there is one, or one that could not be checked.

    Without --check-integrity nothing is read: how each was thawed last is shown.
    """
    if name is None:
        windows = _all(owner, daemon)
    else:
        windows = [call("GET", place("windows", name, owner=owner), **daemon)]
    if not check_integrity:
        _show_receipts(windows, as_json=as_json)
        return 0
    found = []
    for at, one in enumerate(windows):
        with progress(f"{one['name']} ({at + 1} of {len(windows)})") as told:
            if checked := _checked(one, told, daemon, is_only=name is not None):
                found.append(checked)
    bad = [one["name"] for one in found if one["state"] != "whole"]
    if as_json:
        print_json({"windows": found})
    else:
        rows = [
            (one["name"], one["owner"], one["state"], _count(one), _damage(one)) for one in found
        ]
        print_table(("window", "owner", "state", "blocks whole", "found"), rows)
    if bad:
        say(f"hive: {len(bad)} of {len(found)} windows are not whole", err=True)
        say(
            "hive: what to do: 'hive window repair WINDOW' says what can be mended; one whose "
            "manifest is damaged can only be deleted",
            err=True,
        )
    return 1 if bad else 0


def _all(owner: str | None, daemon: dict[str, Any]) -> list[dict[str, Any]]:
    """Every window, page by page."""
    windows: list[dict[str, Any]] = []
    begin: int | None = 0
    while begin is not None:
        path = place("windows", sort="name", order="asc", limit=PAGE, offset=begin, owner=owner)
        page = call("GET", path, **daemon)
        windows += page["windows"]
        begin = page.get("next_offset")
    return windows


def _show_receipts(windows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json({"windows": windows})
        return
    rows = [
        (w["name"], w["owner"], w["tokens"], w["blocks"], _last_thaw(w["receipt"])) for w in windows
    ]
    print_table(("window", "owner", "tokens", "blocks", "last thaw"), rows)
    say("hive: nothing was checked: --check-integrity reads every block", err=True)


def _checked(
    one: dict[str, Any], told: Any, daemon: dict[str, Any], *, is_only: bool
) -> dict[str, Any] | None:
    """What is wrong with a window; None where it was deleted meanwhile."""
    shown = {"name": one["name"], "owner": one["owner"]}
    # Whose it is must be said where everybody's are looked at: names are each key's own.
    path = place("windows", one["name"], "verify", owner=one["owner"] or "")
    try:
        report = watch("POST", path, told, **daemon)
    except StorageCorrupted as exc:  # not even its manifest can be read
        return {**shown, "state": "damaged", "code": exc.code, "found": exc.message}
    except HiveError as exc:
        if is_only or isinstance(exc, DaemonUnreachable):
            raise
        if isinstance(exc, WindowNotFound):
            return None
        return {**shown, "state": "not checked", "code": exc.code, "found": exc.message}
    return {**shown, "state": "whole" if report["whole"] else "damaged", **report}


@window.command()
@name_argument
@click.option("--attempt-recovery", is_flag=True, help="Do it; else it is only said what is wrong.")
@owner_option
@patient_options
@json_option
def repair(
    name: str, attempt_recovery: bool, owner: str | None, as_json: bool, **daemon: Any
) -> int:
    """Mend a window's damaged blocks: exit 1 if it is not whole at the end.

    A block is taken from the KV cache's files where the same bytes are there, else its model
    computes it again.
    """
    path = place("windows", name, "repair" if attempt_recovery else "verify", owner=owner)
    with progress(name) as told:
        found = watch("POST", path, told, **daemon)
    if as_json:
        print_json(found)
    elif attempt_recovery:
        _say_mended(found)
    else:
        _say_what_it_would(found)
    return 0 if found["whole"] else 1


def _say_mended(report: dict[str, Any]) -> None:
    recovered, recomputed = report["recovered"], report["recomputed"]
    if recovered or recomputed:
        say(f"{report['name']}: {_blocks(recovered)} recovered from the KV cache's files")
        say(f"{report['name']}: {_blocks(recomputed)} computed again")
    else:
        say(f"{report['name']}: nothing was damaged")
    say(f"{report['name']}: {_count(report)} blocks are whole")


def _say_what_it_would(report: dict[str, Any]) -> None:
    if report["whole"]:
        say(f"{report['name']}: nothing is damaged; {_count(report)} blocks are whole")
        return
    damaged = report["blocks"] - report["blocks_whole"]
    say(f"{report['name']}: {_count(report)} blocks are whole; {_damage(report)}")
    say(
        f"{report['name']}: --attempt-recovery would take {_blocks(damaged)} from the KV cache's "
        "files, or compute what is not there again"
    )


# ── words ───────────────────────────────────────────────────────────────────────────────────────


def _last_thaw(receipt: dict[str, Any] | None) -> str:
    """What it promised, and what the engine then found."""
    if receipt is None:
        return "never thawed"
    proof = "not asked yet"
    if "cached_tokens" in receipt:
        proof = f"the engine had {receipt['cached_tokens']} in its cache"
    return f"{_promised(receipt)}; {proof}"


def _promised(receipt: dict[str, Any]) -> str:
    again = receipt["recompute_tokens"]
    return f"{receipt['usable_tokens']} tokens usable, {again} to compute again"


def _count(report: dict[str, Any]) -> str:
    return f"{report['blocks_whole']} of {report['blocks']}" if "blocks" in report else ""


def _damage(report: dict[str, Any]) -> str:
    if "code" in report:
        return f"{report['code']}: {report['found']}"
    kinds = [
        f"{len(report[kind])} {kind} ({_first(report[kind])})"
        for kind in ("missing", "corrupt")
        if report[kind]
    ]
    return ", ".join(kinds)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


def _blocks(count: int) -> str:
    return f"{count} block{'' if count == 1 else 's'}"

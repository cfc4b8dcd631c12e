"""`hive audit …`: look at the log of who did what, and prove that nobody changed it."""

from pathlib import Path
from typing import Any

import click

from hive.cli.client import call, daemon_options
from hive.cli.output import json_option, print_json, print_table, say
from hive.cli.serve import config_option
from hive.errors import NotFound, StorageReadFailed
from hive.settings import load
from hive.storage.audit import Verdict, verify
from hive.telemetry.audit import DIRECTORY

MOST = 1000
COLUMNS = ("index", "time", "who", "what", "of", "outcome", "request")


@click.group()
def audit() -> None:
    """Who did what, as a chain of records: docs/audit.md."""


@audit.command("list")
@click.option(
    "--lines",
    type=click.IntRange(1, MOST),
    default=50,
    show_default=True,
    help="So many of the newest records.",
)
@daemon_options
@json_option
def list_(lines: int, as_json: bool, **daemon: Any) -> None:
    """Show the newest records, the newest last."""
    found = call("GET", f"/hive/v1/audit?limit={lines}", **daemon)
    if as_json:
        print_json(found)
        return
    rows = [
        (
            *(one[key] for key in ("index", "timestamp", "actor", "action", "target", "outcome")),
            one["request_id"] or "",
        )
        for one in reversed(found["records"])
    ]
    print_table(COLUMNS, rows)


@audit.command("verify")
@config_option
@click.option("--state-dir", type=click.Path(path_type=Path), help="Overrides server.state_dir.")
@click.option(
    "--head",
    help="A record's hash that was kept elsewhere: it must be in the log.",
)
@json_option
def verify_(config: Path | None, state_dir: Path | None, head: str | None, as_json: bool) -> int:
    """Check every record of every file; needs no daemon, and may run beside one.

    Exit code 1 names the first record that was changed, removed, added or moved.
    """
    if state_dir is None:
        state_dir = load(config).server.state_dir
    directory = state_dir / DIRECTORY
    if not directory.is_dir():  # a wrong name, or somebody removed it: that is not well
        raise NotFound(
            f"{directory}: there is no audit log.",
            action="Name hive's own directory by --state-dir or --config; it is made at the first "
            "start of 'hive serve', and nothing of hive's ever removes it.",
        )
    try:
        verdict = verify(directory, head)
    except OSError as exc:
        raise StorageReadFailed(
            f"{exc.filename or directory}: cannot be read: {exc.strerror}.",
            action="Run it as the user that hive runs as, or as root.",
        ) from exc
    if as_json:
        print_json(_view(verdict))
    else:
        _show(verdict)
    return 1 if verdict.problem else 0


def _view(verdict: Verdict) -> dict[str, Any]:
    problem = verdict.problem
    return {
        "ok": problem is None,
        "records": verdict.records,
        "files": verdict.files,
        "first_index": verdict.first,
        "last_index": verdict.last.index if verdict.records else None,
        "head": verdict.last.hash if verdict.records else None,
        "unfinished_bytes": verdict.unfinished,
        "problem": None
        if problem is None
        else {
            "file": problem.file,
            "line": problem.line or None,
            "index": problem.index if problem.index >= 0 else None,
            "what": problem.what,
        },
    }


def _show(verdict: Verdict) -> None:
    if verdict.problem:
        say(f"the audit log was changed: {verdict.problem}", err=True)
        say("hive: what to do: keep the directory as it is; docs/audit.md, 'What to do'", err=True)
        return
    say(f"{verdict.records} records in {verdict.files} files are whole and in order")
    if verdict.records:
        say(f"the last one is {verdict.last.index}, its hash {verdict.last.hash}")
    if verdict.unfinished:
        say(f"{verdict.unfinished} bytes follow it: hive is writing, or was killed while it did")

"""`hive leaks` shows what workers did not give back, `hive sweep` clears what a dead hive left."""

import asyncio
from pathlib import Path
from typing import Any

import click

from hive.cli.client import call, daemon_options
from hive.cli.output import error_body, json_option, print_json, print_table, say, show_error
from hive.cli.serve import config_option
from hive.settings import load

COLUMNS = ("kind", "holder", "worker", "how to clear")


@click.command()
@daemon_options
@json_option
def leaks(as_json: bool, **daemon: Any) -> int:
    """List what workers did not give back, and how to clear it; exit 1 when there is something."""
    found = call("GET", "/hive/v1/leaks", **daemon)
    if as_json:
        print_json(found)
    elif found["leaks"]:
        rows = [(x["kind"], x["holder"], x["worker"], x["how_to_clear"]) for x in found["leaks"]]
        print_table(COLUMNS, rows)
    else:
        print("nothing is leaked")
    return 1 if found["leaks"] else 0


@click.command()
@config_option
@click.option("--state-dir", type=click.Path(path_type=Path), help="Overrides server.state_dir.")
@click.option(
    "--runtime-dir", type=click.Path(path_type=Path), help="Overrides server.runtime_dir."
)
@json_option
def sweep(config: Path | None, as_json: bool, **server: Any) -> int:
    """End and remove what a hive that was killed left behind; needs no daemon.

    Refuses while a hive runs in these directories. Exit 1 when something stays, or when a file of
    the journal cannot be trusted.
    """
    from hive.daemon import only_daemon
    from hive.workers import directories, janitor
    from hive.workers.ledger import Ledger

    settings = load(config, {"server": server})
    for key, path in directories.both(settings):
        with directories.usable(key, path):
            if path.exists():
                # Another user's journal proves nothing; root would set it aside as a forgery.
                directories.check_owner(key, path)
    ledger = Ledger(settings.server.state_dir / "ledger", announce=lambda _event: None)
    with only_daemon(settings):
        found = asyncio.run(janitor.sweep(ledger, settings.server.runtime_dir))
    error = ledger.error()
    if as_json:
        rows = [
            {"kind": x.kind, "holder": x.holder, "worker": x.worker, "outcome": x.outcome}
            | ({"why": x.why} if x.why else {})
            for x in found
        ]
        print_json({"found": rows} | (error_body(error) if error else {}))
    else:
        for one in found:
            say(one)
        if not found:
            print("nothing was left")
    if error:
        show_error(error, as_json=False)
    return 1 if error or any(one.outcome == "refused" for one in found) else 0

"""`hive alerts`: what escalated and is not over, and what waits to be sent to the webhook."""

from typing import Any

import click

from hive.cli.client import call, daemon_options
from hive.cli.output import clock, json_option, print_json, print_table, say


@click.command()
@daemon_options
@json_option
def alerts(as_json: bool, **daemon: Any) -> int:
    """Show what escalated and is not over, and the webhook's outbox; exit 1 when there is something."""
    found = call("GET", "/hive/v1/alerts", **daemon)
    open_ = found["alerts"]
    if as_json:
        print_json(found)
        return 1 if open_ else 0
    say(f"service level: {found['service_level']}")
    if open_:
        rows = [
            (
                one["level"],
                one["rule"],
                one["subject"],
                one["code"],
                f"{one['seconds']:.0f} s",
                one["repeats"],
                one["recommended_action"],
            )
            for one in open_
        ]
        print_table(("level", "rule", "subject", "code", "since", "again", "what to do"), rows)
    else:
        say("nothing has escalated that is not over")
    for line in _about(found["outbox"]):
        say(line)
    return 1 if open_ else 0


def _about(outbox: dict[str, Any]) -> list[str]:
    """The outbox in a line or two."""
    if not outbox["enabled"]:
        return ["webhook: none (alerts.webhook_url is not set)"]
    waiting = f"webhook: {outbox['waiting']} messages wait to be sent"
    if outbox["waiting"] and outbox["last_error"]:
        waiting += (
            f", the oldest since {clock(outbox['oldest_at'])}: {outbox['attempts']} tries, the last "
            f"one failed ({outbox['last_error']}), the next in {outbox['next_try_seconds']:.0f} s"
        )
    lines = [waiting]
    if outbox["disk_error"]:
        lines.append(f"webhook: what waits cannot be written down: {outbox['disk_error']}")
    return lines

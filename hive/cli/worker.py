"""`hive worker …`: list, show, start, stop, drain, restart and release workers, and their logs."""

import sys
import time
from typing import Any

import click

from hive.cli.client import Duration, call, daemon_options, follow
from hive.cli.output import clock, json_option, print_json, print_table, say
from hive.policy.visible import visible

AT_REST = {
    "start": ({"READY"}, {"FAILED", "STOPPED", "QUARANTINED", "LOST"}),
    "stop": ({"STOPPED"}, {"LOST"}),
    "drain": ({"STOPPED"}, {"LOST"}),
    "restart": ({"READY"}, {"FAILED", "STOPPED", "QUARANTINED", "LOST"}),
    "release": ({"READY"}, {"FAILED", "STOPPED", "QUARANTINED", "LOST"}),
}
LOOK_S = 0.2


@click.group()
def worker() -> None:
    """Workers are engines' processes; their ids are MODEL-N."""


@worker.command("list")
@daemon_options
@json_option
def list_(as_json: bool, **daemon: Any) -> None:
    """List the workers with their states."""
    found = call("GET", "/hive/v1/workers", **daemon)
    if as_json:
        print_json(found)
        return
    rows = [
        (w["id"], w["state"], _device(w), w["pid"], w["in_flight"], w["starts"], w["reason"])
        for w in found["workers"]
    ]
    print_table(("worker", "state", "device", "pid", "in flight", "starts", "reason"), rows)


@worker.command()
@click.argument("worker_id")
@daemon_options
@json_option
def show(worker_id: str, as_json: bool, **daemon: Any) -> None:
    """Show everything about one worker."""
    found = call("GET", f"/hive/v1/workers/{worker_id}", **daemon)
    if as_json:
        print_json(found)
    else:
        shown = {**found, "device": _device(found), "since": clock(found["since"])}
        if (load_s := shown.pop("load_seconds")) is not None:
            shown["load"] = f"{load_s:.1f} s"
        if breaker := found.get("breaker"):
            shown["breaker"] = ", ".join(f"{_label(k)} {v}" for k, v in breaker.items() if v)
        print_table(("", ""), ((_label(k), v) for k, v in shown.items()))


def _label(key: str) -> str:
    return key.replace("_", " ")


@worker.command()
@click.argument("worker_id")
@click.option("-f", "--follow", "is_followed", is_flag=True, help="Go on as the log grows.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(0),
    default=200,
    show_default=True,
    help="Last lines to begin with.",
)
@daemon_options
def logs(worker_id: str, is_followed: bool, lines: int, **daemon: Any) -> None:
    """Print the engine's output, of earlier starts, too."""

    is_terminal = sys.stdout.isatty()

    def show_text(text: str) -> None:
        # As the engine wrote it for programs, but not for a terminal, which it would steer.
        sys.stdout.write(visible(text.replace("\r\n", "\n")) if is_terminal else text)
        sys.stdout.flush()

    params = {"lines": str(lines)} | ({"follow": "1"} if is_followed else {})
    follow(f"/hive/v1/workers/{worker_id}/logs", show_text, params=params, **daemon)


def _action(name: str, text: str) -> None:
    @worker.command(name, help=text)
    @click.argument("worker_id")
    @click.option(
        "--wait",
        "wait_s",
        type=Duration(min_open=False),
        default=0.0,
        help="Seconds to wait for the outcome; 0 = do not wait.",
    )
    @daemon_options
    @json_option
    def act(worker_id: str, wait_s: float, as_json: bool, **daemon: Any) -> int:
        found = call("POST", f"/hive/v1/workers/{worker_id}/{name}", **daemon)
        good, bad = AT_REST[name]
        until = time.monotonic() + wait_s
        while wait_s and found["state"] not in good | bad and time.monotonic() < until:
            time.sleep(LOOK_S)
            found = call("GET", f"/hive/v1/workers/{worker_id}", **daemon)
        if as_json:
            print_json(found)
        else:
            say(f"{found['id']}: {found['state']} ({found['reason']})")
        if not wait_s or found["state"] in good:
            return 0
        if found["state"] not in bad:
            print(f"hive: not {' or '.join(good)} within {wait_s:g} s", file=sys.stderr)
        return 1 if found["state"] in bad else 124


_action("start", "Start a worker; earlier restarts are forgotten.")
_action("stop", "Drain a worker, then end its whole process tree.")
_action("drain", "Let a worker finish what it has, take nothing new, then end it, as stop does.")
_action("restart", "Stop a worker, then start it again.")
_action("release", "Trust the device of a quarantined worker again, and start it.")


def _device(view: dict[str, Any]) -> str:
    device = view["device"]
    return device if isinstance(device, str) else ",".join(device)

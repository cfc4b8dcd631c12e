"""`hive explain CODE`: what an error means and what to do."""

from difflib import get_close_matches

import click

from hive.cli.output import json_option, print_json, print_table
from hive.errors import HiveError, NotFound, by_code, every_error


def facts(cls: type[HiveError]) -> dict[str, object]:
    """Everything that an error's class fixes."""
    return {
        "code": cls.code,
        "number": cls.number,
        "http_status": cls.status,
        "exit_code": cls.exit_code,
        "retryable": cls.retryable,
        "category": str(cls.family),
        "severity": str(cls.severity),
        "log_level": cls.level,
        "meaning": cls.summary,
        "suggested_action": cls.action,
    }


@click.command()
@click.argument("code", required=False)
@json_option
def explain(code: str | None, as_json: bool) -> None:
    """Say what an error CODE (WORKER_CRASHED, CWM-2001) means; all codes without one."""
    if code is None:
        if as_json:
            print_json({"errors": [facts(cls) for cls in every_error()]})
        else:
            rows = [(c.code, c.number, c.status, c.summary) for c in every_error()]
            print_table(("code", "number", "status", "meaning"), rows)
        return
    cls = by_code(code)
    if cls is None:
        near = get_close_matches(code.upper(), [c.code for c in every_error()], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise NotFound(
            f"{code!r} is no error code of hive.{hint}",
            action="'hive explain' without a code lists all of them.",
        )
    if as_json:
        print_json(facts(cls))
    else:
        print_table(("", ""), ((k.replace("_", " "), v) for k, v in facts(cls).items()))

"""What commands print: JSON for programs, tables for people, errors for both."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from hive.errors import HiveError
from hive.policy.visible import visible

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def say(text: object, *, err: bool = False) -> None:
    """Print a line that may quote engines, clients or files: it cannot steer the terminal."""
    print(visible(str(text)), file=sys.stderr if err else sys.stdout)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A plain table; wide cells wrap on a terminal and stay whole in a pipe."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else visible(str(cell)) for cell in row))
    width = None if sys.stdout.isatty() else 1000
    console = Console(
        width=width, highlight=False, markup=False, emoji=False, soft_wrap=width is not None
    )
    with console.capture() as text:  # printed by us: rich ends the program on a broken pipe
        console.print(table)
    print(text.get(), end="")


def show_error(error: HiveError, *, as_json: bool) -> None:
    """The error on stderr; with --json its body on stdout, too."""
    if as_json:
        print_json(error_body(error))
    for line in lines_of(error):
        say(line, err=True)


def lines_of(error: HiveError) -> list[str]:
    """An error for people: every problem, the code, and what to do."""
    return [
        *(f"hive: {problem}" for problem in error.details.get("problems", ())),
        f"hive: {error.code}: {error.message}",
        f"hive: what to do: {error.suggested_action}",
    ]


def error_body(error: HiveError) -> dict[str, Any]:
    """The error as contract's body; local commands show what HTTP would."""
    from hive.gateway.problems import body

    return body(error)

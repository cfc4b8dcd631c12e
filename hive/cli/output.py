"""What commands print: JSON for programs, tables for people, errors for both."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from hive.errors import HiveError
from hive.policy.visible import visible

UNITS = ("KiB", "MiB", "GiB", "TiB")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def say(text: object, *, err: bool = False, end: str = "\n") -> None:
    """Print a line that may quote engines, clients or files: it cannot steer the terminal."""
    print(visible(str(text)), file=sys.stderr if err else sys.stdout, end=end, flush=not end)


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


@contextmanager
def progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """What hears of phase, done and total: a bar while the block runs, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda _phase, _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
    ) as bars:
        bar = bars.add_task(visible(what), total=None)

        def show(phase: str, done: int, total: int) -> None:
            said = visible(f"{what}: {phase}")
            bars.update(bar, description=said, completed=done, total=total)

        yield show


def clock(seconds: float) -> str:
    """A moment since 1970 as this host's clocks tell it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def size_of(count: int) -> str:
    """Bytes for people."""
    size, unit = float(count), "B"
    for larger in UNITS:
        if size < 1024:  # noqa: PLR2004
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


def show_error(error: HiveError, *, as_json: bool) -> None:
    """The error on stderr; with --json its body on stdout, too."""
    if as_json:
        print_json(error_body(error))
    for line in lines_of(error):
        say(line, err=True)


def lines_of(error: HiveError) -> list[str]:
    """An error for people: every problem that is not the message itself, the code, what to do."""
    problems = error.details.get("problems", ())
    return [
        *(f"hive: {problem}" for problem in problems if problem != error.message),
        f"hive: {error.code}: {error.message}",
        f"hive: what to do: {error.suggested_action}",
    ]


def error_body(error: HiveError) -> dict[str, Any]:
    """The error as contract's body; local commands show what HTTP would."""
    from hive.gateway.problems import body

    return body(error)

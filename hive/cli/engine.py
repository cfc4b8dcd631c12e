"""`hive engine`: install the managed engine environment, and list those that there are."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from hive.cli.installing import (
    PROVED,
    Plan,
    Progress,
    build,
    default_interpreter,
    is_locked,
    sigterm_unwinds,
)
from hive.cli.output import json_option, print_json, print_table, say
from hive.policy.visible import visible
from hive.workers import environment
from hive.workers.environment import PYTHON, Completed, python_of


@click.group()
def engine() -> None:
    """Install the managed engine environment (PyTorch, vLLM and LMCache, for the CPU)."""


def _url(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is not None and urlsplit(value).scheme not in ("http", "https", "file"):
        raise click.BadParameter("an index is a URL that begins with https://, http:// or file://")
    return value


@engine.command()
@click.argument("kind", type=click.Choice(["cpu"]))
@click.option(
    "--index",
    metavar="URL",
    callback=_url,
    help="One more package index for pip, for example one that carries PyTorch's CPU builds.",
)
@click.option(
    "--python",
    "interpreter",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"Python {PYTHON} to build with. Default: hive's own, or python{PYTHON} on the PATH.",
)
@click.option("--force", is_flag=True, help="Build it again; stop the workers that use it first.")
@json_option
def install(
    kind: str, index: str | None, interpreter: Path | None, force: bool, as_json: bool
) -> None:
    """Install the engine environment of this hive from its lock file (3.6 GB)."""
    home = environment.managed_home()
    found = None if force else environment.completed(home)
    if found is None:
        with sigterm_unwinds(), _progress(as_json) as tell:
            python = interpreter or default_interpreter()
            plan = Plan(home, environment.lock_file(), python.absolute(), index)
            built = build(plan, tell, force=force)
    ready = found or built
    if as_json:
        print_json({"installed": found is None, **_row(home, ready)})
        return
    versions = ", ".join(f"{name} {version}" for name, version in ready.versions.items())
    say(f"{'Already there' if found else 'Installed'}: the {kind} engine environment ({versions})")
    say(python_of(home))


@engine.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """List the managed engine environments on this host."""
    engines = environment.engines_dir()
    homes = sorted(path for path in engines.glob("cpu-*") if path.is_dir())
    rows = [_row(home, environment.completed(home)) for home in homes]
    if as_json:
        print_json(rows)
        return
    if not rows:
        say(f"No engine environment in {engines}; 'hive engine install cpu' makes one.")
        return
    print_table(
        ("STATE", "LOCK", "PYTHON", *(name.upper() for name in PROVED), "PATH"),
        (
            (
                row["state"],
                "current" if row["is_current"] else "other",
                row["python_version"],
                *(row["versions"].get(name) for name in PROVED),
                row["home"],
            )
            for row in rows
        ),
    )


def _row(home: Path, found: Completed | None) -> dict[str, Any]:
    return {
        "home": str(home),
        "python": str(python_of(home)),
        "state": "complete" if found else "installing" if is_locked(home) else "unfinished",
        "is_current": home == environment.managed_home(),
        "python_version": found and found.python,
        "versions": found.versions if found else {},
        "completed_at": found and found.completed_at,
    }


# ── Telling ─────────────────────────────────────────────────────────────────────────────────────


class Silent:
    def note(self, text: str) -> None:
        pass

    def step(self, done: int, total: int, what: str) -> None:
        pass


class Lines:
    """A line for each step, for logs and pipes."""

    def note(self, text: str) -> None:
        say(text, err=True)

    def step(self, done: int, total: int, what: str) -> None:
        self.note(f"[{done:3}/{total}] {what}")


class Bar:
    """One bar that moves, for a terminal."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.task = bar.add_task("preparing", total=None)

    def note(self, text: str) -> None:
        self.bar.console.print(visible(text), markup=False, highlight=False)

    def step(self, done: int, total: int, what: str) -> None:
        self.bar.update(self.task, completed=done, total=total, description=what)


@contextmanager
def _progress(as_json: bool) -> Iterator[Progress]:
    if as_json:
        yield Silent()
    elif not sys.stderr.isatty():
        yield Lines()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield Bar(bar)

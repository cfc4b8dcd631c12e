"""`hive model`: make the tiny random-weight model."""

import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from hive.cli.installing import sigterm_unwinds
from hive.cli.output import json_option, print_json, say
from hive.errors import OperationTimeout, StorageWriteFailed, ValidationFailed, WorkerSpawnFailed
from hive.workers import environment
from hive.workers.asking import ask

SCRIPT = Path(environment.__file__).with_name("tiny_model.py")
# Three seconds on a quiet host; importing torch from a cold disk takes the most of it.
LIMIT_S = 300
LAST_LINES = 12


@click.group()
def model() -> None:
    """Make the tiny random-weight model, for trying hive without a download."""


@model.command(name="make-tiny")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="The same seed makes the same weights.",
)
@click.option("--force", is_flag=True, help="Replace a model that is in DIR.")
@click.option(
    "--python",
    "interpreter",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Python of an environment with transformers. Default: the managed engine environment's.",
)
@json_option
def make_tiny(
    directory: Path, seed: int, force: bool, interpreter: Path | None, as_json: bool
) -> None:
    """Write a Llama of 2.6 M random weights, with 16,384 positions and a chat template, to DIR."""
    target = directory.expanduser().resolve()
    _check_target(target, force=force)
    python = interpreter.absolute() if interpreter else _managed_python()
    try:
        with sigterm_unwinds(), _beside(target) as unfinished:
            facts = _write(python, unfinished, seed)
            _settle(unfinished)
            _put_in_place(unfinished, target)
    except OSError as exc:
        raise StorageWriteFailed(
            f"{exc.filename or target}: {exc.strerror}.",
            action="Name a directory that you may write to, on a disk with 10 MB free.",
        ) from exc
    if as_json:
        print_json({"path": str(target), "seed": seed, **facts})
        return
    say(f"Made: a Llama of {facts['parameters'] / 1e6:.1f} M random weights (seed {seed})")
    say(target)


def _check_target(target: Path, *, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise ValidationFailed(
            f"{target} is a file.", action="Name a directory that is new or empty."
        )
    if not (target / "config.json").is_file():
        raise ValidationFailed(
            f"{target} is not empty and holds no model.",
            action="Name a directory that is new or empty; --force replaces models only.",
        )
    if not force:
        raise ValidationFailed(
            f"{target} already holds a model.",
            action="Use it as it is, name another directory, or replace it with --force.",
        )


def _managed_python() -> Path:
    python = environment.managed_python()
    if python is None:
        raise WorkerSpawnFailed(
            f"There is no engine environment in {environment.managed_home()}.",
            action="Run 'hive engine install cpu', or name a Python that has transformers with --python.",
        )
    return python


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new directory on the target's own file system, gone at the end unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    unfinished.mkdir()
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(python: Path, directory: Path, seed: int) -> dict[str, Any]:
    # -P: the script's own directory must not hide the environment's packages.
    command = (str(python), "-P", str(SCRIPT), str(directory), str(seed))
    try:
        done = ask(command, LIMIT_S, threading.Event(), _environment())
    except TimeoutError as exc:
        raise OperationTimeout(
            f"The model was not written within {LIMIT_S} s.",
            action="Look at what keeps the host busy, then try again.",
            timeout_seconds=LIMIT_S,
        ) from exc
    if done.status:
        last = [line for line in done.complaint.splitlines() if line.strip()][-LAST_LINES:]
        raise WorkerSpawnFailed(
            f"The model could not be made: {last[-1] if last else f'exit {done.status}'}",
            action=f"Check that {python} can import transformers; 'hive engine install cpu' makes one that can.",
            problems=last,
        )
    facts: dict[str, Any] = json.loads(done.said.splitlines()[-1])
    return facts


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


def _settle(directory: Path) -> None:
    """On disk before it has its name; readable for whoever may read the directory."""
    mode = directory.stat().st_mode & 0o666
    for file in directory.iterdir():
        file.chmod(mode)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _put_in_place(unfinished: Path, target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        old = target.with_name(f"{unfinished.name}.old")
        target.rename(old)
        unfinished.rename(target)
        shutil.rmtree(old)
    else:
        unfinished.rename(target)

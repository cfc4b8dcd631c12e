"""`hive key …`: make, list and revoke the API keys of the configuration file."""

import hashlib
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from hive.cli.output import json_option, print_json, print_table
from hive.cli.serve import config_option
from hive.errors import ConfigInvalid, Conflict, NotFound
from hive.settings import DEFAULT_FILES, text_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
APPLIES = "It applies with the next 'hive reload', or when hive is started the next time."


@click.group()
def key() -> None:
    """API keys are kept as SHA-256 hashes in [[auth.keys]] of the configuration file."""


@key.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["inference", "admin", "metrics"]),
    default=["inference"],
    show_default=True,
    help="What it may do; may be given again.",
)
@click.option(
    "--priority",
    type=click.Choice(["interactive", "normal", "batch"]),
    default="normal",
    show_default=True,
)
@click.option("--max-concurrent", type=click.IntRange(0), default=8, show_default=True)
@click.option("--requests-per-minute", type=click.IntRange(0), default=0, show_default=True)
@config_option
@json_option
def new(
    name: str,
    scopes: tuple[str, ...],
    priority: str,
    max_concurrent: int,
    requests_per_minute: int,
    config: Path | None,
    as_json: bool,
) -> None:
    """Make a key for NAME, add its hash to the configuration, print the key once."""
    import tomlkit

    if not _NAME.match(name):
        raise click.BadParameter(
            "a name is 1 to 64 letters, digits, '_', '.' and '-'", param_hint="NAME"
        )
    file, document = _open(config)
    keys = _keys(document)
    if any(entry.get("name") == name for entry in keys):
        raise Conflict(
            f"A key named {name} exists already.",
            action=f"Choose another name, or first 'hive key revoke {name}'.",
        )
    value = f"hive_{secrets.token_urlsafe(32)}"
    entry = tomlkit.table()
    entry.update(
        {
            "name": name,
            "sha256": hashlib.sha256(value.encode()).hexdigest(),
            "scopes": list(scopes),
            "priority": priority,
            "max_concurrent": max_concurrent,
            "requests_per_minute": requests_per_minute,
        }
    )
    keys.append(entry)
    with _replaced(file, tomlkit.dumps(document)):
        if as_json:
            print_json({"name": name, "key": value, "scopes": list(scopes), "file": str(file)})
        else:
            print(value)
        sys.stdout.flush()  # a key that nobody has seen must not be kept
    if not as_json:
        click.echo(f"hive: key {name} added to {file}; it is shown only now. {APPLIES}", err=True)


@key.command("list")
@config_option
@json_option
def list_(config: Path | None, as_json: bool) -> None:
    """List the keys' names and rights; the keys themselves are not kept."""
    _, document = _open(config)
    keys = [{k: v for k, v in entry.items() if k != "sha256"} for entry in _keys(document).unwrap()]
    if as_json:
        print_json({"keys": keys})
    else:
        rows = [
            (
                k.get("name"),
                ", ".join(k.get("scopes", ["inference"])),
                k.get("priority", "normal"),
                k.get("max_concurrent", 8),
            )
            for k in keys
        ]
        print_table(("name", "scopes", "priority", "max concurrent"), rows)


@key.command()
@click.argument("name")
@config_option
@json_option
def revoke(name: str, config: Path | None, as_json: bool) -> None:
    """Remove NAME's key from the configuration."""
    import tomlkit

    file, document = _open(config)
    keys = _keys(document)
    for index, entry in enumerate(keys):
        if entry.get("name") == name:
            del keys[index]
            break
    else:
        names = ", ".join(str(entry.get("name")) for entry in keys) or "none"
        raise NotFound(
            f"There is no key named {name}; there are: {names}.",
            action="'hive key list' shows the names.",
        )
    if not len(keys):
        del document["auth"]["keys"]
    with _replaced(file, tomlkit.dumps(document)):
        pass
    if as_json:
        print_json({"name": name, "revoked": True, "file": str(file)})
    else:
        click.echo(f"hive: key {name} removed from {file}. {APPLIES}", err=True)


def _open(config: Path | None) -> tuple[Path, Any]:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    file = config or next((p for p in DEFAULT_FILES if p.is_file()), None)
    if file is None:
        raise ConfigInvalid(
            "No configuration file was found to keep keys in.",
            action="Name it with --config FILE.",
        )
    try:
        return file, tomlkit.parse(text_of(file))
    except (TOMLKitError, ValueError, RecursionError) as exc:
        raise ConfigInvalid(
            f"{file}: is not TOML: {exc}", action="Correct the file first; nothing was changed."
        ) from exc


def _keys(document: Any) -> Any:
    """The array of tables [[auth.keys]], made where it is missing."""
    import tomlkit
    from tomlkit.items import AoT

    auth = document.setdefault("auth", tomlkit.table(is_super_table=True))
    keys = auth.setdefault("keys", tomlkit.aot())
    if not isinstance(keys, AoT):
        raise ConfigInvalid(
            "auth.keys is not written as [[auth.keys]] tables.",
            action="Rewrite it as [[auth.keys]]; nothing was changed.",
        )
    return keys


@contextmanager
def _replaced(file: Path, text: str) -> Iterator[None]:
    """Replace the file whole once the block has run; leave it as it was when anything fails.

    Its mode, owner and links to it stay.
    """
    target = file.resolve()
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        _write_beside(target, draft, text)
        yield
        draft.replace(target)
    except OSError as exc:
        raise ConfigInvalid(
            f"{file}: cannot be written: {exc.strerror}.",
            action="Check the rights of the file and its directory; nothing was changed.",
        ) from exc
    finally:
        with suppress(OSError):
            draft.unlink()


def _write_beside(target: Path, draft: Path, text: str) -> None:
    about = target.stat()
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as out:
        out.write(text)
        if (about.st_uid, about.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(fd, about.st_uid, about.st_gid)
        os.fchmod(fd, about.st_mode & 0o777)
        out.flush()
        os.fsync(out.fileno())

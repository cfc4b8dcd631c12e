"""What is kept, and where: chunks in RAM, and as files of LMCache's file tier.

RAM has no bound here and nothing is evicted from it; it is gone with the process.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import blake3

from tests.doubles.lmcache.knobs import Knobs, Options

BLOCK_BYTES = 2048
SALT_FORBIDDEN = frozenset("@/\\\0")
SALT_MOST = 128


@dataclass(frozen=True)
class Asked:
    """One prompt of one model, as an engine or a client of /cache names it."""

    model: str
    workers: int
    salt: str
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(token, int) and 0 <= token < 1 << 32 for token in self.tokens):
            raise ValueError("a token is a number from 0 to 4,294,967,295")
        # The rest in LMCache's words.
        if "@" in self.model:
            raise ValueError(f"model_name must not contain '@' (got {self.model!r})")
        if bad := SALT_FORBIDDEN & set(self.salt):
            raise ValueError(f"cache_salt must not contain {bad!r} (got {self.salt!r})")
        if len(self.salt) > SALT_MOST:
            raise ValueError(f"cache_salt exceeds max length {SALT_MOST} (got {len(self.salt)})")


class Tier:
    def __init__(self, options: Options, knobs: Knobs) -> None:
        self.ram: set[str] = set()
        self._options = options
        self._knobs = knobs
        self._files = 0  # that were to be written
        if options.base_path:
            os.makedirs(options.base_path, exist_ok=True)
            with suppress(FileExistsError):
                os.mkdir(os.path.join(options.base_path, options.tmp_dir or ""))

    def hit_tokens(self, asked: Asked) -> int:
        """How long the prefix is that RAM and disk have, in tokens of full chunks.

        What was read from disk for it is in RAM afterwards only with `--l2-prefetch-policy
        retain`: LMCache's default policy drops it once the engine has it.
        """
        hit = 0
        for names in self.chunks(asked):
            if not all(name in self.ram or self.is_whole(name) for name in names):
                break
            if self._options.retains:
                self.ram.update(names)
            hit += self._options.chunk_tokens
        return hit

    def store(self, asked: Asked, skip: int) -> list[str]:
        """Keep the chunks after the first `skip` tokens in RAM; the blocks to be written.

        A block that is in RAM is not among them: LMCache refuses to write it to RAM again, and
        only what was written there goes to disk. So a file that somebody removed stays away.
        """
        chunks = list(self.chunks(asked))[skip // self._options.chunk_tokens :]
        new = [name for names in chunks for name in names if name not in self.ram]
        self.ram.update(new)
        return new

    def write(self, names: Iterable[str]) -> None:
        """Write the blocks that have no file yet; what fails is told to nobody."""
        if not self._options.base_path or self._knobs.lose_stores:
            return
        for name in names:
            if os.path.exists(self._path(name)):
                continue
            self._files += 1
            every = self._knobs.fail_every
            if every and self._files % every == 0:
                continue
            with suppress(OSError):
                self._write(name)

    def prefetch(self, asked: Asked) -> int:
        """Load what is on disk into RAM; how many blocks of chunks with all parts are there."""
        found = 0
        for names in self.chunks(asked):
            self.ram.update(name for name in names if self.is_whole(name))
            if self.ram.issuperset(names):
                found += len(names)
        return found

    def is_whole(self, name: str) -> bool:
        """Whether LMCache could read it: it finds a short file, but fails to load it.

        Of a longer one it reads as much as it needs.
        """
        try:
            return bool(self._options.base_path) and (
                os.stat(self._path(name)).st_size >= BLOCK_BYTES
            )
        except OSError:
            return False

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError):
                os.unlink(self._path(name))

    def chunks(self, asked: Asked) -> Iterator[list[str]]:
        """The names of every full chunk's blocks, one for each worker."""
        for chunk_hash in hashes(asked.tokens, self._options.chunk_tokens):
            yield [
                block_name(asked.model, rank(worker, asked.workers), chunk_hash, asked.salt)
                for worker in range(asked.workers)
            ]

    def _write(self, name: str) -> None:
        tmp_dir = self._options.tmp_dir
        if tmp_dir is None:
            half = self._path(name).removesuffix(".data") + ".tmp"
        else:
            half = os.path.join(self._options.base_path, tmp_dir, name)
        with open(half, "wb") as file:
            file.write(contents(name))
        os.replace(half, self._path(name))

    def _path(self, name: str) -> str:
        return os.path.join(self._options.base_path, name)


def hashes(tokens: Sequence[int], chunk_tokens: int) -> Iterator[bytes]:
    """Each full chunk's hash covers the one before it, so all tokens up to its end."""
    before = blake3.blake3(bytes(8) + struct.pack(">I", 0)).digest()
    for begin in range(0, len(tokens) - chunk_tokens + 1, chunk_tokens):
        numbers = struct.pack(f">{chunk_tokens}I", *tokens[begin : begin + chunk_tokens])
        before = blake3.blake3(before + numbers).digest()
        yield before


def rank(worker: int, workers: int) -> int:
    return workers << 24 | worker << 16 | workers << 8 | worker


def block_name(model: str, rank_: int, chunk_hash: bytes, salt: str, group: int = 0) -> str:
    base = f"{model.replace('/', '-SEP-')}@{rank_:#010x}@{group:x}@{chunk_hash.hex()}"
    return f"{base}@{salt}.data" if salt else f"{base}.data"


def contents(name: str) -> bytes:
    """The same bytes whenever the same block is computed again, as with a real model."""
    return blake3.blake3(name.encode()).digest(length=BLOCK_BYTES)

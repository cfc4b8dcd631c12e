"""A window's KV blocks on their way between engine, LMCache's tier and the window's folder.

What is known of sessions, names and owners is none of it: that is `operations`.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from hive.errors import (
    BlockNotFound,
    HiveError,
    ModelIncompatible,
    StorageCorrupted,
    StorageReadFailed,
    StorageWriteFailed,
)
from hive.policy.windows import Identity, Shape, block_names, chain, usable
from hive.storage.catalogue import Window
from hive.windows.engines import Engines, Slot
from hive.windows.files import Block, Health, Manifest, WindowFiles, full, made
from hive.windows.tier import Tier
from hive.windows.work import Limit, Progress, Teller, in_thread, limit_s, retried

log = logging.getLogger(__name__)

STALL_S = 3.0  # without another block on disk: those that lack are computed again
FEW = 8  # blocks, which tell too little of how large one is
LEAST_DISK = 64 * 2**20  # bytes that must be free for blocks to be written at all
LOOK_S = (0.01, 0.1)  # between two looks for blocks on disk, first and longest
LOOK_AT_MOST_S = 5.0  # what is only told beside something else may take
NAMED = 5  # blocks that an error names


@dataclass(frozen=True, slots=True)
class Mended:
    """What a repair did: chunks that were had from the tier, and that were computed anew."""

    manifest: Manifest
    recovered: int
    recomputed: int


class Blocks:
    """Raises what keeps a block from being read, checked or stored; nothing is retried outside."""

    def __init__(self, files: WindowFiles, tier: Tier, engines: Engines) -> None:
        self._files, self._tier, self._engines = files, tier, engines

    async def captured(
        self, window: Window, conversation: dict[str, Any], limit: Limit, told: Progress
    ) -> Window:
        """Every full chunk of it computed, linked and on disk; the window with what it has now.

        Raises StorageWriteFailed, InsufficientDisk; its folder may be there all the same.
        """
        async with self._engines.slot(window.model, window.session_id) as slot:
            told("render", 0, 1)
            tokens = await slot.tokens(conversation, window.model)
            limit.extend(limit_s(len(tokens)))
            shape = slot.shape
            hashes = await in_thread(chain, tokens, shape.chunk_tokens)
            names = _names(shape, hashes, window.salt)
            flat = [name for chunk in names for name in chunk]
            with self._tier.holding(flat):
                part = await retried("storage", lambda _: in_thread(self._files.begin, window.id))
                taken: dict[int, list[Block]] = {}

                async def attempt(is_again: bool) -> list[list[Block]]:
                    await self._stored(slot, window, tokens, flat, told, is_again=is_again)
                    tell = Teller(told, "link", len(names))
                    blocks = await in_thread(
                        self._files.take, part, names, tell, taken, teller=tell
                    )
                    await in_thread(self._must_be_alike, taken, names)
                    return blocks

                blocks = await retried("block_write", attempt)
        manifest = made(window, conversation, tokens, hashes, blocks, slot.identity)
        await retried("block_write", lambda _: in_thread(self._files.finish, part, manifest))
        return manifest.window()

    async def _stored(
        self,
        slot: Slot,
        window: Window,
        tokens: Sequence[int],
        names: Sequence[str],
        told: Progress,
        *,
        is_again: bool,
    ) -> None:
        """Every one of these files is in the tier when this returns.

        Raises StorageWriteFailed where LMCache wrote no more of them for STALL_S.
        """
        slot.must_have_cache()
        missing = await in_thread(self._tier.missing, names)
        if not missing:
            told("store", len(names), len(names))
            return
        if is_again:
            await self._engines.forget(missing)
        await slot.compute(tokens, window.model, window.salt)
        pause_s, longest_s = LOOK_S
        patience_until = time.monotonic() + STALL_S
        while True:
            told("store", len(names) - len(missing), len(names))
            slot.must_have_cache()  # else nobody stores them, and the engine waits to be restarted
            left = await in_thread(self._tier.missing, missing)
            if not left:
                return
            if len(left) < len(missing):
                patience_until = time.monotonic() + STALL_S
            elif time.monotonic() > patience_until:
                await in_thread(self._must_have_disk, left)
                raise StorageWriteFailed(
                    f"{len(left)} of {len(names)} blocks were not stored by the KV cache server."
                )
            missing = left
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    def _must_have_disk(self, left: Sequence[str]) -> None:
        """LMCache tells nobody that it could not write for that reason. Raises InsufficientDisk."""
        size = self._tier.largest(_beginning(left[0]))
        needed = max(len(left) * size, LEAST_DISK)
        if self._tier.free() < needed:
            raise full(self._tier.directory, needed)

    def _must_be_alike(self, taken: dict[int, list[Block]], names: Sequence[Sequence[str]]) -> None:
        """A block shorter than the others was cut off by a crash, and LMCache never mends one."""
        size = max((block.size for chunk in taken.values() for block in chunk), default=0)
        if 0 < len(names) < FEW:  # all of them may have been cut off alike
            size = max(size, self._tier.largest(_beginning(names[0][0])))
        short = [
            (at, name)
            for at, named in enumerate(names)
            for block, name in zip(taken[at], named, strict=True)
            if block.size != size or not size
        ]
        if short:
            self._tier.expel(name for _, name in short)
            for at, _ in short:
                taken.pop(at, None)
            raise StorageWriteFailed(f"{len(short)} blocks in the KV tier were not whole.")

    async def restored(
        self, manifest: Manifest, require_full: bool, told: Progress
    ) -> tuple[dict[str, Any], list[str]]:
        """Put what is whole where the engine finds it; the receipt, and what to warn of.

        Raises ModelIncompatible, StorageCorrupted (nothing is usable, or something is damaged and
        `require_full`), BlockNotFound (`require_full`).
        """
        async with self._engines.slot(manifest.model, manifest.session_id) as slot:
            _must_fit(manifest, slot.identity)
            shape = slot.shape
        hashes = [bytes.fromhex(one) for one in manifest.hashes]
        names = _names(shape, hashes, manifest.salt)
        with self._tier.holding(name for chunk in names for name in chunk):
            health = await self.health(manifest, told)
            whole = [one.is_whole for one in health]
            found = usable(whole, shape.chunk_tokens)
            damaged = [name for one in health for name in one.damaged]
            if not found.usable_tokens and manifest.blocks:
                raise StorageCorrupted(
                    f"Context data failed its integrity check: none of the {len(whole)} blocks of "
                    f"the window can be used{_named(', damaged is', damaged)}."
                )
            if require_full and damaged:
                raise StorageCorrupted(
                    f"Context data failed its integrity check{_named(':', damaged)}."
                )
            if require_full and found.is_partial:
                missing = [name for one in health for name in one.missing]
                raise BlockNotFound(f"Some context data is unavailable{_named(':', missing)}.")

            def give_back() -> int:
                linked = 0
                for at, one in enumerate(health):
                    if one.is_whole:
                        linked += self._files.give_back(manifest, at, names[at])
                    else:
                        self._files.drop(manifest, one)
                return linked

            linked = await retried("storage", lambda _: in_thread(give_back))
            told("prefetch", 0, 1)
            tokens = manifest.tokens[: found.usable_tokens]
            in_cache, of_all = await self._engines.prefetch(tokens, shape, manifest.salt)
        warnings = []
        if found.is_partial:
            warnings.append(f"{found.blocks_missing} blocks could not be restored")
            log.warning("window %s: %s", manifest.name, warnings[0])
        if in_cache < of_all:
            warnings.append(f"the KV cache server found {in_cache} of {of_all} files")
            log.warning("window %s: %s", manifest.name, warnings[-1])
        receipt = {
            "blocks_found": found.blocks_found,
            "blocks_missing": found.blocks_missing,
            "usable_tokens": found.usable_tokens,
            "recompute_tokens": len(manifest.tokens) - found.usable_tokens,
            "partial": found.is_partial,
            "linked_files": linked,
            "thawed_at": time.time(),
        }
        return receipt, warnings

    async def manifest(self, window_id: str) -> Manifest:
        """Raises StorageCorrupted, StorageReadFailed."""
        return await retried("storage", lambda _: in_thread(self._files.manifest, window_id))

    async def health(self, manifest: Manifest, told: Progress) -> list[Health]:
        """Every byte read, and what is damaged taken out of LMCache's tier.

        What the disk does not give is asked for again (R090, R101) before it counts as damaged.
        Raises StorageReadFailed, StorageWriteFailed.
        """
        tell = Teller(told, "check", len(manifest.blocks))
        found: dict[int, Health] = {}

        async def attempt(_: bool) -> None:
            health = await in_thread(self._files.health, manifest, tell, found, teller=tell)
            if unreadable := [name for one in health for name in one.unreadable]:
                raise StorageReadFailed(f"Context data could not be read{_named(':', unreadable)}.")

        try:
            await retried("storage", attempt)
        except StorageReadFailed:
            if len(found) < len(manifest.blocks):
                raise
        health = [found[at] for at in range(len(manifest.blocks))]
        if damaged := [name for one in health for name in one.damaged]:
            log.error("window %s is damaged%s", manifest.name, _named(":", damaged))
            # LMCache checks nothing, so an engine may load it at any moment, whoever asks.
            await retried("storage", lambda _: in_thread(self._files.expel, manifest, health))
            self._tier.look_again()
        return health

    async def mended(self, manifest: Manifest, health: list[Health], told: Progress) -> Mended:
        """Each damaged chunk again: from the tier where the same bytes are there, else computed.

        Raises ModelIncompatible, or what keeps it from being stored; what was recovered stays.
        """
        async with self._engines.slot(manifest.model, manifest.session_id) as slot:
            _must_fit(manifest, slot.identity)
            return await self._mended(manifest, health, slot, told)

    async def _mended(
        self, manifest: Manifest, health: list[Health], slot: Slot, told: Progress
    ) -> Mended:
        damaged = [at for at, one in enumerate(health) if not one.is_whole]
        hashes = [bytes.fromhex(one) for one in manifest.hashes]
        names = _names(slot.shape, hashes, manifest.salt)
        flat = [name for at in damaged for name in names[at]]
        blocks, recovered = list(manifest.blocks), 0
        again: list[int] = []
        with self._tier.holding(flat):

            def recover() -> None:
                nonlocal recovered
                recovered = 0
                again.clear()
                for at in damaged:
                    self._files.drop(manifest, health[at])
                    if self._files.take_again(manifest, at, names[at], as_it_was=True):
                        recovered += 1
                    else:
                        again.append(at)
                        self._tier.expel(names[at])  # whatever it is, it is not what was frozen

            await retried("storage", lambda _: in_thread(recover))
            if again:
                lacking = [name for at in again for name in names[at]]

                async def attempt(is_again: bool) -> None:
                    window = manifest.window()
                    await self._engines.forget(lacking)
                    await self._stored(
                        slot, window, manifest.tokens, lacking, told, is_again=is_again
                    )

                    def take() -> None:
                        for at in again:
                            found = self._files.take_again(manifest, at, names[at], as_it_was=False)
                            if found is None:
                                raise StorageWriteFailed(
                                    "A block was gone as soon as it was there."
                                )
                            blocks[at] = found

                    await in_thread(take)

                await retried("block_write", attempt)
                manifest = structs.replace(manifest, blocks=blocks)
                mended = manifest
                await retried("storage", lambda _: in_thread(self._files.rewrite, mended))
        return Mended(manifest, recovered, recomputed=len(again))

    async def in_tier(self, window_id: str) -> int | None:
        """How many of its files LMCache's tier has, by whichever name; None: that is not known."""
        try:
            async with asyncio.timeout(LOOK_AT_MOST_S):
                return await in_thread(self._in_tier, window_id)
        except TimeoutError:
            return None

    def _in_tier(self, window_id: str) -> int | None:
        try:
            return self._files.shared(self._files.manifest(window_id))
        except HiveError:
            return None

    async def removed(self, window_id: str) -> None:
        """All files of a window; removing them again does nothing. Raises StorageWriteFailed."""
        await retried("storage", lambda _: in_thread(self._files.remove, window_id))
        self._tier.look_again()

    def __repr__(self) -> str:
        return f"<Blocks {self._files!r}>"


def _names(shape: Shape, hashes: Sequence[bytes], salt: str) -> list[list[str]]:
    return [block_names(shape, one, salt) for one in hashes]


def _beginning(name: str) -> str:
    """What the tier's names of blocks of the same size begin with."""
    return name.rpartition("@0x")[0] + "@"


def _named(before: str, blocks: Sequence[str]) -> str:
    """The first of them, for a sentence; nothing where there is none."""
    if not blocks:
        return ""
    more = f" and {len(blocks) - NAMED} more" if len(blocks) > NAMED else ""
    return f"{before} {'blocks' if len(blocks) > 1 else 'block'} {', '.join(blocks[:NAMED])}{more}"


def _must_fit(manifest: Manifest, now: Identity) -> None:
    """Raises ModelIncompatible that names what differs."""
    frozen = Identity(**manifest.identity)
    if fields := frozen.differs_in(now):
        raise ModelIncompatible(
            f"The window was frozen from another model: {', '.join(fields)} "
            f"{'differs' if len(fields) == 1 else 'differ'}.",
            fields={
                name: {"frozen": getattr(frozen, name), "now": getattr(now, name)}
                for name in fields
            },
        )

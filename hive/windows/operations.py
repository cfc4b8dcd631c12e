"""Freeze, thaw and what else is done with windows; each is whole or has not happened (R106, R107).

A freeze: the session stands still, its conversation becomes tokens, every full chunk of them is
computed and seen on disk, linked, checksummed and synced, and last the catalogue says so. A thaw
believes nothing: manifest and blocks are checked, the model is compared field by field, missing
blocks go back into LMCache's tier, and the engine's own count at the next request is the proof.
"""

import asyncio
import contextlib
import logging
import random
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from msgspec import structs
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from hive.errors import (
    BlockNotFound,
    HiveError,
    InsufficientDisk,
    InternalError,
    InvalidParameter,
    InvalidStateTransition,
    InvalidWindowName,
    ModelIncompatible,
    OperationTimeout,
    SessionAlreadyFrozen,
    SessionIsolation,
    SessionNotActive,
    StorageCorrupted,
    StorageQuotaExceeded,
    StorageReadFailed,
    StorageWriteFailed,
    StoreUnreachable,
    WindowAlreadyExists,
    WindowNotFound,
)
from hive.events import Announcer, WindowOperationEnded, WindowsCounted
from hive.policy import conversations
from hive.policy.retries import RETRIES
from hive.policy.windows import (
    Identity,
    SessionState,
    Shape,
    WindowState,
    block_names,
    chain,
    usable,
)
from hive.settings import Settings
from hive.storage.catalogue import Catalogue, Session, Window
from hive.windows.engines import Engines, Slot
from hive.windows.files import Block, Health, Manifest, WindowFiles, made
from hive.windows.sessions import Sessions, checked_id
from hive.windows.tier import Tier

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}\Z")
GIB = 2**30
LIMIT_S, PER_TOKEN_S, MOST_S = 90.0, 0.01, 300.0  # of one freeze or thaw (C15)
STALL_S = 3.0  # without another block on disk: those that lack are computed again
THREADS = 4  # for files
FEW = 8  # blocks, which tell too little of how large one is
LEAST_DISK = 64 * 2**20  # bytes that must be free for blocks to be written at all
LOOK_S = (0.01, 0.1)  # between two looks for blocks on disk, first and longest

Progress = Callable[[str, int, int], None]  # phase, done, of how many
T = TypeVar("T")


def unheard(phase: str, done: int, total: int) -> None:
    """Progress that nobody wants to hear of."""


@dataclass(frozen=True, slots=True)
class Thawed:
    """What a thaw gives back: where to go on, with what, and how much of it is there."""

    session: Session
    messages: list[Any]
    receipt: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    """What a look at a window's files has found; blocks are chunks."""

    name: str
    blocks: int
    whole: int
    missing: list[str]
    corrupt: list[str]
    recovered: int = 0
    recomputed: int = 0

    @property
    def is_whole(self) -> bool:
        return self.whole == self.blocks


@dataclass(frozen=True, slots=True)
class Status:
    """A window, its family by name, and how many of its files the KV tier has as well."""

    window: Window
    ancestors: list[str]
    clones: list[str]
    files_in_tier: int | None


class Windows:
    """Every call names the `owner` who asks: None is an admin, who may see everybody's."""

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        files: WindowFiles,
        tier: Tier,
        sessions: Sessions,
        engines: Engines,
        announcer: Announcer,
    ) -> None:
        self._settings = settings.windows
        self._catalogue, self._files, self._tier = catalogue, files, tier
        self._sessions, self._engines = sessions, engines
        self._announcer = announcer
        self._busy: set[str] = set()  # windows that something is done with

    # ── freeze ──────────────────────────────────────────────────────────────────────────────────

    async def freeze(
        self,
        owner: str | None,
        session_id: str,
        name: str,
        *,
        keep_active: bool = False,
        description: str = "",
        tags: Sequence[str] = (),
        told: Progress = unheard,
    ) -> Window:
        """Preconditions in the source's order (R100), all of them before any effect.

        Raises InvalidSessionId, InvalidWindowName, SessionNotFound, SessionAlreadyFrozen,
        WindowAlreadyExists, SessionNotActive, InvalidStateTransition, StorageQuotaExceeded, and
        whatever keeps a block from being stored; then nothing has happened.
        """
        began = time.monotonic()
        checked_id(session_id)
        checked_name(name)
        session = await self._catalogue.session(session_id, owner)
        if session.state is SessionState.FROZEN:
            raise SessionAlreadyFrozen
        await self._must_be_free(session.owner, name)
        if session.state not in (SessionState.ACTIVE, SessionState.THAWED):
            raise SessionNotActive(f"The session is {session.state}.")
        with self._sessions.frozen_still(session_id):
            async with self._noted("freeze", name, session) as note:
                await self._sessions.recorded(session_id)
                session = await self._catalogue.session(session_id, owner)
                if session.state is SessionState.FROZEN:  # by somebody who was first
                    raise SessionAlreadyFrozen
                self._sessions.must_be_recorded(session_id)
                if session.conversation is None:
                    raise InvalidStateTransition(
                        "Cannot perform this operation in current state: nothing was answered in "
                        "the session yet."
                    )
                await self._must_have_room(session.owner)
                window = Window(
                    id=secrets.token_hex(16),
                    owner=session.owner,
                    name=name,
                    session_id=session_id,
                    model=session.model,
                    salt=session.salt,
                    created_at=time.time(),
                    conversation=session.conversation,
                    description=description,
                    tags=tuple(tags),
                )
                try:
                    await self._catalogue.begin_window(window, self._settings.max_windows)
                    async with _limited(LIMIT_S, began) as limit:
                        window = await self._captured(window, limit, told)
                        await self._must_have_bytes(session.owner, window.bytes)
                    await self._catalogue.commit_window(window, keep_active=keep_active)
                except BaseException:
                    await _to_the_end(self._undone(window))
                    raise
                if not keep_active:
                    self._sessions.moved(session, SessionState.FROZEN)
                note.blocks, note.bytes = window.blocks, window.bytes
                await self.count()
                return replace(window, state=WindowState.FROZEN)

    async def _captured(self, window: Window, limit: "_Limit", told: Progress) -> Window:
        """The window with all its blocks linked, and its folder in place."""
        async with self._engines.slot(window.model, window.session_id) as slot:
            told("render", 0, 1)
            tokens = await slot.tokens(window.conversation, window.model)
            limit.extend(_limit_s(len(tokens)))
            shape = slot.shape
            hashes = await _in_thread(chain, tokens, shape.chunk_tokens)
            names = _names(shape, hashes, window.salt)
            flat = [name for chunk in names for name in chunk]
            with self._tier.holding(flat):
                part = await _in_thread(self._files.begin, window.id)

                async def attempt(is_again: bool) -> list[list[Block]]:
                    await self._stored(slot, window, tokens, flat, told, is_again=is_again)
                    tell = _Teller(told, "link", len(names))
                    blocks = await _in_thread(self._files.take, part, names, tell, teller=tell)
                    await self._must_be_alike(blocks, names)
                    return blocks

                blocks = await _retried("block_write", attempt)
        manifest = made(window, tokens, hashes, blocks, slot.identity)
        await _in_thread(self._files.finish, part, manifest)
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
        missing = await _in_thread(self._tier.missing, names)
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
            left = await _in_thread(self._tier.missing, missing)
            if not left:
                return
            if len(left) < len(missing):
                patience_until = time.monotonic() + STALL_S
            elif time.monotonic() > patience_until:
                await _in_thread(self._must_have_disk)
                raise StorageWriteFailed(
                    f"{len(left)} of {len(names)} blocks were not stored by the KV cache server."
                )
            missing = left
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    def _must_have_disk(self) -> None:
        """LMCache tells nobody that it could not write for that reason. Raises InsufficientDisk."""
        if shutil.disk_usage(self._tier.directory).free < LEAST_DISK:
            raise InsufficientDisk(
                "The disk under server.state_dir is full.",
                action="Free space there, or delete old windows with 'hive window delete'.",
            )

    async def _must_be_alike(
        self, blocks: Sequence[Sequence[Block]], names: Sequence[Sequence[str]]
    ) -> None:
        """A block shorter than the others was cut off by a crash, and LMCache never mends one."""
        size = max((block.size for chunk in blocks for block in chunk), default=0)
        if 0 < len(names) < FEW:  # all of them may have been cut off alike
            beginning = names[0][0].rpartition("@0x")[0] + "@"
            size = max(size, await _in_thread(self._tier.largest, beginning))
        short = [
            name
            for chunk, named in zip(blocks, names, strict=True)
            for block, name in zip(chunk, named, strict=True)
            if block.size != size or not size
        ]
        if short:
            for name in short:
                (self._tier.directory / name).unlink(missing_ok=True)
            raise StorageWriteFailed(f"{len(short)} blocks in the KV tier were not whole.")

    async def _undone(self, window: Window) -> None:
        """As if nothing had been tried (R107), unless it was done before its client left."""
        try:
            row = await self._catalogue.window_by_id(window.id)
            if row is not None and row.state is WindowState.FROZEN:
                return
            await _in_thread(self._files.remove, window.id)
            self._tier.look_again()
            await self._catalogue.remove_window(window.id)
        except HiveError:
            # The next start finds the row and what belongs to it, and takes both away.
            log.critical("a freeze could not be undone (window %s)", window.id, exc_info=True)

    async def _must_be_free(self, owner: str, name: str) -> None:
        if await self._catalogue.has_window(name, owner):
            raise WindowAlreadyExists(f"Window name already exists: {name}")

    async def _must_have_room(self, owner: str) -> None:
        """For one window more. Raises StorageQuotaExceeded."""
        count, _ = await self._catalogue.usage(owner)
        most = self._settings.max_windows
        if most and count >= most:
            raise StorageQuotaExceeded(
                f"Storage quota exceeded: this key has {count} windows, and may have {most}."
            )
        await self._must_have_bytes(owner, 0)

    async def _must_have_bytes(self, owner: str, more: int) -> None:
        """For so many more. Raises StorageQuotaExceeded."""
        _, size = await self._catalogue.usage(owner)
        most = int(self._settings.max_gib * GIB)
        if most and size + more > most:
            raise StorageQuotaExceeded(
                f"Storage quota exceeded: this key's windows would have {(size + more) / GIB:.3f} "
                f"GiB, and may have {self._settings.max_gib:g}."
            )

    # ── thaw ────────────────────────────────────────────────────────────────────────────────────

    async def thaw(
        self,
        owner: str | None,
        name: str,
        *,
        session_id: str | None = None,
        require_full: bool = False,
        told: Progress = unheard,
    ) -> Thawed:
        """Into its own session, or into a new one with the window's salt.

        Raises WindowNotFound, SessionNotFound, SessionIsolation, InvalidStateTransition,
        ModelIncompatible, StorageCorrupted (nothing is usable), BlockNotFound (`require_full`).
        """
        began = time.monotonic()
        if session_id is not None:
            checked_id(session_id)
        window = await self.window(owner, name)
        async with self._noted("thaw", name, window) as note, self._alone(window):
            session = None
            if session_id is not None:
                session = await self._catalogue.session(session_id, owner)
                _must_be_of(window, session)
            async with _limited(_limit_s(window.tokens), began):
                manifest = await _in_thread(self._files.manifest, window.id)
                receipt, warnings = await self._restored(manifest, require_full, told)
            if session is None:
                session = await self._sessions.create(
                    window.owner,
                    window.model,
                    salt=window.salt,
                    state=SessionState.THAWED,
                    conversation=window.conversation,
                    window_id=window.id,
                )
            else:
                more = {
                    "conversation": window.conversation,
                    "used_at": time.time(),
                    "window_id": window.id,
                }
                await self._sessions.move(session, SessionState.THAWED, **more)
                session = replace(session, state=SessionState.THAWED)
            receipt["session_id"] = session.id
            await self._catalogue.note_receipt(window.id, receipt)
            promised = int(receipt["usable_tokens"])
            self._sessions.expects(session.id, window.id, name, promised)
            note.session, note.blocks = session.id, int(receipt["blocks_found"])
            messages = conversations.messages_of(window.conversation)
            return Thawed(session, messages, receipt, warnings)

    async def _restored(
        self, manifest: Manifest, require_full: bool, told: Progress
    ) -> tuple[dict[str, Any], list[str]]:
        """Put what is whole where the engine finds it; the receipt, and what to warn of."""
        async with self._engines.slot(manifest.model, manifest.session_id) as slot:
            _must_fit(manifest, slot.identity)
            shape = slot.shape
        hashes = [bytes.fromhex(one) for one in manifest.hashes]
        names = _names(shape, hashes, manifest.salt)
        with self._tier.holding(name for chunk in names for name in chunk):
            health = await self._health(manifest, told)
            whole = [one.is_whole for one in health]
            found = usable(whole, shape.chunk_tokens)
            if not found.usable_tokens and manifest.blocks:
                raise StorageCorrupted(
                    f"Context data failed its integrity check: none of the {len(whole)} blocks of "
                    "the window can be used."
                )
            if require_full and found.is_partial:
                raise BlockNotFound(
                    f"Some context data is unavailable: {found.blocks_missing} blocks are missing "
                    "or damaged."
                )

            def give_back() -> int:
                linked = 0
                for at, one in enumerate(health):
                    if one.is_whole:
                        linked += self._files.give_back(manifest, at, names[at])
                    else:
                        self._files.drop(manifest, at, one, names[at])
                return linked

            linked = await _retried("storage", lambda _: _in_thread(give_back))
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

    async def _health(self, manifest: Manifest, told: Progress) -> list[Health]:
        tell = _Teller(told, "check", len(manifest.blocks))
        health = await _retried(
            "storage", lambda _: _in_thread(self._files.health, manifest, tell, teller=tell)
        )
        if any(one.corrupt for one in health):
            # LMCache checks nothing, so an engine may load it at any moment, whoever asks.
            await _in_thread(self._files.expel, manifest, health)
            self._tier.look_again()
        return health

    # ── look, clone, delete ─────────────────────────────────────────────────────────────────────

    async def window(self, owner: str | None, name: str) -> Window:
        """Raises InvalidWindowName, WindowNotFound; InvalidParameter where several fit an admin."""
        checked_name(name)
        found = await self._catalogue.windows(owner, name=name, most=2)
        if not found:
            raise WindowNotFound(f"Window not found: {name}")
        if len(found) > 1:
            raise InvalidParameter(
                "Invalid parameter: owner. Several keys have a window of that name.",
                param="owner",
                action="Say whose with ?owner=KEY_NAME.",
            )
        return found[0]

    async def has_own(self, owner: str, name: str) -> bool:
        """Whether a key has a window of that name itself."""
        return bool(await self._catalogue.windows(owner, name=name, most=1))

    async def status(self, owner: str | None, name: str) -> "Status":
        """With its family, and how much of it LMCache has at hand."""
        window = await self.window(owner, name)
        ancestors, clones = await self._catalogue.lineage(window)
        in_tier = await _in_thread(self._in_tier, window)
        return Status(window, ancestors, clones, in_tier)

    def _in_tier(self, window: Window) -> int | None:
        """How many of its files LMCache's tier has, by whichever name; None: that is not known."""
        try:
            manifest = self._files.manifest(window.id)
            return self._files.shared(manifest)
        except HiveError:
            return None

    async def windows(self, owner: str | None, **more: Any) -> list[Window]:
        """A page of them; see Catalogue.windows for what may be asked."""
        return await self._catalogue.windows(owner, **more)

    async def clone(self, owner: str | None, name: str, new_name: str) -> Window:
        """Another window of the same blocks; it costs links only. Raises WindowAlreadyExists."""
        checked_name(new_name)
        window = await self.window(owner, name)
        async with self._noted("clone", new_name, window) as note, self._alone(window):
            await self._must_be_free(window.owner, new_name)
            await self._must_have_room(window.owner)
            manifest = await _in_thread(self._files.manifest, window.id)
            cloned = structs.replace(
                manifest,
                id=secrets.token_hex(16),
                name=new_name,
                created_at=time.time(),
                parent_id=window.id,
            )
            row = cloned.window()
            await self._must_have_bytes(window.owner, row.bytes)
            try:
                await self._catalogue.begin_window(row, self._settings.max_windows)
                await _in_thread(self._files.clone, manifest, cloned)
                await self._catalogue.commit_window(row, keep_active=True)
            except BaseException:
                await _to_the_end(self._undone(row))
                raise
            note.blocks, note.bytes = row.blocks, row.bytes
            await self.count()
            return replace(row, state=WindowState.FROZEN)

    async def delete(self, owner: str | None, name: str) -> None:
        """It is not found from the first step on; a deletion that is cut off ends at the next start."""
        window = await self.window(owner, name)
        async with self._noted("delete", name, window) as note, self._alone(window):
            note.blocks, note.bytes = window.blocks, window.bytes
            # Half deleted nobody could find it, to delete it again.
            await _to_the_end(self._deleted(window.id))
            await self.count()

    async def _deleted(self, window_id: str) -> None:
        await self._catalogue.begin_removal(window_id)
        await self.removed(window_id)

    async def removed(self, window_id: str) -> None:
        """Its files first, its row last."""
        await _retried("storage", lambda _: _in_thread(self._files.remove, window_id))
        self._tier.look_again()
        await self._catalogue.remove_window(window_id)

    # ── verify and repair ───────────────────────────────────────────────────────────────────────

    async def verify(self, owner: str | None, name: str, told: Progress = unheard) -> Report:
        """Read every byte of it. Raises StorageCorrupted where its manifest is no help any more."""
        window = await self.window(owner, name)
        async with self._noted("verify", name, window) as note, self._alone(window):
            manifest = await _in_thread(self._files.manifest, window.id)
            health = await self._health(manifest, told)
            note.blocks = len(health)
            return _report(name, health)

    async def repair(self, owner: str | None, name: str, told: Progress = unheard) -> Report:
        """Each damaged block again: from LMCache's tier where the same bytes are there, else
        computed anew. Raises ModelIncompatible, StorageCorrupted, or what keeps it from being
        stored; what was recovered before stays."""
        began = time.monotonic()
        window = await self.window(owner, name)
        async with self._noted("repair", name, window) as note, self._alone(window):
            manifest = await _in_thread(self._files.manifest, window.id)
            async with _limited(_limit_s(window.tokens), began):
                health = await self._health(manifest, told)
                damaged = [at for at, one in enumerate(health) if not one.is_whole]
                if not damaged:
                    return _report(name, health)
                async with self._engines.slot(window.model, window.session_id) as slot:
                    _must_fit(manifest, slot.identity)
                    report = await self._mended(manifest, health, damaged, slot, told)
            note.blocks = report.recovered + report.recomputed
            return report

    async def _mended(
        self,
        manifest: Manifest,
        health: list[Health],
        damaged: list[int],
        slot: Slot,
        told: Progress,
    ) -> Report:
        hashes = [bytes.fromhex(one) for one in manifest.hashes]
        names = _names(slot.shape, hashes, manifest.salt)
        flat = [name for at in damaged for name in names[at]]
        blocks, recovered, again = list(manifest.blocks), 0, []
        with self._tier.holding(flat):

            def recover() -> None:
                nonlocal recovered
                for at in damaged:
                    self._files.drop(manifest, at, health[at], names[at])
                    if self._files.take_again(manifest, at, names[at], as_it_was=True):
                        recovered += 1
                    else:
                        again.append(at)
                        for name in names[at]:  # whatever it is, it is not what was frozen
                            (self._tier.directory / name).unlink(missing_ok=True)

            await _in_thread(recover)
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

                    await _in_thread(take)

                await _retried("block_write", attempt)
                mended = structs.replace(manifest, blocks=blocks)
                await _in_thread(self._files.rewrite, mended)
                await self._catalogue.note_bytes(manifest.id, mended.bytes)
        whole = [Health() for _ in health]
        return replace(_report(manifest.name, whole), recovered=recovered, recomputed=len(again))

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    async def count(self) -> None:
        """Tell how many there are."""
        with contextlib.suppress(StoreUnreachable):  # what was done is done all the same
            for state, count in (await self._catalogue.counts()).items():
                self._announcer.announce(WindowsCounted(str(state), count))

    @asynccontextmanager
    async def _alone(self, window: Window) -> AsyncIterator[None]:
        """Nothing else is done with it meanwhile. Raises InvalidStateTransition."""
        if window.id in self._busy:
            raise InvalidStateTransition(
                "Cannot perform this operation in current state: another operation on the window "
                "is under way."
            )
        self._busy.add(window.id)
        try:
            yield
        finally:
            self._busy.discard(window.id)

    @asynccontextmanager
    async def _noted(
        self, operation: str, name: str, about: Session | Window
    ) -> AsyncIterator["_Note"]:
        """Announce how it ended (R115); what nobody foresaw becomes InternalError (R116)."""
        session = about.id if isinstance(about, Session) else about.session_id
        note, began = _Note(session), time.monotonic()
        code = ""
        try:
            yield note
        except HiveError as exc:
            code = exc.code
            raise
        except asyncio.CancelledError:
            code = "REQUEST_CANCELLED"
            raise
        except Exception as exc:
            code = InternalError.code
            log.exception("%s of a window met what nobody foresaw", operation)
            raise InternalError from exc
        finally:
            self._announcer.announce(
                WindowOperationEnded(
                    operation,
                    name,
                    note.session,
                    about.model,
                    time.monotonic() - began,
                    code,
                    note.blocks,
                    note.bytes,
                )
            )

    def __repr__(self) -> str:
        return f"<Windows {self._files!r}>"


@dataclass(slots=True)
class _Note:
    """What an operation's end tells."""

    session: str
    blocks: int = 0
    bytes: int = 0


def checked_name(name: str) -> str:
    """Raises InvalidWindowName."""
    if not NAME.match(name):
        raise InvalidWindowName(param="name")
    return name


def _names(shape: Shape, hashes: Sequence[bytes], salt: str) -> list[list[str]]:
    return [block_names(shape, one, salt) for one in hashes]


def _limit_s(tokens: int) -> float:
    return min(MOST_S, LIMIT_S + tokens * PER_TOKEN_S)


class _Limit:
    """How long an operation may take; more, once it is known how large it is."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.timeout = asyncio.timeout(seconds)

    def extend(self, seconds: float) -> None:
        due = self.timeout.when()
        assert due is not None
        self.timeout.reschedule(due + seconds - self.seconds)
        self.seconds = seconds


@asynccontextmanager
async def _limited(seconds: float, began: float) -> AsyncIterator[_Limit]:
    """Raises OperationTimeout."""
    limit = _Limit(seconds)
    try:
        async with limit.timeout:
            yield limit
    except TimeoutError as exc:
        if not limit.timeout.expired():
            raise
        raise OperationTimeout(
            f"The operation took longer than {limit.seconds:g} s.",
            timeout_seconds=limit.seconds,
            elapsed_seconds=round(time.monotonic() - began, 3),
        ) from exc


async def _retried(operation: str, attempt: Callable[[bool], Awaitable[T]]) -> T:
    """By the table (R101): what is tried hears whether it was tried before.

    A file that went away meanwhile counts as one that could not be written.
    """
    policy = RETRIES[operation]

    async def call() -> T:
        try:
            return await attempt(retrying.statistics["attempt_number"] > 1)
        except FileNotFoundError as exc:
            raise StorageWriteFailed("A block went away while it was being linked.") from exc

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s failed, attempt %d: %s", operation, state.attempt_number, error)

    retrying = AsyncRetrying(
        stop=stop_after_attempt(policy.calls),
        wait=lambda state: policy.delay_s(state.attempt_number, random.random()),  # noqa: S311
        # C25: what no repetition helps is told at once.
        retry=retry_if_exception_type((StorageWriteFailed, StorageReadFailed)),
        before_sleep=tell,
        reraise=True,
    )
    return await retrying(call)


def _must_be_of(window: Window, session: Session) -> None:
    """A window goes back into the session that it was made from, or into a new one."""
    if session.salt != window.salt or session.model != window.model:
        raise SessionIsolation(
            "The window was not frozen from this session.",
            action="Thaw it without session_id: that makes a session of its own.",
        )
    if session.state is not SessionState.FROZEN:
        raise InvalidStateTransition(
            f"Cannot perform this operation in current state: the session is {session.state}.",
            action="Thaw it without session_id: that makes a session of its own.",
        )


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


def _report(name: str, health: Sequence[Health]) -> Report:
    return Report(
        name=name,
        blocks=len(health),
        whole=sum(one.is_whole for one in health),
        missing=[block for one in health for block in one.missing],
        corrupt=[block for one in health for block in one.corrupt],
    )


class _Stopped(Exception):
    """Raised in a thread whose work nobody waits for any more."""


class _Teller:
    """A thread's progress, told in the loop; and the loop's wish that it stops, told in the thread."""

    def __init__(self, told: Progress, phase: str, total: int) -> None:
        self._told, self._phase, self._total = told, phase, total
        self._loop = asyncio.get_running_loop()
        self.is_stopped = False

    def __call__(self, done: int) -> None:
        if self.is_stopped:
            raise _Stopped
        if self._told is not unheard:
            self._loop.call_soon_threadsafe(self._told, self._phase, done, self._total)


# Its own threads: however slow the disk is, engines are started and watched meanwhile.
_threads = ThreadPoolExecutor(THREADS, "windows")


async def _in_thread(work: Callable[..., T], *args: Any, teller: _Teller | None = None) -> T:
    """What blocks. Cancelled, it stops where it can, and nothing is done before it has: what undoes
    it would be in its way."""
    loop = asyncio.get_running_loop()
    return await _to_the_end(loop.run_in_executor(_threads, partial(work, *args)), teller)


async def _to_the_end(doing: Awaitable[T], teller: _Teller | None = None) -> T:
    """Wait for it; cancelled meanwhile, wait all the same, and be cancelled then."""
    future = asyncio.ensure_future(doing)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if teller is not None:
            teller.is_stopped = True
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # nobody is there to be told
        raise

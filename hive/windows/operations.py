"""Freeze, thaw and what else is done with windows; each is whole or has not happened (R106, R107).

A freeze: the session stands still, its conversation becomes tokens, every full chunk of them is
computed and seen on disk, linked, checksummed and synced, and last the catalogue says so. A thaw
believes nothing: manifest and blocks are checked, the model is compared field by field, missing
blocks go back into LMCache's tier, and the engine's own count at the next request is the proof.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec import structs

from hive.errors import (
    HiveError,
    InternalError,
    InvalidParameter,
    InvalidStateTransition,
    InvalidWindowName,
    OperationTimeout,
    SessionAlreadyFrozen,
    SessionIsolation,
    SessionNotActive,
    StorageQuotaExceeded,
    StoreUnreachable,
    WindowAlreadyExists,
    WindowNotFound,
)
from hive.events import Announcer, RollbackMoved, WindowOperationEnded, WindowsCounted
from hive.policy import conversations
from hive.policy.windows import WINDOW_NAME, SessionState, WindowState
from hive.settings import Settings
from hive.storage.catalogue import GIB, Catalogue, Session, Window, must_fit
from hive.storage.finishing import to_the_end
from hive.windows.blocks import Blocks
from hive.windows.files import Health, WindowFiles
from hive.windows.sessions import Sessions, checked_id
from hive.windows.work import (
    LIMIT_S,
    STATE,
    Progress,
    in_thread,
    left_behind,
    limit_s,
    limited,
    retried,
    unheard,
)

log = logging.getLogger(__name__)

AGAIN_S = (1.0, 30.0)  # between two tries to remove what cannot be removed, first and longest


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
    """Every call names the `owner` who asks: None is an admin, who may see everybody's.

    `running` must be entered for anything to be frozen, cloned or deleted.
    """

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        files: WindowFiles,
        blocks: Blocks,
        sessions: Sessions,
        announcer: Announcer,
    ) -> None:
        self.apply(settings)
        self._catalogue, self._files, self._blocks = catalogue, files, blocks
        self._sessions = sessions
        self._announcer = announcer
        self._busy: set[str] = set()  # windows that something is done with
        self._removals: set[asyncio.Task[None]] = set()
        self._tasks: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What cannot be removed is tried again while the block runs."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                yield
            finally:
                self._tasks = None  # what is left to be removed is so at the next start
                for one in self._removals:
                    one.cancel()

    def apply(self, settings: Settings) -> None:
        """These limits, from now on."""
        self._settings = settings.windows
        self._most_bytes = int(self._settings.max_gib * GIB)  # of one key

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
            async with self.noted("freeze", name, session) as note:
                await self._sessions.recorded(session_id)
                session = await self._catalogue.session(session_id, owner)
                if session.state is SessionState.FROZEN:  # by somebody who was first
                    raise SessionAlreadyFrozen
                self._sessions.must_be_recorded(session_id)
                said = await self._catalogue.conversation(session_id, owner)
                if said is None:
                    raise InvalidStateTransition(
                        "Cannot perform this operation in current state: nothing was answered in "
                        "the session yet.",
                        action="Send a request with X-Hive-Session first, and freeze what was answered.",
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
                    description=description,
                    tags=tuple(tags),
                )
                try:
                    await self._catalogue.begin_window(window, self._settings.max_windows)
                    async with limited(LIMIT_S, began) as limit:
                        window = await self._blocks.captured(window, said, limit, told)
                    await self._committed(window, keep_active=keep_active)
                except BaseException:
                    await to_the_end(self._gone(window.id))
                    raise
                if not keep_active:
                    self._sessions.moved(session, SessionState.FROZEN)
                note.blocks, note.bytes = window.blocks, window.bytes
                await self.count()
                return replace(window, state=WindowState.FROZEN)

    async def _committed(self, window: Window, *, keep_active: bool) -> None:
        """`commit_window`; where nobody was told how that ended, what became of it counts."""
        try:
            await self._catalogue.commit_window(
                window, keep_active=keep_active, most_bytes=self._most_bytes
            )
        except StoreUnreachable:
            row = None
            with contextlib.suppress(StoreUnreachable):  # then the first one is told
                row = await self._catalogue.window_by_id(window.id)
            if row is None or row.state is not WindowState.FROZEN:
                raise
            log.warning("window %s: its commit came late, and has happened", window.name)

    async def _gone(self, window_id: str) -> HiveError | None:
        """Take away a window, as if nothing had been tried (R107); what kept the first try from it.

        One that is frozen all the same, because its client left too late, stays. It is tried until it is gone, while `running`, and by the next start after that: its row is
        there as long, and so is its name.
        """
        if self._tasks is None:
            return OperationTimeout("hive is ending: the window is removed at its next start.")
        first: asyncio.Future[HiveError | None] = asyncio.get_running_loop().create_future()
        removing = self._tasks.create_task(
            self._removing(window_id, first), name=f"remove:{window_id}"
        )
        self._removals.add(removing)
        removing.add_done_callback(self._removals.discard)
        return await to_the_end(first)

    async def _removing(self, window_id: str, first: "asyncio.Future[HiveError | None]") -> None:
        pause_s = AGAIN_S[0]
        error: HiveError | None = None
        is_told = False
        try:
            while True:
                if STATE.hangs and not first.done():
                    error = OperationTimeout("The disk under server.state_dir hangs.")
                    first.set_result(error)
                    is_told = self._told_of_rollback(window_id, error.code)
                error = await self._tried_to_remove(window_id)
                if not first.done():
                    first.set_result(error)
                if error is None:
                    if is_told:
                        self._announcer.announce(RollbackMoved(window_id, is_undone=True))
                    return
                is_told = is_told or self._told_of_rollback(window_id, error.code)
                log.critical(
                    "a window could not be removed (%s): %s; that is tried again in %g s",
                    *(window_id, error.message, pause_s),
                )
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, AGAIN_S[1])
        finally:
            if not first.done():  # it was broken off: the next start takes it away
                first.set_result(error or OperationTimeout("hive is ending."))

    def _told_of_rollback(self, window_id: str, code: str) -> bool:
        self._announcer.announce(RollbackMoved(window_id, is_undone=False, code=code))
        return True

    async def _tried_to_remove(self, window_id: str) -> HiveError | None:
        try:
            await STATE.nothing_hangs()  # what still writes there would be in the way
            async with limited(LIMIT_S, time.monotonic()):
                row = await self._catalogue.window_by_id(window_id)
                if row is None or row.state is not WindowState.FROZEN:
                    await self.removed(window_id)
        except HiveError as exc:
            return exc
        except Exception as exc:  # the boundary of a task nobody waits for
            log.exception("removing a window met what nobody foresaw")
            return InternalError(repr(exc))
        return None

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
        """For so many more, as it looks now. Raises StorageQuotaExceeded."""
        if self._most_bytes:
            _, size = await self._catalogue.usage(owner)
            must_fit(size + more, self._most_bytes)

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
        async with self.noted("thaw", name, window) as note, self.alone(window):
            session = None
            if session_id is not None:
                session = await self._catalogue.session(session_id, owner)
                _must_be_of(window, session)
            async with limited(limit_s(window.tokens), began):
                manifest = await self._blocks.manifest(window.id)
                receipt, warnings = await self._blocks.restored(manifest, require_full, told)
            said = manifest.conversation
            if session is None:
                session = await self._sessions.create(
                    window.owner,
                    window.model,
                    salt=window.salt,
                    state=SessionState.THAWED,
                    conversation=said,
                    window_id=window.id,
                )
            else:
                more = {
                    "conversation": said,
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
            messages = conversations.messages_of(said)
            return Thawed(session, messages, receipt, warnings)

    # ── look, clone, delete ─────────────────────────────────────────────────────────────────────

    async def window(self, owner: str | None, name: str) -> Window:
        """Raises InvalidWindowName, WindowNotFound; InvalidParameter where several fit an admin."""
        checked_name(name)
        found = await self._catalogue.named(name, owner)
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
        return bool(await self._catalogue.named(name, owner))

    async def status(self, owner: str | None, name: str) -> "Status":
        """With its family, and how much of it LMCache has at hand."""
        window = await self.window(owner, name)
        ancestors, clones = await self._catalogue.lineage(window)
        in_tier = await self._blocks.in_tier(window.id)
        return Status(window, ancestors, clones, in_tier)

    async def windows(self, owner: str | None, **more: Any) -> list[Window]:
        """A page of them; see Catalogue.windows for what may be asked."""
        return await self._catalogue.windows(owner, **more)

    async def clone(self, owner: str | None, name: str, new_name: str) -> Window:
        """Another window of the same blocks; it costs links only. Raises WindowAlreadyExists."""
        began = time.monotonic()
        checked_name(new_name)
        window = await self.window(owner, name)
        async with self.noted("clone", new_name, window) as note, self.alone(window):
            async with limited(LIMIT_S, began):
                manifest = await self._blocks.manifest(window.id)
            cloned = structs.replace(
                manifest,
                id=secrets.token_hex(16),
                name=new_name,
                created_at=time.time(),
                parent_id=window.id,
            )
            row = cloned.window()

            async def fill() -> None:
                async with limited(limit_s(row.tokens), began):
                    await retried(
                        "storage", lambda _: in_thread(self._files.clone, manifest, cloned)
                    )

            done = await self.added(row, fill)
            note.blocks, note.bytes = done.blocks, done.bytes
            return done

    async def added(self, row: Window, fill: Callable[[], Awaitable[None]]) -> Window:
        """A window whose folder `fill` makes: it is there whole, or as if it was never tried.

        Raises WindowAlreadyExists, StorageQuotaExceeded, and whatever `fill` does.
        """
        await self._must_be_free(row.owner, row.name)
        await self._must_have_room(row.owner)
        await self._must_have_bytes(row.owner, row.bytes)
        try:
            await self._catalogue.begin_window(row, self._settings.max_windows)
            await fill()
            await self._committed(row, keep_active=True)
        except BaseException:
            await to_the_end(self._gone(row.id))
            raise
        await self.count()
        return replace(row, state=WindowState.FROZEN)

    async def delete(self, owner: str | None, name: str) -> None:
        """It is not found from the first step on; what cannot be removed then is tried again."""
        window = await self.window(owner, name)
        async with self.noted("delete", name, window) as note, self.alone(window):
            note.blocks, note.bytes = window.blocks, window.bytes
            # Half deleted nobody could find it, to delete it again.
            await to_the_end(self._deleted(window.id))
            await self.count()

    async def _deleted(self, window_id: str) -> None:
        try:
            await self._catalogue.begin_removal(window_id)
        except StoreUnreachable:
            await self._gone(window_id)  # where it was begun all the same, nobody could again
            raise
        if error := await self._gone(window_id):
            raise error

    async def removed(self, window_id: str) -> None:
        """Its files first, its row last."""
        await self._blocks.removed(window_id)
        await self._catalogue.remove_window(window_id)

    # ── verify and repair ───────────────────────────────────────────────────────────────────────

    async def verify(self, owner: str | None, name: str, told: Progress = unheard) -> Report:
        """Read every byte of it. Raises StorageCorrupted where its manifest is no help any more."""
        began = time.monotonic()
        window = await self.window(owner, name)
        async with self.noted("verify", name, window) as note, self.alone(window):
            async with limited(limit_s(window.tokens), began):
                manifest = await self._blocks.manifest(window.id)
                health = await self._blocks.health(manifest, told)
            note.blocks = len(health)
            return _report(name, health)

    async def repair(self, owner: str | None, name: str, told: Progress = unheard) -> Report:
        """Each damaged block again: from LMCache's tier where the same bytes are there, else
        computed anew. Raises ModelIncompatible, StorageCorrupted, or what keeps it from being
        stored; what was recovered before stays."""
        began = time.monotonic()
        window = await self.window(owner, name)
        async with self.noted("repair", name, window) as note, self.alone(window):
            async with limited(limit_s(window.tokens), began):
                manifest = await self._blocks.manifest(window.id)
                health = await self._blocks.health(manifest, told)
                if all(one.is_whole for one in health):
                    return _report(name, health)
                done = await self._blocks.mended(manifest, health, told)
                await self._catalogue.note_bytes(window.id, done.manifest.bytes)
            report = replace(
                _report(name, [Health() for _ in health]),
                recovered=done.recovered,
                recomputed=done.recomputed,
            )
            note.blocks = report.recovered + report.recomputed
            return report

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    async def count(self) -> None:
        """Tell how many there are."""
        with contextlib.suppress(StoreUnreachable):  # what was done is done all the same
            for state, count in (await self._catalogue.counts()).items():
                self._announcer.announce(WindowsCounted(str(state), count))

    @asynccontextmanager
    async def alone(self, window: Window) -> AsyncIterator[None]:
        """Nothing else is done with it meanwhile, nor while a disk keeps what was: whoever comes back
        late finds nobody's work but its own. Raises InvalidStateTransition.
        """
        if window.id in self._busy:
            raise InvalidStateTransition(
                "Cannot perform this operation in current state: another operation on the window "
                "is under way."
            )
        self._busy.add(window.id)
        with left_behind() as left:
            try:
                yield
            finally:
                self._let_go(window.id, left)

    def _let_go(self, window_id: str, left: "set[asyncio.Future[Any]]") -> None:
        """As soon as nothing is at work on it any more."""

        def came_back(doing: "asyncio.Future[Any]") -> None:
            left.discard(doing)
            self._let_go(window_id, left)

        for doing in left:
            if not doing.done():
                doing.add_done_callback(came_back)
                return
        self._busy.discard(window_id)

    @asynccontextmanager
    async def noted(
        self, operation: str, name: str, about: Session | Window
    ) -> AsyncIterator["Note"]:
        """Announce how it ended (R115); what nobody foresaw becomes InternalError (R116)."""
        session = about.id if isinstance(about, Session) else about.session_id
        note, began = Note(session), time.monotonic()
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
class Note:
    """What an operation's end tells."""

    session: str
    blocks: int = 0
    bytes: int = 0


def checked_name(name: str) -> str:
    """Raises InvalidWindowName."""
    if not WINDOW_NAME.match(name):
        raise InvalidWindowName(param="name")
    return name


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


def _report(name: str, health: Sequence[Health]) -> Report:
    return Report(
        name=name,
        blocks=len(health),
        whole=sum(one.is_whole for one in health),
        missing=[block for one in health for block in one.missing],
        corrupt=[block for one in health for block in one.damaged],
    )

"""Sessions: who may go on with a conversation, what was said last, and when nobody may any more.

The catalogue has their states; what happens at this moment is known here alone: which of them an
engine answers now, whose answer is being written down, and which is being frozen.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from hive.errors import (
    InvalidParameter,
    InvalidSessionId,
    InvalidStateTransition,
    ModelNotFound,
    SessionNotActive,
    StoreUnreachable,
)
from hive.events import Announcer, SessionMoved, ThawProved
from hive.policy import conversations
from hive.policy.conversations import Kind
from hive.policy.windows import NEXT, SESSION_ID, SessionState
from hive.settings import Settings
from hive.storage.catalogue import Catalogue, Session

log = logging.getLogger(__name__)

SALT_BYTES = 16  # 22 characters
EXPIRE_S = 30.0  # between two looks for idle sessions
MOST_UNPROVED = 10_000  # thaws whose next request is waited for
MOST_HEARD = 64 * 2**20  # bytes of an answer; of a longer one nothing is recorded
_TAKES = (SessionState.ACTIVE, SessionState.THAWED)


@dataclass(slots=True)
class _Use:
    """What a session is in use for at this moment."""

    answering: int = 0
    # Answers that are written down, each after the one before it.
    recording: list["asyncio.Future[None]"] = field(default_factory=list)
    is_freezing: bool = False

    @property
    def is_quiet(self) -> bool:
        return not (self.answering or self.recording or self.is_freezing)


class Visit:
    """One request of a session: the relay tells it what is answered, byte by byte."""

    def __init__(self, sessions: "Sessions", session: Session, kind: Kind, body: bytes) -> None:
        """`body` is the request as its client sent it."""
        self.session = session
        self._sessions, self._kind, self._body = sessions, kind, body
        self._parts: list[bytes] = []
        self._size = 0
        self._is_over = False

    def begins(self) -> None:
        """An answer begins; of an earlier attempt nothing counts."""
        self._parts.clear()
        self._size = 0

    def heard(self, part: bytes) -> None:
        """A part of the answer's body, without its framing."""
        self._size += len(part)
        if self._size <= MOST_HEARD:
            self._parts.append(part)
        else:
            self._parts.clear()

    def ended(self, status: int, *, is_stream: bool) -> None:
        """The answer is whole. Its client may ask for a freeze before anything else runs."""
        if not self._is_over:
            self._is_over = True
            is_good = 200 <= status < 300 and self._size <= MOST_HEARD  # noqa: PLR2004
            answer = b"".join(self._parts) if is_good else None
            self._sessions.answered(self.session, self._kind, self._body, answer, is_stream)

    def leave(self) -> None:
        """The request is over, whichever way it ended."""
        if not self._is_over:
            self._is_over = True
            self._sessions.answered(self.session, self._kind, self._body, None, is_stream=False)


class Sessions:
    """Of every model with `windows = true`. `running` must be entered for anything to be recorded."""

    def __init__(self, settings: Settings, catalogue: Catalogue, announcer: Announcer) -> None:
        self.apply(settings)
        self._catalogue, self._announcer = catalogue, announcer
        self._uses: dict[str, _Use] = {}
        self._changes = 0  # of states, by anybody here
        self._unproved: dict[str, tuple[str, str, int]] = {}  # by session: window and promise
        self._behind: set[str] = set()  # whose last answer could not be written down
        self._expiring_before: float | None = None  # what was not used since then expires just now
        self._has_expired = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Record answers and expire idle sessions while the block runs; then end what is left."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            expiring = tasks.create_task(self._expiring(), name="expire sessions")
            try:
                yield
            finally:
                expiring.cancel()  # what is being recorded is awaited

    def apply(self, settings: Settings) -> None:
        """These limits, from now on; a shorter idle time at the next look."""
        self._models = settings.models
        self._idle_s = settings.windows.session_idle_s
        self._most = settings.windows.max_sessions

    # ── for clients ─────────────────────────────────────────────────────────────────────────────

    async def create(
        self,
        owner: str,
        model: str,
        *,
        salt: str | None = None,
        state: SessionState = SessionState.ACTIVE,
        conversation: dict[str, Any] | None = None,
        window_id: str | None = None,
    ) -> Session:
        """A new one. Raises ModelNotFound, or InvalidParameter for a model without windows."""
        configured = self._models.get(model)
        if configured is None:
            names = sorted(self._models)
            raise ModelNotFound(
                f"The requested model is not served here; served: {', '.join(names)}.",
                param="model",
                available_models=names,
            )
        if not configured.windows:
            raise InvalidParameter(
                "Invalid parameter: model. It is served without context windows.",
                param="model",
                allowed=sorted(name for name, one in self._models.items() if one.windows),
                action="Name a model with windows = true, or ask the operator to set that.",
            )
        now = time.time()
        session = Session(
            id=secrets.token_hex(12),
            owner=owner,
            model=model,
            salt=salt or secrets.token_urlsafe(SALT_BYTES),
            created_at=now,
            used_at=now,
            state=state,
            has_conversation=conversation is not None,
            window_id=window_id,
        )
        await self._catalogue.add_session(session, conversation, self._most)
        self._announcer.announce(SessionMoved(session.id, model, "", str(state)))
        return session

    async def find(self, session_id: str, owner: str | None) -> Session:
        """As it is when what was answered in it is written down.

        Raises InvalidSessionId, SessionNotFound.
        """
        await self.recorded(checked_id(session_id))
        return await self._catalogue.session(session_id, owner)

    async def messages(self, session: Session) -> list[Any]:
        """What was said in it. Raises SessionNotFound."""
        said = await self._catalogue.conversation(session.id, session.owner)
        return conversations.messages_of(said) if said else []

    async def listed(
        self, owner: str | None, *, state: SessionState | None, most: int
    ) -> list[Session]:
        """The last used first."""
        return await self._catalogue.sessions(owner, state=state, most=most)

    async def delete(self, session_id: str, owner: str | None) -> None:
        """Its windows stay. Raises SessionNotFound; InvalidStateTransition while it is in use."""
        session = await self.find(session_id, owner)
        with self.frozen_still(session_id):
            session = await self._catalogue.session(session_id, owner)
            if SessionState.DELETED not in NEXT[session.state]:
                raise InvalidStateTransition(f"The session is {session.state}.")
            await self._catalogue.remove_session(session_id, session.state)
            self.moved(session, SessionState.DELETED)

    async def enter(
        self, session_id: str, owner: str | None, model: str, kind: Kind, body: bytes
    ) -> Visit:
        """A request is about to be sent on; `leave` its visit in any case.

        Raises SessionNotFound (CWM-2001), SessionNotActive (CWM-3004), InvalidParameter where the
        session is another model's.
        """
        while True:
            changes = self._changes
            session = await self._catalogue.session(checked_id(session_id), owner)
            if self._expiring_before is not None and session.used_at < self._expiring_before:
                await self._has_expired.wait()  # it may be one of those that expire just now
            elif changes == self._changes:
                break  # else it may be older than what was just decided
        use = self._uses.get(session_id)
        if use is not None and use.is_freezing:
            raise SessionNotActive("The session is being frozen.", state="FREEZING")
        if session.state not in _TAKES:
            raise SessionNotActive(f"The session is {session.state}.", state=str(session.state))
        if session.model != model:
            raise InvalidParameter(
                "Invalid parameter: model. The session is one of another model.",
                param="model",
                allowed=[session.model],
                action="Name the session's own model.",
            )
        self._uses.setdefault(session_id, _Use()).answering += 1
        return Visit(self, session, kind, body)

    # ── while they are used ─────────────────────────────────────────────────────────────────────

    def answered(
        self, session: Session, kind: Kind, request: bytes, answer: bytes | None, is_stream: bool
    ) -> None:
        """A request is over; with `answer` it has had a whole one, which is written down."""
        use = self._uses[session.id]
        use.answering -= 1
        if answer is None:
            self._forget(session.id)
            return
        assert self._tasks is not None
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        before = use.recording[-1] if use.recording else None
        use.recording.append(done)
        self._tasks.create_task(
            self._record(session, kind, request, answer, is_stream, before, done),
            name=f"record:{session.id}",
        )

    async def _record(
        self,
        session: Session,
        kind: Kind,
        request: bytes,
        answer: bytes,
        is_stream: bool,
        before: "asyncio.Future[None] | None",
        done: "asyncio.Future[None]",
    ) -> None:
        if before is not None:
            await asyncio.wait({before})
        try:
            heard = conversations.heard_in(kind, answer, is_stream=is_stream)
            if heard is None:
                log.warning("session %s: an answer was not understood or not whole", session.id)
                return
            told = conversations.conversation(kind, request, heard)
            if await self._catalogue.spoke(session.id, told, time.time()):
                self._behind.discard(session.id)
                if session.state is SessionState.THAWED:
                    self.moved(session, SessionState.ACTIVE)
                if heard.cached_tokens is not None:
                    await self._prove(session, heard.cached_tokens)
        except Exception:  # the boundary of a task nobody waits for
            self._behind.add(session.id)
            log.exception("session %s: what was said is not recorded", session.id)
        finally:
            done.set_result(None)
            self._uses[session.id].recording.remove(done)
            self._forget(session.id)

    def expects(self, session_id: str, window_id: str, window: str, promised_tokens: int) -> None:
        """After a thaw: the next answer that tells its cached tokens is the proof."""
        self._unproved[session_id] = window_id, window, promised_tokens
        while len(self._unproved) > MOST_UNPROVED:
            del self._unproved[next(iter(self._unproved))]

    async def _prove(self, session: Session, cached_tokens: int) -> None:
        expected = self._unproved.pop(session.id, None)
        if expected is None and session.state is SessionState.THAWED and session.window_id:
            expected = await self._promised(session.id, session.window_id)
        if expected is None:
            return
        window_id, window, promised = expected
        await self._catalogue.note_proof(window_id, session.id, cached_tokens)
        proof = ThawProved(window, session.id, session.model, promised, cached_tokens)
        self._announcer.announce(proof)

    async def _promised(self, session_id: str, window_id: str) -> tuple[str, str, int] | None:
        """Of a thaw in an earlier life of hive."""
        window = await self._catalogue.window_by_id(window_id)
        receipt = window.receipt if window else None
        if window is None or not receipt or receipt.get("session_id") != session_id:
            return None
        if "cached_tokens" in receipt:
            return None  # it was proved
        return window.id, window.name, int(receipt["usable_tokens"])

    @contextmanager
    def frozen_still(self, session_id: str) -> Iterator[None]:
        """Nothing is asked in it while the block runs. Raises InvalidStateTransition (CWM-3001)."""
        use = self._uses.setdefault(session_id, _Use())
        if use.is_freezing or use.answering:
            what = "frozen or thawed" if use.is_freezing else "answered in"
            raise InvalidStateTransition(
                f"Cannot perform this operation in current state: the session is being {what}."
            )
        use.is_freezing = True
        try:
            yield
        finally:
            use.is_freezing = False
            self._changes += 1
            self._forget(session_id)

    def must_be_recorded(self, session_id: str) -> None:
        """Raises InvalidStateTransition where the last answer is missing."""
        if session_id in self._behind:
            raise InvalidStateTransition(
                "Cannot perform this operation in current state: the session's last answer could "
                "not be written down.",
                action="Send the last request of the session again, then freeze it.",
            )

    async def recorded(self, session_id: str) -> None:
        """What was answered so far is written down when this returns."""
        use = self._uses.get(session_id)
        if use is not None and use.recording:
            await asyncio.wait(set(use.recording))

    async def move(self, session: Session, new: SessionState, **more: Any) -> None:
        """Raises InvalidStateTransition where the table (C24) has no such step."""
        await self._catalogue.move_session(session.id, session.state, new, **more)
        self.moved(session, new)

    def moved(self, session: Session, new: SessionState) -> None:
        """Tell it, once the catalogue has it."""
        self._changes += 1
        self._announcer.announce(
            SessionMoved(session.id, session.model, str(session.state), str(new))
        )

    def _forget(self, session_id: str) -> None:
        use = self._uses.get(session_id)
        if use is not None and use.is_quiet:
            del self._uses[session_id]

    async def _expiring(self) -> None:
        while True:
            await asyncio.sleep(min(EXPIRE_S, self._idle_s / 2))
            self._expiring_before = since = time.time() - self._idle_s
            self._has_expired.clear()
            try:
                with contextlib.suppress(StoreUnreachable):  # the database is away: later, then
                    if count := await self._catalogue.expire(since, but=[*self._uses]):
                        log.info("%d idle sessions have expired", count)
            finally:
                self._changes += 1
                self._expiring_before = None
                self._has_expired.set()

    def __repr__(self) -> str:
        return f"<Sessions {len(self._uses)} in use>"


def checked_id(session_id: str) -> str:
    """Raises InvalidSessionId."""
    if not SESSION_ID.match(session_id):
        raise InvalidSessionId(param="session_id")
    return session_id


def view(session: Session) -> dict[str, Any]:
    """A session as the API shows it: never its salt."""
    return {
        "id": session.id,
        "state": str(session.state),
        "model": session.model,
        "owner": session.owner or None,
        "created_at": session.created_at,
        "used_at": session.used_at,
        "has_conversation": session.has_conversation,
    }

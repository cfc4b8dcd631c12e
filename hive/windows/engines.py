"""What a window needs of an engine and of LMCache: tokens, blocks that are stored, blocks at hand.

An engine is asked like a client asks it: with a slot of its own, seen by its pulse, told to the
breaker. LMCache has a breaker of its own.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from hive.errors import (
    EngineTimeout,
    EngineUnreachable,
    HiveError,
    InternalError,
    InvalidParameter,
    KvServerUnreachable,
    WorkerCrashed,
)
from hive.policy import conversations
from hive.policy.admission import Priority, Ticket
from hive.policy.breaker import Breaker
from hive.policy.windows import Identity, Shape, shared_prefix
from hive.settings import Settings
from hive.workers.admission import Permit
from hive.workers.client import ProbeFailed
from hive.workers.fleet import Fleet
from hive.workers.life import EngineOver

log = logging.getLogger(__name__)

BACK_PRESSURE = 503
REQUEST_S = 300.0  # for one request to an engine, inside the operation's own limit
CACHE_S = 5.0  # for one request to LMCache
MOST_KEYS = 10_000  # that it takes at once
LOOK_S = (0.01, 0.2)  # between two looks for a prefetch, first and longest


class Slot:
    """A slot of one worker, for hive's own requests to its engine."""

    def __init__(self, fleet: Fleet, permit: Permit, identity: Identity, shape: Shape) -> None:
        self.identity, self.shape = identity, shape
        self._fleet = fleet
        self.worker = permit.worker.id
        self._permit = permit
        self._is_handed_on = False  # an abort gives it back

    def must_have_cache(self) -> None:
        """Raises KvServerUnreachable where what it computes is not stored any more."""
        if not self._fleet.cache_is_up:
            raise KvServerUnreachable(retry_after_s=10.0)
        if not self._fleet.has_cache(self._permit.worker):
            raise _cache_lost(self.worker)

    async def tokens(self, told: dict[str, Any], model: str) -> list[int]:
        """The token ids that every next request of a conversation begins with.

        Raises EngineUnreachable, EngineTimeout, WorkerCrashed, InvalidStateTransition.
        """
        path = conversations.PATHS[conversations.Kind(told["kind"])] + "/render"
        rendered = []
        for body in conversations.next_bodies(told, model):
            answer = await self._ask(path, body, weight=0)
            answer = answer[0] if isinstance(answer, list) and answer else answer
            try:
                rendered.append([int(token) for token in answer["token_ids"]])
                has_more = answer.get("features") is not None
            except (TypeError, LookupError, ValueError) as exc:
                raise EngineUnreachable("The engine's rendered prompt is not understood.") from exc
            if has_more:  # what an image is computed to is not told by its tokens
                raise InvalidParameter(
                    "Invalid parameter: session_id. The conversation has parts that are not text.",
                    param="session_id",
                    action="Freeze conversations of text only.",
                )
        return shared_prefix(rendered)

    async def compute(self, tokens: Sequence[int], model: str, salt: str) -> int:
        """Have the engine compute a prompt, and store its full chunks; what it had in its cache."""
        body = {
            "model": model,
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 0,
            conversations.SALT: salt,
        }
        answer = await self._ask("/v1/completions", body, weight=1)
        details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)

    async def _ask(self, path: str, body: Any, weight: int) -> Any:
        permit = self._permit
        life = permit.life
        pulse = life.pulse
        assert pulse is not None
        pulse.began(weight)
        is_answered = False
        try:
            async with life.until_over():
                status, answer = await life.client.ask("POST", path, body, REQUEST_S)
            is_answered = True
        except EngineOver:
            raise life.error or WorkerCrashed(
                "The engine ended while hive needed it.", worker=self.worker
            ) from None
        except ProbeFailed as exc:
            permit.judge(fault=True)
            if isinstance(exc.__cause__, TimeoutError):
                raise EngineTimeout(worker=self.worker) from exc
            raise EngineUnreachable(worker=self.worker) from exc
        finally:
            if is_answered:
                pulse.ended(weight)
            else:
                self._is_handed_on = True
                pulse.aborted(weight, lambda _: permit.finished())
        if status >= 500 and status != BACK_PRESSURE:  # noqa: PLR2004
            permit.judge(fault=True)
        elif status < 300:  # noqa: PLR2004
            permit.answers()  # a breaker's probe need not wait for the rest of the operation
        return _understood(status, answer)

    def close(self) -> None:
        if not self._is_handed_on:
            self._permit.finished()


def _understood(status: int, answer: bytes) -> Any:
    try:
        told = json.loads(answer)
    except (ValueError, RecursionError):
        told = None
    if status == 200 and told is not None:  # noqa: PLR2004
        return told
    log.warning("the engine answered %d to hive's own request: %.500s", status, answer)
    if 400 <= status < 500:  # noqa: PLR2004
        raise InvalidParameter(
            "Invalid parameter: session_id. The engine cannot go on with this conversation: it "
            f"refused it with status {status}.",
            param="session_id",
            action="See hive's log for what the engine said: most likely the conversation is as "
            "long as the model allows.",
        )
    raise EngineUnreachable(f"The engine answered with status {status}.")


class Engines:
    """Slots of workers whose cache is there, and their LMCache."""

    def __init__(self, settings: Settings, fleet: Fleet) -> None:
        self._fleet = fleet
        self._chunk_tokens = settings.windows.kv_chunk_tokens
        self._cache_start = 0
        self._breaker = Breaker(settings.breaker.failures, settings.breaker.cooldown_s)

    def apply(self, settings: Settings) -> None:
        """These limits, from now on."""
        self._breaker.failures = settings.breaker.failures
        self._breaker.cooldown_s = settings.breaker.cooldown_s

    @asynccontextmanager
    async def slot(self, model: str, session_id: str) -> AsyncIterator[Slot]:
        """Wait for a slot, as a request of that session does; the caller bounds the wait.

        Raises ModelNotFound, what a refused request is told, and KvServerUnreachable where what
        the engine computes would not be stored.
        """
        door = self._fleet.door(model)
        self.must_have_cache(model)
        lost = {one.id for one in self._fleet.of_model(model) if not self._fleet.has_cache(one)}
        ticket = Ticket(Priority.NORMAL, session=session_id, avoid=frozenset(lost))
        permit = door.enter(ticket) or await door.wait(ticket)
        launch = permit.life.launch
        if not self._fleet.has_cache(permit.worker) or launch is None or launch.identity is None:
            permit.finished()
            raise _cache_lost(permit.worker.id)
        shape = Shape(launch.kv_path, launch.identity.tensor_parallel_size, self._chunk_tokens)
        slot = Slot(self._fleet, permit, launch.identity, shape)
        try:
            yield slot
        finally:
            slot.close()

    def must_have_cache(self, model: str) -> None:
        """Raises KvServerUnreachable where none of a model's ready engines stores anything."""
        fleet = self._fleet
        if any(worker.plan.beside is None for worker in fleet.of_model(model)):
            raise InvalidParameter(
                "Invalid parameter: model. It is served without context windows now.",
                param="model",
                action="Ask the operator to set windows = true for it again.",
            )
        if not fleet.cache_is_up:
            raise KvServerUnreachable(retry_after_s=10.0)
        ready = [worker for worker in fleet.of_model(model) if worker.life and worker.life.pulse]
        if ready and not any(fleet.has_cache(worker) for worker in ready):
            raise _cache_lost(ready[0].id)

    # ── LMCache ─────────────────────────────────────────────────────────────────────────────────

    async def prefetch(self, tokens: Sequence[int], shape: Shape, salt: str) -> tuple[int, int]:
        """Have LMCache read a prompt's chunks: how many of their files it found, and of how many.

        The caller bounds the wait. Raises KvServerUnreachable.
        """
        body = {
            "model_name": shape.path,
            "world_size": shape.workers,
            "token_ids": list(tokens),
            "cache_salt": salt,
        }
        told = await self._ask_cache("POST", "/cache/prefetches", body)
        if told.get("status") == "noop":
            return 0, 0
        pause_s, longest_s = LOOK_S
        while True:
            found = await self._ask_cache("GET", f"/cache/prefetches/{told['request_id']}")
            if found.get("status") == "completed":
                return int(found["found_keys"]), int(found["total_keys"])
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, longest_s)

    async def forget(self, names: Sequence[str]) -> None:
        """Have LMCache drop blocks from its memory: what is there is not written to disk again."""
        for begin in range(0, len(names), MOST_KEYS):
            keys = [_key(name) for name in names[begin : begin + MOST_KEYS]]
            await self._ask_cache("DELETE", "/cache/objects", {"keys": keys, "tier": "l1"})

    async def is_cache_well(self) -> float:
        """Ask LMCache's health check; the seconds it took. Raises KvServerUnreachable."""
        began = time.monotonic()
        await self._ask_cache("GET", "/healthcheck")
        return time.monotonic() - began

    async def _ask_cache(self, method: str, path: str, body: Any = None) -> Any:
        cache, breaker, now = self._fleet.cache, self._breaker, time.monotonic()
        if cache is None or cache.life is None or not self._fleet.cache_is_up:
            raise KvServerUnreachable(retry_after_s=10.0)
        if self._cache_start != cache.counts.starts:  # another process, of which nothing is known
            self._cache_start = cache.counts.starts
            breaker.reset()
        if not breaker.allows(now):
            raise KvServerUnreachable(
                "The KV cache server failed repeatedly and is not asked for a while.",
                retry_after_s=max(1.0, breaker.retry_in_s(now)),
            )
        era = breaker.began(now)
        try:
            status, answer = await cache.life.client.ask(method, path, body, CACHE_S)
            told = json.loads(answer)
        except (ProbeFailed, ValueError) as exc:
            breaker.failed(era, time.monotonic())
            raise KvServerUnreachable(retry_after_s=5.0) from exc
        except BaseException:
            breaker.left(era)
            raise
        if status >= 500 or not isinstance(told, dict):  # noqa: PLR2004
            breaker.failed(era, time.monotonic())
            raise KvServerUnreachable(
                f"The KV cache server answered with status {status}.", retry_after_s=5.0
            )
        breaker.succeeded(era)
        if status >= 400:  # noqa: PLR2004
            log.error("LMCache refused %s %s: %.500s", method, path, answer)
            raise InternalError("The KV cache server did not understand hive.")
        return told

    def __repr__(self) -> str:
        return f"<Engines {self._breaker.state}>"


def _cache_lost(worker: str) -> HiveError:
    return KvServerUnreachable(
        "The worker's KV cache is lost: its cache server was started anew, and the worker is "
        "restarted when it is idle.",
        reason="cache_lost",
        worker=worker,
        retry_after_s=30.0,
        action="Try again when the worker was restarted; 'hive worker restart' does it at once.",
    )


def _key(name: str) -> dict[str, Any]:
    """A block's file name, taken apart as LMCache's interface wants it (policy/windows)."""
    model, rank, group, chunk_hash, *salt = name.removesuffix(".data").split("@")
    return {
        "chunk_hash_hex": chunk_hash,
        "model_name": model.replace("-SEP-", "/"),
        "kv_rank": int(rank, 16),
        "object_group_id": int(group, 16),
        "cache_salt": salt[0] if salt else "",
    }

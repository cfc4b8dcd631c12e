"""LMCache's HTTP, as far as somebody beside the engines needs it, and the double's own."""

import asyncio
import json
import math
import uuid
from collections.abc import Callable
from typing import cast

from tests.doubles.engine.asks import Json, encoded
from tests.doubles.engine.wire import Connection, Request
from tests.doubles.lmcache.knobs import Knobs, Options
from tests.doubles.lmcache.tier import Asked, Tier, block_name
from tests.doubles.lmcache.wires import Engines

MOST_TOKENS = 1_000_000
MOST_DELETED = 10_000
TIERS = ("l1", "l2", "all")


class Refused(Exception):
    def __init__(self, status: int, detail: object) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Api:
    def __init__(
        self, options: Options, knobs: Knobs, engines: Engines, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.pending_stores = 0
        self._options = options
        self._knobs = knobs
        self._engines = engines
        self._tier: Tier = engines.tier
        self._loop = loop
        self._prefetches: dict[str, Json] = {}
        self._routes: dict[tuple[str, str], Callable[[Request, Connection], None]] = {
            ("GET", "/healthcheck"): self._health,
            ("GET", "/status"): self._status,
            ("POST", "/cache/prefetches"): self._prefetch,
            ("DELETE", "/cache/objects"): self._delete,
            ("POST", "/cache/clear"): self._clear,
            ("GET", "/double/knobs"): lambda _, c: _reply(c, self._knobs.as_dict()),
            ("POST", "/double/knobs"): self._turn,
        }

    def head_came(self, request: Request, connection: Connection) -> None:
        """Nothing is answered before its body is here."""

    def request_came(self, request: Request, connection: Connection) -> None:
        request.path, _, _ = request.path.partition("?")
        route = self._routes.get((request.method, request.path))
        try:
            if route is not None:
                route(request, connection)
            elif request.method == "GET" and request.path.startswith("/cache/prefetches/"):
                self._prefetched(request.path.removeprefix("/cache/prefetches/"), connection)
            elif any(path == request.path for _, path in self._routes):
                raise Refused(405, "Method Not Allowed")  # noqa: TRY301
            else:
                raise Refused(404, "Not Found")  # noqa: TRY301
        except Refused as refused:
            _reply(connection, {"detail": refused.detail}, refused.status)

    # LMCache's

    def _health(self, request: Request, connection: Connection) -> None:  # noqa: ARG002
        status, wait_s = self._knobs.health_status, self._knobs.health_s
        body: Json = {"status": "healthy"}
        if status != 200:
            body = {"status": "unhealthy", "reason": "engine not initialized"}
        if not math.isinf(wait_s):
            later = self._loop.call_later(wait_s, _reply, connection, body, status)
            connection.on_gone = later.cancel

    def _status(self, request: Request, connection: Connection) -> None:  # noqa: ARG002
        """A part of what LMCache tells."""
        l1 = {"is_healthy": True, "total_object_count": len(self._tier.ram)}
        store = {
            "is_healthy": True,
            "thread_alive": True,
            "pending_keys_count": 0,
            "in_flight_task_count": self.pending_stores,
        }
        adapter = {
            "is_healthy": True,
            "type": "FSL2Adapter",
            "base_path": self._options.base_path,
            "use_odirect": False,
            "event_loop_alive": True,
        }
        adapters = [adapter] if self._options.base_path else []
        kept = {
            "is_healthy": True,
            "l2_adapters": adapters,
            "num_l2_adapters": len(adapters),
            "l1_manager": l1,
            "store_controller": store,
        }
        whole = {
            "is_healthy": True,
            "engine_type": "MPCacheServer",
            "chunk_size": self._options.chunk_tokens,
            "hash_algorithm": "blake3",
            "active_sessions": 0,
            "storage_manager": kept,
        }
        _reply(connection, whole)

    def _prefetch(self, request: Request, connection: Connection) -> None:
        body = _body(request)
        problems = [
            _problem(name, kind, body.get(name))
            for name, kind in (("model_name", str), ("world_size", int), ("token_ids", list))
            if not isinstance(body.get(name), kind)
        ]
        if problems:
            raise Refused(422, problems)
        source, target = body.get("source_tier", "l2"), body.get("target_tier", "l1")
        if (source, target) != ("l2", "l1"):
            told = f"unsupported prefetch direction {source!r}->{target!r}; only 'l2'->'l1'"
            raise Refused(400, told)
        model, workers, tokens = body["model_name"], body["world_size"], body["token_ids"]
        if not self._engines.knows(model, workers):
            raise Refused(
                503,
                f"no layout registered for model_name={model!r} world_size={workers};"
                " the model has not allocated KV cache on this node yet",
            )
        if len(tokens) > MOST_TOKENS:
            told = "too many token_ids in a single request"
            raise Refused(400, f"{told} (limit={MOST_TOKENS}, got={len(tokens)})")
        try:
            asked = Asked(model, workers, body.get("cache_salt", ""), tuple(tokens))
        except ValueError as exc:
            raise Refused(400, str(exc)) from exc
        chunks = len(tokens) // self._options.chunk_tokens
        if not chunks:
            _reply(connection, {"chunks": 0, "status": "noop"}, 202)
            return
        id_ = uuid.uuid4().hex
        self._prefetches[id_] = {"request_id": id_, "status": "pending"}
        self._loop.call_later(self._knobs.prefetch_s, self._load, id_, asked, chunks)
        _reply(connection, {"request_id": id_, "chunks": chunks, "status": "submitted"}, 202)

    def _load(self, id_: str, asked: Asked, chunks: int) -> None:
        found = self._tier.prefetch(asked)
        done = {"status": "completed", "found_keys": found, "total_keys": chunks * asked.workers}
        self._prefetches[id_] |= done

    def _prefetched(self, id_: str, connection: Connection) -> None:
        """Its completion is told once."""
        told = self._prefetches.get(id_)
        if told is None:
            raise Refused(
                404,
                f"unknown prefetch request_id={id_!r} (already completed or never submitted)",
            )
        if told["status"] == "completed":
            del self._prefetches[id_]
        _reply(connection, told)

    def _delete(self, request: Request, connection: Connection) -> None:
        """As LMCache counts: what was in RAM, and every key that is to leave the disk."""
        body = _body(request)
        tier, keys = body.get("tier", "l2"), body.get("keys")
        if tier not in TIERS or not isinstance(keys, list):
            raise Refused(422, [_problem("keys", list, keys)])
        if len(keys) > MOST_DELETED:
            told = "too many keys in a single request"
            raise Refused(400, f"{told} (limit={MOST_DELETED}, got={len(keys)})")
        names = [_named(key, index) for index, key in enumerate(keys)]
        if tier != "l1" and not self._options.base_path:
            raise Refused(503, "no L2 adapters configured")
        deleted = 0
        if tier in ("l1", "all"):
            deleted += len(self._tier.ram.intersection(names))
            self._tier.ram.difference_update(names)
        if tier in ("l2", "all"):
            self._tier.remove(names)
            deleted += len(names)
        _reply(connection, {"deleted": deleted, "skipped": 0, "ok": True})

    def _clear(self, request: Request, connection: Connection) -> None:
        tier = _body(request).get("tier", "l1") if request.body else "l1"
        if tier != "l1":
            raise Refused(400, f"tier {tier!r} not supported; only 'l1'")
        self._tier.ram.clear()
        _reply(connection, {"status": "ok", "cleared": {"tier": "l1"}})

    # For the tests

    def _turn(self, request: Request, connection: Connection) -> None:
        try:
            self._knobs.set(_body(request))
        except ValueError as exc:
            raise Refused(400, str(exc)) from exc
        _reply(connection, self._knobs.as_dict())


def _named(key: Json, index: int) -> str:
    try:
        model, salt = key["model_name"], key.get("cache_salt", "")
        Asked(model, 1, salt, ())  # whose names these are must be nameable
        hash_, group = bytes.fromhex(key["chunk_hash_hex"]), key.get("object_group_id", 0)
        return block_name(model, key["kv_rank"], hash_, salt, group)
    except ValueError as exc:
        raise Refused(400, f"keys[{index}]: {exc}") from exc
    except (KeyError, TypeError, AttributeError) as exc:
        raise Refused(422, [_problem(f"keys.{index}", dict, key)]) from exc


def _problem(name: str, kind: type, value: object) -> Json:
    missing = value is None
    return {
        "type": "missing" if missing else f"{kind.__name__}_type",
        "loc": ["body", *name.split(".")],
        "msg": "Field required" if missing else f"Input should be a valid {kind.__name__}",
        "input": value,
    }


def _body(request: Request) -> Json:
    try:
        body = json.loads(request.body)
    except ValueError as exc:
        problem = {"type": "json_invalid", "loc": ["body", 0], "msg": "JSON decode error"}
        raise Refused(422, [problem]) from exc
    if not isinstance(body, dict):
        raise Refused(422, [{"type": "model_attributes_type", "loc": ["body"], "input": body}])
    return cast("Json", body)


def _reply(connection: Connection, body: object, status: int = 200) -> None:
    connection.answer(status, encoded(body))

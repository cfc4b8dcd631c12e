"""Who asks, and whether they may: keys kept as hashes, compared in constant time, with scopes."""

import hashlib
import hmac
import math
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from aiohttp import web

from hive.errors import Forbidden, NotFound, RateLimited, Unauthorized
from hive.policy.admission import Priority
from hive.policy.quota import Quota
from hive.settings import ApiKey

Scope = Literal["inference", "admin", "metrics", "any", "nobody"]

_PUBLIC = frozenset({"/livez", "/readyz"})
_ADMIN = re.compile(
    r"/hive/v1/(workers|devices|drain|leaks|events|alerts|audit|reload)\b|/v1/(un)?load_lora_adapter\Z"
)
_NOWHERE = ""
_KEY_LENGTH = 512  # longer than any key: not worth hashing


@dataclass(frozen=True, slots=True)
class Caller:
    """The key a request came with; `ANYONE` where no key is configured."""

    name: str | None
    scopes: frozenset[str]
    quota: Quota
    priority: Priority  # of its requests …
    highest: Priority  # … and the most urgent one that it may ask for

    def may(self, scope: str) -> bool:
        return scope in self.scopes or (scope == "metrics" and "admin" in self.scopes)


ANYONE = Caller(
    None,
    frozenset({"inference", "admin", "metrics"}),
    Quota(0, 0),
    Priority.NORMAL,
    Priority.INTERACTIVE,
)


def taken(caller: Caller) -> Quota:
    """Count a request against its key; to be given back. Raises RateLimited, for this key alone (C12)."""
    quota = caller.quota
    if refusal := quota.take(time.monotonic()):
        raise RateLimited(
            f"Rate limit exceeded, try again in {max(1, math.ceil(refusal.wait_s))}s",
            reason=refusal.limit,
            retry_after_s=refusal.wait_s,
            current_requests=quota.in_flight,
            max_concurrent=quota.max_concurrent,
            requests_per_minute=quota.per_minute,
        )
    return quota


def needed_scope(path: str) -> str | None:
    """The scope that a path needs: None for public ones, "any" for any key."""
    if path in _PUBLIC:
        return None
    if path == "/metrics":
        return "metrics"
    if _ADMIN.match(path):
        return "admin"
    return (
        "any"
        if path.startswith(("/hive/v1/", "/v1/models/")) or path == "/v1/models"
        else "inference"
    )


@lru_cache(1024)
def _scope_of(path: str) -> str | None:
    if {".", ".."} & set(path.split("/")):
        # Whoever resolves them later would reach a path whose scope was not asked for.
        return _NOWHERE
    return needed_scope(path)


def fingerprint(presented: str) -> str:
    """Six hexadecimal digits that tell keys apart in a log without giving them away."""
    return hashlib.sha256(presented.encode(errors="surrogateescape")).hexdigest()[:6]


class Doorkeeper:
    """Checks each request against the configured keys."""

    def __init__(self, keys: tuple[ApiKey, ...]) -> None:
        self._keys: list[tuple[bytes, Caller]] = []
        self.apply(keys)

    def apply(self, keys: tuple[ApiKey, ...]) -> None:
        """These keys, for requests that come from now on; what each has in use still counts."""
        quotas = {caller.name: caller.quota for _, caller in self._keys}
        found = []
        for key in keys:
            quota = quotas.get(key.name) or Quota(0, 0)
            quota.max_concurrent, quota.per_minute = key.max_concurrent, key.requests_per_minute
            priority = Priority[key.priority.upper()]
            caller = Caller(key.name, frozenset(key.scopes), quota, priority, priority)
            found.append((bytes.fromhex(key.sha256), caller))
        self._keys = found

    def admit(self, request: web.Request) -> Caller:
        """The caller. Raises Unauthorized without a known key, Forbidden without the scope."""
        scope = _scope_of(request.path)
        if scope == _NOWHERE:
            raise NotFound("There is nothing at this path.")
        if scope is None or not self._keys:
            return ANYONE
        caller = self._find(_presented(request))
        if scope != "any" and not caller.may(scope):
            raise Forbidden(
                f"This key does not have the {scope} scope.", required_scope=scope, key=caller.name
            )
        return caller

    def _find(self, presented: str) -> Caller:
        digest = hashlib.sha256(presented.encode(errors="surrogateescape")).digest()
        found = None
        for known, caller in self._keys:  # all of them: the time must not tell which one matched
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise Unauthorized("The API key is not known here.", fingerprint=fingerprint(presented))
        return found


def _presented(request: web.Request) -> str:
    authorization = request.headers.get("Authorization")
    if authorization is not None:
        kind, _, value = authorization.partition(" ")
        presented = value.strip() if kind.lower() == "bearer" else ""
        if not presented:
            raise Unauthorized("The Authorization header is not of the form 'Bearer KEY'.")
    else:
        presented = request.headers.get("X-Api-Key", "").strip()
        if not presented:
            raise Unauthorized("Authentication required: no API key was sent.")
    if len(presented) > _KEY_LENGTH:
        raise Unauthorized("The API key is not known here.")
    return presented

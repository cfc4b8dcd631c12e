"""The tools: what an agent may ask hive for, each a request or two to the HTTP API."""

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict, Field

from hive.client.control import Result
from hive.client.http import is_told, not_hives, opened, place
from hive.errors import (
    DaemonUnreachable,
    HiveError,
    InvalidSessionId,
    InvalidWindowName,
    WindowNotFound,
)
from hive.mcp.caller import Caller
from hive.policy.control import OPERATIONS
from hive.policy.windows import SESSION_ID, WINDOW_NAME, SessionState, WindowState

SKEW_S = 60.0  # between this clock and the daemon's

SessionId = Annotated[str, Field(description="The session's id.")]
WindowName = Annotated[
    str, Field(description="The window's name: 1 to 128 letters, digits, '-' or '_'.")
]
Owner = Annotated[str | None, Field(description="With an admin's key: the API key whose it is.")]


class Arguments(BaseModel):
    """What a tool takes; anything else is refused."""

    model_config = ConfigDict(extra="forbid")


class Owned(Arguments):
    owner: Owner = None


class Freeze(Owned):
    session_id: SessionId
    window_name: WindowName
    keep_active: bool = Field(False, description="The session goes on taking requests.")
    description: str = Field("", max_length=1024, description="What it is, for people.")
    tags: list[str] = Field([], description="Words to find it by.")


class Thaw(Owned):
    window_name: WindowName
    session_id: str | None = Field(
        None, description="The session it was frozen from; without it a new one is made."
    )
    require_full: bool = Field(False, description="Fail if any part must be computed again.")


class ListWindows(Owned):
    model: str | None = Field(None, description="Only windows of this model.")
    tag: str | None = Field(None, description="Only windows with this tag.")
    session_id: str | None = Field(None, description="Only windows frozen from this session.")
    state: Literal[*(str(one) for one in WindowState)] | None = Field(  # type: ignore[valid-type]
        None, description="Default: FROZEN."
    )
    limit: int = Field(100, ge=1, le=1000, description="As many at most.")
    offset: int = Field(0, ge=0, description="Leave out so many.")


class Status(Owned):
    window_name: WindowName


class Clone(Owned):
    window_name: WindowName
    new_name: str = Field(description="The clone's name.")


class ListSessions(Owned):
    state: Literal[*(str(one) for one in SessionState)] | None = Field(  # type: ignore[valid-type]
        None, description="Only sessions in this state."
    )
    limit: int = Field(100, ge=1, le=1000, description="As many at most.")


class Metrics(Arguments):
    prefix: str = Field("hive_", description="Only metrics whose names begin so.")


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class Chat(Arguments):
    model: str = Field(description="The model's name.")
    messages: list[Message] = Field(min_length=1, description="The conversation, oldest first.")
    session_id: str | None = Field(None, description="The session it belongs to.")
    new_session: bool = Field(False, description="Begin a session, which can be frozen later.")
    max_tokens: int | None = Field(None, ge=1, description="Tokens of the answer at most.")
    temperature: float | None = Field(None, ge=0, description="0 is always the likeliest token.")


async def window_freeze(caller: Caller, asked: Freeze) -> Result:
    """Freeze a session's context into a window of that name, with proof that every block is kept."""
    _session(asked.session_id)
    name = _window(asked.window_name)
    look = _outcome(
        caller, name, asked.owner, lambda found: found.get("session_id") == asked.session_id
    )
    body = {
        "session_id": asked.session_id,
        "name": name,
        "keep_active": asked.keep_active,
        "description": asked.description,
        "tags": asked.tags,
    }
    try:
        return await caller.watch(
            "window_freeze", "POST", place("windows", owner=asked.owner), json=body
        )
    except HiveError as exc:
        return await caller.settled(exc, name, look)


async def window_thaw(caller: Caller, asked: Thaw) -> Result:
    """Thaw a window: a session to go on in, its messages, and a receipt of what need not be computed."""
    body: dict[str, Any] = {"require_full": asked.require_full}
    if asked.session_id is not None:
        body["session_id"] = _session(asked.session_id)
    path = place("windows", _window(asked.window_name), "thaw", owner=asked.owner)
    return await caller.watch("window_thaw", "POST", path, json=body)


async def window_list(caller: Caller, asked: ListWindows) -> Result:
    """List the windows, the newest first."""
    return await caller.ask("window_list", "GET", place("windows", **asked.model_dump()))


async def window_status(caller: Caller, asked: Status) -> Result:
    """One window: its size, family, last receipt, and how much of it the KV cache has at hand."""
    name = _window(asked.window_name)
    path = place("windows", name, owner=asked.owner)
    listed = caller.request("GET", place("windows", limit=1000, owner=asked.owner))

    async def from_list(limit_s: float) -> Any:
        found = await listed(limit_s)
        return next((one for one in _listed(found) if one.get("name") == name), None)

    return await caller.plane.run(
        "window_status",
        caller.request("GET", path),
        caller.key("GET", path),
        {"window_list": from_list},
    )


async def window_verify(caller: Caller, asked: Status) -> Result:
    """Read every byte of a window and compare it: passed, or what is damaged and how it is mended."""
    name = _window(asked.window_name)
    path = place("windows", name, "verify", owner=asked.owner)
    found = await caller.watch("window_verify", "POST", path, json={})
    report = found.data
    if not isinstance(report, dict) or not isinstance(report.get("whole"), bool):
        raise not_hives("something")
    if report["whole"]:
        return replace(found, data={"status": "passed", **report})
    issues = [
        f"block {block} is {what}"
        for what, key in (("missing", "missing"), ("damaged", "corrupt"))
        for block in report[key]
    ]
    mend = f"hive window repair {name} --attempt-recovery"
    told = {"status": "validation_failed", "issues": issues, "recommended_fixes": [mend]}
    return replace(found, data=told)  # no error: the check itself has worked (R196)


async def window_clone(caller: Caller, asked: Clone) -> Result:
    """Make another window of the same blocks; it costs no room on disk."""
    name, new = _window(asked.window_name), _window(asked.new_name)
    path = place("windows", name, "clone", owner=asked.owner)

    def is_it(found: Any) -> bool:
        ancestors: list[str] = found.get("lineage", {}).get("ancestors", [])
        return ancestors[:1] == [name]

    look = _outcome(caller, new, asked.owner, is_it)
    try:
        return await caller.ask("window_clone", "POST", path, json={"name": new})
    except HiveError as exc:
        return await caller.settled(exc, new, look)


async def window_delete(caller: Caller, asked: Status) -> Result:
    """Delete a window; its blocks go unless a clone shares them."""
    name = _window(asked.window_name)
    path = place("windows", name, owner=asked.owner)
    done = {"name": name, "status": "deleted"}
    look = caller.request("GET", path)

    async def is_gone() -> Any:
        try:
            await look(OPERATIONS["window_status"].limit_s)
        except WindowNotFound:
            return done
        return None

    try:
        found = await caller.ask("window_delete", "DELETE", path)
    except HiveError as exc:
        return await caller.settled(exc, name, is_gone)
    return Result(done, warnings=found.warnings)


async def session_list(caller: Caller, asked: ListSessions) -> Result:
    """List the sessions, the last used first."""
    return await caller.ask("session_list", "GET", place("sessions", **asked.model_dump()))


async def worker_list(caller: Caller, _asked: Arguments) -> Result:
    """List the workers: model, state, device, requests (needs an admin's key)."""
    return await caller.ask("worker_list", "GET", place("workers"))


async def cache_stats(caller: Caller, asked: Owned) -> Result:
    """The KV cache: whether LMCache answers, what windows hold, what thaws promised and engines found."""
    listed = caller.request("GET", place("windows", limit=1000, owner=asked.owner))

    async def windows(limit_s: float) -> Any:
        found = await listed(limit_s)
        there, names = _listed(found), ("tokens", "blocks", "bytes")
        sums = {name: sum(int(one.get(name, 0)) for one in there) for name in names}
        return {"count": len(there), **sums, "has_more": "next_offset" in found}

    async def thaws(limit_s: float) -> Any:
        families = await _families(caller, limit_s)
        return _samples(families, ("hive_thaw_tokens", "hive_windows"))

    return await caller.parts(
        "cache_stats",
        {
            "lmcache": caller.request("GET", place("health", "lmcache")),
            "windows": windows,
            "thaws": thaws,
        },
        asked.owner or "",
    )


async def health_check(caller: Caller, _asked: Arguments) -> Result:
    """How hive and each of its parts is at this moment: ok, degraded, or down."""
    found = await caller.ask("health_check", "GET", place("health"))
    caller.plane.remember("health_check", caller.key("GET", place("health")), found.data)
    return found


async def get_metrics_data(caller: Caller, asked: Metrics) -> Result:
    """hive's metrics as numbers, and how often each tool here was called and failed."""

    async def ask(limit_s: float) -> Any:
        return _samples(await _families(caller, limit_s), (asked.prefix,))

    found = await caller.plane.run(
        "get_metrics_data", ask, caller.key("GET", f"/metrics {asked.prefix}")
    )
    tools = {name: counts.told() for name, counts in caller.plane.counts.items()}
    data = {"metrics": found.data, "tools": tools}
    return Result(data, found.source, found.age_s, found.warnings)


async def chat(caller: Caller, asked: Chat) -> Result:
    """Ask a model; with a session the conversation is kept, and can be frozen."""
    session = asked.session_id and _session(asked.session_id)
    made = None
    if asked.new_session and not session:
        new = await caller.ask(
            "session_new", "POST", place("sessions"), json={"model": asked.model}
        )
        session = made = new.data["id"]
    body = asked.model_dump(exclude={"session_id", "new_session"}, exclude_none=True)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"X-Hive-Session": session} if session else {}
    try:
        events = await caller.stream("chat", "/v1/chat/completions", body, headers)
    except HiveError as exc:
        # Nothing was said in it, and nobody was told of it; a daemon that is away is not waited for.
        if made is not None and is_told(exc):
            with contextlib.suppress(HiveError):
                await caller.ask("session_delete", "DELETE", place("sessions", made))
        raise
    choices = [choice for one in events for choice in one.get("choices", ())]
    usage = next((one["usage"] for one in reversed(events) if one.get("usage")), None)
    return Result(
        {
            "content": "".join(one["delta"].get("content") or "" for one in choices),
            "finish_reason": next(
                (one["finish_reason"] for one in choices if one.get("finish_reason")), None
            ),
            "usage": usage,
            "session_id": session,
        }
    )


@dataclass(frozen=True, slots=True)
class Tool:
    """One of them; its docstring is what agents read."""

    takes: type[Arguments]
    does: Callable[[Caller, Any], Awaitable[Result]]
    changes: bool = False
    destroys: bool = False

    @property
    def name(self) -> str:
        return self.does.__name__

    @property
    def help(self) -> str:
        return (self.does.__doc__ or "").strip()


TOOLS = {
    tool.name: tool
    for tool in (
        Tool(Freeze, window_freeze, changes=True),
        Tool(Thaw, window_thaw, changes=True),
        Tool(ListWindows, window_list),
        Tool(Status, window_status),
        Tool(Status, window_verify),
        Tool(Clone, window_clone, changes=True),
        Tool(Status, window_delete, changes=True, destroys=True),
        Tool(ListSessions, session_list),
        Tool(Owned, cache_stats),
        Tool(Arguments, health_check),
        Tool(Metrics, get_metrics_data),
        Tool(Arguments, worker_list),
        Tool(Chat, chat, changes=True),
    )
}


# ── inside ──────────────────────────────────────────────────────────────────────────────────────


def _window(name: str) -> str:
    """As the daemon would say it; and what no URL carries to it never leaves."""
    if not WINDOW_NAME.match(name):
        raise InvalidWindowName(param="window_name")
    return name


def _session(session_id: str) -> str:
    if not SESSION_ID.match(session_id):
        raise InvalidSessionId(param="session_id")
    return session_id


def _listed(found: Any) -> list[Any]:
    """The windows of an answer. Raises HiveError where there is no such list in it."""
    windows = found.get("windows") if isinstance(found, dict) else None
    if not isinstance(windows, list) or not all(isinstance(one, dict) for one in windows):
        raise not_hives("something")
    return windows


def _outcome(
    caller: Caller, name: str, owner: str | None, is_it: Callable[[Any], bool]
) -> Callable[[], Awaitable[Any]]:
    """A look for a window that is made, or may have been: None while it is.

    An older one of that name is another one, and the one that was to be made is not there.
    """
    limit_s, began = OPERATIONS["window_status"].limit_s, time.time()
    whole = caller.request("GET", place("windows", name, owner=owner))
    begun = caller.request("GET", place("windows", state="FREEZING", limit=1000, owner=owner))

    async def look() -> Any:
        try:
            found = await whole(limit_s)
        except WindowNotFound:
            if any(one.get("name") == name for one in _listed(await begun(limit_s))):
                return None
            raise
        is_new = isinstance(found, dict) and found.get("created_at", 0) >= began - SKEW_S
        if not is_new or not is_it(found):
            raise WindowNotFound
        return found

    return look


async def _families(caller: Caller, limit_s: float) -> list[Any]:
    async with opened(
        "GET", "/metrics", url=caller.url, api_key=caller.api_key, timeout_s=limit_s
    ) as answer:
        text = await answer.text()
    try:
        return list(text_string_to_metric_families(text))
    except ValueError as exc:
        raise DaemonUnreachable("The daemon's metrics are not understood.") from exc


def _samples(families: Iterable[Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Values by name; a histogram's buckets are left out, its sum and count tell the mean."""
    found: dict[str, Any] = {}
    for family in families:
        if not family.name.startswith(prefixes):
            continue
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                told = {"labels": dict(sample.labels), "value": sample.value}
                found.setdefault(sample.name, []).append(told)
    return found

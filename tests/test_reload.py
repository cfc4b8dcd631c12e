"""A reload: every key that may change does, together with all others or not at all (R074, R227)."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import tomlkit
from pydantic import BaseModel

from hive.errors import ConfigInvalid, Conflict, HiveError, InternalError, ReloadRefused
from hive.events import DaemonMoved, ReloadBegan, ReloadEnded, RequestEnded
from hive.policy.reloading import is_one_of
from hive.policy.retries import until_taken
from hive.reload import Reloader
from hive.settings import RELOADABLE, ApiKey, Model, Settings, Timeouts, load
from hive.storage.audit_writer import Journal
from hive.telemetry import logs, systemd
from hive.telemetry.audit import Audit
from tests.gateway.serving import Serving, bearer, key, serving
from tests.gateway.test_answer import WINDOWS
from tests.patience import awaited, until, within


class Running:
    """The parts of a hive without processes, and the file that they are reloaded from."""

    def __init__(self, it: Serving, directory: Path) -> None:
        assert it.kept
        self.it, self.kept = it, it.kept
        self.file = directory / "hive.toml"
        server = it.settings.server
        model = {"engine": "command", "device": "cpu", **WINDOWS}
        self.document: dict[str, Any] = {
            "server": {"state_dir": str(server.state_dir), "runtime_dir": str(server.runtime_dir)},
            "auth": {"keys": [key("ci")]},
            "alerts": {"webhook_url": "http://127.0.0.1:1/alerts"},
            "models": {"m": model},
        }
        self.write()
        self.journal = Journal(directory / "audit", 10, 10, lambda _: None)
        settings = self.read()
        self.audit = Audit(self.journal, settings)
        self.progress = systemd.Progress(systemd.Notifier({}), settings)
        self.reloader = Reloader(settings, self.read, it.announcer)
        self.outbox = it.alerts.outbox
        parts = (logs.apply, self.audit.apply, self.progress.apply, it.alerts.apply, it.fleet.apply)
        self.reloader.tells(*parts, it.gateway.apply, it.kept.apply)
        for part in self.reloader._parts:
            part(settings)

    def write(self) -> None:
        self.file.write_text(tomlkit.dumps(self.document))

    def read(self) -> Settings:
        return load(self.file)

    def set(self, path: tuple[str, ...], value: object) -> None:
        """In the file; the name of a key or a model is CI or M."""
        at = self.document
        for part in path[:-1]:
            at = (
                at["keys"][0] if part == "keys" else at if part == "CI" else at.setdefault(part, {})
            )
        at[path[-1]] = value
        self.write()

    async def reload(self) -> list[str]:
        return await self.reloader.reload("HTTP")

    @property
    def plan(self) -> Any:
        return self.it.worker.plan

    @property
    def limits(self) -> Any:
        return self.it.gateway._inference._limits["m"]

    @property
    def intake(self) -> Any:
        return self.it.gateway._inference._intake

    @property
    def caller(self) -> Any:
        return self.it.gateway._doorkeeper._keys[0][1]

    @property
    def breakers(self) -> list[Any]:
        return [self.it.door.breakers["m-0"], self.kept.engines._breaker]


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Running]:
    async with serving(model=WINDOWS) as it:
        made = Running(it, directory)
        try:
            yield made
        finally:
            made.journal.close()


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


# ── every key ───────────────────────────────────────────────────────────────────────────────────

Look = Callable[[Running], object]
LIMITS = ("request_s", "queue_s", "connect_s", "inference_s", "stall_s", "stream_total_s")
# Of each key another value, and where it must be found then.
CHANGES: dict[str, tuple[object, object, Look]] = {
    "server.gpu_error_policy": (
        *("quarantine",) * 2,
        lambda it: it.it.fleet._settings.server.gpu_error_policy,
    ),
    "server.drain_s": (7, (7, 7 + 10 + 10 + 20), lambda it: (it.plan.drain_s, it.progress._stop_s)),
    "server.max_body_mib": (1, 2**20, lambda it: it.intake._most),
    "server.max_buffered_mib": (2, 2**21, lambda it: it.intake._most_together),
    "server.body_s": (3, 3, lambda it: it.intake._body_s),
    "server.log_level": ("error", logging.ERROR, lambda _: logging.getLogger().level),
    "restarts.starts": (9, 9, lambda it: it.plan.restarts.starts),
    "restarts.window_s": (9, 9, lambda it: it.plan.restarts.window_s),
    "restarts.backoff_s": (9, 9, lambda it: it.plan.restarts.backoff_s),
    "restarts.backoff_max_s": (9, 9, lambda it: it.plan.restarts.backoff_max_s),
    "breaker.failures": (9, [9, 9], lambda it: [one.failures for one in it.breakers]),
    "breaker.cooldown_s": (9, [9, 9], lambda it: [one.cooldown_s for one in it.breakers]),
    "auth.keys.CI.name": (
        "cj",
        ("cj", {"cj"}),
        lambda it: (it.caller.name, it.kept.backups._owners),
    ),
    "auth.keys.CI.sha256": ("0" * 64, "000000", lambda it: it.audit._fingerprints["ci"]),
    "auth.keys.CI.scopes": (["admin"], {"admin"}, lambda it: it.caller.scopes),
    "auth.keys.CI.priority": ("batch", "BATCH", lambda it: it.caller.highest.name),
    "auth.keys.CI.max_concurrent": (9, 9, lambda it: it.caller.quota.max_concurrent),
    "auth.keys.CI.requests_per_minute": (9, 9, lambda it: it.caller.quota.per_minute),
    "windows.session_idle_s": (9, 9, lambda it: it.kept.sessions._idle_s),
    "windows.max_sessions": (9, 9, lambda it: it.kept.sessions._most),
    "windows.max_windows": (9, 9, lambda it: it.kept.windows._settings.max_windows),
    "windows.max_gib": (9, 9 * 2**30, lambda it: it.kept.windows._most_bytes),
    "windows.max_backups": (9, 9, lambda it: it.kept.backups._most),
    "alerts.webhook_token": (
        *("other",) * 2,
        lambda it: it.outbox._sender._settings.webhook_token.get_secret_value(),
    ),
    "alerts.webhook_token_file": (
        *("/token",) * 2,
        lambda it: str(it.outbox._sender._settings.webhook_token_file),
    ),
    "alerts.level": ("info", 0, lambda it: it.outbox._least),
    "alerts.labels": ({"host": "b"}, {"host": "b"}, lambda it: it.outbox._settings.labels),
    "alerts.runbook_url": (*("x",) * 2, lambda it: it.outbox._settings.runbook_url),
    "alerts.timeout_s": (9, 9, lambda it: it.outbox._sender._settings.timeout_s),
    "alerts.retry_max_s": (9, until_taken(9), lambda it: it.outbox._sender._policy),
    "alerts.keep_s": (9, 9, lambda it: it.outbox._settings.keep_s),
    "alerts.max_waiting": (9, 9, lambda it: it.outbox._settings.max_waiting),
    "audit.max_mib": (9, 9 * 2**20, lambda it: it.journal._max_bytes),
    "audit.keep": (9, 9, lambda it: it.journal._keep),
    "models.m.queue_depth": (9, 9, lambda it: it.it.door.room.depth),
}


def of_timeouts(field: str) -> Look:
    """Every part that a limit is kept in."""

    def look(it: Running) -> object:
        found = [getattr(it.plan.timeouts, field)]
        if field in LIMITS:
            found.append(getattr(it.limits, field))
        if field == "cleanup_s":
            found += [it.it.pulse._cleanup_s, it.limits.cleanup_s]
        if field == "stall_s":  # an engine is patiently watched for as long
            found.append(it.it.pulse._longest_s - it.plan.timeouts.cleanup_s)
        assert len(set(found)) == 1, found
        return found[0]

    return look


# Below the defaults, or above them where they are within each other.
OTHER = {"request_s": 90, "stall_s": 80}
for _field in Timeouts.model_fields:
    for _place in ("timeouts", "models.m.timeouts"):
        _value = OTHER.get(_field, 1)
        CHANGES[f"{_place}.{_field}"] = (_value, _value, of_timeouts(_field))


def leaves(kind: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in kind.model_fields.items():
        own = (*path, name)
        if own == ("auth", "keys"):
            yield from leaves(ApiKey, (*own, "CI"))
        elif own == ("models",):
            yield from leaves(Model, (*own, "m"))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, own)
        else:
            yield own


def test_every_key_that_is_declared_is_tried_and_no_other() -> None:
    declared = {".".join(path) for path in leaves(Settings) if is_one_of(path, RELOADABLE)}

    assert declared == set(CHANGES)


def test_every_pattern_declares_something() -> None:
    for pattern in RELOADABLE:
        assert any(is_one_of(path, (pattern,)) for path in leaves(Settings)), pattern


@awaited
async def test_every_key_that_is_declared_changes_what_it_is_for(tmp_path: Path) -> None:
    async with running(tmp_path) as it:
        before = {**it.document, "auth": {"keys": [key("ci")]}}
        for name, (value, wanted, look) in CHANGES.items():
            it.document = {part: dict(table) for part, table in before.items()}
            it.document["models"] = {"m": dict(before["models"]["m"])}
            it.document["auth"] = {"keys": [key("ci")]}
            it.write()
            await it.reload()
            assert look(it) != wanted, name
            it.set(tuple(name.split(".")), value)

            changed = await it.reload()

            renamed = ["auth.keys.ci (removed)", "auth.keys.cj (added)"]
            told = renamed if name == "auth.keys.CI.name" else [name.replace("CI", "ci")]
            assert changed == told
            assert look(it) == wanted, name


# ── all of it or nothing ────────────────────────────────────────────────────────────────────────


def ended(it: Running) -> ReloadEnded:
    began, end = it.it.heard(ReloadBegan), it.it.heard(ReloadEnded)
    assert len(began) == len(end)
    return end[-1]


@awaited
async def test_what_needs_a_restart_is_named_and_nothing_changes(tmp_path: Path) -> None:
    """R226: prevented, and told to the audit log; R227: with the remedy, and judged again after it."""
    async with running(tmp_path) as it:
        old = it.reloader.settings
        it.set(("server", "port"), 1)
        it.set(("server", "drain_s"), 1)
        it.set(("models", "m", "max_concurrent"), 5)
        it.document["models"]["new"] = {"engine": "vllm", "path": "/x", "device": "cpu"}
        it.write()

        with pytest.raises(ReloadRefused) as caught:
            await it.reload()

        error, keys = caught.value, ["server.port", "models.m.max_concurrent", "models.new (added)"]
        assert error.public_details["keys"] == keys
        assert error.status == 409
        assert "restart" in error.suggested_action.lower()
        assert (ended(it).code, ended(it).refused) == ("RELOAD_REFUSED", tuple(keys))
        assert it.reloader.settings is old
        assert it.plan.drain_s == old.server.drain_s
        for path in (("server", "port"), ("models", "m", "max_concurrent"), ("models", "new")):
            at = it.document
            for part in path[:-1]:
                at = at[part]
            del at[path[-1]]
        it.write()
        assert await it.reload() == ["server.drain_s"]
        assert it.plan.drain_s == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_text("[server"),
        lambda file: file.write_text(file.read_text() + "\n[server2]\nx = 1\n"),
        lambda file: file.write_bytes(b"\xff\xfe"),
        lambda file: file.unlink(),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: file.write_text("[models]\n"),
    ],
    ids=["syntax", "unknown", "binary", "vanished", "directory", "empty"],
)
@awaited
async def test_a_broken_file_changes_nothing(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    async with running(tmp_path) as it:
        old = it.reloader.settings
        spoil(it.file)

        with pytest.raises(ConfigInvalid) as caught:
            await it.reload()

        assert caught.value.status == 422
        assert it.reloader.settings is old
        assert ended(it).code == "CONFIG_INVALID"
        assert ended(it).problems


@awaited
async def test_a_judge_that_knows_more_is_asked(tmp_path: Path) -> None:
    async with running(tmp_path) as it:

        def judge(new: Settings) -> None:
            if not new.auth.keys:
                raise ConfigInvalid("keys are needed")

        it.reloader.asks(judge)
        it.document["auth"] = {}
        it.write()
        with pytest.raises(ConfigInvalid, match="keys are needed"):
            await it.reload()

        assert it.caller.name == "ci"


@awaited
async def test_a_part_that_fails_leaves_nothing_half_applied(tmp_path: Path) -> None:
    async with running(tmp_path) as it:
        heard: list[float] = []

        def fails(new: Settings) -> None:
            heard.append(new.server.drain_s)
            if new.server.drain_s == 1:
                raise RuntimeError("broken")

        it.reloader.tells(fails)
        it.set(("server", "drain_s"), 1)
        with pytest.raises(InternalError):
            await it.reload()

        assert it.plan.drain_s == it.reloader.settings.server.drain_s == 30
        assert heard == [1, 30]
        assert ended(it).code == "INTERNAL_ERROR"


@awaited
async def test_a_part_that_cannot_go_back_keeps_no_other_from_it_and_is_told(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as it:
        heard: list[float] = []

        def breaks(_new: Settings) -> None:
            raise RuntimeError("broken, and stays so")

        def fails_once(new: Settings) -> None:
            heard.append(new.server.drain_s)
            if new.server.drain_s == 1:
                raise RuntimeError("broken")

        # The first part that is told is the first that fails to go back.
        it.reloader._parts.insert(0, lambda new: None if new.server.drain_s == 1 else breaks(new))
        it.reloader.tells(fails_once)
        it.set(("server", "drain_s"), 1)
        with pytest.raises(InternalError, match="did not take the old ones") as caught:
            await it.reload()

        assert "restart" in caught.value.suggested_action.lower()
        assert (it.plan.drain_s, heard) == (30, [1, 30])
        assert ended(it).code == "INTERNAL_ERROR"
        assert ended(it).changed == ()


@awaited
async def test_a_judge_that_fails_ends_no_more_than_the_reload(tmp_path: Path) -> None:
    """Whoever asked by a signal waits for a HiveError; anything else would end hive."""
    async with running(tmp_path) as it:

        def judge(_new: Settings) -> None:
            raise ZeroDivisionError

        it.reloader.asks(judge)
        it.set(("server", "drain_s"), 1)
        with pytest.raises(InternalError):
            await it.reload()

        assert (ended(it).code, ended(it).changed) == ("INTERNAL_ERROR", ())
        assert it.plan.drain_s == 30


@awaited
async def test_two_reloads_at_once_take_turns_and_the_last_file_counts(tmp_path: Path) -> None:
    async with running(tmp_path) as it:
        turn, reads = threading.Event(), 0

        def slow() -> Settings:
            nonlocal reads
            reads += 1
            found = it.read()
            assert turn.wait(10)
            return found

        it.reloader._reread = slow
        it.set(("server", "drain_s"), 1)
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(it.reload())
            await until(lambda: reads == 1, "the first one reads")
            it.set(("server", "drain_s"), 2)
            second = tasks.create_task(it.reload())
            await asyncio.sleep(0)
            assert reads == 1
            turn.set()

        assert first.result() == second.result() == ["server.drain_s"]
        assert it.plan.drain_s == 2


@awaited
async def test_a_reload_while_hive_stops_is_refused(tmp_path: Path) -> None:
    """Also when it began before."""
    async with running(tmp_path) as it:
        turn, is_reading = threading.Event(), threading.Event()

        def slow() -> Settings:
            is_reading.set()
            assert turn.wait(10)
            return it.read()

        it.reloader._reread = slow
        it.set(("server", "drain_s"), 1)
        began = asyncio.ensure_future(it.reload())
        await until(is_reading.is_set, "it reads")
        it.reloader.close()  # which waits for no disk
        for reloading in (began, it.reload()):
            with pytest.raises(Conflict):
                await within(reloading, 5)
        turn.set()

        assert it.plan.drain_s == 30


@awaited
async def test_whoever_leaves_meanwhile_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as it:
        turn, is_reading = threading.Event(), threading.Event()

        def slow() -> Settings:
            is_reading.set()
            assert turn.wait(10)
            return it.read()

        it.reloader._reread = slow
        it.set(("server", "drain_s"), 1)
        leaving = asyncio.ensure_future(it.reload())
        await until(is_reading.is_set, "it reads")
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        turn.set()

        assert ended(it).code == "REQUEST_CANCELLED"
        assert it.plan.drain_s == 30
        assert await within(it.reload(), 10) == ["server.drain_s"]


@awaited
async def test_what_nobody_foresaw_in_the_file_is_told_bare(tmp_path: Path) -> None:
    async with running(tmp_path) as it:

        def breaks() -> Settings:
            raise ZeroDivisionError

        it.reloader._reread = breaks
        with pytest.raises(HiveError) as caught:
            await it.reload()

        assert caught.value.code == ended(it).code == "INTERNAL_ERROR"


# ── keys that are taken away ────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def reading(it: Running, name: str, path: str) -> AsyncIterator[aiohttp.ClientResponse]:
    async with it.it.session.get(path, headers=bearer(name)) as answer:
        assert answer.status == 200
        yield answer


EVENTS, LOG = "/hive/v1/events", "/hive/v1/workers/m-0/logs?follow=1"


@pytest.mark.parametrize("path", [EVENTS, LOG])
@pytest.mark.parametrize(
    "keys",
    [
        [key("ops", "admin")],
        [key("ops", "admin"), key("ann", "inference", "metrics")],
        [key("ops", "admin"), {**key("ann", "admin"), "sha256": "0" * 64}],
    ],
    ids=["revoked", "narrowed", "another secret"],
)
@awaited
async def test_a_key_that_is_taken_away_reads_on_nowhere(
    tmp_path: Path, path: str, keys: list[dict[str, Any]]
) -> None:
    """Event streams and followed logs never end by themselves (R034)."""
    async with running(tmp_path) as it:
        it.plan.log.parent.mkdir(parents=True, exist_ok=True)
        it.plan.log.write_text("one\n")
        it.set(("auth",), {"keys": [key("ops", "admin"), key("ann", "admin")]})
        await it.reload()
        async with reading(it, "ann", path) as gone, reading(it, "ops", path) as stays:
            assert await within(gone.content.readline(), 10)
            assert await within(stays.content.readline(), 10)
            it.set(("auth",), {"keys": keys})
            await it.reload()

            rest = await within(gone.content.read(), 10)  # whole: nobody takes it for a fault
            assert b"later" not in rest
            with it.plan.log.open("a") as out:
                out.write("later\n")
            it.it.announcer.announce(DaemonMoved("later"))
            while b"later" not in await within(stays.content.readline(), 10):
                pass
        (end,) = [one for one in it.it.heard(RequestEnded) if one.key == "ann"]
        assert end.code == "REQUEST_CANCELLED"
        answer, _ = await it.it.ask("GET", path, **bearer("ann"))
        assert answer.status in (401, 403)


@pytest.mark.parametrize("how", ["its key is revoked", "it is cancelled", "hive stops"])
@awaited
async def test_a_stream_that_nobody_reads_is_cut_off(tmp_path: Path, how: str) -> None:
    """What was written for it is not kept either."""
    async with running(tmp_path) as it:
        it.set(("auth",), {"keys": [key("ops", "admin"), key("ann", "admin")]})
        await it.reload()
        with contextlib.closing(it.it.connect()) as client:
            lines = {"Host": "x", "X-Request-Id": "deaf", **bearer("ann")}
            head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
            client.sendall(f"GET {EVENTS} HTTP/1.1\r\n{head}\r\n".encode())
            await until(lambda: it.it.gateway._streams._open, "the stream")
            for _ in range(200):  # 20 MB: more than the kernel takes
                it.it.announcer.announce(DaemonMoved("x" * 100_000))
            (stream,) = it.it.gateway._streams._open
            transport = stream.request.transport
            assert transport is not None
            await until(transport.get_write_buffer_size, "it is stuck")
            if how == "hive stops":
                it.it.gateway.close_streams()
            elif how == "it is cancelled":
                path = "/hive/v1/requests/deaf"
                answer, _ = await it.it.ask("DELETE", path, **bearer("ops"))
                assert answer.status == 204
            else:
                it.set(("auth",), {"keys": [key("ops", "admin")]})
                await it.reload()

            await until(lambda: "deaf" in ended_requests(it), "its end", 10)
            assert transport.is_closing()
            assert transport.get_write_buffer_size() == 0


def ended_requests(it: Running) -> list[str]:
    return [one.request_id for one in it.it.heard(RequestEnded)]

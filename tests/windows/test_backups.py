"""Backups: whose they are, which one is meant, and that a restore is whole or never was."""

import asyncio
import contextlib
import errno
import os
import shutil
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hive.devices.nvml import Driver
from hive.devices.watch import Devices
from hive.errors import (
    ConcurrencyLimit,
    HiveError,
    InsufficientDisk,
    InvalidParameter,
    InvalidStateTransition,
    InvalidWindowName,
    NotFound,
    StorageCorrupted,
    StorageQuotaExceeded,
    WindowAlreadyExists,
    WindowNotFound,
)
from hive.events import Announcer, Event, WindowOperationEnded
from hive.policy.windows import WindowState
from hive.settings import Settings
from hive.storage.catalogue import GIB, Catalogue, Window, opened
from hive.windows import archives
from hive.windows.archives import Found
from hive.windows.backups import MOST_AT_ONCE, THREADS, Asker, Backups
from hive.windows.blocks import Blocks
from hive.windows.engines import Engines
from hive.windows.operations import Windows
from hive.windows.sessions import Sessions
from hive.windows.tier import Tier
from hive.workers.fleet import Fleet
from hive.workers.ledger import Ledger
from hive.workers.preflight import prepare_directories
from steps.driver import Answer, Hive, new_hive
from steps.waiting import must
from tests.doubles.fs import HANGS_S, Faults, Rule
from tests.patience import awaited, short_directory, until
from tests.windows.daemon import WINDOWS, new_name, said, state_of
from tests.windows.making import Home, window
from tests.windows.test_archives import Shelf, _resized, damaged, forged

T = TypeVar("T")
ADMIN = Asker("root", None, is_admin=True)
ADA, BOB = (Asker(name, name, is_admin=False) for name in ("ada", "bob"))
NOBODY = Asker("", None, is_admin=True)  # who asks a hive without keys


def for_(owner: str) -> Asker:
    """The admin, who says whose."""
    return Asker("root", owner, is_admin=True)


class Kept:
    """A hive's windows and backups without engines."""

    def __init__(self, top: Path, catalogue: Catalogue, given: Settings, size: int) -> None:
        self.catalogue, self.settings = catalogue, given
        self.home = Home(given.server.state_dir, size=size)
        self.events: list[Event] = []
        announcer = Announcer()
        announcer.listen(self.events.append)
        ledger = Ledger(top / "ledger", announcer.announce)
        fleet = Fleet(given, Devices(Driver(), {}, announcer), ledger, announcer)
        blocks = Blocks(self.home.files, Tier(self.home.tier, 2**30), Engines(given, fleet))
        sessions = Sessions(given, catalogue, announcer)
        self.windows = Windows(given, catalogue, self.home.files, blocks, sessions, announcer)
        self.backups = Backups(given, self.windows, self.home.files, blocks)
        self.directory = given.backup_dir
        self.directory.mkdir(mode=0o700, exist_ok=True)

    async def frozen(self, number: int = 1, **facts: Any) -> Window:
        """Whole, in catalogue and on disk."""
        one = window(number, **facts)
        await self.catalogue.begin_window(one)
        manifest, _ = self.home.frozen(one)
        await self.catalogue.commit_window(manifest.window(), keep_active=True)
        return manifest.window()

    async def state(self) -> tuple[set[str], list[str], list[str]]:
        """Rows in every state, folders, and backups."""
        rows = [
            f"{row.owner}:{row.name}:{row.state}"
            for state in WindowState
            for row in await self.catalogue.windows(None, state=state)
        ]
        return self.home.present(), sorted(rows), sorted(os.listdir(self.directory))

    def content(self, window_id: str) -> dict[str, bytes]:
        folder = self.home.files.folder(window_id)
        return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".json"}

    def ended(self) -> list[tuple[str, str]]:
        told = [one for one in self.events if isinstance(one, WindowOperationEnded)]
        return [(one.operation, one.code) for one in told]

    async def named(self, asker: Asker, window_name: str | None = None) -> list[tuple[str, str]]:
        found, _ = await self.backups.listed(asker.owner, window_name)
        return [(one.header.owner, one.header.name) for one in found]


@asynccontextmanager
async def kept(*keys: str, size: int = 600, **windows: Any) -> AsyncIterator[Kept]:
    with short_directory() as top:
        given = Settings.model_validate(
            {
                "server": {"state_dir": top / "s", "runtime_dir": top / "r"},
                "windows": windows,
                "auth": {
                    "keys": [{"name": key, "sha256": key[0].encode().hex() * 32} for key in keys]
                },
                "models": {"m": {"engine": "command", "device": "cpu", "command": ["x{socket}"]}},
            }
        )
        prepare_directories(given)
        async with opened(given.server.state_dir) as catalogue:
            it = Kept(top, catalogue, given, size)
            async with it.windows.running():
                yield it


@asynccontextmanager
async def three() -> AsyncIterator[Kept]:
    """A hive with the usual keys."""
    async with kept("root", "ada", "bob") as it:
        yield it


# ── there and back ──────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_deleted_window_is_had_again_from_its_backup() -> None:
    """R124, R125, R126: with all that it had, its salt too, which its blocks are named by."""
    async with three() as hive:
        one = await hive.frozen(tags=("a", "b"), description="häng 😀")
        content = hive.content(one.id)
        heard: list[tuple[str, int, int]] = []
        made = await hive.backups.create("ada", "w1", lambda *told: heard.append(told))
        assert heard[-1] == ("write", 3, 3)
        await hive.windows.delete("ada", "w1")
        for path in hive.home.tier.iterdir():
            path.unlink()

        heard.clear()
        again, header = await hive.backups.restore(ADA, "w1", told=lambda *told: heard.append(told))
        assert heard[-1] == ("read", 3, 3)
        assert header == made.header
        assert hive.content(again.id) == content
        found = await hive.windows.window("ada", "w1")
        assert found == again
        assert again.id != one.id
        assert replace(again, id=one.id, state=one.state) == one
        folder = hive.home.files.folder(again.id)
        assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o600}
        assert {p.stat().st_nlink for p in folder.iterdir()} == {1}
        manifest = hive.home.files.manifest(again.id)
        assert (await hive.backups._blocks.health(manifest, lambda *_: None))[0].is_whole
        assert hive.ended() == [("backup", ""), ("delete", ""), ("restore", "")]


@awaited
async def test_the_newest_is_restored_unless_a_timestamp_says_which() -> None:
    """R125"""
    async with three() as hive:
        made: list[Found] = []
        for number in (1, 2, 3):
            await hive.frozen(number, name="w", description=f"{number}")
            made.append(await hive.backups.create("ada", "w"))
            await hive.windows.delete("ada", "w")
        found, _ = await hive.backups.listed("ada", "w")
        assert [one.header.description for one in found] == ["3", "2", "1"]
        assert (await hive.backups.restore(ADA, "w"))[0].description == "3"
        at = made[0].header.timestamp
        older, header = await hive.backups.restore(ADA, "w", timestamp=at, new_name="old")
        assert (older.name, older.description, header.timestamp) == ("old", "1", at)
        with pytest.raises(NotFound, match="no backup of 2000-"):
            await hive.backups.restore(ADA, "w", timestamp="2000-01-01T00:00:00.000000Z")


@awaited
async def test_a_name_that_is_taken_is_told_with_the_way_out() -> None:
    async with three() as hive:
        await hive.frozen()
        await hive.backups.create("ada", "w1")
        before = await hive.state()
        with pytest.raises(WindowAlreadyExists, match="already exists: w1") as caught:
            await hive.backups.restore(ADA, "w1")
        assert "--name" in caught.value.suggested_action
        assert await hive.state() == before
        again, _ = await hive.backups.restore(ADA, "w1", new_name="w2")
        assert again.name == "w2"
        manifest = hive.home.files.manifest(again.id)
        assert (manifest.name, manifest.id) == ("w2", again.id)


@awaited
async def test_names_and_timestamps_that_are_none_are_told() -> None:
    async with three() as hive:
        await hive.frozen()
        await hive.backups.create("ada", "w1")
        with pytest.raises(InvalidWindowName):
            await hive.backups.create("ada", "../w1")
        with pytest.raises(InvalidWindowName):
            await hive.backups.restore(ADA, "../w1")
        with pytest.raises(InvalidWindowName):
            await hive.backups.restore(ADA, "w1", new_name="../w1")
        with pytest.raises(InvalidWindowName):
            await hive.backups.restore(ADA, "w1", new_name="")
        with pytest.raises(InvalidWindowName):
            await hive.backups.listed("ada", "")
        for bad in ("", "yesterday", "../x", "2026-01-01"):
            with pytest.raises(InvalidParameter) as caught:
                await hive.backups.delete(ADA, "w1", bad)
            assert caught.value.param == "timestamp"


# ── whose they are ──────────────────────────────────────────────────────────────────────────────


@awaited
async def test_another_key_has_nothing_of_it() -> None:
    """R084"""
    async with three() as hive:
        await hive.frozen()
        made = await hive.backups.create("ada", "w1")
        before = await hive.state()
        at = made.header.timestamp
        with pytest.raises(WindowNotFound):
            await hive.backups.create("bob", "w1")
        with pytest.raises(NotFound):
            await hive.backups.restore(BOB, "w1", new_name="mine")
        with pytest.raises(NotFound):
            await hive.backups.restore(BOB, "w1", timestamp=at)
        with pytest.raises(NotFound):
            await hive.backups.delete(BOB, "w1", at)
        assert await hive.named(BOB) == []
        assert await hive.named(ADA) == [("ada", "w1")] == await hive.named(ADMIN)
        assert await hive.state() == before


@awaited
async def test_an_admin_says_whose_where_a_name_is_not_enough() -> None:
    async with three() as hive:
        for number, owner in enumerate(("ada", "bob")):
            await hive.frozen(number, owner=owner, name="w")
            await hive.backups.create(owner, "w")
        with pytest.raises(InvalidParameter, match="Several keys") as caught:
            await hive.backups.restore(ADMIN, "w", new_name="x")
        assert caught.value.param == "owner"
        again, _ = await hive.backups.restore(for_("bob"), "w", new_name="x")
        assert (again.owner, again.salt) == ("bob", "salt1")
        at = (await hive.backups.listed("ada", "w"))[0][0].header.timestamp
        again, _ = await hive.backups.restore(ADMIN, "w", timestamp=at, new_name="x")
        assert again.owner == "ada"
        await hive.frozen(3, owner="root", name="w")
        await hive.backups.create("root", "w")  # an admin's own goes first
        again, _ = await hive.backups.restore(ADMIN, "w", new_name="x")
        assert again.owner == "root"
        assert await hive.named(for_("bob")) == [("bob", "w")]


@awaited
async def test_what_came_from_another_hive_becomes_who_it_was_or_whose_an_admin_says() -> None:
    """And nothing of a key that is here becomes another's by a slip of the pen."""
    async with kept("root", "ada", "cyd") as elsewhere, three() as hive:
        for number, owner in enumerate(("ada", "cyd")):
            await elsewhere.frozen(number, owner=owner, name=owner)
            made = await elsewhere.backups.create(owner, owner)
            shutil.copy(made.path, hive.directory / f"{number}.tar.zst")
        assert sorted(await hive.named(ADMIN)) == [("ada", "ada"), ("cyd", "cyd")]
        assert await hive.named(ADA) == [("ada", "ada")]
        mine, _ = await hive.backups.restore(ADA, "ada")
        assert (mine.owner, mine.salt) == ("ada", "salt0")

        before = await hive.state()
        with pytest.raises(InvalidParameter, match="key 'cyd', which this hive") as caught:
            await hive.backups.restore(ADMIN, "cyd")
        assert "--owner" in caught.value.suggested_action
        with pytest.raises(InvalidParameter, match="has no key 'cyd'"):
            await hive.backups.restore(for_("cyd"), "cyd")
        with pytest.raises(NotFound):  # it is no admin's wish
            await hive.backups.restore(BOB, "cyd")
        with pytest.raises(NotFound):  # ada is here: what is hers stays hers
            await hive.backups.restore(for_("bob"), "ada")
        with pytest.raises(NotFound):  # nobody deletes for another what is not his
            await hive.backups.delete(for_("bob"), "cyd", made.header.timestamp)
        assert await hive.state() == before

        theirs, _ = await hive.backups.restore(for_("bob"), "cyd")
        assert (theirs.owner, theirs.salt) == ("bob", "salt1")
        assert hive.home.files.manifest(theirs.id).owner == "bob"
        await hive.backups.delete(for_("cyd"), "cyd", made.header.timestamp)
        assert await hive.named(ADMIN) == [("ada", "ada")]


@awaited
async def test_a_hive_without_keys_takes_what_a_hive_with_keys_made() -> None:
    async with three() as elsewhere, kept() as hive:
        await elsewhere.frozen()
        made = await elsewhere.backups.create("ada", "w1")
        shutil.copy(made.path, hive.directory)
        again, _ = await hive.backups.restore(NOBODY, "w1")
        assert again.owner == ""
        back = await hive.backups.create(None, "w1")
        await elsewhere.windows.delete("ada", "w1")
        os.unlink(made.path)
        shutil.copy(back.path, elsewhere.directory)
        assert (await elsewhere.backups.restore(for_("bob"), "w1"))[0].owner == "bob"


@awaited
async def test_the_same_file_copied_twice_is_deleted_twice() -> None:
    async with three() as hive:
        await hive.frozen()
        made = await hive.backups.create("ada", "w1")
        shutil.copy(made.path, hive.directory / "copy.tar.zst")
        await hive.backups.delete(ADA, "w1", made.header.timestamp)
        assert os.listdir(hive.directory) == []
        with pytest.raises(NotFound):
            await hive.backups.delete(ADA, "w1", made.header.timestamp)


# ── one at a time, and no more than there may be ────────────────────────────────────────────────


@awaited
async def test_nothing_else_is_done_with_a_window_that_is_backed_up() -> None:
    """Deleted or repaired meanwhile, it would be half of one and half of the other."""
    async with three() as hive:
        one = await hive.frozen()
        async with hive.windows.alone(one):
            with pytest.raises(InvalidStateTransition):
                await hive.backups.create("ada", "w1")
        assert os.listdir(hive.directory) == []
        refused: list[str] = []

        def told(*_: object) -> None:
            entering = hive.windows.alone(one).__aenter__()
            with pytest.raises(InvalidStateTransition):
                entering.send(None)
            refused.append("yes")

        await hive.backups.create("ada", "w1", told)
        assert len(refused) >= 3
        async with hive.windows.alone(one):
            pass


@awaited
async def test_a_few_at_once_and_the_others_are_told_when_to_come_back() -> None:
    async with three() as hive:
        await hive.frozen()
        running: set[int] = set()

        def told(*_: object) -> None:
            running.add(hive.backups._running)

        await hive.backups.create("ada", "w1", told)
        await hive.backups.restore(ADA, "w1", new_name="w2", told=told)
        assert running == {1}
        before = await hive.state()
        with contextlib.ExitStack() as others:
            for _ in range(MOST_AT_ONCE):
                others.enter_context(hive.backups._one_more())
            for one_more in (
                hive.backups.create("ada", "w1"),
                hive.backups.restore(ADA, "w1", new_name="w3"),
            ):
                with pytest.raises(ConcurrencyLimit) as caught:
                    await one_more
                assert caught.value.retry_after_s
        assert await hive.state() == before
        await hive.backups.create("ada", "w1")


@awaited
async def test_quotas_of_windows_are_those_of_restored_ones() -> None:
    """R091: CWM-4003"""
    async with kept("root", "ada", "bob", max_windows=2, max_gib=4000 / GIB) as hive:
        await hive.frozen()
        await hive.backups.create("ada", "w1")
        before = await hive.state()
        with pytest.raises(StorageQuotaExceeded, match="GiB"):  # 3600 bytes each
            await hive.backups.restore(ADA, "w1", new_name="w2")
        assert await hive.state() == before
    async with kept("root", "ada", "bob", max_windows=1) as hive:
        await hive.frozen()
        await hive.backups.create("ada", "w1")
        with pytest.raises(StorageQuotaExceeded, match="has 1 windows, and may have 1"):
            await hive.backups.restore(ADA, "w1", new_name="w2")


@awaited
async def test_a_key_has_so_many_backups_and_no_more() -> None:
    """R091: nobody fills the disk with them."""
    async with kept("root", "ada", "bob", max_backups=2) as hive:
        await hive.frozen(1)
        await hive.frozen(2, owner="bob")
        for _ in range(2):
            made = await hive.backups.create("ada", "w1")
        with pytest.raises(StorageQuotaExceeded, match="has 2 backups, and may have 2") as caught:
            await hive.backups.create("ada", "w1")
        assert "hive backup delete" in caught.value.suggested_action
        await hive.backups.create("bob", "w2")
        await hive.backups.delete(ADA, "w1", made.header.timestamp)
        await hive.backups.create("ada", "w1")


# ── whole or never ──────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_damaged_block_is_no_backup_and_leaves_the_tier() -> None:
    """R092: what is damaged may be loaded by an engine at any moment."""
    async with three() as hive:
        one = await hive.frozen()
        block = hive.home.files.folder(one.id) / "000001-0"
        inode = block.stat().st_ino
        with block.open("r+b") as file:
            file.write(b"not what was there")
        with pytest.raises(StorageCorrupted, match="block 000001-0"):
            await hive.backups.create("ada", "w1")
        assert inode not in {path.stat().st_ino for path in hive.home.tier.iterdir()}
        assert os.listdir(hive.directory) == []
        assert hive.ended() == [("backup", "STORAGE_CORRUPTED")]


@awaited
async def test_a_window_that_no_disk_holds_is_refused_before_it_is_read() -> None:
    with short_directory() as top:
        shelf = Shelf(top)
        path = forged(shelf, _resized(shelf.manifest, 2**55))
        async with three() as hive:
            shutil.copy(path, hive.directory)
            before = await hive.state()
            with pytest.raises(InsufficientDisk, match=r"disk under server\.state_dir") as caught:
                await hive.backups.restore(ADA, "w1")
            assert caught.value.public_details["required_disk_mb"] > 2**30
            assert await hive.state() == before


@pytest.mark.parametrize("what", ["create", "restore"])
@awaited
async def test_who_leaves_in_the_middle_leaves_nothing(what: str) -> None:
    """R107"""
    async with kept("root", "ada", "bob", size=12 * 2**20) as hive:
        await hive.frozen()
        if what == "restore":
            await hive.backups.create("ada", "w1")
        before = await hive.state()

        def leave(*_: object) -> None:
            work.cancel()

        calls: dict[str, Callable[[], Any]] = {
            "create": lambda: hive.backups.create("ada", "w1", leave),
            "restore": lambda: hive.backups.restore(ADA, "w1", new_name="x", told=leave),
        }
        work = asyncio.ensure_future(calls[what]())
        with pytest.raises(asyncio.CancelledError):
            await work
        assert await hive.state() == before
        assert hive.ended()[-1][1] == "REQUEST_CANCELLED"
        await hive.backups.create("ada", "w1")


@awaited
async def test_what_an_earlier_life_left_is_tidied_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """R107"""
    async with three() as hive:
        (hive.directory / "w,ada,1.tar.zst.part").write_bytes(b"half of one")
        async with hive.backups.running():
            await until(lambda: not os.listdir(hive.directory), "what was left is removed")
        assert "w,ada,1.tar.zst.part was not finished: removed" in caplog.text


@awaited
async def test_whoever_serves_does_not_wait_for_the_disk_of_backups(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs: that is told, and nothing else is kept by it, the end neither."""
    monkeypatch.setattr("hive.windows.backups.LOOK_S", 1.0)
    monkeypatch.setattr("hive.windows.work.HANGS_S", 0.1)
    go_on = threading.Event()

    def hangs(directory: Path) -> list[str]:
        assert go_on.wait(60)
        return []

    monkeypatch.setattr(archives, "tidied", hangs)
    try:
        async with three() as hive:
            await hive.frozen()
            began = time.monotonic()
            async with hive.backups.running():
                assert time.monotonic() - began < 0.9  # the start is not kept
                assert (await hive.windows.verify("ada", "w1")).is_whole
                await until(lambda: "cannot be looked at" in caplog.text, "it is told")
            assert "the disk under windows.backup_dir hangs" in caplog.text
            async with hive.backups.running():
                pass  # its end neither
            assert time.monotonic() - began < 5
    finally:
        go_on.set()


class Life:
    """One hive, with a backup, for many examples."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._live(),))
        self._begun = threading.Event()
        self._thread.start()
        assert self._begun.wait(30)

    async def _live(self) -> None:
        self._end = asyncio.Event()
        async with three() as self.hive:
            await self.hive.frozen()
            made = await self.hive.backups.create("ada", "w1")
            self.path, self.whole = made.path, made.path.read_bytes()
            self._begun.set()
            await self._end.wait()

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(30)
        self._loop.close()


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    it = Life()
    yield it
    it.close()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_happens_to_a_backup_is_never_a_window(life: Life, data: st.DataObject) -> None:
    """R092, R104, R107: no row, no folder, no file; and its owner is told."""
    now = data.draw(damaged(life.whole))
    life.path.write_bytes(now)
    before = life.run(life.hive.state())
    try:
        window_, _ = life.run(life.hive.backups.restore(ADMIN, "w1", new_name="again"))
    except HiveError as exc:
        # Without its header it is not among the backups: then the list tells what it is.
        assert exc.code in ("STORAGE_CORRUPTED", "NOT_FOUND")
        if exc.code == "NOT_FOUND":
            _, unreadable = life.run(life.hive.backups.listed(None))
            assert len(unreadable) == 1
        assert life.run(life.hive.state()) == before
    else:
        assert now == life.whole
        assert life.hive.content(window_.id)
        life.run(life.hive.windows.delete("ada", "again"))


def test_unharmed_it_still_is_one(life: Life) -> None:
    life.path.write_bytes(life.whole)
    life.run(life.hive.backups.restore(ADMIN, "w1", new_name="again"))
    life.run(life.hive.windows.delete("ada", "again"))
    assert archives.looked_at(life.path).is_whole


# ── disks that fail ─────────────────────────────────────────────────────────────────────────────

IMPATIENT = """
import runpy, sys
from hive.policy.retries import RETRIES, RetryPolicy
from hive.windows import backups

RETRIES["storage"] = RetryPolicy(3, (0.01,))
backups.LOOK_S = 0.5
sys.argv = sys.argv[sys.argv.index("hive") :]
runpy.run_module("hive", run_name="__main__", alter_sys=True)
"""
BACKUPS = "/hive/v1/backups"


class Disk:
    """A daemon, and what goes wrong with its disks."""

    def __init__(self, hive: Hive) -> None:
        self.hive = hive
        self.faults = Faults(hive.home / "faults")
        hive.starter = (*self.faults.starter, sys.executable, "-c", IMPATIENT)
        hive.sections |= {"windows": WINDOWS}
        hive.model("m", windows=True)
        hive.start(is_shared=True)

    def frozen(self) -> str:
        session = self.hive.ask("POST", "/hive/v1/sessions", {"model": "m"}).json["id"]
        body = {"model": "m", "messages": said(40), "max_tokens": 8}
        headers = {"X-Hive-Session": session}
        assert self.hive.ask("POST", "/v1/chat/completions", body, headers).status == 200
        name = new_name()
        wanted = {"session_id": session, "name": name}
        assert self.hive.ask("POST", "/hive/v1/windows", wanted).status == 201
        return name

    def create(self, name: str) -> Answer:
        return self.hive.ask("POST", BACKUPS, {"window": name}, timeout_s=60)

    def restore(self, name: str, new: str) -> Answer:
        body = {"window": name, "name": new}
        return self.hive.ask("POST", f"{BACKUPS}/restore", body, timeout_s=60)

    def there(self) -> tuple[Any, list[str]]:
        return state_of(self.hive), sorted(os.listdir(self.hive.state / "backups"))


@pytest.fixture(scope="module")
def disk() -> Iterator[Disk]:
    with new_hive() as hive:
        yield Disk(hive)


READ_FAILED, WRITE_FAILED = (500, "STORAGE_READ_FAILED"), (500, "STORAGE_WRITE_FAILED")
FULL, CORRUPTED = (507, "INSUFFICIENT_DISK"), (500, "STORAGE_CORRUPTED")


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (Rule("*/backups/*", "open", errno.ENOSPC), FULL),
        (Rule("*/backups/*", "open", errno.EACCES), WRITE_FAILED),
        (Rule("*/backups/*", "write", errno.ENOSPC), FULL),
        (Rule("*/backups/*", "write", errno.EDQUOT), (507, "STORAGE_QUOTA_EXCEEDED")),
        (Rule("*/backups/*", "write", errno.EIO), WRITE_FAILED),
        (Rule("*/backups/*.part", "sync", errno.EIO), WRITE_FAILED),
        (Rule("*/backups", "sync", errno.EIO), WRITE_FAILED),
        (Rule("*/backups/*", "rename", errno.EIO), WRITE_FAILED),
        (Rule("*/windows/*/0000*", "read", errno.EIO), READ_FAILED),
        (Rule("*/windows/*/0000*", "open", errno.EMFILE), READ_FAILED),
        (Rule("*/windows/*/000001-0", "read", flipped=True), CORRUPTED),
    ],
    ids=str,
)
def test_a_disk_that_fails_has_no_backup_nor_half_of_one(
    disk: Disk, rule: Rule, told: tuple[int, str]
) -> None:
    """R089, R090, R102, R107"""
    name = disk.frozen()
    before = disk.there()
    with disk.faults.on(rule):
        answer = disk.create(name)
    assert (answer.status, answer.code) == told, answer.body
    assert disk.there() == before
    if told != CORRUPTED:
        assert disk.create(name).status == 201


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (Rule("*/backups/*", "read", errno.EIO), READ_FAILED),
        (Rule("*/windows/*.part/*", "write", errno.ENOSPC), FULL),
        (Rule("*/windows/*.part/*", "write", errno.EIO), WRITE_FAILED),
        (Rule("*/windows/*.part/*", "sync", errno.EIO), WRITE_FAILED),
        (Rule("*/windows/*.part*", "rename", errno.EIO), WRITE_FAILED),
    ],
    ids=str,
)
def test_a_disk_that_fails_has_no_window_nor_half_of_one(
    disk: Disk, rule: Rule, told: tuple[int, str]
) -> None:
    """R089, R090, R102, R107"""
    name, new = disk.frozen(), new_name()
    assert disk.create(name).status == 201
    before = disk.there()
    meeting = disk.faults.add(rule)
    if rule.calls == "read":  # the list is read as well: only what is unpacked is to fail
        (path,) = [p for p in disk.there()[1] if p.startswith(f"{name},")]
        disk.faults.off()
        meeting = disk.faults.add(Rule(f"*/backups/{path}", "read", errno.EIO, every=2))
    answer = disk.restore(name, new)
    assert meeting.fired
    disk.faults.off()
    assert (answer.status, answer.code) == told, answer.body
    must(lambda: disk.there() == before, 10, lambda: f"{before}, there is {disk.there()}")
    assert disk.restore(name, new).status == 201


def test_a_fault_that_passes_is_not_seen_by_anybody(disk: Disk) -> None:
    """R101: it is tried three times."""
    name = disk.frozen()
    for rule in (
        Rule("*/backups/*", "write", errno.EIO, most=2),
        Rule("*/windows/*/0000*", "read", errno.EIO, most=2),
    ):
        with disk.faults.on(rule):
            assert disk.create(name).status == 201
    with disk.faults.on(Rule("*/windows/*.part/*", "write", errno.EIO, most=2)):
        assert disk.restore(name, new_name()).status == 201


def test_a_disk_of_backups_that_hangs_is_told_and_stops_nothing_else(disk: Disk) -> None:
    """R107: it may be another host's, and nobody knows when it is back."""
    name = disk.frozen()
    assert disk.create(name).status == 201
    before = disk.there()
    with disk.faults.on(Rule("*/backups/*", "read|open", delay_s=HANGS_S)):
        for _ in range(THREADS + 1):
            answer = disk.hive.ask("GET", BACKUPS)
            assert (answer.status, answer.code) == (504, "OPERATION_TIMEOUT")
        other = disk.frozen()
        assert disk.hive.ask("POST", f"/hive/v1/windows/{other}/thaw", {}).status == 200
        assert disk.hive.ask("DELETE", f"/hive/v1/windows/{other}").status == 204
    must(lambda: disk.hive.ask("GET", BACKUPS).status == 200, 10, "it is back")
    assert disk.there() == before
    assert disk.create(name).status == 201

"""Steps about a disk that fails under hive: which calls fail how, and that nothing is left of it."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_bdd import given, parsers, then, when

from steps.driver import Answer, Hive, new_hive
from steps.memory import SMALL, WINDOWS, blocks_of, talk, window_folder
from steps.story import MODEL, WORKER, Story
from steps.waiting import holds, must
from tests.doubles.fs import HANGS_S, Faults, Meeting, Rule

PATIENT_S, HASTY_S = 30.0, 1.5  # what an operation may take
# hive, but it tries again sooner, and gives up sooner.
PROGRAM = """
import runpy, sys
import hive.storage.sqlite as sqlite
import hive.windows.blocks as blocks
import hive.windows.operations as operations
import hive.windows.work as work
from hive.policy.retries import RETRIES, RetryPolicy

blocks.STALL_S = 0.5
sqlite.LIMIT_S = 2.0
operations.AGAIN_S = (0.1, 0.2)
operations.LIMIT_S = work.LIMIT_S = float(sys.argv[1])
work.PER_TOKEN_S, work.HANGS_S = 0.0, 0.5
for name in ("block_write", "storage"):
    RETRIES[name] = RetryPolicy(RETRIES[name].calls, (0.05,))
sys.argv = sys.argv[sys.argv.index("hive") :]
runpy.run_module("hive", run_name="__main__", alter_sys=True)
"""
PLACES = {
    "blocks": "*/windows/*/0*",
    "block 3": "*/windows/*/000003-0",
    "the KV tier": "*/kv/*.data",
    "what is linked again": "*/windows/*/.*",
    "the manifest": "*/windows/*/manifest.json*",
    "the window's folder": "*/windows/*.part",
    "the windows' directory": "*/s/windows",
    "the catalogue": "*/catalogue.db*",
    "the engine": "*/r/w/*",
}
CALLS = {
    "opens": "open",
    "reads": "read",
    "writes": "write",
    "syncs": "sync",
    "links": "link",
    "renames": "rename",
    "connections": "connect",
}
SEED = 14  # of what happens 3 times in 10: the first call fails, so few calls are enough
POOL = 6  # threads of asyncio's own, which come with the first work for them


class FailingDisk:
    """A hive on a disk that does what a scenario wants, and what was there before."""

    def __init__(self, hive: Hive, limit_s: float) -> None:
        self.hive = hive
        self.faults = Faults(hive.home / "faults")
        self.met: list[Meeting] = []
        self.log_from = 0
        hive.starter = (*self.faults.starter, sys.executable, "-c", PROGRAM, str(limit_s))
        hive.sections["windows"] = dict(SMALL)
        hive.model(MODEL, windows=True)

    def fails(self, rule: Rule) -> None:
        self.met.append(self.faults.add(rule))

    def works_again(self) -> None:
        """Raises AssertionError where a rule was never met: such a scenario shows nothing."""
        self.faults.off()
        never = [one for one in self.met if not one.fired]
        self.met.clear()
        assert not never, f"never met: {never}"

    def left(self) -> tuple[list[str], list[str]]:
        """Folders, and rows in every state."""
        directory = self.hive.state / "windows"
        folders = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        rows: list[str] = []
        for state in ("FREEZING", "FROZEN", "DELETING"):
            found = self.hive.ask("GET", f"{WINDOWS}?state={state}").json["windows"]
            rows += [f"{one['name']} {state}" for one in found]
        return folders, rows

    def begin(self) -> None:
        """As nobody had ever frozen anything."""
        self.works_again()
        for one in self.hive.ask("GET", WINDOWS).json["windows"]:
            assert self.hive.ask("DELETE", f"{WINDOWS}/{one['name']}").status == 204
        self.log_from = len(self.hive.log_text)

    def held(self) -> tuple[int, int]:
        """The daemon's threads and descriptors."""
        assert self.hive.process is not None
        about = f"/proc/{self.hive.process.pid}"
        return len(os.listdir(f"{about}/task")), len(os.listdir(f"{about}/fd"))

    @property
    def logged(self) -> str:
        """What it told since the scenario began."""
        return self.hive.log_text[self.log_from :]


@pytest.fixture(scope="session")
def shared_disk() -> Iterator[FailingDisk]:
    """One daemon for all scenarios that leave it as it was."""
    with new_hive() as hive:
        disk = FailingDisk(hive, PATIENT_S)
        hive.start(is_shared=True)
        yield disk


@pytest.fixture
def disk(shared_disk: FailingDisk) -> Iterator[FailingDisk]:
    """Whatever fails, what is left are whole windows; no thread and no descriptor more (R107)."""
    shared_disk.begin()
    threads, descriptors = shared_disk.held()
    yield shared_disk
    shared_disk.works_again()

    def is_whole() -> bool:
        folders, rows = shared_disk.left()
        is_one = len(folders) == len(rows) and all(row.endswith(" FROZEN") for row in rows)
        return is_one and not any(name.endswith(".part") for name in folders)

    must(is_whole, 10, lambda: f"whole windows, and nothing else: {shared_disk.left()}")

    def is_given_back() -> bool:
        now = shared_disk.held()
        return now[0] <= threads + POOL and now[1] <= descriptors

    must(
        is_given_back,
        10,
        lambda: f"{threads} threads, {descriptors} descriptors: {shared_disk.held()}",
    )


def disk_of(story: Story) -> FailingDisk:
    told: FailingDisk = story.kept["disk"]
    return told


# ── given ───────────────────────────────────────────────────────────────────────────────────────


@given("hive is serving a model with windows, on a disk that may fail")
def _(story: Story, disk: FailingDisk) -> None:
    story.hive = disk.hive
    story.kept["disk"] = disk


@given("hive is serving a model with windows in haste, on a disk that may fail")
def _(story: Story) -> None:
    disk = story.kept["disk"] = FailingDisk(story.hive, HASTY_S)
    disk.hive.start()


# ── the disk ────────────────────────────────────────────────────────────────────────────────────

OFTEN = r"(?P<often>all|3 in 10|the first \d+) (?P<calls>\w+(?: and \w+)*) of (?P<place>[\w' ]+)"


@given(parsers.re(OFTEN + r" fail with (?P<error>E\w+)"))
@when(parsers.re(OFTEN + r" fail with (?P<error>E\w+)"))
def _(story: Story, often: str, calls: str, place: str, error: str) -> None:
    if session := story.kept.get("session"):  # what was answered in it is written down
        assert story.hive.ask("GET", f"/hive/v1/sessions/{session}").status == 200
    disk_of(story).fails(
        Rule(
            PLACES[place],
            "|".join(CALLS[call] for call in calls.split(" and ")),
            getattr(errno, error),
            percent=30 if often == "3 in 10" else 100,
            seed=SEED,
            most=int(often.rpartition(" ")[2]) if often.startswith("the first") else 0,
        )
    )


@given(parsers.parse("a bit is flipped in whatever is read of {place}"))
def _(story: Story, place: str) -> None:
    disk_of(story).fails(Rule(PLACES[place], "read", flipped=True))


@given(parsers.parse("a bit is flipped in the first read of {place}"))
def _(story: Story, place: str) -> None:
    disk_of(story).fails(Rule(PLACES[place], "read", flipped=True, most=1))


@given("writes of the manifest are cut short")
def _(story: Story) -> None:
    disk_of(story).fails(Rule(PLACES["the manifest"], "write", shortened=True))


@given(parsers.parse("each sync of blocks takes {seconds:g} s"))
def _(story: Story, seconds: float) -> None:
    disk_of(story).fails(Rule(PLACES["blocks"], "sync", delay_s=seconds))


@given(parsers.parse("{calls} of {place} hang"))
def _(story: Story, calls: str, place: str) -> None:
    disk_of(story).fails(Rule(PLACES[place], CALLS[calls], delay_s=HANGS_S, most=1))


@when("syncs of the catalogue hang, too")
def _(story: Story) -> None:
    disk_of(story).fails(Rule(PLACES["the catalogue"], "sync", delay_s=HANGS_S))


@when("a client is answered in the session")
def _(story: Story) -> None:
    answer = talk(story, story.kept["session"])
    assert answer.status == 200, answer.body


@then("the log says that the catalogue's disk hangs, and what was not recorded")
def _(story: Story) -> None:
    told = story.hive.log_text
    assert "the disk of the catalogue hangs" in told
    assert f"session {story.kept['session']}: what was said is not recorded" in told


@when("the disk of the catalogue fails, and the other one goes on")
def _(story: Story) -> None:
    disk = disk_of(story)
    (hanging,) = disk.met
    disk.fails(Rule(PLACES["the catalogue"], "write|sync", errno.EIO))
    hanging.end()


@when("the disk works again")
def _(story: Story) -> None:
    disk_of(story).works_again()


@when("engine and LMCache are started anew, and remember nothing")
def _(story: Story) -> None:
    for worker in ("lmcache", WORKER):
        _restart(story.hive, worker)
    must(lambda: story.hive.worker(WORKER)["cache"] == "ok", 20, "an engine with its LMCache")


def _restart(hive: Hive, worker: str) -> None:
    starts = hive.worker(worker)["starts"]
    assert hive.ask("POST", f"/hive/v1/workers/{worker}/restart").status == 202

    def is_new() -> bool:
        told = hive.worker(worker)
        return bool(told["starts"] > starts and told["state"] == "READY")

    must(is_new, 20, lambda: f"a new life: {hive.worker(worker)}")


@given("block 3 is missing in the window")
def _(story: Story) -> None:
    blocks_of(window_folder(story.hive, named="monday"))[3].unlink()


@given("LMCache has lost every file")
def _(story: Story) -> None:
    for path in (story.hive.state / "kv").glob("*.data"):
        path.unlink()
    story.kept["sessions"] = len(
        story.hive.ask("GET", "/hive/v1/sessions?limit=1000").json["sessions"]
    )


# ── what clients do meanwhile ───────────────────────────────────────────────────────────────────


def operate(story: Story, what: str, name: str, body: Any = None) -> Answer:
    path = f"{WINDOWS}/{name}/{what}" if what != "delete" else f"{WINDOWS}/{name}"
    answer = story.hive.ask(
        "DELETE" if what == "delete" else "POST", path, body or {}, timeout_s=60
    )
    story.heard(answer)
    return answer


@when(parsers.re(r'a client (?P<what>verifies|repairs|clones|removes) "(?P<name>\w+)"'))
def _(story: Story, what: str, name: str) -> None:
    verb = {"verifies": "verify", "repairs": "repair", "clones": "clone", "removes": "delete"}[what]
    operate(story, verb, name, {"name": f"{name}2"} if verb == "clone" else None)


@when(parsers.parse('a client begins to freeze the session as "{name}"'))
def _(story: Story, name: str) -> None:
    body = {"session_id": story.kept["session"], "name": name}
    story.begin(WINDOWS, body, Accept="text/event-stream")


@when("the disk is at it")
def _(story: Story) -> None:
    (met,) = disk_of(story).met
    must(lambda: met.fired, 10, lambda: f"a call that is slow: {met}")


# ── what comes of it ────────────────────────────────────────────────────────────────────────────


@then(parsers.parse('"{name}" is whole'))
def _(story: Story, name: str) -> None:
    assert story.answer.status == 201, story.answer.body
    found = operate(story, "verify", name)
    assert found.json["whole"] is True, found.body
    assert found.json["blocks"] >= 8


@then("each attempt that failed is in the log")
def _(story: Story) -> None:
    disk = disk_of(story)
    fired = sum(one.fired for one in disk.met)
    told = disk.logged.count("failed, attempt ")
    assert fired >= told >= 1, (disk.met, disk.logged[-2000:])


@then("it was tried only once")
def _(story: Story) -> None:
    (met,) = disk_of(story).met
    assert met.fired == 1, met


@then(parsers.parse("it was tried {count:d} times"))
def _(story: Story, count: int) -> None:
    assert disk_of(story).logged.count("failed, attempt ") == count - 1


@then("nothing is left of it")
def _(story: Story) -> None:
    disk = disk_of(story)
    must(lambda: disk.left() == ([], []), 10, lambda: f"nothing; there is {disk.left()}")


@then("both windows share every block but block 3")
def _(story: Story) -> None:
    one, other = (
        [path.stat().st_ino for path in blocks_of(window_folder(story.hive, named=name))]
        for name in ("monday", "tuesday")
    )
    assert [at for at in range(len(one)) if one[at] != other[at]] == [3]


@then("there are as many sessions as before")
def _(story: Story) -> None:
    now = story.hive.ask("GET", "/hive/v1/sessions?limit=1000").json["sessions"]
    assert len(now) == story.kept["sessions"]


@then("it says how many bytes are needed, and how many are free")
def _(story: Story) -> None:
    error = story.answer.error
    told = error["details"]["resource_info"]
    about = os.statvfs(story.hive.state)
    assert 0 < told["required_bytes"] < 2**24
    assert abs(told["available_bytes"] - about.f_bavail * about.f_frsize) < 2**30
    assert f"{told['required_bytes']:,} bytes are needed and " in error["message"]
    assert f"{told['available_bytes']:,} are free" in error["message"]


@then("it has every block")
def _(story: Story) -> None:
    receipt = story.answer.json["receipt"]
    assert (story.answer.status, receipt["partial"]) == (200, False)
    assert receipt["blocks_missing"] == 0


@then(parsers.parse('it names block "{name}"'))
def _(story: Story, name: str) -> None:
    assert f"block {name}" in story.answer.error["message"]


@then(parsers.parse('it finds block "{name}" damaged'))
def _(story: Story, name: str) -> None:
    told = story.answer.json
    assert (told["whole"], told["corrupt"], told["missing"]) == (False, [name], [])


@then("the log names the block")
def _(story: Story) -> None:
    assert "is damaged: block 000003-0" in disk_of(story).logged


@then("the damaged block is not in the KV tier")
def _(story: Story) -> None:
    block = blocks_of(window_folder(story.hive, named="monday"))[3]
    assert block.name == "000003-0"
    assert block.stat().st_nlink == 1


@then("block 3 is still in the window")
def _(story: Story) -> None:
    names = [path.name for path in blocks_of(window_folder(story.hive, named="monday"))]
    assert "000003-0" in names


@then(parsers.parse("{recovered:d} block was had from the KV tier, and {again:d} computed again"))
@then(parsers.parse("{recovered:d} blocks were had from the KV tier, and {again:d} computed again"))
def _(story: Story, recovered: int, again: int) -> None:
    told = story.answer.json
    assert story.answer.status == 200, story.answer.body
    assert (told["whole"], told["recovered"], told["recomputed"]) == (True, recovered, again)


@then("clients are answered at normal speed")
def _(story: Story) -> None:
    """The loop is not blocked: a call that waits for the disk takes longer than all of these."""
    for at in range(5):
        answer = story.hive.chat(MODEL, f"meanwhile{at}")
        assert answer.status == 200, answer.body
        assert answer.seconds < 1.0


@then("its progress goes on, block by block")
def _(story: Story) -> None:
    client = story.client
    client.wait_for_end(30)
    linked = [event for event in client.events if '"phase": "link"' in event]
    times = dict(zip(client.pieces, client.times, strict=True))
    told = [at for piece, at in times.items() if b'"phase": "link"' in piece]
    assert len(linked) >= 8
    assert told[-1] - told[0] > 0.5, "all at once at the end"
    assert b"event: result" in client.body, client.body[-500:]


@then("the freeze is not answered")
def _(story: Story) -> None:
    holds(lambda: story.client.ended_at is None, 0.2, "it hangs")


@then("what is half made is left alone as long as the disk hangs")
def _(story: Story) -> None:
    """Who still writes there would be in the way of who removes it."""
    disk = disk_of(story)

    def is_there() -> bool:
        folders, rows = disk.left()
        return rows == ["monday FREEZING"] and [name[-5:] for name in folders] == [".part"]

    holds(is_there, 0.5, "a folder and a row")


@then("the freeze comes to its end")
def _(story: Story) -> None:
    story.client.wait_for_end(30)
    assert b"event: result" in story.client.body, story.client.body[-500:]


@then(parsers.parse("the freeze ends with {code} within {seconds:d} seconds"))
def _(story: Story, code: str, seconds: int) -> None:
    story.client.wait_for_end(seconds)
    assert story.client.last_error["code"] == code, story.client.body
    assert story.client.ended_at is not None
    assert story.client.ended_at - story.client.began < seconds


@then(parsers.parse("hive stops within {seconds:d} seconds, though the disk hangs"))
def _(story: Story, seconds: int) -> None:
    process = story.hive.process
    assert process is not None
    process.terminate()
    assert story.hive.wait_exit(seconds) == 0
    assert story.hive.leftovers() == []


@when("hive is started on a disk that works")
def _(story: Story) -> None:
    disk_of(story).works_again()
    story.hive.start()


@then("a chat without a session is answered")
def _(story: Story) -> None:
    assert story.hive.chat(MODEL, "plain").status == 200


@then("the guards and engines met nothing")
def _(story: Story) -> None:
    for process in story.hive.tree(WORKER):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert "faults.so" not in maps

"""Steps about backups of windows."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from pytest_bdd import given, parsers, then, when

from hive.windows.files import unsealed
from steps.driver import BESIDE, Answer, Hive, new_hive
from steps.memory import WINDOWS, as_key, window_folder
from steps.story import MODEL, Story
from tests.doubles import engine_command

BACKUPS = "/hive/v1/backups"
ZSTD = b"\x28\xb5\x2f\xfd"  # how a frame begins
# hive, but it is killed when everything of a backup is written and it has not its name yet.
KILLED = """
import os, runpy, signal, sys
from hive.windows import archives

archives._Claim.commit = lambda claim: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = sys.argv[sys.argv.index("hive") :]
runpy.run_module("hive", run_name="__main__", alter_sys=True)
"""


def back_up(story: Story, name: str, who: str | None = None) -> Answer:
    answer = story.hive.ask("POST", BACKUPS, {"window": name}, as_key(who), timeout_s=60)
    story.heard(answer)
    return answer


def restore(story: Story, window: str, who: str | None = None, **fields: Any) -> Answer:
    body = {"window": window, **fields}
    path = f"{BACKUPS}/restore"
    answer = story.hive.ask("POST", path, body, as_key(who), timeout_s=60)
    story.heard(answer)
    return answer


def files_of(hive: Hive) -> list[Path]:
    """What is in its directory of backups, which may be on a disk that only hive sees."""
    assert hive.process is not None
    seen = Path(f"/proc/{hive.process.pid}/root{hive.state}/backups")
    return sorted(seen.iterdir() if seen.is_dir() else (hive.state / "backups").iterdir())


def the_file(story: Story) -> Path:
    (path,) = files_of(story.hive)
    return path


# ── create, restore, delete ─────────────────────────────────────────────────────────────────────


@given(parsers.parse('a backup of "{name}"'))
@given(parsers.parse('another backup of "{name}"'))
def _(story: Story, name: str) -> None:
    assert back_up(story, name).status == 201, story.answer.body
    story.kept.setdefault("backup", story.answer.json)


@given(parsers.parse('"{who}" has a backup of "{name}"'))
def _(story: Story, who: str, name: str) -> None:
    assert back_up(story, name, who).status == 201, story.answer.body


@when(parsers.parse('a client backs "{name}" up'))
def _(story: Story, name: str) -> None:
    back_up(story, name)


@when(parsers.parse('a client restores "{name}"'))
def _(story: Story, name: str) -> None:
    restore(story, name)


@when(parsers.parse('a client restores "{name}" as "{other}"'))
def _(story: Story, name: str, other: str) -> None:
    restore(story, name, name=other)


@when(parsers.parse('"{who}" restores "{name}" as "{other}"'))
def _(story: Story, who: str, name: str, other: str) -> None:
    restore(story, name, who, name=other)


@when(parsers.parse('a client restores the first backup of "{name}" as "{other}"'))
def _(story: Story, name: str, other: str) -> None:
    restore(story, name, name=other, timestamp=story.kept["backup"]["timestamp"])


@when(parsers.parse('a client deletes the backup of "{name}"'))
def _(story: Story, name: str) -> None:
    answer = story.ask("DELETE", f"{BACKUPS}/{name}/{story.kept['backup']['timestamp']}")
    assert answer.status == 204, answer.body


@then("it is restored from the first backup")
def _(story: Story) -> None:
    found = story.hive.ask("GET", BACKUPS).json["backups"]
    assert len({one["timestamp"] for one in found}) == 2
    first = min(one["timestamp"] for one in found)
    assert story.answer.json["backup"] == {"window": "monday", "timestamp": first}


@then("there is no backup")
@then("there is no backup, nor half of one")
def _(story: Story) -> None:
    assert story.hive.ask("GET", BACKUPS).json["backups"] == []
    assert files_of(story.hive) == []


@then(parsers.parse('"{who}" sees no backups'))
def _(story: Story, who: str) -> None:
    assert story.hive.ask("GET", BACKUPS, headers=as_key(who)).json["backups"] == []


@then(parsers.parse('"{name}" is the only window, and its folder the only one'))
def _(story: Story, name: str) -> None:
    windows = [story.hive.ask("GET", f"{WINDOWS}?state={s}").json["windows"] for s in STATES]
    assert [one["name"] for found in windows for one in found] == [name]
    folder = window_folder(story.hive, named=name)
    assert list((story.hive.state / "windows").iterdir()) == [folder]


STATES = ("FREEZING", "FROZEN", "DELETING")


@then("the session's salt is in the backup, which is for hive's user alone")
def _(story: Story) -> None:
    path = the_file(story)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        plain = reader.read()
    size = int(plain[124:135], 8)
    story.kept["salt"] = unsealed(plain[512 : 512 + size]).salt


@then("neither the answer, the list nor the log has it")
def _(story: Story) -> None:
    salt = story.kept["salt"]
    assert len(salt) > 10
    for text in (
        story.answer.body.decode(),
        story.hive.ask("GET", BACKUPS).body.decode(),
        story.hive.log_text,
        the_file(story).name,
    ):
        assert salt not in text


@then("the damaged block is not in the KV tier")
def _(story: Story) -> None:
    there = {path.stat().st_ino for path in (story.hive.state / "kv").iterdir()}
    assert story.kept["damaged"] not in there


# ── another hive ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def elsewhere() -> Iterator[Hive]:
    """Another host's hive."""
    with new_hive() as hive:
        yield hive


@when("hive is stopped, and its backups are copied to another hive")
@when(
    parsers.parse(
        'hive is stopped, and its backups are copied to another hive with "{argument}" for the engine'
    )
)
def _(story: Story, elsewhere: Hive, argument: str | None = None) -> None:
    old = story.hive
    old.stop()
    elsewhere.sections = {name: dict(keys) for name, keys in old.sections.items()}
    # The same engine, to the letter: what it is told is part of what a block belongs to.
    told = ("--control", str(old.control(MODEL)), "--journal", str(old.journal(MODEL)))
    command = engine_command("--uds", "{socket}", "--model", "{model}", *told, *BESIDE)
    more = {"args": [argument]} if argument else {}
    elsewhere.model(MODEL, windows=True, command=command, **more)
    elsewhere.start()
    for path in (old.state / "backups").iterdir():
        shutil.copy(path, elsewhere.state / "backups" / f"from-elsewhere-{path.name}")
    assert elsewhere.ask("GET", WINDOWS).json["windows"] == []
    story.hive = elsewhere


# ── damage, disks, kills ────────────────────────────────────────────────────────────────────────


@when("one bit of its third block in the backup is flipped")
def _(story: Story) -> None:
    path = the_file(story)
    data = bytearray(path.read_bytes())
    begin = -1
    for _ in range(1 + 3):  # the manifest has a frame of its own, then each block
        begin = data.index(ZSTD, begin + 1)
    end = data.index(ZSTD, begin + 1)
    data[(begin + end) // 2] ^= 1
    path.write_bytes(data)


@when("the last byte of the backup is missing")
def _(story: Story) -> None:
    path = the_file(story)
    os.truncate(path, path.stat().st_size - 1)


@given("a disk for the backups that takes no more files")
def _(story: Story) -> None:
    can = subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True)
    if os.geteuid() or can.returncode:
        pytest.skip("needs mount namespaces")
    place = story.hive.state / "backups"
    story.hive.state.mkdir(mode=0o700)
    place.mkdir(mode=0o700)
    mount = f'mount -t tmpfs -o mode=700,size=200m,nr_inodes=1 tmpfs {place} && exec "$@"'
    story.hive.starter = ("unshare", "-m", "sh", "-c", mount, "sh")


@given("hive will be killed when it has written half of a backup")
def _(story: Story) -> None:
    story.hive.starter = (sys.executable, "-c", KILLED)


@when(parsers.parse('a client backs "{name}" up, and hive is killed'))
def _(story: Story, name: str) -> None:
    story.begin(BACKUPS, {"window": name})
    assert story.hive.wait_exit() == -9


@then("half of a backup is there")
def _(story: Story) -> None:
    (path,) = (story.hive.state / "backups").iterdir()
    assert path.name.endswith(".part")
    assert path.stat().st_size > 0


@when("hive is started again, whole")
def _(story: Story) -> None:
    story.hive.starter = ()
    story.hive.start()

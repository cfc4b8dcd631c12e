"""A directory that cannot be hive's alone is named with its key, and is left as it is."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hive.daemon import only_daemon
from hive.errors import ConfigInvalid
from hive.settings import Settings
from hive.workers.directories import LOCK
from hive.workers.preflight import prepare_directories
from tests.patience import short_directory

MODEL = {"engine": "command", "device": "cpu", "command": ["sh", "{socket}"]}


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


@pytest.fixture
def wanted(home: Path) -> Settings:
    server = {"state_dir": home / "s", "runtime_dir": home / "r"}
    return Settings.model_validate({"server": server, "models": {"m": MODEL}})


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refused(wanted: Settings) -> str:
    """What is said of the directories, before and at the start: the same."""
    with pytest.raises(ConfigInvalid) as checked:
        prepare_directories(wanted)
    with pytest.raises(ConfigInvalid) as started, only_daemon(wanted):
        pass
    assert checked.value.message == started.value.message
    return checked.value.message


@pytest.mark.parametrize("permissions", [0o1777, 0o770, 0o702])
def test_a_directory_that_others_may_write_is_refused_and_keeps_its_mode(
    home: Path, wanted: Settings, permissions: int
) -> None:
    (home / "s").mkdir()
    (home / "s").chmod(permissions)
    with pytest.raises(ConfigInvalid) as caught:
        prepare_directories(wanted)

    told = f"(mode {permissions:04o}, owner {os.geteuid()})"
    assert caught.value.message == f"server.state_dir: others may write to {home / 's'} {told}."
    assert f"'chmod go-w {home / 's'}'" in caught.value.suggested_action
    assert mode(home / "s") == permissions
    assert list((home / "s").iterdir()) == []


def test_a_directory_that_others_may_read_is_used_as_it_is(home: Path, wanted: Settings) -> None:
    (home / "s").mkdir()
    (home / "s").chmod(0o755)
    prepare_directories(wanted)

    assert mode(home / "s") == 0o755
    assert mode(home / "s" / "logs") == 0o700


@pytest.mark.parametrize(
    ("put", "told"),
    [
        (Path.mkdir, f"{LOCK}: Is a directory"),
        (os.mkfifo, f"{LOCK} in it is not a file of its own"),
        (lambda path: path.symlink_to(path.parent / "victim"), f"{LOCK} in it is a link"),
        (lambda path: path.hardlink_to(path.parents[1] / "precious"), "not a file of its own"),
    ],
)
def test_what_stands_in_the_locks_place_is_neither_used_nor_followed(
    home: Path, wanted: Settings, put: Callable[[Path], None], told: str
) -> None:
    prepare_directories(wanted)
    (home / "precious").write_text("important")
    (home / "s" / LOCK).unlink()
    put(home / "s" / LOCK)

    assert refused(wanted).startswith(f"server.state_dir: {home / 's'} cannot be used: ")
    assert told in refused(wanted)
    assert (home / "precious").read_text() == "important"
    assert not (home / "s" / "victim").exists()


def test_two_hives_do_not_share_a_directory(home: Path, wanted: Settings) -> None:
    prepare_directories(wanted)
    with (
        only_daemon(wanted),
        pytest.raises(ConfigInvalid, match=rf"another hive \(pid {os.getpid()}\) runs in"),
        only_daemon(wanted),
    ):
        pass
    assert (home / "s" / LOCK).read_text() == f"{os.getpid()}\n"


# ── Disks, in a mount namespace of their own ────────────────────────────────────────────────────

CAN_MOUNT = (
    subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
)
TRY = """
import sys, pathlib
from hive.daemon import only_daemon
from hive.errors import HiveError
from hive.settings import Settings
from hive.workers.preflight import prepare_directories
top = pathlib.Path(sys.argv[1])
model = {"engine": "command", "device": "cpu", "command": ["sh", "{socket}"]}
server = {"state_dir": top / "disk", "runtime_dir": top / "r"}
settings = Settings.model_validate({"server": server, "models": {"m": model}})
for what in (prepare_directories, lambda s: only_daemon(s).__enter__()):
    try:
        what(settings)
        print("fine")
    except HiveError as exc:
        print(exc.message)
"""


def tried(home: Path, options: str, then: str) -> list[str]:
    """What is said of a state_dir on a tmpfs, when it is checked and at the start."""
    (home / "disk").mkdir()
    script = (
        f"mount -t tmpfs -o mode=700,{options} tmpfs {home}/disk && cd {home}/disk && {then}\n"
        f'exec "$@"'
    )
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", TRY, str(home)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


@pytest.mark.skipif(not CAN_MOUNT, reason="needs mount namespaces")
def test_a_disk_that_is_read_only_is_said_to_be_so(home: Path) -> None:
    told = tried(home, "size=1m", f"mkdir logs && mount -o remount,ro {home}/disk")

    wrong = f"server.state_dir: {home}/disk cannot be used: {LOCK}: Read-only file system."
    assert told == [wrong, wrong]


@pytest.mark.skipif(not CAN_MOUNT, reason="needs mount namespaces")
def test_a_full_disk_is_said_to_be_full(home: Path) -> None:
    told = tried(home, "size=64k", "mkdir logs; head -c 1m /dev/zero > fill 2>/dev/null; true")

    assert told[1] == f"server.state_dir: {home}/disk cannot be used: No space left on device."


@pytest.mark.skipif(not CAN_MOUNT, reason="needs mount namespaces")
def test_inodes_that_are_used_up_are_said_to_be(home: Path) -> None:
    told = tried(home, "size=1m,nr_inodes=3", "mkdir logs; touch a; true")

    assert all("No space left on device: its inodes are used up." in line for line in told)

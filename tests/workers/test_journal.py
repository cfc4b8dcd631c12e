"""The journal's files: whole or not there when written, and believed only as hive writes them."""

import json
import os
import resource
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hive.workers import journal
from hive.workers.journal import Damaged, Note, Tree
from tests.patience import short_directory
from tests.workers.blindness import blind

MARK = "0123456789abcdef"
HOME = Path("/run/hive/w/1")


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as top:
        yield top / "ledger"


def note(**facts: Any) -> Note:
    return journal.new("llama-0", HOME, MARK, **facts)


def written(directory: Path, **changes: Any) -> Path:
    """A note on disk, changed by somebody."""
    journal.write(directory, note())
    path = journal.file_of(directory, MARK)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def tree_file(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    path = journal.record_in(directory, MARK)
    empty = {"mark": MARK, "guard": 7, "members": [], "shm_before": [], "shm": {}}
    path.write_text(json.dumps(empty | changes))
    return path


# ── Writing ─────────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_is_read_back_whole(directory: Path) -> None:
    me = journal.identity(os.getpid())
    one = note(
        guard=me,
        leader=me,
        cgroup=Path(f"/sys/fs/cgroup/hive-{MARK}"),
        devices={"cuda:0": {"uuid": "GPU-1", "free_bytes": 80_000_000_000}},
        grace_s=2.5,
    )
    journal.write(directory, one)

    assert journal.read_note(journal.file_of(directory, MARK)) == one
    assert one.hive == me
    assert one.is_of_this_boot


def test_only_hives_user_can_read_it(directory: Path) -> None:
    journal.write(directory, note())

    assert directory.stat().st_mode & 0o777 == 0o700
    assert journal.file_of(directory, MARK).stat().st_mode & 0o777 == 0o600
    assert [file.name for file in directory.iterdir()] == [f"{MARK}.json"]


def test_a_write_that_fails_leaves_what_was_there(directory: Path) -> None:
    """As on a full disk."""
    journal.write(directory, note())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            journal.write(directory, note(grace_s=60))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert journal.read_note(journal.file_of(directory, MARK)).grace_s == 5
    assert [file.name for file in directory.iterdir()] == [f"{MARK}.json"]


def test_what_is_forgotten_is_gone_with_its_tree_and_drafts(directory: Path) -> None:
    """Removing is idempotent (R026)."""
    journal.write(directory, note())
    journal.write_tree(directory, Tree(mark=MARK, members=[(7, 7)], shm={}))
    for name in (f"{MARK}.json.new", f"{MARK}.tree.json.new"):
        (directory / name).touch()
    for _ in range(2):
        journal.remove(directory, MARK)

        assert list(directory.iterdir()) == []


def test_what_cannot_be_removed_is_told(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal.file_of(directory, MARK).mkdir(parents=True)
    journal.remove(directory, MARK)

    assert f"a start stays in the journal (mark {MARK})" in caplog.text


@pytest.mark.parametrize(
    "facts",
    [
        {"cgroup": Path("/sys/fs/cgroup/hive-of-another")},
        {"cgroup": Path(f"hive-{MARK}")},
        {"grace_s": -1.0},
    ],
)
def test_what_could_not_be_read_back_is_not_written(facts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        note(**facts)


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"text"', "{}", "\0", '{"mark": "0123456789abcdef"}', "[" * 100_000],
    ids=lambda text: text[:10],
)
def test_a_damaged_file_is_no_note(directory: Path, text: str) -> None:
    path = written(directory)
    path.write_text(text)
    with pytest.raises(Damaged):
        journal.read_note(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"home": "/"},
        {"home": "/home"},
        {"home": "/run/hive/w/.."},
        {"home": "/run/hive/w/1/.."},
        {"home": "/run/hive/w/"},
        {"home": "/run/hive/w/²"},
        {"home": "w/1"},
        {"home": ""},
        {"home": ["/run/hive/w/1"]},
        {"mark": ""},
        {"mark": "../../../../etc/"},
        {"mark": MARK.upper()},
        {"mark": f"{MARK}\n"},
        {"worker": "../llama-0"},
        {"worker": "\x1b[2J"},
        {"worker": "x" * 1000},
        {"guard": [1, 1]},
        {"guard": [-1, 1]},
        {"guard": [True, True]},
        {"guard": [7.0, 7]},
        {"guard": ["7", 7]},
        {"guard": [7]},
        {"guard": [1 << 40, 7]},
        {"guard": 7},
        {"hive": [7, 1000], "leader": [8, 999]},
        {"cgroup": "/"},
        {"cgroup": "/sys/fs/cgroup/system.slice"},
        {"cgroup": f"/sys/fs/cgroup/hive-{MARK}/.."},
        {"cgroup": f"hive-{MARK}"},
        {"grace_s": 1e9},
        {"grace_s": "soon"},
        {"boot": 1},
        {"devices": [1]},
    ],
    ids=str,
)
def test_a_note_that_hive_would_not_write_is_not_believed(
    directory: Path, changes: dict[str, Any]
) -> None:
    path = written(directory, **changes)
    with pytest.raises(Damaged):
        journal.read_note(path)


def test_what_a_newer_hive_added_is_no_damage(directory: Path) -> None:
    assert journal.read_note(written(directory, fan_speed=3)).mark == MARK


def test_a_note_under_anothers_name_is_not_believed(directory: Path) -> None:
    path = written(directory)
    other = path.rename(directory / f"{MARK[::-1]}.json")
    with pytest.raises(Damaged, match="another's name"):
        journal.read_note(other)


def test_only_a_plain_file_is_read(directory: Path) -> None:
    """Nor does a pipe that nobody writes hold hive up."""
    content = written(directory).read_text()
    path = journal.file_of(directory, MARK)
    (directory / "elsewhere").write_text(content)
    bound = socket.socket(socket.AF_UNIX)
    replacements: tuple[Callable[[], None], ...] = (
        lambda: path.symlink_to(directory / "elsewhere"),
        lambda: os.mkfifo(path),
        lambda: bound.bind(str(path)),
    )
    for replace in replacements:
        path.unlink()
        replace()
        with pytest.raises(Damaged):
            journal.read_note(path)
    bound.close()
    path.unlink()
    path.mkdir()
    with pytest.raises(Damaged, match="no plain file"):
        journal.read_note(path)


def test_a_huge_file_is_not_read(directory: Path) -> None:
    path = written(directory)
    os.truncate(path, journal.MOST_BYTES + 1)
    with pytest.raises(Damaged, match="too large"):
        journal.read_note(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_not_believed(directory: Path) -> None:
    path = written(directory)
    os.chown(path, 65534, -1)
    with pytest.raises(Damaged, match="another user's"):
        journal.read_note(path)


def test_why_it_is_damaged_shows_nothing_of_it(directory: Path) -> None:
    path = written(directory, worker="secret of somebody\n")
    with pytest.raises(Damaged) as caught:
        journal.read_note(path)

    assert "worker" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert str(directory) not in str(caught.value)


# ── The guard's record ──────────────────────────────────────────────────────────────────────────


def test_what_the_guard_wrote_down_is_read(directory: Path) -> None:
    tree_file(directory, members=[[7, 70], [8, 80]], shm={"psm_1": 3, "sem.x": 4})
    tree = journal.tree_of(directory, note())

    assert tree.members == [(7, 70), (8, 80)]
    assert tree.shm == {"psm_1": 3, "sem.x": 4}


def test_a_record_that_is_not_there_is_empty(directory: Path) -> None:
    """What hive itself noted is all that is known then."""
    alone = note()
    tree = journal.tree_of(directory, alone)

    assert (tree.mark, tree.members, tree.shm) == (alone.mark, [], {})
    assert (tree.home, tree.shm_before) == (alone.made, alone.shm_before)


def test_a_record_may_lie_in_the_home(tmp_path: Path) -> None:
    home = tmp_path / "1"
    tree_file(home, members=[[7, 70]]).rename(home / "tree.json")
    tree = journal.tree_of(tmp_path, journal.new("llama-0", home, MARK))

    assert tree.members == [(7, 70)]


def test_what_was_there_before_the_tree_is_not_the_trees(directory: Path) -> None:
    tree_file(directory, shm={"dataset": 3, "psm_1": 4}, shm_before=[3, 5])

    assert journal.tree_of(directory, note()).shm == {"psm_1": 4}


def test_of_a_record_that_knows_no_before_no_shared_memory_is_the_trees(directory: Path) -> None:
    tree_file(directory, members=[[7, 70]], shm={"psm_1": 3}, shm_before=None)
    tree = journal.tree_of(directory, note())

    assert (tree.members, tree.shm) == ([(7, 70)], {})


def test_a_record_proves_the_home_that_it_lies_in(tmp_path: Path) -> None:
    home = tmp_path / "1"
    tree_file(home).rename(home / "tree.json")
    tree = journal.tree_of(tmp_path, journal.new("llama-0", home, MARK))

    assert tree.home == (home.stat().st_dev, home.stat().st_ino)
    assert journal.read_tree(home / "tree.json").home is None


def test_what_cannot_be_read_just_now_is_not_damaged(directory: Path) -> None:
    """No descriptor is free: it is another thing than a file that is not hive's."""
    path = written(directory)
    tree_file(directory)
    one = note()
    with blind():
        for read in (lambda: journal.read_note(path), lambda: journal.tree_of(directory, one)):
            with pytest.raises(OSError, match="Too many open files"):
                read()


@pytest.mark.parametrize("seconds", [0.0, 86_400.0])
def test_every_grace_that_a_setting_allows_is_journalled(directory: Path, seconds: float) -> None:
    journal.write(directory, note(grace_s=seconds))

    assert journal.read_note(journal.file_of(directory, MARK)).grace_s == seconds


def test_names_in_directories_of_shared_memory_are_left_to_others(directory: Path) -> None:
    tree_file(directory, shm={"psm_1": 3, "theirs/file": 4})

    assert journal.tree_of(directory, note()).shm == {"psm_1": 3}


@pytest.mark.parametrize(
    "changes",
    [
        {"shm": {"../../etc/passwd": 1}},
        {"shm": {"/etc/passwd": 1}},
        {"shm": {"a/../../b": 1}},
        {"shm": {"..": 1}},
        {"shm": {".": 1}},
        {"shm": {"": 1}},
        {"shm": {"a\0b": 1}},
        {"shm": {"a": "1"}},
        {"shm": ["a"]},
        {"members": [[1, 1]]},
        {"members": [[7, -1]]},
        {"members": [7]},
        {"members": {"7": 7}},
        {"mark": "f" * 16},
    ],
    ids=str,
)
def test_a_record_that_no_guard_writes_is_not_believed(
    directory: Path, changes: dict[str, Any]
) -> None:
    tree_file(directory, **changes)
    with pytest.raises(Damaged):
        journal.tree_of(directory, note())


# ── Who and where ───────────────────────────────────────────────────────────────────────────────


def test_a_process_is_known_by_its_pid_and_start() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        one = journal.identity(process.pid)
        assert one is not None
        assert one[0] == process.pid
        assert one[1] >= (journal.identity(os.getpid()) or (0, 0))[1]
        process.kill()
    assert journal.identity(process.pid) is None


def test_another_boot_is_told_from_this_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = note()
    monkeypatch.setattr(journal, "BOOT_ID", tmp_path / "boot_id")
    (tmp_path / "boot_id").write_text("00000000-0000-0000-0000-000000000000\n")

    assert not one.is_of_this_boot

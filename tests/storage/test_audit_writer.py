"""The audit log's writer: what it writes is whole, whatever fails or was changed is told and made up for."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hive.policy.chain import START, Link, opened
from hive.storage import audit_writer
from hive.storage.audit import ACTIVE, HEAD, Verdict, page, read_head, verify
from hive.storage.audit_writer import Journal, News
from tests.doubles.fs import Faults, Rule
from tests.patience import wait_until
from tests.storage.recording import SMALL, Kept, actions, cut, facts, texts, written

DEEP = b"[" * 4096  # nests deeper than can be read


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "audit"


# ── what is written ─────────────────────────────────────────────────────────────────────────────


def test_records_are_for_hives_user_alone_and_whole(directory: Path) -> None:
    assert written(directory, 5) == []

    verdict = verify(directory)
    assert (verdict.problem, verdict.records, verdict.first, verdict.last.index) == (None, 5, 0, 4)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in directory.iterdir()} == {0o600}
    assert read_head(directory) == verdict.last
    assert actions(directory) == [f"n{number}" for number in range(5)]


def test_the_next_life_goes_on_with_the_chain(directory: Path) -> None:
    """AUDIT: survives restarts."""
    for _ in range(3):
        assert written(directory, 2) == []

    verdict = verify(directory)
    assert (verdict.problem, verdict.records) == (None, 6)


def test_rotation_keeps_the_chain_over_all_files(directory: Path) -> None:
    assert written(directory, 30, SMALL, keep=100) == []
    assert written(directory, 30, SMALL, keep=100) == []

    names = sorted(texts(directory))
    assert len(names) > 5
    for name in names:
        if found := re.match(r"audit-(\d+)\.jsonl", name):
            first = (directory / name).read_bytes().splitlines(keepends=True)[0]
            assert opened(first)[1].index == int(found[1])
    verdict = verify(directory)
    assert (verdict.problem, verdict.records, verdict.files) == (None, 60, len(names) - 1)


def test_what_hive_removes_it_says_and_what_somebody_removes_is_missed(directory: Path) -> None:
    written(directory, 60, SMALL, keep=3)

    verdict = verify(directory)
    assert verdict.problem is None
    assert verdict.first
    assert verdict.files == 4
    assert "chain.expired" in actions(directory)
    oldest = min(path for path in directory.glob("audit-*"))
    oldest.unlink()
    problem = verify(directory).problem
    assert problem
    assert "missing, and no record says that hive removed them" in problem.what


def test_other_limits_count_from_the_next_record_on(directory: Path) -> None:
    kept = Kept(directory)
    kept.write(40)
    kept.journal.limit(SMALL, 1)
    kept.write(40)
    kept.end()

    assert len(list(directory.glob("audit-*"))) == 1
    assert verify(directory).problem is None


# ── what the next life does about it ────────────────────────────────────────────────────────────


def test_a_torn_last_line_becomes_a_note_and_nothing_else_is_lost(directory: Path) -> None:
    """As SIGKILL leaves it, in the middle of a write."""
    written(directory, 4)
    before = (directory / ACTIVE).read_bytes()
    (directory / ACTIVE).write_bytes(before + b'{"action":"half of a rec')
    assert verify(directory).problem is None
    assert verify(directory).unfinished == 24

    assert written(directory, 1) == []

    assert (directory / ACTIVE).read_bytes().startswith(before)
    assert actions(directory) == ["n0", "n1", "n2", "n3", "chain.torn", "n0"]
    assert page(directory, 2)[1]["detail"]["bytes"] == 24
    assert verify(directory) == Verdict(6, 1, 0, read_head(directory))


def test_a_record_that_was_written_before_its_head_stays(directory: Path) -> None:
    """As SIGKILL leaves it, between the record and the head."""
    written(directory, 2)
    head = (directory / HEAD).read_bytes()
    written(directory, 1)
    (directory / HEAD).write_bytes(head)

    assert written(directory, 1) == []
    assert verify(directory).records == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: _edit(d, ACTIVE, b"n2", b"xx"), "line 3, index 2: the record was changed"),
        (lambda d: cut(d, 3), "line 4, index 3: the end is missing"),
        (lambda d: (d / ACTIVE).unlink(), "line 1, index 0: the end is missing"),
        (lambda d: (d / HEAD).unlink(), "head.json: it is missing"),
        (lambda d: (d / HEAD).write_bytes(b"{}"), "head.json: it was changed"),
        (lambda d: (d / HEAD).write_bytes(DEEP), "head.json: it was changed"),
        (lambda d: cut(d, 3, is_head_cut=True), "head.json: it is missing"),
    ],
)
def test_what_was_changed_is_kept_and_told_and_never_healed(
    directory: Path, change: Callable[[Path], object], words: str
) -> None:
    written(directory, 6)
    change(directory)
    files = texts(directory)
    assert verify(directory).problem

    (news,) = written(directory, 2)

    assert (news.state, news.late, news.lost) == ("damaged", 0, 0)
    assert words in news.reason
    assert "chain.damaged" in actions(directory)
    if ACTIVE in files:  # as it was, under another name or at the beginning of the same
        assert any(text.startswith(files[ACTIVE]) for text in texts(directory).values())
    assert written(directory, 1) == []  # it was told
    assert verify(directory).problem
    last = page(directory, 1)[0]["index"]
    assert read_head(directory).index == last


def test_what_nobody_thought_of_is_told_and_tried_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread does not end by it, and nothing is lost."""
    real, left = audit_writer._begins_with_damage, [1, 2, 3]

    def fails(path: Path) -> bool:
        if left:
            left.pop()
            raise RuntimeError("of a kind that nobody has met")
        return real(path)

    monkeypatch.setattr(audit_writer, "_begins_with_damage", fails)
    news: list[News] = []
    journal = Journal(directory, 10, 10, news.append, retry_s=0.01)
    journal.put(facts(0))
    wait_until(lambda: len(news) == 2, "writing again")
    assert journal.close() == 0

    assert [(one.state, one.reason) for one in news] == [
        ("failing", "RuntimeError"),
        ("writing", "RuntimeError"),
    ]
    assert actions(directory) == ["chain.gap", "n0"]


# ── what would be removed ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"n', b'"m', 1)), "was changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9] + b"0" * 6 + b'"}\n'), "was changed"),
        (lambda path: path.write_bytes(b"".join(_lines(path)[:-1])), "it does not lead to"),
        (lambda path: path.write_bytes(b"".join(_lines(path)[1:])), "it does not lead to"),
        (lambda path: (path.unlink(), path.symlink_to("elsewhere")), "cannot be read"),
    ],
    ids=["begins otherwise", "ends otherwise", "cut at its end", "cut at its beginning", "no file"],
)
def test_an_old_file_that_was_changed_is_never_removed(
    directory: Path, change: Callable[[Path], object], words: str
) -> None:
    """It is told, once, and what is whole goes as always, but for what must lead to it."""
    written(directory, 30, SMALL, keep=100)
    older = sorted(directory.glob("audit-*"))
    change(older[1])
    text = older[1].read_bytes() if older[1].is_file() else None

    kept = Kept(directory, SMALL, keep=3)
    kept.write(20)
    kept.end()

    assert {one.state for one in kept.news} == {"damaged"}
    assert older[1].name in kept.news[0].reason
    assert words in kept.news[0].reason
    of_files = [one.reason.split(":")[0].split(",")[0] for one in kept.news]
    assert len(of_files) == len(set(of_files))
    assert not older[2].exists()
    if text is None:
        assert older[1].is_symlink()
    else:
        assert older[1].read_bytes() == text
        assert actions(directory).count("chain.damaged") == len(of_files)
        assert verify(directory).problem


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_what_was_set_aside_and_the_record_that_tells_so_are_never_removed(
    directory: Path,
) -> None:
    """A flood of records does not push them out, and nobody is called again for it."""
    written(directory, 3)
    _edit(directory, ACTIVE, b"n1", b"xx")
    text = (directory / ACTIVE).read_bytes()
    assert len(written(directory, 1)) == 1

    assert written(directory, 60, SMALL, keep=2) == []

    assert text in texts(directory).values()
    assert any(b'"chain.damaged"' in one for one in texts(directory).values())
    assert len(list(directory.glob("audit-*"))) == 4
    assert verify(directory).problem


def test_a_file_that_cannot_be_removed_is_told_once_and_tried_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log does not fill with attempts, and is whole meanwhile."""
    first, real, tried = "audit-000000000000.jsonl", Path.unlink, []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == first:
            tried.append(path)
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        real(path, missing_ok)

    kept = Kept(directory, SMALL, keep=2)
    monkeypatch.setattr(Path, "unlink", unlink)
    kept.write(60)
    what = f"{first} cannot be removed: {os.strerror(errno.EPERM)}"
    assert len(tried) > 2
    assert kept.news == [News("failing", what)]
    assert verify(directory).problem is None
    assert (directory / first).exists()
    assert len(actions(directory)) <= 60 + len(list(directory.glob("audit-*")))

    monkeypatch.setattr(Path, "unlink", real)
    kept.write(10)
    kept.end()
    assert kept.news[1:] == [News("writing", what)]
    assert verify(directory).problem is None
    assert len(list(directory.glob("audit-*"))) == 2


def test_a_file_that_is_changed_under_hives_hand_is_noticed(directory: Path) -> None:
    kept = Kept(directory)
    kept.write(3)
    with (directory / ACTIVE).open("r+b") as file:
        file.truncate(10)
    kept.write(1)
    kept.end()

    assert [one.state for one in kept.news] == ["damaged"]
    assert verify(directory).problem


def test_a_file_that_is_removed_under_hives_hand_is_noticed(directory: Path) -> None:
    kept = Kept(directory)
    kept.write(3)
    (directory / ACTIVE).unlink()
    kept.write(1)
    kept.end()

    assert [one.state for one in kept.news] == ["damaged"]
    assert actions(directory)[-1] == "n0"


def test_a_file_that_is_moved_away_or_replaced_is_noticed_and_the_chain_goes_on(
    directory: Path,
) -> None:
    kept = Kept(directory)
    kept.write(3)
    (directory / ACTIVE).rename(directory.parent / "moved")
    (directory / ACTIVE).write_bytes((directory.parent / "moved").read_bytes())
    kept.write(1)
    kept.end()

    assert [one.state for one in kept.news] == ["damaged"]
    assert "moved, replaced or removed while hive wrote it" in kept.news[0].reason
    assert actions(directory)[-2:] == ["chain.damaged", "n0"]
    assert verify(directory).problem


def test_a_directory_that_is_removed_while_hive_runs_does_not_verify_as_a_new_one(
    directory: Path,
) -> None:
    kept = Kept(directory)
    kept.write(3)
    shutil.rmtree(directory)
    kept.write(1)
    kept.end()

    assert [one.state for one in kept.news] == ["damaged"]
    assert [one["index"] for one in reversed(page(directory, 10))] == [3, 4]
    assert verify(directory).problem
    again = Kept(directory)
    again.write(1)
    again.end()
    assert verify(directory).problem  # and no later life heals it


def _edit(directory: Path, name: str, old: bytes, new: bytes) -> None:
    path = directory / name
    path.write_bytes(path.read_bytes().replace(old, new))


# ── a disk that fails ───────────────────────────────────────────────────────────────────────────

# Writes a record for each line that it reads, numbered; prints what the journal tells.
WRITER = """
import sys, threading, time
from pathlib import Path
from hive.storage.audit_writer import Journal


def told(news):
    print(news.state, news.reason, news.late, news.lost, sep="|", flush=True)


def look():
    while True:
        kept.look()
        time.sleep(0.01)


kept = Journal(Path(sys.argv[1]), 10, 10, told, retry_s=0.05, stuck_s=float(sys.argv[2]))
threading.Thread(target=look, daemon=True).start()
for line in sys.stdin:
    for _ in range(int(line)):
        kept.put({"action": "n"})
print("left", kept.close(1.0), flush=True)
"""


class Writer:
    """A process that writes, on a disk whose faults are `faults`."""

    def __init__(self, directory: Path, faults: Faults, stuck_s: float = 60.0) -> None:
        self.process = subprocess.Popen(
            [*faults.starter, sys.executable, "-c", WRITER, str(directory), str(stuck_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def put(self, count: int = 1) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()

    def says(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> str:
        """What it says last."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.says()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    return Faults(tmp_path / "faults")


@pytest.fixture
def stuck_s() -> float:
    return 60.0


@pytest.fixture
def writer(directory: Path, faults: Faults, stuck_s: float) -> Iterator[Writer]:
    it = Writer(directory, faults, stuck_s)
    yield it
    it.kill()


def lines_of(directory: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (directory / ACTIVE).read_bytes().count(b"\n")
    return 0


@pytest.mark.parametrize(
    "rule",
    [
        Rule("*/audit.jsonl", "write", errno.ENOSPC),
        Rule("*/audit.jsonl", "sync", errno.EIO),
        Rule("*.head.json", "open", errno.EACCES),
    ],
    ids=["no room", "no sync", "no head"],
)
def test_a_disk_that_takes_nothing_is_told_and_the_gap_is_a_record(
    rule: Rule, directory: Path, faults: Faults, writer: Writer
) -> None:
    writer.put(2)
    wait_until(lambda: lines_of(directory) == 2, "two records")
    with faults.on(rule) as (met,):
        writer.put(1)
        state, reason, *_ = writer.says().split("|")
        assert (state, reason) == ("failing", os.strerror(rule.error))
        wait_until(lambda: met.fired > 1, "another try")
        writer.put(3)

    assert writer.says().split("|")[0] == "writing"
    assert writer.end() == "left 0"
    assert verify(directory).problem is None
    kept = [one for one in actions(directory) if one != "chain.gap"]
    assert kept == ["n"] * 6
    assert actions(directory).count("chain.gap") == 1


def test_a_part_of_a_record_that_was_written_is_taken_back(
    directory: Path, faults: Faults, writer: Writer
) -> None:
    """Half of it fits on the disk, then nothing does."""
    writer.put(1)
    wait_until(lambda: lines_of(directory) == 1, "a record")
    with faults.on(Rule("*/audit.jsonl", "write", most=1, shortened=True)):
        met = faults.add(Rule("*/audit.jsonl", "sync", errno.EIO))
        writer.put(1)
        assert writer.says().startswith("failing|")
        wait_until(lambda: met.fired > 1, "another try")
    assert writer.says().startswith("writing|")
    assert writer.end() == "left 0"

    assert verify(directory).problem is None
    assert actions(directory) == ["n", "chain.gap", "n"]


def test_what_is_too_much_to_hold_is_counted(
    directory: Path, faults: Faults, writer: Writer
) -> None:
    with faults.on(Rule("*/audit.jsonl", "write", errno.EIO)):
        writer.put(1)
        assert writer.says().startswith("failing|")
        writer.put(audit_writer.MOST_HELD + 10)

    assert writer.says() == f"writing|{os.strerror(errno.EIO)}|{audit_writer.MOST_HELD}|11"
    assert writer.end() == "left 0"
    gap = page(directory, 1, 1)[0]
    assert (gap["action"], gap["index"]) == ("chain.gap", 0)
    assert (gap["detail"]["late"], gap["detail"]["lost"]) == (audit_writer.MOST_HELD, 11)
    assert verify(directory).records == audit_writer.MOST_HELD + 1


def test_a_disk_that_never_works_delays_the_end_by_seconds_and_says_how_much_is_missing(
    directory: Path, faults: Faults, writer: Writer
) -> None:
    faults.add(Rule("*/audit.jsonl", "open", errno.EROFS))
    writer.put(3)
    assert writer.says().startswith("failing|")

    assert writer.end() == "left 3"


def test_a_disk_that_hangs_holds_nobody_up(directory: Path, faults: Faults, writer: Writer) -> None:
    writer.put(1)
    wait_until(lambda: lines_of(directory) == 1, "a record")
    with faults.on(Rule("*/audit.jsonl", "sync", delay_s=60)):
        writer.put(1000)  # returns

        assert writer.end() == f"left {1000}"


@pytest.mark.parametrize("stuck_s", [0.2])
def test_a_disk_that_hangs_is_told_and_the_gap_is_a_record(
    directory: Path, faults: Faults, writer: Writer
) -> None:
    writer.put(1)
    wait_until(lambda: lines_of(directory) == 1, "a record")
    with faults.on(Rule("*/audit.jsonl", "sync", delay_s=1.0, most=1)):
        writer.put(1)
        assert writer.says() == f"failing|{audit_writer.HANGS}|0|0"
        writer.put(3)

        assert writer.says() == f"writing|{audit_writer.HANGS}|3|0"
    assert writer.end() == "left 0"
    assert actions(directory) == ["n", "n", "chain.gap", "n", "n", "n"]
    assert verify(directory).problem is None


def test_what_a_flood_loses_is_told_and_counted(
    directory: Path, faults: Faults, writer: Writer
) -> None:
    """Nothing has failed: the disk was only slower than what came."""
    writer.put(1)
    wait_until(lambda: lines_of(directory) == 1, "a record")
    with faults.on(Rule("*/audit.jsonl", "sync", delay_s=2.0, most=1)) as (met,):
        writer.put(1)
        wait_until(lambda: met.fired, "a slow write")
        writer.put(audit_writer.MOST_HELD + 6)
        assert writer.says() == f"failing|{audit_writer.TOO_MANY}|0|0"
        state, reason, _, lost = writer.says().split("|")

    assert (state, reason, lost) == ("writing", audit_writer.TOO_MANY, "7")
    assert writer.end() == "left 0"
    (gap,) = (one for one in page(directory, 20_000) if one["action"] == "chain.gap")
    assert (gap["outcome"], gap["detail"]["lost"]) == (audit_writer.TOO_MANY, 7)
    assert verify(directory).problem is None


def test_killed_at_any_moment_the_chain_goes_on(directory: Path, faults: Faults) -> None:
    """SIGKILL loses at most what was not written yet; verify agrees before and after."""
    before = 0
    for _ in range(4):
        writer = Writer(directory, faults)
        writer.put(3000)
        wait_until(lambda: lines_of(directory) > before + 100, "some records")  # noqa: B023
        writer.kill()
        verdict = verify(directory)
        assert verdict.problem is None
        assert verdict.records > before + 100
        before = verdict.records

    assert written(directory, 1) == []
    assert verify(directory).problem is None


def test_a_head_is_written_as_a_whole(directory: Path) -> None:
    written(directory, 1)
    text = (directory / HEAD).read_text()

    assert json.loads(text) == {"hash": read_head(directory).hash, "index": 0}
    assert Link(0, json.loads(text)["hash"]) > START
    assert sorted(path.name for path in directory.iterdir()) == [ACTIVE, HEAD]

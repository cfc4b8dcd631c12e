"""The audit log's files: whatever somebody does to them is found."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hive.storage import audit
from hive.storage.audit import ACTIVE, MOST_LINE, page, verify
from tests.storage.recording import SMALL, Kept, cut, texts, written


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "audit"


def test_where_nothing_was_recorded_nothing_is_wrong(directory: Path) -> None:
    assert verify(directory) == audit.Verdict()
    assert page(directory, 10) == []


def test_a_page_begins_where_the_last_one_ended(directory: Path) -> None:
    written(directory, 30, SMALL)
    found, before = [], None
    while part := page(directory, 7, before):
        found += [one["index"] for one in part]
        before = found[-1]

    assert found == list(range(29, -1, -1))


def test_a_line_longer_than_any_is_given_up_at_once(directory: Path) -> None:
    written(directory, 3)
    with (directory / ACTIVE).open("ab") as file:
        file.write(b"x" * (MOST_LINE * 20) + b"\n")

    assert page(directory, 10) == []


def test_verify_agrees_while_another_process_writes(directory: Path) -> None:
    """Also while files rotate and are removed."""
    kept = Kept(directory, SMALL, 2)
    seen = []
    for number in range(40):
        kept.write(3, one_by_one=number % 2 == 0)
        verdict = verify(directory)
        assert verdict.problem is None, verdict
        seen.append(verdict.last.index)
    kept.end()

    assert seen == sorted(seen)
    assert verify(directory).last.index >= 119


# ── what somebody changes ───────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A log of several files, as a clean stop leaves it."""
    directory = tmp_path_factory.mktemp("whole") / "audit"
    written(directory, 12, SMALL)
    assert len(list(directory.iterdir())) > 3
    return texts(directory)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, bytes]], Path]:
    directory = tmp_path_factory.mktemp("copy")

    def made(files: dict[str, bytes]) -> Path:
        for path in directory.iterdir():
            path.unlink()
        for name, text in files.items():
            (directory / name).write_bytes(text)
        return directory

    return made


@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_single_change_is_always_found(
    whole: dict[str, bytes], copy: Callable[[dict[str, bytes]], Path], data: st.DataObject
) -> None:
    """A byte that is another, removed or added; a line removed, doubled or moved; a file removed or cut."""
    name = data.draw(st.sampled_from(sorted(whole)))
    text = whole[name]
    lines = text.splitlines(keepends=True)
    at = data.draw(st.integers(0, len(text) - 1))
    number = data.draw(st.integers(0, len(lines) - 1))
    byte = bytes([data.draw(st.integers(0, 255).filter(lambda one: one != text[at]))])
    how = data.draw(
        st.sampled_from(["byte", "cut", "add", "line", "double", "swap", "file", "tail"])
    )
    changed = {
        "byte": text[:at] + byte + text[at + 1 :],
        "cut": text[:at] + text[at + 1 :],
        "add": text[:at] + byte + text[at:],
        "line": b"".join(lines[:number] + lines[number + 1 :]),
        "double": b"".join(lines[: number + 1] + lines[number:]),
        "swap": b"".join(
            [*lines[:number], *lines[number : number + 2][::-1], *lines[number + 2 :]]
        ),
        "file": None,
        "tail": text[:at],
    }[how]
    if changed == text:  # the last line has nothing to be swapped with
        return
    files = {**whole, name: changed} if changed is not None else {**whole}
    if changed is None:
        del files[name]

    verdict = verify(copy({key: value for key, value in files.items() if value is not None}))

    assert verdict.problem, (how, name, at, number)


@pytest.mark.parametrize("number", [0, 4, 11])
def test_the_record_that_was_changed_is_named(
    number: int, whole: dict[str, bytes], copy: Callable[[dict[str, bytes]], Path]
) -> None:
    """AUDIT: tampering is found by its index."""
    action = f'"n{number}"'.encode()
    files = {name: text.replace(action, b'"xx"') for name, text in whole.items()}
    (name,) = (name for name in files if files[name] != whole[name])

    problem = verify(copy(files)).problem
    assert problem
    assert (problem.file, problem.index) == (name, number)
    line = files[name].splitlines()[problem.line - 1]
    assert b'"xx"' in line


def test_a_whole_new_chain_is_found_by_a_hash_that_was_kept_elsewhere(
    directory: Path, tmp_path: Path
) -> None:
    """What verify alone cannot see: who can write everything can write it all anew."""
    written(directory, 5)
    kept = page(directory, 3)[-1]["hash"]
    assert verify(directory, kept).problem is None
    other = tmp_path / "other"
    written(other, 5)

    assert verify(other).problem is None
    problem = verify(other, kept).problem
    assert problem
    assert kept in problem.what


def test_the_record_by_which_hive_told_is_what_verify_names(directory: Path) -> None:
    """A tail and the head are gone: what is left is a chain without a flaw."""
    written(directory, 6)
    cut(directory, 3, is_head_cut=True)
    written(directory, 2)

    problem = verify(directory).problem
    assert problem
    assert (problem.file, problem.line, problem.index) == (ACTIVE, 4, 3)
    assert problem.what == "here hive told of it: head.json: it is missing"

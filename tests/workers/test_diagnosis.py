"""What an engine said before it ended, from log files as they really are."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hive.workers.diagnosis import LINE_CHARS, TAIL_LINES, last_words, log_files, read_tail
from hive.workers.guard import HEADER
from tests.patience import short_directory

START = f"{HEADER}2026-01-01T00:00:00+0000 pid 7\n"


def said(tmp_path: Path, text: str) -> list[str]:
    log = tmp_path / "a.log"
    log.write_text(text)
    return last_words(log)


def test_the_last_lines_are_what_is_quoted(tmp_path: Path) -> None:
    text = START + "".join(f"line {n}\n" for n in range(20))

    assert said(tmp_path, text) == [f"line {n}" for n in range(20 - TAIL_LINES, 20)]


def test_frames_and_blank_lines_are_left_out_and_the_error_stays(tmp_path: Path) -> None:
    text = f"""{START}Traceback (most recent call last):
  File "engine.py", line 1, in load
    raise RuntimeError("CUDA error: an illegal memory access")

RuntimeError: CUDA error: an illegal memory access
"""
    assert said(tmp_path, text) == [
        "Traceback (most recent call last):",
        "RuntimeError: CUDA error: an illegal memory access",
    ]


def test_what_an_earlier_start_said_is_not_this_ones(tmp_path: Path) -> None:
    assert said(tmp_path, f"{START}old error\n{START}new error\n") == ["new error"]
    assert said(tmp_path, f"{START}old error\n{START}") == []


def test_a_long_line_is_cut_and_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_bytes(START.encode() + b"\xff\xfe" + b"x" * 5000 + b"\n")

    assert [len(line) for line in last_words(log)] == [LINE_CHARS]


def test_a_log_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    assert last_words(tmp_path / "gone.log") == []
    assert read_tail(tmp_path) == b""


@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=40),
    st.integers(1, 200),
)
def test_a_tail_is_bounded_and_begins_with_a_whole_line(lines: list[bytes], most: int) -> None:
    with short_directory() as directory:
        log = directory / "a.log"
        log.write_bytes(b"".join(line + b"\n" for line in lines))
        whole, tail = log.read_bytes(), read_tail(log, most)

    assert len(tail) <= most
    assert whole.endswith(tail)
    assert len(tail) == len(whole) or whole[: len(whole) - len(tail)].endswith(b"\n")


def test_the_files_of_a_log_are_told_oldest_first(tmp_path: Path) -> None:
    log = tmp_path / "a-1.log"
    for name in ("a-1.log", "a-1.log.1", "a-1.log.2", "a-1.log.10", "a-11.log", "b.log"):
        (tmp_path / name).touch()

    assert [path.name for path in log_files(log)] == [
        "a-1.log.10",
        "a-1.log.2",
        "a-1.log.1",
        "a-1.log",
    ]
    assert list(log_files(tmp_path / "gone.log")) == []

"""How a worker's log is read, whatever the engine has put there."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hive.errors import HiveError, NotFound, StorageReadFailed
from hive.gateway.admin import (
    HELD_BYTES,
    LOG_BYTES_MOST,
    PIECE_LINES,
    SECRET_BYTES,
    _last_lines,
    _opened,
    _whole_lines,
)


def last_lines(log: Path, lines: int) -> bytes:
    with _opened(log) as file:
        pieces, position = _last_lines(log, file.fileno(), lines)
        assert position == log.stat().st_size
    assert all(piece.count(b"\n") <= PIECE_LINES for piece in pieces)
    return b"".join(pieces)


@pytest.mark.parametrize(
    ("put", "error"),
    [
        (lambda _log: None, NotFound),
        (os.mkfifo, StorageReadFailed),
        (Path.mkdir, StorageReadFailed),
        (lambda log: log.symlink_to("/etc/hosts"), StorageReadFailed),
    ],
)
def test_what_is_no_log_is_neither_read_nor_waited_for(
    tmp_path: Path, put: Callable[[Path], None], error: type[HiveError]
) -> None:
    put(tmp_path / "m-0.log")
    with pytest.raises(error):
        _opened(tmp_path / "m-0.log")


def test_the_last_lines_reach_back_into_older_files(tmp_path: Path) -> None:
    (tmp_path / "m-0.log.2").write_bytes(b"a\nb\n")
    (tmp_path / "m-0.log.1").write_bytes(b"c\nd\n")
    (tmp_path / "m-0.log").write_bytes(b"e\nf\n")

    assert last_lines(tmp_path / "m-0.log", 2) == b"e\nf\n"
    assert last_lines(tmp_path / "m-0.log", 5) == b"b\nc\nd\ne\nf\n"
    assert last_lines(tmp_path / "m-0.log", 50) == b"a\nb\nc\nd\ne\nf\n"
    assert last_lines(tmp_path / "m-0.log", 0) == b""


def test_of_text_without_lines_no_more_is_shown_than_of_lines(tmp_path: Path) -> None:
    for name in ("m-0.log", "m-0.log.1", "m-0.log.2"):
        (tmp_path / name).write_bytes(b"x" * (LOG_BYTES_MOST + 10))
    shown = last_lines(tmp_path / "m-0.log", 1000)

    assert len(shown) == LOG_BYTES_MOST - SECRET_BYTES


def test_of_many_lines_whole_ones_are_shown(tmp_path: Path) -> None:
    line = b"x" * 1023 + b"\n"
    (tmp_path / "m-0.log").write_bytes(line * (LOG_BYTES_MOST // 1024) + line)
    shown = last_lines(tmp_path / "m-0.log", 100_000)

    assert LOG_BYTES_MOST - 2048 < len(shown) <= LOG_BYTES_MOST
    assert set(shown.splitlines(keepends=True)) == {line}


def test_a_followed_line_is_held_until_it_ends_or_is_too_long() -> None:
    assert _whole_lines(b"a\nb\nc") == (b"a\nb\n", b"c")
    assert _whole_lines(b"x" * HELD_BYTES) == (b"", b"x" * HELD_BYTES)
    words = b"word " * (HELD_BYTES // 5) + b"hive_half-a-secret"
    assert _whole_lines(words) == (words[:-18], words[-18:])
    assert _whole_lines(b"x" * (HELD_BYTES + 1)) == (b"x" * (HELD_BYTES + 1), b"")

"""A file of SQLite that is broken is recognised, and kept under another name."""

import contextlib
import sqlite3
from pathlib import Path

import pytest

from hive.storage.damage import COMPANIONS, is_broken, set_aside, what_is_broken


def database(path: Path) -> Path:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (x TEXT)")
        connection.executemany("INSERT INTO t VALUES (?)", [("y" * 500,)] * 100)
        connection.commit()
    return path


def test_nothing_is_wrong_with_a_whole_file_or_with_none(tmp_path: Path) -> None:
    assert what_is_broken(tmp_path / "none.db", 1) == ""
    assert what_is_broken(database(tmp_path / "a.db"), 1) == ""


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_broken_one_is_told(tmp_path: Path, keep: float) -> None:
    file = database(tmp_path / "a.db")
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)] or b"this is no database" * 100)
    assert what_is_broken(file, 1)


def test_what_cannot_be_looked_at_is_not_broken(tmp_path: Path) -> None:
    (tmp_path / "a.db").mkdir()
    with pytest.raises(sqlite3.OperationalError) as caught:
        what_is_broken(tmp_path / "a.db", 0.1)
    assert not is_broken(caught.value)


def test_it_is_set_aside_with_what_belongs_to_it_and_never_over_another(tmp_path: Path) -> None:
    kept = set()
    for number in range(3):
        for name in ("", *COMPANIONS):
            (tmp_path / f"a.db{name}").write_text(f"{number}")
        aside = set_aside(tmp_path / "a.db")
        assert aside.read_text() == str(number)
        assert all(Path(f"{aside}{name}").read_text() == str(number) for name in COMPANIONS)
        kept.add(aside)
    assert len(kept) == 3
    assert not (tmp_path / "a.db").exists()

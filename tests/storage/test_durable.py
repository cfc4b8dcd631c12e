"""What a directory holds is on disk, or it is told; nothing is believed because of a second sync."""

import errno
import os
from pathlib import Path

import pytest

from hive.storage.durable import renewed, synced, touched
from tests.doubles.fs import Rule
from tests.failing import Failed, apart


def test_it_is_open_before_the_change_and_synced_after_it() -> None:
    """Who opens it later does not hear of a write that was lost before."""
    with apart() as disk:
        disk("""
            global synced
            from hive.storage.durable import synced
            (home / "d").mkdir()
            (home / "d" / "a").touch()
        """)
        change = """
            with synced(home / "d"):
                (home / "d" / "a").rename(home / "d" / "b")
                (home / "d" / "b").rename(home / "d" / "a")
        """
        with disk.faults.on(Rule("*/d", "open", errno.EMFILE), Rule("*/d/*", "rename")) as met:
            with pytest.raises(Failed, match="OSError"):
                disk(change)
            assert met[1].seen == 0
            met[0].end()
            disk(change)
            assert met[1].seen == 2
        with disk.faults.on(Rule("*/d", "sync", errno.EIO), Rule("*/d/*", "rename")) as met:
            with pytest.raises(Failed, match="Input/output error"):
                disk(change)
            assert met[1].seen == 2  # it is what was changed that is synced


def test_what_was_removed_is_removed_anew(tmp_path: Path) -> None:
    before = tmp_path.stat().st_mtime_ns
    touched(tmp_path, "gone")
    assert os.listdir(tmp_path) == []
    assert tmp_path.stat().st_mtime_ns > before


def test_every_entry_is_made_anew_under_its_name(tmp_path: Path) -> None:
    """Also where an attempt before was cut off in the middle of one."""
    names = ["000000-0", "000001-0", "manifest.json"]
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / names[1]).rename(tmp_path / f"{names[1]}~")
    renewed(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict(
        zip(names, names, strict=True)
    )


def test_nothing_is_changed_inside_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), synced(tmp_path / "no"):
        pytest.fail("it was begun")

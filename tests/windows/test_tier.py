"""LMCache's tier within its bound: what was not used for longest goes, what is shared or held stays."""

import asyncio
import logging
import os
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.errors import StorageReadFailed, StorageWriteFailed
from hive.windows.tier import LOW, Tier
from tests.patience import awaited, short_directory, until

KIB = 1024


def block(tier: Tier, name: str, used: float, size: int = KIB) -> Path:
    path = tier.directory / name
    path.write_bytes(b"x" * size)
    os.utime(path, (used, used))
    return path


def there(tier: Tier) -> set[str]:
    return {entry.name for entry in os.scandir(tier.directory) if entry.is_file()}


def test_below_its_bound_everything_stays(tmp_path: Path) -> None:
    tier = Tier(tmp_path, 4 * KIB)
    for at in range(4):
        block(tier, f"{at}", at)
    assert tier.clear() == 0
    assert len(there(tier)) == 4


def test_what_was_used_last_stays_when_it_is_cleared(tmp_path: Path) -> None:
    tier = Tier(tmp_path, 4 * KIB)
    for at in (3, 0, 2, 4, 1):
        block(tier, f"{at}", at)
    assert tier.clear() == 2 * KIB  # below 3.6 KiB
    assert there(tier) == {"2", "3", "4"}


def test_reading_counts_as_use(tmp_path: Path) -> None:
    tier = Tier(tmp_path, 2 * KIB)
    for at in range(3):
        block(tier, f"{at}", at)
    os.utime(tmp_path / "0", (100, 0))
    tier.clear()
    assert there(tier) == {"0"}


def test_a_block_that_a_window_links_counts_for_nothing_and_stays(tmp_path: Path) -> None:
    """It would give back no byte."""
    tier = Tier(tmp_path / "kv", 2 * KIB)
    tier.directory.mkdir()
    for at in range(6):
        path = block(tier, f"{at}", at)
        if at < 4:
            (tmp_path / f"linked{at}").hardlink_to(path)
    assert tier.clear() == 0
    (tmp_path / "linked0").unlink()
    assert tier.clear() == 0  # the tier itself has not changed, so it is not looked at …
    tier.look_again()
    assert tier.clear() == 2 * KIB  # … unless somebody says so
    assert there(tier) == {"1", "2", "3", "5"}


def test_what_is_held_stays_until_its_last_holder_lets_go(tmp_path: Path) -> None:
    tier = Tier(tmp_path, 2 * KIB)
    for at in range(4):
        block(tier, f"{at}", at)
    with tier.holding(["0"]):
        with tier.holding(["0", "1", "no such file"]):
            assert tier.clear() == 2 * KIB
            assert there(tier) == {"0", "1"}
        block(tier, "5", 5)
        assert tier.clear() == 2 * KIB  # 1 is held no more, 0 still is
        assert there(tier) == {"0"}
    block(tier, "6", 6, 2 * KIB)
    tier.clear()
    assert there(tier) == set() or there(tier) == {"6"}
    assert "0" not in there(tier)


def test_what_was_held_goes_at_the_next_look(tmp_path: Path) -> None:
    tier = Tier(tmp_path, 2 * KIB)
    for at in range(4):
        block(tier, f"{at}", at)
    with tier.holding([f"{at}" for at in range(4)]):
        assert tier.clear() == 0
    assert tier.clear() == 3 * KIB


def test_the_folder_of_unfinished_files_is_not_touched(tmp_path: Path) -> None:
    tier = Tier(tmp_path, KIB)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "half").write_bytes(b"x" * 9 * KIB)
    (tmp_path / "link").symlink_to(tmp_path / "tmp" / "half")
    assert tier.clear() == 0
    assert (tmp_path / "link").is_symlink()


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    tier = Tier(tmp_path, KIB)
    block(tier, "a", 0)
    assert tier.missing(["a", "b", "c"]) == ["b", "c"]


@awaited
async def test_it_is_looked_at_again_and_again_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hive.windows.tier.LOOK_S", 0.005)
    tier = Tier(tmp_path / "kv", KIB)
    with caplog.at_level(logging.WARNING):
        async with tier.bounded():
            await until(lambda: "cannot be looked at" in caplog.text, "a warning")
            tier.directory.mkdir()
            block(tier, "a", 0, 9 * KIB)
            await until(lambda: not there(tier), "a clear tier")
    assert len(asyncio.all_tasks()) == 1
    assert str(tmp_path) not in caplog.text  # R076


class Made(NamedTuple):
    size: int
    used: int
    is_linked: bool
    is_held: bool


@given(
    st.lists(st.builds(Made, st.integers(0, 50), st.integers(0, 9), st.booleans(), st.booleans())),
    st.integers(1, 300),
)
def test_no_more_goes_than_must_and_nothing_that_may_not(files: list[Made], bound: int) -> None:
    """The law of eviction: the longest unused ones of those that may go, as few as do."""
    with short_directory() as home:
        tier = Tier(home / "kv", bound)
        tier.directory.mkdir()
        for at, one in enumerate(files):
            path = block(tier, f"{at:03d}", one.used, one.size)
            if one.is_linked:
                (home / f"{at}").hardlink_to(path)
        own = [at for at, one in enumerate(files) if not one.is_linked]
        total = sum(files[at].size for at in own)
        with tier.holding(f"{at:03d}" for at, one in enumerate(files) if one.is_held):
            freed = tier.clear()

        kept = {int(name) for name in there(tier)}
        went = [at for at in own if at not in kept]
        assert all(at in kept for at, one in enumerate(files) if one.is_linked or one.is_held)
        assert freed == sum(files[at].size for at in went)
        may_go = sorted(
            (at for at in own if not files[at].is_held), key=lambda at: (files[at].used, at)
        )
        assert went == sorted(may_go[: len(went)])
        if total <= bound:
            assert not went
        else:
            assert total - freed <= bound * LOW or len(went) == len(may_go)
            if went:
                last = may_go[len(went) - 1]
                assert total - freed + files[last].size > bound * LOW


def test_what_cannot_be_looked_at_is_told_as_such_and_never_as_missing(tmp_path: Path) -> None:
    """R102, R127: with the code of a disk, not of a fault of hive's own."""
    tier = Tier(tmp_path, KIB)
    block(tier, "a", 1)
    assert tier.missing(["a", "b"]) == ["b"]
    with pytest.raises(StorageReadFailed, match="File name too long") as told:
        tier.missing(["a", "b" * 300])
    assert told.value.number == "CWM-4002"
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageWriteFailed):
        tier.expel(["a"])
    away = Tier(tmp_path / "away", KIB)
    with pytest.raises(StorageReadFailed, match="The KV tier cannot be read"):
        away.largest("a")
    with pytest.raises(StorageReadFailed, match="The KV tier cannot be read"):
        away.free()
    assert tier.free() > 0

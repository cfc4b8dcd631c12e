"""A window's blocks on the real daemon: written in spite of faults, believed only when checked."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hive.policy.retries import RETRIES
from hive.windows import blocks, work
from steps.driver import Hive
from steps.waiting import must
from tests.windows.daemon import (
    Owner,
    daemon,
    new_name,
    said,
    state_of,
    tier_of,
    told_by,
    turned,
)
from tests.windows.making import CHUNK


@pytest.fixture(scope="module")
def hive() -> Iterator[Hive]:
    with daemon() as it:
        yield it


@pytest.fixture
def ada(hive: Hive) -> Owner:
    return Owner(hive)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_third_of_all_writes_may_fail(hive: Hive, ada: Owner) -> None:
    """C28, R089: what was not written is computed and written again."""
    with turned(hive, fail_every=3):
        session, name = ada.frozen(200)
    assert ada.window(name)["blocks"] >= 12
    assert ada.do("verify", name).json["whole"] is True
    assert ada.state(session) == "FROZEN"
    assert hive.logged("window operation done", operation="freeze", window_name=name)


def test_what_can_never_be_written_leaves_nothing_behind(hive: Hive, ada: Owner) -> None:
    """C28, R089, R107: after eight tries no row, folder, block or state; the session goes on."""
    session, name = ada.session(), new_name()
    with turned(hive, lose_stores=True):
        assert ada.chat(session, said(40)).status == 200
        before, tier = state_of(hive), set(tier_of(hive))
        answer = ada.freeze(session, name)
        assert told_by(answer) == (500, "STORAGE_WRITE_FAILED", "CWM-4001")
        assert answer.error["details"]["retryable"] is True
        assert re.fullmatch(r"3 of 3 blocks were not stored by .*\.", answer.error["message"])
        assert state_of(hive) == before
        assert set(tier_of(hive)) == tier
    tries = [line for line in hive.log if str(line.get("event")).startswith("block_write failed")]
    assert [line["event"].partition(":")[0] for line in tries[-7:]] == [
        f"block_write failed, attempt {at}" for at in range(1, 8)
    ]
    assert all(line["level"] == "warning" for line in tries)  # R102
    assert ada.state(session) == "ACTIVE"
    assert ada.freeze(session, name).status == 201
    assert ada.do("verify", name).json["whole"] is True
    other = ada.session()
    assert ada.chat(other, said(40)).status == 200


def test_there_is_time_for_all_tries_of_a_write() -> None:
    """C28 and C15 together."""
    policy = RETRIES["block_write"]
    pauses = sum(policy.delay_s(at, 0.0) for at in range(1, policy.calls))
    assert policy.calls * blocks.STALL_S + pauses < work.limit_s(1)


@pytest.mark.parametrize("damage", [0, 5])
def test_a_block_that_a_crash_cut_off_is_computed_again(
    hive: Hive, ada: Owner, damage: int
) -> None:
    """C28, C.5: LMCache takes a file for a block, however short it is."""
    before, session, name = set(tier_of(hive)), ada.talk(60), new_name()
    must(lambda: len(set(tier_of(hive)) - before) >= 4, 5, "stored blocks")
    new = sorted(set(tier_of(hive)) - before)
    os.truncate(new[1], damage)
    assert ada.freeze(session, name).status == 201
    sizes = {path.stat().st_size for path in ada.blocks(name)}
    assert (len(sizes), len(ada.blocks(name))) == (1, ada.window(name)["blocks"])
    assert ada.do("verify", name).json["whole"] is True
    assert hive.logged("block_write failed, attempt 1: 1 blocks in the KV tier were not whole.")


def test_a_window_of_one_block_that_was_cut_off_is_no_window(hive: Hive, ada: Owner) -> None:
    """C.5: what is frozen can be used."""
    before, session, name = set(tier_of(hive)), ada.talk(10), new_name()
    must(lambda: len(set(tier_of(hive)) - before) == 1, 5, "a stored block")
    (one,) = set(tier_of(hive)) - before
    os.truncate(one, 5)
    assert ada.freeze(session, name).status == 201
    assert ada.window(name)["blocks"] == 1
    assert ada.window(name)["bytes"] > 5


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("at", [0, 2, -1])
def test_a_damaged_window_is_thawed_up_to_its_first_gap(
    hive: Hive, ada: Owner, damage: str, at: int
) -> None:
    """R103-R105, C27: each block is tried, and what is promised is the prefix."""
    _, name = ada.frozen(100)
    files = ada.blocks(name)
    count, first = len(files), at % len(files)
    theirs = ada.in_tier(name)[at]
    if damage == "flipped":
        flip(files[at])  # LMCache has the same file
    elif damage == "cut":
        os.truncate(files[at], 5)
    else:
        files[at].unlink()
    if damage == "gone":
        assert theirs is not None
        theirs.unlink()
    refused = ada.do("thaw", name, {"require_full": True})
    if at == 0:
        assert told_by(refused) == (500, "STORAGE_CORRUPTED", "CWM-4004")
    elif damage == "gone":
        assert told_by(refused) == (409, "BLOCK_NOT_FOUND", "CWM-2003")
        text = f"Some context data is unavailable: block {files[at].name}."
        assert refused.error["message"] == text
    else:
        assert told_by(refused) == (500, "STORAGE_CORRUPTED", "CWM-4004")  # R092, C25
        text = f"Context data failed its integrity check: block {files[at].name}."
        assert refused.error["message"] == text
    answer = ada.do("thaw", name)
    if at == 0:
        assert told_by(answer) == (500, "STORAGE_CORRUPTED", "CWM-4004")
        return
    receipt = answer.json["receipt"]
    assert answer.status == 200
    assert (receipt["blocks_found"], receipt["blocks_missing"]) == (count - 1, 1)
    assert (receipt["partial"], receipt["usable_tokens"]) == (True, first * CHUNK)
    assert answer.json["warnings"] == ["1 blocks could not be restored"]
    assert hive.logged(f"window {name}: 1 blocks could not be restored")
    assert theirs is not None
    assert not theirs.exists() or theirs.stat().st_nlink > 1


def test_a_window_of_which_nothing_is_left_cannot_be_thawed(ada: Owner) -> None:
    """R092, R104: CWM-4004, not to be tried again."""
    session, name = ada.frozen()
    for path in ada.blocks(name):
        path.unlink()
    answer = ada.do("thaw", name)
    assert told_by(answer) == (500, "STORAGE_CORRUPTED", "CWM-4004")
    assert answer.error["details"]["retryable"] is False
    assert answer.error["message"].startswith("Context data failed its integrity check: none of")
    assert ada.window(name)["receipt"] is None
    assert ada.state(session) == "FROZEN"


def test_what_the_tier_lost_comes_back_from_the_window(hive: Hive, ada: Owner) -> None:
    """R103"""
    _, name = ada.frozen(60)
    for path in ada.in_tier(name):
        assert path is not None
        path.unlink()
    assert ada.window(name)["cache"] == {"files_in_tier": 0}
    answer = ada.do("thaw", name)
    assert answer.json["receipt"]["linked_files"] == ada.window(name)["blocks"]
    assert ada.window(name)["cache"]["files_in_tier"] == ada.window(name)["blocks"]


@pytest.mark.parametrize("tier", ["has it", "has none", "is damaged as well"])
def test_a_damaged_block_is_found_and_had_again(hive: Hive, ada: Owner, tier: str) -> None:
    """R117, R118: from the tier where the same bytes are there, else computed anew."""
    _, name = ada.frozen(80)
    before = [path.read_bytes() for path in ada.blocks(name)]
    one = ada.blocks(name)[2]
    if tier == "is damaged as well":
        flip(one)
        wanted = {"missing": [], "corrupt": [one.name]}
    else:
        theirs = ada.in_tier(name)[2]
        assert theirs is not None
        one.unlink()
        if tier == "has none":
            theirs.unlink()
        wanted = {"missing": [one.name], "corrupt": []}
    found = ada.do("verify", name).json
    assert {key: found[key] for key in wanted} == wanted
    assert (found["whole"], found["blocks_whole"]) == (False, found["blocks"] - 1)

    repaired = ada.do("repair", name)
    assert repaired.status == 200, repaired.body
    told = repaired.json
    assert (told["recovered"], told["recomputed"]) == ((1, 0) if tier == "has it" else (0, 1))
    assert told["whole"] is True
    assert ada.do("verify", name).json["whole"] is True
    assert [path.read_bytes() for path in ada.blocks(name)] == before
    assert {path.name for path in ada.folder(name).iterdir()} == {
        "manifest.json",
        *(path.name for path in ada.blocks(name)),
    }
    thawed = ada.do("thaw", name, {"require_full": True})
    assert thawed.json["receipt"]["partial"] is False


def test_a_clone_of_a_corrupt_window_is_repaired_by_itself(ada: Owner) -> None:
    """They share the damage, not the repair."""
    _, name = ada.frozen(80)
    clone = new_name()
    assert ada.do("clone", name, {"name": clone}).status == 201
    flip(ada.blocks(name)[1])
    for one in (name, clone):
        assert len(ada.do("verify", one).json["corrupt"]) == 1
    assert ada.do("repair", name).json["whole"] is True
    assert len(ada.do("verify", clone).json["corrupt"]) == 1
    assert ada.do("repair", clone).json["whole"] is True
    assert ada.do("verify", name).json["whole"] is True

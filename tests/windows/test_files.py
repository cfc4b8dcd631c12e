"""A window's files, on a real disk: whole or not there, and every damage is found."""

import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from hive.errors import (
    HiveError,
    InsufficientDisk,
    StorageCorrupted,
    StorageReadFailed,
    StorageWriteFailed,
)
from hive.windows.files import MANIFEST, Block, Health, full
from tests.doubles.fs import HANGS_S, Rule
from tests.failing import Apart, Failed, apart
from tests.patience import short_directory, wait_until
from tests.windows.making import SAID, Home, unheard, window


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def links(path: Path) -> int:
    return path.stat().st_nlink


# ── freeze ──────────────────────────────────────────────────────────────────────────────────────


def test_what_is_frozen_is_what_lmcache_wrote_under_another_name(home: Home) -> None:
    """R106: nothing is copied, and the file system counts who has it."""
    manifest, names = home.frozen(window(tags=("a",), description="x"))
    assert home.files.manifest(manifest.id) == manifest
    for at, chunk in enumerate(names):
        for rank, name in enumerate(chunk):
            assert os.path.samefile(home.block(manifest, at, rank), home.tier / name)
            assert links(home.tier / name) == 2
    assert home.files.shared(manifest) == 6
    row = manifest.window()
    assert (row.name, row.tags, row.tokens, row.blocks) == ("w0", ("a",), 53, 3)
    assert (row.bytes, manifest.conversation) == (6 * home.size, SAID)


def test_it_is_for_hives_user_alone(home: Home) -> None:
    """R076: a manifest has token ids and a salt."""
    old = os.umask(0)
    try:
        manifest, _ = home.frozen(window())
    finally:
        os.umask(old)
    folder = home.files.folder(manifest.id)
    modes = {
        path: stat.S_IMODE(path.stat().st_mode)
        for path in (home.files.directory, folder, folder / MANIFEST)
    }
    assert list(modes.values()) == [0o700, 0o700, 0o600]


def test_it_goes_on_when_lmcache_loses_its_own_names(home: Home) -> None:
    manifest, names = home.frozen(window())
    for chunk in names:
        for name in chunk:
            (home.tier / name).unlink()
    assert all(one.is_whole for one in home.files.health(manifest, unheard))
    assert home.files.shared(manifest) == 0


def test_a_block_that_vanishes_while_it_is_linked_is_told_and_may_come_back(home: Home) -> None:
    """C28: the attempt after it finds what the one before has done."""
    one = window()
    tokens = list(range(64))
    names = home.names(tokens, one.salt)
    home.store(names)
    (home.tier / names[2][1]).unlink()
    part = home.files.begin(one.id)
    done: list[int] = []
    with pytest.raises(FileNotFoundError):
        home.files.take(part, names, done.append)
    assert done == [1, 2, 2, 3]  # the others are tried all the same
    home.store(names)
    blocks = home.files.take(part, names, done.append)
    assert done == [1, 2, 2, 3, 1, 2, 3, 4]
    assert {block.size for chunk in blocks for block in chunk} == {home.size}
    assert len(list(part.iterdir())) == 8


def test_what_an_attempt_has_taken_stays_taken(home: Home) -> None:
    """C28: each block has its tries, however many others fail."""
    one = window()
    names = home.names(list(range(64)), one.salt)
    home.store(names[:2] + names[3:])
    part = home.files.begin(one.id)
    taken: dict[int, list[Block]] = {}
    with pytest.raises(FileNotFoundError):
        home.files.take(part, names, unheard, taken)
    assert set(taken) == {0, 1, 3}
    (home.tier / names[0][0]).unlink()  # nobody looks for it again
    home.store([names[2]])
    blocks = home.files.take(part, names, unheard, taken)
    assert [[block.name for block in chunk] for chunk in blocks] == [
        [f"{at:06d}-{rank}" for rank in range(2)] for at in range(4)
    ]


def test_a_full_disk_is_told_with_what_is_needed_and_what_is_free(home: Home) -> None:
    about = os.statvfs(home.tier)
    free = about.f_bavail * about.f_frsize
    told = full(home.tier, 2 * free)
    assert told.details["required_disk_mb"] >= 2 * told.details["available_disk_mb"]
    assert told.public_details["resource_info"]["required_bytes"] == 2 * free
    assert f"{2 * free:,} bytes are needed and " in told.message
    assert told.message.endswith(" too little.")
    assert "too little" not in full(home.tier, 0).message


STEPS = ["a folder", "a block", "blocks", "a manifest", "all"]


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_between_two_steps_leaves_all_or_nothing(home: Home, step: str) -> None:
    """R106, R107: the folder has its name only when everything in it is there."""
    one = window()
    if step == "a folder":
        home.files.begin(one.id)
    else:
        part, manifest, names = home.begun(one)
        if step == "a block":
            for path in sorted(part.iterdir())[1:]:
                path.unlink()
        elif step == "a manifest":
            home.files._write_manifest(part, manifest)
        elif step == "all":
            home.files.finish(part, manifest)
    if step == "all":
        assert home.files.folders() == {one.id}
        assert home.files.manifest(one.id) == manifest
    else:
        assert home.files.folders() == set()
        with pytest.raises(StorageCorrupted):
            home.files.manifest(one.id)
    for _ in range(2):
        home.files.remove(one.id)
    assert home.present() == set()
    if step != "a folder":
        assert all(links(home.tier / name) == 1 for chunk in names for name in chunk)


def test_before_the_first_window_there_is_none(home: Home) -> None:
    assert home.files.folders() == set()
    home.files.remove("0" * 32)
    assert home.present() == set()


def test_a_full_disk_is_told_and_nothing_has_its_name(home: Home) -> None:
    """R102, C25: the system's own error is the cause, and more tries would not help."""
    part, manifest, _ = home.begun(window())
    (part / f"{MANIFEST}.new").symlink_to("/dev/full")
    with pytest.raises(InsufficientDisk, match=r"disk under server\.state_dir is full") as caught:
        home.files.finish(part, manifest)
    assert isinstance(caught.value.__cause__, OSError)
    assert home.files.folders() == set()


LIMITED = """
import resource, sys
from pathlib import Path
from tests.windows.making import Home, window
from hive.errors import StorageWriteFailed

home = Home(Path(sys.argv[1]))
part, manifest, _ = home.begun(window())
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    home.files.finish(part, manifest)
except StorageWriteFailed as exc:
    print(exc.number, exc.message, type(exc.__cause__).__name__)
print(sorted(home.files.folders()))
"""


def test_a_manifest_that_cannot_be_written_whole_is_no_window(tmp_path: Path) -> None:
    """R089, R102: at the limit of a file's size."""
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == [
        "CWM-4001 Failed to save context data: File too large. OSError",
        "[]",
    ]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100


def test_blocks_on_another_file_system_cannot_be_linked(tmp_path: Path) -> None:
    """R089"""
    with short_directory() as other:
        shm = Path("/dev/shm")
        if shm.stat().st_dev == other.stat().st_dev:
            pytest.skip("/dev/shm is on the same file system here")
        elsewhere = Home(other)
        one = window()
        names = elsewhere.names(list(range(16)), one.salt)
        name = f"hive-test-{os.getpid()}"
        (shm / name).write_bytes(b"x")
        try:
            elsewhere.files.tier = shm
            part = elsewhere.files.begin(one.id)
            with pytest.raises(StorageWriteFailed, match="cross-device"):
                elsewhere.files.take(part, [[name]], unheard)
        finally:
            (shm / name).unlink()
        assert names


# ── damage ──────────────────────────────────────────────────────────────────────────────────────


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)  # in place: whoever else links it has the same damage


def no_file(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "x").touch()


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("chunk", [0, 1, 2])
@pytest.mark.parametrize("damage", [cut, emptied, flipped, longer, gone, no_file])
def test_every_damage_of_a_block_is_found_where_it_is(
    home: Home, damage: Callable[[Path], None], chunk: int
) -> None:
    """R092, R103: all blocks are looked at, whatever is wrong with the first."""
    manifest, _ = home.frozen(window())
    damage(home.block(manifest, chunk, 1))
    done: list[int] = []
    found = home.files.health(manifest, done.append)
    name = manifest.blocks[chunk][1].name
    wrong = Health(missing=(name,)) if damage is gone else Health(corrupt=(name,))
    assert found == [wrong if at == chunk else Health() for at in range(3)]
    assert done == [1, 2, 3]


def test_damage_of_lmcaches_own_name_is_damage_of_the_window(home: Home) -> None:
    manifest, names = home.frozen(window())
    flipped(home.tier / names[1][0])
    assert [one.is_whole for one in home.files.health(manifest, unheard)] == [True, False, True]


def test_what_cannot_be_read_is_no_corruption(home: Home) -> None:
    """R090: it may be readable later."""
    manifest, _ = home.frozen(window())
    home.block(manifest, 0).unlink()
    os.mknod(home.block(manifest, 0), stat.S_IFSOCK | 0o600)  # cannot be opened
    with pytest.raises(StorageReadFailed, match="Block 000000-0 cannot be read"):
        home.files.health(manifest, unheard)
    path = home.files.folder(manifest.id) / MANIFEST
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageReadFailed, match="manifest cannot be read"):
        home.files.manifest(manifest.id)


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b"\xff\xfe", b"[" * 5000, b'{"blake3":"","manifest":{}}']
)
def test_a_manifest_that_is_none_is_corruption(home: Home, raw: bytes) -> None:
    """R092"""
    manifest, _ = home.frozen(window())
    (home.files.folder(manifest.id) / MANIFEST).write_bytes(raw)
    with pytest.raises(StorageCorrupted) as caught:
        home.files.manifest(manifest.id)
    assert caught.value.number == "CWM-4004"
    (home.files.folder(manifest.id) / MANIFEST).unlink()
    with pytest.raises(StorageCorrupted, match="is missing"):
        home.files.manifest(manifest.id)


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), is_cut=st.booleans())
def test_no_bit_of_a_manifest_may_change(at: float, bit: int, is_cut: bool) -> None:
    """R092"""
    with short_directory() as directory:
        home = Home(directory)
        manifest, _ = home.frozen(window(), chunks=1)
        path = home.files.folder(manifest.id) / MANIFEST
        raw = bytearray(path.read_bytes())
        place = int(at * len(raw))
        raw[place] ^= 1 << bit
        path.write_bytes(raw[:place] if is_cut else raw)
        with pytest.raises(StorageCorrupted):
            home.files.manifest(manifest.id)


@pytest.mark.parametrize("change", [{"version": 2}, {"version": 0}, {"id": "f" * 32}])
def test_a_manifest_of_another_version_or_window_is_not_used(
    home: Home, change: dict[str, int]
) -> None:
    part, manifest, _ = home.begun(window())
    home.files._write_manifest(part, structs.replace(manifest, **change))
    part.rename(home.files.folder(manifest.id))
    with pytest.raises(StorageCorrupted, match=r"this hive reads version 1"):
        home.files.manifest(manifest.id)


# ── rewrite and clone ───────────────────────────────────────────────────────────────────────────


def test_a_manifest_is_replaced_as_a_whole(home: Home) -> None:
    """R107: what an earlier attempt left beside it does no harm."""
    manifest, _ = home.frozen(window())
    half = home.files.folder(manifest.id) / f"{MANIFEST}.new"
    half.write_bytes(b"{")
    assert home.files.manifest(manifest.id) == manifest
    changed = structs.replace(manifest, description="mended")
    home.files.rewrite(changed)
    assert home.files.manifest(manifest.id) == changed
    assert not half.exists()
    half.symlink_to("/dev/full")
    with pytest.raises(InsufficientDisk):
        home.files.rewrite(manifest)
    assert home.files.manifest(manifest.id) == changed


def test_a_clone_shares_every_byte_and_outlives_what_it_was_made_from(home: Home) -> None:
    """C.5: blocks are counted by who links them."""
    manifest, names = home.frozen(window())
    clone = structs.replace(manifest, id="c" * 32, name="c", parent_id=manifest.id)
    home.files.clone(manifest, clone)
    assert home.files.manifest(clone.id) == clone
    assert links(home.tier / names[0][0]) == 3
    for chunk in names:
        for name in chunk:
            (home.tier / name).unlink()
    home.files.remove(manifest.id)
    assert home.files.folders() == {clone.id}
    assert all(one.is_whole for one in home.files.health(clone, unheard))
    assert links(home.block(clone, 0)) == 1
    home.files.remove(clone.id)
    assert home.present() == set()


def test_a_clone_of_a_damaged_window_is_as_damaged(home: Home) -> None:
    manifest, _ = home.frozen(window())
    gone(home.block(manifest, 1))
    clone = structs.replace(manifest, id="c" * 32)
    home.files.clone(manifest, clone)
    assert home.files.health(clone, unheard) == home.files.health(manifest, unheard)


def test_a_clone_that_fails_leaves_nothing(home: Home) -> None:
    """R107"""
    manifest, names = home.frozen(window())
    home.files.remove(manifest.id)
    source = home.files.folder(manifest.id)
    source.mkdir()
    for chunk in manifest.blocks:
        (source / chunk[0].name).mkdir()  # what cannot be linked
    with pytest.raises(HiveError) as caught:
        home.files.clone(manifest, structs.replace(manifest, id="c" * 32))
    assert caught.value.number == "CWM-4001"
    assert home.present() == {manifest.id}
    assert links(home.tier / names[0][0]) == 1


# ── thaw and repair ─────────────────────────────────────────────────────────────────────────────


def test_what_the_tier_lost_it_has_again_under_its_own_name(home: Home) -> None:
    manifest, names = home.frozen(window())
    assert home.files.give_back(manifest, 0, names[0]) == 0
    (home.tier / names[0][0]).unlink()
    (home.tier / names[0][1]).unlink()
    (home.tier / names[0][1]).write_bytes(b"nobody checked this")
    assert home.files.give_back(manifest, 0, names[0]) == 2
    for rank, name in enumerate(names[0]):
        assert os.path.samefile(home.tier / name, home.block(manifest, 0, rank))
        assert links(home.tier / name) == 2
    inside = {path.name for path in home.files.folder(manifest.id).iterdir()}
    assert inside == {MANIFEST, *(block.name for chunk in manifest.blocks for block in chunk)}


def test_a_corrupt_block_leaves_the_window_and_the_tier_that_shares_it(home: Home) -> None:
    """LMCache checks nothing that it reads."""
    manifest, names = home.frozen(window())
    flipped(home.block(manifest, 0, 0))
    (home.tier / names[0][1]).unlink()
    (home.tier / names[0][1]).write_bytes(b"another file")
    flipped(home.block(manifest, 0, 1))
    health = home.files.health(manifest, unheard)
    home.files.expel(manifest, health)
    home.files.drop(manifest, health[0])
    assert not (home.tier / names[0][0]).exists()
    assert (home.tier / names[0][1]).read_bytes() == b"another file"
    assert home.files.health(manifest, unheard)[0] == Health(
        missing=tuple(block.name for block in manifest.blocks[0])
    )
    assert home.files.health(manifest, unheard)[1:] == [Health(), Health()]


@pytest.mark.parametrize("as_it_was", [True, False])
@pytest.mark.parametrize("tier", ["the same", "another", "nothing"])
def test_a_lost_block_is_had_again_from_the_tier(home: Home, tier: str, as_it_was: bool) -> None:
    """R118: only the very same bytes are recovered; others are computed anew."""
    manifest, names = home.frozen(window())
    for rank, name in enumerate(names[1]):
        gone(home.block(manifest, 1, rank))
        if tier != "the same":
            (home.tier / name).unlink()
        if tier == "another":
            (home.tier / name).write_bytes(b"other numbers")
    found = home.files.take_again(manifest, 1, names[1], as_it_was=as_it_was)
    if tier == "the same":
        assert found == manifest.blocks[1]
    elif tier == "another" and not as_it_was:
        assert found is not None
        assert {block.size for block in found} == {13}
    else:
        assert found is None
    is_there = home.block(manifest, 1).exists()
    assert is_there == (found is not None)


def test_nothing_else_stays_in_the_folder_where_one_part_of_a_chunk_was_lost(home: Home) -> None:
    """R107: with tensor parallelism the other parts of the chunk are there still."""
    manifest, names = home.frozen(window())
    gone(home.block(manifest, 1, 1))
    assert home.files.take_again(manifest, 1, names[1], as_it_was=True) == manifest.blocks[1]
    inside = {path.name for path in home.files.folder(manifest.id).iterdir()}
    assert inside == {MANIFEST, *(block.name for chunk in manifest.blocks for block in chunk)}
    assert links(home.tier / names[1][0]) == 2


def test_a_block_from_elsewhere_is_written_once_and_for_hives_user_alone(home: Home) -> None:
    """R107: whatever is there already is not written to, be it a link that leads out."""
    part = home.files.begin(window().id)
    home.files.put(part, "000000-0", iter([b"one", b"two"]))
    assert (part / "000000-0").read_bytes() == b"onetwo"
    assert (part / "000000-0").stat().st_mode & 0o777 == 0o600
    victim = home.tier / "victim"
    (part / "000001-0").symlink_to(victim)
    for name in ("000000-0", "000001-0"):
        with pytest.raises(StorageWriteFailed):
            home.files.put(part, name, iter([b"three"]))
    assert (part / "000000-0").read_bytes() == b"onetwo"
    assert not victim.exists()


# ── a sync that failed, and a file that is another one by now ───────────────────────────────────


@pytest.fixture(scope="module")
def failing() -> Iterator[Apart]:
    """One process whose disk fails, for all of these."""
    with apart() as it:
        it("""
            global Home, window, unheard, structs, it
            from msgspec import structs
            from tests.windows.making import Home, unheard, window
            it = Home(home)
        """)
        yield it


@pytest.mark.parametrize("place", ["windows", "windows/*.part"])
def test_what_a_failed_sync_may_have_lost_is_made_anew(failing: Apart, place: str) -> None:
    """R089: the kernel tells of a lost write only once, so that a second sync proves nothing."""
    number = len(place)
    failing(f"global part, manifest; part, manifest, _ = it.begun(window({number}))")
    finish = "return str(it.files.finish(part, manifest))"
    name = {"windows": "*/windows/*.part", "windows/*.part": "*/windows/*.part/0*"}[place]
    # What is only counted, and what fails once.
    with failing.faults.on(
        Rule(name, "rename"), Rule("*/manifest.json.new", "write"), Rule(f"*/{place}", "sync")
    ) as (renames, writes, syncs):
        failing.faults.add(Rule(f"*/{place}", "sync", errno.EIO, most=1))
        with pytest.raises(Failed, match="StorageWriteFailed"):
            failing(finish)
        before = renames.seen, writes.seen, syncs.seen
        folder = Path(failing(finish))
        entries = 1 if place == "windows" else 6
        # There and back again, each of them, before it is synced.
        assert renames.seen >= before[0] + 2 * entries
        assert writes.seen == 2 * before[1]
        assert syncs.seen == before[2] + 1
    assert max(path.name for path in folder.iterdir()) == MANIFEST
    assert failing("return all(one.is_whole for one in it.files.health(manifest, unheard))")


def test_a_removal_whose_sync_has_failed_is_made_anew(failing: Apart) -> None:
    """R089: else the folder may be there again after a power cut, and its row is gone."""
    number = 40
    failing(f"it.frozen(window({number}))")
    remove = f"it.files.remove(window({number}).id)"
    directory = failing.home / "windows"
    with failing.faults.on(Rule("*/windows", "sync", errno.EIO, most=1)):
        with pytest.raises(Failed, match="StorageWriteFailed"):
            failing(remove)
        names, before = sorted(os.listdir(directory)), directory.stat().st_mtime_ns
        failing(remove)
    assert directory.stat().st_mtime_ns > before
    assert sorted(os.listdir(directory)) == names
    before = directory.stat().st_mtime_ns
    failing(remove)
    assert directory.stat().st_mtime_ns == before  # nothing was in doubt any more


def test_a_repair_whose_sync_has_failed_makes_its_folder_anew(failing: Apart) -> None:
    """R089, R118"""
    failing("""
        global manifest, names
        manifest, names = it.frozen(window(50))
        it.block(manifest, 1).unlink()
    """)
    again = "it.files.take_again(manifest, 1, names[1], as_it_was=True)"
    folder = f"*/windows/{window(50).id}"
    with failing.faults.on(Rule(f"{folder}/0*", "rename")) as (renames,):
        failing.faults.add(Rule(folder, "sync", errno.EIO, most=1))
        with pytest.raises(Failed, match="StorageWriteFailed"):
            failing(again)
        before = renames.seen
        failing(again)
        assert renames.seen >= before + 2 * 6
    assert failing("return all(one.is_whole for one in it.files.health(manifest, unheard))")


@pytest.mark.parametrize(("call", "number"), [("open", 60), ("sync", 61)])
def test_what_is_taken_again_is_what_was_compared(failing: Apart, call: str, number: int) -> None:
    """R118: LMCache, or who clears its tier, may have another file of that name a moment later."""
    failing(f"""
        global manifest, names
        manifest, names = it.frozen(window({number}))
        it.block(manifest, 1).unlink()
    """)
    (name,) = failing("return names[1][:1]")
    with failing.faults.on(Rule("*", call, delay_s=HANGS_S, most=1)) as (hangs,):
        failing.begin("return bool(it.files.take_again(manifest, 1, names[1], as_it_was=True))")
        wait_until(lambda: hangs.fired, "it is about to be compared")
        other = failing.home / "kv" / "other"
        other.write_bytes(b"what nobody has compared")
        other.rename(failing.home / "kv" / name)
    assert failing.end() is True
    assert failing("return all(one.is_whole for one in it.files.health(manifest, unheard))")

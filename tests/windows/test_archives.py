"""Archives: whole, for hive's user alone, and believed in nothing when they are read."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import blake3
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from hive.errors import (
    HiveError,
    PayloadTooLarge,
    StorageCorrupted,
    StorageReadFailed,
)
from hive.windows import archives
from hive.windows.archives import Found
from hive.windows.files import Block, Manifest, sealed
from tests.patience import short_directory
from tests.windows.making import SAID, Home, unheard, window

CAN_MOUNT = (
    os.geteuid() == 0
    and subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode == 0
)


class Shelf:
    """A window, a directory of backups, and where one is unpacked."""

    def __init__(self, top: Path, size: int = 3000) -> None:
        self.home = Home(top, size=size)
        self.directory = top / "backups"
        self.directory.mkdir(mode=0o700)
        self.manifest, _ = self.home.frozen(window(1, salt="salt-of-the-session"))
        self.folder = self.home.files.folder(self.manifest.id)

    def write(self, told: Callable[[int], None] = unheard) -> Found:
        return archives.write(self.directory, self.folder, self.manifest, told)

    def content(self) -> dict[str, bytes]:
        return {
            b.name: (self.folder / b.name).read_bytes() for c in self.manifest.blocks for b in c
        }

    def there(self) -> list[str]:
        return sorted(os.listdir(self.directory))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def unpacked(found: Found) -> dict[str, bytes]:
    got: dict[str, bytes] = {}

    def put(name: str, content: Iterator[bytes]) -> None:
        assert name not in got
        got[name] = b"".join(content)

    archives.unpack(found, put, unheard)
    return got


# ── what is written ─────────────────────────────────────────────────────────────────────────────


def test_what_is_read_is_what_was_written(shelf: Shelf) -> None:
    """R124, R125"""
    heard: list[int] = []
    found = shelf.write(heard.append)
    assert archives.listed(shelf.directory) == ([found], [])
    assert archives.manifest_of(found) == shelf.manifest
    assert unpacked(found) == shelf.content()
    assert sorted(set(heard)) == [0, 1, 2, 3]
    header = found.header
    assert (header.name, header.owner, header.model) == ("w1", "ada", "m")
    assert (header.tokens, header.blocks, header.bytes) == (53, 3, 18000)
    assert header.size == found.path.stat().st_size
    assert header.frozen_at == 1001.0


def test_it_is_for_hives_user_alone_and_what_is_listed_tells_no_secret(shelf: Shelf) -> None:
    """R076: the salt protects a session; the header is all that a list reads."""
    path = shelf.write().path
    assert path.stat().st_mode & 0o777 == 0o600
    whole = path.read_bytes()
    header = whole[: 8 + int.from_bytes(whole[4:8], "little")]
    assert b"salt" not in header
    assert "häng".encode() not in header
    assert b"tokens" in header
    path.write_bytes(header)  # nothing behind it is needed for a list
    (found,), _ = archives.listed(shelf.directory)
    assert (found.header.name, found.is_whole) == ("w1", False)


def test_other_tools_can_read_it(shelf: Shelf) -> None:
    """An operator without hive: zstd -dc FILE | tar -x"""
    path = shelf.write().path
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        plain = io.BytesIO(reader.read())
    with tarfile.open(fileobj=plain, mode="r:") as tar:
        content = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    assert list(content) == ["manifest.json", *shelf.content()]
    assert content.pop("manifest.json") == sealed(shelf.manifest)
    assert content == shelf.content()


def test_of_one_window_no_two_have_the_same_timestamp(shelf: Shelf) -> None:
    made = [shelf.write().header.timestamp for _ in range(20)]
    assert made == sorted(set(made))
    assert all(map(archives.TIMESTAMP.match, made))
    found, _ = archives.listed(shelf.directory)
    assert sorted(one.header.timestamp for one in found) == made


def test_a_name_that_is_taken_or_about_to_be_is_nobody_elses(tmp_path: Path) -> None:
    final = tmp_path / "w,o,t.tar.zst"
    claim = archives._Claim(final, "t")
    with pytest.raises(FileExistsError):
        archives._Claim(final, "t")
    claim.commit()
    claim.undo()
    with pytest.raises(FileExistsError):
        archives._Claim(final, "t")
    assert os.listdir(tmp_path) == [final.name]


WORD = st.text(max_size=12)
STAMP = st.from_regex(archives.TIMESTAMP, fullmatch=True, alphabet=st.characters(codec="ascii"))


@given(a=st.tuples(WORD, WORD, STAMP), b=st.tuples(WORD, WORD, STAMP))
def test_names_of_files_neither_collide_nor_lead_elsewhere(
    a: tuple[str, str, str], b: tuple[str, str, str]
) -> None:
    names = [archives.file_name(*one) for one in (a, b)]
    assert (names[0] == names[1]) == (a == b)
    for name in names:
        assert not set(name) & set("/\0\n ")
        assert (Path("/b") / name).parent == Path("/b")
        assert name.endswith(".tar.zst")


def test_a_window_without_blocks_has_a_backup(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.manifest, _ = shelf.home.frozen(window(2), chunks=0)
    shelf.folder = shelf.home.files.folder(shelf.manifest.id)
    found = shelf.write()
    assert (unpacked(found), found.header.blocks) == ({}, 0)


# ── what is not written ─────────────────────────────────────────────────────────────────────────


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": _flip,
    "missing": lambda path: path.unlink(),
    "shorter": lambda path: os.truncate(path, 10),
    "longer": lambda path: os.truncate(path, 10_000),
    "a directory": _make_directory,
    "a link": _make_link,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_window_is_not_backed_up(shelf: Shelf, damage: str) -> None:
    """R092: the block is named, and nothing is left of the backup."""
    DAMAGE[damage](shelf.folder / "000001-1")
    with pytest.raises(StorageCorrupted, match="block 000001-1 ") as caught:
        shelf.write()
    assert "hive window repair" in caught.value.suggested_action
    assert shelf.there() == []


def test_who_stops_it_leaves_nothing(shelf: Shelf) -> None:
    """R107"""

    class Stopped(Exception):
        pass

    for last in (0, 2, 3):

        def told(done: int, last: int = last) -> None:
            if done >= last:
                raise Stopped

        with pytest.raises(Stopped):
            shelf.write(told)
        assert shelf.there() == []


def test_a_manifest_too_large_to_be_read_again_is_not_written(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MOST_MANIFEST", 1000)
    with pytest.raises(PayloadTooLarge, match="at most 1000"):
        shelf.write()
    assert shelf.there() == []


FILLING = """
import os, sys
from pathlib import Path
from hive.errors import HiveError
from hive.windows import archives
from tests.windows.test_archives import Shelf

top, how = Path(sys.argv[1]), sys.argv[2]
shelf = Shelf(top)
shelf.directory = top / "disk"
for name in shelf.content():  # what does not shrink
    (shelf.folder / name).unlink()
blocks = shelf.manifest.blocks
shelf.home.store = lambda names: [
    (shelf.home.tier / name).write_bytes(os.urandom(200_000)) for chunk in names for name in chunk
]
from tests.windows.making import window
shelf.manifest, _ = shelf.home.frozen(window(7))
shelf.folder = shelf.home.files.folder(shelf.manifest.id)

def fill(done):
    if how != "meanwhile" or done < 1:
        return
    try:  # somebody else needs the rest of the disk
        with open(shelf.directory / "theirs", "ab", 0) as file:
            while file.write(bytes(65536)):
                pass
    except OSError:
        pass

try:
    shelf.write(fill)
except HiveError as exc:
    print(exc.code, exc.message, type(exc.__cause__).__name__)
print([name for name in shelf.there() if name != "theirs"])
"""


@pytest.mark.skipif(not CAN_MOUNT, reason="needs mount namespaces")
@pytest.mark.parametrize(
    ("options", "how", "said"),
    [
        (
            "size=60m",
            "",
            r"The disk under windows\.backup_dir has 60 MiB free, and 65 MiB .* NoneT",
        ),
        ("size=66m", "meanwhile", r"The disk under windows\.backup_dir is full\. OSError"),
        ("size=90m,nr_inodes=1", "", r"The disk under windows\.backup_dir is full\. OSError"),
    ],
)
def test_a_full_disk_is_told_and_nothing_is_left(options: str, how: str, said: str) -> None:
    """R102, C25: before it begins where that can be known, and on the way."""
    with short_directory() as top:
        (top / "disk").mkdir()
        script = f'mount -t tmpfs -o mode=700,{options} tmpfs {top}/disk && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", script, "sh"]
        command += [sys.executable, "-c", FILLING, str(top), how]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    told, left = ran.stdout.splitlines() or [ran.stderr, ""]
    assert re.match(f"INSUFFICIENT_DISK {said}", told), told
    assert left == "[]"


def test_a_directory_that_is_gone_is_told(shelf: Shelf) -> None:
    """An operator who unmounted it finds out why."""
    shelf.directory.rmdir()
    with pytest.raises(HiveError, match="could not be written: No such file") as caught:
        shelf.write()
    assert caught.value.code == "STORAGE_WRITE_FAILED"
    assert "windows.backup_dir" in caught.value.suggested_action
    with pytest.raises(StorageReadFailed, match="could not be read: No such file"):
        archives.listed(shelf.directory)


# ── what an earlier life left ───────────────────────────────────────────────────────────────────

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.windows.test_archives import Shelf

Shelf(Path(sys.argv[1])).write(lambda done: done == 2 and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_what_was_killed_is_tidied_and_what_is_being_written_is_left(tmp_path: Path) -> None:
    """R107"""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, check=False, timeout=60).returncode == -9
    directory = tmp_path / "backups"
    (killed,) = os.listdir(directory)
    assert killed.endswith(".tar.zst.part")
    assert archives.listed(directory) == ([], [])
    whole = directory / "w,o,1.tar.zst"
    whole.write_bytes(b"somebody's")
    other = archives._Claim(directory / "w,o,2.tar.zst", "2")
    (directory / "odd.tar.zst.part").mkdir()
    try:
        lines = archives.tidied(directory)
    finally:
        left = sorted(os.listdir(directory))
        other.undo()
    assert lines[0].startswith("the backup odd.tar.zst.part was not finished, and cannot be remo")
    assert lines[1:] == [f"the backup {killed} was not finished: removed"]
    assert left == sorted(["odd.tar.zst.part", whole.name, other.part.name])


# ── what is damaged ─────────────────────────────────────────────────────────────────────────────


def restored(found: Found, home: Home) -> None:
    """As a restore does it, with what is undone when it fails."""
    again = structs.replace(archives.manifest_of(found), id="f" * 32)
    try:
        part = home.files.begin(again.id)
        archives.unpack(found, lambda name, it: home.files.put(part, name, it), unheard)
        home.files.finish(part, again)
    except BaseException:
        home.files.remove(again.id)
        raise


def looked_at_and_restored(path: Path, home: Home) -> None:
    restored(archives.looked_at(path), home)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shelf, bytes]:
    """A backup, for tests that damage copies of it."""
    shelf = Shelf(tmp_path_factory.mktemp("kept"), size=1500)
    return shelf, shelf.write().path.read_bytes()


def _position(draw: st.DrawFn, whole: bytes) -> int:
    return draw(st.integers(0, len(whole) - 1))


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The same file after a bad disk, a bad copy, or somebody with bad intentions."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = _position(draw, whole)
        what = draw(st.sampled_from(["flip", "cut", "insert", "remove", "zero", "repeat", "add"]))
        if what == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif what == "remove":
            del data[at : at + draw(st.integers(1, 600))]
        elif what == "zero":
            size = draw(st.integers(1, 600))
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif what == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 600))]
        elif what == "add":
            data += draw(st.binary(min_size=1, max_size=20))
    return bytes(data)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_happens_to_a_file_never_becomes_a_window(
    kept: tuple[Shelf, bytes], data: st.DataObject
) -> None:
    """R092, R104: and leaves nothing."""
    shelf, whole = kept
    now = data.draw(damaged(whole))
    path = shelf.directory / "copy.tar.zst"
    path.write_bytes(now)
    before = shelf.home.present()
    if now == whole:
        return
    with pytest.raises(StorageCorrupted, match=r"^The backup is damaged: "):
        looked_at_and_restored(path, shelf.home)
    assert shelf.home.present() == before


def test_cut_off_anywhere_it_is_no_window(kept: tuple[Shelf, bytes]) -> None:
    """R092"""
    shelf, whole = kept
    path = shelf.directory / "copy.tar.zst"
    header = 8 + int.from_bytes(whole[4:8], "little")
    before = shelf.home.present()
    for length in {*range(0, len(whole), 37), 7, 8, header - 1, header, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(StorageCorrupted) as caught:
            looked_at_and_restored(path, shelf.home)
        if length >= header:
            assert f"it has {length} of {len(whole)} bytes" in caught.value.message
    assert shelf.home.present() == before


def test_the_damaged_block_is_named(shelf: Shelf) -> None:
    """R092: also where zstd itself cannot go on; every member has a frame of its own."""
    found = shelf.write()
    whole = found.path.read_bytes()
    frames = [one.start() for one in re.finditer(rb"\x28\xb5\x2f\xfd", whole)]
    assert len(frames) == 1 + 6 + 1
    for begin, name in zip(frames[1:-1], shelf.content(), strict=True):
        for offset in (5, 12, 40):
            data = bytearray(whole)
            data[begin + offset] ^= 4
            found.path.write_bytes(data)
            with pytest.raises(
                StorageCorrupted, match=f"block {name} |where block {name} "
            ) as told:
                restored(found, shelf.home)
            assert "hive backup list" in told.value.suggested_action
    assert shelf.home.present() == {shelf.manifest.id}


def test_a_block_of_other_bytes_is_named_whatever_else_fits(shelf: Shelf) -> None:
    """R092: its own checksum is the only one that tells."""
    path = forged(shelf, shelf.manifest, TARS["other bytes"])
    with pytest.raises(StorageCorrupted, match="block 000001-0 does not fit its checksum"):
        looked_at_and_restored(path, shelf.home)
    assert shelf.home.present() == {shelf.manifest.id}


# ── what somebody made up ───────────────────────────────────────────────────────────────────────

Members = list[tuple[tarfile.TarInfo, bytes]]


def member(name: str, content: bytes = b"", **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o600
    for key, value in facts.items():
        setattr(info, key, value)
    return info, content


def forged(
    shelf: Shelf,
    manifest: Manifest,
    change: Callable[[Members], Members] = lambda members: members,
    *,
    window_log: int = 19,
    header: dict[str, Any] | None = None,
) -> Path:
    """A file whose every checksum is right."""
    raw = sealed(manifest)
    content = [
        member(block.name, (shelf.folder / f"{at:06d}-{rank}").read_bytes())
        for at, chunk in enumerate(manifest.blocks)
        for rank, block in enumerate(chunk)
    ]
    tar = b""
    for info, data in change([member("manifest.json", raw), *content]):
        tar += info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)
    level = zstandard.ZstdCompressionParameters(compression_level=1, window_log=window_log)
    frame = zstandard.ZstdCompressor(compression_params=level).compressobj()
    body = frame.compress(tar + bytes(1024)) + frame.flush()
    digest = blake3.blake3(body).hexdigest()
    told = archives._described(manifest, raw, "2026-01-01T00:00:00.000000Z", 10**18, digest)
    length = len(archives._framed(told))
    told = structs.replace(told, **{"size": length + len(body), **(header or {})})
    path = shelf.directory / "forged.tar.zst"
    path.write_bytes(archives._framed(told, length) + body)
    return path


def test_what_is_forged_here_would_be_taken_if_nothing_were_wrong_with_it(shelf: Shelf) -> None:
    looked_at_and_restored(forged(shelf, shelf.manifest), shelf.home)
    assert shelf.home.present() == {shelf.manifest.id, "f" * 32}


EVIL_NAMES = ["../evil", "/tmp/evil", "a/b", "..", ".", "", "000000-0/x", "manifest.json", "x\0y"]


def _renamed(manifest: Manifest, name: str) -> Manifest:
    blocks = [list(chunk) for chunk in manifest.blocks]
    blocks[1][0] = Block(name, blocks[1][0].size, blocks[1][0].blake3)
    return structs.replace(manifest, blocks=blocks)


def _resized(manifest: Manifest, size: int) -> Manifest:
    blocks = [list(chunk) for chunk in manifest.blocks]
    blocks[1][0] = Block(blocks[1][0].name, size, blocks[1][0].blake3)
    return structs.replace(manifest, blocks=blocks)


MANIFESTS: dict[str, Callable[[Manifest], Manifest]] = {
    **{f"named {name!r}": partial(_renamed, name=name) for name in EVIL_NAMES},
    "named twice": lambda m: _renamed(m, "000000-0"),
    "smaller": lambda m: _resized(m, 10),
    "larger": lambda m: _resized(m, 2**40),
    "less than nothing": lambda m: _resized(m, -512),
    "fewer blocks": lambda m: structs.replace(m, blocks=m.blocks[:2]),
    "fewer of a chunk": lambda m: structs.replace(m, blocks=[*m.blocks[:2], m.blocks[2][:1]]),
    "fewer hashes": lambda m: structs.replace(m, hashes=m.hashes[:2]),
    "no hashes": lambda m: structs.replace(m, hashes=["../x"] * 3),
    "fewer tokens": lambda m: structs.replace(m, tokens=m.tokens[:16]),
    "a salt that leads elsewhere": lambda m: structs.replace(m, salt="../../x"),
    "no salt": lambda m: structs.replace(m, salt=""),
    "another version": lambda m: structs.replace(m, version=2),
    "an id that leads elsewhere": lambda m: structs.replace(m, id="../../x"),
    "no identity": lambda m: structs.replace(m, identity={}),
    "more of an identity": lambda m: structs.replace(m, identity={**m.identity, "more": 1}),
    "an identity of another kind": lambda m: structs.replace(
        m, identity={**m.identity, "chunk_tokens": "many"}
    ),
    "chunks of no tokens": lambda m: structs.replace(m, identity={**m.identity, "chunk_tokens": 0}),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_from_elsewhere_is_believed_in_nothing(shelf: Shelf, what: str) -> None:
    """R081: names in it become paths."""
    outside = sorted(os.listdir(shelf.directory.parent))
    path = forged(shelf, MANIFESTS[what](shelf.manifest))
    with pytest.raises(StorageCorrupted, match=r"^The backup is damaged: "):
        looked_at_and_restored(path, shelf.home)
    assert shelf.home.present() == {shelf.manifest.id}
    assert sorted(os.listdir(shelf.directory.parent)) == outside


def _typed(kind: bytes, **facts: Any) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        info, content = members[3]
        data = content if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE) else b""
        one = member(info.name, data, **{"type": kind, **facts})
        return [*members[:3], one, *members[4:]]

    return change


def _swapped(members: Members) -> Members:
    return [*members[:2], members[3], members[2], *members[4:]]


TARS: dict[str, Callable[[Members], Members]] = {
    "a link elsewhere": _typed(tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": _typed(tarfile.LNKTYPE, linkname="../../../catalogue.db"),
    "a device": _typed(tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a pipe": _typed(tarfile.FIFOTYPE),
    "a directory": _typed(tarfile.DIRTYPE),
    "a long name": _typed(tarfile.GNUTYPE_LONGNAME),
    "more of a header": _typed(tarfile.XHDTYPE),
    "other bytes": lambda m: [*m[:3], member(m[3][0].name, bytes(len(m[3][1]))), *m[4:]],
    "another name": lambda m: [*m[:3], member("../evil", m[3][1]), *m[4:]],
    "the same again": lambda m: [*m, m[-1]],
    "one more": lambda m: [*m, member("evil", b"x")],
    "one more in between": lambda m: [*m[:3], member("evil", b"x"), *m[3:]],
    "one less": lambda m: m[:-1],
    "in another order": _swapped,
    "no manifest": lambda m: m[1:],
    "the manifest last": lambda m: [*m[1:], m[0]],
    "two manifests": lambda m: [m[0], *m],
    "nothing": lambda _: [],
    "for everybody": lambda m: [*m[:3], member(m[3][0].name, m[3][1], mode=0o4777), *m[4:]],
}


@pytest.mark.parametrize("what", TARS)
def test_a_tar_has_what_its_manifest_says_and_nothing_else(shelf: Shelf, what: str) -> None:
    path = forged(shelf, shelf.manifest, TARS[what])
    with pytest.raises(StorageCorrupted, match=r"^The backup is damaged: "):
        looked_at_and_restored(path, shelf.home)
    assert shelf.home.present() == {shelf.manifest.id}


HEADERS: dict[str, dict[str, Any]] = {
    "another owner": {"owner": "bob"},
    "another name": {"name": "w2"},
    "another model": {"model": "n"},
    "fewer tokens": {"tokens": 1},
    "a manifest without end": {"manifest_bytes": archives.MOST_MANIFEST + 1},
    "a longer manifest": {"manifest_bytes": 100_000},
    "less than a manifest": {"manifest_bytes": -1},
    "another manifest": {"manifest": "0" * 64},
    "another body": {"body": "0" * 64},
    "another size": {"size": 1},
    "a time that never was": {"timestamp": "2026-02-31T00:00:00.000000Z"},
    "a time that leads elsewhere": {"timestamp": "../../x"},
    "another version": {"version": 2},
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_fits_what_is_behind_it(shelf: Shelf, what: str) -> None:
    """Whose it is, is what its manifest says: a list cannot be lied to for long."""
    path = forged(shelf, shelf.manifest, header=HEADERS[what])
    with pytest.raises(StorageCorrupted, match=r"^The backup is damaged: "):
        looked_at_and_restored(path, shelf.home)
    assert shelf.home.present() == {shelf.manifest.id}


def test_zstd_is_not_told_how_much_memory_to_take(shelf: Shelf) -> None:
    """A window of 128 MiB for a file of a few KiB."""
    path = forged(shelf, shelf.manifest, window_log=27)
    with pytest.raises(StorageCorrupted, match="its manifest cannot be unpacked"):
        looked_at_and_restored(path, shelf.home)


@pytest.mark.parametrize("where", ["a larger manifest", "a larger block", "more behind a block"])
def test_a_file_that_would_unpack_to_half_a_gigabyte_is_not_unpacked(
    shelf: Shelf, where: str
) -> None:
    """Nothing is read beyond what the manifest says, whatever else would come."""
    raw, more = sealed(shelf.manifest), 2**29
    frame = zstandard.ZstdCompressor(level=1).compressobj()
    head = member("manifest.json", raw)[0]
    if where == "a larger manifest":
        head.size += more
    body = frame.compress(head.tobuf(tarfile.GNU_FORMAT) + raw)
    if where != "a larger manifest":
        block = shelf.manifest.blocks[0][0]
        first = member(block.name, (shelf.folder / block.name).read_bytes())
        if where == "a larger block":
            first[0].size += more
        begin = bytes(-len(raw) % 512) + first[0].tobuf(tarfile.GNU_FORMAT) + first[1]
        body += frame.compress(begin)
    for _ in range(more // 2**20):
        body += frame.compress(bytes(2**20))
    body += frame.flush()
    digest = blake3.blake3(body).hexdigest()
    told = archives._described(shelf.manifest, raw, "2026-01-01T00:00:00.000000Z", 10**18, digest)
    length = len(archives._framed(told))
    path = shelf.directory / "bomb.tar.zst"
    told = structs.replace(told, size=length + len(body))
    path.write_bytes(archives._framed(told, length) + body)
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(StorageCorrupted, match="something else"):
            looked_at_and_restored(path, shelf.home)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


ODD: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"no backup at all, but quite some text"),
    "a plain archive": lambda path: path.write_bytes(zstandard.compress(b"x" * 1000)),
    "a header without end": lambda path: path.write_bytes(
        archives._FRAME.pack(archives._MAGIC, 2**32 - 1) + b"{" * 100_000
    ),
    "a directory": lambda path: path.mkdir(),
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("what", ODD)
def test_a_list_tells_of_what_is_no_backup_and_of_all_that_are(shelf: Shelf, what: str) -> None:
    """R124: one bad file is no reason to see none."""
    found = shelf.write()
    ODD[what](shelf.directory / "odd.tar.zst")
    (shelf.directory / "notes.txt").write_text("an operator's")
    listed, unreadable = archives.listed(shelf.directory)
    assert listed == [found]
    (one,) = unreadable
    assert one.file == "odd.tar.zst"
    assert one.why.startswith(("The backup is damaged: ", "The backup could not be read: "))


def test_one_that_was_replaced_meanwhile_is_not_taken_for_the_other(shelf: Shelf) -> None:
    found = shelf.write()
    other = shelf.write()
    os.replace(other.path, found.path)
    with pytest.raises(StorageReadFailed, match="replaced by another one"):
        archives.manifest_of(found)
    found.path.unlink()
    with pytest.raises(StorageReadFailed, match="deleted meanwhile"):
        archives.unpack(replace(found), lambda *_: None, unheard)


def test_removing_one_again_does_nothing(shelf: Shelf) -> None:
    found = shelf.write()
    for _ in range(2):
        archives.remove(found.path)
    assert shelf.there() == []


def test_a_copy_under_any_other_name_is_the_same_backup(shelf: Shelf) -> None:
    """What a file is called says nothing."""
    found = shelf.write()
    os.rename(found.path, shelf.directory / "from the other host.tar.zst")
    ((one,), _) = archives.listed(shelf.directory)
    assert one.header == found.header
    assert archives.manifest_of(one).conversation == SAID


def test_a_file_that_is_the_same_one_is_not_read_again(shelf: Shelf) -> None:
    """A list of many backups costs a look at each name, and no more."""
    one = shelf.write()
    known: archives.Known = {}
    assert archives.listed(shelf.directory, known) == ([one], [])
    which, _ = known[one.path.name]
    remembered = replace(one, is_whole=False)
    known[one.path.name] = which, remembered
    assert archives.listed(shelf.directory, known)[0] == [remembered]
    os.utime(one.path, ns=(1, one.path.stat().st_mtime_ns))  # whatever is done to it
    assert archives.listed(shelf.directory, known)[0] == [one]
    copied = one.path.with_name("copied")
    shutil.copy2(one.path, copied)
    copied.rename(one.path)
    known[one.path.name] = which, remembered
    assert archives.listed(shelf.directory, known)[0] == [one]
    one.path.write_bytes(b"no backup any more")
    found, unreadable = archives.listed(shelf.directory, known)
    assert (found, [wrong.file for wrong in unreadable]) == ([], [one.path.name])
    assert known == {}


def test_a_deletion_that_is_tried_again_is_made_anew(shelf: Shelf) -> None:
    """The sync of the one before may have failed, and a second sync proves nothing."""
    one = shelf.write()
    archives.remove(one.path)
    before = shelf.directory.stat().st_mtime_ns
    archives.remove(one.path)
    assert shelf.directory.stat().st_mtime_ns == before
    archives.remove(one.path, is_again=True)
    assert shelf.directory.stat().st_mtime_ns > before
    assert shelf.there() == []

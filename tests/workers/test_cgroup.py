"""Control groups: where they are looked for, and what proves that one is hive's to use."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hive.workers import cgroup
from hive.workers.cgroup import own_groups
from hive.workers.guard import Group
from tests.patience import wait_until

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:5 - cgroup2 cgroup2 rw
"""
UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
IN_A_SERVICE = "0::/system.slice/hive.service\n"


@pytest.fixture
def parent() -> Path:
    """The group in which workers get theirs."""
    found = cgroup.find()
    if found is None:
        pytest.skip("no writable cgroup v2 with cgroup.kill")
    return found


@pytest.fixture
def group(parent: Path) -> Iterator[Group]:
    made = cgroup.make(parent / f"hive-test{os.getpid()}")
    yield made
    made.kill()
    wait_until(lambda: not made.is_populated(), "the group to be empty")
    made.remove()


def beneath(group: Group) -> list[Path]:
    return [path for path in group.path.iterdir() if path.is_dir()]


# ── Where hive's own group is ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("mountinfo", "membership", "expected"),
    [
        (HYBRID, "4:memory:/process/1\n0::/\n", "/sys/fs/cgroup/unified"),
        (UNIFIED, IN_A_SERVICE, "/sys/fs/cgroup/system.slice/hive.service"),
        # A container that sees only its own part of the host's hierarchy …
        ("1 2 0:3 /docker/a /mnt rw - cgroup2 c rw\n", "0::/docker/a/b\n", "/mnt/b"),
        ("1 2 0:3 /docker/a /mnt rw - cgroup2 c rw\n", "0::/docker/a\n", "/mnt"),
        # … and a mount point with a space in its name.
        (r"1 2 0:3 / /a\040b\134 rw - cgroup2 c rw", "0::/x\n", "/a b\\/x"),
    ],
)
def test_the_group_is_found_beneath_the_mount(
    mountinfo: str, membership: str, expected: str
) -> None:
    assert [str(path) for path in own_groups(mountinfo, membership)] == [expected]


@pytest.mark.parametrize(
    ("mountinfo", "membership"),
    [
        (HYBRID, "4:memory:/process/1\n"),  # v1 alone
        (HYBRID.replace("cgroup2", "cgroup"), "0::/\n"),  # v2 is not mounted
        ("", ""),
        # Outside of what this namespace shows: the mount is another group's.
        (UNIFIED, "0::/../other.service\n"),
        (UNIFIED.replace(" / ", " /.. ", 1), IN_A_SERVICE),
        (UNIFIED.replace(" / ", " /docker/b ", 1), "0::/docker/a\n"),
    ],
)
def test_a_group_that_cannot_be_seen_is_not_guessed(mountinfo: str, membership: str) -> None:
    assert list(own_groups(mountinfo, membership)) == []


def test_every_mount_is_considered() -> None:
    found = own_groups(HYBRID + UNIFIED, "0::/a\n")

    assert [str(path) for path in found] == ["/sys/fs/cgroup/unified/a", "/sys/fs/cgroup/a"]


# ── Whether it can be used ──────────────────────────────────────────────────────────────────────


def proc(directory: Path, mount: Path, membership: str) -> Path:
    """A process directory that says where something is mounted."""
    (directory / "mountinfo").write_text(f"1 2 0:3 / {mount} rw - cgroup2 cgroup2 rw\n")
    (directory / "cgroup").write_text(membership)
    return directory


def test_what_is_found_is_the_group_that_hive_is_in(parent: Path) -> None:
    assert str(os.getpid()) in (parent / "cgroup.procs").read_text().split()


def test_a_trial_with_a_process_leaves_nothing(group: Group) -> None:
    assert cgroup.works(group.path)
    assert beneath(group) == []
    assert not group.is_populated()


def test_a_group_that_hive_is_not_in_is_not_used(
    parent: Path, group: Group, tmp_path: Path
) -> None:
    """As where a container's namespace has a group of the same name."""
    assert cgroup.find(proc(tmp_path, parent, f"0::/{group.path.name}\n")) is None


def test_a_group_that_is_gone_is_not_used(parent: Path, tmp_path: Path) -> None:
    assert cgroup.find(proc(tmp_path, parent, "0::/never (deleted)\n")) is None


def test_a_directory_that_makes_no_groups_is_not_used(tmp_path: Path) -> None:
    """Whatever is mounted there: it takes a directory, but no process."""
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "cgroup.procs").write_text(f"{os.getpid()}\n")

    assert cgroup.find(proc(tmp_path, mount, "0::/\n")) is None
    assert os.listdir(mount) == ["cgroup.procs"]


def test_without_proc_there_are_no_groups(tmp_path: Path) -> None:
    assert cgroup.find(tmp_path) is None


def test_a_group_that_takes_no_groups_fails_its_trial(group: Group) -> None:
    (group.path / "cgroup.max.descendants").write_text("0")

    with pytest.raises(BlockingIOError):
        cgroup.works(group.path)


def test_an_engine_cannot_make_groups_without_end(group: Group) -> None:
    """Removing them would hold hive up."""
    deepest = group.path / "/".join("a" * cgroup.DEEPEST)
    deepest.mkdir(parents=True)
    with pytest.raises(BlockingIOError):
        (deepest / "a").mkdir()

    assert int((group.path / "cgroup.max.descendants").read_text()) == cgroup.MOST_BELOW

"""What the host has left, read from the kernel's own files."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hive.workers.footprint import GIB, MIB, Need
from hive.workers.host import FILES, Room, available_ram, check_disk, check_ram, why

# Of a virtual machine with 24 GB, shortened.
MEMINFO = """\
MemTotal:       24684084 kB
MemFree:        23558332 kB
MemAvailable:   24248140 kB
Buffers:            5596 kB
Cached:           833672 kB
SwapTotal:             0 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""
AVAILABLE = 24_248_140 * 1024
NO_LIMIT_V1 = 9_223_372_036_854_771_712


class Host:
    """A /proc and a tree of control groups, mounted at `groups`."""

    def __init__(self, home: Path) -> None:
        self.proc, self.groups = home / "proc", home / "groups"
        (self.proc / "self").mkdir(parents=True)
        self.groups.mkdir()
        (self.proc / "meminfo").write_text(MEMINFO)
        (self.proc / "self/cgroup").write_text("")
        self.mounted("")

    def mounted(self, *lines: str) -> None:
        others = (
            "23 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw",
            "31 23 0:28 / /x rw - tmpfs  rw",
        )
        (self.proc / "self/mountinfo").write_text("\n".join((*others, *filter(None, lines))) + "\n")

    def v2(self, path: str, root: str = "/") -> None:
        (self.proc / "self/cgroup").write_text(f"1:name=systemd:/\n0::{path}\n")
        self.mounted(f"41 31 0:38 {root} {self.groups} rw,nosuid shared:9 - cgroup2 cgroup2 rw")

    def v1(self, path: str) -> None:
        (self.proc / "self/cgroup").write_text(f"8:pids:/x\n4:cpu,memory:{path}\n0::/\n")
        self.mounted(
            f"36 31 0:33 / {self.groups / 'pids'} rw - cgroup cgroup rw,pids",
            f"35 31 0:32 / {self.groups} rw,relatime - cgroup cgroup rw,cpu,memory",
        )

    def limit(self, group: str, limit: object, used: int, cache: int = 0) -> Path:
        directory = self.groups / group
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.current").write_text(f"{used}\n")
        halves = (cache // 4, cache - cache // 4)
        (directory / "memory.stat").write_text(
            "anon 123\nactive_file {}\ninactive_file {}\n".format(*halves)
        )
        return directory

    def limit_v1(self, group: str, limit: int, used: int, cache: int = 0) -> Path:
        directory = self.groups / group
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (directory / "memory.usage_in_bytes").write_text(f"{used}\n")
        (directory / "memory.stat").write_text(
            f"inactive_file 7\ntotal_active_file 0\ntotal_inactive_file {cache}\n"
        )
        return directory

    def room(self) -> Room:
        return available_ram(self.proc)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# ── Memory ──────────────────────────────────────────────────────────────────────────────────────


def test_without_control_groups_the_kernel_says_what_is_available(host: Host) -> None:
    assert host.room() == Room(AVAILABLE, "MemAvailable")


def test_this_hosts_own_files_can_be_read() -> None:
    room = available_ram()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    assert 0 < room.bytes <= total


def test_a_lower_limit_of_the_own_group_counts_with_its_page_cache_as_free(host: Host) -> None:
    host.v2("/hive.slice/hive.service")
    group = host.limit("hive.slice/hive.service", 8 * GIB, 3 * GIB, cache=GIB)

    assert host.room() == Room(6 * GIB, f"the memory limit of control group {group}")


def test_the_tightest_of_the_groups_around_it_counts(host: Host) -> None:
    host.v2("/hive.slice/hive.service")
    host.limit("hive.slice/hive.service", "max", 0)
    outer = host.limit("hive.slice", 4 * GIB, GIB)
    host.limit("other.slice", GIB, 0)

    assert host.room() == Room(3 * GIB, f"the memory limit of control group {outer}")


def test_a_limit_above_what_the_host_has_does_not_count(host: Host) -> None:
    host.v2("/")
    host.limit("", 10**15, 0)

    assert host.room().source == "MemAvailable"


def test_a_group_that_is_over_its_limit_has_nothing_left(host: Host) -> None:
    host.v2("/")
    host.limit("", GIB, 2 * GIB)

    assert host.room().bytes == 0


@pytest.mark.parametrize("path", ["/docker/abc", "/somewhere/else", "/docker/abc/gone"])
def test_in_a_container_the_mount_is_the_group(host: Host, path: str) -> None:
    host.v2(path, root="/docker/abc")
    host.limit("", 2 * GIB, GIB)

    assert host.room().bytes == GIB


def test_what_lies_beside_a_containers_mount_is_not_its_group(host: Host) -> None:
    host.v2("/docker/other", root="/docker/abc")
    host.limit("../other", GIB, 0)

    assert host.room().source == "MemAvailable"


def test_version_1_has_other_names_and_a_number_for_no_limit(host: Host) -> None:
    host.v1("/hive")
    host.limit_v1("", NO_LIMIT_V1, 23 * GIB)
    host.limit_v1("pids/hive", GIB, 0)  # another controller's tree
    assert host.room().source == "MemAvailable"

    group = host.limit_v1("hive", 5 * GIB, 4 * GIB, cache=2 * GIB)
    assert host.room() == Room(3 * GIB, f"the memory limit of control group {group}")


def test_all_that_start_together_are_added_up() -> None:
    needs = [(f"m-{n}", Need(3 * GIB, (("KV", 3 * GIB),), "KV 3.0 GiB")) for n in (1, 2)]

    assert check_ram(needs, Room(6 * GIB, "MemAvailable")) is None
    assert check_ram(needs[:1], Room(6 * GIB - 1, "MemAvailable")) is None
    assert check_ram([], Room(0, "MemAvailable")) is None
    error = check_ram(needs, Room(6 * GIB - 1, "MemAvailable"))
    assert error is not None
    assert error.message == (
        "Not enough host memory: 6.0GB required, 5.9GB available (MemAvailable). "
        "m-1: KV 3.0 GiB; m-2: KV 3.0 GiB."
    )
    assert error.public_details == {"required_ram_mb": 6144, "available_ram_mb": 6143}
    assert "Free 0.1 GiB" in error.suggested_action


# ── Disk ────────────────────────────────────────────────────────────────────────────────────────


def left(path: Path) -> int:
    about = os.statvfs(path)
    return about.f_bavail * about.f_frsize


def test_a_disk_with_enough_room_is_no_error_even_where_the_directory_is_not_made_yet(
    tmp_path: Path,
) -> None:
    assert check_disk(tmp_path / "not" / "yet", MIB, "state_dir") is None


def test_too_little_room_tells_how_much_to_free(tmp_path: Path) -> None:
    want = left(tmp_path) + 5000 * MIB
    error = check_disk(tmp_path / "state", want, "state_dir")

    assert error is not None
    short = error.details["required_disk_mb"] - error.details["available_disk_mb"]
    assert 4900 <= short <= 5100  # others write meanwhile
    assert error.message.startswith(f"server.state_dir: {tmp_path / 'state'} needs ")
    assert error.suggested_action.startswith("Free ")
    freed = int(error.suggested_action.split()[1])
    assert short - 1 <= freed <= short
    assert "set server.state_dir to another file system" in error.suggested_action


def test_a_tmpfs_can_be_enlarged(host: Host, tmp_path: Path) -> None:
    # Two mounts on one directory: the later one is what is seen.
    host.mounted(
        f"50 31 0:40 / {tmp_path} rw - ext4 x rw", f"51 31 0:41 / {tmp_path} rw - tmpfs x rw"
    )
    error = check_disk(tmp_path / "run", 10**18, "runtime_dir", host.proc)

    assert error is not None
    assert f"(tmpfs on {tmp_path})" in error.message
    assert f"remount,size=… {tmp_path}" in error.suggested_action


def test_a_file_system_that_counts_no_blocks_has_no_limit() -> None:
    assert os.statvfs("/proc").f_blocks == 0  # as a tmpfs without a size
    assert check_disk(Path("/proc/self"), 10**18, "runtime_dir") is None


def test_a_disk_with_room_but_without_inodes_is_too_full(tmp_path: Path) -> None:
    script = f'mount -t tmpfs -o size=100m,nr_inodes=20 tmpfs {tmp_path} && exec "$@"'
    code = (
        "import sys, pathlib\nfrom hive.workers.host import check_disk\n"
        "error = check_disk(pathlib.Path(sys.argv[1]) / 'x', 2**20, 'state_dir')\n"
        "print(error.message, error.suggested_action, sep='\\n')"
    )
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr.lower():
        pytest.skip("needs mount namespaces")
    message, action = done.stdout.splitlines()

    assert f"needs {FILES} new files, but its file system (tmpfs on {tmp_path})" in message
    assert "has 19 inodes left: 45 inodes too little." in message
    assert f"remount,nr_inodes=… {tmp_path}" in action


def test_what_the_system_says_is_told_as_it_is(tmp_path: Path) -> None:
    assert why(OSError(errno.EACCES, "Permission denied"), tmp_path) == "Permission denied"
    assert why(OSError(errno.ENOSPC, "No space left"), tmp_path) == "No space left"
    assert why(OSError("odd"), tmp_path) == "odd"

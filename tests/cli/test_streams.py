"""Output that cannot be written is told as such; whoever does not read stderr stops nothing."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hive.settings import load

HIVE = [sys.executable, "-m", "hive"]
CONFIG = """
[models.small]
engine = "command"
device = "cpu"
command = ["sleep", "600", "{socket}"]
"""
FULL = Path("/dev/full")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("HIVE_", "CUDA_VISIBLE"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path("hive.toml").write_text(CONFIG)


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["explain"],
        ["explain", "--json"],
        ["key", "list"],
        ["check"],
        ["key", "new", "a"],
    ],
    ids=" ".join,
)
def test_output_on_a_full_disk_is_1_and_said_so(args: list[str], tmp_path: Path) -> None:
    where = ["--state-dir", str(tmp_path / "s"), "--runtime-dir", str(tmp_path / "r")]
    with FULL.open("w") as full:
        done = subprocess.run(
            [*HIVE, *args, *(where if args == ["check"] else [])],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )

    assert done.returncode == 1
    assert done.stderr == "hive: the output could not be written: No space left on device\n"


def test_a_key_that_nobody_has_seen_is_not_kept() -> None:
    with FULL.open("w") as full:
        subprocess.run([*HIVE, "key", "new", "a"], stdout=full, check=False, timeout=60)

    assert load(Path("hive.toml")).auth.keys == ()
    assert sorted(path.name for path in Path().iterdir()) == ["hive.toml"]


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-"])
def test_without_a_stderr_the_exit_code_is_the_same(redirected: str) -> None:
    command = f'exec "$@" {redirected}'
    args = ["sh", "-c", command, "sh", *HIVE, "explain", "NO_SUCH_CODE"]
    done = subprocess.run(args, capture_output=True, text=True, check=False, timeout=60)

    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("closed", ["0<&-", ">&-", "0<&- >&- 2>&-"])
def test_descriptors_that_are_closed_are_no_error(closed: str) -> None:
    args = ["sh", "-c", f'exec "$@" {closed}', "sh", *HIVE, "explain", "NOT_FOUND"]
    done = subprocess.run(args, capture_output=True, text=True, check=False, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")


def test_what_has_no_place_in_the_encoding_is_printed_all_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [*HIVE, "explain", "--json", "é中"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
        timeout=60,
    )

    assert json.loads(done.stdout)["error"]["code"] == "NOT_FOUND"
    assert rb"'\xe9\u4e2d'" in done.stderr


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """The writing end of a pipe that is full and that nobody reads."""
    reader, fd = os.pipe()
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, b"." * 4096)
    os.set_blocking(fd, True)
    yield fd
    os.close(reader)
    os.close(fd)


def test_a_start_that_fails_ends_though_nobody_reads_why(full_pipe: int) -> None:
    Path("hive.toml").write_text(f"[server]\nprot = 1\n{CONFIG}")
    began = time.monotonic()
    done = subprocess.run([*HIVE, "serve"], stderr=full_pipe, check=False, timeout=60)

    assert done.returncode == 1
    assert time.monotonic() - began < 30


def test_an_internal_error_ends_though_nobody_reads_it(full_pipe: int, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ImportError('this file is damaged')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*HIVE, "status"],
        stderr=full_pipe,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        timeout=60,
    )

    assert done.returncode == 70

"""`hive engine` with small wheels of our own, in place of the gigabytes of the real lock file."""

import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hive import cli
from hive.cli.engine import Silent
from hive.cli.installing import Plan, build
from hive.errors import ConfigInvalid, HiveError, InsufficientDisk, WorkerSpawnFailed
from hive.workers import environment

INSTALL = """
import sys
from pathlib import Path
from hive.cli.engine import Lines
from hive.cli.installing import Plan, build, sigterm_unwinds
with sigterm_unwinds():
    build(Plan(*map(Path, sys.argv[1:]), imports=("tinytorch",)), Lines())
"""


def write_wheel(directory: Path, name: str, version: str, source: str) -> None:
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},{_digest(text)},{len(text)}\n" for path, text in files.items())
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in (files | {f"{info}/RECORD": record + f"{info}/RECORD,,\n"}).items():
            wheel.writestr(path, text)


def _digest(text: str) -> str:
    raw = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
    return "sha256=" + raw.decode().rstrip("=")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an index would have: a tiny CPU build, a library, and one that cannot be imported."""
    directory = tmp_path_factory.mktemp("wheels")
    write_wheel(directory, "tinytorch", "1.0+cpu", "def add(a, b):\n    return a + b\n")
    write_wheel(directory, "tinylib", "2.0", "")
    write_wheel(directory, "tinybroken", "3.0", "raise ImportError('no such operator')\n")
    return directory


@pytest.fixture(autouse=True)
def only_these_wheels(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python whose `-m venv` takes no time: it copies one that was made before."""
    directory = tmp_path_factory.mktemp("quick")
    subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True)
    python = directory / "python"
    python.write_text(
        f"""#!/bin/sh
[ "$3" = venv ] && exec cp -a {directory}/venv "$4"
exec {sys.executable} "$@"
"""
    )
    python.chmod(0o755)
    return python


def plan(
    engines: Path,
    *pins: str,
    python: Path = Path(sys.executable),
    imports: tuple[str, ...] = ("tinytorch",),
) -> Plan:
    lock = engines / "lock.txt"
    engines.mkdir(exist_ok=True)
    lock.write_text("# a comment\n" + "\n".join(pins) + "\n")
    home = environment.home_in(engines, lock)
    return Plan(home, lock, python, imports=imports)


class Told(Silent):
    """Remembers what a person would have been told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[int, int, str]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, done: int, total: int, what: str) -> None:
        self.steps.append((done, total, what))


@pytest.fixture(scope="module")
def installed(
    wheels: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Plan, Told]]:
    """A finished environment in which a second hive tried to install while the first was at it."""
    told = Told()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(wheels))
        made = plan(tmp_path_factory.mktemp("engines"), "tinylib==2.0", "tinytorch==1.0+cpu")
        first = start_install(made)
        wait_for(made.home)
        build(made, told)
        assert first.wait(30) == 0
    yield made, told
    shutil.rmtree(made.home.parent)


def start_install(made: Plan) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", INSTALL, *map(str, (made.home, made.lock, made.interpreter))]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True)


def wait_for(path: Path, limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def refused(made: Plan) -> HiveError:
    with pytest.raises(HiveError) as caught:
        build(made, Silent())
    assert environment.completed(made.home) is None
    assert not made.home.exists(), "half an environment was left"
    return caught.value


# ── What an install makes ───────────────────────────────────────────────────────────────────────


def test_a_second_install_waits_for_the_first_and_finds_its_work_done(
    installed: tuple[Plan, Told],
) -> None:
    made, told = installed

    assert environment.completed(made.home) is not None
    assert "waiting" in told.notes[0]
    assert not told.steps


def test_an_installed_environment_works_and_knows_its_versions(
    installed: tuple[Plan, Told],
) -> None:
    made, _ = installed
    marker = environment.completed(made.home)
    code = "import tinylib, tinytorch; print(tinytorch.add(1, 2))"

    assert subprocess.check_output([made.python, "-c", code], text=True) == "3\n"
    assert marker
    assert marker.versions == {"tinytorch": "1.0+cpu"}


def test_an_install_leaves_no_temporary_file_and_no_log(installed: tuple[Plan, Told]) -> None:
    made, _ = installed

    assert not (made.home / "tmp").exists()
    assert not made.log.exists()


def test_force_builds_it_again_and_tells_each_package(
    installed: tuple[Plan, Told], quick: Path
) -> None:
    made = replace(installed[0], interpreter=quick)
    stray = made.home / "stray"
    stray.write_text("from the time before")
    told = Told()
    build(made, told, force=True)

    assert not stray.exists()
    done = [step[0] for step in told.steps]
    assert {step[1] for step in told.steps} == {4}
    # How many are on the disk is looked up now and then: one step may stand for both packages.
    assert done in ([1, 2, 4], [1, 2, 3, 4])
    assert [what for _, _, what in told.steps[:2]] == [
        "fetching tinylib==2.0",
        "fetching tinytorch==1.0+cpu",
    ]


def test_the_list_shows_what_is_whole_and_what_is_not(
    installed: tuple[Plan, Told],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made, _ = installed
    unfinished = made.home.with_name("cpu-000000000000-py311")
    unfinished.mkdir()
    monkeypatch.setenv("HIVE_ENGINES", str(made.home.parent))

    assert cli.run(["engine", "list", "--json"]) == 0
    rows = {row["home"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[str(made.home)]["state"] == "complete"
    assert rows[str(made.home)]["versions"] == {"tinytorch": "1.0+cpu"}
    assert rows[str(unfinished)]["state"] == "unfinished"
    assert cli.run(["engine", "list"]) == 0
    assert "unfinished" in capsys.readouterr().out
    unfinished.rmdir()


# ── What an install refuses ─────────────────────────────────────────────────────────────────────


def test_a_missing_cpu_build_is_found_out_before_anything_is_fetched(
    tmp_path: Path, quick: Path
) -> None:
    made = plan(tmp_path, "tinylib==2.0", "tinytorch==9.9+cpu", python=quick)
    error = refused(made)

    assert isinstance(error, ConfigInvalid)
    assert "tinytorch==9.9+cpu" in error.message
    assert "CPU builds" in error.message
    assert "--index URL" in error.suggested_action
    assert "Collecting" not in made.log.read_text()


def test_when_pip_fails_its_last_lines_are_shown(tmp_path: Path, quick: Path) -> None:
    made = plan(tmp_path, "tinytorch==1.0+cpu", "tinylib==7.7", python=quick)
    error = refused(made)

    assert isinstance(error, WorkerSpawnFailed)
    assert error.message.endswith("No matching distribution found for tinylib==7.7")
    assert str(made.log) in error.suggested_action
    assert any("from versions: 2.0" in line for line in error.details["problems"])


def test_what_does_not_import_is_not_declared_whole(tmp_path: Path, quick: Path) -> None:
    error = refused(plan(tmp_path, "tinybroken==3.0", python=quick, imports=("tinybroken",)))

    assert "no such operator" in error.message


def test_a_full_disk_is_found_out_first_with_numbers(tmp_path: Path) -> None:
    made = plan(tmp_path, "tinylib==2.0")
    error = refused(replace(made, disk_needed_mb=10**9))

    assert isinstance(error, InsufficientDisk)
    assert error.details["required_disk_mb"] == 10**9
    assert error.details["available_disk_mb"] > 0
    assert "1,000,000,000 MB" in error.message


@pytest.mark.parametrize("answer", ['echo \'["3.14.1", "linux", "x86_64"]\'', "exit 3"])
def test_a_python_that_the_lock_file_is_not_for_is_refused(tmp_path: Path, answer: str) -> None:
    other = tmp_path / "python3.14"
    other.write_text(f"#!/bin/sh\n{answer}\n")
    other.chmod(0o755)
    made = plan(tmp_path, "tinylib==2.0")
    error = refused(Plan(made.home, made.lock, other))

    assert str(other) in error.message
    assert "Python 3.11" in error.message
    assert "--python PATH" in error.suggested_action


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = plan(tmp_path, "tinylib==2.0")
    error = refused(Plan(tmp_path / "file" / "cpu-0-py311", made.lock, made.interpreter))

    assert isinstance(error, ConfigInvalid)
    assert str(tmp_path / "file") in error.message
    assert "HIVE_ENGINES" in error.suggested_action


@pytest.mark.parametrize("args", [["gpu"], ["cpu", "--index", "an-index"], []])
def test_wrong_usage_is_told_as_such(args: list[str], tmp_path: Path) -> None:
    status = subprocess.run(
        [sys.executable, "-m", "hive", "engine", "install", *args],
        env=os.environ | {"HIVE_ENGINES": str(tmp_path)},
        capture_output=True,
        check=False,
    ).returncode

    assert status == 2
    assert not list(tmp_path.iterdir())


def test_an_empty_list_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HIVE_ENGINES", str(tmp_path))

    assert cli.run(["engine", "list"]) == 0
    assert "hive engine install cpu" in capsys.readouterr().out


# ── What ends an install ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_install_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    made = plan(tmp_path, "tinytorch==1.0+cpu")
    install = start_install(made)
    wait_for(made.home / "bin")
    install.send_signal(number)

    assert install.wait(10) != 0
    assert not made.home.exists()
    assert not processes_in(made.home)


def test_what_a_killed_install_left_is_not_whole_and_is_built_again(
    tmp_path: Path, quick: Path
) -> None:
    made = plan(tmp_path, "tinytorch==1.0+cpu", python=quick)
    install = start_install(made)
    wait_for(made.home / "tmp")
    install.kill()
    install.wait(10)

    assert made.home.exists()
    assert environment.completed(made.home) is None
    build(made, Silent())
    assert environment.completed(made.home) is not None
    assert not processes_in(made.home)


def processes_in(home: Path) -> list[str]:
    """Command lines of this user's processes that name the environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(home).encode() in entry.read_bytes() and str(os.getpid()) != entry.parent.name:
                found.append(entry.read_text())
    return found

"""An engine environment is whole only when its marker, its lock file and its Python agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hive.workers import environment


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The place of an environment, with a Python in it but nothing that says it is whole."""
    home = environment.home_in(tmp_path, environment.lock_file())
    environment.python_of(home).parent.mkdir(parents=True)
    environment.python_of(home).symlink_to(sys.executable)
    return home


def finish(home: Path) -> environment.Completed:
    return environment.complete(
        home, environment.lock_file(), python="3.11.7", versions={"vllm": "1"}
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HIVE_ENGINES": "/e", "CACHE_DIRECTORY": "/c", "XDG_CACHE_HOME": "/x"}, "/e"),
        ({"CACHE_DIRECTORY": "/c:/d", "XDG_CACHE_HOME": "/x"}, "/c/engines"),
        ({"HIVE_ENGINES": "", "CACHE_DIRECTORY": "", "XDG_CACHE_HOME": "/x"}, "/x/hive/engines"),
        ({"HOME": "/home/bee"}, "/home/bee/.cache/hive/engines"),
    ],
)
def test_the_first_variable_that_is_set_says_where_environments_live(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HIVE_ENGINES", "CACHE_DIRECTORY", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert environment.engines_dir() == Path(expected)


def test_another_lock_file_means_another_environment(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("torch==1\n")
    before = environment.home_in(tmp_path, lock)
    lock.write_text("torch==2\n")

    assert environment.home_in(tmp_path, lock) != before
    assert before.name.endswith("-py311")


def test_an_environment_without_a_marker_is_not_whole(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIVE_ENGINES", str(home.parent))

    assert environment.completed(home) is None
    assert environment.managed_python() is None


def test_the_marker_makes_it_whole_and_tells_its_versions(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIVE_ENGINES", str(home.parent))
    marker = finish(home)

    assert environment.completed(home) == marker
    assert marker.versions == {"vllm": "1"}
    assert environment.managed_python() == environment.python_of(home)


def test_a_revoked_environment_is_not_whole_any_more(home: Path) -> None:
    finish(home)
    environment.revoke(home)

    assert environment.completed(home) is None


def test_revoking_what_does_not_exist_does_nothing(tmp_path: Path) -> None:
    environment.revoke(tmp_path / "cpu-0-py311")


def test_an_environment_whose_python_went_away_is_not_whole(home: Path) -> None:
    finish(home)
    environment.python_of(home).unlink()
    environment.python_of(home).symlink_to("/nonexistent/python3.11")

    assert environment.completed(home) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"python": "3.11.7"}', "\x00"])
def test_a_damaged_marker_is_no_marker(home: Path, text: str) -> None:
    (home / environment.MARKER).write_text(text)

    assert environment.completed(home) is None


def test_a_marker_of_another_lock_file_does_not_count(home: Path) -> None:
    finish(home)
    marker = home / environment.MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"lock_sha256": "0" * 64}))

    assert environment.completed(home) is None


def test_the_daemon_can_ask_without_importing_anything_heavy() -> None:
    code = "import sys, hive.workers.environment as e; e.managed_python(); print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()

    assert not {"pydantic", "click", "aiohttp", "torch"} & set(modules)

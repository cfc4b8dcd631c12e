"""What is known to be wrong before anything is started."""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hive.errors import ConfigInvalid, HiveError, WorkerSpawnFailed
from hive.settings import Settings
from hive.workers.preflight import check, prepare_directories
from tests.patience import short_directory

COMMAND = {"engine": "command", "device": "cpu", "command": ["sh", "{socket}"]}
NO_PROGRAM = {**COMMAND, "command": ["no-such-program", "{socket}"]}


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def settings(models: dict[str, Any] | None = None, **server: Any) -> Settings:
    return Settings.model_validate({"server": server, "models": models or {"m": COMMAND}})


def vllm(path: Path | str, python: Path | str = sys.executable) -> dict[str, Any]:
    return {"engine": "vllm", "device": "cpu", "path": str(path), "python": python}


def errors(*models: dict[str, Any]) -> list[HiveError]:
    named = {f"m{number}": model for number, model in enumerate(models)}
    findings, _ = check(settings(named))
    return [finding.error for finding in findings if finding.error]


def program(file: Path, script: str) -> Path:
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o700)
    return file


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ── Directories ─────────────────────────────────────────────────────────────────────────────────


def test_the_directories_are_made_for_hives_user_alone(home: Path) -> None:
    wanted = settings(state_dir=home / "a" / "s", runtime_dir=home / "r")
    prepare_directories(wanted)
    prepare_directories(wanted)

    for path in ("a/s", "a/s/logs", "r", "r/w"):
        assert mode(home / path) == 0o700, path


def test_a_directory_that_others_may_read_is_closed(home: Path) -> None:
    (home / "s").mkdir()
    (home / "s").chmod(0o755)
    prepare_directories(settings(state_dir=home / "s", runtime_dir=home / "r"))

    assert mode(home / "s") == 0o700


@pytest.mark.parametrize("key", ["state_dir", "runtime_dir"])
def test_another_users_directory_is_refused_and_left_as_it_is(home: Path, key: str) -> None:
    others = Path("/")
    if os.geteuid() == 0:
        others = home / "others"
        others.mkdir()
        others.chmod(0o755)
        os.chown(others, 12345, 12345)
    before = mode(others)
    dirs: dict[str, Any] = {"state_dir": home / "s", "runtime_dir": home / "r", key: others}
    with pytest.raises(ConfigInvalid, match=rf"server\.{key}: .* another user"):
        prepare_directories(settings(**dirs))

    assert mode(others) == before


@pytest.mark.parametrize("key", ["state_dir", "runtime_dir"])
def test_a_directory_that_cannot_be_made_is_named_by_its_key(home: Path, key: str) -> None:
    (home / "file").touch()
    dirs: dict[str, Any] = {
        "state_dir": home / "s",
        "runtime_dir": home / "r",
        key: home / "file" / "x",
    }
    with pytest.raises(ConfigInvalid, match=rf"server\.{key}: .* cannot be used") as caught:
        prepare_directories(settings(**dirs))

    assert f"server.{key}" in caught.value.suggested_action


# ── Models ──────────────────────────────────────────────────────────────────────────────────────


def test_what_is_right_is_told_and_is_no_error() -> None:
    findings, uuids = check(settings())

    assert [finding.subject for finding in findings] == ["device cpu", "model m"]
    assert findings[1].found.startswith("command /")
    assert [finding.error for finding in findings] == [None, None]
    assert uuids == {}


def test_a_program_that_is_not_there_is_named() -> None:
    (error,) = errors(NO_PROGRAM)

    assert isinstance(error, WorkerSpawnFailed)
    assert "'no-such-program'" in error.message


@pytest.mark.parametrize("path", ["/no/such/model", "./no-such-model", "~no-such-model"])
def test_a_model_path_that_does_not_exist_is_no_hub_id(path: str) -> None:
    error = errors(vllm(path))[0]

    assert isinstance(error, ConfigInvalid)
    assert error.message == f"models.m0.path: {path} is not a directory."


def test_a_file_is_no_model_directory(model_dir: Path) -> None:
    assert "is not a directory" in errors(vllm(model_dir / "config.json"))[0].message


def test_a_directory_without_a_config_is_no_model(tmp_path: Path) -> None:
    error = errors(vllm(tmp_path))[0]

    assert isinstance(error, ConfigInvalid)
    assert error.message.startswith("models.m0.path: ")
    assert "config.json" in error.message


def test_an_engine_python_that_does_not_exist_is_named(model_dir: Path) -> None:
    (error,) = errors(vllm(model_dir, "/no/such/python"))

    assert isinstance(error, WorkerSpawnFailed)
    assert error.details["expected"] == "/no/such/python"


def test_an_environment_without_vllm_is_refused(model_dir: Path) -> None:
    (error,) = errors(vllm(model_dir))

    assert isinstance(error, WorkerSpawnFailed)
    assert "vllm is not installed" in error.message
    assert "hive engine install cpu" in error.suggested_action


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo it broke >&2; exit 1", "it broke"),
        ("echo not json", "it does not run"),
        ("exit 0", "it does not run"),
    ],
)
def test_an_environment_that_does_not_run_says_why(
    model_dir: Path, tmp_path: Path, script: str, told: str
) -> None:
    (error,) = errors(vllm(model_dir, program(tmp_path / "python", script)))

    assert told in error.message


def test_the_versions_of_a_whole_environment_are_told(model_dir: Path, tmp_path: Path) -> None:
    said = """echo noise; echo '{"vllm": "0.32.0", "lmcache": null, "torch": "2.13.0"}'"""
    python = program(tmp_path / "python", said)
    findings, _ = check(settings({"m": vllm(model_dir, python)}))

    assert [finding.error for finding in findings] == [None] * 3
    assert findings[2].found == f"vllm 0.32.0, torch 2.13.0 in {python}"


def test_an_environment_is_imported_only_when_that_is_asked_for(
    model_dir: Path, tmp_path: Path
) -> None:
    python = program(
        tmp_path / "python",
        """case "$*" in *"import vllm, lmcache"*) echo no libcudart >&2; exit 1;; esac
        echo '{"vllm": "1"}'""",
    )
    wanted = settings({"m": vllm(model_dir, python)})

    assert not any(finding.error for finding in check(wanted)[0])
    (error,) = (finding.error for finding in check(wanted, imports=True)[0] if finding.error)
    assert "no libcudart" in error.message


def test_a_hub_id_is_left_to_vllm() -> None:
    findings, _ = check(settings({"m": vllm("org/model-1")}))

    assert findings[1].found == "hub id org/model-1"


def test_every_models_problem_is_found_at_once(tmp_path: Path) -> None:
    found = errors(NO_PROGRAM, vllm("/no/such/model"), COMMAND, vllm(tmp_path), NO_PROGRAM)
    text = "\n".join(error.message for error in found)

    for number in (0, 1, 3, 4):
        assert f"m{number}" in text
    assert "m2" not in text

"""`hive model make-tiny`: where it writes, what it refuses, and that nothing half is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hive import cli

# Stands in for the Python of an engine environment: it is given the script, DIR and the seed.
WRITES = """
mkdir -p "$3" && echo '{}' > "$3/config.json" && echo "$4" > "$3/seed"
echo "offline=$HF_HUB_OFFLINE path=$PYTHONPATH" > "$3/environment"
echo 'noise on stdout' && echo '{"parameters": 2623744, "tokens": 512}'
"""
FAILS = """
echo half > "$3/config.json"
echo 'ModuleNotFoundError: No module named transformers' >&2; exit 1
"""
HANGS = 'echo half > "$3/config.json"; exec sleep 60'


def engine_python(directory: Path, script: str) -> Path:
    python = directory / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return engine_python(tmp_path, WRITES)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A directory in which models are made; what else is in it would be a leftover."""
    directory = tmp_path / "models"
    directory.mkdir()
    return directory


def make(target: Path, python: Path, *args: str) -> int:
    return cli.run(["model", "make-tiny", str(target), "--python", str(python), *args])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_model_is_written_and_its_path_is_the_last_line(
    models: Path, python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(models / "tiny", python) == 0

    assert capsys.readouterr().out.splitlines()[-1] == str(models / "tiny")
    assert names(models) == ["tiny"]
    assert (models / "tiny" / "seed").read_text() == "0\n"


def test_json_tells_path_seed_and_size(
    models: Path, python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(models / "a" / "b", python, "--seed", "7", "--json") == 0

    assert json.loads(capsys.readouterr().out) == {
        "path": str(models / "a" / "b"),
        "seed": 7,
        "parameters": 2623744,
        "tokens": 512,
    }


def test_the_script_sees_no_network_and_no_foreign_packages(
    models: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    make(models / "tiny", python)

    assert (models / "tiny" / "environment").read_text() == "offline=1 path=\n"


def test_whoever_may_read_the_directory_may_read_the_model(models: Path, tmp_path: Path) -> None:
    python = engine_python(tmp_path, WRITES + 'chmod 600 "$3/config.json"')
    make(models / "tiny", python)

    directory, file = models / "tiny", models / "tiny" / "config.json"
    assert file.stat().st_mode & 0o666 == directory.stat().st_mode & 0o666


def test_an_empty_directory_is_used(models: Path, python: Path) -> None:
    (models / "tiny").mkdir()

    assert make(models / "tiny", python) == 0
    assert (models / "tiny" / "config.json").exists()


def test_a_model_is_replaced_only_by_force(
    models: Path, python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(models / "tiny", python, "--seed", "1")

    assert make(models / "tiny", python, "--seed", "2") == 1
    assert "--force" in capsys.readouterr().err
    assert (models / "tiny" / "seed").read_text() == "1\n"

    assert make(models / "tiny", python, "--seed", "2", "--force") == 0
    assert (models / "tiny" / "seed").read_text() == "2\n"
    assert names(models) == ["tiny"]


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_is_no_model_is_never_replaced(models: Path, python: Path, force: list[str]) -> None:
    (models / "thesis").mkdir()
    (models / "thesis" / "chapter").write_text("ten years of work")
    (models / "note").write_text("a file")

    assert make(models / "thesis", python, *force) == 1
    assert make(models / "note", python, *force) == 1
    assert (models / "thesis" / "chapter").read_text() == "ten years of work"
    assert (models / "note").read_text() == "a file"


def test_a_failure_shows_why_and_leaves_what_was_there(
    models: Path, tmp_path: Path, python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(models / "tiny", python)

    assert make(models / "tiny", engine_python(tmp_path, FAILS), "--force") == 1
    assert "No module named transformers" in capsys.readouterr().err
    assert (models / "tiny" / "seed").exists()
    assert names(models) == ["tiny"]


def test_without_an_engine_environment_the_command_that_makes_one_is_named(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HIVE_ENGINES", str(tmp_path / "none"))

    assert cli.run(["model", "make-tiny", str(models / "tiny")]) == 1
    error = capsys.readouterr().err
    assert "WORKER_SPAWN_FAILED" in error
    assert "hive engine install cpu" in error
    assert names(models) == []


def test_a_place_that_cannot_be_written_is_named(
    models: Path, python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "file").write_text("")

    assert make(models / "file" / "tiny", python) == 1
    assert str(models / "file") in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(
    models: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    python = engine_python(tmp_path, HANGS)
    command = [sys.executable, "-m", "hive", "model", "make-tiny", models / "tiny"]
    hive = subprocess.Popen(
        [*map(str, command), "--python", str(python)], stderr=subprocess.DEVNULL, env=os.environ
    )
    deadline = time.monotonic() + 20
    while not list(models.glob(".tiny.*/config.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    hive.send_signal(number)

    assert hive.wait(10) == status
    assert names(models) == []

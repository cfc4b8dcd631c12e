"""The units for systemd: accepted by it, hardened, in step with the settings, each choice explained."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from hive.settings import Server, Settings, load
from hive.telemetry.systemd import start_s, stop_s
from steps.driver import run_hive

TOP = Path(__file__).parents[1]
SERVICE, SOCKET = TOP / "systemd" / "hive.service", TOP / "systemd" / "hive.socket"
PAGE = TOP / "docs" / "systemd.md"
PROGRAM = "/usr/local/bin/hive"
LEVEL = 3.0  # of `systemd-analyze security`, 0 (closed) to 10 (open); docs/systemd.md states it
FREE = {"Description", "ExecStart"}  # no choices
ANALYZE = shutil.which("systemd-analyze")
needs_analyze = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed here")


class Line(NamedTuple):
    """One assignment, and the comment directly above it."""

    section: str
    key: str
    value: str
    comment: str


def lines(text: str) -> Iterator[Line]:
    section, comment = "", ""
    for line in text.splitlines():
        if line.startswith("#"):
            comment += line.lstrip("# ") + " "
            continue
        if line.startswith("["):
            section = line.strip("[]")
        elif line:
            key, _, value = line.partition("=")
            yield Line(section, key, value, comment.strip())
        comment = ""


def values(unit: Path, section: str, key: str) -> list[str]:
    return [
        line.value for line in lines(unit.read_text()) if (line.section, line.key) == (section, key)
    ]


def value(unit: Path, section: str, key: str) -> str:
    (found,) = values(unit, section, key)
    return found


def environment(text: str) -> dict[str, str]:
    given = [line.value for line in lines(text) if line.key == "Environment"]
    return dict(assignment.split("=", 1) for assignment in given)


def drop_ins() -> dict[str, str]:
    """The examples on the page: file name and content."""
    found = re.findall(
        r"```ini\n# \S*/hive\.service\.d/(\w+\.conf)\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    assert len(found) == PAGE.read_text().count("```ini")
    return dict(found)


def runnable_copy(folder: Path, text: str | None = None) -> Path:
    """Both units in a folder of their own, with a program that exists."""
    program = folder / "hive"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    service = folder / SERVICE.name
    service.write_text((text or SERVICE.read_text()).replace(PROGRAM, str(program)))
    shutil.copy(SOCKET, folder)
    return service


def analyze(*args: str) -> subprocess.CompletedProcess[str]:
    assert ANALYZE
    return subprocess.run([ANALYZE, *args], capture_output=True, text=True, timeout=60, check=False)


def verify(*units: Path) -> tuple[int, list[str]]:
    """The exit status, and everything that is said of these units."""
    done = analyze("verify", "--man=no", "--recursive-errors=no", *map(str, units))
    said = (done.stdout + done.stderr).splitlines()
    return done.returncode, [line for line in said if "hive" in line]


# ── systemd's own opinion ───────────────────────────────────────────────────────────────────────


@needs_analyze
@pytest.mark.parametrize("name", [SERVICE.name, SOCKET.name])
def test_systemd_accepts_the_units_without_a_warning(tmp_path: Path, name: str) -> None:
    service = runnable_copy(tmp_path)

    assert verify(service.with_name(name)) == (0, [])


@needs_analyze
@pytest.mark.parametrize("name", drop_ins())
def test_systemd_accepts_each_example_of_the_page(tmp_path: Path, name: str) -> None:
    service = runnable_copy(tmp_path)
    folder = tmp_path / "hive.service.d"
    folder.mkdir()
    (folder / name).write_text(drop_ins()[name])

    assert verify(service) == (0, [])


@needs_analyze
@pytest.mark.parametrize(
    ("key", "mistake"),
    [("WatchdogSec=30", "WatchDogSec=30"), (PROGRAM, "/nowhere/hive")],
    ids=["unknown key", "no program"],
)
def test_a_mistake_would_be_seen(tmp_path: Path, key: str, mistake: str) -> None:
    service = runnable_copy(tmp_path, SERVICE.read_text().replace(key, mistake))

    code, said = verify(service)

    assert code != 0 or said


@needs_analyze
def test_the_service_is_as_closed_as_the_page_says(tmp_path: Path) -> None:
    assert f"the tests fail above **{LEVEL}**" in PAGE.read_text()
    service = runnable_copy(tmp_path)

    done = analyze(
        "security", "--offline=true", "--no-pager", f"--threshold={LEVEL * 10:.0f}", str(service)
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout


@needs_analyze
def test_a_more_open_service_would_be_seen(tmp_path: Path) -> None:
    opened = re.sub(
        r"^(Protect|Restrict|Capability).*$", "", SERVICE.read_text(), flags=re.MULTILINE
    )
    service = runnable_copy(tmp_path, opened)

    done = analyze("security", "--offline=true", f"--threshold={LEVEL * 10:.0f}", str(service))

    assert done.returncode != 0


# ── what the units say ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "expected"),
    {
        "Type": "notify",
        "NotifyAccess": "main",
        "ExecStartPre": "+-/usr/bin/nvidia-modprobe -u -c 0",
        "ExecStart": f"{PROGRAM} serve --config /etc/hive/hive.toml",
        "ExecStopPost": f"-{PROGRAM} sweep --config /etc/hive/hive.toml",
        "KillMode": "mixed",
        "Delegate": "yes",
        "OOMPolicy": "continue",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "1",
        "User": "hive",
        "StateDirectory": "hive",
        "StateDirectoryMode": "0700",
        "RuntimeDirectory": "hive",
        "RuntimeDirectoryMode": "0700",
        "RuntimeDirectoryPreserve": "yes",
        "CacheDirectory": "hive",
        "LimitMEMLOCK": "infinity",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        # What CUDA, its compilers, control groups for workers and naming a holder need open.
        "PrivateDevices": "no",
        "MemoryDenyWriteExecute": "no",
        "ProtectControlGroups": "no",
        "ProtectProc": "default",
        "ProtectClock": "no",
        "DevicePolicy": "auto",
    }.items(),
)
def test_the_service_says(key: str, expected: str) -> None:
    assert value(SERVICE, "Service", key) == expected


def test_no_device_is_closed_by_a_list_of_open_ones() -> None:
    """It would be made before ExecStartPre loads the driver."""
    assert values(SERVICE, "Service", "DeviceAllow") == []


def test_the_driver_comes_first() -> None:
    assert "nvidia-persistenced.service" in values(SERVICE, "Unit", "After")


def test_starting_again_and_again_ends() -> None:
    burst = int(value(SERVICE, "Unit", "StartLimitBurst"))
    interval_s = int(value(SERVICE, "Unit", "StartLimitIntervalSec"))
    pause_s = int(value(SERVICE, "Service", "RestartSec"))

    # Starts that fail at once, and starts that take all of their time, come within the interval.
    assert burst * pause_s < interval_s
    assert burst >= 3


def test_each_choice_has_its_reason_above_it() -> None:
    for unit in (SERVICE, SOCKET):
        silent = [
            f"{line.section}: {line.key}"
            for line in lines(unit.read_text())
            if line.section != "Install" and line.key not in FREE and len(line.comment.split()) < 4
        ]
        assert silent == [], unit.name


# ── in step with the settings ───────────────────────────────────────────────────────────────────


def seconds(key: str) -> float:
    return float(value(SERVICE, "Service", key))


def loaded(monkeypatch: pytest.MonkeyPatch, folder: Path, env: dict[str, str]) -> Settings:
    """One model and nothing else, in this environment."""
    for name in os.environ:
        if name.startswith(("HIVE_", "CUDA_")):
            monkeypatch.delenv(name)
    for name, given in env.items():
        monkeypatch.setenv(name, given)
    config = folder / "hive.toml"
    config.write_text(
        '[models.m]\nengine = "command"\ndevice = "cpu"\ncommand = ["p", "{socket}"]\n'
    )
    return load(config)


def test_systemd_waits_as_long_as_hive_may_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = loaded(monkeypatch, tmp_path, environment(SERVICE.read_text()))

    assert settings.server.driver_wait_s == 30
    assert seconds("TimeoutStartSec") == start_s(settings)
    assert seconds("TimeoutStopSec") == stop_s(settings)
    assert seconds("TimeoutStopSec") >= Server.model_fields["drain_s"].default + 30


def test_the_page_changes_draining_by_the_rule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = drop_ins()["drain.conf"]
    settings = loaded(monkeypatch, tmp_path, environment(text))
    (given,) = (float(line.value) for line in lines(text) if line.key == "TimeoutStopSec")

    assert settings.server.drain_s == 300
    assert given == stop_s(settings)


def test_hive_finds_the_services_directories(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {
        "STATE_DIRECTORY": f"/var/lib/{value(SERVICE, 'Service', 'StateDirectory')}",
        "RUNTIME_DIRECTORY": f"/run/{value(SERVICE, 'Service', 'RuntimeDirectory')}",
    }
    server = loaded(monkeypatch, tmp_path, given).server

    assert str(server.state_dir) == "/var/lib/hive"
    assert str(server.runtime_dir) == "/run/hive"


def test_the_socket_has_the_address_of_the_settings() -> None:
    host, port = Server.model_fields["host"].default, Server.model_fields["port"].default

    assert value(SOCKET, "Socket", "ListenStream") == f"{host}:{port}"
    assert value(SOCKET, "Socket", "Accept") == "no"


@pytest.mark.parametrize("key", ["ExecStart", "ExecStopPost"])
def test_the_commands_of_the_service_exist(key: str) -> None:
    command = value(SERVICE, "Service", key).lstrip("-").split()
    assert command[0] == PROGRAM

    ran = run_hive(command[1], "--help")

    assert ran.code == 0, ran.err
    assert command[2] in ran.out

"""The command line as a whole: its commands, and the exit code of every way out."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from hive import __version__, cli
from hive.cli import COMMANDS
from hive.client.http import address
from hive.workers import guard
from steps.waiting import until
from tests.patience import short_directory

HIVE = [sys.executable, "-m", "hive"]
CONFIG = """
[models.small]
engine = "command"
device = "cpu"
command = ["sleep", "600", "{socket}"]
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("HIVE_", "CUDA_VISIBLE"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A port on which connections are taken and never answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        yield server


def url_of(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HIVE, *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **env},
    )


# ── Exit codes ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("args", [["--help"], ["explain", "NOT_FOUND"]])
def test_success_is_0(args: list[str]) -> None:
    """(R060)"""
    done = run(*args)

    assert done.returncode == 0
    assert done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "args", [["explain", "NO_SUCH_CODE"], ["check", "--config", "gone.toml"], ["key", "list"]]
)
def test_an_error_is_1_with_its_code_and_what_to_do(args: list[str]) -> None:
    """(R029, R061)"""
    done = run(*args)

    assert done.returncode == 1
    assert done.stdout == ""
    assert "hive: what to do: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["no-such-command"],
        ["explain", "--no-such-option"],
        ["worker", "show"],
        ["worker", "logs", "a", "--lines", "-1"],
        ["worker", "start", "a", "--wait", "nan"],
        ["worker", "start", "a", "--wait", "-1"],
        ["leaks", "--timeout", "0"],
        ["leaks", "--timeout", "-1"],
        ["leaks", "--timeout", "inf"],
        ["leaks", "--timeout", "nan"],
        ["leaks", "--api-key", "a\nb"],
        ["leaks", "--api-key", "a\udcff"],
        ["test-connection"],
        ["-x"],
    ],
)
def test_wrong_usage_is_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(args) == 2
    assert "Usage: hive" in capsys.readouterr().err


def test_no_command_at_all_is_wrong_usage_too() -> None:
    done = run()

    assert done.returncode == 2
    assert "Usage: hive" in done.stderr


def test_a_damaged_installation_is_70(tmp_path: Path) -> None:
    """An import error is an internal error like any other."""
    (tmp_path / "click.py").write_text("raise ImportError('this file is damaged')\n")
    done = run("status", PYTHONPATH=str(tmp_path))

    assert done.returncode == 70
    assert "ImportError: this file is damaged" in done.stderr
    assert "internal error (exit 70)" in done.stderr


def test_an_address_in_use_is_70_and_the_last_line_is_the_error(silent: socket.socket) -> None:
    """So the service manager tries again."""
    Path("hive.toml").write_text(CONFIG)
    port = str(silent.getsockname()[1])
    with short_directory() as home:
        where = ["--runtime-dir", str(home / "r"), "--state-dir", str(home / "s")]
        done = run("serve", "--config", "hive.toml", "--port", port, *where)
    error = json.loads(done.stderr.splitlines()[-1])["error"]

    assert done.returncode == 70
    assert error["code"] == "ADDRESS_IN_USE"
    assert error["details"]["suggested_action"]


def test_a_configuration_that_is_wrong_ends_the_start_with_1(tmp_path: Path) -> None:
    """Before it listens; the last line is the error as JSON, the others name all problems (R061)."""
    Path("hive.toml").write_text("[server]\nprot = 1\nport = -1\n" + CONFIG)
    done = run("serve")
    *lines, last = done.stderr.splitlines()

    assert done.returncode == 1
    assert json.loads(last)["error"]["code"] == "CONFIG_INVALID"
    assert any("did you mean 'port'?" in line for line in lines)
    assert any("(got -1)" in line for line in lines)


def test_a_timeout_is_124(silent: socket.socket) -> None:
    """(R062)"""
    done = run("status", "--url", url_of(silent), "--timeout", "0.2")

    assert done.returncode == 124
    assert "OPERATION_TIMEOUT: The daemon did not answer within 0.2 s." in done.stderr


def test_ctrl_c_is_130(silent: socket.socket) -> None:
    with subprocess.Popen(
        [*HIVE, "status", "--url", url_of(silent)], stderr=subprocess.PIPE, text=True
    ) as process:
        asked, _ = silent.accept()
        with asked:
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Traceback" not in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_check_that_is_ended_leaves_no_engines_python_behind(number: int) -> None:
    Path("python").write_text("#!/bin/sh\necho $$ >pid\nsetsid sleep 600 &\nsleep 600\n")
    Path("python").chmod(0o700)
    model = 'engine = "vllm"\ndevice = "cpu"\npath = "org/model"\npython = "./python"\n'
    Path("hive.toml").write_text(f"[models.m]\n{model}")
    with short_directory() as home:
        where = ["--runtime-dir", str(home / "r"), "--state-dir", str(home / "s")]
        with subprocess.Popen([*HIVE, "check", *where], stderr=subprocess.DEVNULL) as process:
            assert until(lambda: Path("pid").exists() and Path("pid").read_text(), 30)
            process.send_signal(number)
            process.wait(30)

    asked = int(Path("pid").read_text())
    left = [p for p in guard.every_process() if (guard.mark_of(p.pid) or "").startswith("ask-")]
    assert guard.look_at(asked) is None
    assert left == []


@pytest.mark.parametrize("args", [["health"], ["worker", "logs", "a-0"]])
def test_no_daemon_is_255(args: list[str]) -> None:
    """(R064)"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = url_of(server)
    done = run(*args, "--url", url)

    assert done.returncode == 255
    assert "DAEMON_UNREACHABLE" in done.stderr


def test_the_daemon_is_looked_for_where_the_configuration_says() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    Path("hive.toml").write_text(f"[server]\nport = {port}\n{CONFIG}")

    assert f"http://127.0.0.1:{port}" in run("status").stderr


@pytest.mark.parametrize(
    "text", ["server = 5", "[server]\nhost = [1]\nport = {a = 1}", "[" * 5000, "a = " + "9" * 5000]
)
def test_a_configuration_that_is_wrong_hides_no_daemon(text: str) -> None:
    """Operators look after a hive that runs with what the file said before."""
    Path("hive.toml").write_text(text)

    assert "127.0.0.1:7411" in address(None) or "a = 1" in text


def test_a_configuration_that_is_a_pipe_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo("pipe.toml")
    monkeypatch.setenv("HIVE_CONFIG", "pipe.toml")

    assert address(None) == "http://127.0.0.1:7411"


@pytest.mark.parametrize("args", [["sweep"], ["check"], ["key", "list"]])
def test_no_command_waits_for_a_pipe_as_its_configuration(args: list[str]) -> None:
    os.mkfifo("pipe.toml")
    done = run(*args, "--config", "pipe.toml")

    assert done.returncode == 1
    assert "pipe.toml: cannot be read: it is not a regular file." in done.stderr


@pytest.mark.parametrize("args", [["explain"], ["explain", "--json"]], ids=["table", "json"])
def test_a_reader_that_leaves_early_is_no_error(args: list[str]) -> None:
    """`hive explain | head -1`"""
    pipe = subprocess.PIPE
    with subprocess.Popen([*HIVE, *args], stdout=pipe, stderr=pipe) as it:
        assert it.stdout
        assert it.stderr
        it.stdout.close()
        told = it.stderr.read()

    assert it.returncode == 0
    assert told == b""


# ── Commands ────────────────────────────────────────────────────────────────────────────────────


def every_command() -> Iterator[tuple[str, click.Command]]:
    def below(
        name: str, command: click.Command, ctx: click.Context
    ) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        if isinstance(command, click.Group):
            for child in command.list_commands(ctx):
                found = command.get_command(ctx, child)
                assert found, child
                yield from below(f"{name} {child}", found, click.Context(found, parent=ctx))

    yield from below("hive", cli.hive, click.Context(cli.hive))


def test_every_command_and_every_option_has_a_help_text() -> None:
    silent = [name for name, command in every_command() if not command.help]
    bare = [
        f"{name} {option.opts[0]}"
        for name, command in every_command()
        for option in command.params
        if isinstance(option, click.Option) and not (option.help or option.show_default)
    ]

    assert silent == []
    assert bare == []


def test_the_list_of_commands_says_what_each_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())

    for name, (_, _, text) in COMMANDS.items():
        assert f"{name} {text}" in told


def test_everything_that_prints_can_print_json() -> None:
    """But `serve`, which does not, logs, which are text, and `mcp`, which speaks a protocol."""
    quiet = {"hive serve", "hive worker logs", "hive mcp"}
    without = {
        name
        for name, command in every_command()
        if not isinstance(command, click.Group)
        and not any("--json" in option.opts for option in command.params)
    }

    assert without - quiet == set()


def test_with_json_an_error_is_its_body(capsys: pytest.CaptureFixture[str]) -> None:
    """The same as over HTTP (R027)."""
    assert cli.run(["explain", "NOPE", "--json"]) == 1

    assert json.loads(capsys.readouterr().out)["error"]["code"] == "NOT_FOUND"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from hive.cli import run; run(['--help']); "
        "print(*{'aiohttp', 'uvloop', 'pydantic', 'rich', 'prometheus_client'} & set(sys.modules), "
        "file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stderr.strip() == ""


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"hive, version {__version__}"

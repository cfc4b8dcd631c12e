"""The `command` engine: what is started, in which environment, and what is asked of it."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hive.errors import WorkerSpawnFailed
from hive.settings import Model
from hive.workers.client import EngineClient, ProbeFailed
from hive.workers.command import CommandEngine
from hive.workers.process import Place
from hive.workers.site import Site
from tests.doubles import engine_command
from tests.patience import awaited, short_directory, wait_until

PLACE = Place(Path("/run/hive/w/1"), Path("/dev/null"))


def engine(command: list[str] | None = None, **more: Any) -> CommandEngine:
    given = {"engine": "command", "device": "cpu", "command": command or ["sh", "{socket}"], **more}
    return CommandEngine("llama", Model.model_validate(given))


def env_of(visible: str | None = None, **more: Any) -> dict[str, str]:
    return dict(engine(**more).launch(PLACE, ("cpu",), visible, 0).env)


# ── Arguments ───────────────────────────────────────────────────────────────────────────────────


def test_placeholders_are_filled_in_and_args_come_last_as_they_are() -> None:
    command = ["sh", "--uds={socket}", "{model}:{device}", "{other}"]
    made = engine(command, args=["--x", "{model}"])
    launch = made.launch(PLACE, ("cuda:1", "cuda:2"), "A,B", 2**30)

    assert launch.argv[0].endswith("/sh")
    assert launch.argv[1:] == [
        "--uds=/run/hive/w/1/s",
        "llama:cuda:1,cuda:2",
        "{other}",
        "--x",
        "{model}",
    ]
    assert launch.vital == ()


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(WorkerSpawnFailed, match=r"llama.*'no-such-program'") as caught:
        engine(["no-such-program", "{socket}"]).launch(PLACE, ("cpu",), None, 0)

    assert "'command'" in caught.value.suggested_action


def test_a_command_with_windows_is_told_of_lmcache(tmp_path: Path) -> None:
    """Where it is, by which path it knows the model, and how many tokens a chunk has."""
    command = ["sh", "{socket}", "--kv={kv}", "{kv_path}", "{kv_chunk}:{kv_chunk}"]
    given = {"engine": "command", "device": "cpu", "command": command, "windows": True}
    made = CommandEngine("llama", Model.model_validate(given), Site(tmp_path, 11, 12, 64))
    launch = made.launch(PLACE, ("cpu",), None, 0)

    assert launch.identity is not None
    assert launch.identity.chunk_tokens == 64
    assert Path(launch.kv_path).parent == tmp_path / "m"
    assert launch.argv[2:] == ["--kv=127.0.0.1:11", launch.kv_path, "64:64"]
    again = made.launch(Place(Path("/run/hive/w/2"), Path("/dev/null")), ("cpu",), None, 0)
    assert again.kv_path == launch.kv_path
    both = made.launch(PLACE, ("cuda:0", "cuda:1"), "A,B", 0)
    assert both.kv_path != launch.kv_path  # each has a part of a chunk only


def test_a_command_without_windows_is_told_nothing_of_lmcache(tmp_path: Path) -> None:
    command = ["sh", "{socket}", "{kv}{kv_path}{kv_chunk}"]
    given = {"engine": "command", "device": "cpu", "command": command}
    made = CommandEngine("llama", Model.model_validate(given), Site(tmp_path, 11, 12, 64))
    launch = made.launch(PLACE, ("cpu",), None, 0)

    assert launch.argv[2:] == ["{kv}{kv_path}{kv_chunk}"]
    assert (launch.identity, launch.kv_path) == (None, "")
    assert list(tmp_path.iterdir()) == []


# ── Environment ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name",
    ["HIVE_SERVER__PORT", "HIVE_ENGINES", "NOTIFY_SOCKET", "LISTEN_FDS", "WATCHDOG_USEC"],
)
def test_what_is_hives_alone_is_not_inherited(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")

    assert name not in env_of()


def test_the_rest_of_hives_environment_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    monkeypatch.setenv("HF_HOME", "/models")
    env = env_of()

    assert env["LD_LIBRARY_PATH"] == "/opt/lib"
    assert env["HF_HOME"] == "/models"


def test_the_models_own_environment_wins_except_over_hives_marks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without its mark and its TMPDIR an engine's remains would not be found."""
    monkeypatch.setenv("LANG", "C")
    env = env_of(env={"LANG": "de", "HIVE_MARK": "x", "TMPDIR": "/tmp", "SPT_NOENV": ""})

    assert env["LANG"] == "de"
    assert env["HIVE_MARK"] == PLACE.mark
    assert env["TMPDIR"] == "/run/hive/w/1/t"
    assert env["SPT_NOENV"] == "1"


def test_the_engine_sees_its_devices_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the variable is empty and not absent: without it every GPU would be seen."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")

    assert env_of("GPU-a,GPU-b")["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert env_of(None)["CUDA_VISIBLE_DEVICES"] == ""


# ── Probes, against the engine double ───────────────────────────────────────────────────────────


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@contextmanager
def doubled(*flags: str) -> Iterator[Path]:
    """The engine double's socket."""
    with short_directory() as home:
        socket_path = home / "s"
        command = engine_command("--uds", str(socket_path), "--model", "m", *flags)
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                wait_until(lambda: listens(socket_path), "the double to listen")
                yield socket_path
            finally:
                process.kill()


async def asked(client: EngineClient) -> set[str]:
    state = json.loads(await client.must("GET", "/double/state"))
    return {what for what in state["counts"] if "/double/" not in what}


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (None, "POST /v1/completions"),
        ("completion", "POST /v1/completions"),
        ("chat", "POST /v1/chat/completions"),
        ("embedding", "POST /v1/embeddings"),
        ("health", "GET /health"),
    ],
)
@awaited
async def test_a_probe_is_one_small_piece_of_the_engines_work(kind: str | None, what: str) -> None:
    with doubled() as path:
        async with EngineClient(path, "m") as client:
            await engine(probe=kind).probe(client)

            assert await asked(client) == {what}


@awaited
async def test_a_probe_that_is_answered_with_an_error_fails_and_says_so() -> None:
    with doubled("--answer-status", "500", "--health-status", "503") as path:
        async with EngineClient(path, "m") as client:
            with pytest.raises(ProbeFailed, match=r"POST /v1/embeddings: status 500"):
                await engine(probe="embedding").probe(client)
            with pytest.raises(ProbeFailed, match=r"GET /health: status 503"):
                await engine(probe="health").probe(client)


@awaited
async def test_the_health_probe_asks_the_configured_path() -> None:
    with doubled() as path:
        async with EngineClient(path, "m") as client:
            await engine(probe="health", health_path="/version").probe(client)

            assert await asked(client) == {"GET /version"}


@awaited
async def test_a_probe_without_an_engine_fails(tmp_path: Path) -> None:
    async with EngineClient(tmp_path / "none", "m") as client:
        with pytest.raises(ProbeFailed, match="POST /v1/completions"):
            await engine().probe(client)


def test_an_engine_shows_what_it_is() -> None:
    assert repr(engine([sys.executable, "{socket}"])) == f"<CommandEngine llama {sys.executable}>"

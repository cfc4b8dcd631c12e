"""The LMCache server: which program it is, what it is told, and when it is ready."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hive.errors import WorkerSpawnFailed
from hive.settings import Settings
from hive.workers.client import EngineClient, ProbeFailed
from hive.workers.lmcache import KvServer, program_of
from hive.workers.process import Place
from hive.workers.site import Site, free_ports
from tests.doubles import lmcache_command
from tests.patience import awaited

PLACE = Place(Path("/run/hive/w/1"), Path("/dev/null"))
COMMAND = {
    "engine": "command",
    "device": "cpu",
    "command": ["sh", "{socket}", "{kv}"],
    "windows": True,
}
VLLM = {"engine": "vllm", "device": "cpu", "path": "/m", "windows": True}


def settings(*models: dict[str, Any], **windows: Any) -> Settings:
    named = {f"m{number}": model for number, model in enumerate(models)}
    return Settings.model_validate({"windows": windows, "models": named})


def server(tmp_path: Path, **windows: Any) -> KvServer:
    port, http_port = free_ports(2)
    given = {"kv_server": lmcache_command(), **windows}
    made = settings(COMMAND, **given)
    return KvServer(made, Site(tmp_path, port, http_port, made.windows.kv_chunk_tokens))


def option(argv: list[str], name: str) -> str:
    assert argv.count(name) == 1
    return argv[argv.index(name) + 1]


# ── Which program ───────────────────────────────────────────────────────────────────────────────


def test_a_configured_program_is_found_and_keeps_its_arguments() -> None:
    program = program_of(settings(COMMAND, kv_server=["sh", "-c", "exit"]))

    assert Path(program[0]).is_absolute()
    assert program[0].endswith("/sh")
    assert program[1:] == ["-c", "exit"]


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(WorkerSpawnFailed, match=r"windows\.kv_server: .*'no-such'") as caught:
        program_of(settings(COMMAND, kv_server=["no-such"]))

    assert caught.value.details["expected"] == "no-such"


def test_it_comes_from_the_environment_of_an_engine_that_uses_it(tmp_path: Path) -> None:
    """Not of one without windows, which need not have LMCache; a vLLM rather than a command."""
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    without = {**VLLM, "windows": False, "python": "/no/such/python"}
    program = program_of(settings(without, COMMAND, {**VLLM, "python": str(python)}))

    assert program == [str(python), "-m", "lmcache.cli.main"]  # a venv's link stays one
    with pytest.raises(WorkerSpawnFailed, match="m0"):
        program_of(settings({**without, "windows": True}))


# ── What it is told ─────────────────────────────────────────────────────────────────────────────


def test_lmcache_is_told_where_and_how_to_keep_the_blocks(tmp_path: Path) -> None:
    made = server(tmp_path, kv_ram_gib=2.5, kv_chunk_tokens=64)
    launch = made.launch(PLACE, ("cpu",), None, 0)
    argv = list(launch.argv)

    assert argv[: len(lmcache_command()) + 1] == [*lmcache_command(), "server"]
    assert (option(argv, "--host"), option(argv, "--http-host")) == ("127.0.0.1", "127.0.0.1")
    assert option(argv, "--port") == str(made.site.port)
    assert option(argv, "--http-port") == str(made.site.http_port)
    assert (option(argv, "--l1-size-gb"), option(argv, "--chunk-size")) == ("2.5", "64")
    assert option(argv, "--supported-transfer-mode") == "engine_driven"
    assert option(argv, "--l2-store-policy") == "skip_l1"
    assert json.loads(option(argv, "--l2-adapter")) == {
        "type": "fs",
        "base_path": str(tmp_path / "kv"),
        "relative_tmp_dir": "tmp",
    }
    assert made.address == f"http://127.0.0.1:{made.site.http_port}"
    assert repr(made) == f"<KvServer 127.0.0.1:{made.site.port}>"


def test_it_runs_without_a_gpu_and_tells_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    env = server(tmp_path).launch(PLACE, ("cpu",), None, 0).env

    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert (env["DO_NOT_TRACK"], env["LMCACHE_TRACK_USAGE"]) == ("1", "false")
    assert env["HIVE_MARK"] == PLACE.mark
    assert env["PYTHONHASHSEED"] == "0"  # else its names would differ from one start to the next
    assert "NOTIFY_SOCKET" not in env


# ── When it is ready, against the double ────────────────────────────────────────────────────────


@contextmanager
def running(made: KvServer) -> Iterator[None]:
    launch = made.launch(PLACE, ("cpu",), None, 0)
    (made.site.tier / "tmp").mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(launch.argv, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


@awaited
async def test_it_is_ready_when_it_says_that_it_is_well(tmp_path: Path) -> None:
    made = server(tmp_path)
    async with EngineClient(tmp_path / "none", "", made.address) as client:
        with pytest.raises(ProbeFailed, match="GET /healthcheck"):
            await made.probe(client)
        with running(made):
            while not await client.is_healthy(made.health_path):
                pass
            await made.probe(client)
            await client.must("POST", "/double/knobs", {"health_status": 503})
            with pytest.raises(ProbeFailed, match="GET /healthcheck: status 503"):
                await made.probe(client)
            assert not await client.is_healthy(made.health_path)

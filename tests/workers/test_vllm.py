"""The `vllm` engine: its command line and environment, and how its task is found out."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hive.errors import WorkerSpawnFailed
from hive.settings import Model
from hive.workers.client import EngineClient
from hive.workers.process import Launch, Place
from hive.workers.vllm import VITAL, VllmEngine, python_of
from tests.patience import awaited, short_directory

PLACE = Place(Path("/run/hive/w/1"), Path("/dev/null"))
UUID = "GPU-3b1f77aa"


def engine(device: Any = "cpu", **more: Any) -> VllmEngine:
    given = {"engine": "vllm", "path": "org/llama", "device": device, "python": sys.executable}
    return VllmEngine("llama", Model.model_validate({**given, **more}))


def launch(device: Any = "cpu", visible: str | None = None, **more: Any) -> Launch:
    made = engine(device, **more)
    assert made.model.device
    return made.launch(PLACE, made.model.device, visible)


def added(started: Launch) -> dict[str, str]:
    """What hive put into the engine's environment."""
    return {k: v for k, v in started.env.items() if os.environ.get(k) != v}


def test_vllm_serves_the_model_by_its_name_on_the_workers_socket() -> None:
    started = launch()

    assert started.argv == [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        "org/llama",
        "--served-model-name",
        "llama",
        "--uds",
        "/run/hive/w/1/s",
        "--disable-uvicorn-access-log",
    ]
    assert started.env["HIVE_MARK"] == PLACE.mark
    assert started.env["VLLM_NO_USAGE_STATS"] == "1"
    assert started.env["PYTHONHASHSEED"] == "0"


@pytest.mark.parametrize("device", ["cpu", "cuda:0", ["cuda:0", "cuda:1"]])
def test_a_core_or_a_rank_that_ends_is_the_engines_end(device: Any) -> None:
    """The kernel keeps 15 characters of a process's name."""
    assert launch(device, UUID).vital == VITAL
    assert all(len(name) <= 15 for name in VITAL)


def test_the_operators_own_arguments_come_last_and_win() -> None:
    started = launch(args=["--max-model-len", "512"], env={"PYTHONHASHSEED": "5"})

    assert started.argv[-2:] == ["--max-model-len", "512"]
    assert started.env["PYTHONHASHSEED"] == "5"


def test_a_model_directory_is_never_looked_up_on_the_hub(tmp_path: Path) -> None:
    assert launch(path=str(tmp_path)).env["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in added(launch())


# ── Devices ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cache", [0, 2])
@pytest.mark.parametrize("device", ["cuda:0", UUID])
def test_a_gpus_engine_hears_of_no_other_device_and_of_no_cpu(device: str, cache: float) -> None:
    """(R013, R014)"""
    started = launch(device, UUID, kv_cache_gib=cache)
    words = " ".join([*started.argv[1:], *added(started), *added(started).values()]).lower()

    assert started.env["CUDA_VISIBLE_DEVICES"] == UUID
    assert "cpu" not in words
    assert "cuda:" not in words
    assert "--device" not in started.argv
    assert "fallback" not in words
    assert words.count("gpu-") == 1


def test_a_cpu_engine_can_see_no_gpu() -> None:
    started = launch("cpu")

    assert started.env["CUDA_VISIBLE_DEVICES"] == ""
    assert "gpu" not in " ".join(started.argv[1:]).lower()


def test_an_engine_that_computes_on_the_cpu_leaves_hive_the_time_to_answer() -> None:
    assert launch().nice > 0
    assert launch("cuda:0", UUID).nice == 0


def test_several_devices_are_one_tensor_parallel_worker() -> None:
    started = launch(["cuda:0", "cuda:1"], "GPU-a,GPU-b")

    assert started.argv[-2:] == ["--tensor-parallel-size", "2"]
    assert started.env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert "--tensor-parallel-size" not in launch("cuda:0", UUID).argv


@pytest.mark.parametrize(("configured", "gib"), [(0, "1"), (0.5, "0.5"), (4, "4")])
def test_on_the_cpu_the_kv_cache_is_said_in_the_environment(configured: float, gib: str) -> None:
    started = launch("cpu", kv_cache_gib=configured)

    assert started.env["VLLM_CPU_KVCACHE_SPACE"] == gib
    assert "--kv-cache-memory-bytes" not in started.argv


def test_on_a_gpu_the_kv_cache_is_said_in_bytes_or_left_to_vllm() -> None:
    started = launch("cuda:0", UUID, kv_cache_gib=1.5)

    assert started.argv[-2:] == ["--kv-cache-memory-bytes", str(3 * 2**29)]
    assert "--kv-cache-memory-bytes" not in launch("cuda:0", UUID).argv


# ── The engine's Python ─────────────────────────────────────────────────────────────────────────


def test_a_python_that_does_not_exist_is_named() -> None:
    with pytest.raises(WorkerSpawnFailed, match=r"llama.*does not exist") as caught:
        launch(python="/no/such/python")

    assert caught.value.details["expected"] == "/no/such/python"
    assert "'python'" in caught.value.suggested_action


def test_without_any_environment_the_way_to_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIVE_ENGINES", str(tmp_path))
    with pytest.raises(WorkerSpawnFailed, match="no engine environment") as caught:
        python_of("llama", engine(python=None).model)

    assert "hive engine install cpu" in caught.value.suggested_action


# ── The model's task ────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def serving(*posts: str) -> AsyncIterator[tuple[EngineClient, list[str]]]:
    """A server with these routes for POST, as vLLM registers them by task; what was done there."""
    done: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        done.append(f"{request.method} {request.path}")
        return web.json_response({})

    app = web.Application()
    app.add_routes([web.get("/health", answer), *(web.post(path, answer) for path in posts)])
    runner = web.AppRunner(app)
    await runner.setup()
    with short_directory() as home:
        await web.UnixSite(runner, str(home / "s")).start()
        try:
            async with EngineClient(home / "s", "llama") as client:
                yield client, done
        finally:
            await runner.cleanup()


@pytest.mark.parametrize(
    ("posts", "probed"),
    [
        (["/v1/completions", "/v1/chat/completions"], "POST /v1/completions"),
        (["/v1/embeddings", "/pooling"], "POST /v1/embeddings"),
        (["/classify", "/pooling"], "POST /classify"),
        (["/pooling"], "POST /pooling"),
        (["/v1/audio/transcriptions"], "GET /health"),
    ],
)
@awaited
async def test_a_model_is_probed_with_the_work_that_it_is_for(
    posts: list[str], probed: str
) -> None:
    async with serving(*posts) as (client, done):
        await engine().probe(client)

        assert done == [probed]


@awaited
async def test_a_configured_probe_is_not_second_guessed() -> None:
    async with serving("/v1/completions", "/v1/chat/completions") as (client, done):
        await engine(probe="chat").probe(client)

        assert done == ["POST /v1/chat/completions"]

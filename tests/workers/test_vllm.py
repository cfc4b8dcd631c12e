"""The `vllm` engine: its command line and environment, and how its task is found out."""

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hive.errors import ConfigInvalid, WorkerSpawnFailed
from hive.settings import Model
from hive.workers.client import EngineClient
from hive.workers.footprint import vram_needed
from hive.workers.process import Launch, Place
from hive.workers.site import Site
from hive.workers.vllm import VITAL, VllmEngine, files_of, on_cuda, python_of
from tests.patience import awaited, short_directory

PLACE = Place(Path("/run/hive/w/1"), Path("/dev/null"))
UUID = "GPU-3b1f77aa"
GIB = 2**30
TOTAL = 80 * GIB


def engine(device: Any = "cpu", **more: Any) -> VllmEngine:
    given = {"engine": "vllm", "path": "org/llama", "device": device, "python": sys.executable}
    return VllmEngine("llama", Model.model_validate({**given, **more}))


def launch(device: Any = "cpu", visible: str | None = None, **more: Any) -> Launch:
    made = engine(device, **more)
    assert made.model.device
    total = 0 if made.model.device == ("cpu",) else TOTAL
    return made.launch(PLACE, made.model.device, visible, total)


def after(started: Launch, option: str) -> str | None:
    """The value of an option that is there once; None when it is not there."""
    found = [started.argv[at + 1] for at, part in enumerate(started.argv) if part == option]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A whole model with 10 GiB of weights, which take no room."""
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.bin").open("wb") as weights:
        weights.truncate(10 * GIB)
    return tmp_path


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
        "--enable-log-requests",
        "--max-log-len",
        "0",
        "--kv-cache-memory-bytes",
        str(2**30),
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


# ── The model's files ───────────────────────────────────────────────────────────────────────────


def test_the_weights_of_a_directory_are_known_and_those_of_a_hub_id_are_not(
    model_dir: Path,
) -> None:
    found = files_of("m", engine(path=str(model_dir)).model)

    assert found is not None
    assert found.weights_bytes == 10 * GIB
    assert files_of("m", engine(path="org/llama").model) is None


@pytest.mark.parametrize("args", [["--load-format", "dummy"], ["--load_format=runai_streamer"]])
def test_what_another_loader_reads_or_makes_up_is_not_looked_at(
    args: list[str], tmp_path: Path
) -> None:
    model = engine(path=str(tmp_path), args=args).model

    assert files_of("m", model) is None
    with pytest.raises(ConfigInvalid, match=r"models\.m\.path: .* is no whole model"):
        files_of("m", engine(path=str(tmp_path)).model)


@pytest.mark.parametrize("path", ["/no/such/model", "./no-such-model", "~no-such-model"])
def test_a_path_that_does_not_exist_is_no_hub_id(path: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"models\.m\.path: .* is not a directory"):
        files_of("m", engine(path=path, args=["--load-format", "dummy"]).model)


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


# ── Memory ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("configured", "gib"), [(0, 1), (0.5, 0.5), (4, 4)])
def test_the_kv_cache_on_the_cpu_is_said_in_bytes(configured: float, gib: float) -> None:
    """vLLM takes VLLM_CPU_KVCACHE_SPACE with int(), so half a GiB would end its start."""
    started = launch("cpu", kv_cache_gib=configured)

    assert after(started, "--kv-cache-memory-bytes") == str(int(gib * GIB))
    assert after(started, "--gpu-memory-utilization") is None


def test_what_hives_environment_says_of_the_kv_cache_is_not_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would win over what the model states; the model's own environment may say it."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")

    assert "VLLM_CPU_KVCACHE_SPACE" not in launch("cpu").env
    own = launch("cpu", env={"VLLM_CPU_KVCACHE_SPACE": "3"})
    assert own.env["VLLM_CPU_KVCACHE_SPACE"] == "3"


def test_on_a_gpu_nothing_is_said_of_memory_unless_it_is_stated(model_dir: Path) -> None:
    started = launch("cuda:0", UUID, path=str(model_dir))

    assert after(started, "--kv-cache-memory-bytes") is None
    assert after(started, "--gpu-memory-utilization") is None


def test_a_stated_need_is_the_claim_of_vllm_and_its_context() -> None:
    started = launch("cuda:0", UUID, required_vram_gib=20.5)

    assert after(started, "--gpu-memory-utilization") == "0.2499"
    assert after(started, "--kv-cache-memory-bytes") is None


def test_a_stated_kv_cache_is_claimed_with_weights_and_activations(model_dir: Path) -> None:
    started = launch("cuda:0", UUID, path=str(model_dir), kv_cache_gib=1.5)

    assert after(started, "--kv-cache-memory-bytes") == str(3 * 2**29)
    assert after(started, "--gpu-memory-utilization") == "0.1562"  # 10 + 1.5 + 1 of 80
    pair = launch(["cuda:0", "cuda:1"], "A,B", path=str(model_dir), kv_cache_gib=1.5)
    assert after(pair, "--gpu-memory-utilization") == "0.0937"


@pytest.mark.parametrize("args", [[], ["--load-format", "dummy"]])
def test_without_known_weights_vllm_keeps_its_own_claim(args: list[str], model_dir: Path) -> None:
    path = str(model_dir) if args else "org/llama"
    started = launch("cuda:0", UUID, path=path, kv_cache_gib=1.5, args=args)

    assert after(started, "--kv-cache-memory-bytes") == str(3 * 2**29)
    assert after(started, "--gpu-memory-utilization") is None


def test_a_utilization_of_the_operators_own_is_the_only_one() -> None:
    started = launch("cuda:0", UUID, required_vram_gib=20, args=["--gpu_memory_utilization=0.5"])

    assert "utilization" not in " ".join(started.argv[:-1])


def test_a_utilization_that_vllm_would_not_take_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"models\.llama\.args: --gpu-memory-utilization 92"):
        launch("cuda:0", UUID, args=["--gpu-memory-utilization", "92"])


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"required_vram_gib": 0.1},
        {"required_vram_gib": 33},
        {"kv_cache_gib": 7},
        {"kv_cache_gib": 7, "required_vram_gib": 30},
        {"kv_cache_gib": 7, "args": ["--quantization", "fp8"]},
        {"required_vram_gib": 30, "args": ["--gpu-mem", "0.9"]},
        {"required_vram_gib": 30, "args": ["--gpu-mem", "0.1"]},
    ],
)
def test_what_is_passed_on_is_free_when_the_preflight_has_found_its_need(
    stated: dict[str, Any], model_dir: Path
) -> None:
    made = engine("cuda:0", path=str(model_dir), **stated)
    need = vram_needed("llama", made.model, files_of("llama", made.model), 1, TOTAL)
    started = launch("cuda:0", UUID, path=str(model_dir), **stated)
    given = after(started, "--gpu-memory-utilization") or after(started, "--gpu-mem") or "0.92"

    assert need is not None
    assert float(given) * TOTAL + 0.5 * GIB <= need.bytes


# ── LMCache beside it ───────────────────────────────────────────────────────────────────────────


def beside(state: Path, **more: Any) -> Launch:
    given = {"engine": "vllm", "device": "cpu", "python": sys.executable, "windows": True, **more}
    made = VllmEngine("llama", Model.model_validate(given), Site(state, 11, 12, 256))
    assert made.model.device
    return made.launch(PLACE, made.model.device, None, 0)


def test_vllm_is_told_of_lmcache_with_limits(model_dir: Path, tmp_path: Path) -> None:
    """One that hangs must not hang the engine, and one that is lost loses no request."""
    started = beside(tmp_path, path=str(model_dir))
    connector = json.loads(after(started, "--kv-transfer-config") or "")

    assert (connector["kv_connector"], connector["kv_role"]) == ("LMCacheMPConnector", "kv_both")
    assert connector["kv_load_failure_policy"] == "recompute"
    extra = connector["kv_connector_extra_config"]
    assert (extra["lmcache.mp.host"], extra["lmcache.mp.port"]) == ("tcp://127.0.0.1", 11)
    assert 0 < extra["lmcache.mp.heartbeat_interval"] <= extra["lmcache.mp.mq_timeout"] <= 5
    assert "--enable-prompt-tokens-details" in started.argv
    assert "--enable-scale-out" in started.argv


def test_the_path_that_names_the_blocks_is_a_link_to_the_model(
    model_dir: Path, tmp_path: Path
) -> None:
    started = beside(tmp_path, path=str(model_dir))
    path = Path(started.kv_path)

    assert after(started, "--model") == started.kv_path
    assert path.parent == tmp_path / "m"
    assert path.readlink() == model_dir
    assert started.env["HF_HUB_OFFLINE"] == "1"
    assert started.identity is not None
    assert (started.identity.path, started.identity.block_size) == (str(model_dir), 128)


def test_other_arguments_have_blocks_of_their_own(model_dir: Path, tmp_path: Path) -> None:
    one = beside(tmp_path, path=str(model_dir))
    other = beside(tmp_path, path=str(model_dir), args=["--dtype", "half"])

    assert one.kv_path != other.kv_path
    assert beside(tmp_path, path=str(model_dir)).kv_path == one.kv_path
    assert other.argv[-2:] == ["--dtype", "half"]  # the operator's come last here, too


def test_a_model_without_windows_hears_nothing_of_lmcache(model_dir: Path, tmp_path: Path) -> None:
    started = beside(tmp_path, path=str(model_dir), windows=False)

    assert started.argv == launch(path=str(model_dir)).argv
    assert (started.identity, started.kv_path) == (None, "")


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


def test_the_managed_environment_is_not_for_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the CPU build, which would compute on the CPU (R014); told before one is looked for."""
    monkeypatch.setenv("HIVE_ENGINES", str(tmp_path))
    for devices in ({"device": "cuda:0"}, {"device": None, "replicas": ["cpu", "cuda:0"]}):
        model = engine(python=None, **{"device": "cpu", **devices}).model
        with pytest.raises(WorkerSpawnFailed, match="no engine environment for a GPU") as caught:
            python_of("llama", model)

        assert 'device = "cpu"' in caught.value.suggested_action
        assert on_cuda(model)
    assert not on_cuda(engine("cpu").model)


def test_the_environment_cannot_move_a_gpus_model_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM follows VLLM_TARGET_DEVICE at run time (platforms/__init__.py) (R013, R014)."""
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")

    assert "VLLM_TARGET_DEVICE" not in launch("cuda:0", UUID).env
    with pytest.raises(ConfigInvalid, match=r"models\.llama\.env: VLLM_TARGET_DEVICE"):
        launch("cuda:0", UUID, env={"VLLM_TARGET_DEVICE": "CPU"})
    assert launch("cpu", env={"VLLM_TARGET_DEVICE": "cpu"}).env["VLLM_TARGET_DEVICE"] == "cpu"


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

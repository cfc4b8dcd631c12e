"""What is known to be wrong before anything is started."""

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from hive.devices import nvml
from hive.devices.nvml import Driver
from hive.devices.watch import Watched
from hive.errors import (
    ConfigInvalid,
    CudaDeviceFailed,
    CudaDeviceNotFound,
    CudaDriverMissing,
    GpuVramExhausted,
    HiveError,
    InsufficientDisk,
    InsufficientRam,
    WorkerSpawnFailed,
)
from hive.settings import Settings
from hive.workers import preflight
from hive.workers.footprint import disk_needed
from hive.workers.host import available_ram
from hive.workers.lmcache import TEMPORARY
from hive.workers.preflight import (
    Finding,
    before_cache,
    before_start,
    check,
    own_processes,
    prepare_directories,
    worst,
)
from tests.devices.conftest import (  # noqa: F401 (fixtures)
    MakeDriver,
    Spawn,
    driver,
    driver_of,
    gpus,
    spawn,
)
from tests.doubles.nvml import Gpus
from tests.patience import short_directory, wait_until

TOP = Path(__file__).parents[2]
MIB, GIB = 2**20, 2**30
COMMAND = {"engine": "command", "device": "cpu", "command": ["sh", "{socket}"]}
ON_GPU = {**COMMAND, "device": "cuda:0"}
NO_PROGRAM = {**COMMAND, "command": ["no-such-program", "{socket}"]}
LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131_072,
}


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A whole model of 2 MiB of which little is known."""
    return whole_model(tmp_path / "small", {}, 2 * MIB)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A whole model with 15 GiB of weights, which take no room on the disk."""
    return whole_model(tmp_path / "llama", LLAMA_8B, 15 * GIB)


def whole_model(directory: Path, config: dict[str, Any], size: int) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
    header = json.dumps(tensors).encode()
    with (directory / "model.safetensors").open("wb") as weights:
        weights.write(len(header).to_bytes(8, "little") + header)
        weights.truncate(8 + len(header) + size)
    return directory


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An engine environment with vLLM's CUDA build, as far as the preflight looks."""
    said = """echo '{"vllm": "0.32.0", "lmcache": "0.5.6", "torch": "2.13.0"}'"""
    return program(tmp_path / "python", said)


def settings(models: dict[str, Any] | None = None, **server: Any) -> Settings:
    return Settings.model_validate({"server": server, "models": models or {"m": COMMAND}})


def vllm(path: Path | str, python: Path | str = sys.executable, **more: Any) -> dict[str, Any]:
    given = {"engine": "vllm", "device": "cpu", "path": str(path), "python": str(python)}
    return {**given, **more}


def found(
    driver: Driver, own: Collection[int] = (), **models: dict[str, Any]
) -> dict[str, list[Finding]]:
    """What was found, by its subject, in the order in which it was said."""
    told: dict[str, list[Finding]] = {}
    for finding in check(settings(models), driver, own=lambda: own)[0]:
        told.setdefault(finding.subject, []).append(finding)
    return told


def wrong(driver: Driver, own: Collection[int] = (), **models: dict[str, Any]) -> list[HiveError]:
    """The errors among what was found."""
    all_of_them = (f for findings in found(driver, own, **models).values() for f in findings)
    return [finding.error for finding in all_of_them if finding.error]


def errors(*models: dict[str, Any]) -> list[HiveError]:
    """The errors of models that need no GPU."""
    return wrong(Driver(), (), **{f"m{number}": model for number, model in enumerate(models)})


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
    findings, resolved = check(settings(), Driver())

    assert [finding.subject for finding in findings] == [
        "device cpu",
        "model m",
        "host memory",
        *disks(findings),
    ]
    assert findings[0].found == f"{os.cpu_count()} cores, chosen explicitly"
    assert findings[1].found.startswith("command /")
    assert " GiB available (" in findings[2].found
    assert all(" MiB that may be needed" in finding.found for finding in findings[3:])
    assert not any(finding.error for finding in findings)
    assert resolved == {}


def disks(findings: list[Finding]) -> list[str]:
    """One line for both directories where they are on one file system, else two."""
    told = [finding.subject for finding in findings if finding.subject.startswith("disk")]
    both = ["disk of state_dir and runtime_dir"]
    assert told in (both, ["disk of state_dir", "disk of runtime_dir"])
    return told


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


@pytest.mark.parametrize("said", ["5", "[]", '{"vllm": 5}', '{"vllm": ["cpu"]}', "[" * 100_000])
def test_an_answer_that_is_none_is_told(model_dir: Path, tmp_path: Path, said: str) -> None:
    (tmp_path / "said").write_text(said)
    (error,) = errors(vllm(model_dir, program(tmp_path / "python", f"cat {tmp_path}/said")))

    assert isinstance(error, WorkerSpawnFailed)


def test_what_an_environment_complains_of_steers_no_terminal(
    model_dir: Path, tmp_path: Path
) -> None:
    python = program(tmp_path / "python", r"printf '\033[2Jbroken\n' >&2; exit 1")
    (error,) = errors(vllm(model_dir, python))

    assert r"\x1b[2Jbroken" in error.message


def test_a_stop_ends_the_question_to_an_environment(model_dir: Path, tmp_path: Path) -> None:
    """So a SIGTERM need not wait for a Python that imports for a minute, or hangs."""
    python = program(tmp_path / "python", "sleep 600")
    stop, began = threading.Event(), time.monotonic()
    threading.Timer(0.3, stop.set).start()
    check(settings({"m": vllm(model_dir, python)}), Driver(), stop=stop)

    assert time.monotonic() - began < 20


def test_the_versions_of_a_whole_environment_are_told(model_dir: Path, tmp_path: Path) -> None:
    said = """echo noise; echo '{"vllm": "0.32.0", "lmcache": null, "torch": "2.13.0"}'"""
    python = program(tmp_path / "python", said)
    told = found(Driver(), m=vllm(model_dir, python))

    assert not any(finding.error for findings in told.values() for finding in findings)
    assert told["model m"][0].found == f"{model_dir}, weights 0.00 GiB"
    assert told["model m: engine"][0].found == f"vllm 0.32.0, torch 2.13.0 in {python}"


def test_an_environment_is_imported_only_when_that_is_asked_for(
    model_dir: Path, tmp_path: Path
) -> None:
    python = program(
        tmp_path / "python",
        """case "$*" in *"import vllm, lmcache"*) echo no libcudart >&2; exit 1;; esac
        echo '{"vllm": "1"}'""",
    )
    wanted = settings({"m": vllm(model_dir, python)})

    assert not any(finding.error for finding in check(wanted, Driver())[0])
    findings, _ = check(wanted, Driver(), imports=True)
    (error,) = (finding.error for finding in findings if finding.error)
    assert "no libcudart" in error.message


def test_weights_that_are_not_known_are_said_to_be_so(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    made_up = vllm(model_dir, args=["--load-format", "dummy"])
    told = found(Driver(), a=vllm("org/model-1"), b=made_up)

    assert told["model a"][0].found == "hub id org/model-1"
    assert told["model b"][0].found == f"{model_dir}, weights unknown (--load-format)"


def test_every_models_problem_is_found_at_once(tmp_path: Path) -> None:
    told = errors(NO_PROGRAM, vllm("/no/such/model"), COMMAND, vllm(tmp_path), NO_PROGRAM)
    text = "\n".join(error.message for error in told)

    for number in (0, 1, 3, 4):
        assert f"m{number}" in text
    assert "m2" not in text


def test_a_cpu_build_is_no_engine_for_a_gpu(
    gpus: Gpus, driver: Driver, model_dir: Path, tmp_path: Path
) -> None:
    """vLLM's CPU build computes on the CPU whichever GPUs it sees (R013, R014)."""
    gpus.add(0)
    said = """echo '{"vllm": "0.32.0+cpu", "torch": "2.13.0+cpu"}'"""
    python = program(tmp_path / "python", said)
    (error,) = wrong(driver, m=vllm(model_dir, python, device="cuda:0", kv_cache_gib=1))

    assert isinstance(error, WorkerSpawnFailed)
    assert error.message.startswith(
        "model m: the engine environment has the CPU build of vLLM (0.32.0+cpu), "
    )
    assert 'device = "cpu"' in error.suggested_action
    assert errors(vllm(model_dir, python)) == []


def test_the_managed_environment_is_no_engine_for_a_gpu(gpus: Gpus, driver: Driver) -> None:
    gpus.add(0)
    model = {"engine": "vllm", "path": "org/m", "device": "cuda:0"}
    (error,) = wrong(driver, m=model)

    assert error.message.startswith("Model m: there is no engine environment for a GPU")


# ── Devices ─────────────────────────────────────────────────────────────────────────────────────


def test_a_gpu_that_can_be_used_is_told_with_what_it_has(gpus: Gpus, driver: Driver) -> None:
    uuid = gpus.add(0, total_mib=8192, base_mib=1024)
    findings, resolved = check(settings({"m": {**ON_GPU, "required_vram_gib": 3}}), driver)

    assert [finding.subject for finding in findings] == [
        "model m",
        "device cuda:0",
        "model m: VRAM",
        "host memory",
        *disks(findings),
    ]
    assert findings[1].found == f"NVIDIA H100, 7.0 of 8.0 GiB free, 40 °C, {uuid}"
    assert findings[2].found == "3.0 GiB of cuda:0 (required_vram_gib)"
    assert not any(finding.error for finding in findings)
    assert resolved == {"cuda:0": nvml.Device(0, uuid, "NVIDIA H100")}


def test_what_a_command_takes_is_not_known(gpus: Gpus, driver: Driver) -> None:
    gpus.add(0)
    told = found(driver, m=ON_GPU)

    assert told["model m: VRAM"][0].found == "not stated (required_vram_gib), not checked"
    assert told["model m: VRAM"][0].error is None


def test_a_missing_driver_is_told_once_for_all_devices(
    gpus: Gpus, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NVML_DOUBLE")
    (error,) = wrong(driver, a=ON_GPU, b={**ON_GPU, "device": "cuda:1"}, c=COMMAND)

    assert isinstance(error, CudaDriverMissing)
    assert error.message.startswith("Device cuda:0 is configured, but: The NVIDIA driver ")


def test_each_device_that_is_not_there_is_named(gpus: Gpus, driver: Driver) -> None:
    uuid = gpus.add(0)
    told = wrong(
        driver, a={**ON_GPU, "device": ["cuda:0", "cuda:5"]}, b={**ON_GPU, "device": "GPU-00000007"}
    )

    assert [type(error) for error in told] == [CudaDeviceNotFound, CudaDeviceNotFound]
    assert told[0].message == (
        f"Device cuda:5 does not exist on this host; there are cuda:0 (NVIDIA H100, {uuid})."
    )
    assert told[1].details["device"] == "GPU-00000007"


def test_a_device_that_another_process_holds_is_named_with_it(
    gpus: Gpus, driver: Driver, spawn: Spawn
) -> None:
    """(R017)"""
    gpus.add(0)
    pid = spawn()
    gpus.hold(0, pid, 900)
    (error,) = wrong(driver, m=ON_GPU)

    assert isinstance(error, CudaDeviceFailed)
    assert error.message == (
        f"Device cuda:0 (NVIDIA H100) is held by another process: cat (pid {pid}, 900 MiB)."
    )
    assert error.details["device"] == "cuda:0"


def test_what_hives_own_processes_hold_will_be_free(
    gpus: Gpus, driver: Driver, spawn: Spawn
) -> None:
    """'hive check' beside a hive that serves: its engines' memory is the next ones'."""
    gpus.add(0, total_mib=8192, base_mib=1024)
    pid = spawn()
    gpus.hold(0, pid, 6000)
    fits, not_quite = ({**ON_GPU, "required_vram_gib": gib} for gib in (7, 7.1))

    assert wrong(driver, own={pid}, m=fits) == []
    (error,) = wrong(driver, own={pid}, m=not_quite)
    assert error.details["available_vram_mb"] == 7168
    (error,) = wrong(driver, own={pid + 1}, m=fits)
    assert isinstance(error, CudaDeviceFailed)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"remap_failed": 1}, "Device cuda:0 (NVIDIA H100) could not remap a broken memory row."),
        ({"mig": 1}, "Device cuda:0 (NVIDIA H100) is split into MIG instances"),
        ({"lost": 1}, "Device cuda:0 is configured, but: "),
    ],
)
def test_a_device_that_is_not_healthy_is_refused(
    gpus: Gpus, driver: Driver, fields: dict[str, int], said: str
) -> None:
    gpus.add(0, **fields)
    (error,) = wrong(driver, m={**ON_GPU, "required_vram_gib": 1})

    assert isinstance(error, CudaDeviceFailed)
    assert error.message.startswith(said)
    assert error.details["device"] == "cuda:0"


def test_a_device_that_cannot_be_read_is_named(gpus: Gpus, driver: Driver) -> None:
    gpus.add(0)
    gpus.add(1)
    gpus.fail("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_UNKNOWN, 1)
    told = found(driver, m={**ON_GPU, "device": ["cuda:0", "cuda:1"], "required_vram_gib": 1})

    assert told["device cuda:0"][0].error is None
    error = told["device cuda:1"][0].error
    assert isinstance(error, CudaDeviceFailed)
    assert error.message.startswith("Device cuda:1 (NVIDIA H100): The NVIDIA driver failed")
    assert error.details["device"] == "cuda:1"
    assert [finding.error for finding in told["model m: VRAM"]] == [None]  # on the other one


def test_a_driver_that_does_not_answer_is_not_waited_for(gpus: Gpus, driver_of: MakeDriver) -> None:
    gpus.add(0)
    gpus.hang("nvmlDeviceGetMemoryInfo", 0)
    (error,) = wrong(driver_of(0.2), m=ON_GPU)

    assert "did not answer within 0.2 s" in error.message
    assert error.details["device"] == "cuda:0"


def test_a_worker_is_not_spread_over_one_gpu_with_two_names(gpus: Gpus, driver: Driver) -> None:
    uuid = gpus.add(0)
    (error,) = wrong(driver, m={**ON_GPU, "device": ["cuda:0", uuid], "required_vram_gib": 1})

    assert isinstance(error, ConfigInvalid)
    assert error.message == f"models.m: two of its devices (cuda:0, {uuid}) are the same GPU."


# ── VRAM ────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_that_does_not_fit_is_refused_with_what_was_measured(
    gpus: Gpus, driver: Driver
) -> None:
    """(R019)"""
    gpus.add(0, total_mib=16384, base_mib=8000)
    model = {**ON_GPU, "required_vram_gib": 14.5, "alternatives": ["small"]}
    (error,) = wrong(driver, m=model, small=COMMAND)

    assert isinstance(error, GpuVramExhausted)
    assert error.message.startswith("GPU out of memory: 14.5GB required, 8.1GB available. Model m ")
    assert error.details["alternative_models"] == ["small"]


def test_what_vllm_will_look_for_is_what_must_be_free(
    gpus: Gpus, driver: Driver, llama: Path, python: Path
) -> None:
    gpus.add(0, total_mib=81559, base_mib=500)
    on_gpu = vllm(llama, python, device="cuda:0")
    stated = {**on_gpu, "kv_cache_gib": 17}

    told = found(driver, m=on_gpu)["model m: VRAM"][0]
    assert told.found.startswith("73.8 GiB of cuda:0 (vLLM's claim 0.92 ")
    told = found(driver, m=stated)["model m: VRAM"][0]
    assert told.found == (
        "33.5 GiB of cuda:0 (weights 15.0 + KV 17.0 + activations 1.0 + CUDA 0.5 GiB)"
    )
    gpus.change(0, base_mib=60_000)
    (error,) = wrong(driver, m=stated)
    assert "33.6GB required, 21.0GB available" in error.message


def test_models_on_one_device_are_added_up_whichever_way_they_name_it(
    gpus: Gpus, driver: Driver
) -> None:
    uuid = gpus.add(0, total_mib=10240, base_mib=0)
    gpus.add(1, total_mib=10240, base_mib=0)

    def on(device: str, gib: float) -> dict[str, Any]:
        return {**ON_GPU, "device": device, "required_vram_gib": gib}

    assert wrong(driver, a=on("cuda:0", 6), b=on(uuid, 4), c=on("cuda:1", 10)) == []
    told = found(driver, a=on("cuda:0", 6), b=on(uuid, 5), c=on("cuda:0", 4), d=on(uuid, 1))
    assert [told[f"model {name}: VRAM"][0].error is None for name in "abcd"] == [
        True,
        False,
        True,
        False,
    ]
    assert "5.0GB required, 4.0GB available" in told["model b: VRAM"][0].found
    assert "1.0GB required, 0.0GB available" in told["model d: VRAM"][0].found
    assert len(told["device cuda:0"]) == 1  # it is one device


def test_replicas_on_one_device_are_added_up_too(gpus: Gpus, driver: Driver) -> None:
    uuid = gpus.add(0, total_mib=10240, base_mib=0)
    twice = {**COMMAND, "device": None, "replicas": ["cuda:0", uuid], "required_vram_gib": 6}
    (error,) = wrong(driver, m=twice)

    assert "6.0GB required, 4.0GB available" in error.message


def test_models_that_share_a_device_by_two_names_must_state_what_they_take(
    gpus: Gpus, driver: Driver
) -> None:
    uuid = gpus.add(0)
    stated = {**ON_GPU, "device": uuid, "required_vram_gib": 1}
    told = wrong(driver, a=ON_GPU, b={**ON_GPU, "device": uuid})

    assert [error.message for error in told] == [
        "models.a: cuda:0 is shared with another model, so each must state its VRAM.",
        "models.b: cuda:0 is shared with another model, so each must state its VRAM.",
    ]
    assert all(isinstance(error, ConfigInvalid) for error in told)
    (error,) = wrong(driver, a=ON_GPU, b=stated, c=stated)
    assert error.message.startswith("models.a: ")


def test_a_model_whose_files_are_broken_is_not_said_to_be_too_large(
    gpus: Gpus, driver: Driver, llama: Path, python: Path
) -> None:
    gpus.add(0, total_mib=81559, base_mib=40_000)
    stated = vllm(llama, python, device="cuda:0", kv_cache_gib=17)
    assert wrong(driver, m=stated) == []
    (llama / "model.safetensors").unlink()
    (error,) = wrong(driver, m=stated)

    assert error.message.startswith("models.m.path: ")


def test_of_unequal_devices_the_smallest_sets_the_share_of_all(
    gpus: Gpus, driver: Driver, python: Path
) -> None:
    """vLLM has one utilization; half of the smaller one is half of the larger one, too."""
    gpus.add(0, total_mib=80 * 1024, base_mib=500)
    gpus.add(1, total_mib=20 * 1024, base_mib=500)
    pair = ["cuda:0", "cuda:1"]
    model = vllm("org/m", python, device=pair, required_vram_gib=10.5)
    told = found(driver, m=model)["model m: VRAM"]

    assert told[0].found.startswith("40.5 GiB of cuda:0 (vLLM's claim 0.4999 ")
    assert told[1].found == "10.5 GiB of cuda:1 (required_vram_gib)"
    gpus.change(0, base_mib=45 * 1024)
    (error,) = wrong(driver, m=model)
    assert error.details["device"] == "cuda:0"
    with pytest.raises(GpuVramExhausted):
        start(driver, "m", pair, m=model)


def test_a_utilization_that_vllm_would_not_take_is_told_once(
    gpus: Gpus, driver: Driver, python: Path
) -> None:
    gpus.add(0)
    gpus.add(1)
    model = vllm("org/m", python, device=None, replicas=["cuda:0", "cuda:1"], args=["--gpu-mem=92"])
    (error,) = wrong(driver, m=model)

    assert isinstance(error, ConfigInvalid)
    assert error.message.startswith("models.m.args: --gpu-memory-utilization 92: ")


def test_a_kv_cache_that_is_too_small_for_one_request_is_refused(
    gpus: Gpus, driver: Driver, llama: Path, python: Path
) -> None:
    gpus.add(0)
    told = found(
        driver,
        a=vllm(llama, python, device="cuda:0", kv_cache_gib=4),
        b=vllm(llama, python, device=None, replicas=["cpu", "cpu"], kv_cache_gib=0.5),
    )

    room, context = told["model a: VRAM"]
    assert (room.error, type(context.error)) == (None, ConfigInvalid)
    assert "but it gets 4 GiB" in context.found
    (context,) = told["model b: KV cache"]
    assert "models.b: a request of 131072 tokens" in context.found
    assert "but it gets 0.5 GiB" in context.found


# ── Host memory and disk ────────────────────────────────────────────────────────────────────────


def test_what_starts_together_must_fit_into_the_hosts_memory_together(
    model_dir: Path, python: Path
) -> None:
    most = available_ram().bytes / GIB
    one = vllm(model_dir, python, kv_cache_gib=most * 0.6)
    (error,) = errors(one, one)

    assert errors(one) == []
    assert isinstance(error, InsufficientRam)
    assert "m0: " in error.message
    assert "m1: " in error.message


def test_directories_on_one_file_system_need_room_for_both_together(home: Path) -> None:
    """For each alone there is enough: 32 MiB of logs a worker and 64 of temporary files."""
    about = os.statvfs(home)
    free = about.f_bavail * about.f_frsize
    workers = free // (80 * MIB)
    needs = disk_needed(workers)
    assert max(needs.values()) < free < sum(needs.values())
    many = {**COMMAND, "device": None, "replicas": ["cpu"] * workers}
    wanted = settings({"m": many}, state_dir=home / "s", runtime_dir=home / "r")
    findings, _ = check(wanted, Driver())

    (finding,) = (finding for finding in findings if finding.subject.startswith("disk"))
    assert finding.subject == "disk of state_dir and runtime_dir"
    error = finding.error
    assert isinstance(error, InsufficientDisk)
    assert error.message.startswith(f"server.state_dir and server.runtime_dir: {home}/s needs ")
    assert error.details["required_disk_mb"] == sum(needs.values()) // MIB


@pytest.mark.skipif(
    not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev,
    reason="there is no second file system to write to",
)
def test_directories_on_two_file_systems_need_room_each_on_its_own(home: Path) -> None:
    wanted = settings(state_dir=home / "s", runtime_dir="/dev/shm/hive-r")
    findings, _ = check(wanted, Driver())

    assert disks(findings) == ["disk of state_dir", "disk of runtime_dir"]
    assert not any(finding.error for finding in findings)


# ── Before each start ───────────────────────────────────────────────────────────────────────────


def start(driver: Driver, name: str, devices: list[str], **models: dict[str, Any]) -> None:
    """The look that a worker has right before its start, at devices as they are now."""
    resolved = nvml.resolve(driver, devices)
    watched = [Watched(resolved[one]) for one in devices if one != "cpu"]
    for one in watched:
        one.reading = driver.read(one.device.uuid)
    before_start(settings(models), name, tuple(devices), watched)


def test_a_start_for_which_there_is_room_may_begin(
    gpus: Gpus, driver: Driver, llama: Path, python: Path
) -> None:
    gpus.add(0, total_mib=81559, base_mib=40_000)

    start(driver, "m", ["cpu"], m=COMMAND)
    start(driver, "m", ["cuda:0"], m=ON_GPU)
    start(driver, "m", ["cuda:0"], m=vllm(llama, python, device="cuda:0", kv_cache_gib=20))


def test_a_second_model_starts_beside_the_first_one(
    gpus: Gpus, driver: Driver, spawn: Spawn, llama: Path, python: Path
) -> None:
    """It needs what it states, not vLLM's usual share of the whole device."""
    gpus.add(0, total_mib=81559, base_mib=500)
    gpus.hold(0, spawn(), 40_000)  # the first one, which has been started
    model = vllm(llama, python, device="cuda:0", kv_cache_gib=17)
    start(driver, "m", ["cuda:0"], m=model)

    with pytest.raises(GpuVramExhausted):
        start(driver, "m", ["cuda:0"], m={**model, "kv_cache_gib": 30})
    with pytest.raises(GpuVramExhausted):
        start(driver, "m", ["cuda:0"], m={**model, "kv_cache_gib": 0})


def test_a_device_that_filled_up_since_hive_began_ends_the_start(
    gpus: Gpus, driver: Driver
) -> None:
    gpus.add(0, total_mib=10240, base_mib=0)
    model = {**ON_GPU, "required_vram_gib": 6, "alternatives": ["m"]}
    start(driver, "m", ["cuda:0"], m=model)
    gpus.change(0, base_mib=5120)
    with pytest.raises(GpuVramExhausted) as caught:
        start(driver, "m", ["cuda:0"], m=model)

    assert caught.value.message.startswith("GPU out of memory: 6.0GB required, 5.0GB available")
    assert caught.value.details["alternative_models"] == ["m"]


def test_a_model_that_was_damaged_since_hive_began_ends_the_start(
    model_dir: Path, python: Path
) -> None:
    model = vllm(model_dir, python)
    start(Driver(), "m", ["cpu"], m=model)
    (model_dir / "config.json").write_text("{")
    with pytest.raises(ConfigInvalid, match=r"models\.m\.path: .* is not JSON"):
        start(Driver(), "m", ["cpu"], m=model)


def test_too_little_host_memory_ends_the_start(model_dir: Path, python: Path) -> None:
    with pytest.raises(InsufficientRam):
        start(Driver(), "m", ["cpu"], m=vllm(model_dir, python, kv_cache_gib=90_000))


BEGIN = """
import sys
from hive.errors import HiveError
from hive.settings import Settings
from hive.workers.preflight import before_start
home = sys.argv[1]
command = {"engine": "command", "device": "cpu", "command": ["sh", "{socket}"]}
server = {"state_dir": home + "/s", "runtime_dir": home + "/r"}
wanted = Settings.model_validate({"server": server, "models": {"m": command}})
try: before_start(wanted, "m", ("cpu",), [])
except HiveError as exc: print(exc.code, exc.message)
else: print("begun")
"""
UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")  # a mount that nobody else sees


@pytest.mark.skipif(
    subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode != 0,
    reason="a small file system cannot be mounted here",
)
def test_too_little_disk_ends_the_start(home: Path) -> None:
    def begin(mib: int) -> str:
        mounted = f'mount -t tmpfs -o size={mib}m none {home} && exec "$@"'
        command = ("sh", "-c", mounted, "sh", sys.executable, "-c", BEGIN, str(home))
        done = subprocess.run(
            [*UNSHARE, *command], capture_output=True, text=True, check=True, cwd=TOP, timeout=60
        )
        return done.stdout

    needed = sum(disk_needed(1).values()) // MIB
    assert begin(needed) == "begun\n"
    assert begin(needed - 1).startswith(
        "INSUFFICIENT_DISK server.state_dir and server.runtime_dir: "
    )


# ── LMCache ─────────────────────────────────────────────────────────────────────────────────────

KEPT = {**COMMAND, "command": ["sh", "{socket}", "{kv}"], "windows": True}
SMALL = {"kv_ram_gib": 0.1, "kv_tier_gib": 0.01, "kv_server": ["sh"]}


def beside(state: Path, *models: dict[str, Any], **windows: Any) -> Settings:
    return Settings.model_validate(
        {
            "server": {"state_dir": state, "runtime_dir": state.parent / "r"},
            "windows": {**SMALL, **windows},
            "models": {f"m{number}": model for number, model in enumerate(models or (KEPT,))},
        }
    )


@pytest.fixture
def state(home: Path) -> Path:
    (home / "s").mkdir(mode=0o700)
    return home / "s"


def of_cache(wanted: Settings) -> dict[str, Finding]:
    findings, _ = check(wanted, Driver())
    return {one.subject: one for one in findings if one.subject.startswith("LMCache")}


def cache_error(wanted: Settings) -> HiveError:
    """The one that hive would end with, and that ends the server's start, too."""
    (error,) = (finding.error for finding in of_cache(wanted).values() if finding.error)
    with pytest.raises(type(error)) as caught:
        before_cache(wanted)
    assert caught.value.message == error.message
    return error


def test_lmcaches_program_and_the_room_for_its_files_are_told(state: Path) -> None:
    told = of_cache(beside(state))

    assert {subject: one.error for subject, one in told.items()} == {
        "LMCache": None,
        "LMCache: disk": None,
    }
    assert told["LMCache"].found.endswith("/sh")
    assert told["LMCache: disk"].found == f"{state} has room for 0.01 GiB of KV blocks"
    before_cache(beside(state))


def test_without_windows_nothing_is_said_of_lmcache(state: Path) -> None:
    assert of_cache(beside(state, COMMAND, kv_server=["no-such"])) == {}
    assert list(state.iterdir()) == []


def test_its_directories_are_made_for_hives_user_alone(state: Path) -> None:
    before_cache(beside(state))

    for path in ("kv", f"kv/{TEMPORARY}", "windows"):
        assert mode(state / path) == 0o700, path
        assert not [one for one in (state / path).iterdir() if one.is_file()], path


def of_backups(wanted: Settings) -> Finding:
    findings, _ = check(wanted, Driver())
    (found,) = [one for one in findings if one.subject == "backups"]
    return found


def test_the_directory_of_backups_is_made_for_hives_user_alone(state: Path, tmp_path: Path) -> None:
    """What is in it tells conversations."""
    assert of_backups(beside(state)).error is None
    assert mode(state / "backups") == 0o700
    assert of_backups(beside(state, backup_dir=tmp_path / "b")).error is None
    assert mode(tmp_path / "b") == 0o700


def test_a_disk_of_backups_that_does_not_answer_keeps_nobody(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever only serves models needs no backups."""
    go_on = threading.Event()

    def hangs(_wanted: Settings) -> Finding:
        assert go_on.wait(60)
        return Finding("backups", "at last")

    monkeypatch.setattr(preflight, "_backups", hangs)
    monkeypatch.setattr(preflight, "BACKUPS_S", 0.05)
    try:
        told = of_backups(beside(state))
    finally:
        go_on.set()
    assert told.error is None
    assert told.found == f"{state}/backups does not answer within 0.05 s: no backups until it does"


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("others may read it", r"others may use .*/b \(mode 0750\)"),
        ("it is another user's", r"/b belongs to another user \(uid 12345\)"),
        ("it is a file", r"/b cannot be used: "),
        ("its disk is not mounted", r"/b cannot be used: No such file or directory"),
    ],
)
def test_a_directory_of_backups_that_protects_nothing_is_refused(
    state: Path, tmp_path: Path, what: str, wrong: str
) -> None:
    """R020, R049: it is named, and left as it is."""
    place = tmp_path / "b"
    if what == "it is a file":
        place.write_bytes(b"")
    elif what == "its disk is not mounted":
        place = tmp_path / "disk" / "b"
    else:
        place.mkdir(mode=0o700)
    if what == "others may read it":
        place.chmod(0o750)
    if what == "it is another user's":
        if os.geteuid():
            pytest.skip("needs root")
        os.chown(place, 12345, -1)
    told = of_backups(beside(state, backup_dir=place))

    assert isinstance(told.error, ConfigInvalid)
    assert told.error.message.startswith("windows.backup_dir: ")
    assert re.search(wrong, told.error.message), told.error.message
    assert "chmod 700" in told.error.suggested_action
    if what == "others may read it":
        assert mode(place) == 0o750


def test_a_check_makes_no_directories_where_hive_never_ran(home: Path) -> None:
    told = of_cache(beside(home / "none"))

    assert not any(one.error for one in told.values())
    assert not (home / "none").exists()


def test_a_missing_lmcache_is_told_beside_what_else_is_wrong(state: Path) -> None:
    told = of_cache(beside(state, kv_server=["no-such"], kv_tier_gib=900_000))

    assert isinstance(told["LMCache"].error, WorkerSpawnFailed)
    assert isinstance(told["LMCache: disk"].error, InsufficientDisk)


def test_what_the_tier_has_already_needs_no_room_again(state: Path) -> None:
    about = os.statvfs(state)
    gib = about.f_bavail * about.f_frsize / GIB + 5
    wanted = beside(state, kv_tier_gib=gib)
    assert isinstance(cache_error(wanted), InsufficientDisk)
    (state / "kv").mkdir(exist_ok=True)
    with (state / "kv" / "block.data").open("wb") as block:
        block.truncate(10 * GIB)  # it says so; it takes no room

    before_cache(wanted)


def test_too_little_host_memory_ends_lmcaches_start(state: Path) -> None:
    wanted = beside(state, kv_ram_gib=90_000)
    with pytest.raises(InsufficientRam, match="LMCache: chunks"):
        before_cache(wanted)
    (error,) = (one.error for one in check(wanted, Driver())[0] if one.error)

    assert isinstance(error, InsufficientRam)


def test_a_chunk_that_is_no_multiple_of_the_block_size_is_refused(state: Path) -> None:
    error = cache_error(beside(state, {**KEPT, "args": ["--block-size=48"]}))

    assert isinstance(error, ConfigInvalid)
    assert "no multiple of the block size of model m0, 48" in error.message


def test_a_hub_id_cannot_have_windows(state: Path, python: Path, model_dir: Path) -> None:
    """What it stands for may change, and blocks of one be taken for another's."""
    kept = vllm("org/m", python, windows=True)
    error = cache_error(beside(state, kept))

    assert isinstance(error, ConfigInvalid)
    assert error.message.startswith("models.m0: windows = true needs the model's files")
    before_cache(beside(state, {**kept, "path": str(model_dir)}, vllm("org/m", python)))


@pytest.mark.parametrize("name", ["a@b", "s" * 150])
def test_a_state_dir_that_lmcache_cannot_name_blocks_in_is_refused(home: Path, name: str) -> None:
    (home / name).mkdir()
    error = cache_error(beside(home / name))

    assert isinstance(error, ConfigInvalid)
    assert error.message.startswith(f"server.state_dir: {home}/{name} cannot be a part")


@pytest.mark.skipif(
    not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev,
    reason="there is no second file system to write to",
)
def test_windows_on_another_file_system_than_the_tier_are_refused(state: Path) -> None:
    """They share their blocks as hard links."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (state / "windows").symlink_to(elsewhere)
        error = cache_error(beside(state))

        assert list(Path(elsewhere).iterdir()) == []
    assert isinstance(error, ConfigInvalid)
    assert error.message.startswith(f"server.state_dir: {state} cannot hold KV blocks")
    assert "hard links" in error.suggested_action
    assert not list((state / "kv" / TEMPORARY).iterdir())


def test_what_an_earlier_check_left_is_no_obstacle(state: Path) -> None:
    before_cache(beside(state))
    (state / "windows" / ".link-test").touch()
    (state / "kv" / TEMPORARY / ".link-test").touch()

    before_cache(beside(state))
    assert not list((state / "windows").iterdir())


def test_a_file_where_a_directory_belongs_is_told(state: Path) -> None:
    (state / "kv").touch()

    assert isinstance(cache_error(beside(state)), ConfigInvalid)


# ── What is hive's own, and what is worst ───────────────────────────────────────────────────────


def test_the_processes_in_the_ledger_are_hives_own(home: Path) -> None:
    wanted = settings(state_dir=home / "s", runtime_dir=home / "r")
    assert own_processes(wanted) == set()
    (home / "s" / "ledger").mkdir(parents=True)
    (home / "s" / "ledger" / "00000000000000aa.json").touch()
    with (
        subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, env={"HIVE_MARK": "00000000000000aa"}
        ) as a,
        subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, env={"HIVE_MARK": "00000000000000bb"}
        ) as b,
    ):
        wait_until(lambda: a.pid in own_processes(wanted), "the process to have its environment")
        assert own_processes(wanted) == {a.pid}
        a.communicate()
        b.communicate()
    assert own_processes(wanted) == set()


def test_the_most_severe_error_is_the_one_to_end_with_and_it_names_them_all() -> None:
    config = ConfigInvalid("one")
    missing, full = CudaDeviceNotFound("two", device="cuda:1"), GpuVramExhausted("three")
    chosen = worst([config, missing, full])

    assert chosen is missing
    assert chosen.details == {"device": "cuda:1", "problems": ["one", "two", "three"]}
    assert worst([config]).details["problems"] == ["one"]

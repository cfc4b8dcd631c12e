"""`hive devices`: what the driver says of this host's GPUs, for people and for programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest

from tests.doubles.nvml import Gpus

TOP = Path(__file__).parents[2]
MIB = 2**20
LONG_S = 60.0


@pytest.fixture
def gpus(tmp_path: Path) -> Gpus:
    gpus = Gpus(tmp_path / "nvml")
    gpus.add(0, uuid="GPU-a", name="NVIDIA A100", total_mib=1000, base_mib=100, temp=71)
    gpus.add(1, uuid="GPU-b")
    return gpus


def run(gpus: Gpus, *more: str) -> "subprocess.CompletedProcess[str]":
    """`hive devices --local` on a host with these GPUs."""
    return subprocess.run(
        [sys.executable, "-m", "hive", "devices", "--local", *more],
        cwd=TOP,
        env={**os.environ, **gpus.env},
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )


def row(table: str, device: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"{device} ")]
    return line.split()


def test_people_get_a_table(gpus: Gpus) -> None:
    gpus.hold(0, os.getpid(), 40)
    done = run(gpus)
    name = Path("/proc/self/comm").read_text().strip()

    assert (done.returncode, done.stderr) == (0, "")
    header, *rows = done.stdout.splitlines()
    assert header.split() == [
        *("device", "uuid", "name", "state", "MiB", "free", "°C", "processes", "reason"),
    ]
    assert len(rows) == 2
    assert row(done.stdout, "cuda:0") == [
        *("cuda:0", "GPU-a", "NVIDIA", "A100", "1000", "860", "71"),
        *(str(os.getpid()), *name.split(), "40"),
    ]
    assert row(done.stdout, "cuda:1")[:5] == ["cuda:1", "GPU-b", "NVIDIA", "H100", "81920"]


def test_programs_get_json(gpus: Gpus) -> None:
    gpus.change(1, ecc=-1, remap_failed=1)
    done = run(gpus, "--json")
    first, second = json.loads(done.stdout)["devices"]

    assert (done.returncode, done.stderr) == (0, "")
    assert (first["id"], first["uuid"], first["name"]) == ("cuda:0", "GPU-a", "NVIDIA A100")
    assert first["vram_total_bytes"] == 1000 * MIB
    assert first["vram_free_bytes"] == 900 * MIB
    assert first["processes"] == []
    assert second["id"] == "cuda:1"
    assert second["ecc_uncorrectable_errors"] is None
    assert second["rows_remap_failed"] is True


def test_a_gpu_that_cannot_be_read_is_shown_with_the_reason(gpus: Gpus) -> None:
    gpus.fail("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_GPU_IS_LOST, index=0)
    done = run(gpus)

    assert done.returncode == 0
    assert " ".join(row(done.stdout, "cuda:0")) == (
        "cuda:0 GPU-a NVIDIA A100 The device is lost: the NVIDIA driver says GPU is lost."
    )
    assert "81420" in row(done.stdout, "cuda:1")


def test_a_gpu_that_does_not_say_what_it_is_hides_no_other(gpus: Gpus) -> None:
    gpus.fail("nvmlDeviceGetName", pynvml.NVML_ERROR_UNKNOWN, index=0)
    done = run(gpus)

    assert done.returncode == 0
    assert " ".join(row(done.stdout, "cuda:0")) == "cuda:0 The NVIDIA driver failed: Unknown Error."
    assert "81420" in row(done.stdout, "cuda:1")
    first, second = json.loads(run(gpus, "--json").stdout)["devices"]
    assert (first["uuid"], second["uuid"]) == ("", "GPU-b")


def test_without_a_driver_it_fails_and_says_what_to_do(gpus: Gpus) -> None:
    gpus.fail("nvmlInit", pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    done = run(gpus)

    assert (done.returncode, done.stdout) == (1, "")
    assert "CUDA_DRIVER_MISSING: The NVIDIA driver cannot be used" in done.stderr
    assert "Install the NVIDIA driver" in done.stderr
    as_json = run(gpus, "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["error"]["code"] == "CUDA_DRIVER_MISSING"


def test_gpus_that_nobody_may_ask_are_not_no_gpus(gpus: Gpus) -> None:
    gpus.fail("nvmlDeviceGetHandleByIndex", pynvml.NVML_ERROR_NO_PERMISSION)
    done = run(gpus)

    assert (done.returncode, done.stdout) == (1, "")
    assert "CUDA_DEVICE_FAILED" in done.stderr
    assert "/dev/nvidia" in done.stderr

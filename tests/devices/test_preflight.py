"""One look at a GPU: what is shown of it, and what keeps hive from using it."""

from dataclasses import replace

from hive.devices import faults
from hive.devices.nvml import Device, Holder, Reading
from hive.devices.preflight import describe, held, unhealthy

MIB = 2**20
GPU = Device(1, "GPU-b", "NVIDIA H100")
OURS, STRANGER = Holder(7, "VLLM::Worker", 300 * MIB), Holder(8, "train.py", None)
IDLE = Reading(
    total=1000 * MIB,
    used=100 * MIB,
    free=900 * MIB,
    temperature_c=40,
    ecc_errors=0,
    remap_pending=False,
    remap_failed=False,
    is_split=False,
    holders=(),
)


def test_a_gpu_is_described_with_who_is_there() -> None:
    busy = replace(IDLE, ecc_errors=2, remap_pending=True, holders=(OURS, STRANGER))

    assert describe(GPU, busy, own={7}) == {
        "id": "cuda:1",
        "uuid": "GPU-b",
        "name": "NVIDIA H100",
        "vram_total_bytes": 1000 * MIB,
        "vram_used_bytes": 100 * MIB,
        "vram_free_bytes": 900 * MIB,
        "temperature_celsius": 40,
        "ecc_uncorrectable_errors": 2,
        "rows_remap_pending": True,
        "rows_remap_failed": False,
        "processes": [
            {"pid": 7, "name": "VLLM::Worker", "vram_bytes": 300 * MIB, "is_ours": True},
            {"pid": 8, "name": "train.py", "vram_bytes": None, "is_ours": False},
        ],
    }


def test_one_that_was_never_read_is_described_without_guesses() -> None:
    assert describe(GPU, None) == {"id": "cuda:1", "uuid": "GPU-b", "name": "NVIDIA H100"}


def test_a_gpu_is_healthy_until_something_says_otherwise() -> None:
    """A row that waits for its remapping, old errors and what is not told are no reasons."""
    tired = replace(IDLE, ecc_errors=9, remap_pending=True, temperature_c=99, holders=(STRANGER,))
    silent = replace(IDLE, ecc_errors=None, remap_pending=None, remap_failed=None)

    for reading in (IDLE, tired, silent):
        assert unhealthy(GPU, reading) is None


def test_a_row_that_could_not_be_remapped_makes_it_unfit() -> None:
    error = unhealthy(GPU, replace(IDLE, remap_failed=True))

    assert error is not None
    assert error.code == "CUDA_DEVICE_FAILED"
    assert error.message == "Device cuda:1 (NVIDIA H100) could not remap a broken memory row."
    assert error.suggested_action == faults.REPLACE
    assert error.details["device"] == "cuda:1"


def test_a_gpu_that_is_divided_is_not_a_whole_gpu() -> None:
    error = unhealthy(GPU, replace(IDLE, is_split=True))

    assert error is not None
    assert "split into MIG instances" in error.message
    assert "-mig 0" in error.suggested_action


def test_a_strangers_process_is_named_and_an_own_one_is_not() -> None:
    """(R017)"""
    assert held(GPU, IDLE, ()) is None
    assert held(GPU, replace(IDLE, holders=(OURS,)), {7}) is None
    error = held(GPU, replace(IDLE, holders=(OURS, STRANGER)), {7})

    assert error is not None
    assert error.code == "CUDA_DEVICE_FAILED"
    assert error.message == (
        "Device cuda:1 (NVIDIA H100) is held by another process: train.py (pid 8)."
    )
    assert error.details["device"] == "cuda:1"
    assert error.details["holders"] == [{"pid": 8, "name": "train.py", "vram_bytes": None}]

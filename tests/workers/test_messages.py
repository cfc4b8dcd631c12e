"""What the messages of torch, CUDA, NVML and vLLM mean, against CUDA's own list of its errors."""

import re

import pynvml
import pytest

from hive.workers import messages
from hive.workers.messages import Cause, of_exception, of_nccl, of_thrown
from tests.workers.samples import MESSAGES

ERRORS = dict(
    line.split("|", 1)
    for line in (MESSAGES / "cuda_errors.txt").read_text().splitlines()
    if not line.startswith("#")
)
DEVICE_FAULTS = {
    "cudaErrorDevicesUnavailable",
    "cudaErrorDeviceNotLicensed",
    "cudaErrorECCUncorrectable",
    "cudaErrorDeviceAlreadyInUse",
    "cudaErrorNvlinkUncorrectable",
    "cudaErrorContained",
    "cudaErrorSystemNotReady",
    "cudaErrorFabricNotReady",
}
NO_DEVICE = {
    "cudaErrorStubLibrary",
    "cudaErrorInsufficientDriver",
    "cudaErrorCallRequiresNewerDriver",
    "cudaErrorNoDevice",
    "cudaErrorInvalidDevice",
    "cudaErrorUnsupportedPtxVersion",
    "cudaErrorSystemDriverMismatch",
    "cudaErrorCompatNotSupportedOnDevice",
}
TORN_DOWN = {"cudaErrorCudartUnloading", "cudaErrorContextIsDestroyed"}


def expected(name: str) -> Cause | None:
    if name in DEVICE_FAULTS:
        return Cause.DEVICE_FAULT
    if name in NO_DEVICE:
        return Cause.NO_DEVICE
    if name == "cudaErrorMemoryAllocation":
        return Cause.OUT_OF_MEMORY
    return None if name in TORN_DOWN else Cause.APPLICATION_FAULT


def cause(text: str) -> Cause | None:
    found = of_exception(text)
    return found.cause if found else None


def test_the_list_of_cudas_errors_is_whole() -> None:
    assert len(ERRORS) > 130
    assert set(ERRORS) >= DEVICE_FAULTS | NO_DEVICE | TORN_DOWN


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_of_cuda_has_its_cause_however_it_is_said(name: str) -> None:
    text, wanted = ERRORS[name], expected(name)

    assert cause(f"torch.AcceleratorError: CUDA error: {text}") is wanted
    assert cause(f"RuntimeError: CUDA error: {text}") is wanted
    assert cause(f"RuntimeError: CUDA driver error: {text}") is wanted
    assert cause(f"RuntimeError: CUDA driver error (a/b.hpp:7): 1 (CUDA_ERROR_X, {text})") is wanted
    assert cause(f"RuntimeError: Triton Error [CUDA]: {text}") is wanted
    assert cause(f"RuntimeError: CUDA Error: {text} at /w/cumem_allocator.cpp:62") is wanted
    assert cause(f"torch.cuda.CudaError: {text} (1)") is wanted
    assert cause(f"RuntimeError: Worker failed with error 'CUDA error: {text}") is wanted
    for found in (of_thrown(f"CUDA error: {text}", "x"), of_nccl(f"Cuda failure 1 '{text}'")):
        assert (found.cause if found else None) is wanted


def test_a_quotation_in_one_line_has_an_end() -> None:
    quoted = "RuntimeError: Worker failed with error 'CUDA error: out of memory', "
    quoted += "please check the stack trace above for the root cause"

    assert cause(quoted) is Cause.OUT_OF_MEMORY


def test_every_text_of_the_table_is_one_that_cuda_says() -> None:
    """Apart from the statuses of its libraries."""
    own = {text for text in messages._CUDA if not re.fullmatch(r"CU[A-Z]+_STATUS_[A-Z_]+", text)}

    assert own <= {text.rstrip(".") for text in ERRORS.values()}


@pytest.mark.parametrize("name", ERRORS)
def test_the_class_has_to_be_one_that_says_such_things(name: str) -> None:
    for kind in ("ValueError", "KeyError", "my.RuntimeError", "torch.OutOfMemory", "vllm.Error"):
        assert cause(f"{kind}: CUDA error: {ERRORS[name]}") is None


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: not a CUDA error: out of memory",
        "RuntimeError: CUDA out of memory",
        "RuntimeError: CUDA out of memory. Tried to allocate a lot",
        "RuntimeError: 'CUDA error: out of memory'",
        "RuntimeError: cuDNN error: out of memory",
        "RuntimeError: Worker failed with error 'the CUDA error: out of memory'",
        "RuntimeError: Worker failed with error 'this ends with a number (2)'",
        "RuntimeError: Free memory on device (1.0/2.0 GiB) on startup is less than desired",
        "ValueError: Free memory on device (1.0/2.0 GiB) on startup. Desired GPU memory",
        "ValueError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "ValueError: To serve at least one request, say please",
        "ValueError: Failed to infer device type",
        "AssertionError: No available memory for the cache blocks. ",
        "pynvml.NVMLError_NotSupported: Not Supported",
        "NVMLError_GpuIsLost is what it says",
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "not.torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "torch.OutOfMemoryError CUDA out of memory. Tried to allocate 2.00 GiB.",
        "",
        ": ",
    ],
)
def test_a_message_of_another_shape_is_none(text: str) -> None:
    assert of_exception(text) is None


@pytest.mark.parametrize(
    ("size", "gib"),
    [
        ("512 bytes", 512 / 2**30),
        ("2.00 KiB", 2 / 2**20),
        ("605.88 MiB", 0.5916796875),
        ("2 GiB", 2),
    ],
)
def test_sizes_are_told_in_gib(size: str, gib: float) -> None:
    found = of_exception(f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {size}. x")

    assert found is not None
    assert (found.required_gib, found.available_gib, found.total_gib) == (gib, None, None)


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (pynvml.NVML_ERROR_GPU_IS_LOST, Cause.DEVICE_FAULT),
        (pynvml.NVML_ERROR_RESET_REQUIRED, Cause.DEVICE_FAULT),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, Cause.NO_DEVICE),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, Cause.NO_DEVICE),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, Cause.NO_DEVICE),
        (pynvml.NVML_ERROR_NO_PERMISSION, None),
        (pynvml.NVML_ERROR_TIMEOUT, None),
    ],
)
def test_what_nvml_raises_is_told_by_its_class(code: int, wanted: Cause | None) -> None:
    error = pynvml.NVMLError(code)

    assert cause(f"{type(error).__module__}.{type(error).__name__}: {error}") is wanted

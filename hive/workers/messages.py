"""What the message of an exception means: torch, CUDA, NVML and vLLM, by class and shape."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

WORDS_CHARS = 500


class Cause(StrEnum):
    """What kind of fault ended an engine."""

    OUT_OF_MEMORY = "out_of_memory"  # VRAM (RAM on the CPU) is too small for what was asked
    DEVICE_FAULT = "device_fault"  # the device is there and does not work
    APPLICATION_FAULT = "application_fault"  # the engine's program misused a healthy device
    NO_DEVICE = "no_device"  # no device to be seen, or no driver that serves it


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A fault: the decisive line without its log prefix, and the sizes that it names in GiB.

    `required_gib` is what was asked for when there was too little: a single allocation (torch),
    the whole budget or the KV cache of one request (vLLM).
    """

    cause: Cause
    words: str
    required_gib: float | None = None
    available_gib: float | None = None
    total_gib: float | None = None


# Of cudaGetErrorString (CUDA 13), without a final dot. Whatever is not listed here is an error
# that the program made: a bad address, a failed assertion, a wrong argument.
_CUDA: dict[str, Cause | None] = {
    "out of memory": Cause.OUT_OF_MEMORY,
    "CUBLAS_STATUS_ALLOC_FAILED": Cause.OUT_OF_MEMORY,
    "CUDNN_STATUS_ALLOC_FAILED": Cause.OUT_OF_MEMORY,
    "uncorrectable ECC error encountered": Cause.DEVICE_FAULT,
    "uncorrectable NVLink error detected during the execution": Cause.DEVICE_FAULT,
    "Invalid access of peer GPU memory over nvlink or a hardware error": Cause.DEVICE_FAULT,
    "CUDA-capable device(s) is/are busy or unavailable": Cause.DEVICE_FAULT,
    "exclusive-thread device already in use by a different thread": Cause.DEVICE_FAULT,
    "device doesn't have valid Grid license": Cause.DEVICE_FAULT,
    "system not yet initialized": Cause.DEVICE_FAULT,
    "GPU fabric is not ready within the probe wait budget; application may retry "
    "(see CUDA_FABRIC_INIT_TIMEOUT_MS)": Cause.DEVICE_FAULT,
    "no CUDA-capable device is detected": Cause.NO_DEVICE,
    "invalid device ordinal": Cause.NO_DEVICE,
    "CUDA driver version is insufficient for CUDA runtime version": Cause.NO_DEVICE,
    "CUDA driver is a stub library": Cause.NO_DEVICE,
    "API call is not supported in the installed CUDA driver": Cause.NO_DEVICE,
    "system has unsupported display driver / cuda driver combination": Cause.NO_DEVICE,
    "forward compatibility was attempted on non supported HW": Cause.NO_DEVICE,
    "the provided PTX was compiled with an unsupported toolchain": Cause.NO_DEVICE,
    "driver shutting down": None,  # these two are said of a program that ends anyway
    "context is destroyed": None,
}
_GIB = {"bytes": 2**30, "KiB": 2**20, "MiB": 2**10, "GiB": 1}
_N = r"\d{1,15}(?:\.\d{1,9})?"
_SIZE = rf"{_N} (?:bytes|[KMG]iB)"

_OUT_OF_MEMORY = frozenset({"torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"})
_RUNTIME = frozenset({"RuntimeError", "torch.AcceleratorError"})
_ANY_TORCH = _OUT_OF_MEMORY | _RUNTIME
_VALUE = frozenset({"ValueError"})
_ASSERTION = frozenset({"AssertionError"})


class _Shape(NamedTuple):
    """Which classes raise a message of this shape, and what it means."""

    classes: frozenset[str]
    message: re.Pattern[str]
    cause: Cause | None  # None: what CUDA says in the group `cuda`


def _shape(classes: frozenset[str], message: str, cause: Cause | None = None) -> _Shape:
    return _Shape(classes, re.compile(message), cause)


_SHAPES = (
    _shape(
        _ANY_TORCH,
        rf"CUDA out of memory\. Tried to allocate (?P<required>{_SIZE})\. GPU \d+ has a total "
        rf"capaci?ty of (?P<total>{_SIZE}) of which (?P<available>{_SIZE}) is free",
        Cause.OUT_OF_MEMORY,
    ),
    _shape(
        _ANY_TORCH,  # torch 1
        rf"CUDA out of memory\. Tried to allocate (?P<required>{_SIZE}) \(GPU \d+; "
        rf"(?P<total>{_SIZE}) total capacity; {_SIZE} already allocated; "
        rf"(?P<available>{_SIZE}) free;",
        Cause.OUT_OF_MEMORY,
    ),
    _shape(
        _ANY_TORCH,
        rf"CUDA out of memory\. Tried to allocate (?P<required>{_SIZE})",
        Cause.OUT_OF_MEMORY,
    ),
    _shape(
        _RUNTIME,
        r"CUDA out of memory occurred when warming up (?:sampler|pooler) ",
        Cause.OUT_OF_MEMORY,
    ),
    _shape(_RUNTIME, r"CUDA Error: (?P<cuda>.{1,200}?) at \S{1,300}:\d+$"),  # vLLM's allocator
    _shape(_RUNTIME, r"CUDA (?:driver )?error: (?P<cuda>.+)"),
    _shape(_RUNTIME, r"CUDA driver error \(.{1,300}?:\d+\): \d+ \(CUDA_ERROR_\w+, (?P<cuda>.+)\)"),
    _shape(_RUNTIME, r"Triton Error \[CUDA\]: (?P<cuda>.+)"),
    _shape(_RUNTIME, r"cuDNN error: (?P<cuda>CUDNN_STATUS_\w+)"),
    _shape(
        _VALUE,
        rf"Free memory on device (?:cuda:\d+ )?\((?P<available>{_N})/(?P<total>{_N}) GiB\) on "
        rf"startup is less than (?:desired GPU memory utilization|the engine's budget after "
        rf"excluding external process's weights) \({_N}, (?P<required>{_N}) GiB\)",
        Cause.OUT_OF_MEMORY,
    ),
    _shape(
        _VALUE,
        rf"Available memory on node \d+ \((?P<available>{_N})/(?P<total>{_N}) GiB\) on startup "
        rf"is less than desired CPU memory utilization \({_N}, (?P<required>{_N}) GiB\)",
        Cause.OUT_OF_MEMORY,
    ),
    _shape(
        _VALUE,
        rf"To serve at least one request with the models?'s max seq len \(\d+\), "
        rf"\((?P<required>{_N}) GiB KV cache is needed, which is larger than the available "
        rf"KV cache memory \((?P<available>{_N}) GiB\)",
        Cause.OUT_OF_MEMORY,
    ),
    _shape(_VALUE, r"No available memory for the cache blocks\. ", Cause.OUT_OF_MEMORY),
    _shape(
        _VALUE,
        r"The model's max seq len \(\d+\) is larger than the maximum number of tokens that can "
        r"be stored in KV cache \(\d+\)\. ",
        Cause.OUT_OF_MEMORY,
    ),
    _shape(_RUNTIME, r"Unexpected error from cudaGetDeviceCount\(\)\. ", Cause.NO_DEVICE),
    _shape(
        _RUNTIME,
        r"(?:No CUDA GPUs are available$|Found no NVIDIA driver on your system\. |"
        r"The NVIDIA driver on your system is too old \(found version |"
        r"CUDA driver initialization failed, you might not have a CUDA gpu\.|"
        r"CUDA unknown error - this may be due to an incorrectly set up environment, |"
        r"Failed to infer device type)",
        Cause.NO_DEVICE,
    ),
    _shape(_ASSERTION, r"DP adjusted local rank \d+ is out of bounds", Cause.NO_DEVICE),
    _shape(
        _VALUE,
        r"World size \(\d+\) is larger than the number of available GPUs \(\d+\) in this node\.",
        Cause.NO_DEVICE,
    ),
)
# Shapes that mean something only together with their class.
_BY_CLASS = (
    _shape(_OUT_OF_MEMORY, r"", Cause.OUT_OF_MEMORY),
    _shape(frozenset({"torch.cuda.CudaError"}), r"(?P<cuda>.+) \(\d+\)$"),
)
_NVML = {
    "NVMLError_GpuIsLost": Cause.DEVICE_FAULT,
    "NVMLError_ResetRequired": Cause.DEVICE_FAULT,
    "NVMLError_DriverNotLoaded": Cause.NO_DEVICE,
    "NVMLError_LibraryNotFound": Cause.NO_DEVICE,
    "NVMLError_LibRmVersionMismatch": Cause.NO_DEVICE,
}
_COUNTED = re.compile(r"Error \d+: (?P<cuda>[^;]+)")
_QUOTED = re.compile(r"Worker failed with error '(?P<message>.+)")
_QUOTE_ENDS = "', please check the stack trace above for the root cause"
_NCCL = re.compile(r"Cuda failure (?:\d{1,4} )?'(?P<cuda>.{1,200})'$")
_EXCEPTION = re.compile(r"(?P<kind>[A-Za-z_][\w.]{0,199})(?:: (?P<message>.*))?$")


def is_exception(text: str) -> bool:
    """Whether this has the form in which a traceback names its exception."""
    return _EXCEPTION.match(text) is not None


def of_exception(text: str) -> Diagnosis | None:
    """What the exception line of a traceback tells: `qualified.Class: message`."""
    line = _EXCEPTION.match(text)
    if line is None:
        return None
    kind, message = line["kind"], line["message"] or ""
    if cause := _NVML.get(kind.rpartition(".")[2]):
        return Diagnosis(cause, text[:WORDS_CHARS])
    # vLLM quotes a worker's message, without its class, when it reports the failure.
    if kind == "RuntimeError" and (quoted := _QUOTED.match(message)):
        return _of_message(None, quoted["message"].removesuffix(_QUOTE_ENDS), text)
    return _of_message(kind, message, text)


def of_thrown(message: str, words: str) -> Diagnosis | None:
    """What the message of a C++ exception tells that nothing caught; `words` is its line."""
    return _of_message("RuntimeError", message, words)


def of_nccl(text: str) -> Diagnosis | None:
    """What the line tells in which NCCL names the CUDA error behind its own."""
    failed = _NCCL.match(text)
    cause = _of_cuda(failed["cuda"]) if failed else None
    return Diagnosis(cause, f"NCCL: {text}"[:WORDS_CHARS]) if cause else None


def _of_message(kind: str | None, message: str, words: str) -> Diagnosis | None:
    """What a message tells that an exception of class `kind` has (None: of a class unknown)."""
    for shape in _SHAPES if kind is None else (*_SHAPES, *_BY_CLASS):
        if (kind is None or kind in shape.classes) and (found := shape.message.match(message)):
            named = found.groupdict()
            cause = shape.cause or _of_cuda(named["cuda"])
            if cause is Cause.NO_DEVICE and (why := _COUNTED.search(message)):
                cause = _CUDA.get(why["cuda"].strip()) or cause
            sizes = (_gib(named.get(name)) for name in ("required", "available", "total"))
            return Diagnosis(cause, words[:WORDS_CHARS], *sizes) if cause else None
    return None


def _of_cuda(text: str) -> Cause | None:
    """The cause of an error that CUDA or one of its libraries gave as this text."""
    return _CUDA.get(text.partition(" when calling `")[0].rstrip(". "), Cause.APPLICATION_FAULT)


def _gib(size: str | None) -> float | None:
    """A size as torch ("605.88 MiB") or vLLM ("59.32", of GiB) writes it."""
    if size is None:
        return None
    number, _, unit = size.partition(" ")
    return float(number) / _GIB[unit or "GiB"]

"""What vLLM 0.32 on torch 2.13 prints when something of its fails."""

import os
from collections.abc import Iterable

from tests.doubles.engine.tree import log

GIB = 1024  # MiB
CONTEXT_MIB = 500  # CUDA's own, before torch has allocated anything
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
SITE = "/opt/venv/lib/python3.12/site-packages/vllm/"

OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {tried}. GPU {index} has a total"
    " capacity of {total} of which {free} is free. Including non-PyTorch memory, this process has"
    " {used} memory in use. Of the allocated memory {allocated} is allocated by PyTorch, and"
    " {reserved} is reserved by PyTorch but unallocated. If reserved but unallocated memory is"
    " large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See"
    " documentation for Memory Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html"
    "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
)
NO_GPU = (
    "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 304: OS call failed or"
    " operation not supported on this OS; No CUDA GPUs are available"
)
# A program's own failure, in whose text a client's prompt has the words of another one.
WORDS = (
    "ValueError: Prompt \"Why does my script die with 'torch.OutOfMemoryError: CUDA out of memory."
    " Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB'? I set"
    ' PYTORCH_ALLOC_CONF." has a token id that is out of vocabulary'
)
CUDA = {
    "illegal": ("an illegal memory access was encountered", "cudaErrorIllegalAddress"),
    "ecc": ("uncorrectable ECC error encountered", "cudaErrorECCUncorrectable"),
    "launch": ("unspecified launch failure", "cudaErrorLaunchFailure"),
}
HINTS = """\
Search for `{name}' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for \
more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace \
below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
FAILED = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s):"
    " {'EngineCore': 1}"
)

SERVING = (
    ("v1/engine/core.py", 1496, "run_engine_core", "engine_core.run_busy_loop()"),
    ("v1/engine/core.py", 1555, "run_busy_loop", "self._process_engine_step()"),
    ("v1/engine/core.py", 1606, "_process_engine_step", "outputs, executed = self.step_fn()"),
    ("v1/worker/gpu_model_runner.py", 3412, "execute_model", "hidden = self._model_forward("),
)
STARTING = (
    ("v1/engine/core.py", 1482, "run_engine_core", "engine_core = EngineCoreProc("),
    ("v1/engine/core.py", 1194, "__init__", "super().__init__("),
    ("v1/engine/core.py", 144, "__init__", "self.model_executor = executor_class(vllm_config)"),
    ("v1/executor/abstract.py", 126, "__init__", "self._init_executor()"),
)
AT_THE_DEVICE = (
    *STARTING,
    ("v1/executor/uniproc_executor.py", 69, "_init_executor", "self.driver_worker.init_device()"),
    ("v1/worker/worker_base.py", 350, "init_device", "self.worker.init_device()"),
    ("v1/worker/gpu_worker.py", 535, "init_device", "self.requested_memory = request_memory("),
    ("v1/worker/utils.py", 762, "request_memory", "raise ValueError("),
)
AT_THE_WEIGHTS = (
    *STARTING,
    ("v1/executor/uniproc_executor.py", 74, "_init_executor", "self.driver_worker.load_model()"),
    ("v1/worker/gpu_worker.py", 600, "load_model", "self.model_runner.load_model("),
)
Frames = Iterable[tuple[str, int, str, str]]


def cuda(kind: str) -> str:
    """EngineCore's end while it serves."""
    if kind == "oom":
        error = [
            OUT_OF_MEMORY.format(
                tried="2.00 GiB",
                index=0,
                total="139.80 GiB",
                free="1.12 GiB",
                used="138.67 GiB",
                allocated="135.01 GiB",
                reserved="1.46 GiB",
            )
        ]
    elif kind in CUDA:
        what, name = CUDA[kind]
        error = [
            f"torch.AcceleratorError: CUDA error: {what}",
            *HINTS.format(name=name).split("\n"),
        ]
    else:
        error = [{"lost": NO_GPU, "oom_words": WORDS}[kind]]
    return _core_failed("EngineCore encountered a fatal error.", SERVING, error) + engine_dead()


def no_gpu() -> str:
    """The end of a start for which the GPU is not there."""
    return _not_started(AT_THE_DEVICE[:-1], NO_GPU)


def over_budget(index: int, free_mib: int, total_mib: int, wanted_mib: int) -> str:
    """The end of a start that finds too little free before it has taken anything."""
    free, total, wanted = (round(mib / GIB, 2) for mib in (free_mib, total_mib, wanted_mib))
    error = (
        f"ValueError: Free memory on device cuda:{index} ({free}/{total} GiB) on startup is less"
        f" than desired GPU memory utilization ({round(wanted_mib / total_mib, 2)}, {wanted} GiB)."
        " Decrease GPU memory utilization or reduce GPU memory used by other processes."
    )
    return _not_started(AT_THE_DEVICE, error)


def out_of_memory(index: int, free_mib: int, total_mib: int, wanted_mib: int) -> str:
    """The end of a start that runs out while it loads the weights."""
    error = OUT_OF_MEMORY.format(
        tried=_size(wanted_mib),
        index=index,
        total=_size(total_mib),
        free=_size(free_mib),
        used=_size(CONTEXT_MIB),
        allocated="0 bytes",
        reserved="0 bytes",
    )
    return _not_started(AT_THE_WEIGHTS, error)


def engine_dead() -> str:
    """What the API server says when EngineCore is gone."""
    lines = (
        "AsyncLLM output_handler failed.",
        "Traceback (most recent call last):",
        f'  File "{SITE}v1/engine/async_llm.py", line 660, in output_handler',
        "    outputs = await engine_core.get_output_async()",
        f"vllm.v1.engine.exceptions.EngineDeadError: {DEAD}",
    )
    return "".join(log("APIServer", "ERROR", line) for line in lines)


def _not_started(frames: Frames, error: str) -> str:
    last = (
        "Traceback (most recent call last):",
        f'  File "{SITE}v1/engine/utils.py", line 1431, in wait_for_engine_startup',
        "    raise RuntimeError(",
        FAILED,
    )
    failed = _core_failed("EngineCore failed to start.", frames, [error])
    return failed + "".join(_plain("APIServer", line) for line in last)


def _core_failed(headline: str, frames: Frames, error: Iterable[str]) -> str:
    """As vLLM does it: once through its log and once more from the process that ends of it."""
    lines = ["Traceback (most recent call last):"]
    for path, number, function, code in frames:
        lines += [f'  File "{SITE}{path}", line {number}, in {function}', f"    {code}"]
    lines += error
    logged = "".join(log("EngineCore", "ERROR", line) for line in (headline, *lines))
    return logged + "".join(_plain("EngineCore", line) for line in ("Process EngineCore:", *lines))


def _plain(who: str, line: str) -> str:
    return f"({who} pid={os.getpid()}) {line}\n"


def _size(mib: int) -> str:
    return f"{mib / GIB:.2f} GiB" if mib >= GIB else f"{mib:.2f} MiB"

"""The ways in which an engine process dies, and what it prints on the way."""

import os
import signal
from typing import NoReturn

from tests.doubles.engine.tree import Tree, log, say

DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
CORE_LINGERS_S = 0.2  # from EngineCore's death to the end of vLLM's API server

CUDA = {
    "illegal": "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
    "oom": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a"
    " total capacity of 139.80 GiB of which 1.12 GiB is free. Including non-PyTorch memory, this"
    " process has 138.67 GiB memory in use. Of the allocated memory 135.01 GiB is allocated by"
    " PyTorch, and 1.46 GiB is reserved by PyTorch but unallocated. If reserved but unallocated"
    " memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid"
    " fragmentation.",
    "ecc": "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered",
    "launch": "torch.AcceleratorError: CUDA error: unspecified launch failure",
    "lost": "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 304: OS call failed or"
    " operation not supported on this OS; No CUDA GPUs are available",
}
HINTS = (
    "CUDA kernel errors might be asynchronously reported at some other API call.",
    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1",
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
)
FRAMES = (
    ("vllm/v1/engine/core.py", 1117, "run_engine_core", "engine_core.run_busy_loop()"),
    ("vllm/v1/engine/core.py", 1144, "run_busy_loop", "self._process_engine_step()"),
    ("vllm/v1/engine/core.py", 1189, "_process_engine_step", "outputs = self.step_fn()"),
    ("vllm/v1/worker/gpu_model_runner.py", 3412, "execute_model", "hidden = self._model_forward("),
)


def cuda_traceback(kind: str) -> str:
    lines = ["EngineCore encountered a fatal error.", "Traceback (most recent call last):"]
    for path, line, function, code in FRAMES:
        lines.append(
            f'  File "/opt/venv/lib/python3.12/site-packages/{path}", line {line}, in {function}'
        )
        lines.append(f"    {code}")
    lines.append(CUDA[kind])
    if "AcceleratorError" in CUDA[kind]:
        lines += HINTS
    return "".join(log("EngineCore", "ERROR", line) for line in lines)


def engine_dead_traceback() -> str:
    lines = (
        "AsyncLLM output_handler failed.",
        "Traceback (most recent call last):",
        '  File "/opt/venv/lib/python3.12/site-packages/vllm/v1/engine/async_llm.py", line 660',
        "    outputs = await engine_core.get_output_async()",
        f"vllm.v1.engine.exceptions.EngineDeadError: {DEAD}",
    )
    return "".join(log("APIServer", "ERROR", line) for line in lines)


def die(how: str, tree: Tree, cuda_kind: str) -> NoReturn:
    """End this process at once; nothing is cleaned up and the children are not told."""
    if how == "cuda":
        say(2, cuda_traceback(cuda_kind))
        tree.kill_core()
        os._exit(1)
    if how == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("segv", "abort"):
        say(2, f"Fatal Python error: {'Segmentation fault' if how == 'segv' else 'Aborted'}\n\n")
        number = signal.SIGSEGV if how == "segv" else signal.SIGABRT
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(0 if how == "exit0" else 1)

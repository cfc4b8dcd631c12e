"""The ways in which an engine process dies."""

import os
import signal
from typing import NoReturn

from tests.doubles.engine import tracebacks
from tests.doubles.engine.tree import Tree, say

GREED_MIB = 256
CORE_LINGERS_S = 0.2  # from EngineCore's death to the end of vLLM's API server


def die(how: str, tree: Tree, cuda_kind: str) -> NoReturn:
    """End this process at once; nothing is cleaned up and the children are not told."""
    if how.startswith("cuda"):
        say(2, tracebacks.cuda(cuda_kind if how == "cuda" else how.removeprefix("cuda_")))
        tree.kill_core()
        os._exit(1)
    if how == "greedy":
        _take_memory()
    if how == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("segv", "abort"):
        say(2, f"Fatal Python error: {'Segmentation fault' if how == 'segv' else 'Aborted'}\n\n")
        number = signal.SIGSEGV if how == "segv" else signal.SIGABRT
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(0 if how == "exit0" else 1)


def _take_memory() -> None:
    """For the kernel to kill it; bounded, lest nobody limits this process."""
    taken = [bytearray(1 << 20) for _ in range(GREED_MIB)]
    say(2, f"{len(taken)} MiB, and nobody minds\n")

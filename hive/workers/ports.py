"""What hive needs of an engine, whichever it is."""

from typing import Protocol

from hive.workers.client import EngineClient
from hive.workers.process import Launch, Place


class Engine(Protocol):
    """One model's engine, in hive's words. Implementations hold settings, no processes."""

    health_path: str
    has_gauges: bool  # it publishes vLLM's gauges of what runs and waits
    computing: tuple[str, ...]  # beginnings of the names of the processes that compute, if known
    address: str | None  # http://HOST:PORT where it does not listen on the socket of its place

    def launch(
        self, place: Place, devices: tuple[str, ...], visible: str | None, total_bytes: int
    ) -> Launch:
        """Arguments and environment of one start; blocking.

        `devices` are the worker's as configured; `visible` is CUDA_VISIBLE_DEVICES by UUID, or
        None on the CPU; `total_bytes` is the memory of the smallest of them, 0 on the CPU.
        Raises WorkerSpawnFailed when the engine's program is not there, and ConfigInvalid for
        what cannot be passed on.
        """
        ...

    async def probe(self, client: EngineClient) -> None:
        """Have the engine do the smallest piece of its real work; READY follows.

        Raises ProbeFailed while it does not answer as it should.
        """
        ...

"""The leader's life: load, listen, watch the children, and end as it was told to."""

import asyncio
import os
import resource
import signal
import socket
import time
from contextlib import suppress
from typing import NoReturn

from tests.doubles.engine import dying, tracebacks, vram
from tests.doubles.engine.answers import Answer
from tests.doubles.engine.api import Api
from tests.doubles.engine.asks import Json
from tests.doubles.engine.knobs import Knobs, parse
from tests.doubles.engine.kv import Lost
from tests.doubles.engine.scheduler import Scheduler
from tests.doubles.engine.tree import WATCHED, Tree, log, say
from tests.doubles.engine.wire import Connection

BACKLOG = 2048
NOISE_S = 0.05


class Server:
    """The one process that answers."""

    def __init__(self, knobs: Knobs, tree: Tree, loop: asyncio.AbstractEventLoop) -> None:
        self.knobs = knobs
        self.tree = tree
        self.loop = loop
        self.scheduler = Scheduler(knobs, loop)
        self.api = Api(knobs, self.scheduler, self)
        self.stop: asyncio.Future[int] = loop.create_future()
        self._connections: set[Connection] = set()
        self._listeners: list[asyncio.Server] = []
        self._paths: list[str] = []
        self._noise_lines = 0.0
        self._noise: asyncio.TimerHandle | None = None
        self._exit: asyncio.TimerHandle | None = None

    async def run(self) -> int:
        """Until told to stop; the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._told_to_end)
        self.loop.add_signal_handler(signal.SIGCHLD, self._child_ended)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        self.api.write_down("start", lambda: {"pid": os.getpid(), "wall": time.time()})
        try:
            await self._load()
            code = await self.stop
        except OSError as exc:
            say(2, log("APIServer", "ERROR", f"OSError: {exc}"))
            code = 1
        self._close()
        # Their ends are written down before the process is gone.
        await asyncio.sleep(0)
        self.tree.end()
        return code

    def die(self, how: str, answers: list[Answer]) -> None:
        if how == "core":
            self._kill_core()
            return
        if "midchunk" in how:
            for answer in answers:
                answer.cut()
        if how.startswith("hangup"):
            for answer in answers:
                answer.hang_up()
            return
        dying.die(how, self.tree, self.knobs.cuda_kind)

    def knobs_turned(self, names: set[str]) -> None:
        self.tree.grow(self.knobs)
        self.scheduler.poke()
        if "noise" in names:
            self._make_noise()
        if "exit_after_s" in names:
            self._plan_exit()

    def state(self) -> Json:
        return {
            "tree": self.tree.as_dict(),
            "running": self.scheduler.running_parts,
            "waiting": self.scheduler.waiting_parts,
            "connections": len(self._connections),
            "fds": len(os.listdir("/proc/self/fd")) - 1,
            "counts": self.api.counts,
            "dead": self.api.is_dead,
            "kv_lost": self.api.kv is not None and self.api.kv.is_lost,
        }

    async def _load(self) -> None:
        if self.knobs.control:
            await self._listen(self.knobs.control, replace=True)
        self._make_noise()
        if self.knobs.vram_mib and (told := self._take_vram()):
            say(2, told)
            self.stop.set_result(1)
            return
        if self.knobs.load_s:
            await asyncio.wait([self.stop], timeout=self.knobs.load_s)
        if self.stop.done():
            return
        if self.knobs.load_fail:
            say(2, self.knobs.load_fail + "\n")
            self.stop.set_result(1)
            return
        if self.api.kv is not None:
            try:
                await self.api.kv.connect(self.stop)
            except Lost as exc:
                say(2, log("EngineCore", "ERROR", f"ConnectionError: {exc}"))
                self._end(1)
            if self.stop.done():
                return
        await self._listen(self.knobs.uds)
        self.api.healthy_from = time.monotonic() + self.knobs.warm_s
        self._plan_exit()
        started = f"Starting vLLM API server 0 on unix:{self.knobs.uds}"
        say(1, log("APIServer", "INFO", started))

    def _take_vram(self) -> str:
        """What is printed when it cannot be had."""
        pid = self.tree.worker or os.getpid()
        try:
            vram.take(os.environ["NVML_DOUBLE"], vram.visible(), pid, self.knobs.vram_mib)
        except LookupError:
            return tracebacks.no_gpu()
        except vram.Short as short:
            budget = self.knobs.vram_short == "budget"
            tell = tracebacks.over_budget if budget else tracebacks.out_of_memory
            return tell(short.index, short.free_mib, short.total_mib, self.knobs.vram_mib)
        return ""

    async def _listen(self, path: str, *, replace: bool = False) -> None:
        """Like vLLM: a socket file that an earlier life left behind is in the way."""
        if replace:
            _unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(path)
        self._paths.append(path)
        self._listeners.append(
            await self.loop.create_unix_server(
                lambda: Connection(self.api, self._connections), sock=listener, backlog=BACKLOG
            )
        )

    def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        for path in self._paths:
            _unlink(path)
        for connection in list(self._connections):
            connection.drop()

    def _told_to_end(self) -> None:
        if self.knobs.ignore_term:
            return
        if self.knobs.term_s:
            for listener in self._listeners:
                listener.close()
            self.loop.call_later(self.knobs.term_s, self._end, 0)
        else:
            self._end(0)

    def _end(self, code: int) -> None:
        if not self.stop.done():
            self.stop.set_result(code)

    def _child_ended(self) -> None:
        if "core" in self.tree.reap() and not self.stop.done():
            self._core_died()

    def _kill_core(self) -> None:
        if self.tree.core is None:
            self._core_died()
        else:
            self.tree.kill_core()  # SIGCHLD tells

    def _core_died(self) -> None:
        if self.api.is_dead:
            return
        say(2, tracebacks.engine_dead())
        self.api.engine_died()
        self.loop.call_later(dying.CORE_LINGERS_S, self._end, 0)

    def _plan_exit(self) -> None:
        if self._exit is not None:
            self._exit.cancel()
        after_s = self.knobs.exit_after_s
        if after_s is not None:
            self._exit = self.loop.call_later(after_s, lambda: self._end(self.knobs.exit_code))

    def _make_noise(self) -> None:
        if self._noise is not None:
            self._noise.cancel()
            self._noise = None
        if not self.knobs.noise:
            return
        self._noise_lines += self.knobs.noise * NOISE_S
        lines = int(self._noise_lines)
        self._noise_lines -= lines
        told = (
            f"Engine 000: Avg prompt throughput: 0.0 tokens/s, Running: "
            f"{self.scheduler.running_parts} reqs, Waiting: {self.scheduler.waiting_parts} reqs"
        )
        line = log("APIServer", "INFO", told)
        say(1, line * (lines - lines // 2))
        say(2, line * (lines // 2))
        self._noise = self.loop.call_later(NOISE_S, self._make_noise)


def main(argv: list[str]) -> NoReturn:
    knobs = parse(argv)
    # A closed 0, 1 or 2 would be taken by a socket, and printing would then write into it.
    while (fd := os.open("/dev/null", os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)  # until there is somebody to act on them
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an inherited SIG_IGN would reap our children
    tree = Tree(knobs.max_life_s)
    if knobs.stderr:
        say(2, knobs.stderr + "\n")
    tree.grow(knobs)
    loop = asyncio.new_event_loop()
    code = loop.run_until_complete(Server(knobs, tree, loop).run())
    os._exit(code)  # the interpreter's own end takes 10 ms and has nothing left to do


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)

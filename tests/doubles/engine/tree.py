"""The double's children, and what it takes from the machine: like vLLM's, and worse on request."""

import mmap
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from tests.doubles.engine.knobs import Knobs

SHM = "/dev/shm/"
SHM_BYTES = 64 * 1024
CHILD_WAIT_S = 1.0
ARGUMENTS, ENVIRONMENT = 45, 47  # words of /proc/self/stat after the name: where they begin
ENDING = (signal.SIGTERM, signal.SIGINT)
WATCHED = {*ENDING, signal.SIGCHLD}


class Tree:
    """The sole owner of every process and file that the double makes besides its sockets."""

    def __init__(self, max_life_s: float) -> None:
        self.core: int | None = None
        self.worker: int | None = None
        self.busy: int | None = None
        self.escaped: int | None = None
        self.shm: list[str] = []
        self.tmp: list[str] = []
        self._held: list[mmap.mmap] = []
        self._held_by_core: set[str] = set()
        self._core_was_made = False
        self._ends_at = time.monotonic() + max_life_s
        # Shared with every child, so that a knob turned later reaches them.
        self._stubborn = mmap.mmap(-1, 1)
        # What the parent passed on goes on to the children, as with vLLM; our sockets do not.
        self._inherited = frozenset(_open_fds())
        self.limit_life()

    def __repr__(self) -> str:
        return f"<Tree {self.as_dict()}>"

    @property
    def stubborn(self) -> bool:
        return self._stubborn[0] == 1

    def as_dict(self) -> dict[str, object]:
        pids = {"core": self.core, "worker": self.worker}
        pids |= {"busy": self.busy, "escaped": self.escaped}
        return {"leader": os.getpid(), **pids, "shm": self.shm, "tmp": self.tmp}

    def limit_life(self) -> None:
        # Timers are not inherited over a fork; a blocked or ignored alarm would be.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        signal.setitimer(signal.ITIMER_REAL, max(self._ends_at - time.monotonic(), 0.001))

    def grow(self, knobs: Knobs) -> None:
        """Make what the knobs ask for and is not there yet."""
        self._stubborn[0] = knobs.ignore_term
        names = ["psm_" + os.urandom(4).hex() for _ in range(knobs.shm - len(self.shm))]
        self.shm += names
        if knobs.core and not self._core_was_made:
            self._core_was_made = True
            self._held_by_core.update(names)
            self._fork_core(names)
        else:
            self._held += hold(names)
        if knobs.setsid_grandchild and self.escaped is None:
            self.escaped = self._fork_escaped(wipes=knobs.wipe_environment)
        if knobs.busy and self.busy is None:
            self.busy = self._fork("VLLM::Worker", self._burn)
        if not knobs.busy and self.busy is not None:
            os.kill(self.busy, signal.SIGKILL)
            os.waitpid(self.busy, 0)
            self.busy = None
        for _ in range(knobs.tmp - len(self.tmp)):
            path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"vllm-{os.urandom(6).hex()}")
            with open(path, "wb") as litter:
                litter.write(bytes(1024))
            self.tmp.append(path)

    def reap(self) -> set[str]:
        """The names of the children that ended."""
        ended = set()
        for name in ("core", "busy"):
            pid = getattr(self, name)
            if pid is not None and _reaped(pid):
                setattr(self, name, None)
                ended.add(name)
        return ended

    def kill_core(self) -> None:
        """As the kernel or the driver does it: nothing of EngineCore's is cleaned up."""
        if self.core is not None:
            os.kill(self.core, signal.SIGKILL)

    def end(self) -> None:
        """End the children and give everything back, but for what was told to stay."""
        children = [pid for pid in (self.core, self.busy) if pid is not None]
        if not self.stubborn:
            with signals_blocked():
                _end(children)
        release(name for name in self.shm if name not in self._held_by_core)

    def _fork(self, name: str, body: Callable[[], None], keep: Collection[int] = ()) -> int:
        with signals_blocked():
            pid = os.fork()
            if pid == 0:
                self._live(name, body, keep)
        return pid

    def _live(self, name: str, body: Callable[[], None], keep: Collection[int]) -> NoReturn:
        """Be the child: never return into the leader's code."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)  # it is the leader's event loop's
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for mapped in self._held:
                mapped.close()
            self._held.clear()
            for fd in _open_fds() - self._inherited - set(keep):
                os.close(fd)
            self.limit_life()
            rename(name)
            body()
            status = 0
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException as exc:  # noqa: BLE001  nothing may leave this function
            say(2, f"engine double: {name}: {exc!r}\n")
        finally:
            os._exit(status)

    def _fork_core(self, names: list[str]) -> None:
        ready, tell = os.pipe()
        self.core = self._fork("VLLM::EngineCore", lambda: self._be_core(names, tell), (tell,))
        os.close(tell)
        self.worker = int(os.read(ready, 20) or 0) or None
        os.close(ready)

    def _be_core(self, names: list[str], tell: int) -> None:
        self._held = hold(names)
        alive, _lives = os.pipe()  # stays open for as long as EngineCore lives
        worker = self._fork("VLLM::Worker", lambda: self._be_worker(alive), (alive,))
        os.close(alive)
        os.write(tell, b"%d" % worker)
        os.close(tell)
        while True:
            caught = signal.sigwait(WATCHED)
            asked = caught in ENDING or not signal.sigpending().isdisjoint(ENDING)
            if asked and not self.stubborn:
                _end([worker])
                release(names)
                return
            if caught == signal.SIGCHLD and _reaped(worker):
                say(2, log("EngineCore", "ERROR", "Worker proc VllmWorker-0 died unexpectedly."))
                release(names)
                raise SystemExit(1)

    def _be_worker(self, core_lives: int) -> None:
        self._exit_when_told()
        os.read(core_lives, 1)  # returns when EngineCore is gone
        while self.stubborn:
            signal.pause()

    def _burn(self) -> None:
        self._exit_when_told()
        os.nice(19)  # burning is the point, taking the core from others is not
        while True:
            pass

    def _exit_when_told(self) -> None:
        def told(*_: object) -> None:
            if not self.stubborn:
                os._exit(0)

        for number in ENDING:
            signal.signal(number, told)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)

    def _fork_escaped(self, *, wipes: bool) -> int:
        ready, tell = os.pipe()

        def escape() -> None:
            os.setsid()
            self._fork("VLLM::escaped", stay, (tell,))

        def stay() -> None:
            for number in (*ENDING, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            if wipes:
                overwrite(ENVIRONMENT, "")
            os.write(tell, b"%d" % os.getpid())
            os.close(tell)
            while True:
                signal.pause()

        os.waitpid(self._fork("VLLM::fork", escape, (tell,)), 0)
        os.close(tell)
        pid = int(os.read(ready, 20))
        os.close(ready)
        return pid


def hold(names: Collection[str]) -> list[mmap.mmap]:
    held = []
    for name in names:
        fd = os.open(SHM + name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        os.ftruncate(fd, SHM_BYTES)
        held.append(mmap.mmap(fd, SHM_BYTES))
        os.close(fd)
    return held


def release(names: Iterable[str]) -> None:
    for name in names:
        with suppress(FileNotFoundError):
            os.unlink(SHM + name)


def rename(name: str) -> None:
    """Show the name in ps and top, as setproctitle does, without its C extension."""
    with open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write(name)
    overwrite(ARGUMENTS, name)


def overwrite(field: int, text: str) -> None:
    """Fill the memory in which others see our arguments or our environment."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as stat:
        words = stat.read().rpartition(")")[2].split()
    start, end = int(words[field]), int(words[field + 1])
    try:
        memory = os.open("/proc/self/mem", os.O_WRONLY)
    except OSError:
        return  # hardened kernels; comm has the name
    try:
        os.pwrite(memory, text.encode()[: end - start - 1].ljust(end - start, b"\0"), start)
    except OSError:
        pass
    finally:
        os.close(memory)


def say(fd: int, text: str) -> None:
    """Print past Python's buffers; a reader that is gone does not matter."""
    rest = text.encode(errors="replace")
    try:
        while rest:
            rest = rest[os.write(fd, rest) :]
    except OSError:
        pass


def log(who: str, level: str, text: str) -> str:
    stamp = time.strftime("%m-%d %H:%M:%S")
    return f"({who} pid={os.getpid()}) {level} {stamp} [double.py:1] {text}\n"


@contextmanager
def signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _open_fds() -> set[int]:
    fds = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))  # the listing's own descriptor is closed by now
        except OSError:
            continue
        fds.add(int(name))
    return fds


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _end(children: list[int]) -> None:
    """TERM and reap; SIGCHLD must be blocked, or its wait could miss it."""
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    left = set(children)
    deadline = time.monotonic() + CHILD_WAIT_S
    while left := {pid for pid in left if not _reaped(pid)}:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return
        signal.sigtimedwait({signal.SIGCHLD}, remaining)

"""Builds the managed engine environment: whole, or not at all."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from hive.errors import ConfigInvalid, HiveError, InsufficientDisk, WorkerSpawnFailed
from hive.workers import environment, guard
from hive.workers.environment import PYTHON, Completed, python_of

# 3.6 GB stay; the wheels are unpacked beside them, and pip's own cache grows by what it fetches.
DISK_NEEDED_MB = 6_000
TICK_S = 0.25
PROVED = ("vllm", "lmcache", "torch")
END_S = 5.0  # what pip gets to remove its temporary files
LOOK_S = 0.02
LAST_LINES = 12
# pip names what it fetches by pin or by file, and always by the lock file's line.
FETCHING = re.compile(r"(Collecting|Processing) .*\(line (?P<line>\d+)\)")

# The kernel ends pip with hive, even when hive is killed; SIGINT lets pip clean up after itself.
TIED = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
ctypes.CDLL(None).prctl(1, signal.SIGINT)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
PROBE = """
import json, platform, sys
print(json.dumps([platform.python_version(), sys.platform, platform.machine()]))
"""
PROOF = """
import importlib, json, sys
from importlib.metadata import packages_distributions, version
for name in sys.argv[1:]:
    importlib.import_module(name)
found = packages_distributions()
print(json.dumps({name: version(found[name][0]) for name in sys.argv[1:]}))
"""


class Progress(Protocol):
    """Who is told how far an install is."""

    def note(self, text: str) -> None: ...
    def step(self, done: int, total: int, what: str) -> None: ...


@dataclass(frozen=True)
class Plan:
    """One environment to build: from which lock file, where, with which Python and index."""

    home: Path
    lock: Path
    interpreter: Path
    index: str | None = None
    imports: tuple[str, ...] = PROVED  # what must import before the environment counts as whole
    disk_needed_mb: int = DISK_NEEDED_MB

    @property
    def log(self) -> Path:
        return self.home.with_name(f"{self.home.name}.log")

    @property
    def python(self) -> Path:
        return python_of(self.home)

    @property
    def pins(self) -> list[str]:
        lines = (line.partition("#")[0].strip() for line in self.lock.read_text().splitlines())
        return [line for line in lines if line]


def build(plan: Plan, tell: Progress, *, force: bool = False) -> Completed:
    """Build the environment, unless another install has just finished it.

    It is built in its final place, since a virtual environment cannot be moved, and its marker is
    written last: whatever ends an install, nothing unfinished is ever taken for whole.
    """
    try:
        with _alone(plan.home, tell) as lock_fd:
            found = environment.completed(plan.home)
            if found and not force:
                return found
            if not found:
                _remove(plan.home)
            python_version = _check_interpreter(plan.interpreter)
            _check_disk(plan)
            return _build(plan, tell, lock_fd, python_version)
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise _disk_full(plan) from exc
        raise ConfigInvalid(
            f"{exc.filename or plan.home}: {exc.strerror or exc}.",
            action="Set HIVE_ENGINES to a directory that you may write to, with room for 6 GB.",
        ) from exc


def _build(plan: Plan, tell: Progress, lock_fd: int, python_version: str) -> Completed:
    _remove(plan.home)
    plan.log.write_bytes(b"")
    try:
        _make_venv(plan, lock_fd)
        for pin in plan.pins:
            if "+" in pin:
                _check_offered(plan, pin, lock_fd)
        _install(plan, tell, lock_fd)
        tell.note(f"trying it: import {', '.join(plan.imports)}")
        versions = _prove(plan, lock_fd)
        shutil.rmtree(_temporary(plan))
        done = environment.complete(plan.home, plan.lock, python=python_version, versions=versions)
    except BaseException:  # Ctrl+C, too: half an environment only takes room
        tell.note("removing what was begun")
        _remove(plan.home)
        raise
    plan.log.unlink()
    return done


def default_interpreter() -> Path:
    if sys.version_info[:2] == tuple(map(int, PYTHON.split("."))):
        return Path(sys.executable)
    found = shutil.which(f"python{PYTHON}")
    if not found:
        raise _wrong_python(f"There is no python{PYTHON} on the PATH")
    return Path(found)


def _check_interpreter(interpreter: Path) -> str:
    """The interpreter's full version, if the lock file's wheels fit it."""
    command = (str(interpreter), "-I", "-c", PROBE)
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        version, system, machine = json.loads(answer)
    except (OSError, ValueError) as exc:
        raise _wrong_python(f"{interpreter} is not a working Python") from exc
    if not version.startswith(f"{PYTHON}."):
        raise _wrong_python(f"{interpreter} is Python {version}")
    if (system, machine) != ("linux", "x86_64"):
        raise ConfigInvalid(
            f"The managed engine environment is for Linux on x86_64; this is {system} on {machine}.",
            action="Build an environment with vLLM yourself and name its Python in models.NAME.python.",
        )
    return str(version)


def _wrong_python(what: str) -> HiveError:
    return ConfigInvalid(
        f"{what}; the engine environment's lock file was made for, and tried on, Python {PYTHON} only.",
        action=f"Name a Python {PYTHON} with --python PATH (hive itself may run on a newer one).",
    )


def _check_disk(plan: Plan) -> None:
    free_mb = shutil.disk_usage(plan.home.parent).free // 1_000_000
    if free_mb < plan.disk_needed_mb:
        raise _disk_full(plan)


def _disk_full(plan: Plan) -> HiveError:
    free_mb = shutil.disk_usage(plan.home.parent).free // 1_000_000
    return InsufficientDisk(
        f"The engine environment needs {plan.disk_needed_mb:,} MB in {plan.home.parent}; "
        f"{free_mb:,} MB are free.",
        action="Free that space, or set HIVE_ENGINES to a directory on another disk.",
        required_disk_mb=plan.disk_needed_mb,
        available_disk_mb=free_mb,
    )


def _make_venv(plan: Plan, lock_fd: int) -> None:
    status, lines = _run(plan, [plan.interpreter, "-I", "-m", "venv", plan.home], lock_fd)
    if status:
        raise _failed(plan, "The virtual environment could not be made", lines)
    _temporary(plan).mkdir()


def _temporary(plan: Plan) -> Path:
    """Temporary files lie within: they go with it, and need no room on another disk."""
    return plan.home / "tmp"


def _check_offered(plan: Plan, pin: str, lock_fd: int) -> None:
    """Ask for the one pin that a common index lacks before gigabytes are fetched for nothing."""
    name, _, version = pin.partition("==")
    # Lists versions only: pip's other dry runs fetch the whole wheel.
    status, lines = _run(plan, _pip(plan, "index", "versions", name), lock_fd)
    offered = next((line for line in lines if line.startswith("Available versions:")), "")
    if not status and version in re.split(r"[\s,]+", offered):
        return
    silent = any("Retrying (" in line for line in lines)
    local = version.partition("+")[2]
    raise ConfigInvalid(
        f"pip finds no {pin}"
        + (" (an index could not be reached). It" if silent else ": it")
        + f" needs a package index that carries PyTorch's CPU builds, which have the local version +{local}.",
        action="Name one with --index URL, or in pip's configuration (extra-index-url or find-links).",
        problems=_last(lines) if silent else [],
    )


def _install(plan: Plan, tell: Progress, lock_fd: int) -> None:
    requirements = ("--requirement", plan.lock)
    # No dependencies: the metadata asks for CUDA builds that break the CPU's (docs/engines.md).
    command = _pip(plan, "install", "--no-deps", "--only-binary=:all:", "--progress-bar=off")
    status, lines = _run(plan, [*command, *requirements], lock_fd, _Watch(plan, tell))
    if status and any("No space left on device" in line for line in lines):
        raise _disk_full(plan)
    if status:
        raise _failed(plan, "pip could not install the engine environment", lines)


class _Watch:
    """Tell how far pip is: what it fetches, from its output; what it installed, from the disk."""

    def __init__(self, plan: Plan, tell: Progress) -> None:
        self.tell, self.total = tell, len(plan.pins)
        self.lock_lines = plan.lock.read_text().splitlines()
        self.names = {_normal(pin.partition("==")[0]) for pin in plan.pins}
        self.packages = plan.home / "lib" / f"python{PYTHON}" / "site-packages"
        self.fetched = self.installed = 0
        self.is_installing = False

    def __call__(self, lines: list[str]) -> None:
        for line in lines:
            if asked := FETCHING.match(line):
                self.fetched += 1
                pin = self.lock_lines[int(asked["line"]) - 1]
                self.tell.step(self.fetched, 2 * self.total, f"fetching {pin}")
            self.is_installing |= line.startswith("Installing collected packages:")
        if self.is_installing:
            self._count_installed()

    def _count_installed(self) -> None:
        found = self.packages.glob("*.dist-info/RECORD")
        there = {_normal(path.parent.stem.rpartition("-")[0]) for path in found}
        count = len(there & self.names)
        if count > self.installed:
            self.installed = count
            self.tell.step(
                self.total + count, 2 * self.total, f"installed {count} of {self.total} packages"
            )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _prove(plan: Plan, lock_fd: int) -> dict[str, str]:
    status, lines = _run(plan, [plan.python, "-I", "-c", PROOF, *plan.imports], lock_fd)
    if status:
        raise _failed(plan, "The engine environment is there but does not import", lines)
    versions: dict[str, str] = json.loads(lines[-1])
    return versions


def _failed(plan: Plan, what: str, lines: list[str]) -> HiveError:
    last = _last(lines)
    reason = next((line for line in reversed(last) if "error" in line.lower()), "".join(last[-1:]))
    return WorkerSpawnFailed(
        f"{what}: {reason.removeprefix('ERROR: ')}",
        action=f"Correct what is named and run 'hive engine install cpu' again; the output is in {plan.log}.",
        problems=last,
    )


def _last(lines: list[str]) -> list[str]:
    told = [line[:400] for line in lines if line.strip() and not line.startswith("Looking in ")]
    return told[-LAST_LINES:]


# ── Processes and files ─────────────────────────────────────────────────────────────────────────


def _pip(plan: Plan, *args: str) -> list[str | Path]:
    index = ["--extra-index-url", plan.index] if plan.index else []
    options = ["--no-input", "--disable-pip-version-check", "--no-color"]
    return [plan.python, "-I", "-u", "-m", "pip", *options, *args, *index]


def _run(
    plan: Plan,
    command: Sequence[str | Path],
    lock_fd: int,
    watch: Callable[[list[str]], None] = lambda _lines: None,
) -> tuple[int, list[str]]:
    """Run a step to its end, into the log; its status and its output."""
    tied = [sys.executable, "-I", "-c", TIED, str(os.getpid()), *command]
    log_lines, lines = _LogLines(plan.log), list[str]()
    with (
        plan.log.open("ab") as log,
        subprocess.Popen(
            tied,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_child_environment(plan),
            start_new_session=True,  # Ctrl+C goes to hive alone, which then ends the step
            pass_fds=(lock_fd,),  # a step that outlived hive would keep the next install waiting
        ) as process,
    ):
        try:
            status = None
            while status is None:
                status = _poll(process)
                new = log_lines.new(is_last=status is not None)
                watch(new)
                lines += new
        except BaseException:
            _end(process)
            raise
    return status, lines


class _LogLines:
    """The log's lines from now on, as they become whole."""

    def __init__(self, log: Path) -> None:
        self.log, self.begin = log, log.stat().st_size

    def new(self, *, is_last: bool) -> list[str]:
        with self.log.open("rb") as file:
            file.seek(self.begin)
            text = file.read()
        whole = text if is_last else text[: text.rfind(b"\n") + 1]
        self.begin += len(whole)
        return whole.decode(errors="replace").splitlines()


def _poll(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(TICK_S)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step, and what it started: venv's own pip outlives venv for a moment."""
    below = guard.descendants(process.pid)
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        give_up = time.monotonic() + END_S
        while time.monotonic() < give_up:
            if process.poll() is not None and not any(map(_lives, below)):
                return
            time.sleep(LOOK_S)


def _lives(process: guard.Process) -> bool:
    now = guard.look_at(process.pid)
    return now is not None and now.start == process.start and now.state != "Z"


def _child_environment(plan: Plan) -> Mapping[str, str]:
    unwanted = ("PYTHON", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "VIRTUAL_ENV")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    quiet |= {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
    tmp = {"TMPDIR": str(_temporary(plan))} if _temporary(plan).is_dir() else {}
    return kept | quiet | tmp


@contextmanager
def _alone(home: Path, tell: Progress) -> Iterator[int]:
    """Hold this environment's install lock; a second install waits for the first."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with _flock_file(home).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell.note("another install of this environment is at work; waiting for its end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def is_locked(home: Path) -> bool:
    try:
        with _flock_file(home).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _flock_file(home: Path) -> Path:
    return home.with_name(f".{home.name}.installing")


def _remove(home: Path) -> None:
    environment.revoke(home)
    if home.exists():
        shutil.rmtree(home)


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM clean up like Ctrl+C does."""

    def unwind(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

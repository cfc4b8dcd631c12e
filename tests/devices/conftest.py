"""GPUs for tests without one: the real pynvml of this process is answered by the NVML double."""

import contextlib
import ctypes
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from hive.devices.nvml import Driver, process_name
from tests.doubles import nvml as double
from tests.patience import wait_until

MakeDriver = Callable[[float], Driver]
Spawn = Callable[[], int]
HoldUp = Callable[[str], threading.Event]


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[double.Gpus]:
    """A host with a driver and no GPU yet."""
    double.load()
    if ctypes.CDLL(double.NAME)._handle != ctypes.CDLL(str(double.library()))._handle:
        pytest.skip("this process has loaded the host's own NVML before")
    gpus = double.Gpus(tmp_path / "nvml")
    monkeypatch.setenv("NVML_DOUBLE", gpus.env["NVML_DOUBLE"])
    yield gpus
    # They look at NVML_DOUBLE from another thread: it is not changed under them.
    wait_until(lambda: not threads("nvml events"), "the threads that listen to have ended")


def threads(name: str) -> list[threading.Thread]:
    """The living threads whose names begin like this."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


@pytest.fixture
def driver_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeDriver]:
    """Make a driver with its deadline in seconds."""
    monkeypatch.setattr("hive.devices.nvml.EVENT_MS", 50)  # so long each test's end waits for it
    with contextlib.ExitStack() as closing:

        def make(call_s: float) -> Driver:
            driver = Driver(call_s)
            closing.callback(driver.close)
            return driver

        yield make


@pytest.fixture
def driver(gpus: double.Gpus, driver_of: MakeDriver) -> Driver:
    return driver_of(60.0)


@pytest.fixture
def hold_up(gpus: double.Gpus, monkeypatch: pytest.MonkeyPatch) -> Iterator[HoldUp]:
    """Let a function of the bindings wait for an event: a call that hangs, and can be healed."""
    with contextlib.ExitStack() as letting_go:

        def hold(function: str) -> threading.Event:
            real, may_return = getattr(pynvml, function), threading.Event()
            letting_go.callback(may_return.set)

            def late(*args: Any) -> Any:
                may_return.wait()
                return real(*args)

            monkeypatch.setattr(pynvml, function, late)
            return may_return

        yield hold


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start a process, named cat, that lives until its test ends; its pid."""
    with contextlib.ExitStack() as ending:

        def start() -> int:
            process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
            ending.callback(process.communicate)
            # Popen returns a moment before the kernel has given it its name.
            wait_until(lambda: process_name(process.pid) == "cat", "the process to be cat")
            return process.pid

        yield start

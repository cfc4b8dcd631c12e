"""NVML: asked only for what is configured, and never waited for without an end."""

import ctypes
import threading
import time

import pytest

from hive.devices import nvml
from hive.errors import CudaDeviceFailed, CudaDriverMissing


def has_driver() -> bool:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


without_driver = pytest.mark.skipif(has_driver(), reason="this host has an NVIDIA driver")


@without_driver
@pytest.mark.parametrize("wanted", [["cuda:0"], ["cpu", "cuda:3", "cuda:0"], ["GPU-3b1f"]])
def test_without_a_driver_the_device_that_needs_one_is_named(wanted: list[str]) -> None:
    """The CPU that is configured, too, is not put in its place (R013, R014)."""
    needy = next(device for device in wanted if device != "cpu")
    with pytest.raises(CudaDriverMissing) as caught:
        nvml.resolve(wanted)

    assert caught.value.code == "CUDA_DRIVER_MISSING"
    assert caught.value.details["device"] == needy
    assert f"Device {needy} is configured" in caught.value.message
    assert 'device = "cpu"' in caught.value.suggested_action


@without_driver
def test_devices_cannot_be_listed_without_a_driver() -> None:
    with pytest.raises(CudaDriverMissing, match="driver cannot be used"):
        nvml.list_devices()


@pytest.mark.parametrize("wanted", [[], ["cpu"], ["cpu", "cpu"]])
def test_the_cpu_alone_asks_no_driver_anything(wanted: list[str]) -> None:
    """A host without a driver would refuse; one with a hung driver would not answer."""
    threads = threading.active_count()

    assert nvml.resolve(wanted) == {}
    assert threading.active_count() == threads


def test_a_call_that_never_returns_is_given_up() -> None:
    """(R014: it is an error of the device, not a reason to do without it.)"""
    release = threading.Event()
    began = time.monotonic()
    try:
        with pytest.raises(CudaDeviceFailed, match=r"did not answer within 0\.1 s") as caught:
            nvml.within(0.1, release.wait)
    finally:
        release.set()

    assert time.monotonic() - began < nvml.CALL_S
    assert "nvidia-smi" in caught.value.suggested_action


def test_a_call_that_hangs_keeps_no_process_alive() -> None:
    release = threading.Event()
    kinds: list[bool] = []

    def call() -> None:
        kinds.append(threading.current_thread().daemon)
        release.wait()

    with pytest.raises(CudaDeviceFailed):
        nvml.within(0.1, call)
    release.set()

    assert kinds == [True]


def test_a_result_is_passed_on() -> None:
    assert nvml.within(nvml.CALL_S, lambda: [1, 2]) == [1, 2]
    assert nvml.within(nvml.CALL_S, lambda: None) is None


@pytest.mark.parametrize("error", [ValueError("x"), CudaDriverMissing("y"), SystemExit(3)])
def test_an_error_is_passed_on_as_it_is(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        nvml.within(nvml.CALL_S, fail)

    assert caught.value is error


@pytest.mark.parametrize("value", ["GPU-1", b"GPU-1"])
def test_old_and_new_bindings_give_the_same_text(value: str | bytes) -> None:
    assert nvml._text(value) == "GPU-1"

"""NVML: which GPUs there are; asked in a thread of its own, because a driver call may never return."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

from hive.errors import CudaDeviceFailed, CudaDeviceNotFound, CudaDriverMissing

CALL_S = 3.0  # a healthy driver answers in milliseconds

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU: `index` is NVML's N of "cuda:N" (PCI order)."""

    index: int
    uuid: str
    name: str


def within(seconds: float, call: Callable[[], T]) -> T:
    """`call`'s result; its thread is abandoned when the driver does not return in time.

    Raises CudaDeviceFailed on the deadline, and whatever `call` raises.
    """
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as exc:  # noqa: BLE001 (handed over to the caller's thread)
            outcome.append((None, exc))

    thread = threading.Thread(target=work, name="nvml", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise CudaDeviceFailed(
            f"The NVIDIA driver did not answer within {seconds:g} s.",
            action="Check the driver with nvidia-smi and the kernel log; a hung driver needs a "
            "reset of the GPU or a reboot.",
        )
    value, error = outcome[0]
    if error is not None:
        raise error
    result: T = value
    return result


def list_devices() -> list[Device]:
    """Every GPU. Raises CudaDriverMissing without a driver, CudaDeviceFailed on its errors."""
    return within(CALL_S, _list)


def _list() -> list[Device]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        if exc.value in (
            pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
            pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
            pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        ):
            raise CudaDriverMissing(f"The NVIDIA driver cannot be used: {exc}.") from exc
        raise CudaDeviceFailed(f"The NVIDIA driver failed to start: {exc}.") from exc
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
            found.append(Device(index, _text(uuid), _text(name)))
        return found
    except pynvml.NVMLError as exc:
        raise CudaDeviceFailed(f"The NVIDIA driver failed: {exc}.") from exc
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def resolve(wanted: Iterable[str]) -> dict[str, str]:
    """Each configured device ("cuda:N" or "GPU-…") with its UUID; "cpu" needs none.

    Raises CudaDriverMissing, CudaDeviceFailed, or CudaDeviceNotFound that lists what there is.
    Nothing is ever put in another device's place (C6, C10).
    """
    names = [name for name in dict.fromkeys(wanted) if name != "cpu"]
    if not names:
        return {}
    try:
        devices = list_devices()
    except CudaDriverMissing as exc:
        exc.details = {**exc.details, "device": names[0]}
        exc.message = f"Device {names[0]} is configured, but: {exc.message}"
        raise
    known = {f"cuda:{d.index}": d.uuid for d in devices} | {d.uuid: d.uuid for d in devices}
    for name in names:
        if name not in known:
            there = [f"cuda:{d.index} ({d.name}, {d.uuid})" for d in devices]
            raise CudaDeviceNotFound(
                f"Device {name} does not exist on this host; there "
                f"{'are ' + ', '.join(there) if there else 'is no GPU'}.",
                device=name,
                available_devices=[f"cuda:{d.index}" for d in devices],
            )
    return {name: known[name] for name in names}

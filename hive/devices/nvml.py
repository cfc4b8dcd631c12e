"""NVML: which GPUs there are and how they are; every call in a thread that a deadline can abandon.

`cuda:N` is NVML's N (PCI order), which need not be CUDA's own order: engines are told UUIDs.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pynvml

from hive.devices import faults
from hive.devices.lanes import Lane
from hive.errors import CudaDeviceFailed, CudaDeviceNotFound, CudaDriverMissing, HiveError

CALL_S = 5.0  # a healthy driver answers in milliseconds, one that wakes a GPU in seconds
EVENT_MS = 500  # the longest wait for an Xid before the watching thread looks whether to end

T = TypeVar("T")

_NO_DRIVER = (
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
)
_LOST = (
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_NOT_FOUND,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
)
_NONE_SUCH = (
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_NOT_FOUND,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
)


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU: `index` is NVML's N of "cuda:N" (PCI order)."""

    index: int
    uuid: str
    name: str

    @property
    def id(self) -> str:
        return f"cuda:{self.index}"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds memory of a GPU; `used_bytes` is None where the driver does not say.

    `name` is empty when the process is not visible here (of another container, say).
    """

    pid: int
    name: str
    used_bytes: int | None

    def __str__(self) -> str:
        held = "" if self.used_bytes is None else f", {self.used_bytes / 2**20:.0f} MiB"
        return f"{self.name or 'a process that is not visible here'} (pid {self.pid}{held})"


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a GPU. Bytes; degrees Celsius; None is what the GPU or the driver has not.

    `ecc_errors` are uncorrectable ones since the driver was loaded.
    """

    total: int
    used: int
    free: int
    temperature_c: int | None
    ecc_errors: int | None
    remap_pending: bool | None
    remap_failed: bool | None
    is_split: bool  # MIG: the GPU is divided into instances
    holders: tuple[Holder, ...]


class DeviceLost(CudaDeviceFailed):
    """The driver does not know the device any more."""


class Driver:
    """NVML, opened once: by UUID, with a lane for each device, so that one holds up no other."""

    def __init__(self, call_s: float = CALL_S) -> None:
        self.call_s = call_s
        self._lanes: dict[str, Lane] = {}
        self._reads: dict[str, Callable[[], Reading]] = {}  # equal, so that callers share them
        self._opening = threading.Lock()
        self._is_open = False

    def inventory(self) -> list[tuple[Device, HiveError | None]]:
        """Every GPU of this host; with the reason where one does not say what it is.

        Raises CudaDriverMissing, and CudaDeviceFailed when the driver or all GPUs fail.
        """
        count = self._lane("").ask(self._count, self.call_s)
        found = [self._find_or_why(Device(index, "", "")) for index in range(count)]
        wrong = [reason for _, reason in found if reason]
        if wrong and len(wrong) == count:
            raise wrong[-1]
        return found

    def _find_or_why(self, counted: Device) -> tuple[Device, HiveError | None]:
        try:
            if device := self.find(counted.id):
                return device, None
            return counted, DeviceLost("The driver counts the device, but does not find it.")
        except HiveError as exc:
            return counted, exc

    def devices(self) -> list[Device]:
        """Those of the inventory that answer. Raises what `inventory` raises."""
        return [device for device, wrong in self.inventory() if not wrong]

    def find(self, name: str) -> Device | None:
        """The GPU that is "cuda:N" or "GPU-…"; None when there is none.

        Raises CudaDriverMissing, and CudaDeviceFailed (DeviceLost) when it is there and fails.
        """
        return self._lane(name).ask(lambda: self._find(name), self.call_s)

    def read(self, uuid: str) -> Reading:
        """One GPU. Raises DeviceLost, DriverHung or CudaDeviceFailed."""
        return self._lane(uuid).ask(self._read_of(uuid), self.call_s)

    async def reading(self, uuid: str) -> Reading:
        """`read`, without blocking the event loop."""
        return await self._lane(uuid).wait(self._read_of(uuid), self.call_s)

    def _read_of(self, uuid: str) -> Callable[[], Reading]:
        return self._reads.setdefault(uuid, functools.partial(self._read, uuid))

    def _lane(self, name: str) -> Lane:
        return self._lanes.setdefault(name, Lane(f"nvml {name}".strip()))

    def close(self) -> None:
        """End the threads; NVML itself is closed with the process (a hung driver would block)."""
        for lane in self._lanes.values():
            lane.close()

    # ── in the lanes' threads ───────────────────────────────────────────────────────────────────

    def _open(self) -> None:
        with self._opening:
            if not self._is_open:
                with _translated("failed to start"):
                    pynvml.nvmlInit()
                self._is_open = True

    def _count(self) -> int:
        self._open()
        with _translated("failed"):
            return int(pynvml.nvmlDeviceGetCount())

    def _find(self, name: str) -> Device | None:
        self._open()
        with _translated("failed"):
            try:
                if name.startswith("cuda:"):
                    handle = pynvml.nvmlDeviceGetHandleByIndex(int(name.removeprefix("cuda:")))
                else:
                    handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            except pynvml.NVMLError as exc:
                if exc.value in _NONE_SUCH:
                    return None
                raise
            return _describe(handle)

    def _read(self, uuid: str) -> Reading:
        self._open()
        with _translated("failed"):
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            if not memory.total:
                raise CudaDeviceFailed("The device reports no memory.", action=faults.RESET)
            rows = _optional(lambda: pynvml.nvmlDeviceGetRemappedRows(handle))
            mig = _optional(lambda: pynvml.nvmlDeviceGetMigMode(handle))
            # With its version: the plain name raises no NVMLError where a driver is too old for it.
            processes = _optional(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle))
            return Reading(
                total=int(memory.total),
                used=int(memory.used),
                free=int(memory.free),
                temperature_c=_optional(
                    lambda: int(
                        pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
                    )
                ),
                ecc_errors=_optional(
                    lambda: int(
                        pynvml.nvmlDeviceGetTotalEccErrors(
                            handle,
                            pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                            pynvml.NVML_VOLATILE_ECC,
                        )
                    )
                ),
                remap_pending=bool(rows[2]) if rows else None,
                remap_failed=bool(rows[3]) if rows else None,
                is_split=bool(mig and mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE),
                holders=tuple(
                    Holder(int(p.pid), process_name(int(p.pid)), p.usedGpuMemory)
                    for p in sorted(processes or (), key=lambda p: p.pid)
                ),
            )

    # ── events ──────────────────────────────────────────────────────────────────────────────────

    def xids(self, uuid: str, stop: threading.Event) -> Iterator[int | None]:
        """Each Xid of a GPU as it comes, and None whenever none came for EVENT_MS, until `stop`.

        Blocks the calling thread. Raises CudaDeviceFailed when the driver refuses (container, vGPU,
        rights) and when the waiting fails; DeviceLost when the GPU is gone.
        """
        self._open()
        with _translated("refuses to tell Xid events"):
            # A set for each GPU: a lost one ends the waiting of all that share its set.
            events = pynvml.nvmlEventSetCreate()
            try:
                pynvml.nvmlDeviceRegisterEvents(
                    pynvml.nvmlDeviceGetHandleByUUID(uuid),
                    pynvml.nvmlEventTypeXidCriticalError,
                    events,
                )
                while not stop.is_set():
                    try:
                        event = pynvml.nvmlEventSetWait_v2(events, EVENT_MS)
                    except pynvml.NVMLError_Timeout:
                        yield None
                    else:
                        yield int(event.eventData)
            finally:
                with contextlib.suppress(pynvml.NVMLError):
                    pynvml.nvmlEventSetFree(events)

    def __repr__(self) -> str:
        return f"<Driver {list(self._lanes.values())}>"


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """NVML's errors, and what goes wrong in its bindings, as hive's."""
    try:
        yield
    except HiveError:
        raise
    except pynvml.NVMLError as exc:
        if exc.value in _NO_DRIVER:
            raise CudaDriverMissing(f"The NVIDIA driver cannot be used: {exc}.") from exc
        if exc.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            raise CudaDriverMissing(
                "The NVIDIA driver in the kernel and its library have different versions.",
                action="Reboot, or reload the kernel's modules, after an update of the driver.",
            ) from exc
        if exc.value in _LOST:
            raise DeviceLost(f"The device is lost: the NVIDIA driver says {exc}.") from exc
        if exc.value == pynvml.NVML_ERROR_NO_PERMISSION:
            raise CudaDeviceFailed(
                f"The NVIDIA driver {what}: {exc}.",
                action="Give hive's user access to /dev/nvidia*, /dev/nvidiactl and /dev/nvidia-uvm.",
            ) from exc
        raise CudaDeviceFailed(f"The NVIDIA driver {what}: {exc}.") from exc
    except Exception as exc:
        why = f"its answer cannot be read ({type(exc).__name__})"
        raise CudaDeviceFailed(f"The NVIDIA driver {what}: {why}.") from exc


def _optional(call: Callable[[], T]) -> T | None:
    """What a GPU or a driver may not have, or not tell; a lost GPU is lost all the same.

    A sensor that cannot be read is no reason to stop what computes well.
    """
    try:
        return call()
    except pynvml.NVMLError as exc:
        if exc.value in _LOST:
            raise
        return None


def _describe(handle: Any) -> Device:
    uuid = _text(lambda: pynvml.nvmlDeviceGetUUID(handle))
    name = _text(lambda: pynvml.nvmlDeviceGetName(handle))
    return Device(int(pynvml.nvmlDeviceGetIndex(handle)), uuid, name)


def _text(call: Callable[[], str | bytes]) -> str:
    """What a driver calls a GPU, in any encoding, as something that can be printed."""
    try:
        said = call()
    except UnicodeDecodeError as exc:
        said = exc.object
    return printable(said.decode(errors="replace") if isinstance(said, bytes) else said)


def printable(text: str) -> str:
    """Without what a terminal would obey: names are chosen by whoever runs a process."""
    return "".join(c if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}" else "?" for c in text)


def process_name(pid: int) -> str:
    """What the kernel calls a process; empty when it is not visible here."""
    try:
        return printable(Path(f"/proc/{pid}/comm").read_text(errors="replace").strip())
    except OSError:
        return ""


def resolve(driver: Driver, wanted: Iterable[str]) -> dict[str, Device]:
    """Each configured device ("cuda:N" or "GPU-…") with the GPU that it is; "cpu" needs none.

    Raises CudaDriverMissing, CudaDeviceFailed, or CudaDeviceNotFound that lists what there is.
    Nothing is ever put in another device's place (C6, C10).
    """
    return {n: _resolve(driver, n) for n in dict.fromkeys(wanted) if n != "cpu"}


def _resolve(driver: Driver, name: str) -> Device:
    try:
        if device := driver.find(name):
            return device
        devices = driver.devices()
    except HiveError as exc:
        exc.details = {**exc.details, "device": name}
        exc.message = f"Device {name} is configured, but: {exc.message}"
        raise
    there = [f"{d.id} ({d.name}, {d.uuid})" for d in devices]
    raise CudaDeviceNotFound(
        f"Device {name} does not exist on this host; there "
        f"{'are ' + ', '.join(there) if there else 'is no GPU'}.",
        device=name,
        available_devices=[d.id for d in devices],
    )

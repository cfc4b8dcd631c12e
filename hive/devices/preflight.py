"""What one look at a GPU says: what it is, whether it may be used, and who is there."""

from collections.abc import Collection
from typing import Any

from hive.devices import faults
from hive.devices.nvml import Device, Reading
from hive.errors import CudaDeviceFailed, DeviceError


def describe(device: Device, reading: Reading | None, own: Collection[int] = ()) -> dict[str, Any]:
    """What a GPU is and how it is, for people and programs."""
    shown: dict[str, Any] = {"id": device.id, "uuid": device.uuid, "name": device.name}
    if reading:
        shown |= {
            "vram_total_bytes": reading.total,
            "vram_used_bytes": reading.used,
            "vram_free_bytes": reading.free,
            "temperature_celsius": reading.temperature_c,
            "ecc_uncorrectable_errors": reading.ecc_errors,
            "rows_remap_pending": reading.remap_pending,
            "rows_remap_failed": reading.remap_failed,
            "processes": [
                {
                    "pid": h.pid,
                    "name": h.name,
                    "vram_bytes": h.used_bytes,
                    "is_ours": h.pid in own,
                }
                for h in reading.holders
            ],
        }
    return shown


def unhealthy(device: Device, reading: Reading) -> DeviceError | None:
    """What makes a device unfit to be used at all, whoever is there."""
    if reading.remap_failed:
        return CudaDeviceFailed(
            f"Device {device.id} ({device.name}) could not remap a broken memory row.",
            action=faults.REPLACE,
            device=device.id,
        )
    if reading.is_split:
        return CudaDeviceFailed(
            f"Device {device.id} ({device.name}) is split into MIG instances; hive serves whole "
            "GPUs.",
            action="Switch MIG off for this GPU ('nvidia-smi -i N -mig 0'), or choose another.",
            device=device.id,
        )
    return None


def held(device: Device, reading: Reading, own: Collection[int]) -> DeviceError | None:
    """The error when a process that is not hive's computes on the device; it is named (R017)."""
    strangers = [h for h in reading.holders if h.pid not in own]
    if not strangers:
        return None
    return CudaDeviceFailed(
        f"Device {device.id} ({device.name}) is held by another process: "
        f"{', '.join(map(str, strangers))}.",
        action="End that process, or choose another device explicitly: hive shares a GPU with "
        "nobody.",
        device=device.id,
        holders=[{"pid": h.pid, "name": h.name, "vram_bytes": h.used_bytes} for h in strangers],
    )

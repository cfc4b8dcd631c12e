"""NVML: asked only for what is configured, answered for each GPU by itself, in hive's words."""

import asyncio
import contextlib
import ctypes.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml
import pytest

from hive.devices import nvml
from hive.devices.lanes import DriverHung
from hive.devices.nvml import Device, DeviceLost, Driver, Holder
from hive.errors import CudaDeviceFailed, CudaDeviceNotFound, CudaDriverMissing, HiveError
from tests.devices.conftest import MakeDriver, Spawn, threads
from tests.doubles.nvml import Gpus
from tests.patience import awaited, wait_until

TOP = Path(__file__).parents[2]
MIB = 2**20
SHORT_S = 0.1
LONG_S = 60.0


# Which GPUs there are


def test_a_number_is_nvmls_and_a_uuid_is_found(gpus: Gpus, driver: Driver) -> None:
    """Whatever CUDA's own order would be."""
    first = gpus.add(0, uuid="GPU-bbb", name="NVIDIA A100", pci="00000000:17:00.0")
    second = gpus.add(1, uuid="GPU-aaa", pci="00000000:65:00.0")
    a100, h100 = Device(0, first, "NVIDIA A100"), Device(1, second, "NVIDIA H100")

    assert driver.devices() == [a100, h100]
    assert nvml.resolve(driver, ["cpu", second, "cuda:0", "cuda:1", second]) == {
        second: h100,
        "cuda:0": a100,
        "cuda:1": h100,
    }
    assert [a100.id, h100.id] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize("wanted", [[], ["cpu"], ["cpu", "cpu"]])
def test_the_cpu_alone_asks_no_driver_anything(
    gpus: Gpus, driver: Driver, wanted: list[str]
) -> None:
    """A host without a driver would refuse; one with a hung driver would not answer."""
    gpus.hang("nvmlInit")
    before = threading.active_count()

    assert nvml.resolve(driver, wanted) == {}
    assert threading.active_count() == before


@pytest.mark.parametrize("wanted", ["cuda:2", "cuda:10", "GPU-0123abcd"])
def test_one_that_is_not_there_is_told_with_what_is(
    gpus: Gpus, driver: Driver, wanted: str
) -> None:
    """Nothing is put in its place (C6, C10)."""
    gpus.add(0, uuid="GPU-a", name="NVIDIA A100")
    gpus.add(1, uuid="GPU-b")
    with pytest.raises(CudaDeviceNotFound) as caught:
        nvml.resolve(driver, ["cuda:0", wanted])

    assert caught.value.message == (
        f"Device {wanted} does not exist on this host; there are cuda:0 (NVIDIA A100, GPU-a), "
        "cuda:1 (NVIDIA H100, GPU-b)."
    )
    assert caught.value.details["device"] == wanted
    assert caught.value.details["available_devices"] == ["cuda:0", "cuda:1"]


def test_a_host_without_gpus_says_so(gpus: Gpus, driver: Driver) -> None:
    assert driver.devices() == []
    with pytest.raises(CudaDeviceNotFound, match=r"there is no GPU\."):
        nvml.resolve(driver, ["cuda:0"])


def test_a_lost_gpu_hides_no_other_and_is_called_lost_itself(gpus: Gpus, driver: Driver) -> None:
    lost, whole = gpus.add(0), gpus.add(1)
    gpus.change(0, lost=1)

    assert [device.id for device in driver.devices()] == ["cuda:1"]
    assert nvml.resolve(driver, ["cuda:1"])["cuda:1"].uuid == whole
    for name in ("cuda:0", lost):
        with pytest.raises(DeviceLost) as caught:
            nvml.resolve(driver, ["cuda:1", name])
        assert caught.value.code == "CUDA_DEVICE_FAILED"
        assert f"Device {name} is configured, but: The device is lost" in caught.value.message
        assert caught.value.details["device"] == name


def test_a_gpu_that_answers_nothing_useful_hides_no_other(gpus: Gpus, driver: Driver) -> None:
    """What fell off the bus is often called unknown, not lost."""
    gpus.add(0)
    gpus.add(1)
    gpus.fail("nvmlDeviceGetHandleByIndex", pynvml.NVML_ERROR_UNKNOWN, index=0)

    assert [device.id for device in driver.devices()] == ["cuda:1"]
    with pytest.raises(CudaDeviceFailed) as caught:
        nvml.resolve(driver, ["cuda:0"])
    assert caught.value.message.startswith("Device cuda:0 is configured, but: The NVIDIA driver")


def test_gpus_that_all_fail_are_not_no_gpus(gpus: Gpus, driver: Driver) -> None:
    gpus.add(0)
    gpus.add(1)
    gpus.fail("nvmlDeviceGetName", pynvml.NVML_ERROR_NO_PERMISSION)
    with pytest.raises(CudaDeviceFailed, match="Insufficient Permissions") as caught:
        driver.devices()

    assert "/dev/nvidia" in caught.value.suggested_action


# Without a driver


@pytest.mark.parametrize("wanted", [["cuda:0"], ["cpu", "cuda:3", "cuda:0"], ["GPU-3b1f"]])
def test_without_a_driver_the_device_that_needs_one_is_named(
    gpus: Gpus, driver: Driver, monkeypatch: pytest.MonkeyPatch, wanted: list[str]
) -> None:
    """The CPU that is configured, too, is not put in its place (R013, R014)."""
    monkeypatch.delenv("NVML_DOUBLE")  # a library whose kernel module is not loaded
    needy = next(device for device in wanted if device != "cpu")
    with pytest.raises(CudaDriverMissing) as caught:
        nvml.resolve(driver, wanted)

    assert caught.value.code == "CUDA_DRIVER_MISSING"
    assert caught.value.details["device"] == needy
    assert f"Device {needy} is configured, but: The NVIDIA driver" in caught.value.message
    assert 'device = "cpu"' in caught.value.suggested_action


@pytest.mark.skipif(
    ctypes.util.find_library("nvidia-ml") is not None, reason="this host has an NVIDIA driver"
)
def test_without_its_library_there_is_no_driver() -> None:
    code = (
        "from hive.devices.nvml import Driver\n"
        "from hive.errors import HiveError\n"
        "try: Driver().devices()\n"
        "except HiveError as exc: print(exc.code, exc.message)\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TOP,
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=LONG_S,
    )

    assert done.stdout == (
        "CUDA_DRIVER_MISSING The NVIDIA driver cannot be used: NVML Shared Library Not Found.\n"
    )


def test_a_driver_that_is_late_is_found_when_it_is_there(gpus: Gpus, driver: Driver) -> None:
    uuid = gpus.add(0)
    gpus.fail("nvmlInit", pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    for _ in range(2):
        with pytest.raises(CudaDriverMissing):
            driver.devices()
    gpus.heal()

    assert [device.uuid for device in driver.devices()] == [uuid]


@pytest.mark.parametrize(
    ("function", "code", "error", "says", "advice"),
    [
        ("nvmlInit", pynvml.NVML_ERROR_DRIVER_NOT_LOADED, CudaDriverMissing, "Driver Not", "Inst"),
        ("nvmlInit", pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, CudaDriverMissing, "Library", "Install"),
        (
            "nvmlInit",
            pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
            CudaDriverMissing,
            "different versions",
            "Reboot",
        ),
        ("nvmlInit", pynvml.NVML_ERROR_NO_PERMISSION, CudaDeviceFailed, "failed to start", "/dev/"),
        ("nvmlInit", pynvml.NVML_ERROR_UNKNOWN, CudaDeviceFailed, "failed to start", "Check GPU"),
        ("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_GPU_IS_LOST, DeviceLost, "is lost", "Check"),
        ("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_GPU_NOT_FOUND, DeviceLost, "is lost", "Chec"),
        ("nvmlDeviceGetHandleByUUID", pynvml.NVML_ERROR_NOT_FOUND, DeviceLost, "is lost", "Check"),
        (
            "nvmlDeviceGetMemoryInfo",
            pynvml.NVML_ERROR_NO_PERMISSION,
            CudaDeviceFailed,
            "Insufficient Permissions",
            "/dev/nvidiactl",
        ),
        (
            "nvmlDeviceGetMemoryInfo",
            pynvml.NVML_ERROR_RESET_REQUIRED,
            CudaDeviceFailed,
            "GPU requires re",
            "Check",
        ),
        ("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_UNKNOWN, CudaDeviceFailed, "Unknown", "Che"),
        ("nvmlDeviceGetMemoryInfo", 4711, CudaDeviceFailed, "Unknown", "Check"),
    ],
)
def test_the_drivers_errors_are_told_in_hives_words(
    gpus: Gpus,
    driver: Driver,
    function: str,
    code: int,
    error: type[HiveError],
    says: str,
    advice: str,
) -> None:
    uuid = gpus.add(0)
    gpus.fail(function, code)
    with pytest.raises(HiveError, match=says) as caught:
        driver.read(uuid)

    assert type(caught.value) is error
    assert advice in caught.value.suggested_action


# How a GPU is


@awaited
async def test_a_reading_is_what_the_gpu_says(gpus: Gpus, driver: Driver, spawn: Spawn) -> None:
    uuid = gpus.add(0, total_mib=1000, base_mib=100, temp=71, ecc=2, remap_pending=1)
    first, second = sorted((spawn(), spawn()))
    gpus.hold(0, second, 300)
    gpus.hold(0, first, 40)
    reading = driver.read(uuid)

    assert (reading.total, reading.used, reading.free) == (1000 * MIB, 440 * MIB, 560 * MIB)
    assert (reading.temperature_c, reading.ecc_errors) == (71, 2)
    assert (reading.remap_pending, reading.remap_failed, reading.is_split) == (True, False, False)
    assert reading.holders == (
        Holder(first, "cat", 40 * MIB),
        Holder(second, "cat", 300 * MIB),
    )
    assert await driver.reading(uuid) == reading


@pytest.mark.parametrize(
    "code",
    [
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    ],
)
def test_what_a_gpu_or_a_driver_has_not_is_none_and_no_fault(
    gpus: Gpus, driver: Driver, code: int
) -> None:
    """FUNCTION_NOT_FOUND: a driver that is older than the bindings."""
    uuid = gpus.add(0, total_mib=1000, base_mib=100)
    gpus.hold(0, os.getpid(), 10)
    for function in (
        "nvmlDeviceGetTemperature",
        "nvmlDeviceGetTotalEccErrors",
        "nvmlDeviceGetRemappedRows",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetComputeRunningProcesses",
    ):
        gpus.fail(function, code)
    reading = driver.read(uuid)

    assert reading.temperature_c is None
    assert reading.ecc_errors is None
    assert reading.remap_pending is None
    assert reading.remap_failed is None
    assert reading.is_split is False
    assert reading.holders == ()
    assert reading.free == 890 * MIB


def test_a_gpu_that_is_divided_is_seen_as_such(gpus: Gpus, driver: Driver) -> None:
    uuid = gpus.add(0, mig=1)
    assert driver.read(uuid).is_split


def test_a_holder_is_named_as_well_as_can_be() -> None:
    assert str(Holder(7, "python", 300 * MIB)) == "python (pid 7, 300 MiB)"
    assert str(Holder(7, "python", None)) == "python (pid 7)"
    assert str(Holder(7, "", 1)) == "a process that is not visible here (pid 7, 0 MiB)"


def test_a_process_that_is_not_visible_here_has_no_name(spawn: Spawn) -> None:
    assert nvml.process_name(spawn()) == "cat"
    assert nvml.process_name(2**22 + 1) == ""  # above the kernel's largest pid


@pytest.mark.parametrize("value", ["GPU-1", b"GPU-1"])
def test_old_and_new_bindings_give_the_same_text(value: str | bytes) -> None:
    assert nvml._text(lambda: value) == "GPU-1"


# Nonsense


def test_a_gpu_may_be_called_anything(gpus: Gpus, driver: Driver) -> None:
    """In any encoding; what a terminal would obey is never shown."""
    gpus.add(0, name="one")
    gpus.add(1, name="\x1b[31mRED\x07\u202e")
    state = gpus.directory / "state"
    state.write_bytes(state.read_bytes().replace(b"name=one", b"name=NV\xff\xfe"))

    assert [device.name for device in driver.devices()] == ["NV??", "?[31mRED??"]


def test_a_process_may_be_called_anything(tmp_path: Path) -> None:
    named = tmp_path / "\x1b[2J\x9b\udcff"
    shutil.copy("/bin/cat", named)
    with subprocess.Popen([named], stdin=subprocess.PIPE) as process:
        wait_until(lambda: nvml.process_name(process.pid) == "?[2J??", "the process to be named")
        process.communicate()


def test_a_gpu_without_memory_is_broken(gpus: Gpus, driver: Driver) -> None:
    """Nobody has to divide by it."""
    uuid = gpus.add(0, total_mib=0, base_mib=0)
    with pytest.raises(CudaDeviceFailed, match=r"The device reports no memory\."):
        driver.read(uuid)


def test_what_the_bindings_cannot_read_is_the_devices_error(
    gpus: Gpus, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    uuid = gpus.add(0)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda _handle: None)
    with pytest.raises(CudaDeviceFailed, match=r"cannot be read \(AttributeError\)"):
        driver.read(uuid)


# A driver that hangs, a GPU that goes


def test_a_gpu_whose_driver_hangs_holds_up_no_other(gpus: Gpus, driver_of: MakeDriver) -> None:
    hung, whole = gpus.add(0, uuid="GPU-that-hangs"), gpus.add(1)
    driver = driver_of(SHORT_S)
    gpus.hang("nvmlDeviceGetTotalEccErrors", index=0)
    with pytest.raises(DriverHung, match=r"within 0\.1 s"):
        driver.read(hung)

    driver.call_s = LONG_S
    began = time.monotonic()
    with pytest.raises(DriverHung, match="an earlier call"):
        driver.read(hung)
    assert driver.read(whole).ecc_errors == 0
    assert [device.uuid for device in driver.devices()] == [hung, whole]
    assert time.monotonic() - began < LONG_S / 2
    assert len(threads(f"nvml {hung}")) == 1
    assert repr(driver).count("stuck") == 1


@pytest.mark.parametrize(
    "function", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID", "nvmlDeviceGetName"]
)
def test_a_gpu_that_hangs_before_it_is_known_is_blamed_alone(
    gpus: Gpus, driver_of: MakeDriver, function: str
) -> None:
    """And the list says that it is there."""
    gpus.add(0)
    whole = gpus.add(1)
    gpus.hang(function, index=0)
    driver = driver_of(SHORT_S)
    with pytest.raises(DriverHung) as caught:
        nvml.resolve(driver, ["cuda:0"])
    assert caught.value.message.startswith("Device cuda:0 is configured, but: The NVIDIA driver")

    driver.call_s = LONG_S
    assert nvml.resolve(driver, ["cuda:1"])["cuda:1"].uuid == whole
    assert [device.id for device in driver.devices()] == ["cuda:1"]
    (first, why), (second, _) = driver.inventory()
    assert (first.id, second.id) == ("cuda:0", "cuda:1")
    assert isinstance(why, DriverHung)


@awaited
async def test_who_asks_while_others_do_shares_their_next_reading(
    gpus: Gpus, driver: Driver
) -> None:
    """A slow driver is not asked once for each of them; nobody gets what was read before."""
    uuid = gpus.add(0)
    may_go_on = threading.Event()
    async with asyncio.TaskGroup() as tasks:
        busy = tasks.create_task(
            driver._lane(uuid).wait(lambda: may_go_on.wait(LONG_S), driver.call_s)
        )
        readings = [tasks.create_task(driver.reading(uuid)) for _ in range(3)]
        await asyncio.sleep(0)
        gpus.change(0, temp=77)
        may_go_on.set()

    assert busy.result()
    assert len({id(reading.result()) for reading in readings}) == 1
    assert readings[0].result().temperature_c == 77
    assert driver.read(uuid) is not readings[0].result()


def test_a_driver_that_hangs_at_its_start_is_given_up(gpus: Gpus, driver_of: MakeDriver) -> None:
    uuid = gpus.add(0)
    gpus.hang("nvmlInit")
    driver = driver_of(SHORT_S)
    for ask in (driver.devices, lambda: driver.find("cuda:0"), lambda: driver.read(uuid)):
        with pytest.raises(DriverHung):
            ask()


def test_a_gpu_that_went_is_lost_until_it_is_back(gpus: Gpus, driver: Driver) -> None:
    uuid = gpus.add(0)
    driver.read(uuid)
    gpus.remove(0)
    with pytest.raises(DeviceLost):
        driver.read(uuid)
    gpus.add(0)

    assert driver.read(uuid).total > 0


# Events


class Listener:
    """A thread that listens to one GPU, and what it heard."""

    def __init__(self, driver: Driver, uuid: str) -> None:
        self.heard: list[int | None] = []
        self.error: HiveError | None = None
        self.stop = threading.Event()
        self._thread = threading.Thread(
            target=self._listen, args=(driver, uuid), name=f"nvml events {uuid}"
        )
        self._thread.start()

    def _listen(self, driver: Driver, uuid: str) -> None:
        try:
            for xid in driver.xids(uuid, self.stop):
                self.heard.append(xid)
        except HiveError as exc:
            self.error = exc

    def has_begun(self) -> bool:
        """A first wait ended without an Xid."""
        return bool(self.heard)

    def xids(self) -> list[int]:
        return [xid for xid in self.heard if xid is not None]

    def join(self) -> None:
        self._thread.join(LONG_S)
        assert not self._thread.is_alive()


Listen = Callable[[str], Listener]


@pytest.fixture
def listen(gpus: Gpus, driver: Driver) -> Iterator[Listen]:
    with contextlib.ExitStack() as stopping:

        def start(uuid: str) -> Listener:
            listener = Listener(driver, uuid)
            stopping.callback(listener.join)
            stopping.callback(listener.stop.set)
            return listener

        yield start


def test_each_gpus_xids_are_told_until_nobody_wants_them(gpus: Gpus, listen: Listen) -> None:
    first, second = listen(gpus.add(0)), listen(gpus.add(1))
    wait_until(first.has_begun, "the first listener to listen")
    wait_until(second.has_begun, "the second listener to listen")
    for xid in (31, 79):
        gpus.xid(0, xid)
    gpus.xid(1, 48)
    wait_until(lambda: first.xids() == [31, 79], "the first GPU's Xids")
    wait_until(lambda: second.xids() == [48], "the second GPU's Xid")
    first.stop.set()
    first.join()
    gpus.xid(1, 13)
    wait_until(lambda: second.xids() == [48, 13], "the second GPU to be listened to still")

    assert first.error is None
    assert first.xids() == [31, 79]


def test_the_xid_of_a_loss_is_told_before_the_loss(gpus: Gpus, listen: Listen) -> None:
    """A GPU that has fallen off the bus answers no further question, not even who it is."""
    lost, whole = listen(gpus.add(0)), listen(gpus.add(1))
    wait_until(lost.has_begun, "the listener to listen")
    wait_until(whole.has_begun, "the other to listen")
    gpus.xid(0, 79)
    gpus.remove(0)
    lost.join()
    gpus.xid(1, 48)
    wait_until(lambda: whole.xids() == [48], "the other GPU to be listened to still")

    assert lost.xids() == [79]
    assert isinstance(lost.error, DeviceLost)


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("nvmlEventSetCreate", pynvml.NVML_ERROR_NO_PERMISSION),
        ("nvmlDeviceRegisterEvents", pynvml.NVML_ERROR_NOT_SUPPORTED),
        ("nvmlEventSetWait", pynvml.NVML_ERROR_UNKNOWN),
    ],
)
def test_who_may_not_listen_is_told_so(
    gpus: Gpus, listen: Listen, function: str, code: int
) -> None:
    uuid = gpus.add(0)
    gpus.fail(function, code)
    listener = listen(uuid)
    listener.join()

    assert isinstance(listener.error, CudaDeviceFailed)
    assert "refuses to tell Xid events" in listener.error.message
    assert listener.heard == []

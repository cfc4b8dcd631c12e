"""Configured GPUs: trusted until they fail, and each fault told once, whoever else goes on."""

import asyncio
import errno
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import TypeVar

import pynvml
import pytest

from hive.devices import nvml
from hive.devices.lanes import DriverHung
from hive.devices.nvml import DeviceLost, Driver
from hive.devices.watch import (
    EVIDENCE_S,
    LOOK_S,
    OWN_KILL_S,
    XIDS_KEPT,
    Baseline,
    Condition,
    Devices,
    Receipt,
    Watched,
)
from hive.errors import Conflict, CudaDeviceFailed, GpuQuarantined, GpuVramExhausted, NotFound
from hive.events import (
    Announcer,
    DeviceMoved,
    DeviceRead,
    Event,
    StrangerSeen,
    VramChecked,
    XidSeen,
)
from tests.devices.conftest import HoldUp, MakeDriver, Spawn, threads
from tests.doubles.nvml import Gpus
from tests.patience import awaited, until, wait_until

E = TypeVar("E", bound=Event)
MIB = 2**20
POLL_S = 0.01
WITHIN_S = 30.0  # for what becomes so at once
OVER_S = 0.2  # for what never becomes so
HUNG_S = 2.0  # for a call that never returns; what a busy host's other calls must do with


class Story:
    """The devices of these names, what was announced of them and which faults were told."""

    def __init__(self, driver: Driver, names: Collection[str] = ("cuda:0",)) -> None:
        self.announced: list[Event] = []
        self.faults: list[tuple[str, str]] = []  # device and reason
        announcer = Announcer()
        announcer.listen(self.announced.append)
        self.devices = Devices(driver, nvml.resolve(driver, names), announcer, poll_s=POLL_S)
        self.devices.on_fault = self._note_fault

    def _note_fault(self, watched: Watched) -> None:
        assert watched.error is not None
        self.faults.append((watched.device.id, watched.error.message))

    def of(self, name: str = "cuda:0") -> Watched:
        return self.devices.find(name)

    def all(self, kind: type[E]) -> list[E]:
        return [event for event in self.announced if isinstance(event, kind)]

    def moves(self) -> list[tuple[str, str, str]]:
        return [(move.device, move.old, move.new) for move in self.all(DeviceMoved)]

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Watch; the block begins when each device was read and Xids are heard."""
        async with self.devices.watching():
            await self.heard(lambda watched: bool(watched.hears_events and watched.reading))
            yield

    async def heard(self, what: Callable[[Watched], bool]) -> None:
        every = self.devices.watched.values()
        await until(lambda: all(what(watched) for watched in every), "each device to be watched")

    async def becomes(self, condition: Condition, name: str = "cuda:0") -> None:
        watched = self.of(name)
        await until(lambda: watched.condition is condition, f"{name} to be {condition}")

    async def read_again(self, name: str = "cuda:0") -> None:
        """A look at the device has begun after this call and ended."""
        for _ in range(2):
            reading = self.of(name).reading
            await until(lambda: self.of(name).reading is not reading, f"{name} to be read")  # noqa: B023


@pytest.fixture
def story(gpus: Gpus, driver: Driver) -> Story:
    gpus.add(0)
    return Story(driver)


@pytest.fixture
def two(gpus: Gpus, driver: Driver) -> Story:
    """GPUs 0 and 1."""
    gpus.add(0)
    gpus.add(1)
    return Story(driver, ("cuda:0", "cuda:1"))


# What there is


def test_a_device_is_found_by_id_and_uuid_and_a_name_is_a_configured_one(
    gpus: Gpus, driver: Driver
) -> None:
    uuid = gpus.add(0)
    second = gpus.add(1)
    devices = Story(driver, (uuid, "cuda:1")).devices

    assert devices.find("cuda:0") is devices.find(uuid)
    assert devices.of(("cpu",)) == []
    assert devices.of((uuid, "cuda:1")) == [devices.find("cuda:0"), devices.find(second)]
    with pytest.raises(NotFound) as caught:
        devices.find("cuda:2")
    assert caught.value.details["allowed"] == ["cuda:0", "cuda:1"]
    assert repr(devices) == "<Devices ['cuda:0 OK', 'cuda:1 OK']>"


@awaited
async def test_a_gpu_that_is_configured_by_two_names_is_watched_once(
    gpus: Gpus, driver: Driver
) -> None:
    uuid = gpus.add(0)
    devices = Story(driver, (uuid, "cuda:0")).devices

    assert len(devices.watched) == 1
    assert devices.of((uuid,)) == devices.of(("cuda:0",))


@awaited
async def test_without_gpus_no_driver_is_asked(gpus: Gpus, driver: Driver) -> None:
    gpus.hang("nvmlInit")
    before = threading.active_count()
    devices = Story(driver, ("cpu",)).devices
    async with devices.watching():
        assert await devices.ready_to_start(("cpu",)) == {}
        assert await devices.receipts("w-0", ("cpu",), {}, (), within_s=WITHIN_S) == {}
        assert devices.quarantined(("cpu",)) is None
        assert threading.active_count() == before


# Xids


@awaited
async def test_a_device_fault_is_told_once_and_nobody_may_use_the_device(
    gpus: Gpus, story: Story
) -> None:
    async with story.watching():
        gpus.xid(0, 48)
        await story.becomes(Condition.QUARANTINED)
        gpus.xid(0, 95)
        await until(lambda: len(story.all(XidSeen)) == 2, "the second Xid")
        await story.read_again()

    why = "Device cuda:0 (NVIDIA H100) failed: Xid 48, an uncorrectable (double-bit) ECC error."
    assert story.faults == [("cuda:0", why)]
    assert story.all(DeviceMoved) == [
        DeviceMoved("cuda:0", "OK", "QUARANTINED", "CUDA_DEVICE_FAILED", why)
    ]
    assert [(x.xid, x.kind, x.after_own_kill) for x in story.all(XidSeen)] == [
        (48, "device", False),
        (95, "device", False),
    ]
    error = story.of().error
    assert isinstance(error, CudaDeviceFailed)
    assert error.details["xid"] == 48
    assert "nvidia-smi --gpu-reset" in error.suggested_action
    refusal = story.devices.quarantined(("cuda:0",))
    assert isinstance(refusal, GpuQuarantined)
    assert refusal.message == f"Device cuda:0 is QUARANTINED: {why}"
    assert refusal.details == {"device": "cuda:0", "reason": "quarantined"}
    with pytest.raises(GpuQuarantined):
        await story.devices.ready_to_start(("cuda:0",))


@awaited
async def test_an_application_fault_explains_a_crash_and_condemns_nothing(
    gpus: Gpus, two: Story
) -> None:
    async with two.watching():
        for xid in (31, 31, 13):
            gpus.xid(0, xid)
        await until(lambda: sum(x.count for x in two.all(XidSeen)) == 3, "the Xids")

    assert two.devices.evidence(("cuda:0",)) == (
        "Xid 31 on cuda:0 (a memory page fault, such as an illegal address); "
        "Xid 13 on cuda:0 (an exception in the compute engine, such as an access out of bounds)"
    )
    assert two.devices.evidence(("cuda:1",)) == ""
    assert two.devices.evidence(("cpu",)) == ""
    assert two.of().condition is Condition.OK
    assert two.faults == []
    assert two.moves() == []
    watched = two.of()  # as if it had been longer ago:
    watched.xids.extend([(at - EVIDENCE_S, xid) for at, xid in watched.xids])
    for _ in range(len(watched.xids) // 2):
        watched.xids.popleft()
    assert two.devices.evidence(("cuda:0",)) == ""


@pytest.mark.parametrize("xid", [63, 999])
@awaited
async def test_a_note_and_an_unknown_xid_change_nothing(gpus: Gpus, story: Story, xid: int) -> None:
    async with story.watching():
        gpus.xid(0, xid)
        await until(lambda: story.all(XidSeen), "the Xid")

    assert [(x.xid, x.kind) for x in story.all(XidSeen)] == [(xid, "note")]
    assert story.of().condition is Condition.OK
    assert story.faults == []


@awaited
async def test_what_hives_own_kill_causes_is_told_only(gpus: Gpus, two: Story) -> None:
    async with two.watching():
        two.devices.noting_kill(("cuda:0", "cpu"))
        gpus.xid(0, 45)
        gpus.xid(0, 63)
        await until(lambda: len(two.all(XidSeen)) == 2, "the Xids")
        assert [x.after_own_kill for x in two.all(XidSeen)] == [True, True]
        assert two.of().condition is Condition.OK
        assert two.devices.evidence(("cuda:0",)) == ""

        two.of().killed_at -= OWN_KILL_S  # as if it had been longer ago
        gpus.xid(0, 45)
        gpus.xid(1, 45)  # nothing was killed there
        await until(lambda: len(two.all(XidSeen)) == 4, "the Xids")
        assert [x.after_own_kill for x in two.all(XidSeen)[2:]] == [False, False]
        for name in ("cuda:0", "cuda:1"):
            assert f"Xid 45 on {name}" in two.devices.evidence((name,))


@pytest.mark.parametrize("xid", [48, 62, 64, 74, 79, 95, 119, 120])
@awaited
async def test_a_device_that_fails_after_hives_own_kill_has_failed(
    gpus: Gpus, story: Story, xid: int
) -> None:
    async with story.watching():
        story.devices.noting_kill(("cuda:0",))
        gpus.xid(0, xid)
        await story.becomes(Condition.QUARANTINED)

    ((_, why),) = story.faults
    assert f"Xid {xid}," in why
    assert [x.after_own_kill for x in story.all(XidSeen)] == [False]
    assert story.of().xids[0][1] == xid


@awaited
async def test_a_flood_of_xids_is_counted_and_told_in_heaps(gpus: Gpus, story: Story) -> None:
    many = 200
    async with story.watching():
        for _ in range(many):
            gpus.xid(0, 13)
        gpus.xid(0, 48)
        await story.becomes(Condition.QUARANTINED)
        await until(
            lambda: sum(x.count for x in story.all(XidSeen)) == many + 1, "every Xid to be counted"
        )

    told = [x for x in story.all(XidSeen) if x.xid == 13]
    assert sum(x.count for x in told) == many
    assert len(told) < many / 5


@awaited
async def test_only_the_last_xids_are_kept(gpus: Gpus, story: Story) -> None:
    async with story.watching():
        for xid in range(1000, 1000 + XIDS_KEPT + 1):
            gpus.xid(0, xid)
        await until(lambda: len(story.all(XidSeen)) == XIDS_KEPT + 1, "the Xids")

    assert [x["xid"] for x in story.devices.view(story.of())["xids"]] == list(
        range(1001, 1001 + XIDS_KEPT)
    )


@awaited
async def test_a_refusal_of_events_is_told_once_and_polling_sees_what_grows(
    gpus: Gpus, story: Story, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors from before hive's start are no fault of now."""
    gpus.change(0, ecc=3)
    gpus.fail("nvmlDeviceRegisterEvents", pynvml.NVML_ERROR_NOT_SUPPORTED)
    with caplog.at_level(logging.WARNING, "hive.devices.watch"):
        async with story.devices.watching():
            watched = story.of()
            await until(lambda: watched.hears_events is False, "the refusal")
            await story.read_again()
            assert story.devices.view(watched)["events"] == "polling"
            assert watched.condition is Condition.OK
            gpus.change(0, ecc=4)
            await story.becomes(Condition.QUARANTINED)

    (warning,) = caplog.messages
    assert warning.startswith("no Xid events of cuda:0, it is only read every 0.01 s: ")
    assert "Not Supported" in warning
    assert story.faults == [
        ("cuda:0", "Device cuda:0 (NVIDIA H100) reports 4 uncorrectable ECC errors.")
    ]


@awaited
async def test_the_end_is_heeded_at_the_moment_of_a_wish_to_look(gpus: Gpus, story: Story) -> None:
    """Else hive would never stop: whoever waits for either must not miss one for the other."""
    watched = story.of()
    for _ in range(20):
        async with story.watching():
            await until(lambda: not watched.look_now.is_set(), "a pause between two readings")
            await story.read_again()
            watched.look_now.set()


@awaited
async def test_a_driver_that_hangs_when_asked_for_events_is_read_instead(
    gpus: Gpus, driver: Driver, hold_up: HoldUp, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told, once: nobody believes that no news is good news."""
    gpus.add(0)
    story = Story(driver)
    driver.call_s = HUNG_S / 2
    may_return = hold_up("nvmlEventSetCreate")
    with caplog.at_level(logging.WARNING, "hive.devices.watch"):
        async with story.devices.watching():
            watched = story.of()
            await until(lambda: watched.hears_events is False, "the silence to be noticed")
            assert story.devices.view(watched)["events"] == "polling"
            await asyncio.sleep(HUNG_S)
            assert watched.condition is Condition.OK
            gpus.change(0, ecc=7)
            await story.becomes(Condition.QUARANTINED)
            may_return.set()
            await until(lambda: watched.hears_events, "events to be heard after all")

    (warning,) = caplog.messages
    assert warning.startswith("no Xid events of cuda:0, it is only read every 0.01 s: ")
    assert "does not answer" in warning
    assert story.faults[0][1].endswith("reports 7 uncorrectable ECC errors.")


@awaited
async def test_what_grows_counts_before_events_are_heard(
    gpus: Gpus, story: Story, hold_up: HoldUp
) -> None:
    hold_up("nvmlDeviceRegisterEvents")
    async with story.devices.watching():
        await until(lambda: story.of().ecc_errors == 0, "the first look")
        assert story.of().hears_events is None
        gpus.change(0, ecc=1)
        await story.becomes(Condition.QUARANTINED)


@awaited
async def test_who_may_listen_later_does(gpus: Gpus, story: Story) -> None:
    gpus.fail("nvmlEventSetWait", pynvml.NVML_ERROR_UNKNOWN)
    async with story.devices.watching():
        await until(lambda: story.of().hears_events is False, "the refusal")
        gpus.heal()
        await until(lambda: story.of().hears_events, "events to be heard")
        gpus.xid(0, 119)
        await story.becomes(Condition.QUARANTINED)


@awaited
async def test_where_xids_are_heard_they_decide_what_an_ecc_error_is(
    gpus: Gpus, story: Story
) -> None:
    """A contained one (Xid 94) is only its engine's."""
    async with story.watching():
        gpus.xid(0, 94)
        gpus.change(0, ecc=1)
        await until(lambda: story.all(XidSeen), "the Xid")
        await story.read_again()

    reading = story.of().reading
    assert reading is not None
    assert reading.ecc_errors == 1
    assert story.of().condition is Condition.OK


# Health, and those who go


@pytest.mark.parametrize("wrong", [{"remap_failed": 1}, {"mig": 1}])
@awaited
async def test_what_has_no_event_is_found_by_reading(
    gpus: Gpus, two: Story, wrong: dict[str, int]
) -> None:
    async with two.watching():
        gpus.change(1, **wrong)
        await two.becomes(Condition.QUARANTINED, "cuda:1")
        await two.read_again("cuda:1")

    assert [device for device, _ in two.faults] == ["cuda:1"]
    assert two.moves() == [("cuda:1", "OK", "QUARANTINED")]
    assert two.of("cuda:0").condition is Condition.OK


@awaited
async def test_a_gpu_that_cannot_be_read_has_failed(gpus: Gpus, story: Story) -> None:
    async with story.watching():
        gpus.fail("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_UNKNOWN)
        await story.becomes(Condition.QUARANTINED)

    ((_, why),) = story.faults
    assert why == "Device cuda:0 (NVIDIA H100): The NVIDIA driver failed: Unknown Error."


@awaited
async def test_a_gpu_that_falls_off_the_bus_is_lost_and_the_others_go_on(
    gpus: Gpus, two: Story, caplog: pytest.LogCaptureFixture
) -> None:
    """The others' Xids are heard as before, and nobody is told of the loss again and again."""
    with caplog.at_level(logging.WARNING, "hive.devices.watch"):
        async with two.watching():
            gpus.remove(0)
            await two.becomes(Condition.LOST)
            await until(lambda: two.of().hears_events is False, "the events' end")
            gpus.xid(1, 13)
            await until(lambda: two.all(XidSeen), "the other GPU's Xid")
            await two.read_again("cuda:1")

    assert two.moves() == [("cuda:0", "OK", "LOST")]
    ((device, why),) = two.faults
    assert device == "cuda:0"
    assert why.startswith("Device cuda:0 (NVIDIA H100): The device is lost")
    assert two.of("cuda:1").hears_events
    assert len(caplog.messages) == 1
    assert two.devices.quarantined(("cuda:1",)) is None
    refusal = two.devices.quarantined(("cuda:1", "cuda:0"))
    assert refusal is not None
    assert refusal.message.startswith("Device cuda:0 is LOST")


@awaited
async def test_a_loss_with_its_xid_is_one_fault_and_ends_as_lost(gpus: Gpus, story: Story) -> None:
    async with story.watching():
        gpus.xid(0, 79)
        await story.becomes(Condition.QUARANTINED)
        gpus.remove(0)
        await story.becomes(Condition.LOST)

    assert story.faults == [
        ("cuda:0", "Device cuda:0 (NVIDIA H100) failed: Xid 79, the GPU has fallen off the bus.")
    ]
    assert story.moves() == [("cuda:0", "OK", "QUARANTINED"), ("cuda:0", "QUARANTINED", "LOST")]


@awaited
async def test_a_driver_that_hangs_loses_that_device_alone(
    gpus: Gpus, driver_of: MakeDriver
) -> None:
    uuid = gpus.add(0, uuid="GPU-that-hangs-for-ever")
    gpus.add(1)
    story = Story(driver_of(HUNG_S), ("cuda:0", "cuda:1"))
    async with story.watching():
        gpus.hang("nvmlDeviceGetMemoryInfo", index=0)
        began = time.monotonic()
        await story.becomes(Condition.LOST)
        assert time.monotonic() - began < WITHIN_S / 2
        for _ in range(3):
            await story.read_again("cuda:1")
        assert len(threads(f"nvml {uuid}")) == 1
        gpus.heal()
        with pytest.raises(DriverHung):  # its call has never returned
            await story.devices.release(story.of())

    ((device, why),) = story.faults
    assert (device, "did not answer within 2 s" in why) == ("cuda:0", True)
    assert story.of().condition is Condition.LOST
    assert story.of("cuda:1").condition is Condition.OK


@awaited
async def test_an_engines_own_words_condemn_its_devices(gpus: Gpus, two: Story) -> None:
    error = GpuVramExhausted("GPU out of memory.")
    two.devices.fail(("cuda:1",), error)
    two.devices.fail(("cuda:1",), CudaDeviceFailed("again"))

    assert two.faults == [("cuda:1", "GPU out of memory.")]
    assert two.all(DeviceMoved) == [
        DeviceMoved("cuda:1", "OK", "QUARANTINED", "GPU_VRAM_EXHAUSTED", "GPU out of memory.")
    ]
    assert two.of("cuda:1").error is error


@awaited
async def test_a_process_that_hangs_in_the_driver_sets_its_device_aside_without_a_fault(
    gpus: Gpus, story: Story
) -> None:
    """Whoever runs there may go on; a fault that comes later is told all the same."""
    stuck = CudaDeviceFailed("Processes survive SIGKILL.")
    story.devices.lost(("cuda:0",), stuck)
    story.devices.lost(("cuda:0",), CudaDeviceFailed("Another does, too."))
    assert story.moves() == [("cuda:0", "OK", "LOST")]
    assert story.of().error is stuck
    assert story.faults == []

    async with story.watching():
        gpus.xid(0, 79)
        await until(lambda: story.faults, "the fault")
        gpus.xid(0, 79)
        await until(lambda: len(story.all(XidSeen)) == 2, "the Xid again")
    assert len(story.faults) == 1
    assert "Xid 79" in story.faults[0][1]
    assert story.of().condition is Condition.LOST


# Release


@awaited
async def test_only_what_is_set_aside_can_be_released(story: Story) -> None:
    with pytest.raises(Conflict, match=r"Device cuda:0 is not quarantined\."):
        await story.devices.release(story.of())


@awaited
async def test_a_device_is_trusted_again_once_it_is_whole(gpus: Gpus, story: Story) -> None:
    async with story.watching():
        gpus.change(0, remap_failed=1)
        await story.becomes(Condition.QUARANTINED)
        with pytest.raises(CudaDeviceFailed, match="could not remap"):
            await story.devices.release(story.of())
        gpus.change(0, remap_failed=0)
        gpus.fail("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_GPU_IS_LOST)
        await story.becomes(Condition.LOST)
        with pytest.raises(DeviceLost):
            await story.devices.release(story.of())
        gpus.heal()
        await story.devices.release(story.of())
        assert story.devices.quarantined(("cuda:0",)) is None
        assert story.all(DeviceMoved)[-1] == DeviceMoved("cuda:0", "LOST", "OK", "", "released")
        await story.devices.ready_to_start(("cuda:0",))

        gpus.change(0, remap_failed=1)  # a new fault is told anew
        await story.becomes(Condition.QUARANTINED)
    assert len(story.faults) == 2


@asynccontextmanager
async def busy(driver: Driver, watched: Watched) -> AsyncIterator[None]:
    """What is asked of the device in the block is answered after it."""
    began, may_return = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        assert may_return.wait(WITHIN_S)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(driver._lane(watched.device.uuid).wait(wait, 2 * WITHIN_S))
        await until(began.is_set, "the device to be busy")
        try:
            yield
        finally:
            may_return.set()


@pytest.mark.parametrize("why", ["Xid 48", "its own words", "survives SIGKILL"])
@awaited
async def test_a_fault_during_a_release_is_not_forgiven(
    gpus: Gpus, story: Story, driver: Driver, why: str
) -> None:
    """Also the one that was there before: it has come again."""
    watched = story.of()

    async def refused() -> str:
        with pytest.raises(CudaDeviceFailed) as caught:
            await story.devices.release(watched)
        return caught.value.message

    async with story.watching():
        gpus.xid(0, 48)
        await story.becomes(Condition.QUARANTINED)
        async with asyncio.TaskGroup() as tasks, busy(driver, watched):
            releasing = tasks.create_task(refused())
            await asyncio.sleep(0)
            match why:
                case "Xid 48":
                    gpus.xid(0, 48)
                    await until(lambda: len(story.all(XidSeen)) == 2, "the Xid")
                case "its own words":
                    story.devices.fail(("cuda:0",), CudaDeviceFailed(why))
                case _:
                    story.devices.lost(("cuda:0",), CudaDeviceFailed(why))
        assert why in releasing.result()
        assert watched.condition is not Condition.OK
        assert watched.error is not None
        assert why in watched.error.message

        await story.devices.release(watched)  # nothing came meanwhile
        assert story.moves()[-1][2] == "OK"


@awaited
async def test_two_releases_at_once_are_one(story: Story, driver: Driver) -> None:
    story.devices.fail(("cuda:0",), CudaDeviceFailed("broken"))
    async with asyncio.TaskGroup() as tasks, busy(driver, story.of()):
        for _ in range(2):
            tasks.create_task(story.devices.release(story.of()))
        await asyncio.sleep(0)

    assert story.moves() == [("cuda:0", "OK", "QUARANTINED"), ("cuda:0", "QUARANTINED", "OK")]


@awaited
async def test_errors_until_the_release_are_forgiven(gpus: Gpus, story: Story) -> None:
    gpus.fail("nvmlEventSetCreate", pynvml.NVML_ERROR_NOT_SUPPORTED)
    async with story.devices.watching():
        await until(lambda: story.of().ecc_errors == 0, "the first look")
        await until(lambda: story.of().hears_events is False, "the refusal")
        gpus.change(0, ecc=1)
        await story.becomes(Condition.QUARANTINED)
        await story.devices.release(story.of())
        await story.read_again()

    assert story.of().condition is Condition.OK
    assert len(story.faults) == 1


@awaited
async def test_a_device_on_which_a_stranger_is_stays_set_aside(
    gpus: Gpus, story: Story, spawn: Spawn
) -> None:
    own, stranger = spawn(), spawn()
    story.devices.own_pids = lambda: {own}
    story.devices.fail(("cuda:0",), CudaDeviceFailed("broken"))
    gpus.hold(0, own, 10)
    gpus.hold(0, stranger, 10)
    with pytest.raises(CudaDeviceFailed, match=rf"held by another process: cat \(pid {stranger}"):
        await story.devices.release(story.of())
    gpus.release(0, stranger)
    await story.devices.release(story.of())

    assert story.of().condition is Condition.OK


@awaited
async def test_pids_of_another_namespace_keep_no_device_from_its_release(
    gpus: Gpus, story: Story, spawn: Spawn
) -> None:
    """Hive's other engines there look like strangers."""
    empty = await story.devices.ready_to_start(("cuda:0",))
    story.devices.own_pids = lambda: {1}
    gpus.hold(0, spawn(), 300)
    await story.devices.see_pids(("cuda:0",), empty, {1})
    story.devices.fail(("cuda:0",), CudaDeviceFailed("broken"))
    await story.devices.release(story.of())

    assert story.of().condition is Condition.OK


# Before a start


@awaited
async def test_a_start_gets_the_memory_that_was_there_before_it(
    gpus: Gpus, driver: Driver, spawn: Spawn
) -> None:
    first = gpus.add(0, total_mib=1000, base_mib=100)
    second = gpus.add(1, total_mib=2000, base_mib=100)
    story = Story(driver, ("cuda:0", "cuda:1"))
    own = spawn()
    gpus.hold(1, own, 300)
    story.devices.own_pids = lambda: {own}

    assert await story.devices.ready_to_start(("cuda:0", "cuda:1")) == {
        first: Baseline(free=900 * MIB, held=0),
        second: Baseline(free=1600 * MIB, held=300 * MIB),
    }
    assert [(read.device, read.free_bytes) for read in story.all(DeviceRead)] == [
        ("cuda:0", 900 * MIB),
        ("cuda:1", 1600 * MIB),
    ]


@awaited
async def test_a_device_that_is_configured_by_uuid_is_one_like_any_other(
    gpus: Gpus, driver: Driver
) -> None:
    uuid = gpus.add(0)
    story = Story(driver, (uuid,))
    baselines = await story.devices.ready_to_start((uuid,))
    receipts = await story.devices.receipts("w-0", (uuid,), baselines, (), within_s=WITHIN_S)
    assert receipts == {"cuda:0": (Receipt.RETURNED, "")}
    async with story.watching():
        gpus.xid(0, 48)
        await story.becomes(Condition.QUARANTINED)
    with pytest.raises(GpuQuarantined, match="Device cuda:0 is QUARANTINED"):
        await story.devices.ready_to_start((uuid,))


@awaited
async def test_no_start_beside_a_stranger(gpus: Gpus, story: Story, spawn: Spawn) -> None:
    """It is named; it is no fault of the device (R017)."""
    own, stranger = spawn(), spawn()
    story.devices.own_pids = lambda: {own}
    gpus.hold(0, own, 10)
    gpus.hold(0, stranger, 300)
    with pytest.raises(CudaDeviceFailed) as caught:
        await story.devices.ready_to_start(("cuda:0",))

    assert caught.value.details["holders"] == [
        {"pid": stranger, "name": "cat", "vram_bytes": 300 * MIB}
    ]
    assert story.of().condition is Condition.OK
    gpus.release(0, stranger)
    assert await story.devices.ready_to_start(("cuda:0",))


@awaited
async def test_no_start_on_a_device_that_is_not_well(gpus: Gpus, two: Story) -> None:
    gpus.change(0, remap_failed=1)
    gpus.change(1, lost=1)
    with pytest.raises(CudaDeviceFailed, match="could not remap"):
        await two.devices.ready_to_start(("cuda:0",))
    with pytest.raises(CudaDeviceFailed, match="The device is lost"):
        await two.devices.ready_to_start(("cuda:1",))
    with pytest.raises(GpuQuarantined):
        await two.devices.ready_to_start(("cuda:0",))

    assert two.of("cuda:0").condition is Condition.QUARANTINED
    assert two.of("cuda:1").condition is Condition.LOST
    assert [device for device, _ in two.faults] == ["cuda:0", "cuda:1"]


@awaited
async def test_hives_own_engines_are_no_strangers_where_pids_are_anothers(
    gpus: Gpus, story: Story, spawn: Spawn
) -> None:
    empty = await story.devices.ready_to_start(("cuda:0",))
    gpus.hold(0, spawn(), 300)
    await story.devices.see_pids(("cuda:0",), empty, {1})
    with pytest.raises(CudaDeviceFailed, match="held by another process"):
        await story.devices.ready_to_start(("cuda:0",))  # while hive runs nothing at all
    story.devices.own_pids = lambda: {1}
    assert await story.devices.ready_to_start(("cuda:0",))


@awaited
async def test_an_engine_that_holds_no_memory_says_nothing_of_the_pids(
    gpus: Gpus, story: Story
) -> None:
    empty = await story.devices.ready_to_start(("cuda:0",))
    await story.devices.see_pids(("cuda:0",), empty, {1})

    assert story.of().pids_are_visible is None


# After an end


class Ended:
    """A worker that ran on cuda:0, with the receipt for its VRAM."""

    def __init__(self, story: Story, pid: int) -> None:
        self.story, self.pid = story, pid
        self.baselines: dict[str, Baseline] = {}

    async def begin(self) -> None:
        self.baselines = await self.story.devices.ready_to_start(("cuda:0",))

    async def run(self) -> None:
        await self.story.devices.see_pids(("cuda:0",), self.baselines, {self.pid})

    async def receipt(self, within_s: float = WITHIN_S) -> tuple[Receipt, str]:
        receipts = await self.story.devices.receipts(
            "llama-0", ("cuda:0",), self.baselines, {self.pid}, within_s=within_s
        )
        outcome, detail = receipts["cuda:0"]
        told = self.story.all(VramChecked)[-1]
        assert (told.worker, told.device) == ("llama-0", "cuda:0")
        assert (told.outcome, told.detail) == (outcome, detail)
        return outcome, detail


@pytest.fixture
def worker(story: Story, spawn: Spawn) -> Ended:
    return Ended(story, spawn())


@awaited
async def test_memory_that_came_back_is_returned(gpus: Gpus, worker: Ended, story: Story) -> None:
    """Also when it takes the driver a while."""
    await worker.begin()
    gpus.hold(0, worker.pid, 5000)
    await worker.run()
    async with asyncio.TaskGroup() as tasks:
        checking = tasks.create_task(worker.receipt())
        before = len(story.all(DeviceRead))
        await until(lambda: len(story.all(DeviceRead)) > before + 1, "it to look more than once")
        assert not checking.done()
        gpus.release(0, worker.pid)

    assert checking.result() == (Receipt.RETURNED, "")
    assert story.all(VramChecked)[-1].seconds >= LOOK_S
    assert story.of().condition is Condition.OK


@awaited
async def test_one_that_never_held_memory_has_returned_it(worker: Ended) -> None:
    """It ended while it loaded, say: whether pids can be read is not known then."""
    await worker.begin()

    assert await worker.receipt() == (Receipt.RETURNED, "")


@awaited
async def test_a_process_of_its_own_that_still_holds_memory_keeps_it(
    gpus: Gpus, worker: Ended, story: Story
) -> None:
    await worker.begin()
    gpus.hold(0, worker.pid, 300)
    outcome, left = await worker.receipt(OVER_S)

    assert (outcome, left) == (Receipt.KEPT, f"held by cat (pid {worker.pid}, 300 MiB)")
    assert story.all(DeviceMoved) == [
        DeviceMoved(
            "cuda:0",
            "OK",
            "QUARANTINED",
            "CUDA_DEVICE_FAILED",
            f"VRAM of llama-0 on cuda:0 did not come back within 0.2 s: {left}.",
        )
    ]
    assert story.faults == []  # the device itself has done nothing
    assert story.all(VramChecked)[-1].seconds >= OVER_S


@awaited
async def test_even_a_process_without_memory_is_not_gone(gpus: Gpus, worker: Ended) -> None:
    await worker.begin()
    gpus.hold(0, worker.pid, 0)

    assert (await worker.receipt(OVER_S))[0] is Receipt.KEPT


@awaited
async def test_memory_that_nobody_holds_and_that_is_not_free_is_kept(
    gpus: Gpus, worker: Ended, story: Story
) -> None:
    await worker.begin()
    gpus.hold(0, worker.pid, 5000)
    await worker.run()
    gpus.release(0, worker.pid)
    gpus.change(0, base_mib=5500)

    assert await worker.receipt(OVER_S) == (
        Receipt.KEPT,
        "5000 MiB are held by no process that is known",
    )
    assert story.of().condition is Condition.QUARANTINED
    with pytest.raises(GpuQuarantined, match="did not come back"):
        await worker.begin()
    gpus.change(0, base_mib=500)  # a reset
    await story.devices.release(story.of())
    await worker.begin()


@awaited
async def test_its_own_process_is_proof_that_pids_can_be_read(
    gpus: Gpus, worker: Ended, story: Story
) -> None:
    """It ended while it loaded, before anybody had looked for it there."""
    await worker.begin()
    gpus.hold(0, worker.pid, 5000)
    async with asyncio.TaskGroup() as tasks:
        before = len(story.all(DeviceRead))
        checking = tasks.create_task(worker.receipt(HUNG_S))
        await until(lambda: len(story.all(DeviceRead)) > before, "it to look")
        gpus.change(0, base_mib=5500)
        gpus.release(0, worker.pid)

    outcome, left = checking.result()
    assert (outcome, left.endswith("held by no process that is known")) == (Receipt.KEPT, True)


@awaited
async def test_a_fault_of_a_device_that_keeps_memory_is_told(
    gpus: Gpus, worker: Ended, story: Story
) -> None:
    """Others may run there still."""
    await worker.begin()
    gpus.hold(0, worker.pid, 300)
    await worker.receipt(OVER_S)
    async with story.watching():
        gpus.xid(0, 48)
        await until(lambda: story.faults, "the fault")

    assert "Xid 48" in story.faults[0][1]


@awaited
async def test_the_drivers_bookkeeping_is_no_leak(gpus: Gpus, worker: Ended) -> None:
    await worker.begin()
    gpus.hold(0, worker.pid, 300)
    await worker.run()
    gpus.release(0, worker.pid)
    gpus.change(0, base_mib=500 + 256)

    assert await worker.receipt() == (Receipt.RETURNED, "")


@awaited
async def test_what_others_took_meanwhile_is_theirs(
    gpus: Gpus, worker: Ended, story: Story, spawn: Spawn
) -> None:
    """A neighbour that was there before and grew, and one that came."""
    neighbour, late = spawn(), spawn()
    story.devices.own_pids = lambda: {worker.pid, neighbour, late}
    gpus.hold(0, neighbour, 1000)
    await worker.begin()
    gpus.hold(0, worker.pid, 5000)
    await worker.run()
    gpus.hold(0, neighbour, 9000)
    gpus.hold(0, late, 700)
    gpus.release(0, worker.pid)
    assert await worker.receipt() == (Receipt.RETURNED, "")

    gpus.release(0, neighbour)  # and one that went hides nothing
    gpus.change(0, base_mib=500 + 900)
    outcome, left = await worker.receipt(OVER_S)
    assert (outcome, left) == (Receipt.UNPROVEN, f"also there: cat (pid {late}, 700 MiB)")
    assert story.of().condition is Condition.OK


@awaited
async def test_where_pids_are_hidden_nothing_is_proved_and_nothing_held_against_it(
    gpus: Gpus, worker: Ended, story: Story
) -> None:
    gpus.hide_pids()
    await worker.begin()
    gpus.hold(0, worker.pid, 300)
    await worker.run()
    outcome, left = await worker.receipt(OVER_S)
    assert outcome is Receipt.UNPROVEN
    assert left.startswith("300 MiB are held by no process that is known, but the driver's pids")
    gpus.release(0, worker.pid)
    outcome, left = await worker.receipt()
    assert outcome is Receipt.UNPROVEN
    assert left.startswith("the driver's pids")

    assert story.of().condition is Condition.OK
    assert story.moves() == []


@awaited
async def test_a_pid_that_is_seen_once_is_worth_more_than_many_that_are_not(
    gpus: Gpus, worker: Ended, story: Story
) -> None:
    """NVML was slow to list the engine."""
    await worker.begin()
    gpus.change(0, base_mib=900)
    await worker.run()
    gpus.change(0, base_mib=500)
    assert story.of().pids_are_visible is False
    story.devices.own_pids = lambda: {worker.pid}
    async with story.devices.watching():
        gpus.hold(0, worker.pid, 300)
        await until(lambda: story.of().pids_are_visible, "the engine to be seen")
    gpus.release(0, worker.pid)

    assert await worker.receipt() == (Receipt.RETURNED, "")


@awaited
async def test_with_no_time_it_is_only_looked(gpus: Gpus, worker: Ended, story: Story) -> None:
    await worker.begin()
    gpus.hold(0, worker.pid, 300)
    await worker.run()

    assert await worker.receipt(0) == (
        Receipt.UNPROVEN,
        f"held by cat (pid {worker.pid}, 300 MiB)",
    )
    assert story.of().condition is Condition.OK


@awaited
async def test_several_devices_are_waited_for_together(
    gpus: Gpus, two: Story, spawn: Spawn
) -> None:
    """A worker's stop takes no longer because it has more of them."""
    pid, names = spawn(), ("cuda:0", "cuda:1")
    baselines = await two.devices.ready_to_start(names)
    for index in (0, 1):
        gpus.hold(index, pid, 300)
    two.announced.clear()
    receipts = await two.devices.receipts("llama-0", names, baselines, {pid}, within_s=OVER_S)

    assert [outcome for outcome, _ in receipts.values()] == [Receipt.KEPT, Receipt.KEPT]
    looks = [read.device for read in two.all(DeviceRead)]
    assert looks.count("cuda:0") > 1
    assert looks.count("cuda:1") == 1
    assert [checked.seconds >= OVER_S for checked in two.all(VramChecked)] == [True, True]


@awaited
async def test_a_device_that_does_not_answer_proves_nothing(gpus: Gpus, worker: Ended) -> None:
    await worker.begin()
    gpus.remove(0)
    outcome, left = await worker.receipt()

    assert outcome is Receipt.UNPROVEN
    assert left.startswith("The device is lost")


# Strangers


@awaited
async def test_a_stranger_is_told_once_for_as_long_as_it_is_there(
    gpus: Gpus, story: Story, spawn: Spawn
) -> None:
    own, stranger = spawn(), spawn()
    story.devices.own_pids = lambda: {own}
    gpus.hold(0, own, 10)
    gpus.hold(0, stranger, 300)
    async with story.devices.watching():
        await until(lambda: story.all(StrangerSeen), "the stranger")
        await story.read_again()
        seen = StrangerSeen("cuda:0", stranger, "cat", 300 * MIB)
        assert story.all(StrangerSeen) == [seen]
        gpus.release(0, stranger)
        await story.read_again()
        gpus.hold(0, stranger, 300)
        await until(lambda: len(story.all(StrangerSeen)) == 2, "it to be told again")

    assert story.all(StrangerSeen) == [seen, seen]
    assert story.of().condition is Condition.OK


@awaited
async def test_whose_a_process_is_is_asked_again_when_nobody_could_look(
    gpus: Gpus, story: Story, spawn: Spawn
) -> None:
    """hive has no descriptor left, say: that ends nothing."""
    asked: list[int] = []

    def own_pids() -> set[int]:
        asked.append(1)
        if len(asked) < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return set()

    story.devices.own_pids = own_pids
    stranger = spawn()
    gpus.hold(0, stranger, 300)
    async with story.devices.watching():
        await until(lambda: story.all(StrangerSeen), "the stranger")
        assert [seen.pid for seen in story.all(StrangerSeen)] == [stranger]
        assert len(asked) == 3
        asked.clear()
        (process,) = story.devices.view(story.of())["processes"]
        assert process["pid"] == stranger


@awaited
async def test_whose_a_process_is_is_asked_once(gpus: Gpus, story: Story, spawn: Spawn) -> None:
    """Every look at hive's own processes reads the whole of /proc."""
    asked: list[int] = []
    own = spawn()

    def own_pids() -> set[int]:
        asked.append(1)
        return {own}

    story.devices.own_pids = own_pids
    gpus.hold(0, own, 10)
    async with story.devices.watching():
        for _ in range(3):
            await story.read_again()

    assert len(asked) == 1


# For operators


@awaited
async def test_a_device_is_shown_with_its_condition_and_its_reason(
    gpus: Gpus, driver: Driver, spawn: Spawn
) -> None:
    uuid = gpus.add(0, total_mib=1000, base_mib=100)
    story = Story(driver)
    own = spawn()
    story.devices.own_pids = lambda: {own}
    gpus.hold(0, own, 10)
    unread = story.devices.view(story.of())
    began = time.time()
    async with story.watching():
        whole = story.devices.view(story.of())
        gpus.xid(0, 64)
        await story.becomes(Condition.QUARANTINED)
        broken = story.devices.view(story.of())

    assert (unread["state"], unread["read_at"], unread["events"]) == ("OK", None, "polling")
    assert "vram_total_bytes" not in unread
    assert (whole["id"], whole["uuid"], whole["name"]) == ("cuda:0", uuid, "NVIDIA H100")
    assert (whole["state"], whole["reason"], whole["error"]) == ("OK", "", None)
    assert (whole["vram_free_bytes"], whole["events"]) == (890 * MIB, "event set")
    assert whole["processes"] == [
        {"pid": own, "name": "cat", "vram_bytes": 10 * MIB, "is_ours": True}
    ]
    assert began <= whole["read_at"] <= time.time()
    assert (broken["state"], broken["error"]) == ("QUARANTINED", "CUDA_DEVICE_FAILED")
    assert "Xid 64" in broken["reason"]
    assert broken["since"] >= began
    ((xid),) = broken["xids"]
    assert xid["xid"] == 64
    assert xid["at"] >= began


# The end


@awaited
async def test_a_block_that_fails_ends_the_watching_too(gpus: Gpus, story: Story) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        async with story.watching():
            raise RuntimeError("elsewhere")

    assert caught.group_contains(RuntimeError, match="elsewhere")
    await until(lambda: not threads("nvml events"), "nobody to listen any more")


@awaited
async def test_whoever_is_told_and_fails_ends_the_watching(gpus: Gpus, story: Story) -> None:
    """A fault that nobody could act on must not pass in silence."""

    def fail(_watched: Watched) -> None:
        raise RuntimeError("cannot act")

    story.devices.on_fault = fail
    with pytest.raises(BaseExceptionGroup) as caught:  # noqa: PT012
        async with story.watching():
            gpus.change(0, remap_failed=1)
            await asyncio.Event().wait()

    assert caught.group_contains(RuntimeError, match="cannot act")


def test_an_xid_after_the_event_loops_end_is_nobodys_error(gpus: Gpus, story: Story) -> None:
    async def watch() -> None:
        async with story.watching():
            pass

    asyncio.run(watch())
    gpus.xid(0, 79)
    gpus.remove(0)
    wait_until(lambda: not threads("nvml events"), "nobody to listen any more")

    assert story.faults == []

"""Xids come at any rate: none is lost, a flood holds nothing up, and silence is no good news."""

import asyncio
import time
from collections import Counter

import pynvml
import pytest

from hive.devices.lanes import DriverHung
from hive.devices.nvml import Device, DeviceLost, Driver
from hive.devices.xids import GATHER_S, Ear, Heard
from tests.devices.conftest import HoldUp, threads
from tests.doubles.nvml import Gpus
from tests.patience import awaited, until

RETRY_S = 0.01


@pytest.fixture
def gpu(gpus: Gpus) -> Device:
    return Device(0, gpus.add(0), "NVIDIA H100")


@pytest.fixture
def ear(driver: Driver, gpu: Device) -> Ear:
    return Ear(driver, gpu, RETRY_S)


async def next_of(ear: Ear) -> Heard:
    """The first that is no mere sign of life."""
    while True:
        heard = await ear.news()
        if heard.xids or heard.error:
            return heard


@awaited
async def test_each_is_counted_and_a_flood_comes_in_heaps(gpus: Gpus, ear: Ear) -> None:
    many = 150
    total: Counter[int] = Counter()
    heaps = 0
    with ear.listening():
        assert await ear.news() == Heard()  # it listens
        for _ in range(many):
            gpus.xid(0, 13)
        gpus.xid(0, 31)
        began = time.monotonic()
        while total[31] == 0:
            total += (await next_of(ear)).xids
            heaps += 1

    assert total == {13: many, 31: 1}
    assert heaps <= 2 + (time.monotonic() - began) / GATHER_S


@awaited
async def test_who_has_heard_nothing_for_a_while_hears_at_once(gpus: Gpus, ear: Ear) -> None:
    with ear.listening():
        assert await ear.news() == Heard()
        gpus.xid(0, 79)
        assert (await next_of(ear)).xids == {79: 1}


@awaited
async def test_a_refusal_is_told_until_it_is_over(gpus: Gpus, ear: Ear) -> None:
    gpus.fail("nvmlEventSetCreate", pynvml.NVML_ERROR_NOT_SUPPORTED)
    with ear.listening():
        for _ in range(2):
            assert "Not Supported" in str((await next_of(ear)).error)
        gpus.heal()
        while (await ear.news()).error:
            pass


@awaited
async def test_the_xid_of_a_loss_is_not_lost_with_it(gpus: Gpus, ear: Ear) -> None:
    with ear.listening():
        assert await ear.news() == Heard()
        gpus.xid(0, 79)
        gpus.remove(0)
        seen: Counter[int] = Counter()
        while not isinstance((heard := await next_of(ear)).error, DeviceLost):
            seen += heard.xids
        assert seen + heard.xids == {79: 1}


@pytest.mark.parametrize(
    "function", ["nvmlEventSetCreate", "nvmlDeviceRegisterEvents", "nvmlEventSetWait_v2"]
)
@awaited
async def test_a_driver_that_says_nothing_at_all_is_an_error(
    driver: Driver, ear: Ear, hold_up: HoldUp, function: str
) -> None:
    """Until it does: a call may only have been slow."""
    driver.call_s = 0.3
    may_return = hold_up(function)
    with ear.listening():
        began = time.monotonic()
        assert isinstance((await ear.news()).error, DriverHung)
        assert time.monotonic() - began > driver.call_s
        may_return.set()
        while (await ear.news()).error:
            pass


@awaited
async def test_its_thread_ends_with_the_block(ear: Ear) -> None:
    assert repr(ear) == "<Ear cuda:0>"
    with ear.listening():
        assert await ear.news() == Heard()
        assert len(threads("nvml events cuda:0")) == 1
    await until(lambda: not threads("nvml events"), "the thread to have ended")


def test_what_comes_after_the_event_loops_end_is_nobodys_error(
    gpus: Gpus, driver: Driver, gpu: Device
) -> None:
    async def listen() -> None:
        ear = Ear(driver, gpu, RETRY_S)
        with ear.listening():
            assert await ear.news() == Heard()

    asyncio.run(listen())
    gpus.xid(0, 79)

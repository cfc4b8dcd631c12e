"""A call into the driver may never return: nobody waits for it for ever, and nothing piles up."""

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from hive.devices.lanes import DriverHung, Lane
from hive.errors import CudaDeviceFailed, CudaDriverMissing
from tests.patience import awaited, until, wait_until

TOP = Path(__file__).parents[2]
SHORT_S = 0.05
SLOW_S = 0.5
LONG_S = 60.0
uvloop.new_event_loop().close()  # libuv keeps a pipe from a process's first loop on


class Call:
    """A driver call that returns when it is told to."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.may_return = threading.Event()

    def __call__(self) -> str:
        self.began.set()
        assert self.may_return.wait(LONG_S)
        return "late"


@pytest.fixture
def call() -> Iterator[Call]:
    call = Call()
    yield call
    call.may_return.set()


@pytest.fixture
def lane(request: pytest.FixtureRequest) -> Iterator[Lane]:
    lane = Lane(f"lane of {request.node.name}")
    yield lane
    lane.close()


def threads_of(lane: Lane) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == lane.name]


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


# What a call gives


@awaited
async def test_a_result_is_passed_on(lane: Lane) -> None:
    assert lane.ask(lambda: [1, 2], LONG_S) == [1, 2]
    assert lane.ask(lambda: None, LONG_S) is None
    assert await lane.wait(lambda: "x", LONG_S) == "x"


@pytest.mark.parametrize(
    "error", [ValueError("x"), CudaDriverMissing("y"), SystemExit(3), TimeoutError("its own")]
)
@awaited
async def test_an_error_is_passed_on_as_it_is(lane: Lane, error: BaseException) -> None:
    """A TimeoutError of the call's own is no hung driver."""
    with pytest.raises(type(error)) as asked:
        lane.ask(failing(error), LONG_S)
    with pytest.raises(type(error)) as waited:
        await lane.wait(failing(error), LONG_S)

    assert asked.value is error
    assert waited.value is error
    assert not lane.is_stuck
    assert lane.ask(lambda: 1, LONG_S) == 1


# The deadline


def test_a_call_that_never_returns_is_given_up(lane: Lane, call: Call) -> None:
    """(R014: it is an error of the device, not a reason to do without it.)"""
    began = time.monotonic()
    with pytest.raises(DriverHung, match=r"did not answer within 0\.05 s") as caught:
        lane.ask(call, SHORT_S)

    assert SHORT_S <= time.monotonic() - began < LONG_S
    assert isinstance(caught.value, CudaDeviceFailed)
    assert "nvidia-smi" in caught.value.suggested_action


@awaited
async def test_the_event_loop_runs_while_a_call_is_waited_for(lane: Lane, call: Call) -> None:
    async def release() -> None:
        await until(call.began.is_set, "the call to begin")
        call.may_return.set()

    async with asyncio.TaskGroup() as tasks:
        releasing = tasks.create_task(release())
        assert await lane.wait(call, LONG_S) == "late"
        assert releasing.done()


@awaited
async def test_a_call_that_never_returns_is_given_up_in_the_event_loop(
    lane: Lane, call: Call
) -> None:
    with pytest.raises(DriverHung, match=r"within 0\.05 s"):
        await lane.wait(call, SHORT_S)

    assert lane.is_stuck


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_event_loop_that_was_held_up_blames_nobody_else(
    lane: Lane, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """The answer was there in time; only hive itself was too late to look."""

    async def look() -> str:
        answered = threading.Event()

        def call() -> str:
            answered.set()
            return "in time"

        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(lane.wait(call, SHORT_S))
            await asyncio.sleep(0)
            assert answered.wait(LONG_S)
            threading.Event().wait(2 * SHORT_S)  # what holds the loop up, beyond the deadline
        return asking.result()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(look()) == "in time"
    assert not lane.is_stuck


# A lane that is stuck


@awaited
async def test_a_stuck_lane_refuses_at_once_until_its_call_returns(lane: Lane, call: Call) -> None:
    with pytest.raises(DriverHung):
        lane.ask(call, SHORT_S)
    assert repr(lane) == f"<Lane {lane.name} stuck>"

    began = time.monotonic()
    with pytest.raises(DriverHung, match="still does not answer an earlier call"):
        lane.ask(lambda: 1, LONG_S)
    with pytest.raises(DriverHung, match="still does not answer an earlier call"):
        await lane.wait(lambda: 1, LONG_S)
    assert time.monotonic() - began < LONG_S / 2

    call.may_return.set()
    await until(lambda: not lane.is_stuck, "the call to have returned")
    assert repr(lane) == f"<Lane {lane.name}>"
    assert lane.ask(lambda: 1, LONG_S) == 1  # not the late call's answer
    assert await lane.wait(lambda: 2, LONG_S) == 2


@awaited
async def test_a_call_that_waits_behind_a_hung_one_is_given_up_too(lane: Lane, call: Call) -> None:
    async def refused(wanted: Callable[[], object]) -> None:
        with pytest.raises(DriverHung):
            await lane.wait(wanted, SHORT_S)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(refused(call))
        tasks.create_task(refused(lambda: 1))

    assert lane.is_stuck
    assert len(threads_of(lane)) == 1
    call.may_return.set()
    await until(lambda: not lane.is_stuck, "both calls to have returned")


@awaited
async def test_who_waits_behind_a_hung_call_learns_it_as_soon_as_its_caller(
    lane: Lane, call: Call
) -> None:
    """However late they came, and however long they would wait for their own."""

    async def refused(wanted: Callable[[], object], seconds: float) -> None:
        with pytest.raises(DriverHung):
            await lane.wait(wanted, seconds)

    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(refused(call, SLOW_S))
        await until(call.began.is_set, "the call to begin")
        for _ in range(3):
            tasks.create_task(refused(lambda: 1, LONG_S))

    assert time.monotonic() - began < LONG_S / 2


@awaited
async def test_the_time_of_those_before_is_no_lateness_of_the_drivers(lane: Lane) -> None:
    """A slow driver is not a hung one, however many wait for it."""
    answers = await asyncio.gather(
        *(lane.wait(lambda: time.sleep(SLOW_S), 2 * SLOW_S) for _ in range(4)),
        asyncio.to_thread(lane.ask, lambda: time.sleep(SLOW_S), 2 * SLOW_S),
    )

    assert answers == [None] * 5
    assert not lane.is_stuck


@awaited
async def test_equal_calls_that_wait_are_made_once_and_after_those_who_asked(
    lane: Lane, call: Call
) -> None:
    """One that has begun may have seen what is not so any more."""
    made: list[int] = []

    def look() -> int:
        made.append(1)
        if len(made) == 1:
            call()
        return len(made)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(lane.wait(look, LONG_S))
        await until(call.began.is_set, "the first look to begin")
        others = [tasks.create_task(lane.wait(look, LONG_S)) for _ in range(3)]
        await asyncio.sleep(0)
        call.may_return.set()

    assert [other.result() for other in others] == [2, 2, 2]
    assert len(made) == 2


def test_there_is_one_thread_whoever_asks_and_it_makes_one_call_at_a_time(lane: Lane) -> None:
    asking, rounds = 8, 50
    start = threading.Barrier(asking)
    one_at_a_time = threading.Lock()
    makers: set[int] = set()
    answers: list[int] = []

    def call() -> int:
        with contextlib.ExitStack() as leaving:
            assert one_at_a_time.acquire(blocking=False)
            leaving.callback(one_at_a_time.release)
            makers.add(threading.get_ident())
            return 1

    def ask() -> None:
        start.wait(LONG_S)
        answers.extend(lane.ask(call, LONG_S) for _ in range(rounds))

    askers = [threading.Thread(target=ask) for _ in range(asking)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(LONG_S)

    assert answers == [1] * asking * rounds
    assert len(makers) == 1
    assert len(threads_of(lane)) == 1


def test_no_thread_is_spent_before_the_first_call() -> None:
    lane = Lane("lane that nobody asks")
    assert threads_of(lane) == []
    lane.close()
    assert threads_of(lane) == []


# Those who wait and go


@pytest.mark.parametrize("fails", [False, True])
@awaited
async def test_who_stops_waiting_leaves_the_lane_usable(
    lane: Lane, call: Call, fails: bool
) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))

    def made() -> str:
        said = call()
        if fails:
            raise ValueError(said)
        return said

    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(lane.wait(made, LONG_S))
        await until(call.began.is_set, "the call to begin")
        waiting.cancel()
    assert waiting.cancelled()
    assert not lane.is_stuck
    call.may_return.set()

    assert await lane.wait(lambda: "next", LONG_S) == "next"
    assert len(threads_of(lane)) == 1
    assert complaints == []


def test_an_answer_after_the_event_loops_end_is_nobodys_error(
    lane: Lane, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "concurrent.futures")

    async def give_up() -> None:
        with pytest.raises(DriverHung):
            await lane.wait(call, SHORT_S)

    asyncio.run(give_up())
    call.may_return.set()
    wait_until(lambda: not lane.is_stuck, "the call to have returned")

    assert lane.ask(lambda: 1, LONG_S) == 1
    assert caplog.records == []


# The end


def test_a_closed_lane_ends_its_thread_after_the_call_that_it_is_in(lane: Lane, call: Call) -> None:
    with pytest.raises(DriverHung):
        lane.ask(call, SHORT_S)
    (thread,) = threads_of(lane)
    lane.close()
    lane.close()
    assert thread.is_alive()
    call.may_return.set()
    thread.join(LONG_S)

    assert not thread.is_alive()


def test_a_lane_may_be_closed_before_it_was_asked_and_asked_after_it_was_closed(lane: Lane) -> None:
    lane.close()
    assert lane.ask(lambda: 1, LONG_S) == 1
    lane.close()
    lane.close()
    assert lane.ask(lambda: 2, LONG_S) == 2


def test_a_call_that_hangs_keeps_no_process_alive() -> None:
    """In C, without an end, and with a second one waiting behind it."""
    code = (
        "import ctypes\n"
        "from hive.devices.lanes import DriverHung, Lane\n"
        "lane = Lane('driver')\n"
        "for _ in range(2):\n"
        "    try: lane.ask(ctypes.CDLL(None).pause, 0.1)\n"
        "    except DriverHung as exc: print(exc.message)\n"
        "lane.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=True,
    )

    assert done.stdout.splitlines() == [
        "The NVIDIA driver did not answer within 0.1 s.",
        "The NVIDIA driver still does not answer an earlier call.",
    ]
    assert done.stderr == ""


def test_a_host_that_was_paused_has_lost_no_device() -> None:
    """Stopped for longer than the deadline, hive and the call's thread go on together."""
    program = """
import sys, time
sys.path.insert(0, sys.argv[1])
from hive.devices.lanes import Lane
def call():
    print("asking", flush=True)
    time.sleep(0.4)
    return "answered"
print(Lane("paused").ask(call, 1.0), flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(TOP)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asking\n"
        process.send_signal(signal.SIGSTOP)
        assert not wait_for_exit(process, 1.5)
        process.send_signal(signal.SIGCONT)

        assert process.stdout.readline() == "answered\n"


def wait_for_exit(process: "subprocess.Popen[str]", seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True

"""Blocks that somebody else ends: before, inside, nested, after, and in the moment of their end."""

import asyncio
from collections.abc import Callable

import pytest

from hive.workers.interrupt import Interrupt
from tests.patience import awaited


class Late(Exception):
    """What is raised inside."""


class Other(Exception):
    """What else may be."""


async def waits(*interrupts: Interrupt, entered: asyncio.Event | None = None) -> str:
    """Wait for ever inside, the first interrupt outermost."""
    if interrupts:
        async with interrupts[0]:
            return await waits(*interrupts[1:], entered=entered)
    if entered:
        entered.set()
    await asyncio.Event().wait()
    return "woken"


def soon(act: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_soon(act)


@awaited
async def test_a_block_that_nobody_ends_is_as_if_it_were_none() -> None:
    interrupt = Interrupt()
    async with interrupt as same:
        await asyncio.sleep(0)
        assert same is interrupt

    assert interrupt.cause is None
    assert repr(interrupt) == "<Interrupt None>"


@awaited
async def test_the_cause_is_raised_where_the_block_waits() -> None:
    interrupt, cause = Interrupt(), Late("now")
    soon(lambda: interrupt.end(cause))
    with pytest.raises(Late) as caught:
        await waits(interrupt)

    assert caught.value is cause
    assert repr(interrupt) == "<Interrupt Late('now')>"
    current = asyncio.current_task()
    assert current
    assert current.cancelling() == 0  # the task itself was not cancelled


@awaited
async def test_what_the_block_cleans_up_is_cleaned_up_first() -> None:
    interrupt, steps = Interrupt(), []

    async def block() -> None:
        async with interrupt:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                steps.append("cancelled")
                raise
            finally:
                await asyncio.sleep(0)
                steps.append("clean")

    soon(lambda: interrupt.end(Late()))
    with pytest.raises(Late):
        await block()
    assert steps == ["cancelled", "clean"]


@awaited
async def test_an_end_before_the_block_raises_at_its_beginning() -> None:
    interrupt, is_inside = Interrupt(), False
    interrupt.end(Late())
    with pytest.raises(Late):
        async with interrupt:
            is_inside = True

    assert not is_inside


@awaited
async def test_the_first_cause_counts() -> None:
    interrupt = Interrupt()
    interrupt.end(Late("first"))
    interrupt.end(Other("second"))
    with pytest.raises(Late, match="first"):
        await waits(interrupt)


@awaited
async def test_the_first_cause_counts_inside_too() -> None:
    interrupt = Interrupt()

    def twice() -> None:
        interrupt.end(Late("first"))
        interrupt.end(Other("second"))

    soon(twice)
    with pytest.raises(Late, match="first"):
        await waits(interrupt)


@awaited
async def test_an_end_after_the_block_does_nothing() -> None:
    interrupt = Interrupt()
    async with interrupt:
        pass
    interrupt.end(Late())
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@pytest.mark.parametrize("ended", [0, 1, 2])
@awaited
async def test_one_of_several_around_another_raises_its_own_cause(ended: int) -> None:
    interrupts = [Interrupt() for _ in range(3)]
    soon(lambda: interrupts[ended].end(Late(str(ended))))
    with pytest.raises(Late, match=str(ended)):
        await waits(*interrupts)

    assert [one.cause is not None for one in interrupts] == [n == ended for n in range(3)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@awaited
async def test_of_two_that_end_in_one_moment_the_outer_one_is_told(order: tuple[int, int]) -> None:
    interrupts = [Interrupt(), Interrupt()]

    def both() -> None:
        for number in order:
            interrupts[number].end(Late(str(number)))

    soon(both)
    with pytest.raises(Late, match="0"):
        await waits(*interrupts)
    current = asyncio.current_task()
    assert current
    assert current.cancelling() == 0


@awaited
async def test_the_outer_one_goes_on_after_the_inner_one() -> None:
    outer, inner = Interrupt(), Interrupt()
    soon(lambda: inner.end(Late("inner")))

    async def block() -> None:
        async with outer:
            with pytest.raises(Late, match="inner"):
                await waits(inner)
            soon(lambda: outer.end(Other("outer")))
            await asyncio.Event().wait()

    with pytest.raises(Other, match="outer"):
        await block()


@awaited
async def test_a_block_that_is_done_in_the_moment_of_the_end_is_done() -> None:
    """The end comes between its last wait and its end: too late."""
    interrupt = Interrupt()

    async def block() -> str:
        async with interrupt:
            await asyncio.sleep(0)
            interrupt.end(Late())
            return "done"

    assert await block() == "done"
    await asyncio.sleep(0)  # nothing comes after it


@pytest.mark.parametrize("first", ["end", "wake"])
@awaited
async def test_an_end_in_the_moment_in_which_the_block_wakes_is_told_or_too_late(
    first: str,
) -> None:
    """Never a cancelled task, and never a cause that is told to nobody."""
    interrupt, woken = Interrupt(), asyncio.get_running_loop().create_future()

    def at_once() -> None:
        if first == "wake":
            woken.set_result(None)
        interrupt.end(Late())
        if first == "end":
            woken.set_result(None)

    async def block() -> str:
        try:
            async with interrupt:
                await woken
        except Late:
            return "told"
        return "done"

    soon(at_once)
    assert await block() in ("told", "done")
    await asyncio.sleep(0)


@awaited
async def test_what_the_block_raises_itself_is_not_covered() -> None:
    interrupt = Interrupt()
    with pytest.raises(Other):
        async with interrupt:
            raise Other


@awaited
async def test_a_timeout_of_the_blocks_own_is_not_taken_for_the_end() -> None:
    interrupt = Interrupt()
    with pytest.raises(TimeoutError):
        async with interrupt, asyncio.timeout(0):
            await asyncio.Event().wait()
    assert interrupt.cause is None


@pytest.mark.parametrize("also_ends", [False, True])
@awaited
async def test_whoever_cancels_the_task_is_obeyed(also_ends: bool) -> None:
    """A client that leaves while the deadline passes has left."""
    interrupt, entered = Interrupt(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(waits(interrupt, entered=entered))
        await entered.wait()
        if also_ends:
            interrupt.end(Late())
        task.cancel()
        await asyncio.wait([task])

    assert task.cancelled()

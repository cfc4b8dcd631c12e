"""One start of a worker: whoever uses its engine hears at once that it ends."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hive.workers.life import EngineOver, Life
from hive.workers.process import Exit, Place
from tests.patience import awaited, short_directory
from tests.workers.standing import HandPulse
from tests.workers.test_wire import GET, Heard


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


@asynccontextmanager
async def living(home: Path) -> AsyncIterator[Life]:
    life = Life(3, Place(home, home / "log"), "m")
    try:
        yield life
    finally:
        await life.close()


async def uses(life: Life, entered: asyncio.Event) -> None:
    async with life.until_over():
        entered.set()
        await asyncio.Event().wait()


@awaited
async def test_everybody_who_uses_it_is_told_when_it_closes(home: Path) -> None:
    async with living(home) as life, asyncio.TaskGroup() as tasks:
        events = [asyncio.Event() for _ in range(3)]
        using = [tasks.create_task(ends_of(uses(life, event))) for event in events]
        for event in events:
            await event.wait()
        await life.close()

        assert await asyncio.gather(*using) == ["over"] * 3


async def ends_of(user: Coroutine[Any, Any, None]) -> str:
    try:
        await user
    except EngineOver:
        return "over"
    return "done"


@awaited
async def test_whoever_is_done_with_it_hears_nothing(home: Path) -> None:
    async with living(home) as life:
        async with life.until_over():
            await asyncio.sleep(0)
        assert life._users == set()
        await life.close()
        await asyncio.sleep(0)


@awaited
async def test_its_users_are_told_before_their_connections_are_cut(home: Path) -> None:
    """A cut connection would say less: that something broke, not what."""
    asked, released = asyncio.Event(), asyncio.Event()

    async def never(_request: web.Request) -> web.Response:
        asked.set()
        await released.wait()
        return web.Response()

    app = web.Application()
    app.router.add_get("/", never)
    runner = web.AppRunner(app)
    await runner.setup()
    async with living(home) as life, asyncio.TaskGroup() as tasks:
        await web.UnixSite(runner, str(life.place.socket)).start()

        async def request() -> None:
            wire = await life.wires.connect(5)
            taker = Heard()
            async with life.until_over():
                wire.ask(GET, b"", taker, is_head=False)
                await taker.ended.wait()

        using = tasks.create_task(ends_of(request()))
        await asked.wait()
        await life.close()

        assert await using == "over"
        released.set()
    await runner.cleanup()


@awaited
async def test_its_end_ends_its_pulse_and_with_it_every_open_abort(home: Path) -> None:
    async with living(home) as life:
        life.pulse = pulse = HandPulse()
        confirmed: list[str] = []
        pulse.began(1)
        pulse.aborted(1, confirmed.append)
        await life.close()
        pulse.aborted(0, confirmed.append)
        await pulse._client.close()

    assert confirmed == ["yes", "yes"]


@awaited
async def test_after_its_end_nothing_can_be_sent(home: Path) -> None:
    async with living(home) as life:
        await life.close()
        with pytest.raises(OSError, match="No such file"):
            await life.wires.connect(5)
        assert life.wires.take() is None


@awaited
async def test_a_use_that_begins_after_the_end_is_told_at_once(home: Path) -> None:
    async with living(home) as life:
        await life.close()
        assert await ends_of(uses(life, asyncio.Event())) == "over"
        assert life._users == set()


@awaited
async def test_how_it_ended_is_waited_for_so_long_and_no_longer(home: Path) -> None:
    async with living(home) as life:
        assert await life.over_within(0.01) is None
        asyncio.get_running_loop().call_later(0.01, life.over.set_result, Exit(code=3))
        exit_ = await life.over_within(30)
        assert exit_
        assert exit_.code == 3
        assert await life.over_within(0) is exit_


@awaited
async def test_where_an_engine_has_an_address_it_is_asked_there(home: Path) -> None:
    """LMCache has no unix socket to listen on."""

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text="said")

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    life = Life(1, Place(home, home / "log"), "", f"http://127.0.0.1:{port}")
    try:
        assert await life.client.ask("GET", "/") == (200, b"said")
    finally:
        await life.close()
        await runner.cleanup()


@awaited
async def test_before_it_was_started_nothing_is_known_of_its_start(home: Path) -> None:
    async with living(home) as life:
        assert life.launch is None
        assert life.cache_life == 0  # no start of LMCache has this number


@awaited
async def test_before_there_is_a_process_it_consists_of_none(home: Path) -> None:
    async with living(home) as life:
        assert life.see_pids() == life.pids == set()
        assert repr(life) == f"<Life 3 of {life.place.mark}>"

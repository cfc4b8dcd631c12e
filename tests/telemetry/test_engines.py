"""GET /metrics: hive's own and the engines', whatever an engine does."""

import asyncio
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hive.telemetry.engines import (
    MOST_BYTES,
    OPENMETRICS_TYPE,
    READ_S,
    TEXT_TYPE,
    Engines,
    Scrape,
    wants_openmetrics,
)
from hive.telemetry.metrics import Metrics
from hive.workers.client import EngineClient
from tests.patience import awaited, short_directory, until
from tests.telemetry.test_exposition import (
    EVERY_KIND,
    GAUGE,
    Series,
    openmetrics_families,
    same,
    series,
)

Engine = Callable[[web.Request], Awaitable[web.StreamResponse]]
WORKERS = (("m-0", "m"), ("m-1", "m"), ("n-0", "n"))
WELL = [("vllm:running", (("engine", "0"), ("worker", "m-0")))]
SLACK_S = 5.0  # for a machine that is busy; what hangs would take for ever


def says(text: str | bytes, status: int = 200, **headers: str) -> Engine:
    async def engine(_request: web.Request) -> web.StreamResponse:
        body = text.encode() if isinstance(text, str) else text
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(body=body, status=status, headers=named)

    return engine


async def silent(_request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def dripping(request: web.Request) -> web.StreamResponse:
    """A line now and then, without an end."""
    answer = web.StreamResponse()
    await answer.prepare(request)
    while True:
        await answer.write(b"x 1\n")
        await asyncio.sleep(0.05)


async def babbling(request: web.Request) -> web.StreamResponse:
    """As much as anybody takes, without an end."""
    answer = web.StreamResponse()
    await answer.prepare(request)
    while True:
        await answer.write(b"# a comment\n" * 5000)


async def broken(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Length": "1000"})
    await answer.prepare(request)
    await answer.write(GAUGE.encode())
    assert request.transport
    request.transport.abort()
    return answer


@asynccontextmanager
async def engines(**served: Engine | None) -> AsyncIterator[Callable[[], Any]]:
    """Each named worker's way to its engine; None is one that nobody answers at."""
    async with AsyncExitStack() as stack:
        home = stack.enter_context(short_directory())
        sources = []
        for name, engine in served.items():
            worker, path = name.replace("_", "-"), home / name
            client = await stack.enter_async_context(EngineClient(path, worker))
            sources.append((worker, client))
            if engine is not None:
                await stack.enter_async_context(listening(engine, path))
        yield lambda: list(sources)


@asynccontextmanager
async def listening(engine: Engine, path: Path) -> AsyncIterator[None]:
    app = web.Application()
    app.router.add_get("/{path:.*}", engine)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    try:
        yield
    finally:
        await runner.cleanup()


async def scraped(scrape: Scrape) -> Series:
    """What both formats say alike."""
    plain, kind = await scrape.text()
    strict, strict_kind = await scrape.text("application/openmetrics-text;version=1.0.0")
    assert (kind, strict_kind) == (TEXT_TYPE, OPENMETRICS_TYPE)
    found = series(text_string_to_metric_families(plain.decode()))
    other = series(openmetrics_families(strict.decode()))
    assert same(other, found)
    return found


def of_engines(found: Series) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    return [key for key in found if not key[0].startswith("hive_")]


def up(found: Series) -> dict[str, float]:
    name = "hive_engine_scrape_up"
    return {labels[0][1]: value for (one, labels), value in found.items() if one == name}


# ── What is served ──────────────────────────────────────────────────────────────────────────────


@awaited
async def test_engines_metrics_stand_beside_hives_own_in_both_formats() -> None:
    metrics = Metrics(WORKERS)
    before = series(text_string_to_metric_families(generate_latest(metrics.registry).decode()))
    async with engines(m_0=says(EVERY_KIND), m_1=says(EVERY_KIND), n_0=says(GAUGE)) as sources:
        found = await scraped(Scrape(metrics, sources))

    assert up(found) == {"m-0": 1, "m-1": 1, "n-0": 1}
    assert found.keys() >= before.keys()
    told = len([line for line in EVERY_KIND.splitlines() if line and line[0] != "#"])
    assert len(of_engines(found)) == 2 * told + 1


@awaited
async def test_what_is_left_out_is_counted_by_worker() -> None:
    bad = "# TYPE hive_x gauge\nhive_x 1\n# TYPE c counter\nc -1\n"
    conflict = "# TYPE vllm:running counter\nvllm:running 1\n"
    async with engines(m_0=says(GAUGE), m_1=says(bad + GAUGE), n_0=says(conflict)) as sources:
        found = await scraped(Scrape(Metrics(WORKERS), sources))

    name = "hive_engine_families_left_out"
    left_out = {labels[0][1]: count for (one, labels), count in found.items() if one == name}
    assert left_out == {"m-0": 0, "m-1": 2, "n-0": 1}
    assert len(of_engines(found)) == 2


@awaited
async def test_a_worker_that_is_gone_leaves_no_series() -> None:
    metrics = Metrics(WORKERS)
    async with engines(m_0=says(GAUGE)) as sources:
        asked = list(sources())
        scrape = Scrape(metrics, lambda: asked)
        assert up(await scraped(scrape)) == {"m-0": 1}
        asked.clear()
        found = await scraped(scrape)

    assert up(found) == {}
    assert of_engines(found) == []


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
@awaited
async def test_promtool_finds_nothing_in_hives_own_and_can_read_the_rest() -> None:
    """Its lint is about names; those of engines are theirs."""
    async with engines(m_0=says(EVERY_KIND), m_1=says(EVERY_KIND)) as sources:
        text, _ = await Scrape(Metrics(WORKERS, ["cuda:0"]), sources).text()
    checked = await asyncio.to_thread(
        subprocess.run, ["promtool", "check", "metrics"], input=text, capture_output=True
    )

    said = checked.stderr.decode()
    assert checked.returncode in (0, 3), said
    assert [line for line in said.splitlines() if line.startswith("hive_")] == []


# ── Engines that misbehave ──────────────────────────────────────────────────────────────────────

MISBEHAVING: dict[str, Engine | None] = {
    "dead": None,
    "hangs": silent,
    "drips": dripping,
    "babbles": babbling,
    "breaks off": broken,
    "too much": says(b"# a comment\n" * (MOST_BYTES // 12 + 1)),
    "garbage": says("<html>"),
    "no text": says(b"x 1\n\xff\n"),
    "fails": says("x 1\n", 500),
    "refers": says("", 302, Location="/well"),
    "compressed": says(b"\x1f\x8b\x08\x00", Content_Encoding="gzip"),
    "says nothing": says(""),
}


@pytest.mark.parametrize("bad", MISBEHAVING.values(), ids=MISBEHAVING)
@awaited
async def test_an_engine_that_misbehaves_costs_its_own_metrics_alone(bad: Engine | None) -> None:
    async with engines(m_0=says(GAUGE), m_1=bad) as sources:
        scrape = Scrape(Metrics(WORKERS), sources)
        began = time.monotonic()
        text, _ = await scrape.text()
        took = time.monotonic() - began

    found = series(text_string_to_metric_families(text.decode()))
    assert of_engines(found) == WELL
    assert up(found) == {"m-0": 1, "m-1": 0}
    assert took < READ_S + SLACK_S


@awaited
async def test_engines_that_hang_are_waited_for_together() -> None:
    names = {f"m_{number}": silent for number in range(8)}
    async with engines(**names) as sources:
        began = time.monotonic()
        await Engines(sources).read()

        assert READ_S * 0.9 < time.monotonic() - began < 4 * READ_S


@awaited
async def test_what_takes_too_long_to_read_is_left_out_and_the_rest_is_not() -> None:
    long = "".join(f'x{{a="{number}"}} 1\n' for number in range(20_000))
    async with engines(m_0=says(long), m_1=says(GAUGE), n_0=says(GAUGE)) as sources:
        reading = await Engines(sources, parse_s=0.1).read()

    assert reading.was_read == {"m-0": False, "m-1": True, "n-0": True}
    assert len(reading.families) == 1


@pytest.mark.parametrize("status", [404, 405, 501])
@awaited
async def test_an_engine_without_metrics_is_no_failure(status: int) -> None:
    async with engines(m_0=says(GAUGE), m_1=says("x 1\n", status)) as sources:
        found = await scraped(Scrape(Metrics(WORKERS), sources))

    assert up(found) == {"m-0": 1}
    assert of_engines(found) == WELL


@awaited
async def test_a_client_that_was_closed_meanwhile_is_an_engine_that_is_gone() -> None:
    async with engines(m_0=says(GAUGE), m_1=says(GAUGE)) as sources:
        await sources()[1][1].close()
        found = await scraped(Scrape(Metrics(WORKERS), sources))

    assert up(found) == {"m-0": 1, "m-1": 0}


# ── Who asks at once ────────────────────────────────────────────────────────────────────────────


class Counting:
    """An engine that answers when it may."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = asyncio.Event()

    async def answer(self, _request: web.Request) -> web.StreamResponse:
        self.asked += 1
        await self.may_answer.wait()
        return web.Response(text=GAUGE)


@awaited
async def test_who_asks_at_once_shares_one_reading() -> None:
    engine = Counting()
    async with engines(m_0=engine.answer) as sources, asyncio.TaskGroup() as tasks:
        reader = Engines(sources)
        readings = [tasks.create_task(reader.read()) for _ in range(5)]
        await until(lambda: engine.asked, "the question")
        engine.may_answer.set()
        found = await asyncio.gather(*readings)
        assert all(one is found[0] for one in found)
        assert engine.asked == 1
        await reader.read()
        assert engine.asked == 2


@awaited
async def test_who_leaves_does_not_take_the_reading_along() -> None:
    engine = Counting()
    async with engines(m_0=engine.answer) as sources, asyncio.TaskGroup() as tasks:
        reader = Engines(sources)
        leaving, staying = (tasks.create_task(reader.read()) for _ in range(2))
        await until(lambda: engine.asked, "the question")
        leaving.cancel()
        engine.may_answer.set()

        assert (await staying).was_read == {"m-0": True}


@awaited
async def test_the_loop_runs_on_while_a_long_answer_is_read() -> None:
    """Requests that are relayed meanwhile do not wait for it."""
    long = "".join(f'x{{a="{number}"}} 1\n' for number in range(4000))
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    async with engines(m_0=says(long)) as sources, asyncio.TaskGroup() as tasks:
        reader = Engines(sources)
        turning = tasks.create_task(turn())
        (_, client), *_ = sources()
        await client.read("/metrics", SLACK_S, MOST_BYTES)
        before = turns
        await reader.read()
        seen = turns - before
        turning.cancel()

    assert seen > 20


# ── Formats ─────────────────────────────────────────────────────────────────────────────────────


# What Prometheus 2.42 sends, and Prometheus 3.
OLDER = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
NEWER = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        ('application/openmetrics-text; version="1.0.0"', True),
        ("Application/OpenMetrics-Text;Version=1.0.0", True),
        ("application/openmetrics-text;version=0.0.1,text/plain;version=0.0.4", False),
        ("application/openmetrics-text;version=2.0.0", False),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.6", False),
        ("application/openmetrics-text;version=1.0.0;q=0,text/html", False),
        ("application/openmetrics-text;q=nan", False),
        ("application/openmetrics-text;q=;;,=,;=", False),
        (OLDER, True),
        (NEWER, True),
    ],
)
def test_the_accept_header_says_which_format(accept: str, *, wanted: bool) -> None:
    assert wants_openmetrics(accept) is wanted


def test_content_types_say_what_they_are() -> None:
    assert re.match(r"text/plain; version=\d", TEXT_TYPE)
    assert OPENMETRICS_TYPE.startswith("application/openmetrics-text; version=1.0.0")

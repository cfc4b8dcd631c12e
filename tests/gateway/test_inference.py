"""From a request to a slot: what counts as waiting, what it weighs, and what ends it before."""

import asyncio
import json

import pytest
from aiohttp import web

from hive.events import RequestAborted, RequestAdmitted, RequestExpired, RequestRefused
from hive.gateway.traffic import Traffic
from hive.policy.admission import Ticket
from tests.gateway.serving import CHAT, Serving, bearer, key, serving
from tests.patience import awaited, until
from tests.workers.standing import admitted

SHORT_S = 0.05


def traffic_of(it: Serving) -> Traffic:
    return it.gateway._traffic


class Held:
    """An engine that answers when it is let go."""

    def __init__(self) -> None:
        self.asked = 0
        self.go = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        await request.read()
        self.asked += 1
        await self.go.wait()
        return web.json_response({})


# ── The wait for a slot ─────────────────────────────────────────────────────────────────────────


@awaited
async def test_without_time_to_wait_whoever_finds_a_free_slot_goes_in() -> None:
    """queue_s = 0: now or not at all."""
    async with serving(timeouts={"queue_s": 0}) as it:
        for _ in range(3):
            answer, _told = await it.chat()
            assert answer.status == 200
        assert it.heard(RequestExpired) == []


@awaited
async def test_without_time_to_wait_whoever_finds_none_is_told_at_once() -> None:
    engine = Held()
    async with (
        serving(engine.answer, {"max_concurrent": 1}, timeouts={"queue_s": 0}) as it,
        asyncio.TaskGroup() as tasks,
    ):
        first = tasks.create_task(it.chat())
        await until(lambda: engine.asked, "the first request")
        for _ in range(3):
            answer, _told = await it.chat()
            assert (answer.status, answer.headers["X-Hive-Reason"]) == (503, "queue_timeout")
        assert it.door.waiting == 0
        engine.go.set()

        assert (await first)[0].status == 200
        assert it.door.in_flight == 0


@awaited
async def test_a_place_that_was_left_before_anybody_waited_there_keeps_no_slot() -> None:
    """The limit passes at the very beginning of the wait: the next slot is the next one's."""
    async with serving(model={"max_concurrent": 1}, timeouts={"queue_s": 0}) as it:
        permit = await admitted(it.door, Ticket())
        answer, _told = await it.chat()
        assert answer.status == 503
        permit.finished()

        assert (it.door.in_flight, it.door.waiting) == (0, 0)
        assert (await it.chat())[0].status == 200


@awaited
async def test_a_slow_body_is_not_the_queues_fault() -> None:
    """A slot was free all the time."""
    async with serving(timeouts={"queue_s": SHORT_S}) as it:

        async def slowly() -> object:
            body = json.dumps(CHAT).encode()
            yield body[:5]
            await asyncio.sleep(3 * SHORT_S)
            yield body[5:]

        async with it.session.post("/v1/chat/completions", data=slowly()) as answer:
            assert answer.status == 200
        assert [*it.heard(RequestExpired), *it.heard(RequestRefused)] == []
        assert it.heard(RequestAdmitted)[0].queue_s < SHORT_S


@awaited
async def test_the_wait_for_a_slot_counts_from_the_arrival() -> None:
    """The time that its body took is gone (contract, Deadlines)."""
    engine = Held()
    async with (
        serving(engine.answer, {"max_concurrent": 1}, timeouts={"queue_s": 4 * SHORT_S}) as it,
        asyncio.TaskGroup() as tasks,
    ):
        loop = asyncio.get_running_loop()
        tasks.create_task(it.chat())
        await until(lambda: engine.asked, "the first request")
        began, sent = loop.time(), 0.0

        async def slowly() -> object:
            nonlocal sent
            body = json.dumps(CHAT).encode()
            yield body[:5]
            await asyncio.sleep(3 * SHORT_S)
            sent = loop.time()
            yield body[5:]

        async with it.session.post("/v1/chat/completions", data=slowly()) as answer:
            assert answer.headers["X-Hive-Reason"] == "queue_timeout"
        assert loop.time() - began >= 4 * SHORT_S - 0.01
        assert loop.time() - sent < 4 * SHORT_S
        engine.go.set()


@awaited
async def test_what_has_no_time_left_is_not_even_counted_in() -> None:
    async with serving() as it:
        answer, told = await it.chat(X_Request_Deadline="2020-01-01T00:00:00Z")

        assert (answer.status, told["error"]["code"]) == (504, "REQUEST_TIMEOUT")
        assert told["error"]["details"]["phase"] == "request"
        assert it.heard(RequestAdmitted) == []
        assert [event.phase for event in it.heard(RequestExpired)] == ["request"]


@awaited
async def test_who_has_a_moment_left_and_must_wait_keeps_no_slot() -> None:
    """Its limit passes between its arrival at the door and its wait."""
    async with serving(model={"max_concurrent": 1}) as it:
        permit = await admitted(it.door, Ticket())
        for _ in range(20):
            for left in ("0.0004", "0.0008", "0.0012", "0.002"):
                answer, told = await it.chat(X_Hive_Timeout=left)
                assert (answer.status, told["error"]["code"]) == (504, "REQUEST_TIMEOUT")
                assert it.door.waiting == 0
        permit.finished()

        assert it.door.in_flight == 0


# ── Weights ─────────────────────────────────────────────────────────────────────────────────────

PROMPTS = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("path", "body", "weight"),
    [
        ("/v1/chat/completions", CHAT, 1),
        ("/v1/completions", {"model": "m", "prompt": PROMPTS, "n": 2}, 6),
        ("/v1/embeddings", {"model": "m", "input": PROMPTS}, 3),
        ("/pooling", {"model": "m", "input": PROMPTS}, 3),
        ("/tokenize", {"model": "m", "prompt": "a"}, 0),
        ("/tokenize", {"model": "m", "prompt": PROMPTS, "n": 2}, 0),
        ("/detokenize", {"model": "m", "tokens": [1, 2]}, 0),
    ],
)
@awaited
async def test_a_request_weighs_what_the_engine_makes_of_it(
    path: str, body: object, weight: int
) -> None:
    """Nothing, where it runs nothing: its gauges count no such request (R050)."""
    seen: list[int] = []

    async def engine(_request: web.Request) -> web.Response:
        seen.append(it.pulse.open_weight)
        return web.json_response({})

    async with serving(engine) as it:
        answer, _told = await it.ask("POST", path, body)
        assert answer.status == 200
        assert seen == [weight]
        assert it.pulse.open_weight == 0


@awaited
async def test_who_leaves_a_tokenizer_holds_no_slot_for_a_confirmation() -> None:
    engine = Held()
    async with serving(engine.answer) as it, asyncio.TaskGroup() as tasks:
        body = {"model": "m", "prompt": "a"}
        asking = tasks.create_task(it.ask("POST", "/tokenize", body))
        await until(lambda: engine.asked, "the request")
        asking.cancel()
        await until(lambda: it.door.in_flight == 0, "its slot to be free")

        assert it.pulse.aborted_weight == 0
        assert it.heard(RequestAborted) == []


# ── Cancelling ──────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_request_may_be_cancelled_while_its_body_is_on_its_way() -> None:
    """It ends at once, whether the body comes or not, and no worker is asked."""
    engine = Held()
    async with serving(engine.answer) as it, asyncio.TaskGroup() as tasks:
        rest = asyncio.Event()

        async def slowly() -> object:
            body = json.dumps(CHAT).encode()
            yield body[:5]
            await rest.wait()
            yield body[5:]

        async def send() -> tuple[int, str]:
            headers = {"X-Request-Id": "r1"}
            path = "/v1/chat/completions"
            async with it.session.post(path, data=slowly(), headers=headers) as answer:
                return answer.status, (await answer.json())["error"]["code"]

        sending = tasks.create_task(send())
        await until(lambda: traffic_of(it).views(), "the request to arrive")
        answer, _told = await it.ask("DELETE", "/hive/v1/requests/r1")
        assert answer.status == 204

        assert await sending == (499, "REQUEST_CANCELLED")
        rest.set()
        assert engine.asked == 0
        assert it.heard(RequestAdmitted) == []
        assert it.door.in_flight == 0
        answer, _told = await it.ask("DELETE", "/hive/v1/requests/r1")
        assert answer.status == 204


@pytest.mark.parametrize(("who", "status"), [("mine", 204), ("boss", 204), ("other", 404)])
@awaited
async def test_its_own_key_or_an_admin_may_cancel_a_request(who: str, status: int) -> None:
    engine = Held()
    keys = [key("mine"), key("other"), key("boss", "admin")]
    async with serving(engine.answer, auth={"keys": keys}) as it, asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(it.chat(X_Request_Id="r1", **bearer("mine")))
        await until(lambda: engine.asked, "the request")
        answer, told = await it.ask("DELETE", "/hive/v1/requests/r1", **bearer(who))
        assert answer.status == status
        if status == 404:
            assert told["error"]["code"] == "NOT_FOUND"
            engine.go.set()
            assert (await asking)[0].status == 200
        else:
            assert (await asking)[1]["error"]["code"] == "REQUEST_CANCELLED"
            it.pulse.confirm()
        again, _told = await it.ask("DELETE", "/hive/v1/requests/r1", **bearer(who))

        assert again.status == status
        assert it.door.in_flight == 0


# ── hive stops ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("action", ["start", "restart"])
@awaited
async def test_a_hive_that_stops_starts_nothing_any_more(action: str) -> None:
    async with serving() as it:
        it.fleet.refuse()
        answer, told = await it.ask("POST", f"/hive/v1/workers/m-0/{action}")

        assert (answer.status, told["error"]["code"]) == (503, "SERVICE_UNAVAILABLE")
        assert answer.headers["X-Hive-Reason"] == "draining"


# ── Stored responses ────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_stored_response_is_for_the_key_that_asked_for_it_and_within_its_limits() -> None:
    async def stores(request: web.Request) -> web.Response:
        return web.json_response({"id": "resp_1", "path": request.path})

    keys = [{**key("mine"), "requests_per_minute": 2}, key("other")]
    async with serving(stores, auth={"keys": keys}) as it:
        path, made = "/v1/responses/resp_1", {"model": "m", "input": "a"}
        answer, _ = await it.ask("POST", "/v1/responses", made, **bearer("mine"))
        assert answer.status == 200
        for method in ("GET", "DELETE"):
            answer, told = await it.ask(method, path, **bearer("other"))
            assert (answer.status, told["error"]["code"]) == (404, "NOT_FOUND")
        answer, told = await it.ask("GET", path, **bearer("mine"))
        assert (answer.status, told["path"]) == (200, path)
        answer, told = await it.ask("GET", path, **bearer("mine"))
        assert (answer.status, told["error"]["code"]) == (429, "RATE_LIMITED")
        assert it.door.in_flight == 0

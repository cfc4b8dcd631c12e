"""The requests in flight: unique ids, and one announced end each, whatever happens."""

import asyncio
import re
import time

import pytest
from aiohttp.test_utils import make_mocked_request
from aiohttp.web import Request
from hypothesis import given
from hypothesis import strategies as st

from hive.errors import Conflict, NotFound, RequestCancelled
from hive.events import Announcer, Event, RequestEnded
from hive.gateway.clock import Clock
from hive.gateway.traffic import ABORTED, REMEMBERED, REMEMBERED_S, Traffic
from hive.policy.deadlines import Deadline
from tests.gateway.test_clock import LONG, Expired
from tests.patience import awaited


class Heard:
    """Traffic with the ends that it announced."""

    def __init__(self) -> None:
        self.ends: list[RequestEnded] = []
        announcer = Announcer()
        announcer.listen(self._hear)
        self.traffic = Traffic(announcer)

    def _hear(self, event: Event) -> None:
        assert isinstance(event, RequestEnded)
        self.ends.append(event)


def request(request_id: str | None = None) -> Request:
    headers = {} if request_id is None else {"X-Request-Id": request_id}
    return make_mocked_request("POST", "/v1/chat/completions?x=1", headers=headers)


@pytest.mark.parametrize("request_id", ["a", "A-b_c.9", "x" * 128])
def test_a_usable_id_is_kept(request_id: str) -> None:
    with Heard().traffic.passage(request(request_id)) as passage:
        assert passage.request_id == request_id


@pytest.mark.parametrize("request_id", [None, "", "a b", "x" * 129, "a/b", "é", "a\n", "<x>"])
def test_any_other_is_replaced(request_id: str | None) -> None:
    with Heard().traffic.passage(request(request_id)) as passage:
        assert re.fullmatch(r"[0-9a-f]{32}", passage.request_id)


def test_an_id_that_is_in_flight_is_refused_under_an_id_of_its_own() -> None:
    """The request that came first is not disturbed."""
    heard = Heard()
    with heard.traffic.passage(request("a")) as first:
        second_request = request("a")
        with heard.traffic.passage(second_request) as second:
            assert second.request_id != "a"
            with pytest.raises(Conflict, match="is in flight"):
                heard.traffic.refuse_duplicate(second_request, second)
            assert len(heard.traffic) == 2
        assert heard.traffic.views()[0]["request_id"] == first.request_id == "a"


def test_the_first_of_an_id_is_not_refused_and_may_be_followed() -> None:
    heard = Heard()
    for _ in range(2):
        asked = request("a")
        with heard.traffic.passage(asked) as passage:
            heard.traffic.refuse_duplicate(asked, passage)
            assert passage.request_id == "a"


def test_the_end_is_announced_once_with_what_became_of_it() -> None:
    heard = Heard()
    with heard.traffic.passage(request("a")) as passage:
        passage.key, passage.model, passage.worker = "ci", "llama", "llama-0"
        passage.status, passage.code = 502, "WORKER_CRASHED"
        passage.bytes_in, passage.bytes_out = 10, 20
        passage.first_byte = passage.began + 0.5
    (end,) = heard.ends

    assert (end.request_id, end.method, end.path) == ("a", "POST", "/v1/chat/completions")
    assert (end.status, end.code) == (502, "WORKER_CRASHED")
    assert (end.key, end.model, end.worker) == ("ci", "llama", "llama-0")
    assert (end.bytes_in, end.bytes_out) == (10, 20)
    assert end.first_byte_s == pytest.approx(0.5)
    assert end.seconds >= 0
    assert len(heard.traffic) == 0


def test_a_request_that_breaks_off_is_ended_too() -> None:
    """Nothing stays in flight for ever (R024)."""
    heard = Heard()
    with pytest.raises(RuntimeError), heard.traffic.passage(request("a")):
        raise RuntimeError

    assert [end.status for end in heard.ends] == [ABORTED]
    assert heard.traffic.views() == []


@given(st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=12))
def test_as_many_end_as_began_and_no_id_is_given_twice_at_once(ids: list[str]) -> None:
    heard = Heard()
    open_now = [heard.traffic.passage(request(request_id)) for request_id in ids]
    seen = [passage.__enter__().request_id for passage in open_now]
    for passage in open_now:
        passage.__exit__(None, None, None)

    assert len(set(seen)) == len(ids)
    assert [end.request_id for end in heard.ends] == seen
    assert len(heard.traffic) == 0


def test_the_view_shows_what_an_operator_needs_and_no_more() -> None:
    """(R076)"""
    with Heard().traffic.passage(request("a")) as passage:
        assert set(passage.view()) == {
            "request_id",
            "method",
            "path",
            "model",
            "worker",
            "key",
            "began",
            "seconds",
            "phase",
            "bytes_out",
        }


def test_the_phase_follows_the_request() -> None:
    with Heard().traffic.passage(request("a")) as passage:
        assert passage.view()["phase"] == "queued"
        passage.worker = "llama-0"
        assert passage.view()["phase"] == "waiting"
        passage.first_byte = passage.began
        assert passage.view()["phase"] == "answering"


def test_a_caller_sees_its_own_requests() -> None:
    heard = Heard()
    with heard.traffic.passage(request("a")) as one, heard.traffic.passage(request("b")) as two:
        one.key, two.key = "ci", "web"

        assert [view["request_id"] for view in heard.traffic.views("ci")] == ["a"]
        assert [view["request_id"] for view in heard.traffic.views()] == ["a", "b"]
        assert repr(heard.traffic) == "<Traffic 2 in flight>"


# ── Cancelling ──────────────────────────────────────────────────────────────────────────────────


def ended(heard: Heard, request_id: str, key: str | None, seconds_ago: float = 0) -> None:
    """A request for a model that was in flight, and ended so long ago."""
    with heard.traffic.passage(request(request_id)) as passage:
        passage.key, passage.clock = key, clock()
    at, owner = heard.traffic._ended[request_id]
    heard.traffic._ended[request_id] = at - seconds_ago, owner


def clock() -> Clock:
    return Clock(Deadline(LONG, time.monotonic()), Expired)


def cancelled(heard: Heard, request_id: str, key: str | None, *, may_all: bool = False) -> bool:
    try:
        heard.traffic.cancel(request_id, key, may_all=may_all)
    except NotFound:
        return False
    return True


@pytest.mark.parametrize(
    ("key", "may_all", "may"),
    [("ci", False, True), ("web", False, False), (None, False, False), ("web", True, True)],
    ids=["its own", "another's", "nobody's", "an admin's"],
)
def test_a_key_may_cancel_its_own_requests_and_an_admin_all(
    key: str | None, may_all: bool, may: bool
) -> None:
    """Whoever may not, cannot even find out that there is one."""
    heard = Heard()
    with heard.traffic.passage(request("a")) as passage:
        passage.key, passage.clock = "ci", clock()
        assert cancelled(heard, "a", key, may_all=may_all) == may
        assert isinstance(passage.cause, RequestCancelled) == may
        assert isinstance(passage.clock._cause, RequestCancelled) == may
    assert cancelled(heard, "a", key, may_all=may_all) == may


def test_without_keys_everybody_may_cancel_what_nobody_owns() -> None:
    heard = Heard()
    with heard.traffic.passage(request("a")) as passage:
        assert cancelled(heard, "a", None, may_all=True)
        assert passage.cause


def test_what_is_not_known_is_not_found() -> None:
    for may_all in (True, False):
        assert not cancelled(Heard(), "a", "ci", may_all=may_all)


@awaited
async def test_what_is_cancelled_ends_with_the_cause() -> None:
    heard = Heard()
    with heard.traffic.passage(request("a")) as passage:
        passage.clock = clock()
        asyncio.get_running_loop().call_soon(passage.cancel)
        with pytest.raises(RequestCancelled):
            async with passage.clock.running():
                await asyncio.Event().wait()


def test_before_it_has_a_clock_a_cancel_is_kept_for_it() -> None:
    """While its body is being received."""
    heard = Heard()
    with heard.traffic.passage(request("a")) as passage:
        assert passage.clock is None
        assert cancelled(heard, "a", None)
        assert isinstance(passage.cause, RequestCancelled)


@pytest.mark.parametrize(("seconds_ago", "is_known"), [(0, True), (590, True), (601, False)])
def test_one_that_ended_is_known_for_ten_minutes(seconds_ago: float, is_known: bool) -> None:
    heard = Heard()
    ended(heard, "a", "ci", seconds_ago)

    assert cancelled(heard, "a", "ci") == is_known
    assert cancelled(heard, "a", "web", may_all=True) == is_known
    assert not cancelled(heard, "a", "web")


def test_what_ended_too_long_ago_is_forgotten_when_another_one_ends() -> None:
    heard = Heard()
    ended(heard, "a", "ci", REMEMBERED_S + 2)
    ended(heard, "b", "ci", REMEMBERED_S + 1)
    ended(heard, "c", "ci", 1)
    ended(heard, "d", "ci")

    assert list(heard.traffic._ended) == ["c", "d"]


def test_of_too_many_the_oldest_are_forgotten() -> None:
    heard = Heard()
    ended(heard, "a", "ci")
    now = time.monotonic()
    for number in range(REMEMBERED - 1):
        heard.traffic._ended[str(number)] = now, None
    assert cancelled(heard, "a", "ci")
    ended(heard, "b", "ci")

    assert len(heard.traffic._ended) == REMEMBERED
    assert not cancelled(heard, "a", "ci")
    assert cancelled(heard, "b", "ci")


def test_an_id_that_is_used_again_is_known_from_its_last_end_on() -> None:
    heard = Heard()
    ended(heard, "a", "ci", REMEMBERED_S - 1)
    ended(heard, "b", "ci", REMEMBERED_S - 2)
    ended(heard, "a", "web")

    assert list(heard.traffic._ended) == ["b", "a"]
    assert cancelled(heard, "a", "web")
    assert not cancelled(heard, "a", "ci")


def test_operators_own_requests_are_not_remembered() -> None:
    """They have no model, and nothing to cancel."""
    heard = Heard()
    with heard.traffic.passage(request("a")):
        pass

    assert not cancelled(heard, "a", None, may_all=True)

"""The requests in flight: unique ids, and one announced end each, whatever happens."""

import re

import pytest
from aiohttp.test_utils import make_mocked_request
from aiohttp.web import Request
from hypothesis import given
from hypothesis import strategies as st

from hive.errors import Conflict
from hive.events import Announcer, Event, RequestEnded
from hive.gateway.traffic import ABORTED, Traffic


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

"""Facts are frozen, announced in order, and no listener can stop them."""

import inspect
import logging

import pytest

from hive import events
from hive.events import Announcer, DaemonMoved, Event, WorkerReady

KINDS = [
    kind
    for _, kind in inspect.getmembers(events, inspect.isclass)
    if issubclass(kind, Event) and kind is not Event
]
READY = WorkerReady("llama-0", "llama", 1.5)


def test_every_listener_hears_every_event_in_order() -> None:
    heard: list[tuple[str, Event]] = []
    announcer = Announcer()
    announcer.listen(lambda event: heard.append(("first", event)))
    announcer.listen(lambda event: heard.append(("second", event)))
    stopping = DaemonMoved("stopping")
    announcer.announce(READY)
    announcer.announce(stopping)

    assert heard == [
        ("first", READY),
        ("second", READY),
        ("first", stopping),
        ("second", stopping),
    ]


def test_a_broken_listener_stops_neither_the_others_nor_the_announcer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The error is logged with its traceback (R068, R075)."""

    def broken(_event: Event) -> None:
        raise RuntimeError("this listener is broken")

    heard: list[Event] = []
    announcer = Announcer()
    announcer.listen(broken)
    announcer.listen(heard.append)
    with caplog.at_level(logging.ERROR):
        announcer.announce(READY)

    assert heard == [READY]
    assert "a listener failed on WorkerReady" in caplog.text
    assert "this listener is broken" in caplog.text


def test_nobody_needs_to_listen() -> None:
    Announcer().announce(READY)

    assert repr(Announcer()) == "<Announcer 0 listeners>"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_fact_cannot_be_changed_afterwards(kind: type[Event]) -> None:
    fact = kind(**dict.fromkeys(kind.__struct_fields__, ""))

    with pytest.raises(AttributeError, match="immutable"):
        setattr(fact, kind.__struct_fields__[0], "something else")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_fact_carries_what_a_client_said(kind: type[Event]) -> None:
    """Prompts, keys and salts are in no event, so no listener can give them away (R076)."""
    private = {"body", "prompt", "messages", "api_key", "authorization", "cache_salt"}

    assert not set(kind.__struct_fields__) & private


def test_outside_a_request_there_is_no_request_id() -> None:
    assert events.request_id_var.get() is None


def test_what_is_only_counted_is_not_written() -> None:
    """Of windows the operations are lines; how many there are is a number."""
    assert events.WindowsCounted in events.COUNTED
    assert not {events.SessionMoved, events.WindowOperationEnded, events.ThawProved} & set(
        events.COUNTED
    )

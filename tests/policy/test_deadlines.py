"""Deadlines: each phase by its name, and what no order of events and no caller can extend."""

from dataclasses import astuple, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.policy.deadlines import Deadline, Due, Limits, Phase

# Those of contract.md, with a limit for streams.
LIMITS = Limits(
    request_s=30, queue_s=5, connect_s=2, inference_s=25, stall_s=20, stream_total_s=90, cleanup_s=5
)
seconds = st.integers(1, 400).map(lambda quarters: quarters / 4)  # so that sums are exact


@st.composite
def all_limits(draw: st.DrawFn) -> Limits:
    """Whatever a configuration may say: inner limits fit into outer ones (R049)."""
    inference_s, cleanup_s, spare_s = draw(seconds), draw(seconds), draw(seconds)
    request_s = inference_s + cleanup_s + draw(st.sampled_from([0.0, spare_s]))
    return Limits(
        request_s=request_s,
        queue_s=draw(st.one_of(st.just(request_s), seconds.filter(lambda s: s <= request_s))),
        connect_s=draw(seconds),
        inference_s=inference_s,
        stall_s=draw(seconds),
        stream_total_s=draw(st.one_of(st.just(0.0), seconds)),
        cleanup_s=cleanup_s,
    )


@st.composite
def deadlines(draw: st.DrawFn) -> Deadline:
    """A request of a configured deadline, at any point of its way."""
    arrived = draw(seconds)
    deadline = Deadline(draw(all_limits()), arrived, is_stream=draw(st.booleans()))
    reached = draw(st.integers(0, 2))
    if reached >= 1:
        deadline.slot_at = arrived + draw(seconds)
    if reached == 2:
        deadline.first_byte_at = draw(seconds) + (deadline.slot_at or 0)
        deadline.last_byte_at = deadline.first_byte_at + draw(st.sampled_from([0.0, 3.0, 300.0]))
    return deadline


# ── every phase by its name ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("deadline", "due"),
    [
        (Deadline(LIMITS, 100), Due(105, Phase.QUEUE, 5)),
        (Deadline(LIMITS.shortened(3), 100, is_shortened=True), Due(103, Phase.REQUEST, 3)),
        (Deadline(LIMITS, 100, slot_at=100), Due(125, Phase.INFERENCE, 25)),
        (Deadline(LIMITS, 100, is_stream=True, slot_at=100), Due(125, Phase.FIRST_TOKEN, 25)),
        (
            Deadline(LIMITS.shortened(10), 100, is_shortened=True, slot_at=104),
            Due(110, Phase.REQUEST, 10),
        ),
        (
            Deadline(LIMITS, 100, slot_at=101, first_byte_at=110, last_byte_at=110),
            Due(130, Phase.STALL, 20),
        ),
        (
            Deadline(LIMITS, 100, True, slot_at=101, first_byte_at=110, last_byte_at=150),
            Due(170, Phase.STALL, 20),
        ),
        (
            Deadline(LIMITS, 100, True, slot_at=101, first_byte_at=110, last_byte_at=190),
            Due(191, Phase.TOTAL, 90),
        ),
    ],
    ids=lambda value: value.phase if isinstance(value, Due) else "",
)
def test_the_phase_that_ends_first_is_named_with_its_limit(deadline: Deadline, due: Due) -> None:
    """(R046, R047, C13; contract, Deadlines)"""
    assert deadline.due == due


@given(all_limits(), seconds, seconds, st.booleans())
def test_inference_ends_in_time_for_the_cleanup(
    limits: Limits, arrived: float, queued_s: float, is_stream: bool
) -> None:
    """However long it waited for its slot (R047, R049, C15)."""
    deadline = Deadline(limits, arrived, is_stream=is_stream, slot_at=arrived + queued_s)

    assert deadline.due.at == min(
        arrived + queued_s + limits.inference_s, arrived + limits.request_s - limits.cleanup_s
    )
    assert deadline.due.limit_s == limits.inference_s
    assert deadline.due.phase is (Phase.FIRST_TOKEN if is_stream else Phase.INFERENCE)


def test_a_request_that_waited_long_has_less_left_for_its_inference() -> None:
    waited = [Deadline(LIMITS, 0, slot_at=slot_at).due.at for slot_at in (0, 1, 5)]

    assert waited == [25, 25, 25]
    short = replace(LIMITS, inference_s=10)
    assert [Deadline(short, 0, slot_at=slot_at).due.at for slot_at in (0, 5, 20)] == [10, 15, 25]


@given(all_limits(), seconds)
def test_who_has_no_slot_waits_no_longer_than_the_queue_allows(
    limits: Limits, arrived: float
) -> None:
    """The inner limit is named where both end together (R049)."""
    due = Deadline(limits, arrived).due

    assert due == Due(arrived + limits.queue_s, Phase.QUEUE, limits.queue_s)
    assert due.at <= arrived + limits.request_s


@given(all_limits(), seconds, seconds, seconds)
def test_once_an_answer_has_begun_only_silence_ends_it(
    limits: Limits, arrived: float, queued_s: float, later_s: float
) -> None:
    """What is no stream has no total limit, a stream only where one is set (C15)."""
    slot_at = arrived + queued_s
    last = slot_at + later_s
    stall = Due(last + limits.stall_s, Phase.STALL, limits.stall_s)
    endless = replace(limits, stream_total_s=0)

    assert Deadline(limits, arrived, False, False, slot_at, slot_at, last).due == stall
    assert Deadline(endless, arrived, True, False, slot_at, slot_at, last).due == stall


@given(all_limits(), seconds, st.lists(seconds, min_size=1, max_size=20))
def test_each_byte_puts_the_stall_off_but_never_the_total(
    limits: Limits, slot_at: float, gaps: list[float]
) -> None:
    deadline = Deadline(limits, 0, True, slot_at=slot_at, first_byte_at=slot_at)
    deadline.last_byte_at = slot_at
    ends = slot_at + limits.stream_total_s if limits.stream_total_s else float("inf")
    for gap_s in gaps:
        before = deadline.due.at
        deadline.last_byte_at += gap_s

        assert deadline.due.at >= before
        assert deadline.due.at == min(ends, deadline.last_byte_at + limits.stall_s)
        assert (deadline.due.phase is Phase.TOTAL) is (
            ends < deadline.last_byte_at + limits.stall_s
        )


# ── nobody extends it ───────────────────────────────────────────────────────────────────────────


@given(all_limits(), st.one_of(st.none(), st.floats(-10, 1000)))
def test_a_caller_may_shorten_its_limit_and_never_extend_it(
    limits: Limits, own_s: float | None
) -> None:
    """Nor does it touch any other limit (DEAD-006)."""
    shortened = limits.shortened(own_s)

    assert shortened.request_s == min(
        limits.request_s, limits.request_s if own_s is None else own_s
    )
    assert astuple(shortened)[1:] == astuple(limits)[1:]
    assert fields(Limits)[0].name == "request_s"


@given(all_limits(), seconds, seconds)
def test_who_shortens_twice_has_the_shorter_one(
    limits: Limits, first_s: float, second_s: float
) -> None:
    both = limits.shortened(first_s).shortened(second_s)

    assert both == limits.shortened(second_s).shortened(first_s)
    assert both == limits.shortened(min(first_s, second_s))


@given(all_limits(), seconds, seconds, st.booleans(), seconds)
def test_a_shortened_request_never_ends_later_than_an_unshortened_one(
    limits: Limits, arrived: float, queued_s: float, is_stream: bool, own_s: float
) -> None:
    """Its limit is for all up to the first byte and it is named by it (DEAD, C13)."""
    own_s = min(own_s, limits.request_s - limits.cleanup_s)
    as_asked = limits.shortened(own_s)
    for slot_at in (None, arrived + queued_s):
        usual = Deadline(limits, arrived, is_stream, slot_at=slot_at).due
        due = Deadline(as_asked, arrived, is_stream, is_shortened=True, slot_at=slot_at).due

        assert due.at == min(usual.at, arrived + own_s)
        if due.at < usual.at:
            assert due == Due(arrived + own_s, Phase.REQUEST, own_s)


def test_a_deadline_that_has_passed_at_arrival_is_over_at_once() -> None:
    """(DEAD)"""
    deadline = Deadline(LIMITS.shortened(-1), 100, is_shortened=True)

    assert deadline.due == Due(99, Phase.REQUEST, -1)
    assert deadline.left_s(100) == -1


@given(deadlines())
def test_until_its_first_byte_nothing_outlasts_the_request(deadline: Deadline) -> None:
    """Each wait is inside its parent's (R046, R049)."""
    if deadline.first_byte_at is None:
        assert deadline.due.at <= deadline.request_at
        assert deadline.request_at == deadline.arrived + deadline.limits.request_s


@given(deadlines(), st.sampled_from([field.name for field in fields(Limits)]), seconds)
def test_a_longer_limit_never_ends_a_request_earlier_but_for_the_cleanups(
    deadline: Deadline, name: str, more_s: float
) -> None:
    limits = deadline.limits
    longer = replace(limits, **{name: getattr(limits, name) + more_s})
    if name == "stream_total_s" and not limits.stream_total_s:
        return  # 0 is the longest of all
    later = replace(deadline, limits=longer).due.at

    assert later <= deadline.due.at if name == "cleanup_s" else later >= deadline.due.at


@given(deadlines(), seconds)
def test_whatever_comes_later_ends_no_earlier(deadline: Deadline, more_s: float) -> None:
    """A slot, a byte, the arrival itself."""
    later = replace(
        deadline,
        slot_at=None if deadline.slot_at is None else deadline.slot_at + more_s,
        last_byte_at=deadline.last_byte_at + more_s,
    )

    assert later.due.at >= deadline.due.at
    assert replace(later, arrived=deadline.arrived + more_s).due.at == deadline.due.at + more_s


@given(deadlines(), seconds)
def test_what_is_left_shrinks_as_time_passes(deadline: Deadline, passed_s: float) -> None:
    """One absolute deadline: no event moves it (DEAD-001)."""
    arrived = deadline.arrived

    assert deadline.left_s(arrived) == deadline.limits.request_s
    assert deadline.left_s(arrived + passed_s) == deadline.limits.request_s - passed_s

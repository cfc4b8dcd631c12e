"""Deadlines: each phase by its name, and what no order of events and no caller can extend."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.policy.deadlines import Deadline, Due, Limits, Phase

# Those of contract.md, with a limit for streams.
LIMITS = Limits(
    request_s=30, queue_s=5, connect_s=2, inference_s=25, stall_s=20, stream_total_s=90, cleanup_s=5
)
seconds = st.integers(1, 400).map(lambda quarters: quarters / 4)  # so that sums are exact
# What a caller may ask for: nothing, what has passed already, hours.
wishes = st.one_of(st.none(), st.integers(-40, 1200).map(lambda quarters: quarters / 4))


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
    deadline = Deadline(draw(all_limits()), arrived, draw(st.booleans()), draw(wishes))
    deadline.queued_at = draw(st.one_of(st.just(0.0), seconds.map(lambda s: arrived + s)))
    reached = draw(st.integers(0, 2))
    if reached >= 1:
        deadline.slot_at = arrived + draw(seconds)
    if reached == 2:
        deadline.first_byte_at = draw(seconds) + (deadline.slot_at or 0)
        deadline.last_byte_at = deadline.first_byte_at + draw(st.sampled_from([0.0, 3.0, 300.0]))
    return deadline


def own_due(arrived: float, own_s: float) -> Due:
    """By the caller's own limit; what has passed already is over at its arrival."""
    own_s = max(0.0, own_s)
    return Due(arrived + own_s, Phase.REQUEST, own_s)


# ── every phase by its name ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("deadline", "due"),
    [
        (Deadline(LIMITS, 100), Due(105, Phase.QUEUE, 5)),
        (Deadline(LIMITS, 100, queued_at=110), Due(115, Phase.QUEUE, 5)),
        (Deadline(LIMITS, 100, queued_at=126), Due(125, Phase.REQUEST, 30)),
        (Deadline(LIMITS, 100, own_s=3), Due(103, Phase.REQUEST, 3)),
        (Deadline(LIMITS, 100, slot_at=100), Due(125, Phase.INFERENCE, 25)),
        (Deadline(LIMITS, 100, is_stream=True, slot_at=100), Due(125, Phase.FIRST_TOKEN, 25)),
        (Deadline(LIMITS, 100, own_s=10, slot_at=104), Due(110, Phase.REQUEST, 10)),
        (Deadline(LIMITS, 100, own_s=28, slot_at=104), Due(125, Phase.INFERENCE, 25)),
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
    useful_by = arrived + limits.request_s - limits.cleanup_s  # later, nobody could answer it

    assert due.at == min(arrived + limits.queue_s, useful_by)
    if arrived + limits.queue_s <= useful_by:
        assert due == Due(arrived + limits.queue_s, Phase.QUEUE, limits.queue_s)
    else:
        assert due == Due(useful_by, Phase.REQUEST, limits.request_s)


@given(all_limits(), seconds, seconds, seconds)
def test_once_an_answer_has_begun_only_silence_ends_it(
    limits: Limits, arrived: float, queued_s: float, later_s: float
) -> None:
    """What is no stream has no total limit, a stream only where one is set (C15)."""
    slot_at = arrived + queued_s
    last = slot_at + later_s
    stall = Due(last + limits.stall_s, Phase.STALL, limits.stall_s)
    endless = replace(limits, stream_total_s=0)

    whole = Deadline(limits, arrived, False, 1.0, 0.0, slot_at, slot_at, last)
    stream = Deadline(endless, arrived, True, 1.0, 0.0, slot_at, slot_at, last)
    assert whole.due == stream.due == stall


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


@given(deadlines(), wishes)
def test_a_caller_may_shorten_its_deadline_and_never_extend_it(
    deadline: Deadline, own_s: float | None
) -> None:
    """Wherever it stands; only the request as a whole is named by the caller's own limit (DEAD)."""
    usual = replace(deadline, own_s=None)
    asked = replace(deadline, own_s=own_s)

    assert asked.answer_by <= usual.answer_by
    assert asked.due.at <= usual.due.at
    if asked.due != usual.due:
        assert own_s is not None
        due = own_due(deadline.arrived, own_s)
        if asked.slot_at is None:  # a slot must come while an answer is possible
            due = due._replace(at=min(due.at, usual.answer_by))
        assert asked.due == due


@given(deadlines())
def test_the_request_as_a_whole_has_the_shorter_limit_of_both(deadline: Deadline) -> None:
    """From its arrival, wherever it stands."""
    usual_s, own_s = deadline.limits.request_s, deadline.own_s
    limit_s = usual_s if own_s is None else max(0.0, min(usual_s, own_s))

    assert deadline.request == Due(deadline.arrived + limit_s, Phase.REQUEST, limit_s)


@given(deadlines(), st.sampled_from([0.0, 0.25, 5.0, 1e6]))
def test_who_asks_for_as_much_as_there_is_or_for_more_changes_nothing(
    deadline: Deadline, more_s: float
) -> None:
    """What hive keeps back for its cleanup is not the caller's to ask for (DEAD)."""
    limits = deadline.limits
    usual = replace(deadline, own_s=None)

    assert replace(deadline, own_s=limits.request_s + more_s).due == usual.due
    if deadline.slot_at is not None:
        spare = limits.request_s - limits.cleanup_s + more_s
        assert replace(deadline, own_s=spare).due == usual.due


@given(deadlines(), seconds, seconds)
def test_of_two_wishes_the_shorter_ends_it_no_later(
    deadline: Deadline, first_s: float, second_s: float
) -> None:
    shorter = replace(deadline, own_s=min(first_s, second_s))
    longer = replace(deadline, own_s=max(first_s, second_s))

    assert shorter.due.at <= longer.due.at
    assert shorter.answer_by <= longer.answer_by


@given(all_limits(), seconds, seconds, st.booleans(), seconds)
def test_a_shortened_request_never_ends_later_than_an_unshortened_one(
    limits: Limits, arrived: float, queued_s: float, is_stream: bool, own_s: float
) -> None:
    """Its limit is for all up to the first byte and it is named by it (DEAD, C13)."""
    own_s = min(own_s, limits.request_s)
    for slot_at in (None, arrived + queued_s):
        usual = Deadline(limits, arrived, is_stream, slot_at=slot_at).due
        due = Deadline(limits, arrived, is_stream, own_s, slot_at=slot_at).due

        assert due.at == min(usual.at, arrived + own_s)
        if due.at < usual.at:
            assert due == Due(arrived + own_s, Phase.REQUEST, own_s)


def test_a_deadline_that_has_passed_at_arrival_is_over_at_once() -> None:
    """(DEAD)"""
    deadline = Deadline(LIMITS, 100, own_s=-1)

    assert deadline.due == deadline.request == Due(100, Phase.REQUEST, 0)
    assert replace(deadline, slot_at=100.0).due == deadline.due
    assert deadline.answer_by <= 100


@given(deadlines())
def test_until_its_first_byte_nothing_outlasts_the_request(deadline: Deadline) -> None:
    """Each wait is inside its parent's (R046, R049)."""
    limits, arrived = deadline.limits, deadline.arrived
    own = float("inf") if deadline.own_s is None else own_due(arrived, deadline.own_s).at
    if deadline.slot_at is None:
        queued_at = max(arrived, deadline.queued_at)
        useful_by = arrived + limits.request_s - limits.cleanup_s
        assert deadline.due.at == min(queued_at + limits.queue_s, useful_by, own)
    elif deadline.first_byte_at is None:
        assert deadline.due.at == min(
            deadline.slot_at + limits.inference_s,
            arrived + limits.request_s - limits.cleanup_s,
            own,
        )


@given(deadlines())
def test_who_has_a_slot_has_its_answer_in_time_or_none(deadline: Deadline) -> None:
    """What is tried again must still fit in there (C3)."""
    if deadline.slot_at is not None and deadline.first_byte_at is None:
        inference = deadline.slot_at + deadline.limits.inference_s
        assert deadline.due.at == min(inference, max(deadline.arrived, deadline.answer_by))


@pytest.mark.parametrize(
    ("own_s", "answer_by"), [(None, 125), (0, 100), (10, 110), (25, 125), (28, 125), (90, 125)]
)
def test_the_answer_must_begin_while_there_is_time_for_the_cleanup(
    own_s: float | None, answer_by: float
) -> None:
    """hive keeps that back for itself; a caller's own limit holds to the last second (DEAD)."""
    assert Deadline(LIMITS, 100, own_s=own_s).answer_by == answer_by


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
        queued_at=deadline.queued_at + more_s,
        slot_at=None if deadline.slot_at is None else deadline.slot_at + more_s,
        last_byte_at=deadline.last_byte_at + more_s,
    )

    assert later.due.at >= deadline.due.at
    assert replace(later, arrived=deadline.arrived + more_s).due.at == deadline.due.at + more_s


@given(deadlines(), seconds)
def test_no_event_moves_the_time_by_which_it_must_be_answered(
    deadline: Deadline, later_s: float
) -> None:
    """One absolute deadline (DEAD-001)."""
    at = deadline.arrived + later_s
    for moved in (
        replace(deadline, queued_at=at, slot_at=None),
        replace(deadline, slot_at=at),
        replace(deadline, slot_at=at, first_byte_at=at, last_byte_at=at),
    ):
        assert moved.answer_by == deadline.answer_by

"""One key's quota: what it lets through, what it refuses, and that its hint is true."""

import math

from hypothesis import given
from hypothesis import strategies as st

from hive.policy.quota import BUSY_HINT_S, WINDOW_S, Quota, Refusal

limits = st.integers(0, 5)
seconds = st.integers(0, 45)  # whole, so that sums are exact
BUSY = Refusal("max_concurrent", BUSY_HINT_S)
# What one key does: pauses, begins a request, ends one.
histories = st.lists(st.tuples(seconds, st.booleans()), max_size=60)


@given(limits, limits, histories)
def test_no_more_than_allowed_are_served_at_once_or_in_any_minute_and_no_fewer(
    max_concurrent: int, per_minute: int, history: list[tuple[int, bool]]
) -> None:
    """Counted again from nothing at each step; 0 is no limit (R037, C12)."""
    quota = Quota(max_concurrent, per_minute)
    now = 0
    begun: list[int] = []
    running = 0
    for pause_s, begins in history:
        now += pause_s
        if not begins:
            if running:
                quota.give_back()
                running -= 1
            continue
        recent = [at for at in begun if at > now - WINDOW_S]
        is_too_often = 0 < per_minute <= len(recent)
        is_too_many = 0 < max_concurrent <= running
        refusal = quota.take(now)
        if is_too_often:
            wait_s = recent[-per_minute] + WINDOW_S - now
            assert wait_s > 0
            assert refusal == ("requests_per_minute", wait_s)
        elif is_too_many:
            assert refusal == BUSY
        else:
            assert refusal is None
            begun.append(now)
            running += 1
        assert quota.in_flight == running


@given(st.integers(1, 5), st.floats(60, 1e9), st.lists(st.floats(0, 45), max_size=30))
def test_who_waits_as_long_as_it_was_told_is_served(
    per_minute: int, now: float, pauses: list[float]
) -> None:
    """Whatever the clock shows, and nobody who comes a moment too early (R037)."""
    quota = Quota(0, per_minute)
    for pause_s in pauses:
        now += pause_s
        refusal = quota.take(now)
        if refusal is not None:
            assert refusal.wait_s > 0
            end = now + refusal.wait_s
            assert quota.take(max(now, end - 0.5)) is not None
            assert quota.take(math.nextafter(end, 0)) is not None
            assert quota.take(end) is None
            now = end


def test_the_hint_is_true_though_the_difference_of_the_times_is_a_bit_less_than_a_minute() -> None:
    """Sums of floats round: 60.1 + 60 - 60.1 is 59.99999999999999."""
    quota = Quota(0, 1)
    quota.take(60.1)
    refusal = quota.take(60.2)

    assert refusal is not None
    end = 60.2 + refusal.wait_s
    assert end - 60.1 < WINDOW_S
    assert quota.take(end) is None


def test_a_refusal_costs_nothing() -> None:
    """Whoever asks too often is not shut out by asking (R037)."""
    quota = Quota(0, 2)
    quota.take(0.0)
    quota.take(30.0)

    assert [quota.take(at) for at in (40.0, 50.0, 59.0)] == [
        Refusal("requests_per_minute", wait_s) for wait_s in (20.0, 10.0, 1.0)
    ]
    assert quota.take(60.0) is None
    assert quota.take(60.0) == Refusal("requests_per_minute", 30.0)
    assert quota.in_flight == 3


def test_a_request_refused_for_its_neighbours_does_not_count_in_the_minute() -> None:
    quota = Quota(1, 2)
    quota.take(0.0)

    assert quota.take(1.0) == BUSY
    quota.give_back()
    assert quota.take(2.0) is None


def test_too_many_in_a_minute_are_not_too_many_at_once() -> None:
    """So that the caller is told what is the matter (C12)."""
    quota = Quota(2, 1)
    quota.take(0.0)

    assert quota.take(1.0) == Refusal("requests_per_minute", 59.0)


def test_who_has_reached_both_limits_is_told_of_the_one_that_lasts_longer() -> None:
    """It names the limit of its hint, not the other one (C12)."""
    quota = Quota(1, 1)
    quota.take(0.0)

    assert quota.take(1.0) == Refusal("requests_per_minute", 59.0)
    assert quota.take(60.0) == BUSY


def test_without_limits_nothing_is_remembered() -> None:
    """A key that is served a million times a day costs no memory."""
    quota = Quota(0, 0)

    assert all(quota.take(0.0) is None for _ in range(1000))
    assert quota == Quota(0, 0, in_flight=1000)

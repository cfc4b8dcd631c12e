"""One key's quota: what it lets through, what it refuses, and that its hint is true."""

from hypothesis import given
from hypothesis import strategies as st

from hive.policy.quota import BUSY_HINT_S, WINDOW_S, Quota

limits = st.integers(0, 5)
seconds = st.integers(0, 45)  # whole, so that sums are exact
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
        wait_s = quota.take(now)
        if is_too_often:
            assert wait_s == recent[-per_minute] + WINDOW_S - now
            assert wait_s > 0
            assert is_too_many or not quota.is_full
        elif is_too_many:
            assert wait_s == BUSY_HINT_S
            assert quota.is_full
        else:
            assert wait_s is None
            begun.append(now)
            running += 1
        assert quota.in_flight == running


@given(st.integers(1, 5), st.lists(seconds, max_size=30))
def test_who_waits_as_long_as_it_was_told_is_served(per_minute: int, pauses: list[int]) -> None:
    """And nobody who comes a moment too early (R037)."""
    quota = Quota(0, per_minute)
    now = 0.0
    for pause_s in pauses:
        now += pause_s
        wait_s = quota.take(now)
        if wait_s is not None:
            assert quota.take(now + wait_s - 0.5) is not None
            now += wait_s
            assert quota.take(now) is None


def test_a_refusal_costs_nothing() -> None:
    """Whoever asks too often is not shut out by asking (R037)."""
    quota = Quota(0, 2)
    quota.take(0.0)
    quota.take(30.0)

    assert [quota.take(at) for at in (40.0, 50.0, 59.0)] == [20.0, 10.0, 1.0]
    assert quota.take(60.0) is None
    assert quota.take(60.0) == 30.0
    assert quota.in_flight == 3


def test_a_request_refused_for_its_neighbours_does_not_count_in_the_minute() -> None:
    quota = Quota(1, 2)
    quota.take(0.0)

    assert quota.take(1.0) == BUSY_HINT_S
    assert quota.is_full
    quota.give_back()
    assert quota.take(2.0) is None


def test_too_many_in_a_minute_are_not_too_many_at_once() -> None:
    """So that the caller is told what is the matter (C12)."""
    quota = Quota(2, 1)
    quota.take(0.0)

    assert quota.take(1.0) == 59.0
    assert not quota.is_full


def test_without_limits_nothing_is_remembered() -> None:
    """A key that is served a million times a day costs no memory."""
    quota = Quota(0, 0)

    assert all(quota.take(0.0) is None for _ in range(1000))
    assert quota == Quota(0, 0, in_flight=1000)

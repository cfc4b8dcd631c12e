"""When a worker starts again by itself: laws that hold for every policy and every history."""

from hypothesis import given
from hypothesis import strategies as st

from hive.policy.restarts import JITTER, RestartPolicy

seconds = st.floats(0.1, 1000)
chances = st.floats(0, 1)
policies = st.builds(
    RestartPolicy,
    starts=st.integers(0, 20),
    window_s=seconds,
    backoff_s=st.floats(0, 100),
    backoff_max_s=seconds,
)


@given(policies, st.lists(st.tuples(st.floats(0, 500), chances), max_size=60))
def test_there_are_never_more_starts_in_any_window_than_allowed(
    policy: RestartPolicy, crashes: list[tuple[float, float]]
) -> None:
    now = 0.0
    history: tuple[float, ...] = ()
    starts: list[float] = []
    for after_s, chance in crashes:
        now += after_s
        pause_s = policy.pause_s(history, now, chance)
        if pause_s is None:
            break
        history = (*policy.recent(history, now), now)
        starts.append(now)
        now += pause_s

    for first in starts:
        within = [at for at in starts if first <= at < first + policy.window_s]
        assert len(within) <= policy.starts


@given(policies, st.integers(0, 30), chances)
def test_a_pause_is_never_longer_than_the_longest_and_a_tenth(
    policy: RestartPolicy, count: int, chance: float
) -> None:
    pause_s = policy.pause_s((0.0,) * count, 0.0, chance)

    if pause_s is not None:
        assert 0 <= pause_s <= policy.backoff_max_s * (1 + JITTER) * (1 + 1e-9)
        assert pause_s >= min(policy.backoff_s, policy.backoff_max_s)


@given(policies, st.integers(0, 20), chances)
def test_a_pause_never_shrinks_while_the_crashes_go_on(
    policy: RestartPolicy, count: int, chance: float
) -> None:
    earlier = policy.pause_s((0.0,) * count, 0.0, chance)
    later = policy.pause_s((0.0,) * (count + 1), 0.0, chance)

    if earlier is not None and later is not None:
        assert later >= earlier


@given(policies, st.integers(0, 20))
def test_chance_adds_at_most_a_tenth_and_takes_nothing_away(
    policy: RestartPolicy, count: int
) -> None:
    least = policy.pause_s((0.0,) * count, 0.0, 0.0)
    most = policy.pause_s((0.0,) * count, 0.0, 1.0)

    if least is not None and most is not None:
        assert least <= most <= least * (1 + JITTER) * (1 + 1e-9)


def test_the_pause_doubles_from_the_first_to_the_longest() -> None:
    policy = RestartPolicy(starts=9, window_s=300, backoff_s=1, backoff_max_s=10)

    assert [policy.pause_s((0.0,) * n, 0.0, 0.0) for n in range(6)] == [1, 2, 4, 8, 10, 10]


def test_the_last_allowed_start_takes_place_and_the_next_does_not() -> None:
    policy = RestartPolicy(starts=5, window_s=300, backoff_s=1, backoff_max_s=60)

    assert policy.pause_s((0.0,) * 4, 1.0, 0.0) == 16
    assert policy.pause_s((0.0,) * 5, 1.0, 0.0) is None


@given(policies, st.integers(0, 30))
def test_after_a_quiet_window_it_begins_anew(policy: RestartPolicy, count: int) -> None:
    """An engine that ran well for the whole window has nothing to make up for."""
    now = policy.window_s

    assert policy.recent((0.0,) * count, now) == ()
    assert policy.pause_s((0.0,) * count, now, 0.0) == policy.pause_s((), now, 0.0)


def test_without_allowed_starts_nothing_is_ever_restarted() -> None:
    policy = RestartPolicy(starts=0, window_s=300, backoff_s=1, backoff_max_s=60)

    assert policy.pause_s((), 0.0, 0.0) is None

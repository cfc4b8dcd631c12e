"""The table of retries: how many calls, how far apart, and how much chance may add."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.policy.retries import RETRIES, RetryPolicy

NETWORK = RETRIES["network"]
rows = st.sampled_from(sorted(RETRIES)).map(RETRIES.__getitem__)
chances = st.floats(0, 1)
delays = st.lists(st.floats(0, 1000), min_size=1, max_size=8).map(tuple)
policies = st.builds(
    RetryPolicy,
    calls=st.integers(1, 9),
    delays=delays,
    jitter_s=st.floats(0, 10),
)


def calls_made(policy: RetryPolicy) -> int:
    """How often something that always fails is called."""
    calls = 1
    while policy.allows(calls):
        calls += 1
    return calls


def test_the_network_is_tried_five_times_with_doubling_delays() -> None:
    """Nobody waits the last one: an exhausted retry names it (R001, R002, R004, C1)."""
    assert calls_made(NETWORK) == 5
    assert [NETWORK.delay_s(calls, 0.0) for calls in range(1, 6)] == [1, 2, 4, 8, 16]


def test_the_command_line_calls_three_times_within_a_second() -> None:
    """One caller has nobody to spread its calls from: chance adds nothing (EC1)."""
    connect = RETRIES["connect"]

    assert calls_made(connect) == 3
    assert [connect.delay_s(calls, 1.0) for calls in (1, 2)] == [0.2, 0.4]


def test_a_block_that_a_freeze_needs_is_tried_eight_times() -> None:
    """1, 2, 4, 8 s and then 10 s each (R089, R090)."""
    block = RETRIES["block_write"]

    assert calls_made(block) == 8
    assert [block.delay_s(calls, 1.0) for calls in range(1, 8)] == [1, 2, 4, 8, 10, 10, 10]


def test_other_files_are_tried_three_times() -> None:
    """(R101)"""
    storage = RETRIES["storage"]

    assert calls_made(storage) == 3
    assert [storage.delay_s(calls, 1.0) for calls in (1, 2)] == [1, 2]


@given(chances)
def test_a_locked_database_is_asked_four_times(chance: float) -> None:
    """A tenth of a second apart, and up to a quarter more (R161, C1, C4)."""
    lock = RETRIES["db_lock"]

    assert calls_made(lock) == 4
    for calls in range(1, 5):
        assert lock.delay_s(calls, chance) == pytest.approx(0.1 * (1 + chance / 4))


@given(st.integers(1, 5), chances)
def test_up_to_a_second_is_added_to_each_delay_of_the_network(calls: int, chance: float) -> None:
    """(R003, C4)"""
    added_s = NETWORK.delay_s(calls, chance) - NETWORK.delay_s(calls, 0.0)

    assert added_s == pytest.approx(chance)
    assert NETWORK.delay_s(calls, 1.0) == NETWORK.delay_s(calls, 0.0) + 1.0


@given(policies)
def test_the_first_call_counts(policy: RetryPolicy) -> None:
    """(C1)"""
    assert calls_made(policy) == policy.calls
    assert not policy.allows(policy.calls + 1)


@given(policies, st.integers(1, 20))
def test_each_delay_is_the_one_in_the_row_and_the_last_one_repeats(
    policy: RetryPolicy, calls: int
) -> None:
    endless = [*policy.delays, *[policy.delays[-1]] * 20]

    assert policy.delay_s(calls, 0.0) == endless[calls - 1]


@given(policies, st.integers(1, 20), chances)
def test_chance_adds_what_the_row_allows_and_takes_nothing_away(
    policy: RetryPolicy, calls: int, chance: float
) -> None:
    """Seconds, or a share of the delay (C4)."""
    least, most = policy.delay_s(calls, 0.0), policy.delay_s(calls, 1.0)

    assert least <= policy.delay_s(calls, chance) <= most * (1 + 1e-9)
    assert most == pytest.approx(least + policy.jitter_s)


@given(rows)
def test_every_row_ends_and_its_delays_never_shrink(policy: RetryPolicy) -> None:
    """(C1, C2)"""
    assert 1 < calls_made(policy) <= 8
    assert sorted(policy.delays) == list(policy.delays)
    assert policy.delays[0] > 0
    assert len(policy.delays) >= policy.calls - 1

"""The worker's table of states, checked as a whole: closed, and with a way to rest from anywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.policy.lifecycle import ALIVE, AT_REST, NEXT, ON_THE_WAY, News, State, step

ENTRIES = [(old, news, new) for old, row in NEXT.items() for news, new in row.items()]


def test_every_state_has_a_row_and_every_row_leads_to_a_state() -> None:
    assert set(NEXT) == set(State)
    assert {new for _, _, new in ENTRIES} <= set(State)


def test_every_state_can_be_reached_and_every_news_moves_something() -> None:
    reached, pending = {State.STOPPED}, [State.STOPPED]
    while pending:
        below = set(NEXT[pending.pop()].values()) - reached
        reached |= below
        pending += below

    assert reached == set(State)
    assert {news for _, news, _ in ENTRIES} == set(News)


@given(st.sampled_from(State), st.sampled_from(News))
def test_news_without_an_entry_changes_nothing(state: State, news: News) -> None:
    assert step(state, news) is NEXT[state].get(news, state)


@given(st.lists(st.sampled_from(News), max_size=30))
def test_whatever_happened_a_worker_can_be_brought_to_rest(history: list[News]) -> None:
    """A stop, a second stop without patience and the tree's end suffice."""
    state = State.STOPPED
    for news in [*history, News.STOP_ASKED, News.HASTE_ASKED, News.GONE]:
        state = step(state, news)

    assert state is State.STOPPED


def test_a_worker_is_ready_only_after_its_engine_answered() -> None:
    """Neither a process nor its health check is an answer."""
    assert [(old, news) for old, news, new in ENTRIES if new is State.READY] == [
        (State.LOADING, News.ANSWERED)
    ]


def test_only_a_proved_end_of_the_tree_leads_from_life_to_rest() -> None:
    """No state with a process becomes one without unless the tree was ended."""
    ways_out = {
        (old, news)
        for old, news, new in ENTRIES
        if old in ALIVE and new not in ALIVE - {State.LOST}
    }

    assert ways_out == {
        (State.STOPPING, News.GONE),
        (State.STOPPING, News.RESTART_DUE),
        (State.STOPPING, News.GAVE_UP),
        (State.STOPPING, News.QUARANTINE),
        (State.STOPPING, News.SURVIVED),
        (State.LOST, News.GONE),
    }


@pytest.mark.parametrize("state", sorted(ALIVE - {State.STOPPING, State.LOST}))
def test_the_end_of_the_engine_is_never_overlooked(state: State) -> None:
    assert step(state, News.EXITED) is State.STOPPING


@pytest.mark.parametrize("state", State)
def test_only_an_engine_that_serves_can_hang_and_it_is_ended_without_draining(
    state: State,
) -> None:
    """(R051)"""
    serves = state in (State.READY, State.DRAINING)

    assert step(state, News.HUNG) is (State.STOPPING if serves else state)


def test_a_running_worker_is_drained_before_it_is_stopped_unless_there_is_haste() -> None:
    assert step(State.READY, News.STOP_ASKED) is State.DRAINING
    assert step(State.READY, News.HASTE_ASKED) is State.STOPPING
    assert step(State.DRAINING, News.HASTE_ASKED) is State.STOPPING
    assert step(State.DRAINING, News.DRAINED) is State.STOPPING


def test_a_worker_at_rest_stays_there_until_an_operator_or_the_kernel_moves_it() -> None:
    asked = {News.START_ASKED, News.STOP_ASKED}

    assert set(NEXT[State.STOPPED]) == {News.START_ASKED}
    assert set(NEXT[State.FAILED]) == asked
    assert set(NEXT[State.QUARANTINED]) == {News.RELEASED, News.STOP_ASKED}
    assert set(NEXT[State.LOST]) == {News.GONE}


def test_a_worker_on_its_way_becomes_ready_without_an_operator() -> None:
    for state in ON_THE_WAY:
        assert step(step(state, News.SPAWNED), News.ANSWERED) is State.READY


def test_rest_and_life_are_different_states() -> None:
    assert {State.LOST} == AT_REST & ALIVE
    assert AT_REST.isdisjoint(ON_THE_WAY)
    assert set(State) == AT_REST | ALIVE | ON_THE_WAY


@pytest.mark.parametrize("state", sorted((ALIVE | ON_THE_WAY) - {State.STOPPING, State.LOST}))
def test_a_device_that_fails_ends_whatever_runs_on_it_without_draining(state: State) -> None:
    assert step(state, News.DEVICE_FAILED) is State.STOPPING


def test_only_a_release_leads_out_of_quarantine_to_life() -> None:
    """A start does not: whoever asks for it has not said that the device is repaired (R013)."""
    assert step(State.QUARANTINED, News.START_ASKED) is State.QUARANTINED
    assert step(State.QUARANTINED, News.RELEASED) is State.STARTING

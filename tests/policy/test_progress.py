"""What counts as progress, and when an abort or the work itself is lost."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.policy.progress import Progress, Signs, abort_is_lost, work_is_lost

STILL = Signs(counters=(7.0, 0.5), cpu_s=3.0, relayed=100)
seconds = st.integers(1, 400).map(lambda quarters: quarters / 4)


def after(*seen: Signs, start: float = 0.0) -> Progress:
    """What is known after the signs, which came one a second."""
    progress = Progress(start)
    for number, signs in enumerate(seen, 1):
        progress.see(signs, start + number)
    return progress


@pytest.mark.parametrize(
    "signs",
    [
        replace(STILL, counters=(8.0, 0.5)),
        replace(STILL, counters=(7.0, 0.6)),
        replace(STILL, counters=(7.0, 0.4)),
        replace(STILL, cpu_s=3.01),
        replace(STILL, relayed=101),
    ],
    ids=["tokens", "kv usage grows", "kv usage falls", "cpu", "bytes"],
)
def test_anything_that_moves_is_progress(signs: Signs) -> None:
    """A chunked prefill publishes no token; its KV usage moves (design, Progress)."""
    assert after(STILL, STILL, signs).at == 3
    assert after(STILL, STILL, signs, signs).still_s(10) == 7


@pytest.mark.parametrize(
    "signs",
    [STILL, replace(STILL, counters=None), replace(STILL, cpu_s=1.0)],
    ids=["nothing", "nothing published", "a process fewer"],
)
def test_what_does_not_move_is_none(signs: Signs) -> None:
    """CPU seconds that shrink are those of a process that has ended."""
    assert after(STILL, signs).at == 0


def test_the_first_look_proves_nothing() -> None:
    """The counters had their values before."""
    assert after(STILL, start=5.0).at == 5


def test_a_stopped_process_makes_none_whatever_others_of_its_tree_do() -> None:
    """They burn CPU while they wait for it (design, Progress)."""
    busy = [
        Signs((7.0 + n, 0.5), cpu_s=3.0 + n, relayed=100 + n, is_stopped=True) for n in range(9)
    ]

    assert after(STILL, *busy).at == 0


def test_what_happened_while_it_was_stopped_is_not_made_up_for() -> None:
    stopped = replace(STILL, cpu_s=9.0, is_stopped=True)

    assert after(STILL, stopped, replace(stopped, is_stopped=False)).at == 0
    assert after(STILL, stopped, replace(STILL, cpu_s=9.5)).at == 3


@pytest.mark.parametrize("looks", [1, 2, 9])
def test_a_look_that_published_nothing_is_left_out_of_the_comparison(looks: int) -> None:
    """Neither its begin nor its end is a change; what moved meanwhile is one."""
    blind = [replace(STILL, counters=None)] * looks

    assert after(STILL, *blind, STILL, STILL).at == 0
    assert after(STILL, *blind, replace(STILL, counters=(8.0, 0.5))).at == looks + 2


def test_the_first_counters_prove_nothing_whatever_was_seen_before() -> None:
    blind = replace(STILL, counters=None)

    assert after(blind, blind, STILL).at == 0
    assert after(blind, STILL, replace(STILL, counters=(8.0, 0.5))).at == 3


def test_without_counters_the_rest_is_still_compared() -> None:
    blind = replace(STILL, counters=None)

    assert after(STILL, replace(blind, cpu_s=4.0)).at == 2
    assert after(STILL, blind, replace(blind, relayed=101)).at == 3


def test_a_stopped_look_without_counters_forgets_none() -> None:
    blind = replace(STILL, counters=None, is_stopped=True)

    assert after(STILL, blind, STILL).at == 0
    assert after(STILL, blind, replace(STILL, counters=(8.0, 0.5))).at == 3


@given(st.lists(st.tuples(st.sampled_from([None, 1.0, 2.0]), st.integers(0, 1)), max_size=30))
def test_counters_are_compared_with_the_last_that_were_published(
    looks: list[tuple[float | None, int]],
) -> None:
    at, cpu_s, published, seen = 0, 3.0, None, [Signs(None, 3.0, 100)]
    for number, (tokens, burnt_s) in enumerate(looks, 2):
        cpu_s += burnt_s
        seen.append(Signs(None if tokens is None else (tokens,), cpu_s, 100))
        if burnt_s or (None not in {tokens, published} and tokens != published):
            at = number
        published = published if tokens is None else tokens

    assert after(*seen).at == at


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1)), max_size=30))
def test_the_last_change_is_what_counts(moves: list[tuple[int, int, int]]) -> None:
    signs, seen = STILL, [STILL]
    for tokens, cpu, relayed in moves:
        assert signs.counters is not None
        signs = Signs((signs.counters[0] + tokens, 0.5), signs.cpu_s + cpu, signs.relayed + relayed)
        seen.append(signs)

    moved = [number for number, move in enumerate(moves, 2) if any(move)]
    assert after(*seen).at == max(moved, default=0)


@given(seconds, seconds, seconds)
def test_an_abort_is_lost_only_when_its_time_is_over_and_nothing_moves(
    asked_s: float, still_s: float, cleanup_s: float
) -> None:
    """What computes is not killed for being slow to end; what is still is (R048, R051, C16)."""
    is_lost = abort_is_lost(1000 - asked_s, Progress(1000 - still_s), 1000, cleanup_s)

    assert is_lost is (asked_s >= cleanup_s and still_s >= cleanup_s)


def test_an_engine_that_moves_is_never_killed_for_an_abort() -> None:
    """(R051)"""
    progress = after(STILL)
    for now in range(4, 100):
        progress.see(replace(STILL, cpu_s=float(now)), now)
        assert not abort_is_lost(0.0, progress, now + 4.9, 5.0)


@given(seconds, seconds, seconds)
def test_work_is_lost_when_nothing_moved_for_as_long_as_it_may_take(
    busy_s: float, still_s: float, longest_s: float
) -> None:
    """Only time in which there was work counts: an idle engine is not a hung one."""
    is_lost = work_is_lost(Progress(1000 - still_s), 1000 - busy_s, 1000, longest_s)

    assert is_lost is (min(busy_s, still_s) >= longest_s)


def test_work_that_comes_after_an_idle_night_has_all_of_its_time() -> None:
    progress = Progress(0.0)

    assert not work_is_lost(progress, busy_since=30_000.0, now=30_029.9, longest_s=30.0)
    assert work_is_lost(progress, busy_since=30_000.0, now=30_030.0, longest_s=30.0)

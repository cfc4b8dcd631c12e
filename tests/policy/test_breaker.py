"""The breaker in any order of calls, ends and pauses, and each of its rules by itself."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hive.policy.breaker import Breaker, BreakerState

picks = st.integers(0, 999)


def opened(failures: int = 5, cooldown_s: float = 60.0, at: float = 0.0) -> Breaker:
    """A breaker that faults have just opened."""
    breaker = Breaker(failures, cooldown_s)
    for _ in range(failures):
        assert not breaker.began(at)
        breaker.failed(at, probe=False)
    return breaker


def probing(at: float = 60.0) -> Breaker:
    """A breaker whose one probe is under way."""
    breaker = opened()
    assert breaker.began(at)
    return breaker


@dataclass(eq=False)
class Call:
    """One call at the target; late when it was made before the breaker last opened."""

    is_probe: bool
    is_late: bool = False


class BreakerMachine(RuleBasedStateMachine):
    """Calls that overlap, end in any order, and bring late news (R006-R010, C5)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.opened_at: float | None = None
        self.has_probed = False  # since it opened
        self.run = 0  # of faults without a success
        self.calls: list[Call] = []

    @initialize(failures=st.integers(1, 6), cooldown_s=st.integers(1, 20))
    def begin(self, failures: int, cooldown_s: int) -> None:
        self.breaker = Breaker(failures, cooldown_s)

    @property
    def probes(self) -> list[Call]:
        return [call for call in self.calls if call.is_probe]

    @property
    def lets_in(self) -> bool:
        if self.opened_at is None:
            return True
        return self.now - self.opened_at >= self.breaker.cooldown_s and not self.probes

    def opens(self) -> None:
        self.opened_at, self.has_probed = self.now, False
        for call in self.calls:
            call.is_late = True

    def closes(self) -> None:
        self.opened_at, self.run = None, 0
        # What older calls bring after it closed is not judged here.
        self.calls = [call for call in self.calls if not call.is_late]

    def an_end(self, pick: int) -> Call:
        return self.calls.pop(pick % len(self.calls))

    @rule(pause_s=st.integers(0, 25))
    def time_passes(self, pause_s: int) -> None:
        self.now += pause_s

    @rule()
    def a_call_comes(self) -> None:
        if not self.lets_in:
            assert not self.breaker.allows(self.now)
            return
        is_probe = self.breaker.began(self.now)
        assert is_probe is (self.opened_at is not None)
        self.has_probed = is_probe
        self.calls.append(Call(is_probe))

    @precondition(lambda self: self.calls)
    @rule(pick=picks)
    def a_call_ends_well(self, pick: int) -> None:
        call = self.an_end(pick)
        assert self.breaker.succeeded(probe=call.is_probe) is call.is_probe
        if call.is_probe:
            self.closes()
        elif self.opened_at is None:
            self.run = 0

    @precondition(lambda self: self.calls)
    @rule(pick=picks)
    def a_call_meets_a_fault(self, pick: int) -> None:
        call = self.an_end(pick)
        if self.opened_at is None:
            self.run += 1
        opens = call.is_probe or (self.opened_at is None and self.run == self.breaker.failures)
        assert self.breaker.failed(self.now, probe=call.is_probe) is opens
        if opens:
            self.opens()

    @precondition(lambda self: self.calls)
    @rule(pick=picks)
    def a_call_ends_without_news(self, pick: int) -> None:
        self.breaker.left(probe=self.an_end(pick).is_probe)

    @rule()
    def the_process_is_another_one(self) -> None:
        self.breaker.reset()
        self.calls.clear()
        self.closes()

    @invariant()
    def it_lets_in_whom_it_should(self) -> None:
        assert self.breaker.allows(self.now) is self.lets_in

    @invariant()
    def there_is_never_more_than_one_probe(self) -> None:
        assert len(self.probes) == self.breaker.is_probing <= 1

    @invariant()
    def its_state_has_the_right_name(self) -> None:
        if self.opened_at is None:
            assert self.breaker.state is BreakerState.CLOSED
        elif self.has_probed:
            assert self.breaker.state is BreakerState.HALF_OPEN
        else:
            assert self.breaker.state is BreakerState.OPEN

    @invariant()
    def it_counts_faults_without_a_success_between_them(self) -> None:
        if self.opened_at is None:
            assert self.breaker.count == self.run < self.breaker.failures

    @invariant()
    def it_tells_how_long_it_stays_shut(self) -> None:
        left_s = 0.0
        if self.opened_at is not None:
            left_s = max(0.0, self.opened_at + self.breaker.cooldown_s - self.now)
        assert self.breaker.retry_in_s(self.now) == left_s


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=300, stateful_step_count=50)


@given(st.integers(1, 20))
def test_the_last_fault_that_is_needed_opens_it_and_says_so(failures: int) -> None:
    """It names how many there were (R006, R011)."""
    breaker = Breaker(failures, 60.0)

    told = [breaker.failed(3.0, probe=False) for _ in range(failures)]

    assert told == [False] * (failures - 1) + [True]
    assert (breaker.state, breaker.count, breaker.opened_at) == (BreakerState.OPEN, failures, 3.0)


@given(st.lists(st.booleans(), max_size=40))
def test_a_success_between_two_faults_begins_the_count_anew(ends: list[bool]) -> None:
    """Five in a row open it, not five in all (R006)."""
    breaker = Breaker(5, 60.0)
    for is_well in ends:
        if breaker.state is BreakerState.CLOSED and is_well:
            breaker.succeeded(probe=False)
        elif breaker.state is BreakerState.CLOSED:
            breaker.failed(0.0, probe=False)

    has_run = "f" * 5 in "".join("s" if is_well else "f" for is_well in ends)
    assert (breaker.state is BreakerState.OPEN) is has_run


def test_an_end_that_says_nothing_neither_adds_to_the_count_nor_clears_it() -> None:
    """A 4xx and an engine's 429 or 503 are no faults and no proof of health (R006)."""
    breaker = Breaker(2, 60.0)
    breaker.failed(0.0, probe=False)
    breaker.left(probe=False)

    assert breaker.count == 1
    assert breaker.failed(0.0, probe=False)


def test_while_it_is_open_nobody_goes_and_everybody_is_told_for_how_long() -> None:
    """(R007, R008)"""
    breaker = opened(at=100.0)

    assert [breaker.allows(now) for now in (100.0, 130.0, 159.9, 160.0)] == [False] * 3 + [True]
    assert [breaker.retry_in_s(now) for now in (100.0, 130.0, 160.0, 500.0)] == [60, 30, 0, 0]


def test_nobody_is_let_through_by_force() -> None:
    """(R007)"""
    with pytest.raises(AssertionError):
        opened().began(59.0)


def test_asking_changes_nothing() -> None:
    breaker = opened()

    assert [breaker.allows(60.0) for _ in range(3)] == [True] * 3
    assert breaker.state is BreakerState.OPEN


def test_one_probe_goes_and_nobody_beside_it_however_long_it_takes() -> None:
    """(R009)"""
    breaker = probing()

    assert breaker.state is BreakerState.HALF_OPEN
    assert not any(breaker.allows(now) for now in (60.0, 61.0, 1e6))
    with pytest.raises(AssertionError):
        breaker.began(61.0)


def test_a_probe_that_ends_well_closes_it() -> None:
    """And all of the faults are forgotten (R010)."""
    breaker = probing()

    assert breaker.succeeded(probe=True)
    assert (breaker.state, breaker.count, breaker.is_probing) == (BreakerState.CLOSED, 0, False)
    assert breaker.allows(60.0)
    assert not breaker.began(60.0)


def test_a_probe_that_meets_a_fault_opens_it_for_a_whole_cooldown() -> None:
    """(R010)"""
    breaker = probing(at=70.0)

    assert breaker.failed(75.0, probe=True)
    assert breaker.state is BreakerState.OPEN
    assert breaker.retry_in_s(75.0) == 60
    assert [breaker.allows(now) for now in (134.9, 135.0)] == [False, True]


def test_a_probe_that_says_nothing_makes_way_for_another_at_once() -> None:
    """A caller that leaves must not shut the target for ever (R009)."""
    breaker = probing()

    breaker.left(probe=True)

    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.allows(60.0)
    assert breaker.began(60.0)
    assert not breaker.allows(60.0)


@pytest.mark.parametrize("make", [opened, probing])
def test_late_news_of_calls_made_before_it_opened_changes_nothing(
    make: Callable[[], Breaker],
) -> None:
    """Neither opens it for longer nor closes it nor frees the probe (R009, R010)."""
    breaker = make()
    before = (breaker.state, breaker.opened_at, breaker.is_probing)

    assert not breaker.succeeded(probe=False)
    assert not breaker.failed(59.0, probe=False)
    breaker.left(probe=False)

    assert (breaker.state, breaker.opened_at, breaker.is_probing) == before


@pytest.mark.parametrize("make", [opened, probing])
def test_another_process_has_a_clean_sheet(make: Callable[[], Breaker]) -> None:
    breaker = make()

    breaker.reset()

    assert breaker == Breaker(5, 60.0, opened_at=breaker.opened_at)
    assert breaker.allows(0.0)
    assert breaker.retry_in_s(0.0) == 0

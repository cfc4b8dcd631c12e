"""The breaker in any order of calls, ends and pauses, and each of its rules by itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hive.policy.breaker import Breaker, BreakerState

picks = st.integers(0, 999)


def fault(breaker: Breaker, now: float = 0.0) -> None:
    """A call that goes and meets a fault at once."""
    breaker.failed(breaker.began(now), now)


def opened(failures: int = 5, cooldown_s: float = 60.0, at: float = 0.0) -> Breaker:
    """A breaker that faults have just opened."""
    breaker = Breaker(failures, cooldown_s)
    for _ in range(failures):
        assert breaker.allows(at)
        fault(breaker, at)
    return breaker


def probing(at: float = 60.0) -> tuple[Breaker, int]:
    """A breaker whose one probe is under way."""
    breaker = opened()
    return breaker, breaker.began(at)


@dataclass(eq=False)
class Call:
    """One call at the target; late once the breaker has moved or was reset since it began."""

    era: int
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
        return [call for call in self.calls if call.is_probe and not call.is_late]

    @property
    def lets_in(self) -> bool:
        if self.opened_at is None:
            return True
        return self.now - self.opened_at >= self.breaker.cooldown_s and not self.probes

    def moves(self, opened_at: float | None) -> None:
        self.opened_at, self.has_probed = opened_at, False
        for call in self.calls:
            call.is_late = True

    def closes(self) -> None:
        self.moves(None)
        self.run = 0

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
        self.has_probed = is_probe = self.opened_at is not None
        self.calls.append(Call(self.breaker.began(self.now), is_probe))

    @precondition(lambda self: self.calls)
    @rule(pick=picks)
    def a_call_ends_well(self, pick: int) -> None:
        call = self.an_end(pick)
        self.breaker.succeeded(call.era)
        if call.is_late:
            return
        self.run = 0
        if call.is_probe:
            self.closes()

    @precondition(lambda self: self.calls)
    @rule(pick=picks)
    def a_call_meets_a_fault(self, pick: int) -> None:
        call = self.an_end(pick)
        self.breaker.failed(call.era, self.now)
        if call.is_late:
            return
        self.run += 1
        if call.is_probe or self.run == self.breaker.failures:
            self.moves(self.now)

    @precondition(lambda self: self.calls)
    @rule(pick=picks)
    def a_call_ends_without_news(self, pick: int) -> None:
        call = self.an_end(pick)
        assert self.breaker.left(call.era) is (call.is_probe and not call.is_late)

    @precondition(lambda self: any(call.is_late for call in self.calls))
    @rule(pick=picks, end=st.sampled_from(["well", "fault", "nothing"]))
    def late_news_changes_nothing(self, pick: int, end: str) -> None:
        late = [call for call in self.calls if call.is_late]
        call = late[pick % len(late)]
        self.calls.remove(call)
        before = replace(self.breaker)
        if end == "well":
            self.breaker.succeeded(call.era)
        elif end == "fault":
            self.breaker.failed(call.era, self.now)
        else:
            assert not self.breaker.left(call.era)
        assert self.breaker == before

    @rule()
    def the_process_is_another_one(self) -> None:
        self.breaker.reset()
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
        """Of its own era alone: while it is open, only a probe adds one."""
        assert self.breaker.count == self.run
        assert (self.run < self.breaker.failures) is (self.opened_at is None)

    @invariant()
    def it_tells_how_long_it_stays_shut(self) -> None:
        left_s = 0.0
        if self.opened_at is not None:
            left_s = max(0.0, self.opened_at + self.breaker.cooldown_s - self.now)
        assert self.breaker.retry_in_s(self.now) == left_s


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=80, stateful_step_count=50)


@given(st.integers(1, 20))
def test_the_last_fault_that_is_needed_opens_it(failures: int) -> None:
    """It names how many there were (R006, R011)."""
    breaker = Breaker(failures, 60.0)
    states = []
    for _ in range(failures):
        fault(breaker, 3.0)
        states.append(breaker.state)

    assert states == [BreakerState.CLOSED] * (failures - 1) + [BreakerState.OPEN]
    assert (breaker.count, breaker.opened_at) == (failures, 3.0)


@given(st.integers(1, 5), st.integers(0, 20))
def test_of_calls_that_run_together_as_many_faults_count_as_it_takes(
    failures: int, more: int
) -> None:
    """The others are late: the count stays, the cooldown begins with the first (R008, R011)."""
    breaker = Breaker(failures, 60.0)
    calls = [breaker.began(0.0) for _ in range(failures + more)]
    for now, call in enumerate(calls):
        breaker.failed(call, now)

    assert (breaker.state, breaker.count) == (BreakerState.OPEN, failures)
    assert breaker.opened_at == failures - 1


@given(st.lists(st.booleans(), max_size=40))
def test_a_success_between_two_faults_begins_the_count_anew(ends: list[bool]) -> None:
    """Five in a row open it, not five in all (R006)."""
    breaker = Breaker(5, 60.0)
    for is_well in ends:
        if breaker.state is BreakerState.CLOSED and is_well:
            breaker.succeeded(breaker.began(0.0))
        elif breaker.state is BreakerState.CLOSED:
            fault(breaker)

    has_run = "f" * 5 in "".join("s" if is_well else "f" for is_well in ends)
    assert (breaker.state is BreakerState.OPEN) is has_run


def test_an_end_that_says_nothing_neither_adds_to_the_count_nor_clears_it() -> None:
    """A 4xx and an engine's 429 or 503 are no faults and no proof of health (R006)."""
    breaker = Breaker(2, 60.0)
    fault(breaker)

    assert not breaker.left(breaker.began(0.0))
    assert breaker.count == 1
    fault(breaker)
    assert breaker.state is BreakerState.OPEN


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
    before = replace(breaker)

    assert [breaker.allows(60.0) for _ in range(3)] == [True] * 3
    assert breaker.retry_in_s(60.0) == 0
    assert breaker == before


def test_one_probe_goes_and_nobody_beside_it_however_long_it_takes() -> None:
    """(R009)"""
    breaker, _ = probing()

    assert breaker.state is BreakerState.HALF_OPEN
    assert not any(breaker.allows(now) for now in (60.0, 61.0, 1e6))
    with pytest.raises(AssertionError):
        breaker.began(61.0)


def test_a_probe_that_ends_well_closes_it() -> None:
    """And all of the faults are forgotten (R010)."""
    breaker, probe = probing()

    breaker.succeeded(probe)

    assert (breaker.state, breaker.count, breaker.is_probing) == (BreakerState.CLOSED, 0, False)
    assert breaker.allows(60.0)
    assert not breaker.left(breaker.began(60.0))


def test_a_probe_that_meets_a_fault_opens_it_for_a_whole_cooldown() -> None:
    """(R010)"""
    breaker, probe = probing(at=70.0)

    breaker.failed(probe, 75.0)

    assert breaker.state is BreakerState.OPEN
    assert breaker.retry_in_s(75.0) == 60
    assert [breaker.allows(now) for now in (134.9, 135.0)] == [False, True]


def test_a_probe_that_says_nothing_makes_way_for_another_at_once() -> None:
    """A caller that leaves must not shut the target for ever (R009)."""
    breaker, probe = probing()

    assert breaker.left(probe)

    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.allows(60.0)
    second = breaker.began(60.0)
    assert not breaker.allows(60.0)
    assert not breaker.left(probe)
    assert not breaker.allows(60.0)
    assert breaker.left(second)


def opens(breaker: Breaker) -> None:
    while breaker.state is BreakerState.CLOSED:
        fault(breaker)


def tries(breaker: Breaker) -> None:
    opens(breaker)
    breaker.began(60.0)


def tries_twice(breaker: Breaker) -> None:
    opens(breaker)
    breaker.left(breaker.began(60.0))
    breaker.began(60.0)


def opens_again(breaker: Breaker) -> None:
    opens(breaker)
    fault(breaker, 60.0)


def closes(breaker: Breaker) -> None:
    opens(breaker)
    breaker.succeeded(breaker.began(60.0))


def counts_anew(breaker: Breaker) -> None:
    closes(breaker)
    fault(breaker, 61.0)


moves = pytest.mark.parametrize(
    "move", [opens, tries, tries_twice, opens_again, closes, counts_anew, Breaker.reset]
)


@moves
def test_late_news_of_calls_made_before_it_moved_changes_nothing(
    move: Callable[[Breaker], None],
) -> None:
    """Neither opens nor closes it, nor counts, nor frees the probe (R006, R009, R010)."""
    breaker = Breaker(3, 60.0)
    call = breaker.began(0.0)
    move(breaker)
    before = replace(breaker)

    for _ in range(5):
        breaker.succeeded(call)
        breaker.failed(call, 65.0)
        assert not breaker.left(call)

    assert breaker == before


@moves
def test_late_news_of_a_probe_says_nothing_of_another_process(
    move: Callable[[Breaker], None],
) -> None:
    breaker, probe = probing()
    breaker.reset()
    move(breaker)
    before = replace(breaker)

    for _ in range(5):
        breaker.succeeded(probe)
        breaker.failed(probe, 65.0)
        assert not breaker.left(probe)

    assert breaker == before


@pytest.mark.parametrize("make", [opened, lambda: probing()[0]])
def test_another_process_has_a_clean_sheet(make: Callable[[], Breaker]) -> None:
    breaker = make()

    breaker.reset()

    assert (breaker.state, breaker.count, breaker.is_probing) == (BreakerState.CLOSED, 0, False)
    assert breaker.allows(0.0)
    assert breaker.retry_in_s(0.0) == 0

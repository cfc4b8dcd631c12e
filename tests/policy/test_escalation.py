"""What a person is told, once, and when it is over: against rules that are written out here."""

from collections.abc import Iterable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.errors import Family, Severity, by_code, every_error
from hive.policy.breaker import BreakerState
from hive.policy.escalation import (
    DEFAULT_ACTION,
    DOWN_S,
    ERROR_RATE,
    FAILURES,
    FAMILIES,
    IN_SUCCESSION,
    LEAST_CALLS,
    REFUSED_CLIENTS,
    RULES,
    STEP_S,
    VALIDATION_ACTION,
    WINDOW_S,
    Alerting,
    Calls,
    Change,
    Escalations,
    Outcome,
    Over,
    Part,
    Raised,
    Rule,
    ServiceLevel,
    Subject,
    alerting,
    broken_level,
    outcome,
    recommended_action,
    service_level,
)
from hive.policy.lifecycle import State

LLAMA = Subject("inference", "llama")
DELETE = Subject("delete")
W0 = Subject("worker", "llama", "llama-0")
WELL, FAILED, LATE = Outcome.WELL, Outcome.FAILED, Outcome.TIMED_OUT


def escalations() -> Escalations:
    return Escalations([LLAMA, DELETE])


def rules(changes: Iterable[Change]) -> list[Rule]:
    return [change.rule for change in changes if isinstance(change, Raised)]


def over(changes: Iterable[Change]) -> list[Rule]:
    return [change.raised.rule for change in changes if isinstance(change, Over)]


# ── repeated failures ───────────────────────────────────────────────────────────────────────────


def test_the_sixth_failure_in_five_minutes_escalates_and_the_fifth_does_not() -> None:
    """(R189)"""
    it = escalations()
    told = [rules(it.ended(LLAMA, float(at), FAILED, "BAD_GATEWAY")) for at in range(6)]

    assert told[:5] == [[]] * 5
    assert told[5] == [Rule.REPEATED_FAILURES]


@given(st.lists(st.floats(0.5, 200), min_size=1, max_size=40), st.floats(0, 1e6, allow_nan=False))
def test_it_is_told_when_more_than_five_failed_in_any_five_minutes(
    gaps: list[float], began: float
) -> None:
    """Against all times, looked at one by one (R189)."""
    it, now, times = escalations(), began, []
    for gap in gaps:
        now += gap
        times.append(now)
        recent = [at for at in times if now - at < WINDOW_S]
        is_told = Rule.REPEATED_FAILURES in rules(it.ended(LLAMA, now, FAILED, "BAD_GATEWAY"))
        if len(recent) > FAILURES:
            assert it.is_open(Rule.REPEATED_FAILURES, LLAMA)
        else:
            assert not is_told


def test_it_is_over_when_it_was_quiet_for_as_long() -> None:
    it = escalations()
    for at in range(7):
        it.ended(LLAMA, float(at), FAILED, "BAD_GATEWAY")
    assert over(it.look(6 + WINDOW_S - 1)) == []
    (change,) = (c for c in it.look(6 + WINDOW_S) if isinstance(c, Over))

    assert (change.raised.rule, change.repeats) == (Rule.REPEATED_FAILURES, 1)
    assert change.seconds == 6 + WINDOW_S - 5


# ── rates ───────────────────────────────────────────────────────────────────────────────────────


def test_a_rate_needs_twenty_calls_and_more_than_half_of_them() -> None:
    """(R185, R190)"""
    it = escalations()
    for at in range(10):
        it.ended(LLAMA, at / 10, WELL)
    told = [rules(it.ended(LLAMA, 1 + at / 10, FAILED, "BAD_GATEWAY")) for at in range(11)]

    assert not any(Rule.ERROR_RATE in one for one in told[:10])  # 10 of 20 are half
    assert Rule.ERROR_RATE in told[10]


def test_no_calls_are_a_rate_of_zero() -> None:
    """(R185)"""
    assert Calls().rate(0) == 0.0


def test_a_rate_is_over_when_it_is_well_below() -> None:
    it = escalations()
    for at in range(21):
        it.ended(LLAMA, at / 100, FAILED, "BAD_GATEWAY")
    assert it.is_open(Rule.ERROR_RATE, LLAMA)
    for _ in range(21):
        it.ended(LLAMA, 1.0, WELL)
    assert Rule.ERROR_RATE not in over(it.look(1.0))  # at its limit: it would flap
    for _ in range(42):
        it.ended(LLAMA, 1.0, WELL)

    assert Rule.ERROR_RATE in over(it.look(1.0))


def test_more_than_a_tenth_of_timeouts_escalate() -> None:
    """(R256)"""
    it = escalations()
    for _ in range(36):
        it.ended(LLAMA, 1.0, WELL)
    told: list[list[Rule]] = []
    for _ in range(5):
        told.append(rules(it.ended(LLAMA, 1.0, LATE, "INFERENCE_TIMEOUT")))
        it.ended(LLAMA, 1.0, WELL)

    assert told[0] == [Rule.TIMEOUT]  # (R257)
    assert told[4] == [Rule.TIMEOUT_RATE]  # 5 of 45
    assert RULES[Rule.TIMEOUT].level is Severity.MEDIUM
    assert RULES[Rule.TIMEOUT_RATE].level is Severity.HIGH


def test_timeouts_in_succession_are_critical() -> None:
    """(R255)"""
    it = escalations()
    for at in range(IN_SUCCESSION - 1):
        assert Rule.TIMEOUTS_IN_SUCCESSION not in rules(it.ended(LLAMA, float(at), LATE, "X"))
    it.ended(LLAMA, 4.0, WELL)
    told = [rules(it.ended(LLAMA, 5.0, LATE, "INFERENCE_TIMEOUT")) for _ in range(IN_SUCCESSION)]
    assert [Rule.TIMEOUTS_IN_SUCCESSION in one for one in told] == [False] * 4 + [True]
    it.ended(LLAMA, 6.0, WELL)

    assert Rule.TIMEOUTS_IN_SUCCESSION in over(it.look(6.0))
    assert RULES[Rule.TIMEOUTS_IN_SUCCESSION].level is Severity.CRITICAL


@given(st.lists(st.tuples(st.floats(0, 120), st.sampled_from([WELL, FAILED, LATE])), max_size=80))
def test_the_window_forgets_by_steps_and_never_counts_wrong(
    calls: list[tuple[float, Outcome]],
) -> None:
    counted, now, seen = Calls(), 0.0, []
    for gap, how in calls:
        now += gap
        counted.note(now, how)
        seen.append((now, how))
        counted.forget(now)
        step = int(now // STEP_S)
        recent = [h for at, h in seen if int(at // STEP_S) > step - WINDOW_S / STEP_S]
        assert counted.count == len(recent)
        assert counted.failed == sum(h is not WELL for h in recent)
        assert counted.late == sum(h is LATE for h in recent)
    assert len(counted._steps) <= WINDOW_S / STEP_S + 1


def test_what_it_holds_does_not_grow() -> None:
    """Whatever clients do: 100,000 failures are some numbers and a few entries."""
    it = escalations()
    for at in range(100_000):
        it.ended(LLAMA, at / 50, FAILED, "BAD_GATEWAY")
        it.refused_client(at / 50, "UNAUTHORIZED")
    calls = it._calls[LLAMA]

    assert len(calls._steps) <= WINDOW_S / STEP_S + 1
    assert len(calls._last) == FAILURES + 1
    assert len(it._refused) == REFUSED_CLIENTS + 1
    assert len(it.open) == 3


# ── once ────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.sampled_from(["raise", "over", "look"]), max_size=50))
def test_each_is_told_once_until_it_is_over(steps: list[str]) -> None:
    it, is_open, repeats = escalations(), False, 0
    for now, step in enumerate(steps):
        match step:
            case "raise":
                told = it.raised(Rule.BREAKER_OPEN, W0, float(now), "CIRCUIT_BREAKER_OPEN")
                assert bool(told) is not is_open
                repeats = repeats + 1 if is_open else 0
                is_open = True
            case "over":
                changes = it.over(Rule.BREAKER_OPEN, W0, float(now))
                assert bool(changes) is is_open
                if changes:
                    (change,) = changes
                    assert isinstance(change, Over)
                    assert change.repeats == repeats
                is_open = False
            case "look":
                assert it.look(float(now)) == ()  # a state is not over because it is quiet


def test_rules_and_subjects_are_told_apart() -> None:
    it = escalations()
    for rule, worker in product((Rule.BREAKER_OPEN, Rule.WORKER_FAILED), ("llama-0", "llama-1")):
        assert it.raised(rule, Subject("worker", "llama", worker), 0.0, "X")
    assert len(it.open) == 4


def test_what_is_destructive_or_damaged_or_unforeseen_is_told_at_once() -> None:
    """(R186, R188)"""
    it = escalations()

    assert rules(it.ended(DELETE, 0.0, FAILED, "STORAGE_WRITE_FAILED")) == [Rule.OPERATION_FAILED]
    assert rules(it.ended(LLAMA, 0.0, FAILED, "STORAGE_CORRUPTED")) == [Rule.DATA_DAMAGED]
    assert rules(it.ended(LLAMA, 0.0, FAILED, "INTERNAL_ERROR")) == [Rule.INTERNAL_ERROR]
    assert RULES[Rule.OPERATION_FAILED].level is Severity.CRITICAL


def test_strangers_are_told_by_their_number_alone() -> None:
    """(R187, C30)"""
    it = escalations()
    told = [rules(it.refused_client(at / 10, "UNAUTHORIZED")) for at in range(REFUSED_CLIENTS + 1)]

    assert told == [[]] * REFUSED_CLIENTS + [[Rule.CLIENTS_REFUSED]]
    assert over(it.look(WINDOW_S + 3)) == [Rule.CLIENTS_REFUSED]


def test_a_catalogue_that_is_away_for_more_than_five_minutes_is_critical() -> None:
    """(R255)"""
    it, subject = escalations(), Subject("catalogue")
    assert it.catalogue(subject, 0.0, is_away=True) == ()
    assert it.catalogue(subject, DOWN_S, is_away=True) == ()
    it.catalogue(subject, DOWN_S, is_away=False)
    assert it.catalogue(subject, DOWN_S + 1, is_away=True) == ()
    assert it.catalogue(subject, 2 * DOWN_S, is_away=True) == ()
    assert rules(it.catalogue(subject, 2 * DOWN_S + 2, is_away=True)) == [Rule.CATALOGUE_DOWN]
    assert over(it.catalogue(subject, 2 * DOWN_S + 3, is_away=False)) == [Rule.CATALOGUE_DOWN]


def test_two_failures_of_the_catalogue_far_apart_tell_nothing_of_the_time_between() -> None:
    it, subject = escalations(), Subject("catalogue")
    for hour in range(10):
        assert it.catalogue(subject, hour * 3600.0, is_away=True) == ()
    for at in range(0, int(DOWN_S) + 1, 60):
        assert it.catalogue(subject, 40_000.0 + at, is_away=True) == ()
    assert rules(it.catalogue(subject, 40_000.0 + DOWN_S + 1, is_away=True)) == [
        Rule.CATALOGUE_DOWN
    ]


def test_a_catalogue_that_nobody_asks_in_vain_any_more_is_over() -> None:
    """Requests that it answered within a session are not told: it would stay open for ever."""
    it, subject = escalations(), Subject("catalogue")
    for at in (0.0, DOWN_S, DOWN_S + 1, DOWN_S + 50):
        it.catalogue(subject, at, is_away=True)
    assert over(it.look(DOWN_S + 50 + WINDOW_S - 1)) == []
    assert over(it.look(DOWN_S + 50 + WINDOW_S)) == [Rule.CATALOGUE_DOWN]


# ── levels, codes, actions ──────────────────────────────────────────────────────────────────────


def test_each_family_has_its_place_in_the_table_of_alerts() -> None:
    """(R114)"""
    assert set(FAMILIES) == set(Family)
    none = {family for family, mode in FAMILIES.items() if mode is Alerting.NONE}
    assert none == {Family.VALIDATION, Family.NOT_FOUND, Family.STATE}
    assert FAMILIES[Family.INTERNAL] is Alerting.ALWAYS
    assert FAMILIES[Family.SECURITY] is Alerting.RATE
    for family in (Family.STORAGE, Family.CONNECTION, Family.TIMEOUT, Family.RESOURCE):
        assert FAMILIES[family] is Alerting.REPEATED


@pytest.mark.parametrize(
    ("code", "status", "how"),
    [
        ("", 200, Outcome.WELL),
        ("", 404, Outcome.NEUTRAL),
        ("", 429, Outcome.NEUTRAL),
        ("", 500, Outcome.FAILED),
        ("", 503, Outcome.NEUTRAL),
        ("VALIDATION_ERROR", 400, Outcome.NEUTRAL),
        ("REQUEST_CANCELLED", 499, Outcome.NEUTRAL),
        ("RATE_LIMITED", 429, Outcome.NEUTRAL),
        ("SERVICE_UNAVAILABLE", 503, Outcome.NEUTRAL),
        ("REQUEST_TIMEOUT", 504, Outcome.NEUTRAL),  # the client's own limit
        ("UNAUTHORIZED", 401, Outcome.NEUTRAL),
        ("INFERENCE_TIMEOUT", 504, Outcome.TIMED_OUT),
        ("WORKER_CRASHED", 502, Outcome.FAILED),
        ("STORAGE_WRITE_FAILED", 500, Outcome.FAILED),
        ("NEVER_HEARD_OF", 500, Outcome.FAILED),
    ],
)
def test_what_a_call_says_of_its_operation(code: str, status: int, how: Outcome) -> None:
    """(R114, R184)"""
    assert outcome(code, status) is how


def test_neutral_calls_change_nothing() -> None:
    it = escalations()
    for at in range(100):
        assert it.ended(LLAMA, float(at), Outcome.NEUTRAL, "RATE_LIMITED") == ()
    assert it._calls[LLAMA].count == 0


def test_every_rule_has_a_level_and_names_its_subject() -> None:
    """(R192, R207)"""
    assert set(RULES) == set(Rule)
    for rule in Rule:
        raised = Raised(rule, W0, "WORKER_CRASHED")
        assert raised.level in Severity
        assert "{" not in raised.said
    assert RULES[Rule.ROLLBACK_FAILED].level is Severity.EMERGENCY


def test_every_code_leads_to_an_action() -> None:
    """The rule's, the code's, the checklist, or the general one (R195)."""
    assert recommended_action(Rule.BREAKER_OPEN, "BAD_GATEWAY") == RULES[Rule.BREAKER_OPEN].action
    for error in every_error():
        action = recommended_action(Rule.REPEATED_FAILURES, error.code)
        is_checklist = error.family is Family.VALIDATION
        assert action == (VALIDATION_ACTION if is_checklist else error.action)
    assert recommended_action(Rule.REPEATED_FAILURES, "NEVER_HEARD_OF") == DEFAULT_ACTION
    assert recommended_action(Rule.REPEATED_FAILURES, "") == DEFAULT_ACTION
    assert alerting("NEVER_HEARD_OF") is Alerting.ALWAYS
    assert by_code("NEVER_HEARD_OF") is None


# ── the service level ───────────────────────────────────────────────────────────────────────────

READY = Part("a", State.READY)
PARTS = st.builds(
    Part,
    st.sampled_from("abc"),
    st.sampled_from(State),
    st.sampled_from(BreakerState),
)


@pytest.mark.parametrize(
    ("parts", "level"),
    [
        ([READY], ServiceLevel.FULL),
        ([Part("a", State.LOADING)], ServiceLevel.DOWN),
        ([Part("a", State.READY, BreakerState.OPEN)], ServiceLevel.DOWN),
        ([Part("a", State.READY, BreakerState.HALF_OPEN)], ServiceLevel.DEGRADED),
        ([READY, Part("a", State.FAILED)], ServiceLevel.DEGRADED),
        ([READY, Part("b", State.FAILED)], ServiceLevel.CRITICAL),
        ([READY, Part("a", State.FAILED), Part("a", State.LOST)], ServiceLevel.CRITICAL),
    ],
)
def test_how_much_can_be_had(parts: list[Part], level: ServiceLevel) -> None:
    """(R263)"""
    assert service_level(parts) is level


def test_devices_and_the_cache_count_too() -> None:
    assert service_level([READY], is_all_else_well=False) is ServiceLevel.DEGRADED


@given(st.lists(PARTS, min_size=1, max_size=6), st.data())
def test_what_gets_worse_never_makes_it_better(parts: list[Part], data: st.DataObject) -> None:
    before = service_level(parts), broken_level(parts)
    part = data.draw(st.sampled_from(parts))
    if data.draw(st.booleans()):
        part.state = State.FAILED
    else:
        part.breaker = BreakerState.OPEN

    assert service_level(parts) >= before[0]
    assert broken_level(parts) >= before[1]


@given(st.lists(PARTS, min_size=1, max_size=6))
def test_what_is_on_its_way_or_was_stopped_is_not_broken(parts: list[Part]) -> None:
    assert broken_level(parts) <= service_level(parts)
    for part in parts:
        part.state, part.breaker = State.LOADING, BreakerState.CLOSED
    assert broken_level(parts) is ServiceLevel.FULL


def test_the_error_rate_is_a_half() -> None:
    assert (ERROR_RATE, LEAST_CALLS, FAILURES, WINDOW_S) == (0.5, 20, 5, 300.0)

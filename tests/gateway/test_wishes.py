"""What a client may ask of hive by headers, and what it is told when it asks badly."""

import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.errors import InvalidSessionId, ValidationFailed
from hive.gateway.wishes import own_limit_s, priority, session
from hive.policy.admission import Priority

NORMAL, BATCH, INTERACTIVE = Priority.NORMAL, Priority.BATCH, Priority.INTERACTIVE


def limit_s(**headers: str) -> float | None:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return own_limit_s(named, time.monotonic())


def refused(**headers: str) -> ValidationFailed:
    with pytest.raises(ValidationFailed) as caught:
        limit_s(**headers)
    return caught.value


# ── How long ────────────────────────────────────────────────────────────────────────────────────


def test_who_asks_for_nothing_gets_hives_own_limits() -> None:
    assert limit_s() is None


@pytest.mark.parametrize(
    ("told", "seconds"), [("5", 5), ("2.5", 2.5), ("0.001", 0.001), (" 7 ", 7), ("999999999", 1e9)]
)
def test_seconds_are_taken_as_they_are(told: str, seconds: float) -> None:
    assert limit_s(X_Hive_Timeout=told) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "told",
    [
        *("", " ", "0", "0.0", "-1", "+1", "1e3", "1.", ".5", "1,5", "5s", "inf", "nan", "1_0"),
        *("0x1", "1 2", "1\n2", "9" * 10, "1.0000000001", "five"),
    ],
)
def test_what_is_no_number_of_seconds_is_refused_by_name(told: str) -> None:
    """(R033, R156)"""
    error = refused(X_Hive_Timeout=told)

    assert (error.status, error.param) == (400, "X-Hive-Timeout")
    assert "number of seconds above 0" in error.message


@pytest.mark.parametrize("offset_h", [-11, 0, 5.5, 14])
def test_a_deadline_may_be_told_in_any_zone(offset_h: float) -> None:
    """(DEAD-004)"""
    zone = timezone(timedelta(hours=offset_h))
    told = (datetime.now(UTC) + timedelta(seconds=20)).astimezone(zone).isoformat()

    assert limit_s(X_Request_Deadline=told) == pytest.approx(20, abs=5)


def test_a_deadline_counts_from_the_requests_arrival() -> None:
    """What its body took is part of it."""
    told = (datetime.now(UTC) + timedelta(seconds=20)).isoformat()
    found = own_limit_s({"X-Request-Deadline": told}, time.monotonic() - 100)

    assert found == pytest.approx(120, abs=5)


def test_a_deadline_that_has_passed_is_below_zero() -> None:
    found = limit_s(X_Request_Deadline="2020-01-31T12:00:00Z")

    assert found is not None
    assert found < 0


@pytest.mark.parametrize(
    "told",
    [
        "",
        "soon",
        "1893456000",
        "2030-01-31",
        "2030-01-31T12:00:00",
        "2030-13-31T12:00:00Z",
        "2030-01-31T25:00:00Z",
        "31.01.2030 12:00 UTC",
        "Thu, 31 Jan 2030 12:00:00 GMT",
        "2030-01-31T12:00:00+99:00",
    ],
)
def test_what_is_no_deadline_is_refused_by_name(told: str) -> None:
    """Also one without its offset: nobody knows when that is (R033, R156)."""
    error = refused(X_Request_Deadline=told)

    assert (error.status, error.param) == (400, "X-Request-Deadline")
    assert "offset from UTC" in error.message


@pytest.mark.parametrize(("seconds", "deadline_s"), [(5, 20), (20, 5)])
def test_of_both_the_shorter_one_counts(seconds: int, deadline_s: int) -> None:
    told = (datetime.now(UTC) + timedelta(seconds=deadline_s)).isoformat()
    found = limit_s(X_Hive_Timeout=str(seconds), X_Request_Deadline=told)

    assert found == pytest.approx(5, abs=3)


@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_is_told_is_a_limit_or_a_refusal(seconds: str, deadline: str) -> None:
    """(R154)"""
    for headers in ({"X_Hive_Timeout": seconds}, {"X_Request_Deadline": deadline}):
        try:
            assert isinstance(limit_s(**headers), float)
        except ValidationFailed as error:
            assert error.param


@given(st.datetimes(timezones=st.timezones()))
def test_every_moment_that_can_be_written_down_is_understood(moment: datetime) -> None:
    found = limit_s(X_Request_Deadline=moment.astimezone(UTC).isoformat())

    assert found == pytest.approx(moment.timestamp() - time.time(), abs=5)


# ── How urgent ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("own", Priority)
def test_without_a_wish_it_is_the_keys_own(own: Priority) -> None:
    assert priority({}, own, INTERACTIVE) is own


@pytest.mark.parametrize(
    ("told", "highest", "found"),
    [
        ("interactive", INTERACTIVE, INTERACTIVE),
        ("batch", INTERACTIVE, BATCH),
        ("normal", NORMAL, NORMAL),
        ("interactive", NORMAL, NORMAL),
        ("interactive", BATCH, BATCH),
        ("normal", BATCH, BATCH),
        (" Batch ", NORMAL, BATCH),
        ("NORMAL", INTERACTIVE, NORMAL),
    ],
)
def test_a_wish_is_granted_up_to_what_the_key_may(
    told: str, highest: Priority, found: Priority
) -> None:
    assert priority({"X-Hive-Priority": told}, highest, highest) is found


@pytest.mark.parametrize("told", ["", "high", "0", "1", "interactive, batch", "Priority.BATCH"])
def test_any_other_word_is_refused_with_those_that_there_are(told: str) -> None:
    """(R033, R156)"""
    with pytest.raises(ValidationFailed) as caught:
        priority({"X-Hive-Priority": told}, NORMAL, NORMAL)

    assert caught.value.param == "X-Hive-Priority"
    assert caught.value.public_details["allowed"] == ["interactive", "normal", "batch"]


# ── For which session ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("told", ["a", "0", "A-b_c9", "x" * 64])
def test_a_session_has_a_name(told: str) -> None:
    assert session({"X-Hive-Session": told}) == told
    assert session({}) is None


@pytest.mark.parametrize(
    "told", ["", " ", "-a", "_a", "x" * 65, "a b", "a/b", "a.b", "é", "a\n", " a", "../a", "a\0"]
)
def test_any_other_name_is_refused_by_its_own_code(told: str) -> None:
    """(R033)"""
    with pytest.raises(InvalidSessionId) as caught:
        session({"X-Hive-Session": told})

    assert (caught.value.status, caught.value.param) == (400, "X-Hive-Session")
    assert caught.value.number == "CWM-1001"

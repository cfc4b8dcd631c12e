"""What is wrong now, for operators alone: the route, its scope, and the level in the status."""

import hashlib

from hive.events import BreakerMoved, WorkerMoved
from tests.gateway.serving import serving
from tests.patience import awaited

KEYS = {
    "keys": [
        {"name": scope, "sha256": hashlib.sha256(scope.encode()).hexdigest(), "scopes": [scope]}
        for scope in ("inference", "admin")
    ]
}


@awaited
async def test_what_escalated_is_shown_until_it_is_over() -> None:
    """(R193)"""
    async with serving() as it:
        _, before = await it.ask("GET", "/hive/v1/alerts")
        it.announcer.announce(BreakerMoved("m", "m-0", "closed", "open", 5))
        _, told = await it.ask("GET", "/hive/v1/alerts")
        it.announcer.announce(BreakerMoved("m", "m-0", "half_open", "closed", 0))
        _, after = await it.ask("GET", "/hive/v1/alerts")
    (breaker,) = (one for one in told["alerts"] if one["rule"] == "breaker_open")

    assert before["alerts"] == after["alerts"] == []
    assert (breaker["worker"], breaker["level"]) == ("m-0", "high")
    assert breaker["recommended_action"]
    assert before["outbox"]["enabled"] is False
    # The worst first: nobody is served.
    assert [one["rule"] for one in told["alerts"]] == ["service_degraded", "breaker_open"]


@awaited
async def test_the_status_says_how_much_can_be_had() -> None:
    """(R263)"""
    async with serving() as it:
        it.announcer.announce(WorkerMoved("m-0", "m", "LOADING", "READY"))
        _, full = await it.ask("GET", "/hive/v1/status")
        it.announcer.announce(BreakerMoved("m", "m-0", "closed", "open", 5))
        _, down = await it.ask("GET", "/hive/v1/status")
    assert (full["service_level"], down["service_level"]) == ("full", "down")


@awaited
async def test_it_needs_the_scope_admin() -> None:
    async with serving(auth=KEYS) as it:
        answers = {
            key: await it.ask("GET", "/hive/v1/alerts", Authorization=f"Bearer {key}")
            for key in ("inference", "admin")
        }
        unknown, _ = await it.ask("GET", "/hive/v1/alerts")
    assert unknown.status == 401
    assert {key: answer.status for key, (answer, _) in answers.items()} == {
        "inference": 403,
        "admin": 200,
    }

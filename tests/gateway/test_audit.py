"""The audit log over HTTP: for admins, page by page, bounded; and what the gateway tells it."""

import pytest

from hive.events import KeyRefused
from hive.gateway.audit import MOST
from hive.storage.audit_writer import Journal
from tests.gateway.serving import Serving, bearer, key, serving
from tests.patience import awaited

PATH = "/hive/v1/audit"


def recorded(it: Serving, count: int) -> None:
    journal = Journal(it.home / "state" / "audit", 10, 10, lambda _: None)
    for number in range(count):
        journal.put({"action": f"n{number}"})
    assert journal.close() == 0


@awaited
async def test_pages_follow_each_other_to_the_first_record() -> None:
    async with serving() as it:
        assert (await it.ask("GET", PATH))[1] == {"records": []}
        recorded(it, 250)
        found, path = [], PATH
        while True:
            _, told = await it.ask("GET", path)
            found += [one["index"] for one in told["records"]]
            if "next_before" not in told:
                break
            path = f"{PATH}?before={told['next_before']}"

        assert found == list(range(249, -1, -1))
        _, told = await it.ask("GET", f"{PATH}?limit=2")
        assert [one["action"] for one in told["records"]] == ["n249", "n248"]


@pytest.mark.parametrize(
    "query",
    ["limit=0", f"limit={MOST + 1}", "limit=x", "before=-1", "before=9999999999999999", "limit="],
)
@awaited
async def test_a_page_that_cannot_be_is_refused(query: str) -> None:
    async with serving() as it:
        answer, told = await it.ask("GET", f"{PATH}?{query}")

        assert (answer.status, told["error"]["code"]) == (400, "VALIDATION_ERROR")
        assert told["error"]["param"] == query.partition("=")[0]


@awaited
async def test_a_log_that_cannot_be_read_says_so() -> None:
    async with serving() as it:
        (it.home / "state" / "audit" / "audit.jsonl").mkdir(parents=True)
        answer, told = await it.ask("GET", PATH)

        assert (answer.status, told["error"]["code"]) == (500, "STORAGE_READ_FAILED")


@awaited
async def test_it_is_for_admins_and_who_is_refused_is_announced() -> None:
    keys = [key("ops", "admin"), key("ci")]
    async with serving(auth={"keys": keys}) as it:
        statuses = [
            (await it.ask("GET", PATH, None, **headers))[0].status
            for headers in (bearer("ops"), bearer("ci"), bearer("nobody"), {})
        ]

        assert statuses == [200, 403, 401, 401]
        assert [(one.code, one.key) for one in it.heard(KeyRefused)] == [
            ("FORBIDDEN", "ci"),
            ("UNAUTHORIZED", ""),
            ("UNAUTHORIZED", ""),
        ]
        known, unknown, none = (one.fingerprint for one in it.heard(KeyRefused))
        assert (known, len(unknown), none) == ("", 6, "")

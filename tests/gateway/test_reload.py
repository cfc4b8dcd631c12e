"""A reload over HTTP: for admins, with what has changed, or which keys are in the way."""

from hive.errors import ReloadRefused
from tests.gateway.serving import bearer, key, serving
from tests.patience import awaited

PATH = "/hive/v1/reload"


@awaited
async def test_what_changed_is_told() -> None:
    async with serving() as it:

        async def reload(by: str) -> list[str]:
            return [by, "server.drain_s"]

        it.reload = reload
        answer, told = await it.ask("POST", PATH)

        assert (answer.status, told) == (200, {"changed": ["HTTP", "server.drain_s"]})


@awaited
async def test_a_refusal_names_every_key_and_says_what_to_do() -> None:
    async with serving() as it:

        async def reload(_by: str) -> list[str]:
            raise ReloadRefused(keys=["server.port", "models.x (added)"])

        it.reload = reload
        answer, told = await it.ask("POST", PATH)

        assert (answer.status, told["error"]["code"]) == (409, "RELOAD_REFUSED")
        details = told["error"]["details"]
        assert details["keys"] == ["server.port", "models.x (added)"]
        assert "Restart hive" in details["suggested_action"]
        assert details["retryable"] is False


@awaited
async def test_only_admins_may() -> None:
    async with serving(auth={"keys": [key("ops", "admin"), key("ci")]}) as it:
        statuses = [
            (await it.ask("POST", PATH, None, **headers))[0].status
            for headers in (bearer("ops"), bearer("ci"), {})
        ]

        assert statuses == [200, 403, 401]
        assert (await it.ask("GET", PATH, None, **bearer("ops")))[0].status == 405


@awaited
async def test_keys_change_at_once_and_what_is_in_use_still_counts() -> None:
    """R034: a revoked key opens nothing any more; one that stays keeps its quota."""
    ci = {**key("ci"), "max_concurrent": 1}
    async with serving(auth={"keys": [ci, key("old")]}) as it:
        assert (await it.chat(**bearer("old")))[0].status == 200
        keys = it.settings.auth.keys
        caller = it.gateway._doorkeeper._keys[0][1]
        caller.quota.in_flight = 1
        new = keys[0].model_copy(update={"name": "new", "sha256": key("new")["sha256"]})
        auth = it.settings.auth.model_copy(update={"keys": (keys[0], new)})
        it.gateway.apply(it.settings.model_copy(update={"auth": auth}))

        statuses = [(await it.chat(**bearer(name)))[0].status for name in ("old", "new", "ci")]
        assert statuses == [401, 200, 429]
        caller.quota.in_flight = 0
        assert (await it.chat(**bearer("ci")))[0].status == 200

"""Who asks, and whether they may."""

import hashlib

import pytest
from aiohttp.test_utils import make_mocked_request
from aiohttp.web import Request
from hypothesis import given
from hypothesis import strategies as st

from hive.errors import Forbidden, HiveError, Unauthorized
from hive.gateway.auth import ANYONE, Doorkeeper, fingerprint, needed_scope
from hive.policy.admission import Priority
from hive.settings import ApiKey

USER, ADMIN, SCRAPER = "hive_user", "hive_admin", "hive_scraper"


def key(name: str, value: str, *scopes: str, **other: object) -> ApiKey:
    sha256 = hashlib.sha256(value.encode()).hexdigest()
    return ApiKey.model_validate({"name": name, "sha256": sha256, "scopes": scopes, **other})


DOOR = Doorkeeper(
    (
        key("user", USER, "inference"),
        key("admin", ADMIN, "admin"),
        key("scraper", SCRAPER, "metrics"),
    )
)


def request(path: str = "/v1/chat/completions", **headers: str) -> Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return make_mocked_request("POST", path, headers=named)


def refused(asked: Request) -> HiveError:
    with pytest.raises(HiveError) as caught:
        DOOR.admit(asked)
    return caught.value


def test_without_configured_keys_everybody_may_everything() -> None:
    caller = Doorkeeper(()).admit(request())

    assert caller is ANYONE
    assert caller.may("inference")
    assert caller.may("admin")
    assert caller.may("metrics")


def test_without_configured_keys_nobody_is_held_to_a_quota_or_a_priority() -> None:
    caller = Doorkeeper(()).admit(request())

    assert (caller.quota.max_concurrent, caller.quota.per_minute) == (0, 0)
    assert (caller.priority, caller.highest) == (Priority.NORMAL, Priority.INTERACTIVE)


@pytest.mark.parametrize("priority", ["interactive", "normal", "batch"])
def test_a_keys_priority_is_its_requests_and_the_most_that_it_may_ask_for(priority: str) -> None:
    door = Doorkeeper((key("ci", "hive_ci", "inference", priority=priority),))
    caller = door.admit(request(X_Api_Key="hive_ci"))

    assert caller.priority is caller.highest is Priority[priority.upper()]


def test_all_requests_of_a_key_share_its_quota_and_no_other_keys() -> None:
    """(R037)"""
    own = {"max_concurrent": 2, "requests_per_minute": 7}
    door = Doorkeeper(
        (key("ci", "hive_ci", "inference", **own), key("web", "hive_web", "inference", **own))
    )
    first, second, other = (
        door.admit(request(X_Api_Key=value)).quota for value in ("hive_ci", "hive_ci", "hive_web")
    )

    assert (first.max_concurrent, first.per_minute) == (2, 7)
    assert first is second
    assert first is not other


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_need_no_key(path: str) -> None:
    assert DOOR.admit(request(path)) is ANYONE


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {USER}"},
        {"Authorization": f"bearer {USER}"},
        {"Authorization": f"BEARER   {USER} "},
        {"X_Api_Key": USER},
        {"x_api_key": f" {USER} "},
    ],
    ids=["Bearer", "bearer", "spaces", "X-Api-Key", "x-api-key"],
)
def test_a_key_is_taken_from_either_header(headers: dict[str, str]) -> None:
    caller = DOOR.admit(request(**headers))

    assert caller.name == "user"
    assert caller.scopes == {"inference"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {USER}"},
        {"Authorization": USER},
        {"X_Api_Key": ""},
        {"X_Api_Key": "hive_other"},
        {"X_Api_Key": USER[:-1]},
        {"X_Api_Key": USER + "x"},
        {"X_Api_Key": USER.upper()},
        {"X_Api_Key": "x" * 100_000},
        {"Authorization": "Bearer wrong", "X_Api_Key": USER},
    ],
)
def test_anything_else_is_401(headers: dict[str, str]) -> None:
    """(R034)"""
    error = refused(request(**headers))

    assert isinstance(error, Unauthorized)
    assert error.status == 401


@given(st.text(min_size=1, max_size=200))
def test_no_other_text_opens_the_door(presented: str) -> None:
    """(R034)"""
    with pytest.raises(Unauthorized):
        DOOR._find(presented)


@given(st.text(min_size=7, max_size=200))
def test_a_refusal_shows_six_digits_of_a_hash_and_never_the_key(presented: str) -> None:
    """The fingerprint is for the log alone (R076)."""
    with pytest.raises(Unauthorized) as caught:
        DOOR._find(presented)
    error = caught.value

    assert presented not in error.message
    assert error.details["fingerprint"] == fingerprint(presented)
    assert len(fingerprint(presented)) == 6
    assert error.public_details == {}


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/livez", None),
        ("/readyz", None),
        ("/metrics", "metrics"),
        ("/v1/models", "any"),
        ("/v1/chat/completions", "inference"),
        ("/v1/responses/resp_1", "inference"),
        ("/tokenize", "inference"),
        ("/v1/load_lora_adapter", "admin"),
        ("/v1/unload_lora_adapter", "admin"),
        ("/hive/v1/status", "any"),
        ("/hive/v1/requests", "any"),
        ("/hive/v1/requests/abc", "any"),
        ("/hive/v1/sessions", "any"),
        ("/hive/v1/windows/a/thaw", "any"),
        ("/hive/v1/workers", "admin"),
        ("/hive/v1/workers/llama-0/logs", "admin"),
        ("/hive/v1/workers/llama-0/stop", "admin"),
        ("/hive/v1/devices", "admin"),
        ("/hive/v1/devices/cuda:0/release", "admin"),
        ("/hive/v1/drain", "admin"),
        ("/hive/v1/leaks", "admin"),
        ("/hive/v1/events", "admin"),
        ("/nothing/here", "inference"),
    ],
)
def test_each_path_needs_its_scope(path: str, scope: str | None) -> None:
    assert needed_scope(path) == scope


def test_one_models_card_needs_no_more_than_the_list() -> None:
    assert needed_scope("/v1/models/llama") == needed_scope("/v1/models")


@pytest.mark.parametrize(
    ("presented", "path", "may"),
    [
        (USER, "/v1/chat/completions", True),
        (USER, "/v1/models", True),
        (USER, "/hive/v1/status", True),
        (USER, "/metrics", False),
        (USER, "/hive/v1/workers", False),
        (USER, "/v1/load_lora_adapter", False),
        (ADMIN, "/hive/v1/workers", True),
        (ADMIN, "/metrics", True),
        (ADMIN, "/v1/chat/completions", False),
        (SCRAPER, "/metrics", True),
        (SCRAPER, "/hive/v1/workers", False),
        (SCRAPER, "/v1/chat/completions", False),
        (SCRAPER, "/v1/models", True),
    ],
)
def test_a_key_may_what_its_scopes_say(presented: str, path: str, may: bool) -> None:
    """Without the scope it is 403, and the scope is named (R035)."""
    asked = request(path, X_Api_Key=presented)
    if may:
        assert DOOR.admit(asked).name
        return
    error = refused(asked)

    assert isinstance(error, Forbidden)
    assert error.status == 403
    assert error.public_details["required_scope"] == needed_scope(path)


def test_a_path_in_other_letters_needs_the_same_scope() -> None:
    """The path is decoded before it is looked at, as it is before it is routed."""
    assert request("/v1/load_lora_adapte%72").path == "/v1/load_lora_adapter"
    assert isinstance(refused(request("/hive/v1/%77orkers", X_Api_Key=USER)), Forbidden)


@pytest.mark.parametrize("path", ["/v1/x/../load_lora_adapter", "/v1/./load_lora_adapter"])
def test_dots_in_a_path_do_not_lead_around_the_scope(path: str) -> None:
    assert isinstance(refused(request(path, X_Api_Key=USER)), HiveError)

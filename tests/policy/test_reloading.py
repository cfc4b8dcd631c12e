"""What is different between two settings, and what of it may change, by name."""

import pytest
from pydantic import BaseModel

from hive.policy.reloading import Change, differences, is_one_of
from hive.settings import Settings

MODEL = {"engine": "command", "device": "cpu", "command": ["x{socket}"]}
KEY = {"name": "ci", "sha256": "0" * 64}


def settings(**sections: object) -> Settings:
    return Settings.model_validate({"models": {"m": MODEL}, **sections})


def names(old: BaseModel, new: BaseModel) -> list[str]:
    return [change.key for change in differences(old, new)]


def test_the_same_is_no_difference() -> None:
    assert names(settings(), settings()) == []


@pytest.mark.parametrize(
    ("sections", "found"),
    [
        ({"server": {"port": 1}}, ["server.port"]),
        ({"server": {"port": 1, "drain_s": 1}}, ["server.port", "server.drain_s"]),
        ({"auth": {"keys": [KEY]}}, ["auth.keys.ci (added)"]),
        ({"models": {"m": MODEL, "a.b": MODEL}}, ['models."a.b" (added)']),
        ({"models": {"n": MODEL}}, ["models.m (removed)", "models.n (added)"]),
        ({"models": {"m": {**MODEL, "env": {"queue_depth": "1"}}}}, ["models.m.env"]),
        ({"models": {"m": {**MODEL, "timeouts": {"stall_s": 1}}}}, ["models.m.timeouts.stall_s"]),
        (
            {"windows": {"catalogue_url": "postgresql://u:hush@h/d"}},
            ["windows.catalogue_url"],
        ),
    ],
)
def test_each_difference_is_named_without_its_value(
    sections: dict[str, object], found: list[str]
) -> None:
    assert names(settings(), settings(**sections)) == found


def test_a_key_is_known_by_its_name_wherever_it_stands() -> None:
    other = {"name": "ops", "sha256": "1" * 64}
    old = settings(auth={"keys": [KEY, other]})

    assert names(old, settings(auth={"keys": [other, KEY]})) == []
    assert names(old, settings(auth={"keys": [{**KEY, "scopes": ["admin"]}]})) == [
        "auth.keys.ci.scopes",
        "auth.keys.ops (removed)",
    ]


@pytest.mark.parametrize(
    ("path", "fits"),
    [
        (("server", "port"), True),
        (("server",), False),
        (("server", "port", "x"), False),
        (("timeouts", "stall_s"), True),
        (("timeouts",), False),
        (("models", "a.b", "queue_depth"), True),
        (("models", "a", "env", "queue_depth"), False),
        (("models", "a.queue_depth"), False),  # a model of that name
        (("models", "queue_depth"), False),
        (("models", "m", "timeouts", "stall_s"), True),
    ],
)
def test_a_pattern_fits_name_by_name(path: tuple[str, ...], fits: bool) -> None:
    patterns = ("server.port", "timeouts.*", "models.*.queue_depth", "models.*.timeouts.*")

    assert is_one_of(path, patterns) is fits
    assert Change(path).key.count('"') == 2 * sum("." in part for part in path)

"""Steps about the operator's Prometheus: a real one, with the rules that hive brings."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_bdd import given, parsers, then

from steps.operator import key_of
from steps.story import WORKER, Story
from steps.waiting import must
from tests.prometheus import Prometheus, server

WITHIN_S = 15  # a scrape, and an evaluation of every rule
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def prometheus() -> Iterator[Prometheus]:
    with server() as it:
        yield it


@given(
    parsers.parse(
        "the operator's Prometheus scrapes hive with the key \"{name}\", and has hive's rules"
    )
)
def _(story: Story, prometheus: Prometheus, name: str) -> None:
    prometheus.start(story.hive.port, key_of(name))
    must(lambda: prometheus.query("up == 1"), WITHIN_S, lambda: f"a scrape; {prometheus.targets()}")


@then(parsers.parse("the alert {alert} fires for the worker"))
def _(story: Story, prometheus: Prometheus, alert: str) -> None:
    must(lambda: prometheus.firing(alert), WITHIN_S, f"{alert} fires")
    (fires,) = prometheus.firing(alert)
    assert fires["labels"]["worker"] == WORKER
    assert WORKER in fires["annotations"]["summary"]
    story.kept["alert"] = fires


@then(parsers.parse("it is {severity}, and names an entry of the runbooks"))
def _(story: Story, severity: str) -> None:
    fires = story.kept["alert"]
    page, _, anchor = fires["annotations"]["runbook_url"].partition("#")
    titles = re.findall(r"^### (.*)$", (DOCS.parent / page).read_text(), flags=re.MULTILINE)

    assert fires["labels"]["severity"] == severity
    assert anchor in [title.lower() for title in titles]


@then(parsers.parse("the alert {alert} is over"))
def _(prometheus: Prometheus, alert: str) -> None:
    must(lambda: not prometheus.firing(alert), WITHIN_S, f"{alert} is over")


@then("no alert fires or is about to")
def _(prometheus: Prometheus) -> None:
    must(prometheus.has_evaluated, WITHIN_S, "every rule evaluated, of what was just scraped")
    assert prometheus.api("alerts")["alerts"] == []

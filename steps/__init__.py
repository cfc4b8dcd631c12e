"""The steps of the features, by noun; this index is the plugin that pytest loads (`-p steps`)."""

import re
from collections.abc import Callable

import pytest

pytest_plugins = [
    "steps.leaks",
    "steps.driver",
    "steps.real",
    "steps.deaths",
    "steps.hanging_engine",
    "steps.story",
    "steps.daemon",
    "steps.workers",
    "steps.engines",
    "steps.devices",
    "steps.gpu",
    "steps.leftovers",
    "steps.requests",
    "steps.admission",
    "steps.hanging",
    "steps.operator",
    "steps.watching",
]


@pytest.hookimpl(tryfirst=True)
def pytest_bdd_apply_tag(tag: str, function: Callable[..., object]) -> bool | None:
    """@R057 names a requirement (docs/requirements.md lists them); it is no marker."""
    if re.fullmatch(r"R\d{3}", tag):
        pytest.mark.requirement(tag)(function)
        return True
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="Many times over what is done once.")

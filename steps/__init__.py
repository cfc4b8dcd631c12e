"""The steps of the features, by noun; this index is the plugin that pytest loads (`-p steps`)."""

import re
import signal
from collections.abc import Callable

import pytest

# These look at what the whole host has: its groups, its shared memory, other people's processes.
HOST_WIDE = {
    "test_asking.py",
    "test_cgroup.py",
    "test_guard.py",
    "test_init.py",
    "test_leftovers.py",
    "test_process.py",
}
REAL_S = 600  # for a scenario that starts the real engine, perhaps twice
LONG = {
    "test_freeze_kills.py",
    "test_fuzz.py",
    "test_kills.py",
    "test_openapi.py",
    "test_overload.py",
    "test_permits.py",
    "test_soak.py",
}
pytest_plugins = [
    "steps.leaks",
    "steps.driver",
    "steps.real",
    "steps.deaths",
    "steps.hanging_engine",
    "steps.real_memory",
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
    "steps.memory",
    "steps.backup",
    "steps.mcp",
    "steps.chaos",
    "steps.operator",
    "steps.auditing",
    "steps.postgres",
    "steps.prometheus",
    "steps.redaction",
    "steps.recount",
    "steps.watching",
    "steps.alerts",
]


@pytest.hookimpl(tryfirst=True)
def pytest_bdd_apply_tag(tag: str, function: Callable[..., object]) -> bool | None:
    """@R057 names a requirement (docs/requirements.md lists them); it is no marker."""
    if re.fullmatch(r"R\d{3}", tag):
        pytest.mark.requirement(tag)(function)
        return True
    return None


def pytest_configure() -> None:
    """Started in the background of a shell, everything ignores Ctrl+C: programs under test must not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="Many times over what is done once.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Most tests may run side by side; what takes long begins first, so that nobody waits for it.

    The real engine comes before all else: in other tests the kernel kills for memory, and a death in
    the half minute after that may be laid to it.
    """
    for item in items:
        is_real = item.get_closest_marker("engine") is not None
        if item.path.name in HOST_WIDE:
            item.add_marker(pytest.mark.host)
        if is_real and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(REAL_S))
    items.sort(
        key=lambda item: (
            item.path.name not in LONG,
            item.get_closest_marker("engine") is None,
        )
    )

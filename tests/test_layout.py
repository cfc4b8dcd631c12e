"""The tests have the shape of the code: a twin for every module, real things instead of mocks."""

import ast
import re
import tomllib
from pathlib import Path

TOP = Path(__file__).parents[1]

# Modules without a twin, each with the reason; one that has got its twin must leave this list.
NO_TWIN = {
    "daemon": "ties the parts together: every feature runs it",
    "gateway/app": "the way of every request: features/serving",
    "cli/client": "the way to a daemon: features/operating; its exit codes in tests/cli/test_init",
    "cli/serve": "starts the daemon: every feature; its exit codes in tests/cli/test_init",
    "cli/engine": "its commands run in tests/cli/test_installing",
    "cli/status": "asks a daemon: features/operating",
    "cli/reload": "asks a daemon: tests/cli/test_audit and features/operating",
    "cli/worker": "asks a daemon: features/operating",
    "workers/ports": "a Protocol, nothing that runs",
    "storage/migrations/env": "Alembic runs it: tests/storage/test_tables",
    "storage/migrations/versions/v0001_sessions_and_windows": "run by tests/storage/test_tables",
    "storage/migrations/versions/v0002_flat": "run by tests/storage/test_tables",
}
# Markers that nothing bears yet.
PLANNED: set[str] = set()


def twin(module: Path) -> Path:
    """tests/policy/test_restarts.py for hive/policy/restarts.py."""
    inside = module.relative_to(TOP / "hive")
    return TOP / "tests" / inside.parent / f"test_{inside.stem.strip('_')}.py"


def runs(module: Path) -> bool:
    """Whether there is more in a module than its docstring and its version."""
    body = ast.parse(module.read_text()).body
    return any(not isinstance(part, ast.Expr | ast.Assign | ast.Import) for part in body)


def test_every_module_has_a_twin_or_a_reason() -> None:
    alone = {
        str(module.relative_to(TOP / "hive").with_suffix(""))
        for module in (TOP / "hive").rglob("*.py")
        if runs(module) and not twin(module).is_file()
    }

    assert alone == set(NO_TWIN), "write the twin, or correct NO_TWIN"


def test_nothing_is_mocked() -> None:
    """What stands in for the outside world is a program of its own (tests/doubles)."""
    mock = re.compile(r"\b(unittest\.mock|mock\.patch|MagicMock|AsyncMock)\b")
    found = [
        str(file.relative_to(TOP))
        for folder in ("tests", "steps")
        for file in (TOP / folder).rglob("*.py")
        if file != Path(__file__) and mock.search(file.read_text())
    ]

    assert found == []


def test_every_registered_marker_is_used() -> None:
    options = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {re.split(r"[:(]", marker)[0] for marker in options["markers"]}
    features = "".join(file.read_text() for file in (TOP / "features").rglob("*.feature"))
    code = "".join(
        file.read_text() for folder in ("tests", "steps") for file in (TOP / folder).rglob("*.py")
    )
    used = set(re.findall(r"@(\w+)", features)) | set(re.findall(r"pytest\.mark\.(\w+)", code))

    assert markers - used == PLANNED

"""`hive mcp`: what is wrong usage; what it becomes is in tests/mcp."""

import subprocess
import sys

import pytest

from hive import cli


@pytest.mark.parametrize(
    "args",
    [
        ["--transport", "carrier pigeon"],
        ["--port", "99999"],
        ["--api-key", "two\nlines"],
        ["--log-level", "loud"],
        ["now"],
    ],
)
def test_wrong_usage_is_told_as_such(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["mcp", *args]) == 2
    assert capsys.readouterr().err


def test_without_the_library_it_says_what_to_install() -> None:
    """An extra: a daemon needs none of it."""
    code = (
        "import importlib.util as util, sys\n"
        "from hive import cli\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'mcp' else find(name, *more)\n"
        "sys.exit(cli.main(['mcp']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "pip install 'hive[mcp]'" in ran.stderr

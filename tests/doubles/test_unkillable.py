"""What is frozen survives SIGKILL, and never the test that froze it."""

import subprocess
from collections.abc import Iterator

import pytest

from hive.workers import guard
from tests.doubles.unkillable import WHY_NOT, Freezer
from tests.patience import wait_until

pytestmark = pytest.mark.skipif(not Freezer.is_available(), reason=WHY_NOT)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def state(process: subprocess.Popen[bytes]) -> str:
    seen = guard.look_at(process.pid)
    return seen.state if seen else "gone"


def test_a_frozen_process_survives_sigkill_until_it_is_thawed(
    sleeper: subprocess.Popen[bytes],
) -> None:
    with Freezer() as freezer:
        freezer.freeze(sleeper.pid)
        sleeper.kill()
        with pytest.raises(subprocess.TimeoutExpired):
            sleeper.wait(0.2)
        assert state(sleeper) == "D"

        freezer.thaw()
        assert sleeper.wait(10) == -9


def test_a_test_that_fails_leaves_nothing_frozen(sleeper: subprocess.Popen[bytes]) -> None:
    freezer = Freezer()

    def fail() -> None:
        with freezer:
            freezer.freeze(sleeper.pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    wait_until(lambda: state(sleeper) == "S", "the process to go on")
    assert freezer._group
    assert not freezer._group.exists()


def test_what_is_gone_cannot_be_frozen(sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.kill()
    sleeper.wait()
    with Freezer() as freezer, pytest.raises(ProcessLookupError):
        freezer.freeze(sleeper.pid)

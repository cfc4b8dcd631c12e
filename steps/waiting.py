"""Waiting for something to become true, with a deadline: the only place where tests wait."""

import threading
import time
from collections.abc import Callable

LOOK_S = 0.01
LATER_S = 0.1  # what has not happened within seconds is waited for without slowing it down
PATIENT_AFTER_S = 3.0


def until(is_so: Callable[[], object], seconds: float) -> bool:
    """Whether `is_so()` became true within `seconds`."""
    began = time.monotonic()
    pause = threading.Event()
    while True:
        if is_so():
            return True
        waited = time.monotonic() - began
        if waited > seconds:
            return False
        pause.wait(LOOK_S if waited < PATIENT_AFTER_S else LATER_S)


def must(is_so: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> None:
    """Fail the test, saying `what` did not happen."""
    if not until(is_so, seconds):
        said = what if isinstance(what, str) else what()
        raise AssertionError(f"not within {seconds:g} s: {said}")


def holds(is_so: Callable[[], object], seconds: float, what: str) -> None:
    """Fail the test if it stops being so within `seconds`: what must not happen has no event."""
    if until(lambda: not is_so(), seconds):
        raise AssertionError(f"not for {seconds:g} s: {what}")

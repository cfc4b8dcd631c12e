"""`python -m hive`, and the console script: every way out has a documented exit code."""

import contextlib
import os
import sys
import threading
from typing import NoReturn

INTERNAL = 70  # every uncaught exception, import errors included
LEAVE_S = 5.0  # longer than logs.FLUSH_S


def main() -> None:
    """Run the command line and exit (R060-R064, C17)."""
    last_words = ""
    try:
        from hive.cli import main as run  # noqa: PLC0415 (an import error must end as 70, too)

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    except Exception:  # noqa: BLE001 (the outermost boundary)
        import traceback  # noqa: PLC0415

        last_words = f"{traceback.format_exc()}hive: internal error (exit {INTERNAL}); please report the lines above\n"
        status = INTERNAL
    _leave(status, last_words)


def _leave(status: int, last_words: str) -> NoReturn:
    """End at once: tidying modules up takes longer than all that hive does at its end, and a
    thread that hangs in a driver would be waited for. So would whoever does not read stderr."""
    with contextlib.suppress(RuntimeError):  # no more threads can be had
        tidying = threading.Thread(target=_tidy_up, args=(last_words,), daemon=True)
        tidying.start()
        tidying.join(LEAVE_S)
    os._exit(status)


def _tidy_up(last_words: str) -> None:
    if logging := sys.modules.get("logging"):
        logging.shutdown()
    with contextlib.suppress(Exception):  # their reader left, or they were closed
        sys.stderr.write(last_words)
        sys.stderr.flush()
        sys.stdout.flush()


if __name__ == "__main__":
    main()

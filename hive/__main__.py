"""`python -m hive`, and the console script: every way out has a documented exit code."""

import contextlib
import os
import sys
from typing import NoReturn

INTERNAL = 70  # every uncaught exception, import errors included


def main() -> None:
    """Run the command line and exit (R060-R064, C17)."""
    try:
        from hive.cli import run  # noqa: PLC0415 (an import error must end as 70, too)

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # The reader of our output left (`hive status | head`): that is no failure of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception:  # noqa: BLE001 (the outermost boundary)
        import traceback  # noqa: PLC0415

        traceback.print_exc()
        print("hive: internal error (exit 70); please report the lines above", file=sys.stderr)  # noqa: T201
        status = INTERNAL
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End at once: tidying modules up takes longer than all that hive does at its end, and a
    thread that hangs in a driver would be waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader left, or it was closed
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()

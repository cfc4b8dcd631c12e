"""Run the engine double: `python -I -S tests/doubles/engine --uds PATH …`."""

import sys
from os.path import abspath, dirname

# Run as a directory, the modules beside this file would be top-level names; they are not.
sys.path[0] = dirname(dirname(dirname(dirname(abspath(__file__)))))
sys.modules["ssl"] = None  # type: ignore[assignment]  # asyncio does without, 5 ms sooner

from tests.doubles.engine.server import main  # noqa: E402

main(sys.argv[1:])

"""Run the LMCache double: `python -I tests/doubles/lmcache [knobs] server --port P …`."""

import sys
from os.path import abspath, dirname

# Run as a directory, the modules beside this file would be top-level names; they are not.
sys.path[0] = dirname(dirname(dirname(dirname(abspath(__file__)))))

from tests.doubles.lmcache.server import main  # noqa: E402

main(sys.argv[1:])

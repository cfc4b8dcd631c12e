"""The real LMCache with its own fault injection before its files: some loads fail, lookups do not.

`python faulty_lmcache.py PROGRAM…`: the rate is in the file `load-faults` beside its tier, if there
is one at the start.
"""

import json
import os
import sys
from pathlib import Path

FILE = "load-faults"


def wrapped(program: list[str]) -> list[str]:
    """With the server's adapter inside LMCache's `fault_inject`, where a rate is given."""
    at = program.index("--l2-adapter") + 1
    inner = json.loads(program[at])
    file = Path(inner["base_path"]).parent / FILE
    if not file.exists():
        return program
    faulty = {"type": "fault_inject", "inner": inner, "rate": float(file.read_text()), "seed": 7}
    return [*program[:at], json.dumps(faulty), *program[at + 1 :]]


if __name__ == "__main__":
    told = wrapped(sys.argv[1:])
    os.execv(told[0], told)

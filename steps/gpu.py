"""Steps on a real GPU: a torch process in the engine's place, VRAM as the driver counts it.

What is missing skips a scenario and says so. The driver is asked in a process of its own, because
this one may have loaded the driver's double (tests/doubles/nvml). docs/gpu.md tells how to run it.
"""

from steps.driver import ROOT

PROGRAM = ROOT / "tests" / "doubles" / "torch_engine.py"

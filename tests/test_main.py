"""What `hive serve` does not import, so that its own environment and memory stay small."""

import subprocess
import sys

HEAVY = ("torch", "vllm", "lmcache", "transformers", "huggingface_hub", "mcp", "tomlkit")


def test_serving_imports_no_engine_no_hub_and_no_mcp() -> None:
    code = (
        "import sys, hive.__main__, hive.cli, hive.cli.serve, hive.daemon, uvloop\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""What the real LMCache calls its blocks: prints the cases that tests/policy/test_windows.py reads.

Run by the engine environment's Python, which has LMCache 0.5.6, and kept beside this file:
ENGINE/bin/python tests/policy/lmcache_names.py > tests/policy/lmcache_names.json
"""

import json
import random
from typing import Any

from lmcache.v1.distributed.api import ObjectKey  # type: ignore[import-not-found]
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import (  # type: ignore[import-not-found]
    _object_key_to_filename,
)
from lmcache.v1.multiprocess.token_hasher import TokenHasher  # type: ignore[import-not-found]

SEED = 20261121
CASES = (("/state/m/llama", 1, 32, "s-1"), ("/m/a b", 4, 16, ""), ("hub/id", 8, 256, "x" * 22))
SIZES = (0, 31, 32, 97, 640)


def case(model: str, workers: int, chunk: int, salt: str) -> dict[str, Any]:
    chance = random.Random(SEED)
    prompts = []
    for size in SIZES:
        tokens = [chance.randrange(2**32) for _ in range(size)]
        blocks = [
            [
                _object_key_to_filename(
                    ObjectKey(
                        model_name=model,
                        chunk_hash=one,
                        kv_rank=ObjectKey.ComputeKVRank(workers, worker, workers, worker),
                        object_group_id=0,
                        cache_salt=salt,
                    )
                )
                for worker in range(workers)
            ]
            for one in TokenHasher(chunk).compute_chunk_hashes(tokens)
        ]
        prompts.append({"tokens": tokens, "blocks": blocks})
    return {
        "model": model,
        "workers": workers,
        "chunk_tokens": chunk,
        "salt": salt,
        "prompts": prompts,
    }


if __name__ == "__main__":
    print(json.dumps([case(*one) for one in CASES]))

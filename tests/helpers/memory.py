"""Compress a model in a process of its own and tell how much memory that took.

    python tests/helpers/memory.py MODEL RECIPE.json OUTPUT CACHE_BYTES [LIMIT_BYTES]

Prints, as JSON, resident bytes before and at the highest, and the address space that was allowed. With LIMIT_BYTES the
process may take only so many more bytes of address space than it has after its imports (ulimit -v).
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama

import cospadi


def status(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(model: str, recipe: str, output: str, cache_bytes: str, limit: str = "0") -> None:
    torch.set_num_threads(1)
    assert transformers.models.llama.modeling_llama
    before, address_space = status("VmRSS"), status("VmSize") + int(limit)
    if int(limit):
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    cospadi.compress(model, json.loads(Path(recipe).read_text()), output, cache_bytes=int(cache_bytes))
    print(json.dumps({"before": before, "peak": status("VmHWM"), "address_space": address_space}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Compress a model by six recipes and print one sha256 of each output folder: equal lines are equal bytes.

    python benchmarks/bytes.py MODEL --calibration FILE [--sequences 32] [--iterations 8] [--files]

The hash is over the names of all files in the folder and the sha256 of each, so that a change of the code which is to
keep the bytes of every recipe can be held to that: run it before and after, on one machine, and compare. One thread.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch

import cospadi

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fisher": {"metric": "fisher"},
    "unrefined": {"refine": 0},
    "weights": {"metric": "weights"},
    "mod-htp": {"method": "mod-htp", "share": "layers:2"},
    "paper": {"method": "paper"},
}


def folder_hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    """One line a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--only", choices=RECIPES)
    parser.add_argument("--files", action="store_true", help="a line for each file, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, fields in RECIPES.items():
        if options.only not in (None, name):
            continue
        asked = {"ratio": options.ratio, "iterations": options.iterations, **fields}
        asked |= {"calibration": options.calibration, "sequences": options.sequences}
        with tempfile.TemporaryDirectory() as scratch:
            cospadi.compress(options.model, asked, Path(scratch) / "model")
            hashes = folder_hashes(Path(scratch) / "model")
        whole = hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()
        print(f"{name:<14} {whole}", flush=True)
        if options.files:
            for file, digest in hashes.items():
                print(f"    {digest} {file}")


if __name__ == "__main__":
    main()

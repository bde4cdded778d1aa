"""Compress a model and write the checkpoint.

    python examples/compress.py                                    # the built-in model, to ./demo-small
    python examples/compress.py meta-llama/Llama-3.2-1B llama-small --ratio 0.2

The built-in model gets a recipe that takes seconds. Any other gets the default one, which takes longer and loses less.
"""

import argparse

import cospadi

QUICK = {"calibration": "builtin", "sequences": 16, "length": 256, "iterations": 8}
QUICK |= {"metric": "output", "refine": 0}
"""Some seconds: little text, few iterations, no gradients."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress a model and write the checkpoint.")
    parser.add_argument("model", nargs="?", default="demo", help="folder, hub name, or demo: the built-in model")
    parser.add_argument("output", nargs="?", default="demo-small", help="folder to write")
    parser.add_argument("--ratio", type=float, default=0.3, help="how much of the projections' bytes to remove")
    options = parser.parse_args()

    recipe = {"ratio": options.ratio} | (QUICK if options.model == "demo" else {})
    result = cospadi.compress(options.model, recipe, options.output)

    mean_error = sum(result.errors.values()) / len(result.errors)
    print(f"{options.output}: ratio {result.plan.ratio:.4f}, mean relative error {mean_error:.4f}")
    print(f"tensors: {result.bytes_before:,} bytes before, {result.bytes_after:,} after")


if __name__ == "__main__":
    main()

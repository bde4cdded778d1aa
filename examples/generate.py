"""Load a compressed model with plain transformers and let it continue a prompt.

python examples/generate.py                                    # what compress.py wrote
python examples/generate.py llama-small "Once upon a time"
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import cospadi  # noqa: F401  registers the format; without it from_pretrained stops with a size mismatch


def main() -> None:
    parser = argparse.ArgumentParser(description="Load a compressed model and let it continue a prompt.")
    parser.add_argument("model", nargs="?", default="demo-small", help="folder that compress.py wrote")
    parser.add_argument("prompt", nargs="?", default="def __init__(self, ", help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to add")
    options = parser.parse_args()
    if not Path(options.model).is_dir():
        parser.error(f"there is no folder {options.model}. examples/compress.py writes one")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    inputs = tokenizer(options.prompt, return_tensors="pt")
    set_seed(0)
    output = model.generate(**inputs, max_new_tokens=options.tokens, do_sample=True, temperature=0.7)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()

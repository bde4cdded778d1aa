"""Which families of causal decoders the main job takes: a tiny random model of each, compressed, loaded, run.

python benchmarks/families.py table --output docs/families.md
python benchmarks/families.py try llama gpt_oss
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import cospadi

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
import tiny_families as families  # type: ignore[import-not-found]

RECIPE: dict[str, Any] = {"ratio": 0.3, "iterations": 2, "gradient_sequences": 2, "refine": 2}
TEXT: dict[str, Any] = {"sequences": 4, "length": 24}
HEAD = """\
# Families of models

Written by `python benchmarks/families.py table --output docs/families.md`, which builds a tiny random model of every
family that transformers {version} lists for causal language models and for models that read images or sound and
write text, saves it, and takes it through the main job twice, from its folder block by block and loaded in memory:
calibrate, compress at 0.3, write, open the output and compare its logits with the job's own model, load, generate.

**{works}** of {all} work, {refused} are refused in a sentence, and {rest} do not run on tokens alone, or not here. What
a family's classes hold beside plain linear layers stays as it is; the last column says so. *Whole*: blocks do not
simply follow each other, so that the model is loaded whole, and solved without compensation and refinement.

| family | works | what stays dense, or why it is refused |
|---|---|---|
"""
app = typer.Typer(add_completion=False)


class Outcome(NamedTuple):
    """What became of a family: whether it works, and what is to be said of it."""

    works: bool
    note: str


def attempt(kind: str, scratch: Path, **changes: Any) -> Outcome:
    """Take a tiny model of a family through the main job, from disk and in memory, and run what it wrote.

    Raises:
        AssertionError: the two outputs differ, or what was written does not load and generate as the source does.
    """
    if kind in families.CANNOT:
        return Outcome(False, families.CANNOT[kind])
    model, tokenizer = families.tiny_model(kind), byte_tokenizer()
    source, output, second = scratch / "source", scratch / "output", scratch / "second"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    text = scratch / "text.txt"
    text.write_text(" ".join(f"{n} squared is {n * n}, halved {n / 2}." for n in range(160)), encoding="utf-8")
    recipe = RECIPE | TEXT | {"calibration": str(text)} | changes
    try:
        with _warnings() as told:
            cospadi.compress(source, recipe, output)
            loaded = families.auto_class(kind).from_pretrained(source)
            cospadi.compress(loaded, recipe, second, tokenizer=tokenizer)
    except cospadi.UserError as error:
        return Outcome(False, str(error).replace(str(source), "the folder"))
    assert load_file(output / "model.safetensors").keys() == load_file(second / "model.safetensors").keys()
    again, other = (families.auto_class(kind).from_pretrained(folder).eval() for folder in (output, second))
    tokens = torch.arange(1, 49).view(2, 24)
    with torch.no_grad():
        one, two = (each(input_ids=tokens, use_cache=False).logits for each in (again, other))
        assert (one - two).norm() <= 0.02 * one.norm()  # layouts in memory may differ, and so the last bits
        if _generates(model, tokens):
            assert _generates(again, tokens)
    return Outcome(True, "; ".join(dict.fromkeys(map(_short, told))))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of the first 200 characters that stand for bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:200]
    bytewise = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise)


def _generates(model: Any, tokens: torch.Tensor) -> bool:
    try:
        model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False)
    except Exception:  # some need more than tokens
        return False
    return True


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the job warns of inside this block."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("cospadi")
    log.addHandler(handler)
    try:
        yield told
    finally:
        log.removeHandler(handler)


def _short(warning: str) -> str:
    """A warning in a few words."""
    if warning.startswith("blocks of this model do not simply follow"):
        return "whole"
    what, _, names = warning.partition(" stay dense: ")
    kinds = dict.fromkeys(name.partition(".*.")[2].partition(".")[0] for name in names.split(", "))
    return f"{what}: {', '.join(kinds)}" if names else warning


@app.command("try")
def try_some(kinds: list[str]) -> None:
    """Try some families, and tell."""
    for kind in kinds:
        with tempfile.TemporaryDirectory() as scratch:
            print(kind, *attempt(kind, Path(scratch)))


@app.command()
def table(output: Annotated[Path | None, typer.Option(help="the page; without it, it is printed")] = None) -> None:
    """Try all families, and write the page."""
    found = {}
    for kind in families.FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            found[kind] = attempt(kind, Path(scratch))
    works = sum(outcome.works for outcome in found.values())
    rest = len(families.CANNOT)
    version = transformers.__version__.rpartition(".")[0]
    page = HEAD.format(version=version, works=works, all=len(found), refused=len(found) - works - rest, rest=rest)
    page += "".join(f"| {kind} | {'yes' if works else 'no'} | {note} |\n" for kind, (works, note) in found.items())
    if output is None:
        print(page, end="")
    else:
        output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    app()

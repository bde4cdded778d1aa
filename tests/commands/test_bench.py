"""`cospadi bench`, and what a loaded model takes of memory."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from transformers import AutoModelForCausalLM, LlamaConfig

from cospadi.commands import bench
from cospadi.commands.report import scores
from cospadi.format import packing, safetensors
from cospadi.format.card import PLACE
from cospadi.format.schema import StoredProjection
from cospadi.model import load
from cospadi.model.projections import find_projections
from cospadi.runtime import op
from cospadi.runtime.layer import CompressedLinear, set_runtime
from cospadi.runtime.swap import mark_compressed, swap_in_layers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc")


def write_random(folder: Path, hidden: int, blocks: int, k: int) -> Path:
    """A compressed Llama whose masks are random bits and whose values are all one number."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=blocks, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=512, max_position_embeddings=256,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    masks, entries = {}, {}
    for projection in find_projections(model):
        masks[projection.name] = torch.randint(256, (projection.d2, k // 8), dtype=torch.uint8, generator=generator)
        entries[projection.name] = StoredProjection(
            dictionary="stored", support="mask", values="f14", d1=projection.d1, d2=projection.d2, k=k,
            nnz=packing.popcount(masks[projection.name]) // 4 * 4, owner=projection.name,
        )  # fmt: skip
        surplus = packing.popcount(masks[projection.name]) % 4
        for bit in range(8):  # a stream of whole bytes: the last atoms of the first column go
            if surplus and masks[projection.name][0, 0] >> bit & 1:
                masks[projection.name][0, 0] -= 1 << bit
                surplus -= 1
    swap_in_layers(model, entries, torch.bfloat16, "meta")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            module.support.copy_(masks[name])
            module.values.copy_(packing.pack_values(torch.full((module.nnz,), 0.01), 14))
    mark_compressed(model, entries)
    model.save_pretrained(folder)
    return folder


def test_a_loaded_model_takes_what_its_packed_weights_take(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "model", 2048, 4, 1200)
    packed = safetensors.tensor_bytes(folder)
    assert packed > 200e6
    memory = bench._in_new_process(folder, 32, 1, torch.device("cpu"), "packed")
    assert memory.weights is not None
    assert memory.tensors == pytest.approx(packed, rel=0.005)  # with where each column's values begin
    assert memory.weights == pytest.approx(packed, rel=0.02)


def test_decoding_keeps_nothing_unpacked(tmp_path: Path) -> None:
    model: Any = load.load_model(write_random(tmp_path / "model", 64, 2, 40), torch.device("cpu"))
    before = bench.tensor_bytes(model)
    bench._decode(model, 2, 2, torch.device("cpu"))
    bench._prefill(model, 40, torch.device("cpu"))
    layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    if op.has_kernel(torch.empty(1, 1), layers[0].support, layers[0].values, "mask", "f14"):
        assert bench.tensor_bytes(model) == before
    model_dense = sum(layer.in_features * layer.out_features * 2 for layer in layers)
    for layer in layers:
        layer.set_runtime("dense")
    assert bench.tensor_bytes(model) == before + model_dense


def test_what_bench_prints(
    run: Callable[..., Answer], tmp_path: Path, dense_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_random(tmp_path / "model", 64, 2, 40)
    words = ["--repeats", "2", "--tokens", "2", "--batch", "1", "--batch", "3", "--prefill", "20", "--threads", "1"]
    answer = run("bench", folder, "--against", dense_folder, *words, "--json")
    assert answer.code == 0, answer.err
    models = json.loads(answer.out)["models"]
    assert [model["model"] for model in models] == [str(dense_folder), str(folder)]
    for model in models:
        assert [(speed["kind"], speed["size"]) for speed in model["speeds"]] == [
            ("prefill", 20), ("decode", 1), ("decode", 3)
        ]  # fmt: skip
        assert all(len(speed["runs"]) == 2 and min(speed["runs"]) > 0 for speed in model["speeds"])
        assert model["peak_resident_bytes"] > model["tensor_bytes"] > 0
    assert [speed["against_first"] for speed in models[0]["speeds"]] == [1, 1, 1]
    memory = bench.Memory(weights=123_400_000, peak=None, tensors=5_600_000, load_seconds=1.5)
    monkeypatch.setattr(bench, "_in_new_process", lambda *_: memory)  # two new processes are enough
    table = run("bench", folder, *words).out
    assert "decode, batch 3" in table
    assert re.search(r"resident after one token +123\.40 MB", table)
    assert re.search(r"peak resident +unknown", table)


def test_figures_go_into_the_card(
    run: Callable[..., Answer], compressed_folder: Path, dense_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(compressed_folder, tmp_path / "model")
    words = ["--repeats", "1", "--tokens", "1", "--batch", "1", "--batch", "2", "--prefill", "8", "--threads", "1"]
    answer = run("bench", folder, "--against", dense_folder, *words, "--card", "--json")
    assert answer.code == 0, answer.err
    (score,) = scores(folder)
    assert score.command == (
        f"cospadi bench {PLACE} --against {dense_folder.name} --prefill 8 --batch 1 --batch 2 --threads 1 --repeats 1 "
        "--tokens 1"
    )
    assert score.head == ["", "this model", dense_folder.name]
    dense, ours = json.loads(answer.out)["models"]
    assert score.rows[1] == [
        "batch 1, tokens/s",
        *(f"{one['speeds'][1]['tokens_per_second']:,.1f}" for one in (ours, dense)),
    ]
    assert score.rows[-1][1].endswith("threads: 1")
    assert run("report", folder).code == 0
    assert "batch 2, tokens/s" in (folder / "report.html").read_text()
    refused = run("bench", dense_folder, *words, "--card")
    assert (refused.code, "has no card" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["--prefill", "100000"], "positions"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--runtime", "quick"], "--runtime quick is not known"),
        (["--against", "no/such/model"], "no/such/model"),
    ],
)
def test_mistakes(run: Callable[..., Answer], dense_folder: Path, words: list[str], mentioned: str) -> None:
    answer = run("bench", dense_folder, *words)
    assert answer.code == 2
    assert mentioned in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("buffers", [False, True])
def test_a_model_offloaded_to_disk_computes_the_same(tmp_path: Path, buffers: bool) -> None:
    folder = write_random(tmp_path / "model", 64, 2, 40)
    model: Any = load.load_model(folder, torch.device("cpu"))
    ids = torch.arange(6)[None]
    offload: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    moved: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", offload_buffers=buffers, **offload)
    with torch.no_grad():
        expected = model(ids).logits
        for runtime in ("auto", "unpacked", "dense", "packed"):
            set_runtime(moved, runtime)
            torch.testing.assert_close(moved(ids).logits, expected, rtol=2e-2, atol=2e-2)

"""vLLM serves what this package writes: the tokens of transformers, of every form, family and number of devices."""

from __future__ import annotations

import gc
import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config
from damage import damaged
from forms import write_mixed
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import cospadi
from cospadi.format.codecs.integers import INTEGERS
from cospadi.format.form import FORMS, Form
from cospadi.format.schema import read_config

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

import psutil  # of which vLLM brings its own

pytestmark = pytest.mark.vllm

PROMPTS = [[7, 3, 11, 250, 9, 14], [1, 30], list(range(40, 75)), [5]]
NEW = 12
"""Tokens that are generated."""


@pytest.fixture(autouse=True)
def small_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine in this process, of little memory."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True, "enforce_eager": True}
    llm = LLM(str(folder), **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: Any, adapter: Any = None) -> list[list[int]]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    found = llm.generate(prompts, greedy, use_tqdm=False, lora_request=adapter)
    return [list(one.outputs[0].token_ids) for one in found]


def tokens_of_vllm(folder: Path, **options: Any) -> list[list[int]]:
    with engine(folder, **options) as llm:
        return generate(llm)


def tokens_of_transformers(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        found.append(made[0, len(prompt) :].tolist())
    return found


FEW = [form for form in FORMS if form.values not in INTEGERS or form.values in ("int3g64", "int8")]
"""Forms that models are made of: two kinds of integers stand for all."""


def some_forms() -> list[dict[str, Form | None]]:
    """Forms by kind of projection, of models that have all forms, dense projections among them, mixed in all layers."""
    kinds, models = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], []
    identity = [form for form in FEW if form.dictionary == "identity"]
    stored = [form for form in FEW if form.dictionary == "stored"]
    left: list[Form | None] = [*identity, None, *stored, None]
    while left:
        part, left = left[:7], left[7:]
        models.append(dict(zip(kinds, cycle(part), strict=False)))
    return models


@pytest.fixture(scope="module")
def served_config() -> Any:
    """Of a model that vLLM's attention takes."""
    return llama_config(hidden_size=64, head_dim=32)


@pytest.mark.parametrize("forms", some_forms(), ids=str)
def test_every_form_gives_the_tokens_of_transformers(
    forms: dict[str, Form | None], served_config: Any, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    write_mixed(forms.get, make_model(served_config, torch.float32), tmp_path / "mixed")
    assert tokens_of_vllm(tmp_path / "mixed") == tokens_of_transformers(tmp_path / "mixed")


TWO = "0|1"
"""Cores of two devices."""


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["kv heads shared out", "kv heads on both"])
@pytest.mark.parametrize("forms", some_forms(), ids=range(len(some_forms())))
def test_two_devices_give_the_tokens_of_one(
    forms: dict[str, Form | None],
    kv_heads: int,
    make_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = llama_config(hidden_size=64, head_dim=32, num_key_value_heads=kv_heads)
    write_mixed(forms.get, make_model(config, torch.float32), tmp_path / "mixed")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", TWO)
    assert tokens_of_vllm(tmp_path / "mixed", tensor_parallel_size=2) == tokens_of_transformers(tmp_path / "mixed")


SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "phi3": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        *product(FAMILIES, [{"ratio": 0.3}, {"bits": 4}]),
        ("olmoe", {"ratio": 0.3, "solver": "eigen", "exclude": ["*.down_proj.1", "*.gate_up_proj.2"]}),
    ],
    ids=str,
)
def test_families_give_the_tokens_of_transformers(
    family: str, recipe: dict[str, Any], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    dense = make_model(config, torch.float32)
    cospadi.compress(dense, {"metric": "weights", "iterations": 8} | recipe, tmp_path / "out")
    assert tokens_of_vllm(tmp_path / "out") == tokens_of_transformers(tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen2", "phi3", "olmoe"])
def test_families_on_two_devices(
    family: str, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases added once, a projection that is stored merged, experts."""
    dense = make_model(AutoConfig.for_model(family, **SIZES | FAMILIES[family]), torch.float32)
    cospadi.compress(dense, {"metric": "weights", "iterations": 1, "ratio": 0.3}, tmp_path / "out")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", TWO)
    assert tokens_of_vllm(tmp_path / "out", tensor_parallel_size=2) == tokens_of_transformers(tmp_path / "out")


def test_a_dictionary_of_several_blocks(served_config: Any, make_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = {"metric": "weights", "ratio": 0.3, "solver": "svd", "share": "layers:2"}
    cospadi.compress(make_model(served_config, torch.float32), recipe, tmp_path / "out")
    owners = {entry.owner for entry in read_config(tmp_path / "out").values()}
    assert len(owners) < len(read_config(tmp_path / "out"))
    assert tokens_of_vllm(tmp_path / "out") == tokens_of_transformers(tmp_path / "out")


@pytest.mark.parametrize("recipe", [{"ratio": 0.3}, {"bits": 3}, {"ratio": 0.3, "solver": "eigen"}], ids=str)
def test_a_trained_model_compiled_batched_in_chunks_and_from_the_cache(
    recipe: dict[str, Any], shared_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two requests at a time of four, prompts in parts of 16 tokens; what is asked again is found in the cache."""
    cospadi.compress(shared_model("tiny-llama"), {"metric": "weights", "iterations": 8} | recipe, tmp_path / "out")
    expected = tokens_of_transformers(tmp_path / "out")
    scheduling = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "enable_chunked_prefill": True}
    with engine(tmp_path / "out", enforce_eager=False, enable_prefix_caching=True, **scheduling) as llm:
        assert generate(llm) == expected
        assert generate(llm) == expected


def test_the_transformers_backend(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which serves families that vLLM has no model of; in processes of its own, since it changes transformers'."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    assert tokens_of_vllm(whole, model_impl="transformers") == tokens_of_transformers(whole)


@pytest.mark.parametrize("recipe", [{"ratio": 0.3}, {"bits": 3}, {"ratio": 0.3, "solver": "eigen"}], ids=str)
def test_in_bf16_the_first_tokens_are_those_of_float32(
    recipe: dict[str, Any], shared_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """vLLM makes its dtype torch's default while weights are decoded."""
    cospadi.compress(shared_model("tiny-llama"), {"metric": "weights", "iterations": 8} | recipe, tmp_path / "out")
    found, expected = tokens_of_vllm(tmp_path / "out", dtype="bfloat16"), tokens_of_transformers(tmp_path / "out")
    assert [tokens[:2] for tokens in found] == [tokens[:2] for tokens in expected]


def test_an_adapter_beside_a_compressed_model(whole: Path, tmp_path: Path) -> None:
    """A LoRA as PEFT writes it, on compressed and on dense projections; what is expected has it in its weights."""
    from vllm.lora.request import LoRARequest

    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).dequantize()
    kinds, tensors = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"], {}
    generator = torch.Generator().manual_seed(0)
    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] in kinds:
            down = torch.randn(8, layer.in_features, generator=generator) * 0.2
            up = torch.randn(layer.out_features, 8, generator=generator) * 0.2
            layer.weight.data += 2 * up @ down
            tensors |= {f"base_model.model.{name}.lora_{part}.weight": one for part, one in (("A", down), ("B", up))}
    model.save_pretrained(tmp_path / "merged")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": kinds, "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    with engine(whole, enable_lora=True, max_lora_rank=8) as llm:
        assert generate(llm, LoRARequest("adapter", 1, str(adapter))) == tokens_of_transformers(tmp_path / "merged")
        assert generate(llm) == tokens_of_transformers(whole)


def test_registering_again_changes_nothing_and_other_checkpoints_are_left_alone(
    make_model: Callable[..., Path], served_config: Any
) -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from cospadi.integrations.vllm import register
    from cospadi.integrations.vllm.config import CospadiConfig

    assert "cospadi" in {one.name for one in entry_points(group="vllm.general_plugins")}
    for _ in range(2):
        register()
        assert QUANTIZATION_METHODS.count("cospadi") == 1
        assert get_quantization_config("cospadi") is CospadiConfig
    for method in ("gptq", "awq", "compressed-tensors", "fp8"):
        assert CospadiConfig.override_quantization_method({"quant_method": method}, None) is None
    dense = make_model(served_config, torch.float32)
    assert tokens_of_vllm(dense) == tokens_of_transformers(dense)


@pytest.fixture(scope="module")
def whole(served_config: Any, make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model that loads, to be copied and damaged."""
    folder: Path = tmp_path_factory.mktemp("whole") / "out"
    cospadi.compress(
        make_model(served_config), {"metric": "weights", "iterations": 1, "ratio": 0.3, "exclude": ["*.k_proj"]}, folder
    )
    return folder


def refusal(attempt: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  vLLM puts a sentence into an error of its own
        attempt()
    return str(refused.value)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["drop", "truncate", "rename", "reshape"])
def test_a_damaged_checkpoint_is_refused_at_start_in_the_words_of_transformers(
    kind: str, seed: int, whole: Path, tmp_path: Path
) -> None:
    assert damaged(whole, tmp_path / "damaged", kind, seed) is not None
    sentence = refusal(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "damaged"))
    assert sentence in refusal(lambda: tokens_of_vllm(tmp_path / "damaged"))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(format_version=3),
        lambda config: config.update(unknown=1),
        lambda config: config["projections"]["model.layers.0.mlp.up_proj"].update(values="f13"),
        lambda config: config["projections"]["model.layers.0.mlp.up_proj"].update(d2=81),
        lambda config: config["projections"]["model.layers.0.mlp.up_proj"].update(nnz=12),
        lambda config: config["projections"].update(nothing=config["projections"].pop("model.layers.0.mlp.up_proj")),
    ],
    ids=["version", "unknown field", "codec", "size", "count", "no such layer"],
)
def test_entries_that_lie_are_refused_at_start_in_the_words_of_transformers(
    change: Callable[[dict[str, Any]], Any], whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "damaged"))
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    sentence = refusal(lambda: AutoModelForCausalLM.from_pretrained(folder))
    assert sentence in refusal(lambda: tokens_of_vllm(folder))


TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


@contextmanager
def server(folder: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[str, dict[str, Any]], Any]]]:
    """A server's process, and what asks it: (path, body) -> the answer, of streams a list of events."""
    (log.parent / "template.jinja").write_text(TEMPLATE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--dtype", "float32", "--max-model-len", "64", "--enforce-eager", "--served-model-name", "model"]
    options += ["--chat-template", str(log.parent / "template.jinja"), "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options]

    def ask(path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            if body is None:
                connection.request("GET", path)
                return connection.getresponse().status
            greedy = {"model": "model", "temperature": 0, "max_tokens": NEW, "ignore_eos": True}
            connection.request("POST", path, json.dumps(greedy | body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            if not body.get("stream"):
                return json.loads(response.read())
            return [json.loads(line[len(b"data: ") :]) for line in response if line.startswith(b"data: {")]
        finally:
            connection.close()

    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as stream, subprocess.Popen(command, stdout=stream, stderr=stream, env=environment) as process:
        try:
            for _ in range(300):
                with suppress(OSError):
                    if ask("/health") == 200:
                        break
                assert process.poll() is None, log.read_text()
                time.sleep(1)
            yield process, ask
        finally:
            process.terminate()


def test_a_server_chats_streams_and_ends_when_its_worker_is_killed(whole: Path, tmp_path: Path) -> None:
    """Said in its log; the next start serves."""
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    with server(whole, tmp_path / "log") as (process, ask):
        plain = ask("/v1/completions", {"prompt": "ab", "logprobs": 2})["choices"][0]
        assert len(plain["logprobs"]["tokens"]) == len(plain["logprobs"]["token_logprobs"]) == NEW
        assert all(value <= 0 for value in plain["logprobs"]["token_logprobs"])
        events = ask("/v1/completions", {"prompt": "ab", "stream": True})
        assert "".join(event["choices"][0]["text"] for event in events) == plain["text"]
        told = ask("/v1/chat/completions", chat | {"logprobs": True, "top_logprobs": 3})["choices"][0]
        assert len(told["logprobs"]["content"]) == NEW
        events = ask("/v1/chat/completions", chat | {"stream": True})
        pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
        assert "".join(pieces) == told["message"]["content"]
        with ThreadPoolExecutor(8) as pool:
            each = pool.map(lambda _: ask("/v1/completions", {"prompt": "ab"}), range(16))
            assert {answer["choices"][0]["text"] for answer in each} == {plain["text"]}
            worker = next(child for child in psutil.Process(process.pid).children(True) if "Worker" in child.name())
            pending = [pool.submit(ask, "/v1/completions", {"prompt": "ab", "max_tokens": 50}) for _ in range(32)]
            worker.kill()
            failures = [one.exception() for one in pending]
        assert any(failures)  # none waits for ever
        process.wait(60)
    assert "died unexpectedly" in (tmp_path / "log").read_text()
    with server(whole, tmp_path / "again") as (_, ask):
        assert ask("/v1/completions", {"prompt": "ab"})["choices"][0]["text"] == plain["text"]

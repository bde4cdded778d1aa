"""Tiny random models with a byte-level tokenizer, a local calibration text, and the shared trained models."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer

# Before anything imports Triton, whose kernels then run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import cospadi
from cospadi import cli
from cospadi.solvers import SOLVERS

transformers_logging.disable_progress_bar()
torch.set_num_threads(1)

VOCABULARY = 260
SHARED_MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"


LONG = ("test_memory", "test_quality", "test_ray", "test_resume", "test_examples", "test_refine", "test_triton")
LONG += ("test_compare", "test_shared", "test_heal", "test_docs", "test_fuzz")
"""Files of few tests that take long. They go first, so that neither of two processes has to wait for one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def shared_model() -> Callable[[str], Path]:
    """The folder of a trained model in `shared/`, which lies beside the repository."""

    def find(name: str) -> Path:
        folder = SHARED_MODELS / name
        if not folder.is_dir():
            pytest.skip(f"the shared model {name} is not on this machine ({folder})")
        return folder

    return find


@pytest.fixture(autouse=True)
def package_log() -> Iterator[None]:
    """The command line redirects the package's log; each test starts with it untouched."""
    log = logging.getLogger("cospadi")
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; 256 begins and 257 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate([*alphabet, "<s>", "</s>"])}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 5000 tokens of varied text."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"{n} squared is {n * n}, halved {n / 2}." for n in range(160)), encoding="utf-8")
    return path


def llama_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    return LlamaConfig(**sizes | changes)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights whose products neither vanish nor grow, biases that are not zero, norms that are not one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(0.1 * noise + (0.0 if name.endswith("bias") else 1.0))


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build a random model with its tokenizer in a new folder: make_model(config, dtype, **save_pretrained's)."""

    def make(config: Any = None, dtype: torch.dtype = torch.bfloat16, **saving: Any) -> Path:
        model = AutoModelForCausalLM.from_config(config or llama_config())
        randomise(model)
        folder = tmp_path_factory.mktemp("dense")
        model.to(dtype).save_pretrained(folder, **saving)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_llama(make_model: Callable[..., Path]) -> Callable[..., Path]:
    """A tiny Llama with some sizes changed: make_llama(num_hidden_layers=3)."""
    return lambda **changes: make_model(llama_config(**changes))


@pytest.fixture(scope="session")
def dense_folder(make_model: Callable[..., Path]) -> Path:
    """A tiny bf16 Llama; never changed."""
    return make_model()


@pytest.fixture(scope="session")
def compressed_folder(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That Llama compressed without text, one projection of each block left dense; never changed."""
    output = tmp_path_factory.mktemp("compressed") / "out"
    cospadi.compress(
        dense_folder, {"metric": "weights", "iterations": 1, "ratio": 0.3, "exclude": ["*.k_proj"]}, output
    )
    return output


@pytest.fixture(scope="session")
def quick(text_file: Path) -> dict[str, Any]:
    """Recipe fields of a calibrated run that takes a moment: the default solver, the same ratio everywhere."""
    fields: dict[str, Any] = {"ratio": 0.3, "iterations": 2}
    fields |= {"allocate": "uniform", "metric": "output", "compensate": False, "refine": 0}
    return fields | {"calibration": str(text_file), "sequences": 8, "length": 32}


@pytest.fixture(scope="session")
def default(text_file: Path) -> dict[str, Any]:
    """Recipe fields of a short run of the default recipe, but with all of Gamma: pooled budgets, blocks refined."""
    fields: dict[str, Any] = {"ratio": 0.3, "iterations": 4, "gradient_sequences": 2, "refine": 2}
    fields |= {"metric": "two-sided"}
    return fields | {"calibration": str(text_file), "sequences": 8, "length": 32}


def with_solver(recipe: dict[str, Any], solver: str) -> dict[str, Any]:
    """A recipe with another solver, and a metric that it knows: of outputs, or of weights alone. Codes take all their
    tries, of which few end far below the wanted bytes."""
    known = SOLVERS[solver].metrics
    tries = {"iterations": 8} if SOLVERS[solver].coded else {}
    return recipe | {"solver": solver, "metric": "output" if "output" in known else "weights"} | tries


@pytest.fixture(scope="session")
def prompt() -> torch.Tensor:
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))


class Answer(NamedTuple):
    code: int
    out: str
    err: str


COMMAND = typer.main.get_command(cli.app)
"""The command as typer makes it of `cli.app`, at each call anew, which takes longer than many a test."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Answer]]:
    """Run the command in this process: run("plan", folder) -> exit code, stdout, stderr."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.delenv("COSPADI_TRACEBACK", raising=False)
    monkeypatch.setattr(cli, "app", COMMAND)

    def call(*words: object) -> Answer:
        # What a job would take is told from a short run of its pieces, seconds that most tests do not need.
        quicker = ["--no-timing"] if words[:1] == ("plan",) and "--timing" not in words else []
        monkeypatch.setattr(sys, "argv", ["cospadi", *map(str, words), *quicker])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return Answer(exit_.value.code, captured.out, captured.err)

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub that this process takes for the hub, with an empty cache and a user's token."""
    import huggingface_hub
    from hub import WRITER, serving
    from huggingface_hub import constants

    with serving() as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.endpoint)
        template = stand_in.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers where the hub was
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield stand_in
        huggingface_hub.close_session()


# A job that is done on several engines


@pytest.fixture(scope="session")
def short_recipe(text_file: Path) -> dict[str, Any]:
    """All stages of the default recipe with few short solves; every group's last one is independent of the others'."""
    fields: dict[str, Any] = {"ratio": 0.3, "iterations": 3, "gradient_sequences": 1, "refine": 2}
    return fields | {"calibration": str(text_file), "sequences": 4, "length": 32}


@pytest.fixture(scope="session")
def alone(dense_folder: Path, short_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what one process makes."""
    from killed import hashes

    from cospadi.jobs.pool import Engine

    output = tmp_path_factory.mktemp("alone") / "out"
    cospadi.compress(dense_folder, short_recipe, output, engine=Engine(threads_per_task=1))
    return hashes(output)


@pytest.fixture(autouse=True, scope="module")
def compiled_anew() -> Iterator[None]:
    """torch compiles a function so many times a process and then refuses: each file of tests begins at none."""
    yield
    torch.compiler.reset()

"""What is private to other libraries is used in cospadi/compat.py alone, and what stands there does what it says."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.utils import logging

import cospadi
from cospadi import UserError, compat
from cospadi.model import load

SOURCES = Path(cospadi.__file__).parents[1]
OUR_OWN = {
    ("cospadi/cli.py", "os._exit"): "public in spite of its name",
    ("cospadi/integrations/vllm/linear.py", "Levels._fields"): "public in spite of its name",
    ("cospadi/jobs/pool.py", "os._exit"): "public in spite of its name",
    ("cospadi/report/maps.py", "_ERROR._replace"): "of a named tuple, public in spite of its name",
    ("cospadi/stages/distil.py", "state._replace"): "of a named tuple, public in spite of its name",
}
"""Private names outside compat.py that are not another library's secrets, and why they may stand there."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names(source: str) -> set[str]:
    """What code reads or writes that begins with an underscore and is not its own.

    Attributes of anything but self, cls and super(), names of attributes in calls of getattr and its like, and imports
    of a private module or name from outside cospadi.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super"))):
                pass
            case ast.Attribute(attr=name) if is_private(name):
                found.add(ast.unparse(node))
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"),
                args=[ast.Name(id=owner), ast.Constant(value=str(name)), *_],
            ) if is_private(name) and owner not in ("self", "cls"):
                found.add(f"{owner}.{name}")
            case ast.Import(names=names):
                found |= {alias.name for alias in names if any(map(is_private, alias.name.split(".")))}
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] != "cospadi":
                paths = [f"{module}.{alias.name}" for alias in names]
                found |= {path for path in paths if any(map(is_private, path.split(".")))}
    return found


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("torch._C._is_tracing()", {"torch._C", "torch._C._is_tracing"}),
        ("module._parameters[leaf] = x", {"module._parameters"}),
        ("f(x)._version", {"f(x)._version"}),
        ("getattr(model, '_hf_hook', None)", {"model._hf_hook"}),
        ("import torch._dynamo", {"torch._dynamo"}),
        ("from torch._subclasses import fake_tensor", {"torch._subclasses.fake_tensor"}),
        ("from torch.nn import _reduction", {"torch.nn._reduction"}),
        ("self._kept, cls._made, super()._apply(f), x.__dict__, getattr(self, '_kept')", set()),
        ("from cospadi.jobs.pool import _serve", set()),
    ],
)
def test_private_names_are_found(source: str, names: set[str]) -> None:
    assert private_names(source) == names


def test_private_names_of_others_stand_in_compat() -> None:
    used = {
        (path.relative_to(SOURCES).as_posix(), name)
        for path in sorted([*(SOURCES / "cospadi").rglob("*.py"), SOURCES / "cospadi_cli.py"])
        for name in private_names(path.read_text(encoding="utf-8"))
    }
    assert any(path == "cospadi/compat.py" for path, _ in used)
    assert {(path, name) for path, name in used if path != "cospadi/compat.py"} == set(OUR_OWN)


def test_every_function_of_compat_says_what_it_waits_for() -> None:
    tree = ast.parse(Path(compat.__file__).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions
    for function in functions:
        assert "Waits for " in (ast.get_docstring(function) or ""), function.name


def test_versions() -> None:
    x = torch.zeros(2)
    before = compat.version_of(x)
    assert compat.version_of(x) == before
    x.add_(1)
    assert compat.version_of(x) != before
    with torch.inference_mode():
        assert compat.version_of(torch.zeros(2)) is None


def test_who_looks_on_is_seen() -> None:
    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import TorchDispatchMode

    assert not compat.is_dispatch_intercepted()
    with TorchDispatchMode():
        assert compat.is_dispatch_intercepted()
    with compat.fake_tensors():
        assert compat.is_dispatch_intercepted()
    with forward_ad.dual_level():
        assert compat.is_dispatch_intercepted()
    seen = []
    torch.func.vmap(lambda x: seen.append(compat.is_dispatch_intercepted()) or x)(torch.zeros(2))
    assert seen == [True]
    traced = []
    torch.jit.trace(lambda x: traced.append(compat.is_traced()) or x + 1, torch.zeros(2), check_trace=False)
    assert traced == [True]
    assert not compat.is_traced()


def test_named_hooks_run_and_have_their_name() -> None:
    module, calls = nn.Linear(2, 2), []
    before = module.register_forward_pre_hook(lambda *_: calls.append("before"))
    after = module.register_forward_hook(lambda *_: calls.append("after"), always_call=True)
    compat.name_hooks(module, before, after, "ours")
    module(torch.zeros(1, 2))
    with pytest.raises(RuntimeError):
        module(torch.zeros(1, 3))
    assert calls == ["before", "after"] * 2
    assert list(module._forward_pre_hooks) == list(module._forward_hooks) == ["ours"]


def test_what_does_not_fit_a_model_is_told_where_libraries_point_at_a_report(
    make_model: Callable[..., Path],
) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 76, "num_hidden_layers": 1, "num_attention_heads": 4}
    folder = make_model(MixtralConfig(**sizes, vocab_size=260, num_key_value_heads=2, num_local_experts=2))
    whole = load_file(folder / "model.safetensors")
    expert = next(name for name in whole if "experts.1.w1" in name)
    for name, shape, told in (
        (expert, (40, 48), "experts.gate_up_proj cannot be made of the tensors that are there: stack expects each"),
        ("model.norm.weight", (3,), "tensor model.norm.weight is [3]; the model asks for [48]"),
    ):
        changed = whole | {name: torch.zeros(shape, dtype=torch.bfloat16)}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            with compat.misfits() as found, pytest.raises(RuntimeError, match="above report"):
                AutoModelForCausalLM.from_pretrained(folder)
        finally:
            logging.set_verbosity(verbosity)
        assert told in found[0]
        with pytest.raises(UserError, match=told if name == expert else "model.norm.weight is"):
            load.load_model(folder, torch.device("cpu"))

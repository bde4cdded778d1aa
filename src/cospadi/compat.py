"""What we use of other libraries without their promise that it stays: every such thing stands here, and nowhere else.

Each function says which public way it waits for; when that way is there, the function goes.
"""

from __future__ import annotations

import logging
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# torch


def is_traced() -> bool:
    """Whether `torch.jit.trace` is running.

    Waits for `torch.jit.is_tracing` to be among the names that torch.jit exports.
    """
    return torch._C._is_tracing()  # what it asks, without its own cost, which every product would pay


def is_dispatch_intercepted() -> bool:
    """Whether a mode, a functorch transform or forward-mode autograd wants to see every call of an op.

    Modes are those of `torch.utils._python_dispatch` and what is built on them (make_fx, fake tensors); transforms
    those of `torch.func`; forward mode is that of `torch.autograd.forward_ad`. Waits for a public way to ask torch
    which of them are active.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place; None for an inference tensor, where torch does not count.

    Waits for a public name of `Tensor._version`, which torch's notes on autograd describe.
    """
    return None if tensor.is_inference() else tensor._version


def name_hooks(module: nn.Module, before: RemovableHandle, after: RemovableHandle, name: str) -> None:
    """Give a forward pre-hook and an `always_call` forward hook of a module a name instead of their number.

    torch numbers hooks through the whole process, and torch.compile would compile a module anew for its numbers. The
    handles no longer remove them. Waits for hooks that torch.compile does not tell apart by their numbers.
    """
    tables: Any = module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called
    for hooks, number in zip(tables, (before.id, after.id, after.id), strict=True):
        hooks[name] = hooks.pop(number)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 numbers (AVX-512 BF16).

    Waits for `torch.cpu.get_capabilities`, which is public in torch 2.13 and not there in the oldest that we take.
    """
    return torch.cpu._is_avx512_bf16_supported()


def cpu_multiplies_in_tiles() -> bool:
    """Whether this CPU has AMX, with which torch's float32 products of "medium" precision are single bf16 ones.

    Waits for `torch.cpu.get_capabilities`, as above.
    """
    return torch.cpu._is_amx_tile_supported()


def fake_tensors() -> AbstractContextManager[object]:
    """Inside this block tensors have shapes and dtypes and no numbers, those of modules on the meta device, too.

    Waits for a public name of `FakeTensorMode`, which torch documents by its private path.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


# transformers


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Tensor name -> name of the tensor that it is tied to; empty for a model that has no such table.

    Waits for a documented name of `PreTrainedModel.all_tied_weights_keys`.
    """
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tie_weights(model: nn.Module, tied: dict[str, str]) -> None:
    """Add to `tied_weights`, so that loading does not miss a tied tensor and saving writes each once.

    Waits for a way to tie weights of an instance; transformers documents one for classes alone.
    """
    model.all_tied_weights_keys = tied_weights(model) | tied  # type: ignore[assignment]


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Take tensors out of `tied_weights`.

    Waits for a way to tie weights of an instance, as above.
    """
    gone = set(names)
    model.all_tied_weights_keys = {  # type: ignore[assignment]
        name: source for name, source in tied_weights(model).items() if name not in gone
    }


def may_miss(model: nn.Module) -> set[str]:
    """Patterns (re.search) of tensor names that a checkpoint may lack, by the model's class.

    Waits for a public name of `PreTrainedModel._keys_to_ignore_on_load_missing`.
    """
    return set(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def not_saved(model: nn.Module) -> set[str]:
    """Names of tensors that `save_pretrained` leaves out, by the model's class.

    Waits for a public name of `PreTrainedModel._keys_to_ignore_on_save`.
    """
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def ignore_when_loading(model: nn.Module, patterns: Iterable[str]) -> None:
    """Have `from_pretrained` say nothing of tensors that a checkpoint has beside the model's own.

    Args:
        patterns: for re.search in tensor names.

    Waits for a public name of `PreTrainedModel._keys_to_ignore_on_load_unexpected`, or for a quantizer's say in it.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    model._keys_to_ignore_on_load_unexpected = ignored | set(patterns)  # type: ignore[assignment]


def copy_when_loading(copies: Mapping[str, Sequence[str]]) -> list[Any]:
    """For `HfQuantizer.get_weight_conversions`: fill several tensors of a model from one of a checkpoint.

    Args:
        copies: name of the tensor in the checkpoint and the model -> names of others in the model.

    Waits for a public name of `transformers.core_model_loading`, whose classes that method is to return.
    """
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Copy(ConversionOps):  # type: ignore[misc]
        def convert(self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **_: Any) -> Any:
            (tensors,) = input_dict.values()
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            return dict.fromkeys(target_patterns, tensor)

    return [
        WeightConverter([f"^{re.escape(name)}$"], [name, *others], operations=[Copy()])
        for name, others in copies.items()
    ]


class Place(NamedTuple):
    """Where a tensor of a checkpoint goes: names in the model, and whether its values stay as they are."""

    names: list[str]
    same: bool


def places_in_model(model: nn.Module, names: Iterable[str]) -> dict[str, Place]:
    """Where `from_pretrained` puts the tensors of a checkpoint, by their names there; it ignores those whose place is
    no tensor of the model's.

    Waits for a public way to ask which of a checkpoint's tensors a model takes.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    model = cast("PreTrainedModel", model)
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters: Any = [one for one in transforms if not isinstance(one, WeightRenaming)]
    own, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    targets = {source: one.target_patterns for one in converters for source in one.source_patterns}
    found = {}
    for name in names:
        place, source = rename_source_key(name, renamings, converters, prefix, own)
        if place not in own and name in own:
            place, source = rename_source_key(name, [], [], prefix, own)
        several = [place] if source is None else [place.replace(targets[source][0], one) for one in targets[source]]
        found[name] = Place(several, source is None)
    return found


@contextmanager
def misfits() -> Iterator[list[str]]:
    """What `from_pretrained` finds wrong with tensors while this block runs, a sentence each, without a stop.

    Its error says only that there is a report above it, which its log shows where that is not silenced; it is taken
    from there. Waits for errors that name the tensors.
    """
    log = logging.getLogger("transformers.modeling_utils")
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            report = re.sub(r"\x1b\[[\d;]*m", "", record.getMessage())
            for row in re.split(r"\n(?=\S+ +\| [A-Z]+ +\|)", report):
                name, status, told = map(str.strip, [*row.split("|", 2), "", ""][:3])
                if status == "MISMATCH":
                    stored, _, asked = re.sub(r".*ckpt:|torch\.Size", "", told).partition("vs model:")
                    found.append(f"tensor {name} is {stored.strip(' ()')}; the model asks for {asked.strip(' ()')}")
                elif status == "CONVERSION":
                    why = told.partition("\nError:")[0].splitlines()[-1:]
                    found.append(": ".join([f"{name} cannot be made of the tensors that are there", *why]))

    handler, before = Keep(logging.WARNING), (log.level, log.propagate)
    log.propagate = log.propagate and log.isEnabledFor(logging.WARNING)
    log.setLevel(min(log.getEffectiveLevel(), logging.WARNING))
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


def experts_implementation(module: Any, implementation: str) -> None:
    """Have a module of experts, and all with the same configuration, compute by an implementation of that name.

    Waits for a way to choose one for a model that is already there whose class does not offer it.
    """
    module.config._experts_implementation = implementation


def gate_of(module: Any) -> Callable[[Tensor], Tensor] | None:
    """What a module of experts makes of the output of its first projection; None for any other module.

    Waits for a public name of `_apply_gate`, which every implementation of experts needs.
    """
    gate: Callable[[Tensor], Tensor] | None = getattr(module, "_apply_gate", None)
    return gate


# accelerate


def take_from_accelerate(model: nn.Module) -> dict[str, dict[str, str]]:
    """Undo what `device_map` does to a model, so that its offloaded parameters stay on the meta device.

    Waits for a public way to ask transformers or accelerate where an offloaded weight lies.

    Returns:
        Parameter name -> where it lies: `safetensors_file`, `dtype` (a name in torch), and `weight_name`, its name in
        the file, where that is another.
    """
    from accelerate.hooks import remove_hook_from_module

    index: dict[str, dict[str, str]] = {}
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            index |= getattr(getattr(getattr(one, "weights_map", None), "dataset", None), "index", None) or {}
    remove_hook_from_module(model, recurse=True)
    del model.hf_device_map
    return index


class _Converted(Mapping[str, Tensor]):
    """Tensors by name, each passed through a function when it is read."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, convert: Callable[[str, Tensor], Tensor]) -> None:
        self.tensors, self.prefix, self.convert = tensors, prefix, convert

    def __getitem__(self, name: str) -> Tensor:
        return self.convert(self.prefix + name, self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@contextmanager
def convert_offloaded(model: nn.Module, convert: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """In this block a model's offloaded tensors, which `save_pretrained` reads one by one, are what a function makes
    of them.

    Args:
        convert: of a tensor's name in the model and the tensor as it would be in memory.

    Waits for a quantizer's say in what transformers does with offloaded tensors when it saves.
    """
    found: list[tuple[str, Any]] = [(name, getattr(module, "_hf_hook", None)) for name, module in model.named_modules()]
    hooks = [(name, hook, hook.weights_map) for name, hook in found if getattr(hook, "weights_map", None) is not None]
    for name, hook, tensors in hooks:
        hook.weights_map = _Converted(tensors, f"{name}." if name else "", convert)
    try:
        yield
    finally:
        for _, hook, tensors in hooks:
            hook.weights_map = tensors


# peft


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters were put into a model by its own `add_adapter` or `load_adapter`, which then `save_pretrained`
    writes in its place.

    Waits for a public name of `PreTrainedModel._hf_peft_config_loaded`.
    """
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def attach_lora(
    layer: type[nn.Module],
    adapter: type[nn.Module],
    before_merging: Callable[[nn.Module], None],
    left_out: Callable[[str], bool],
) -> None:
    """Have every LoRA of PEFT, of any `LoraConfig` and also of "all-linear", take layers of a class for linear ones.

    Args:
        adapter: what is put around such a layer; PEFT's documentation says what it must be.
        before_merging: called with a model whose adapters are about to be merged.
        left_out: whether "all-linear" does not mean a layer of that name.

    Waits for a registry of layers for all configs. PEFT documents `LoraConfig._register_custom_module`, as an
    experiment: one config at a time, and "all-linear" does not ask it.
    """
    from peft import LoraModel
    from peft.tuners import tuners_utils
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import transformers_weight_conversion

    create, check = LoraModel._create_new_module, LoraModel._check_merge_allowed
    include = tuners_utils._maybe_include_all_linear_layers

    def create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, layer):
            lora_config._register_custom_module({layer: adapter})
        return cast("nn.Module", create(lora_config, adapter_name, target, **kwargs))

    def check_merge_allowed(self: Any) -> None:
        before_merging(self.model)
        check(self)

    def include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        peft_config = include(peft_config, model)
        if isinstance(asked, str) and asked.lower() == "all-linear":
            inside = {
                f"{name}.base_layer" for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
            }
            found = {name for name, module in model.named_modules() if isinstance(module, layer)}
            named = peft_config.target_modules | (found - inside)
            peft_config.target_modules = {name for name in named if not left_out(name)}
        return peft_config

    LoraModel._create_new_module = staticmethod(create_new_module)
    LoraModel._check_merge_allowed = check_merge_allowed
    tuners_utils._maybe_include_all_linear_layers = include_all_linear_layers
    transformers_weight_conversion._maybe_include_all_linear_layers = include_all_linear_layers


# multiprocessing


@contextmanager
def blank_main() -> Iterator[None]:
    """Processes that multiprocessing spawns in this block do not import the main module of this one.

    So that scripts need no guard against that. Waits for a spawn context that can be told to leave it out.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# ray


@contextmanager
def quiet_workers() -> Iterator[None]:
    """Ray does not print, on this process's standard output, that one of its own was lost.

    Waits for a switch of `ray.init` for that: `log_to_driver` is none.
    """
    from ray._private import worker

    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = True

"""The compressed linear layer: y = (x D) S + b, for any form of D and S."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cospadi import compat
from cospadi.errors import CheckpointError, UserError
from cospadi.format.codecs.ec import EC
from cospadi.format.form import Form
from cospadi.runtime import op
from cospadi.runtime.levels import Levels, read_levels

Runtime = Literal["auto", "packed", "unpacked", "dense"]


class _Product(NamedTuple):
    """z = x D with everything it depends on; holds x alive, so that no other tensor gets its identity."""

    x: Tensor
    dictionary: Tensor
    state: Hashable
    z: Tensor


class _OpenGroups(threading.local):
    """Groups of which a parent is being called in this thread -> their last product, None before the first."""

    def __init__(self) -> None:
        self.product: dict[str, _Product | None] = {}


_open_groups = _OpenGroups()


class _Decoded(NamedTuple):
    """A code, decoded: its head (`Ec.head`) and its levels."""

    head: Tensor
    levels: Levels


def reuse_products(parent: nn.Module, layers: Sequence[CompressedLinear], group: str) -> None:
    """Have layers that hold one dictionary multiply an input that they share once in each call of their parent.

    The product lives no longer than the call and belongs to its thread. torch.compile traces all this away: the graph
    has one product. (Left to itself, the compiler merges equal products in training only.) Where x has no version, in
    inference mode and under torch.compile, its change in place between two of the layers would go unnoticed;
    `shared_inputs` takes no such tensor for a shared input.

    Args:
        parent: a module whose forward calls all of them.
        group: a name for the group, best the same in every block: torch.compile compiles anew for each name it meets.
    """
    for layer in layers:
        layer.group = group
    # State of these hooks is the group's name alone, which a copied or unpickled model keeps.
    before = parent.register_forward_pre_hook(partial(_open_group, group))
    after = parent.register_forward_hook(partial(_close_group, group), always_call=True)
    compat.name_hooks(parent, before, after, f"cospadi {group}")  # torch.compile compiles anew for each number


def _open_group(group: str, *_: object) -> None:
    _open_groups.product[group] = None


def _close_group(group: str, *_: object) -> None:
    _open_groups.product.pop(group, None)


def _multiply(x: Tensor, dictionary: Tensor, group: str | None) -> Tensor:
    """z = x D in x's dtype, or the product that another layer of the group has just made of the same x."""
    if group is None or group not in _open_groups.product:
        return op.dense_matmul(x, dictionary)
    last, state = _open_groups.product[group], _state(x)
    if last is not None and last.x is x and last.dictionary is dictionary and last.state == state:
        return last.z
    z = op.dense_matmul(x, dictionary)
    _open_groups.product[group] = _Product(x, dictionary, state, z)
    return z


def _version(tensor: Tensor) -> Hashable:
    """What changes when a tensor is replaced or written to (where torch counts that)."""
    return tensor.data_ptr(), compat.version_of(tensor)


def _state(x: Tensor) -> Hashable:
    """What a product with x depends on beside the two tensors."""
    device = x.device.type
    # torch knows no autocast on the meta device, and raises
    autocast = torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
    state = (x.requires_grad, torch.is_grad_enabled(), autocast)
    if torch.compiler.is_compiling():
        return state
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    return *state, torch.is_inference_mode_enabled(), compat.version_of(x), stream


class CompressedLinear(nn.Module):
    """A projection W ~ D S in the form the checkpoint stores it.

    Parameters and buffers have the names that they are stored by (see docs/format.md); the attributes below are the
    same in every form.

    z = x D is an ordinary linear product, and so is y = z S where S is a parameter; else it is the op
    `cospadi::sparse_matmul`, or `cospadi::level_matmul`. What is kept beside the packed form `set_runtime` decides.
    Where `replaces_code` says so, levels that a code was decoded to are kept in its place: there is no such buffer
    then, and `codes` encodes them again, to the same bytes, so that writing to what it returns is in vain.

    Args:
        in_features: d1. out_features: d2.
        k: atoms. nnz: nonzeros of S in all; 0 where all of S is stored.
        nbytes: of the values, where their codes have different lengths.
        form: how D and S are stored.
        bias: whether there is one.
        dtype, device: of the parameters.

    Attributes:
        atoms: D transposed, (k, d1), row i is atom i; the layers of a group hold the same `nn.Parameter`. None where
            the form stores no dictionary.
        support: uint8, or None where the form stores all of S.
        codes: the stored values. Where they are S transposed as it is (`Form.trainable`), an `nn.Parameter`.
        bias: (d2,) or None.
    """

    runtime: Runtime = "auto"
    replaces_code = False
    group: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        k: int,
        nnz: int,
        form: Form,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        nbytes: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.k, self.nnz = in_features, out_features, k, nnz
        self.form, self.names = form, form.names

        def parameter(shape: list[int] | None) -> nn.Parameter | None:
            return None if shape is None else nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        def buffer(shape: list[int] | None, of: torch.dtype) -> Tensor | None:
            return None if shape is None else torch.zeros(shape, dtype=of, device=device)

        values = form.codec.shape(self.values_shape, nbytes)
        self.register_parameter(self.names.dictionary, parameter(form.dictionary_kind.shape(in_features, k)))
        self.register_buffer(self.names.support, buffer(form.support_kind.shape(out_features, k), torch.uint8))
        if form.trainable:
            self.register_parameter(self.names.values, parameter(values))
        else:
            self.register_buffer(self.names.values, buffer(values, form.codec.dtype))
        self.bias = parameter([out_features] if bias else None)
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)  # as x
        self._offsets: tuple[Hashable, Tensor] | None = None
        self._kept: tuple[tuple[Any, ...], Tensor | Levels] | None = None
        self._decoded_code: _Decoded | None = None
        self._kernel: tuple[torch.dtype, torch.device, bool] | None = None

    support: Tensor | None
    _like: Tensor

    @property
    def weight(self) -> Tensor:
        """W as `nn.Linear` holds it, (d2, d1), made anew each time for code that looks at it; writing to it is in vain.
        On the meta device while the layer's values are."""
        if self.weight_is_away():
            return self._like.new_empty(self.out_features, self.in_features, device="meta")
        return self.dense_weight(self._like.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight that it stands for: the model's."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Of what is stored."""
        return self._like.device

    @property
    def atoms(self) -> Tensor | None:
        atoms: Tensor | None = getattr(self, self.names.dictionary)
        return atoms

    @property
    def codes(self) -> Tensor:
        stored = self._stored
        if stored is not None:
            return stored
        assert self._decoded_code is not None
        head, levels = self._decoded_code
        return EC.put_back(head, op.unpack_levels(levels).to(torch.int16))

    @property
    def _stored(self) -> Tensor | None:
        """The parameter or buffer of the codes; None where their levels stand in its place."""
        stored: Tensor | None = getattr(self, self.names.values)
        return stored

    @property
    def _levels(self) -> Levels | None:
        return None if self._decoded_code is None else self._decoded_code.levels

    @property
    def values_shape(self) -> list[int]:
        """Of the values, before they are encoded."""
        return self.form.support_kind.values_shape(self.out_features, self.k, self.nnz)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d1) -> (..., d2), in x's dtype."""
        levels = self._levels
        if levels is not None and self.runtime == "auto" and self.atoms is None:
            y = op.level_matmul(x, levels)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        atoms, support, values, bias = self.atoms, self.support, self._stored, self.bias
        trainable = self.names.values in self._parameters
        learns = torch.is_grad_enabled() and atoms is not None and atoms.requires_grad
        if self.runtime == "dense" and not trainable and not learns:
            weight = self._keep(x, self._weight)
            if isinstance(weight, Tensor):
                return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        z = x if atoms is None else _multiply(x, atoms, self.group)
        if trainable and support is None:
            assert values is not None
            return nn.functional.linear(z, values.to(x.dtype), None if bias is None else bias.to(x.dtype))
        kind, codec = self.form.support, None if trainable else self.form.values
        unpacked: Tensor | Levels | None = None if self.runtime == "unpacked" else self._levels
        if (
            unpacked is None
            and not trainable
            and (
                self.runtime == "unpacked"
                or (self.runtime == "auto" and (values is None or not self._has_kernel(z, support, values)))
            )
        ):
            unpacked = self._keep(z, self._unpacked)
            unpacked = self._levels if unpacked is None else unpacked
        if isinstance(unpacked, Levels):
            y = op.level_matmul(z, unpacked)
            return y if bias is None else y + bias.to(y.dtype)
        if values is None:
            assert unpacked is not None
            return nn.functional.linear(z, unpacked, None if bias is None else bias.to(z.dtype))
        offsets = None if trainable else self.column_offsets()
        y = op.sparse_matmul(z, support, values, offsets, self.out_features, self.k, kind, codec, unpacked)
        return y if bias is None else y + bias.to(y.dtype)

    def _has_kernel(self, z: Tensor, support: Tensor | None, values: Tensor) -> bool:
        """`op.has_kernel`, asked once for each kind of z. (Where it is no longer true, the op unpacks.)"""
        if torch.compiler.is_compiling():
            return op.has_kernel(z, support, values, self.form.support, self.form.values)
        if self._kernel is None or self._kernel[0] is not z.dtype or self._kernel[1] != z.device:
            found = op.has_kernel(z, support, values, self.form.support, self.form.values)
            self._kernel = z.dtype, z.device, found
        return self._kernel[2]

    def _keep(self, like: Tensor, make: Callable[[torch.dtype], Tensor | Levels]) -> Tensor | Levels | None:
        """A matrix that `make` makes in the dtype of `like`, once for as long as the factors stay as they are.

        None where it would have to be made by a compiler, or of factors that are elsewhere (offloaded).
        """
        if torch.compiler.is_compiling():
            made = None if self._kept is None else self._kept[1]
            return made if made is not None and _serves(made, like) else None
        if self.weight_is_away():
            return None
        state = (like.dtype, make.__name__, like.device, self._versions())
        if self._kept is not None:
            known, made = self._kept
            first = 1 if isinstance(made, Levels) else 0  # which serve every dtype
            if known[first:] == state[first:]:
                return made
        self._kept = None  # before the next one takes its memory
        with torch.inference_mode(False), torch.no_grad():
            self._kept = state, make(like.dtype)
        return self._kept[1]

    def _factors(self) -> list[Tensor]:
        return [tensor for tensor in (self.atoms, self.support, self._stored) if tensor is not None]

    def _versions(self) -> Hashable:
        return tuple(map(_version, self._factors()))

    def _unpacked(self, dtype: torch.dtype) -> Tensor | Levels:
        """What is kept of S where no kernel reads it as it is stored: levels as integers where there is a kernel for
        these, unless too many of them are large or all is to be unpacked; else a dense matrix."""
        if self.form.codec.coded and self.runtime == "auto" and op.takes_levels(self._like.new_empty(0, dtype=dtype)):
            levels = read_levels(self.codes)
            return levels.to(dtype) if isinstance(levels, Tensor) else levels
        return self.coefficients(dtype)

    def prepare(self, dtype: torch.dtype) -> None:
        """Make what the first call would, which a compiler that meets the layer before it could not keep. (Compiled, a
        layer does not see what is then written to its tensors in place.)

        Args:
            dtype: of x.
        """
        self.column_offsets()
        if self.runtime == "auto" and self.form.codec.coded and self._levels is None:
            with suppress(CheckpointError):  # of a tensor that is not filled yet: the first call tells
                kept = self._keep(self._like.new_empty(0, dtype=dtype), self._unpacked)
                if self.replaces_code and isinstance(kept, Levels):
                    self.hold(kept, EC.head(self.codes))

    def hold(self, levels: Levels, head: Tensor | None = None) -> None:
        """Keep levels in place of their code; without its head, `EC.head`, they cannot be stored again."""
        self._decoded_code = _Decoded(levels.packed[:0] if head is None else head, levels)
        self._kept = None
        delattr(self, self.names.values)  # a buffer that is None confuses torch.export
        setattr(self, self.names.values, None)

    def _put_code_back(self) -> None:
        codes = self.codes
        delattr(self, self.names.values)
        self.register_buffer(self.names.values, codes)
        self._decoded_code = None

    def kept_tensors(self) -> list[Tensor]:
        """What is in memory beside parameters and buffers."""
        found = [self._levels, *(kept[1] for kept in (self._kept, self._offsets) if kept is not None)]
        return [tensor for one in found for tensor in ([one] if isinstance(one, Tensor) else one or [])]

    def set_runtime(self, runtime: Runtime, dtype: torch.dtype | None = None) -> None:
        """See `cospadi.runtime.layer.set_runtime`.

        Args:
            dtype: of x, which a dictionary tells too; where neither does, what is kept is made when the layer first
                runs.
        """
        if runtime != self.runtime:
            self.runtime, self._kept = runtime, None
        if runtime == "packed" and self._levels is not None:
            self._put_code_back()
        dtype = dtype if self.atoms is None else self.atoms.dtype
        if dtype is not None and runtime == "auto":
            self.prepare(dtype)
        if runtime in ("unpacked", "dense") and dtype is not None and not isinstance(self._stored, nn.Parameter):
            like = self._like.new_empty(0, dtype=dtype)
            self._keep(like, self._weight if runtime == "dense" else self.coefficients)

    def column_offsets(self) -> Tensor | None:
        """Number of nonzeros before each column and in all, int32 (d2 + 1,), counted once.

        None on the meta device, and where the support is none that kernels read.
        """
        if torch.compiler.is_compiling() or compat.is_traced():
            return None if self._offsets is None else self._offsets[1]
        support = self.support
        if support is None or support.is_meta:
            return None
        state = _version(support)
        if self._offsets is None or self._offsets[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                offsets = self.form.support_kind.offsets(support)
            if offsets is None:
                return None
            self._offsets = state, offsets
        return self._offsets[1]

    def coefficients(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """S transposed as a dense matrix (d2, k), exact in float32 and bf16."""
        if self._levels is not None:
            return op.level_weight(self._levels).to(dtype)
        values, form = self.codes, self.form
        codec = None if isinstance(values, nn.Parameter) else form.values
        offsets = self.column_offsets()
        sizes = self.out_features, self.k
        return op.coefficients(self.support, values.detach(), offsets, *sizes, form.support, codec, dtype)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (d2, d1) this layer stands for, as a product in `dtype`: sums in float32, rounded once."""
        coefficients, atoms = self.coefficients(dtype), self.atoms
        return coefficients if atoms is None else coefficients @ atoms.detach().to(dtype)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (d2, d1) this layer stands for, (D S)^T, computed in float64."""
        return self._weight(torch.float64).to(dtype)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """The dense layer that this one stands for."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense_weight(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype))
        return linear.train(self.training)

    def weight_is_away(self) -> bool:
        """Whether some of what makes up the weight is on the meta device, where offloaded tensors are."""
        return any(tensor.is_meta for tensor in self._factors())

    def unpack_values(self) -> nn.Parameter:
        """Turn packed values into a float32 `nn.Parameter` of their shape, so that training reaches them.

        The state dict still holds the packed form (rounded again) under the same name.

        Raises:
            UserError: they are levels, in whose place no other numbers can be put; or they are offloaded.
        """
        values = self._stored
        if isinstance(values, nn.Parameter):
            return values
        if values is None or self.form.codec.levels:
            raise UserError(f"values {self.form.values} are levels, which cannot be trained")
        if values.is_meta:
            raise UserError("values are offloaded, and cannot be trained there. Load the model into memory to train it")
        parameter = nn.Parameter(self._decoded(values))
        delattr(self, self.names.values)
        self._kept = None
        self.register_parameter(self.names.values, parameter)
        return parameter

    def _decoded(self, stored: Tensor) -> Tensor:
        """Stored values as float32, in their shape."""
        return self.form.codec.decode(stored, self.values_shape)

    def packed_values(self) -> Tensor:
        """The values as the checkpoint stores them."""
        values, codec = self.codes, self.form.codec
        if isinstance(values, nn.Parameter) and not self.form.trainable:
            return self.form.numbers.encode(values.detach())
        return values.detach().to(codec.dtype)

    # nn.Module documents these three as what a module with a state of its own overrides.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.form.trainable:
            destination[prefix + self.names.values] = self.packed_values()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        dtype = self._dtype_of_levels()
        name = prefix + self.names.values
        if self._levels is not None and name in state_dict:
            self._put_code_back()
        self._kept = self._offsets = None
        if isinstance(self._stored, nn.Parameter) and not self.form.trainable and name in state_dict:
            state_dict = state_dict | {name: self._decoded(state_dict[name])}
        super()._load_from_state_dict(state_dict, prefix, *args)
        _, strict, missing, *_ = args
        if strict and self._stored is None:
            missing.append(name)
        if dtype is not None:
            self.prepare(dtype)

    def _dtype_of_levels(self) -> torch.dtype | None:
        """Of x, where levels are kept, which are to be made anew with the code."""
        if self._levels is not None:
            return self.dtype
        return self._kept[0][0] if self._kept is not None and isinstance(self._kept[1], Levels) else None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        dtype = self._dtype_of_levels()
        if self._levels is not None and fn(self._like).device != self._levels.packed.device:
            self._put_code_back()
        stored, counted = self._stored, self._offsets is not None
        self._offsets = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if stored is not None and not isinstance(stored, nn.Parameter) and self.codes.dtype != stored.dtype:
            # a change of dtype is not for what is stored
            setattr(self, self.names.values, stored.to(self.codes.device))
        if self._kept is not None and self._kept[0][-1] != self._versions():
            self._kept = None  # of tensors that were replaced
        # A compiler that meets the layer next could not keep what it makes.
        if counted:
            self.column_offsets()
        if dtype is not None:
            self.prepare(dtype)
        return self

    def extra_repr(self) -> str:
        form = self.form
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, k={self.k}, nnz={self.nnz}, "
            f"dictionary={form.dictionary}, support={form.support}, values={form.values}, bias={self.bias is not None}"
        )


def _serves(made: Tensor | Levels, like: Tensor) -> bool:
    """Whether what was made for some x serves one like this."""
    if isinstance(made, Levels):
        return made.packed.device == like.device
    return made.dtype == like.dtype and made.device == like.device


def set_runtime(model: nn.Module, runtime: Runtime) -> None:
    """Choose what every layer of a model with packed values keeps in memory, and so what it multiplies with.

    Args:
        runtime: "packed" keeps nothing beside the packed form, which the kernels read as it is (where there is no
            kernel, S is unpacked in each call). "unpacked" keeps S as a dense matrix: more memory than the dense model.
            "dense" keeps the product W = D S: the dense model's speed for long prompts, and its memory beside the
            packed form's. "auto", as loaded: packed where there is a kernel; else unpacked, on first use; but levels
            of a code as integers of few bits, where there is a kernel for these.
    """
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.set_runtime(runtime, dtype)

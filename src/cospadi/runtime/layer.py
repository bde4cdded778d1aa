"""The compressed linear layers: y = (x D) S + b with packed S, and its low-rank sibling."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cospadi import compat
from cospadi.budget import accounting
from cospadi.format import packing
from cospadi.runtime import op

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


def reuse_products(parent: nn.Module, layers: Sequence[SparseDictionaryLinear | LowRankLinear], group: str) -> None:
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


def _multiply(x: Tensor, dictionary: Tensor, group: str | None, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """z = x D in x's dtype, by `product`, or the one that another layer of the group has just made of the same x."""
    if group is None or group not in _open_groups.product:
        return product(x, dictionary)
    last, state = _open_groups.product[group], _state(x)
    if last is not None and last.x is x and last.dictionary is dictionary and last.state == state:
        return last.z
    z = product(x, dictionary)
    _open_groups.product[group] = _Product(x, dictionary, state, z)
    return z


def _version(tensor: Tensor) -> Hashable:
    """What changes when a tensor is replaced or written to (where torch counts that)."""
    return tensor.data_ptr(), compat.version_of(tensor)


def _linear(x: Tensor, matrix: Tensor) -> Tensor:
    return nn.functional.linear(x, matrix.to(x.dtype))


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


class SparseDictionaryLinear(nn.Module):
    """A projection W ~ D S in the form the checkpoint stores it.

    Parameters and buffers (see docs/format.md):
        dictionary: (k, d1), row i is atom i; the layers of a group hold the same `nn.Parameter`.
        support: uint8 (d2, ceil(k / 8)). values: the packed nonzeros.
        bias: (d2,) or None.

    z = x D is an ordinary linear product, y = z S the op `cospadi::sparse_matmul`. What is kept beside the packed form
    `set_runtime` decides.

    Args:
        in_features: d1. out_features: d2.
        k: atoms. nnz: nonzeros of S in all.
        value_bits: stored width of a nonzero.
        bias: whether there is one.
        dtype, device: of the dictionary and the bias.
    """

    runtime: Runtime = "auto"
    group: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        k: int,
        nnz: int,
        value_bits: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.k, self.nnz, self.value_bits = k, nnz, value_bits
        self.dictionary = nn.Parameter(torch.empty(k, in_features, dtype=dtype, device=device))
        rows = accounting.support_row_bytes(k)
        self.register_buffer("support", torch.zeros(out_features, rows, dtype=torch.uint8, device=device))
        if value_bits == 16:
            stored = torch.zeros(nnz, dtype=torch.bfloat16, device=device)
        else:
            size = accounting.value_stream_bytes(nnz, value_bits)
            stored = torch.zeros(size, dtype=torch.uint8, device=device)
        self.register_buffer("values", stored)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self._offsets: tuple[Hashable, Tensor] | None = None
        self._kept: tuple[Hashable, Tensor] | None = None

    support: Tensor
    values: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d1) -> (..., d2), in x's dtype."""
        trainable = isinstance(self.values, nn.Parameter)
        learns = torch.is_grad_enabled() and self.dictionary.requires_grad
        if self.runtime == "dense" and not trainable and not learns:
            weight = self._keep(x, self._weight)
            if weight is not None:
                return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        z = _multiply(x, self.dictionary, self.group, op.dense_matmul)
        bits = 0 if trainable else self.value_bits
        unpacked = None
        if not trainable and (
            self.runtime == "unpacked"
            or (self.runtime == "auto" and not op.has_kernel(z, self.support, self.values, bits))
        ):
            unpacked = self._keep(z, self.coefficients)
        offsets = None if trainable else self.column_offsets()
        y = op.sparse_matmul(z, self.support, self.values, offsets, self.k, bits, unpacked)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _keep(self, like: Tensor, make: Callable[[torch.dtype], Tensor]) -> Tensor | None:
        """A matrix that `make` makes in the dtype of `like`, once for as long as the factors stay as they are.

        None where it would have to be made by a compiler, or of factors that are elsewhere (offloaded).
        """
        if torch.compiler.is_compiling():
            made = None if self._kept is None else self._kept[1]
            return made if made is not None and made.dtype == like.dtype and made.device == like.device else None
        factors = (self.dictionary, self.support, self.values)
        if any(tensor.device.type == "meta" for tensor in factors):
            return None
        state = (make.__name__, like.dtype, like.device, *map(_version, factors))
        if self._kept is None or self._kept[0] != state:
            self._kept = None  # before the next one takes its memory
            with torch.inference_mode(False), torch.no_grad():
                self._kept = state, make(like.dtype)
        return self._kept[1]

    def set_runtime(self, runtime: Runtime) -> None:
        """See `cospadi.runtime.layer.set_runtime`."""
        self.runtime, self._kept = runtime, None
        if runtime in ("unpacked", "dense") and not isinstance(self.values, nn.Parameter):
            self._keep(self.dictionary, self._weight if runtime == "dense" else self.coefficients)

    def column_offsets(self) -> Tensor | None:
        """Number of nonzeros before each column and in all, int32 (d2 + 1,), counted once; None on the meta device."""
        if torch.compiler.is_compiling() or compat.is_traced():
            return None if self._offsets is None else self._offsets[1]
        if self.support.device.type == "meta":
            return None
        state = _version(self.support)
        if self._offsets is None or self._offsets[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._offsets = state, packing.column_offsets(self.support)
        return self._offsets[1]

    def coefficients(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """S transposed as a dense matrix (d2, k), exact in float32 and bf16."""
        bits = 0 if isinstance(self.values, nn.Parameter) else self.value_bits
        return op.coefficients(self.support, self.values.detach(), self.column_offsets(), self.k, bits, dtype)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (d2, d1) this layer stands for, as a product in `dtype`: sums in float32, rounded once."""
        return self.coefficients(dtype) @ self.dictionary.detach().to(dtype)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (d2, d1) this layer stands for, (D S)^T, computed in float64."""
        return (self.coefficients(torch.float32).double() @ self.dictionary.detach().double()).to(dtype)

    def unpack_values(self) -> nn.Parameter:
        """Turn the packed nonzeros into a float32 `nn.Parameter` (nnz,), so that training reaches them.

        The state dict still holds the packed form (rounded again) under the same name.
        """
        if not isinstance(self.values, nn.Parameter):
            values = packing.unpack_values(self.values, self.nnz, self.value_bits)
            del self.values
            self._kept = None
            self.register_parameter("values", nn.Parameter(values))
        assert isinstance(self.values, nn.Parameter)
        return self.values

    def packed_values(self) -> Tensor:
        """The nonzeros as the checkpoint stores them."""
        if isinstance(self.values, nn.Parameter):
            return packing.pack_values(self.values.detach(), self.value_bits)
        return self.values.to(torch.bfloat16) if self.value_bits == 16 else self.values

    # nn.Module documents these three as what a module with a state of its own overrides.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "values"] = self.packed_values()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._kept = self._offsets = None
        if isinstance(self.values, nn.Parameter) and prefix + "values" in state_dict:
            packed = state_dict[prefix + "values"]
            state_dict = dict(state_dict)
            state_dict[prefix + "values"] = packing.unpack_values(packed, self.nnz, self.value_bits)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        stored, counted = self.values, self._offsets is not None
        self._kept = self._offsets = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not isinstance(stored, nn.Parameter) and self.values.dtype != stored.dtype:
            self.values = stored.to(self.values.device)  # a change of dtype is not for what is stored
        if counted:
            self.column_offsets()  # a compiler that meets the layer next could not keep them
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, k={self.k}, nnz={self.nnz}, "
            f"value_bits={self.value_bits}, bias={self.bias is not None}"
        )


def set_runtime(model: nn.Module, runtime: Runtime) -> None:
    """Choose what every sparse layer of a model keeps in memory, and so what it multiplies with.

    Args:
        runtime: "packed" keeps nothing beside the packed form, which the kernels read as it is (where there is no
            kernel, S is unpacked in each call). "unpacked" keeps S as a dense matrix: more memory than the dense model.
            "dense" keeps the product W = D S: the dense model's speed for long prompts, and its memory beside the
            packed form's. "auto", as loaded: packed where there is a kernel, else unpacked, on first use.
    """
    for module in model.modules():
        if isinstance(module, SparseDictionaryLinear):
            module.set_runtime(runtime)


class LowRankLinear(nn.Module):
    """A projection W ~ left^T right^T of rank r: y = (x left^T) right^T + b.

    Parameters: left (r, d1), right (d2, r), bias (d2,) or None. The layers of a group hold the same `left`.
    """

    group: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.left = nn.Parameter(torch.empty(r, in_features, dtype=dtype, device=device))
        self.right = nn.Parameter(torch.empty(out_features, r, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d1) -> (..., d2), in x's dtype."""
        z = _multiply(x, self.left, self.group, _linear)
        return nn.functional.linear(z, self.right.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (d2, d1) this layer stands for, computed in float64."""
        return (self.right.detach().double() @ self.left.detach().double()).to(dtype)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, r={self.r}, bias={self.bias is not None}"

"""Gram matrices G = X^T X of projection inputs, streamed, and the whitening factor L with L^T L = G."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from cospadi import compat, native
from cospadi.errors import UserError
from cospadi.experts import all_beside
from cospadi.model.projections import read_by_linear
from cospadi.solvers.products import float32_products, self_product


class _LastBlockDone(Exception):
    """Ends a forward pass after the last block that is wanted."""


@torch.no_grad()
def accumulate_grams(
    model: nn.Module,
    readers: Sequence[str],
    sequences: Tensor,
    batch_size: int,
    last_block: nn.Module | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Uncentred Gram matrices of the inputs of some modules, over all calibration tokens.

    Activations live for one batch only: each is multiplied in float32 and added in float64.

    Args:
        readers: names of the modules whose inputs are wanted, one for each distinct input.
        sequences: int64 (sequences, tokens).
        last_block: the forward pass stops after this module.
        on_batch: called with the number of sequences just done.

    Returns:
        name -> float64 (d1, d1) on the module's device. All zeros where the module never ran.

    Raises:
        UserError: a non-finite activation; the message names the module.
    """

    def stop(*_: object) -> None:
        raise _LastBlockDone

    handle = last_block.register_forward_hook(stop) if last_block is not None else None
    device = next(model.parameters()).device
    try:
        with adding_grams({name: model.get_submodule(name) for name in readers}) as grams:
            for start in range(0, len(sequences), batch_size):
                batch = sequences[start : start + batch_size]
                with suppress(_LastBlockDone):
                    model(input_ids=batch.to(device), use_cache=False)
                if on_batch:
                    on_batch(len(batch))
    finally:
        if handle is not None:
            handle.remove()
    return grams


@contextmanager
def adding_grams(readers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """G = X^T X of the inputs of some linear layers, over all that runs through them inside this block; at its end what
    experts have seen too little of is filled up (`fill_up`).

    Yields:
        name -> float64 (d1, d1), all zeros as long as the layer has not run.
    """
    grams = {name: zero_gram(module) for name, module in readers.items()}
    tokens = dict.fromkeys(readers, 0)

    def add_input(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = read_by_linear(args, kwargs).detach()
            grams[name] += gram_block(x, x, name)
            if all_beside(name):
                tokens[name] += int(x.any(-1).sum())  # some are given zeros for what is not theirs

        return hook

    handles = [module.register_forward_pre_hook(add_input(name), with_kwargs=True) for name, module in readers.items()]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()
    fill_up(grams, tokens)


def fill_up(grams: Mapping[str, Tensor], tokens: Mapping[str, int]) -> None:
    """Add to the Gram of every expert that has seen fewer tokens than it has inputs as many as it lacks, of the mean
    token that the experts beside it have seen: what the text does not tell of it, it has in common with them.

    Args:
        grams: name of a layer -> G, written to. tokens: name -> how many are in it.
    """
    beside: dict[str, list[str]] = {}
    for name in sorted(grams):  # sums do not depend on which expert runs first
        if of_all := all_beside(name):
            beside.setdefault(of_all, []).append(name)
    for names in beside.values():
        seen = sum(tokens[name] for name in names)
        if len(names) > 1 and seen:
            mean = sum((grams[name] for name in names[1:]), start=grams[names[0]]) / seen
            for name in names:
                grams[name].add_(mean, alpha=max(0, len(mean) - tokens[name]))


def zero_gram(module: nn.Module) -> Tensor:
    """A Gram of a linear layer's input before any token: float64 (d1, d1) on its device."""
    assert isinstance(module, nn.Linear)
    return torch.zeros(module.in_features, module.in_features, dtype=torch.float64, device=module.weight.device)


def gram_block(x: Tensor, y: Tensor, name: str, what: str = "input") -> Tensor:
    """X^T Y of one batch of activations (..., d1), float32 (d1, d1).

    Entries that are bf16 lose nothing where the hardware multiplies float32 as TF32 or bf16: it may then.

    Raises:
        UserError: it is not finite; the message says that it is this, the input unless told otherwise, of `name`.
    """
    left = x.flatten(0, -2)
    exact_in_bf16 = x.dtype == y.dtype == torch.bfloat16
    if exact_in_bf16 and y is x and x.is_cpu and native.takes_grams() and not compat.cpu_multiplies_in_tiles():
        block = native.gram(left)
    else:
        with float32_products("medium") if exact_in_bf16 else nullcontext():
            block = self_product(left.float()) if y is x else left.float().T @ y.flatten(0, -2).float()
    if not torch.isfinite(block.diagonal()).all():
        raise UserError(
            f"the {what} of {name} is not finite on the calibration text. "
            "Check the model's dtype (fp16 overflows in some models) and its weights"
        )
    return block


@dataclass(frozen=True)
class Whitening:
    """The metric of a projection's input, ||X E|| = ||L E||, with L^T L = G + shift I.

    Attributes:
        gram: G, float64 (d1, d1), symmetric, positive semidefinite up to rounding, or None for L = I.
        tokens: rows of X.
        damping: of a singular G, relative to its mean diagonal.
    """

    gram: Tensor | None
    tokens: int = 1
    damping: float = 1e-6

    @property
    def factor(self) -> Tensor | None:
        """L, upper triangular, float64 (d1, d1); computed when it is first asked for."""
        return self._factored[0]

    @property
    def shift(self) -> float:
        """What is added to the diagonal of G: nothing, or where G is singular to rounding the paper's (A.1),
        max(0, -lambda_min(G) + damping * mean diagonal)."""
        return self._factored[1]

    @property
    def scale(self) -> float:
        """Norm in the metric that an atom of rms(x d) = 1 has: sqrt(tokens), or 1 for L = I."""
        return 1.0 if self.gram is None else self.tokens**0.5

    @cached_property
    def _factored(self) -> tuple[Tensor | None, float]:
        if self.gram is None:
            return None, 0.0
        gram, shift = self.gram, 0.0
        rounding = len(gram) * torch.finfo(gram.dtype).eps * float(gram.diagonal().max())
        factor = _cholesky(gram, smallest_pivot=rounding)
        if factor is None:
            smallest = float(torch.linalg.eigvalsh(gram)[0])
            shift = max(0.0, -smallest + self.damping * float(gram.diagonal().mean()))
            factor = _cholesky(gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), 0.0)
            if factor is None:
                raise UserError(
                    f"a Gram matrix stays singular after a diagonal shift of {shift:.3g}. "
                    f"Raise --damping (now {self.damping:g})"
                )
        return factor, shift

    def apply(self, weight: Tensor) -> Tensor:
        """L W for W (d1, d2), in float64."""
        weight = weight.double()
        return weight if self.factor is None else self.factor @ weight

    def undo(self, dictionary: Tensor) -> Tensor:
        """D = L^-1 D_L for D_L (d1, k), in float64."""
        dictionary = dictionary.double()
        if self.factor is None:
            return dictionary
        solution: Tensor = torch.linalg.solve_triangular(self.factor, dictionary, upper=True)
        return solution

    def energy(self, error: Tensor) -> Tensor:
        """||X e_j||^2 of every column e_j of E (d1, d2), float64 (d2,)."""
        error = error.double()
        return (error * (error if self.gram is None else self.gram @ error)).sum(0).clamp(min=0)


IDENTITY = Whitening(None)


def whiten(gram: Tensor, tokens: int, damping: float) -> Whitening:
    """The metric of a Gram matrix; of a zero one L = I."""
    return Whitening(gram, tokens, damping) if float(gram.diagonal().mean()) else IDENTITY


def _cholesky(gram: Tensor, smallest_pivot: float) -> Tensor | None:
    """Upper Cholesky factor, or None where a pivot is not above `smallest_pivot` (one that is lost in rounding may
    still count as a success with LAPACK)."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(gram, upper=True)
    if info.item() or not bool((factor.diagonal().square() > smallest_pivot).all()):
        return None
    return factor

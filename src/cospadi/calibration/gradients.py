"""How much the loss cares about the outputs of projections and blocks, on real text.

To second order, with the Kronecker factors of its Fisher matrix (K-FAC, Martens and Grosse 2015), an error E of a
projection, (d1, d2), costs the loss tr(Gamma E^T G E): G is the Gram of its inputs, Gamma that of the gradients at its
outputs. Gamma's diagonal alone is the Fisher weight of each output; what is off it tells which errors of several
outputs add up.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from cospadi.calibration.grams import gram_block
from cospadi.calibration.spill import Spill
from cospadi.calibration.walk import Calls, advance, call, embed, logits, replaced_forwards, walk
from cospadi.errors import UserError, first_line
from cospadi.model.blocks import Blocks
from cospadi.model.projections import Projection, decoder_blocks, read_by_linear
from cospadi.solvers.gram import damped_factor

WIDEST = 2048
"""Outputs between which gradients are told apart. Of a wider projection Gamma has blocks of so many outputs or fewer,
16 MB each; what lies between them counts as zero."""

INPUT = ".input"
"""After a projection's name: what it reads."""

PIVOT = ".pivot"
"""After a projection's name: what is left of each of its inputs once those after it are known."""

TINY = torch.finfo(torch.float32).tiny

FLOOR = 1e-3
"""Smallest entry of the diagonal, in means over the projection's outputs: no output is worth nothing."""

NOISE = ".noise"
"""After a name: how much of what is off the diagonal of its Gamma is chance."""


def gradient_grams(
    model: nn.Module,
    projections: Sequence[Projection],
    sequences: Tensor,
    full: bool,
    on_sequence: Callable[[float], None] | None = None,
    readers: Collection[str] = (),
) -> dict[str, Tensor]:
    """Gamma: the mean over tokens of g g^T, g the gradient of the summed next-token loss at a projection's output.

    One sequence at a time, and each decoder block is run again on the way back (gradient checkpointing), so that memory
    holds the whole model and the activations of one block. Parameters get no gradients.

    Args:
        sequences: int64 (sequences, tokens).
        full: whether all of Gamma is wanted, in blocks of at most WIDEST outputs; else its diagonal.
        on_sequence: called with 1 after each sequence.
        readers: projections whose inputs' pivots are wanted.

    Returns:
        name -> float32 (blocks, width, width), the last one filled up with zeros, or (d2,). All zeros where no token
        reached a projection (an expert). name + INPUT -> E[x_i^2] of its inputs, float32 (d1,). name + NOISE -> float32
        (blocks,): the part of what is off the diagonal that is chance, as sequences differ. name + PIVOT, of the
        readers -> the diagonal of R, float32 (d1,), with R^T R the inverse of the damped E[x x^T] (`damped_factor`).

    Raises:
        UserError: a gradient that is not finite; the message names the projection.
    """
    device = next(model.parameters()).device
    modules = list(decoder_blocks(model)[1])
    forwards = [partial(checkpoint, block.forward, use_reentrant=False) for block in modules]  # keep their inputs only
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _summed_gradients(model, projections, full, readers) as sums,
        _gradients_to_activations_only(model),
        replaced_forwards(modules, forwards),
        deterministic(device),
    ):
        for tokens in sequences:
            tokens = tokens[None].to(device)
            try:
                summed_loss(model, model(input_ids=tokens, use_cache=False).logits, tokens).backward()  # type: ignore[no-untyped-call]
            except (AssertionError, NotImplementedError, RuntimeError) as error:
                if "memory" in str(error):
                    raise
                raise UserError(
                    f"{type(model).__name__} gives no gradients: {first_line(error)}. "
                    "Use --metric output, which needs none"
                ) from error
            if on_sequence:
                on_sequence(1)
    return sums.means(sequences.numel())


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Gradients that do not depend on timing inside this block, where torch has such ones.

    On a GPU attention is products and a softmax then: its fused kernels add up in any order unless torch raises at
    everything that it has no fixed order for. That takes memory by the square of a sequence's length.
    """
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()
    try:
        with warnings.catch_warnings(), plain:
            warnings.filterwarnings("ignore", "Deterministic behavior|.*does not have a deterministic implementation")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def gradient_grams_by_blocks(
    blocks: Blocks,
    calls: Calls,
    projections: Sequence[Projection],
    sequences: Tensor,
    full: bool,
    spill: Spill,
    on_sequence: Callable[[float], None] | None = None,
    readers: Collection[str] = (),
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """`gradient_grams` with one block in memory at a time: forward, keeping the inputs of every block, then back.

    Args:
        calls: how blocks are called with one sequence.
        spill: keeps the inputs of all blocks.
        on_sequence: called with fractions that add up to the number of sequences.

    Yields:
        Index of a block, last one first; what `gradient_grams` returns, of its projections, and under the block's name
        Gamma's diagonal of its own output.
    """
    step = len(sequences) / (2 * len(blocks))
    inputs = [embed(blocks, sequences, 1, spill)]
    for index, block in walk(blocks, range(len(blocks))):
        inputs.append(inputs[-1].copy())
        advance(block, index, calls, inputs[-1], {})
        if on_sequence:
            on_sequence(step)
    gradients = inputs.pop()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        no_parameter_gradients(blocks.model),
        deterministic(blocks.device),
    ):
        for batch, tokens in enumerate(sequences):
            hidden = gradients[batch].requires_grad_()
            tokens = tokens[None].to(blocks.device)
            summed_loss(blocks.model, logits(blocks, calls, hidden, tokens), tokens).backward()  # type: ignore[no-untyped-call]
            assert hidden.grad is not None
            gradients[batch] = hidden.grad
    for index, block in walk(blocks, reversed(range(len(blocks)))):
        before = inputs.pop()
        of_block = [p for p in projections if p.block == index]
        name, width = blocks.name_of(index), before[0].shape[-1]
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _summed_gradients(blocks.model, of_block, full, readers) as sums,
            no_parameter_gradients(block),
            deterministic(blocks.device),
        ):
            sums.gammas[name] = _Gamma.zeros(width, False, blocks.device)
            for batch in range(len(before)):
                sums.gammas[name].add(gradients[batch], name)
                hidden = before[batch].requires_grad_()
                call(block, index, calls, hidden).backward(gradients[batch])  # type: ignore[no-untyped-call]
                assert hidden.grad is not None
                gradients[batch] = hidden.grad
        before.close()
        if on_sequence:
            on_sequence(step)
        yield index, sums.means(sequences.numel())
    gradients.close()


def summed_loss(model: nn.Module, predicted: Tensor, tokens: Tensor) -> Tensor:
    """Next-token loss of one sequence, (1, tokens), summed over its tokens."""
    if not predicted.requires_grad:
        raise UserError(f"{type(model).__name__} gives no gradients. Use --metric output, which needs none")
    return nn.functional.cross_entropy(predicted[0, :-1].float(), tokens[0, 1:], reduction="sum")


@contextmanager
def _summed_gradients(
    model: nn.Module, projections: Sequence[Projection], full: bool, readers: Collection[str]
) -> Iterator[_Sums]:
    """Inside this block, g g^T of the gradients at the projections' outputs is added up over tokens, or its diagonal,
    and the squares of their inputs, or the Grams of the readers'."""
    sums = _Sums({}, {}, {})

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = read_by_linear(args, kwargs).detach().flatten(0, -2)
            squares, read = x.float().square().sum(0), x if name in sums.grams else None

            def add(gradient: Tensor) -> None:  # once, though checkpointed blocks run twice
                sums.inputs[name] += squares
                if read is not None:
                    sums.grams[name] += gram_block(read, read, name)
                sums.gammas[name].add(gradient, name)

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    handles = []
    for projection in projections:
        module = model.get_submodule(projection.name)
        assert isinstance(module, nn.Linear)
        sums.gammas[projection.name] = _Gamma.zeros(projection.d2, full, module.weight.device)
        sums.inputs[projection.name] = torch.zeros(projection.d1, device=module.weight.device)
        if projection.name in readers:
            sums.grams[projection.name] = torch.zeros(projection.d1, projection.d1, device=module.weight.device)
        handles.append(module.register_forward_hook(watch(projection.name), with_kwargs=True))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def output_widths(d2: int) -> list[int]:
    """How many outputs each block of a full Gamma has: the same number, but for the last."""
    width = -(-d2 // -(-d2 // WIDEST))
    return [min(width, d2 - start) for start in range(0, d2, width)]


def gamma_shape(d2: int, full: bool) -> tuple[int, ...]:
    """Of a Gamma: its blocks, the last one filled up with zeros, or its diagonal."""
    widths = output_widths(d2)
    return (len(widths), widths[0], widths[0]) if full else (d2,)


@dataclass
class _Gamma:
    """A Gamma on its way.

    Attributes:
        total: the sum over tokens. squares: of a full one, the sum over sequences of the squares of theirs.
        times: sequences.
    """

    total: Tensor
    squares: Tensor | None
    times: int = 0

    @classmethod
    def zeros(cls, d2: int, full: bool, device: torch.device) -> Self:
        total = torch.zeros(gamma_shape(d2, full), device=device)
        return cls(total, torch.zeros_like(total) if full else None)

    def add(self, gradient: Tensor, name: str) -> None:
        """Add the gradients (..., d2) of one sequence at the output of something."""
        gradient = gradient.detach().flatten(0, -2)
        self.times += 1
        if self.squares is None:
            self.total += gradient.float().square().sum(0)
            return
        parts = torch.split(gradient, self.total.shape[-1], dim=1)
        for total, squares, part in zip(self.total, self.squares, parts, strict=True):
            width = part.shape[1]
            gram = gram_block(part, part, name, "gradient at the output")
            total[:width, :width] += gram
            squares[:width, :width] += gram.square_()

    def noise(self) -> Tensor:
        """Of each block, what the entries off the diagonal vary by chance, in their size: both summed over squares of
        entries scaled to a unit diagonal. 1 where there are not two sequences to tell, or nothing."""
        assert self.squares is not None
        noise = torch.ones(len(self.total), device=self.total.device)
        if self.times < 2:
            return noise
        for index, (total, squares) in enumerate(zip(self.total, self.squares, strict=True)):
            scales = total.diagonal().clamp(min=TINY).reciprocal()
            sizes = total.square().fill_diagonal_(0)
            varied = (squares - total.square() / self.times).fill_diagonal_(0) * (self.times / (self.times - 1))
            size = scales @ sizes @ scales
            if size > 0:
                noise[index] = (scales @ varied @ scales / size).clamp(0, 1)
        return noise


@dataclass
class _Sums:
    """Name -> its Gamma on its way; name -> the sum over tokens of x_i^2 of its inputs, and of x x^T."""

    gammas: dict[str, _Gamma]
    inputs: dict[str, Tensor]
    grams: dict[str, Tensor]

    def means(self, tokens: int) -> dict[str, Tensor]:
        """As `gradient_grams` returns them."""
        found = {name: gamma.total / tokens for name, gamma in self.gammas.items()}
        found |= {f"{name}{INPUT}": squares / tokens for name, squares in self.inputs.items()}
        for name, gram in self.grams.items():
            found[f"{name}{PIVOT}"] = damped_factor(gram / tokens).diagonal().float()
        return found | {f"{name}{NOISE}": g.noise() for name, g in self.gammas.items() if g.squares is not None}


def diagonal_of(gamma: Tensor, d2: int) -> Tensor:
    """The diagonal (d2,) of a Gamma, in blocks or a diagonal alone."""
    return gamma if gamma.ndim == 1 else gamma.diagonal(dim1=1, dim2=2).flatten()[:d2]


def conditioned(gamma: Tensor, noise: Tensor | None, d2: int, instead: float) -> list[Tensor]:
    """A Gamma for solvers: no output is worth nothing, and what is off the diagonal is shrunk by what is chance in it,
    which brings it as near the true one as a factor can (Ledoit and Wolf 2004, towards the diagonal).

    Args:
        noise: (blocks,), of a full Gamma.
        instead: its mean diagonal where no token has reached the projection.

    Returns:
        The diagonal (d2,) alone; or the blocks (width, width), side by side.
    """
    diagonal = diagonal_of(gamma, d2)
    mean = float(diagonal.mean())
    if mean == 0:
        return [torch.full_like(diagonal, instead)]
    diagonal = diagonal.clamp(min=FLOOR * mean)
    if noise is None:
        return [diagonal]
    blocks = []
    for block, chance, own in zip(gamma, noise, torch.split(diagonal, gamma.shape[-1]), strict=True):
        block = block[: len(own), : len(own)] * (1 - chance)
        block.diagonal().copy_(own)
        blocks.append(block)
    return blocks


@contextmanager
def _gradients_to_activations_only(model: nn.Module) -> Iterator[None]:
    """Parameters need no gradient inside this block; what the embedding gives does, so that activations get theirs."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    # a copy, since some models write to what they are given
    handle = embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_().clone())
    try:
        with no_parameter_gradients(model):
            yield
    finally:
        handle.remove()


@contextmanager
def no_parameter_gradients(module: nn.Module) -> Iterator[None]:
    """Parameters need no gradient inside this block."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()

"""Trellis-coded quantization with error feedback on NVIDIA GPUs: `native.quantize` there. Importing it needs Triton.

A program has a block of outputs and goes through all inputs of a run, one warp wide. For an input it finds the costs of
all outputs side by side, then goes over them one by one, then finds the way back side by side again. The middle part
takes nearly all of the time, and it is its latency that counts: all threads hold all eight sums, so that none waits for
another's, and costs are read a group of outputs before they are needed. From where paths come is found afterwards, from
the sums before each group, for all groups at a time. Maps of states to states are joined by a scan, so that going back
is no chain of reads.

Ties and roundings are those of the C++ library and of plain torch: divisions are rounded to nearest, products and sums
one by one (`enable_fp_fusion` off, without which the last bits of costs and of errors would differ). What is fed from
run to run, a product of torch's, may differ in the last place from device to device, and with it later levels.

Under TRITON_INTERPRET=1, set before Triton is imported, the kernel runs on tensors in main memory.
"""

# Functions under triton.jit are no Python, and have no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from cospadi.errors import KernelError, first_line

CHUNK = 64
"""Outputs that are taken side by side: the rows that most blocks have."""

GROUP = tl.constexpr(4)
"""Outputs whose costs are read before those of the four before them are needed."""

LARGEST = tl.constexpr(32000.0)
"""Of a level."""

NEVER = tl.constexpr(float("inf"))

STAY = tl.constexpr(0x76543210)
"""A map of the eight states to states, four bits each, the lowest ones state 0's: the one that changes none."""

NEXT_ODD = tl.constexpr(0x51604372)
"""The map to the next state where a symbol is odd (src/cospadi/format/rans.py)."""


@triton.jit
def _at(map, state):
    """Where a map sends a state."""
    return (map >> (4 * state)) & 7


@triton.jit
def _joined(first, then):
    """The map that does what two maps do, one after the other."""
    found = _at(then, _at(first, 7))
    for i in tl.static_range(7):
        found = found * 16 + _at(then, _at(first, 6 - i))
    return found


@triton.jit
def _cheapest(magnitude, price, last, QUANTIZER: tl.constexpr, PARITY: tl.constexpr):
    """The cheapest symbol of a quantizer and a parity, and what it costs.

    price: pointers to what symbols of the quantizer cost, from 0 to `last` on.
    """
    place = tl.maximum((magnitude + QUANTIZER) * 0.5, PARITY)
    first = PARITY + 2 * ((place - PARITY) * 0.5).to(tl.int32)
    second = first + 2
    error = magnitude - tl.where(first > 0, 2 * first - QUANTIZER, 0).to(tl.float32)
    cost = error * error + tl.load(price + tl.minimum(first, last))
    error = magnitude - (2 * second - QUANTIZER).to(tl.float32)
    other = error * error + tl.load(price + tl.minimum(second, last))
    return tl.minimum(cost, other), tl.where(other < cost, second, first)


@triton.jit
def _four(pointer):
    """The four numbers from a pointer on."""
    return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)


@triton.jit
def _into(sum0, cost0, sum1, cost1, STATE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """The lesser of two sums on the way into a state, and from where it comes, at the state's place in a map."""
    first, second = sum0 + cost0, sum1 + cost1
    return tl.minimum(first, second), tl.where(second < first, SECOND << (4 * STATE), FIRST << (4 * STATE))


@triton.jit
def _step(s, c):
    """Sums in the eight states after an output, less the least one, and the map from them to the states before it.

    Args:
        s: before, a tuple of eight. c: costs of its symbols, a tuple of four, by quantizer times two and parity.
    """
    n0, m0 = _into(s[0], c[0], s[4], c[1], 0, 0, 4)
    n1, m1 = _into(s[2], c[0], s[6], c[1], 1, 2, 6)
    n2, m2 = _into(s[0], c[1], s[4], c[0], 2, 0, 4)
    n3, m3 = _into(s[2], c[1], s[6], c[0], 3, 2, 6)
    n4, m4 = _into(s[3], c[3], s[5], c[2], 4, 3, 5)
    n5, m5 = _into(s[1], c[2], s[7], c[3], 5, 1, 7)
    n6, m6 = _into(s[3], c[2], s[5], c[3], 6, 3, 5)
    n7, m7 = _into(s[1], c[3], s[7], c[2], 7, 1, 7)
    low = tl.minimum(tl.minimum(n0, n1), tl.minimum(n2, n3))
    least = tl.minimum(low, tl.minimum(tl.minimum(n4, n5), tl.minimum(n6, n7)))  # so that sums stay small
    after = (n0 - least, n1 - least, n2 - least, n3 - least, n4 - least, n5 - least, n6 - least, n7 - least)
    return after, (m0 | m1 | m2) | (m3 | m4 | m5) | (m6 | m7)


@triton.jit
def _keep(pointer, s):
    """Eight sums to memory, by all threads: if only one stored them, it would have to part from the others."""
    same = tl.zeros([32], tl.int32)
    for state in tl.static_range(8):
        tl.store(pointer + state + same, s[state])


@triton.jit
def _first_of_least(s):
    """The state of the least sum; the first of equal ones."""
    least, state = s[0], tl.full([], 0, tl.int32)
    for other in tl.static_range(1, 8):
        state = tl.where(s[other] < least, other, state)
        least = tl.minimum(least, s[other])
    return state


@triton.jit
def _choose(wanted, unit, prices, own_class, last_class, last_symbol, costs, symbols, output, inside):
    """For outputs side by side the cheapest symbol of each quantizer and parity, and its cost, to memory."""
    magnitude = tl.minimum(tl.abs(tl.div_rn(wanted, unit)), LARGEST)
    even = prices + tl.minimum(tl.maximum(own_class, 0), last_class) * (2 * (last_symbol + 1))
    odd = even + (last_symbol + 1)
    cost0, symbol0 = _cheapest(magnitude, even, last_symbol, 0, 0)
    cost1, symbol1 = _cheapest(magnitude, even, last_symbol, 0, 1)
    cost2, symbol2 = _cheapest(magnitude, odd, last_symbol, 1, 0)
    cost3, symbol3 = _cheapest(magnitude, odd, last_symbol, 1, 1)
    tl.store(costs + 4 * output, cost0, mask=inside)
    tl.store(costs + 4 * output + 1, cost1, mask=inside)
    tl.store(costs + 4 * output + 2, cost2, mask=inside)
    tl.store(costs + 4 * output + 3, cost3, mask=inside)
    low, high = symbol0 | (symbol1 << 16), symbol2 | (symbol3 << 16)
    tl.store(symbols + output, low.to(tl.int64) | (high.to(tl.int64) << 32), mask=inside)


@triton.jit
def _forward(costs, sums, count):
    """The state at the end of the cheapest path over `count` outputs; the sums before every fourth one to memory.

    Costs are read four outputs ahead, and beyond the last one, which is of no consequence.
    """
    zero, never = tl.full([], 0.0, tl.float32), tl.full([], NEVER, tl.float32)
    s = (zero, never, never, never, never, never, never, never)
    c0, c1, c2, c3 = _four(costs), _four(costs + 4), _four(costs + 8), _four(costs + 12)
    whole = count - count % GROUP
    for _group in range(0, whole, GROUP):
        costs += 4 * GROUP
        later0, later1, later2, later3 = _four(costs), _four(costs + 4), _four(costs + 8), _four(costs + 12)
        _keep(sums, s)
        sums += 8
        s, _ = _step(s, c0)
        s, _ = _step(s, c1)
        s, _ = _step(s, c2)
        s, _ = _step(s, c3)
        c0, c1, c2, c3 = later0, later1, later2, later3
    _keep(sums, s)
    for _output in range(whole, count):
        s, _ = _step(s, c0)
        c0, c1 = c1, c2
    return _first_of_least(s)


@triton.jit
def _find_maps(costs, sums, maps, count, group):
    """The maps of some groups of four outputs, side by side, to memory."""
    output = GROUP * group
    own, kept = costs + 4 * output, sums + 8 * group
    s = _four(kept) + _four(kept + 4)
    for i in tl.static_range(GROUP):
        s, found = _step(s, _four(own + 4 * i))
        tl.store(maps + output + i, found, mask=output + i < count)


@triton.jit
def _states(maps, output, inside, lane, state):
    """States before and after outputs, from the last one back, a lane each; `state` is that after the first lane's."""
    then = tl.load(maps + output + 1, mask=inside & (lane > 0), other=STAY)
    after = _at(tl.associative_scan(then, 0, _joined), state)
    return _at(tl.load(maps + output, mask=inside, other=STAY), after), after


@triton.jit
def _level(symbols, before, after):
    """Magnitudes of levels. symbols: as `_choose` keeps them."""
    quantizer = before & 1
    parity = tl.where(_at(tl.full([], NEXT_ODD, tl.int32), before) == after, 1, 0)
    symbol = ((symbols >> (32 * quantizer + 16 * parity).to(tl.int64)) & 0xFFFF).to(tl.int32)
    return tl.where(symbol > 0, 2 * symbol - quantizer, 0)


@triton.jit(do_not_specialize=["inputs", "d2", "block_rows", "last_class", "last_symbol"])
def _run(
    target,
    feedback,
    steps,
    scales,
    cols,
    rows,
    prices,
    levels,
    errors,
    costs,
    symbols,
    sums,
    maps,
    inputs,
    d2,
    block_rows,
    last_class,
    last_symbol,
    CHUNK: tl.constexpr,
):
    """Levels and errors of some inputs. Grid (blocks of outputs). Arguments are those of `quantize`, and room.

    costs: float32 (blocks, places, 4), of the cheapest symbols of each quantizer and parity. symbols: int64 (blocks,
    places), these, 16 bits each. sums: float32 (blocks, places / 4, 8). maps: int32 (blocks, places), from states after
    an output to those before it. There are places for whole chunks of outputs, and CHUNK more.
    """
    block, lane = tl.program_id(0), tl.arange(0, CHUNK)
    places = (tl.cdiv(block_rows, CHUNK) + 1) * CHUNK
    begin = block * block_rows
    count = tl.minimum(block_rows, d2 - begin)
    target, levels, errors = target + begin, levels + begin, errors + begin
    scales, rows = scales + begin, rows + begin
    costs, symbols, maps = costs + block * places * 4, symbols + block * places, maps + block * places
    sums += block * (places // GROUP) * 8
    for i in range(inputs):
        step, width = tl.load(steps + i), tl.load(cols + i).to(tl.int32)
        for done in range(0, count, CHUNK):
            output = done + lane
            inside = output < count
            wanted = tl.load(target + i * d2 + output, mask=inside, other=0.0)
            earlier, part = errors + output, feedback + i
            for _ in range(i):
                wanted -= tl.load(part) * tl.load(earlier, mask=inside, other=0.0)
                earlier += d2
                part += inputs
            tl.store(errors + i * d2 + output, wanted, mask=inside)
            unit = step * tl.load(scales + output, mask=inside, other=1.0)
            own_class = tl.load(rows + output, mask=inside, other=0).to(tl.int32) + width
            _choose(wanted, unit, prices, own_class, last_class, last_symbol, costs, symbols, output, inside)
        tl.debug_barrier()
        state = _forward(costs, sums, count)
        tl.debug_barrier()
        for done in range(0, count, CHUNK):
            _find_maps(costs, sums, maps, count, done // GROUP + tl.arange(0, CHUNK // GROUP))
        tl.debug_barrier()
        pivot = tl.load(feedback + i * inputs + i)
        for done in range(0, count, CHUNK):
            output = count - 1 - done - lane
            inside = output >= 0
            before, after = _states(maps, output, inside, lane, state)
            state = tl.sum(tl.where(lane == CHUNK - 1, before, 0), 0)
            level = _level(tl.load(symbols + output, mask=inside, other=0), before, after)
            wanted = tl.load(errors + i * d2 + output, mask=inside, other=0.0)
            level = tl.where(wanted < 0, -level, level)
            tl.store(levels + i * d2 + output, level.to(tl.int16), mask=inside)
            unit = step * tl.load(scales + output, mask=inside, other=1.0)
            left = wanted - level.to(tl.float32) * unit
            tl.store(errors + i * d2 + output, tl.div_rn(left, pivot + tl.zeros_like(left)), mask=inside)
        tl.debug_barrier()


INTERPRETED = not isinstance(_run, triton.JITFunction)
"""Whether Triton's interpreter runs the kernel, on tensors in main memory (TRITON_INTERPRET=1)."""

_failed: list[str] = []
"""Why Triton could not compile or launch the kernel here."""


def can_quantize(target: Tensor) -> bool:
    """Whether `quantize` takes it: a CUDA tensor (under the interpreter one of the CPU), and no call has failed."""
    return not _failed and target.device.type == ("cpu" if INTERPRETED else "cuda")


def quantize(
    target: Tensor,
    feedback: Tensor,
    steps: Tensor,
    scales: Tensor,
    cols: Tensor,
    rows: Tensor,
    prices: Tensor,
    block_rows: int,
) -> tuple[Tensor, Tensor]:
    """As `native.quantize`, to the last bit.

    Raises:
        KernelError: Triton cannot compile or launch the kernel on this machine.
    """
    (inputs, d2), device = target.shape, target.device
    given = [tensor.contiguous() for tensor in (target, feedback, steps, scales, cols, rows, prices)]
    (classes, _, symbols), blocks = prices.shape, -(-d2 // block_rows)
    places = blocks * (-(-block_rows // CHUNK) + 1) * CHUNK
    levels = torch.empty(inputs, d2, dtype=torch.int16, device=device)
    errors = torch.empty(inputs, d2, device=device)
    room = [
        torch.empty(places * each, dtype=dtype, device=device)
        for each, dtype in ((4, torch.float32), (1, torch.int64), (2, torch.float32), (1, torch.int32))
    ]
    try:
        with torch.cuda.device(device) if target.is_cuda else nullcontext():
            _run[(blocks,)](
                *(*given, levels, errors, *room, inputs, d2, block_rows, classes - 1, symbols - 1),
                CHUNK=CHUNK, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
    except torch.OutOfMemoryError:  # which is no fault of the kernel
        raise
    except Exception as error:  # whatever the compiler, the assembler, a C compiler or the driver met
        _failed.append(f"{type(error).__name__}: {first_line(error)}")
        raise KernelError(_failed[0]) from error
    return levels, errors

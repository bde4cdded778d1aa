"""Support masks and coefficient values <-> bytes. Vectorised torch on any device; exact inverses of each other.

The layouts are those of docs/format.md: mask bit j % 8 of byte j // 8, values as one little-endian bit stream in
column order, atoms ascending.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

COUNTED_BYTES = 1 << 18
"""Mask bytes whose bits are counted together: memory that is taken and given back in small pieces stays small."""


def support_row_bytes(k: int) -> int:
    """Bytes of one column's support mask: k bits, padded to whole bytes."""
    return (k + 7) // 8


def value_stream_bytes(nnz: int, value_bits: int) -> int:
    """Bytes of a projection's packed values: nnz * value_bits bits, padded to whole bytes."""
    return (nnz * value_bits + 7) // 8


def pack_support(support: Tensor) -> Tensor:
    """Boolean support -> bit mask.

    Args:
        support: bool (d2, k), row c is the support of column c.
    Returns:
        uint8 (d2, ceil(k / 8)); unused bits are 0.
    """
    d2, k = support.shape
    padded = torch.nn.functional.pad(support.to(torch.uint8), (0, -k % 8))
    shifts = torch.arange(8, device=support.device, dtype=torch.uint8)
    return (padded.view(d2, (k + 7) // 8, 8) << shifts).sum(-1, dtype=torch.uint8)


def unpack_support(mask: Tensor, k: int) -> Tensor:
    """Bit mask uint8 (d2, ceil(k / 8)) -> bool (d2, k)."""
    shifts = torch.arange(8, device=mask.device, dtype=torch.uint8)
    return ((mask.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :k].bool()


def column_counts(mask: Tensor) -> Tensor:
    """Set bits of each row of a mask: uint8 (d2, bytes) -> int64 (d2,). Counted on CPU."""
    counts = np.empty(mask.shape[0], dtype=np.int64)
    rows = max(1, COUNTED_BYTES // max(1, mask.shape[1]))
    for first in range(0, len(counts), rows):
        part = mask[first : first + rows].cpu().numpy()
        if spare := -part.shape[1] % 8:
            part = np.pad(part, ((0, 0), (0, spare)))
        np.bitwise_count(part.view(np.uint64)).sum(axis=1, out=counts[first : first + rows])
    return torch.from_numpy(counts).to(mask.device)


def column_offsets(mask: Tensor) -> Tensor:
    """Number of nonzeros before each column, and in all: mask uint8 (d2, ceil(k / 8)) -> int32 (d2 + 1,)."""
    return torch.nn.functional.pad(column_counts(mask).cumsum(0), (1, 0)).to(torch.int32)


def popcount(mask: Tensor) -> int:
    """Number of set bits in a uint8 tensor."""
    return int(column_counts(mask).sum())


def has_padding_bits(mask: Tensor, k: int) -> bool:
    """Whether any unused bit of a support mask (past atom k - 1) is set."""
    used = k % 8
    return bool(used) and bool((mask[:, -1] >> used).any())


def to_codes(values: Tensor, value_bits: int) -> Tensor:
    """float32 values -> the top `value_bits` bits of their pattern, rounded once to nearest even, saturating.

    Args:
        values: float32 (nnz,), finite.
        value_bits: 10 to 16: sign 1, exponent 8, mantissa value_bits - 9.
    Returns:
        int32 (nnz,) in [0, 2 ** value_bits).
    """
    drop = 32 - value_bits
    pattern = values.contiguous().view(torch.int32)
    magnitude = pattern & 0x7FFFFFFF
    rounded = ((magnitude >> drop) & 1).add_(magnitude).add_((1 << (drop - 1)) - 1).bitwise_right_shift_(drop)
    largest_finite = (0x7F800000 >> drop) - 1
    sign = (pattern >> drop).bitwise_and_(1 << (value_bits - 1))
    return rounded.clamp_(max=largest_finite).bitwise_or_(sign)


def from_codes(codes: Tensor, value_bits: int) -> Tensor:
    """Inverse of `to_codes` on its range: int32 (nnz,) -> float32 (nnz,), exact."""
    return (codes << (32 - value_bits)).view(torch.float32)


def pack_values(values: Tensor, value_bits: int) -> Tensor:
    """Coefficient values -> what the checkpoint stores.

    Args:
        values: float (nnz,) in column order, atoms ascending.
        value_bits: 16 (bf16) or an even width from 10 to 14.
    Returns:
        bf16 (nnz,) for 16 bits, else uint8 (ceil(value_bits * nnz / 8),), a little-endian bit stream.
    """
    codes = to_codes(values.float(), value_bits)
    if value_bits == 16:
        return from_codes(codes, 16).to(torch.bfloat16)
    return pack_codes(codes, value_bits)


def unpack_values(stream: Tensor, nnz: int, value_bits: int) -> Tensor:
    """Inverse of `pack_values`: the stored tensor -> float32 (nnz,), exact."""
    if value_bits == 16:
        return stream.float()
    return from_codes(unpack_codes(stream, nnz, value_bits), value_bits)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Integers -> one little-endian bit stream.

    Args:
        codes: int (n,) in [0, 2 ** bits).
        bits: of each: 1 to 8, or an even width up to 16.
    Returns:
        uint8 (ceil(bits * n / 8),); unused bits are 0.
    """
    # `per` codes fill a whole number of bytes and fit a 64-bit word: 4 codes in 7 bytes at 14 bits.
    per, size = _group(bits)
    n = codes.numel()
    columns = torch.nn.functional.pad(codes, (0, -n % per)).view(-1, per).to(torch.int64)
    word = torch.zeros(len(columns), dtype=torch.int64, device=codes.device)
    for i in range(per):
        word |= columns[:, i] << (bits * i)
    # The lowest byte comes first in memory on every machine that torch runs on.
    stream = word.view(torch.uint8).view(-1, 8)[:, :size]
    return stream.flatten()[: value_stream_bytes(n, bits)].clone()


def unpack_codes(stream: Tensor, n: int, bits: int) -> Tensor:
    """Inverse of `pack_codes`: int32 (n,)."""
    per, size = _group(bits)
    padded = torch.nn.functional.pad(stream, (0, -stream.numel() % size)).view(-1, size)
    word = torch.nn.functional.pad(padded, (0, 8 - size)).view(torch.int64)
    mask = (1 << bits) - 1
    codes = torch.cat([(word >> (bits * i)).bitwise_and_(mask).to(torch.int32) for i in range(per)], dim=1)
    return codes.flatten()[:n]


def unused_value_bits_set(stream: Tensor, nnz: int, value_bits: int) -> bool:
    """Whether a bit after the last value of a packed stream is set."""
    spare = -(nnz * value_bits) % 8
    return value_bits != 16 and spare > 0 and stream.numel() > 0 and bool(stream[-1] >> (8 - spare))


def unpack_coefficients(mask: Tensor, values: Tensor, k: int) -> Tensor:
    """S transposed, as a dense matrix.

    Args:
        mask: uint8 (d2, ceil(k / 8)).
        values: float (nnz,), already unpacked, in column order.
    Returns:
        (d2, k) in the dtype of `values`: row c is column c of S.
    """
    support = unpack_support(mask, k)
    return torch.zeros(support.shape, dtype=values.dtype, device=values.device).masked_scatter(support, values)


def _group(value_bits: int) -> tuple[int, int]:
    per = 8 // math.gcd(value_bits, 8)
    return per, per * value_bits // 8

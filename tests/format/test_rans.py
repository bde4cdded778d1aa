"""Coded levels against a decoder in Python's integers; the library against plain torch; lengths, damage, tables."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cospadi import native
from cospadi.format import rans, rans_tables
from cospadi.format.rans import HIGH, LOW, NEXT, levels_of

WAYS = ["plain", *native.levels()]
BUILT = pytest.mark.skipif(len(WAYS) == 1, reason="the library was not built: no C++ compiler here")


@contextmanager
def way(name: str) -> Iterator[None]:
    """Code in plain torch, or by the library at one of its levels."""
    if name == "plain":
        with patch.object(rans, "library", lambda: None):
            yield
    else:
        with patch.object(rans, "best_level", lambda: native.levels()[name]):
            yield


def example(
    d2: int, d1: int, block_rows: int, lowest: int, highest: int, seed: int = 0, wild: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels as their classes say, but for a part that is anything, and the classes' parts."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-3, 4, (d2,), generator=generator, dtype=torch.int16)
    cols = torch.randint(lowest, highest + 1, (d1,), generator=generator, dtype=torch.int16)
    sigma = 2 ** ((rows[:, None] + cols).clamp(LOW, HIGH).double() / 4)
    symbols = (torch.randn(d2, d1, generator=generator) * sigma / 2).round().long()
    anything = torch.randint(-16383, 16384, (d2, d1), generator=generator)
    symbols = torch.where(torch.rand(d2, d1, generator=generator) < wild, anything, symbols)
    return levels_of(symbols, block_rows), rows, cols


def ideal_bits(levels: Tensor, rows: Tensor, cols: Tensor, block_rows: int) -> float:
    """What all symbols take by their frequencies, with their raw bits."""
    states, symbols = rans.symbols_of(levels, block_rows)
    classes = (rows[:, None] + cols).clamp(LOW, HIGH)
    total = 0.0
    for c, q, k in zip(*(part.flatten().tolist() for part in (classes, states & 1, symbols)), strict=True):
        counts, h, b = rans_tables.frequencies(c, q), rans_tables.reach(c), rans_tables.raw_bits(c)
        place, raw = ((k >> b) + h, b) if abs(k >> b) <= h else (2 * h + 1, 16)
        total += 12 - math.log2(counts[place]) + raw
    return total


def decode_slowly(stream: bytes, rows: list[int], cols: list[int], lanes: int) -> list[list[int]]:
    """One block, as the module's docstring says, in integers."""
    words = iter([stream[i] | stream[i + 1] << 8 for i in range(4 * lanes, len(stream), 2)])
    states = [int.from_bytes(stream[4 * lane : 4 * lane + 4], "little") for lane in range(lanes)]
    levels = [[0] * len(cols) for _ in rows]

    def refill(count: int) -> None:
        for lane in range(count):
            if states[lane] < 1 << 16:
                states[lane] = states[lane] << 16 | next(words)

    for first in range(0, len(cols), lanes):
        group = cols[first : first + lanes]
        trellis = [0] * len(group)
        for j, row in enumerate(rows):
            classes = [min(max(row + col, LOW), HIGH) for col in group]
            found = []
            for lane, c in enumerate(classes):
                table, slot, symbol = rans_tables.frequencies(c, trellis[lane] & 1), states[lane] % 4096, 0
                while slot >= table[symbol]:
                    slot -= table[symbol]
                    symbol += 1
                states[lane] = table[symbol] * (states[lane] >> 12) + slot
                found.append((symbol, symbol == len(table) - 1))
            refill(len(group))
            for lane, c in enumerate(classes):
                symbol, escapes = found[lane]
                bits = 16 if escapes else rans_tables.raw_bits(c)
                low = states[lane] % (1 << bits)
                states[lane] >>= bits
                if escapes:
                    k = low - (1 << 16) if low >> 15 else low
                else:
                    k = (symbol - rans_tables.reach(c)) * (1 << bits) + low
                sign = (k > 0) - (k < 0)
                levels[j][first + lane] = 2 * k - sign * (trellis[lane] & 1)
                trellis[lane] = NEXT[trellis[lane]][k % 2]
            refill(len(group))
    assert states == [1 << 16] * lanes
    assert next(words, None) is None
    return levels


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_levels_come_back(data: st.DataObject) -> None:
    d2, d1 = data.draw(st.integers(1, 14), label="d2"), data.draw(st.integers(1, 35), label="d1")
    block_rows = data.draw(st.integers(1, 16), label="block_rows")
    lanes = data.draw(st.sampled_from([1, 4, 16]), label="lanes")
    lowest = data.draw(st.integers(LOW - 5, HIGH + 5), label="lowest")
    highest = lowest + data.draw(st.integers(0, 12), label="spread")
    wild = data.draw(st.sampled_from([0.0, 0.02, 1.0]), label="wild")
    levels, rows, cols = example(d2, d1, block_rows, lowest, highest, data.draw(st.integers(0, 99)), wild)
    coded = {}
    for name in WAYS:
        with way(name):
            coded[name] = stream, offsets = rans.encode(levels, rows, cols, block_rows, lanes)
            assert torch.equal(rans.decode(stream, offsets, rows, cols, block_rows, lanes), levels)
            for block in range(len(offsets) - 1):
                some = rans.decode(stream, offsets, rows, cols, block_rows, lanes, block, block + 1)
                assert torch.equal(some, levels[block * block_rows : (block + 1) * block_rows])
    assert all(
        torch.equal(mine, plain) for name in WAYS for mine, plain in zip(coded[name], coded["plain"], strict=True)
    )
    stream, offsets = coded["plain"]
    for block, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        part = slice(block * block_rows, (block + 1) * block_rows)
        slowly = decode_slowly(bytes(stream[begin:end].tolist()), rows[part].tolist(), cols.tolist(), lanes)
        assert slowly == levels[part].tolist()


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_every_class_and_the_ends_of_its_table(name: str, lanes: int) -> None:
    classes = range(LOW - 2, HIGH + 3)
    ends = []
    for c in (min(max(c, LOW), HIGH) for c in classes):
        first, last = (
            -rans_tables.reach(c) << rans_tables.raw_bits(c),
            rans_tables.reach(c) + 1 << rans_tables.raw_bits(c),
        )
        ends.append([0, 1, -1, first, last - 1, first - 1, last, 16383, -16383, 16384 if c % 2 else -16384, 0])
    symbols = torch.tensor(ends).T.contiguous()
    symbols[9] = symbols[9].where(symbols[9] < 0, 0)  # 2 * 16384 is no int16
    levels = levels_of(symbols, 11)
    rows, cols = torch.zeros(11, dtype=torch.int16), torch.tensor(classes, dtype=torch.int16)
    with way(name):
        stream, offsets = rans.encode(levels, rows, cols, 11, lanes)
        assert torch.equal(rans.decode(stream, offsets, rows, cols, 11, lanes), levels)
    bits = ideal_bits(levels, rows, cols, 11)
    assert decode_slowly(bytes(stream.tolist()), rows.tolist(), cols.tolist(), lanes) == levels.tolist()
    assert abs(8 * (len(stream) - 4 * lanes) - bits) < 0.01 * bits + 32 * lanes


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_code(name: str, shape: tuple[int, int]) -> None:
    levels, rows, cols = torch.zeros(shape, dtype=torch.int16), *(torch.zeros(n, dtype=torch.int16) for n in shape)
    with way(name):
        stream, offsets = rans.encode(levels, rows, cols, 2, 4)
        assert len(stream) == 16 * (len(offsets) - 1) == 16 * -(-shape[0] // 2)
        assert rans.decode(stream, offsets, rows, cols, 2, 4).shape == shape


@pytest.mark.parametrize("c", [2, 7, 11, 22])
def test_length_is_the_ideal_one(c: int) -> None:
    """At about 2, 3, 4 and 7 bits a level, each block's states apart."""
    levels, rows, cols = example(256, 200, 128, c - 1, c + 1)
    stream, offsets = rans.encode(levels, rows, cols, 128, 16)
    bits = ideal_bits(levels, rows, cols, 128)
    assert 0.999 * bits < 8 * len(stream) < 1.01 * bits + 8 * 4 * 16 * (len(offsets) - 1)


def test_bits_table_beyond_a_table_and_with_raw_bits() -> None:
    table = rans.bits_table()
    assert table.shape == (HIGH - LOW + 1, 2, 128)
    assert table.dtype == torch.float32
    for c, q in itertools.product(range(LOW, HIGH + 1), (0, 1)):
        counts, h, b = rans_tables.frequencies(c, q), rans_tables.reach(c), rans_tables.raw_bits(c)
        for magnitude in (0, 1, 5, 100):
            places = [(sign * magnitude >> b) + h for sign in (-1, 1)]
            bits = [
                12 - math.log2(counts[place]) + b if 0 <= place <= 2 * h else 28 - math.log2(counts[-1])
                for place in places
            ]
            assert float(table[c - LOW, q, magnitude]) == pytest.approx(sum(bits) / 2, rel=1e-6)


def test_tables_are_those_of_the_format() -> None:
    """The same numbers on every machine: a change here makes what was coded before unreadable."""
    numbers = [
        (c, q, rans_tables.raw_bits(c), rans_tables.reach(c), *rans_tables.frequencies(c, q))
        for c, q in itertools.product(range(LOW, HIGH + 1), (0, 1))
    ]
    assert (
        hashlib.sha256(repr(numbers).encode()).hexdigest()
        == "b6ca2b7ee383e56609a2275cdb0cd96d5b457b41954c73178262cc610dba4cbc"
    )


@pytest.mark.parametrize("c", range(LOW, HIGH + 1))
@pytest.mark.parametrize("q", [0, 1])
def test_tables_are_gaussians(c: int, q: int) -> None:
    """Against floats, with cells of the levels as they lie on the line."""
    sigma, counts = 2 ** (c / 4), rans_tables.frequencies(c, q)
    b, h = rans_tables.raw_bits(c), rans_tables.reach(c)
    assert sigma / 2 / 2**b <= 8
    assert b == 0 or sigma / 2 / 2 ** (b - 1) > 8
    assert h == math.ceil(5 * sigma / 2 / 2**b) + 1
    assert len(counts) == 2 * h + 2
    assert sum(counts) == 4096
    assert min(counts) >= 1

    def upper_end(k: int) -> float:
        if k < 0:
            return -upper_end(-k - 1) if k < -1 or q == 0 else -0.39
        level, following = (2 * k, 2 * k + 2) if q == 0 else (max(2 * k - 1, 0), 2 * k + 1)
        return 0.39 if q and not k else (level + following) / 2

    def below(place: float) -> float:
        return (1 + math.erf(place / sigma / math.sqrt(2))) / 2

    shares = [below(upper_end((i + 1 << b) - 1)) - below(upper_end((i << b) - 1)) for i in range(-h, h + 1)]
    shares.append(1 - sum(shares))
    # Nobody has a better claim to one of another's.
    claim = max(share / (2 * count + 1) for share, count in zip(shares, counts, strict=True))
    assert all(
        share / (2 * count - 1) > 0.999 * claim for share, count in zip(shares, counts, strict=True) if count > 1
    )
    lost = sum(
        share * math.log2(share * 4096 / count) for share, count in zip(shares, counts, strict=True) if share > 0
    )
    assert lost < 0.0085


@pytest.mark.parametrize("name", WAYS)
def test_levels_off_the_path_are_refused(name: str) -> None:
    levels, rows, cols = example(20, 5, 8, 8, 8)
    for wrong in (levels + 1, levels.clone().fill_(-32767), levels.clone().fill_(32767)):
        with way(name), pytest.raises(ValueError, match="none that its state's quantizer has"):
            rans.encode(wrong, rows, cols, 8, 4)


def outcome(*coded: Any) -> Tensor | str:
    try:
        return rans.decode(*coded)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("lanes", "c"), [(1, 8), (4, 20), (16, 8), (16, 24)])
def test_damage_is_noticed_or_gives_levels(lanes: int, c: int) -> None:
    """Raw bits are any bits: what changes no more than these goes unnoticed."""
    levels, rows, cols = example(9, 20, 2, c - 2, c + 2, wild=0.01)
    stream, offsets = rans.encode(levels, rows, cols, 2, lanes)
    unnoticed = 0
    for place in range(len(stream)):
        for flip in (0x01, 0xFF) if place % 5 == 0 else (0x10,):
            damaged = stream.clone()
            damaged[place] ^= flip
            found = []
            for name in WAYS if place % 5 == 0 else WAYS[1:] or WAYS:
                with way(name):
                    found.append(outcome(damaged, offsets, rows, cols, 2, lanes))
            assert len({repr(one) for one in found}) == 1
            if isinstance(found[0], str):
                assert "damaged" in found[0]
            else:
                unnoticed += 1
    assert unnoticed < len(stream) / 4


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_noise_and_cut_blocks_are_refused(name: str, lanes: int) -> None:
    levels, rows, cols = example(6, 40, 6, 4, 25)
    stream, _ = rans.encode(levels, rows, cols, 6, lanes)
    noise = torch.randint(0, 256, (2000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    longer = torch.cat([stream, noise[:2]])
    cuts = [stream[:size] for size in range(4 * lanes, len(stream), 10)]
    for bytes_there in (*cuts, longer, noise, torch.zeros_like(noise), torch.full_like(noise, 255)):
        offsets = torch.tensor([0, len(bytes_there)])
        with way(name), pytest.raises(ValueError, match="damaged: a block does not end as it should"):
            rans.decode(bytes_there, offsets, rows, cols, 6, lanes)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda offsets: offsets[:-1], "3 blocks have 4"),
        (lambda offsets: offsets + 2, "offsets go from 2"),
        (lambda offsets: offsets * 2, "and there are"),
        (lambda offsets: offsets[[0, 2, 1, 3]], "shorter than their coder's states"),
        (lambda offsets: offsets + torch.tensor([0, 1, 0, 0]), "end within a word"),
        (lambda offsets: offsets * torch.tensor([1, -1, 1, 1]), "shorter than their coder's states"),
        (lambda offsets: offsets + torch.tensor([0, 2, 0, 0]), "damaged"),
        (lambda offsets: offsets.int(), "int64"),
    ],
)
def test_offsets_that_lie_are_refused(name: str, change: Callable[[Tensor], Tensor], reason: str) -> None:
    levels, rows, cols = example(9, 20, 3, 4, 8)
    stream, offsets = rans.encode(levels, rows, cols, 3, 4)
    with way(name), pytest.raises(ValueError, match=reason):
        rans.decode(stream, change(offsets), rows, cols, 3, 4)


@BUILT
def test_threads_change_nothing() -> None:
    levels, rows, cols = example(64, 33, 8, 0, 12)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = rans.encode(levels, rows, cols, 8, 16)
        torch.set_num_threads(2)
        together = rans.encode(levels, rows, cols, 8, 16)
        assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))
        assert torch.equal(rans.decode(*together, rows, cols, 8, 16), levels)
        assert torch.equal(rans.decode(*together, rows, cols, 8, 16, 3, 6), levels[24:48])
    finally:
        torch.set_num_threads(before)


def test_a_block_has_no_more_rows_than_there_are() -> None:
    levels, rows, cols = example(7, 5, 7, 0, 12)
    stream, offsets = rans.encode(levels, rows, cols, 2**70, 4)
    assert torch.equal(stream, rans.encode(levels, rows, cols, 7, 4)[0])
    assert torch.equal(rans.decode(stream, offsets, rows, cols, 2**70, 4), levels)


def test_tensors_that_are_not_contiguous() -> None:
    levels, rows, cols = example(12, 20, 5, 0, 12)
    spread = [torch.stack([part, part], -1)[..., 0] for part in (levels, rows, cols)]
    stream, offsets = rans.encode(*spread, 5, 4)
    assert torch.equal(stream, rans.encode(levels, rows, cols, 5, 4)[0])
    later = torch.cat([stream[:1], stream])[1:]  # at an odd address
    halves = torch.stack([stream, stream], -1)[:, 0]
    for bytes_there in (later, halves):
        assert torch.equal(rans.decode(bytes_there, offsets, spread[1], spread[2], 5, 4), levels)


def test_arguments_that_do_not_fit_are_refused() -> None:
    levels, rows, cols = example(12, 20, 5, 0, 12)
    stream, offsets = rans.encode(levels, rows, cols, 5, 4)
    with pytest.raises(ValueError, match="lanes are 1, 4 or 16"):
        rans.encode(levels, rows, cols, 5, 3)
    with pytest.raises(ValueError, match="a row or more"):
        rans.decode(stream, offsets, rows, cols, 0, 4)
    with pytest.raises(ValueError, match="12 x 19 of int16 are needed"):
        rans.encode(levels, rows, cols[1:], 5, 4)
    with pytest.raises(ValueError, match=r"of torch\.int32"):
        rans.encode(levels.int(), rows, cols, 5, 4)
    with pytest.raises(ValueError, match="parts of classes are int16"):
        rans.encode(levels, rows.long(), cols, 5, 4)
    with pytest.raises(ValueError, match="blocks 1 to 4 were asked for, and there are 3"):
        rans.decode(stream, offsets, rows, cols, 5, 4, 1, 4)

"""The knapsack against all choices, cost curves against their formula, sizes of free supports, rounding of values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.budget import accounting
from cospadi.budget.knapsack import CELLS, Option, interpolate, knapsack
from cospadi.format import packing
from cospadi.format.codecs import CODECS, codec_of_bits
from cospadi.format.codecs.stream import stream
from cospadi.format.form import Form


def option(nbytes: int, cost: float) -> Option:
    return Option(nbytes, cost, 0.3, 2.0)


options = st.builds(option, st.integers(1, 10**6), st.floats(0, 1e3))
few_groups = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def brute_force(groups: list[list[Option]], allowed: float) -> float | None:
    fitting = [choice for choice in product(*groups) if sum(o.nbytes for o in choice) <= allowed]
    return min((sum(o.cost for o in choice) for choice in fitting), default=None)


@settings(max_examples=60, deadline=None)
@given(few_groups, st.floats(0, 1.2))
def test_knapsack_against_all_choices(groups: list[list[Option]], share: float) -> None:
    """Never above the budget; as good as any choice for a budget smaller by what rounding may waste."""
    smallest = sum(min(o.nbytes for o in group) for group in groups)
    largest = sum(max(o.nbytes for o in group) for group in groups)
    allowed = int(smallest + share * (largest - smallest)) if share > 0.05 else int(20 * share * smallest)
    chosen = knapsack(groups, allowed)
    best = brute_force(groups, allowed)
    if chosen is None:
        assert best is None
        return
    assert best is not None
    assert all(o in group for o, group in zip(chosen, groups, strict=True))
    assert sum(o.nbytes for o in chosen) <= allowed
    cost = sum(o.cost for o in chosen)
    assert cost >= best - 1e-9
    nearly = brute_force(groups, allowed * (1 - 2 * (len(groups) + 2) / CELLS))
    assert nearly is None or cost <= nearly + 1e-9


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 4)), min_size=8, max_size=12), st.floats(0.3, 0.9))
def test_knapsack_wastes_little_where_options_are_fine(groups: list[tuple[float, int]], share: float) -> None:
    """Against the bound that Lagrangian relaxation gives: within a hundredth on smooth cost curves."""
    curves = [
        [option(round((1 - r / 200) * size * 10**6), weight * math.expm1(6 * r / 200)) for r in range(200)]
        for weight, size in groups
    ]
    allowed = int(share * sum(curve[0].nbytes for curve in curves))
    chosen = knapsack(curves, allowed)
    assert chosen is not None
    assert sum(o.nbytes for o in chosen) <= allowed
    prices = np.geomspace(1e-9, 1e-2, 500)
    bound = -prices * allowed
    for curve in curves:
        nbytes, costs = np.array([o.nbytes for o in curve]), np.array([o.cost for o in curve])
        bound += (costs + np.outer(prices, nbytes)).min(1)
    assert sum(o.cost for o in chosen) <= 1.01 * bound.max() + 1e-6


def test_knapsack_takes_what_just_fits_and_refuses_what_does_not() -> None:
    groups = [[option(1000 + i, 1.0), option(3000, 0.0)] for i in range(50)]
    smallest = sum(1000 + i for i in range(50))
    assert knapsack(groups, smallest - 1) is None
    exact = knapsack(groups, smallest)
    assert exact is not None
    assert [o.nbytes for o in exact] == [1000 + i for i in range(50)]
    free = knapsack(groups, 150_000)
    assert free is not None
    assert all(o.cost == 0 for o in free)


def test_interpolation_is_linear_in_the_logarithm_and_takes_the_cheapest_rho() -> None:
    measured = [
        Option(0, 1.0, 0.1, 2.0),
        Option(0, 100.0, 0.5, 2.0),
        Option(0, 2.0, 0.1, 4.0),
        Option(0, 8.0, 0.5, 4.0),
    ]
    found = interpolate(measured, [0.05, 0.1, 0.2, 0.3, 0.5, 0.6], dense_bytes=1000)
    assert [o.ratio for o in found] == [0.1, 0.2, 0.3, 0.5]  # nothing beyond what was measured
    first = [10 ** (2 * (r - 0.1) / 0.4) for r in (0.1, 0.2, 0.3, 0.5)]
    second = [2 * 4 ** ((r - 0.1) / 0.4) for r in (0.1, 0.2, 0.3, 0.5)]
    np.testing.assert_allclose([o.cost for o in found], np.minimum(first, second))
    assert [o.rho for o in found] == [2.0, 4.0, 4.0, 4.0]
    assert [o.nbytes for o in found] == [900, 800, 700, 500]


def test_interpolation_of_one_point_and_of_costs_of_zero() -> None:
    assert interpolate([Option(0, 3.0, 0.3, 2.0)], [0.2, 0.3, 0.4], 100) == [Option(70, pytest.approx(3.0), 0.3, 2.0)]
    found = interpolate([Option(0, 0.0, 0.1, 2.0), Option(0, 0.0, 0.3, 2.0)], [0.2], 100)
    assert 0 <= found[0].cost < 1e-200


@pytest.fixture(autouse=True, scope="module")
def every_width() -> Iterator[None]:
    """Codecs of all the widths that kernels read, whether they are in the table or not."""
    with pytest.MonkeyPatch.context() as patch:
        for bits in (10, 12, 14, 16):
            if all(codec.bits != bits for codec in CODECS.values()):
                patch.setitem(CODECS, f"f{bits}", stream(f"f{bits}", bits))
        yield


groups = st.tuples(
    st.integers(8, 512), st.lists(st.integers(4, 512), min_size=1, max_size=3), st.floats(0.05, 0.9), st.floats(1, 5)
)


@given(groups, st.sampled_from([10, 12, 14, 16]))
def test_free_size_is_the_largest_that_fits(group: tuple[int, list[int], float, float], bits: int) -> None:
    d1, d2s, ratio, rho = group
    form = Form("stored", "mask", codec_of_bits(bits))
    d2, allowed = sum(d2s), accounting.byte_budget(ratio, d1, d2s)
    k, nonzeros = accounting.free_size(allowed, form, d1, d2s, rho)

    def cost(k: int, nonzeros: int) -> int:
        masks = sum(-(-k // 8) * width for width in d2s)
        return 2 * d1 * k + masks + -(-nonzeros * bits // 8)

    if k == 0:
        assert nonzeros == 0
        assert cost(1, min(4, d2)) > allowed or d2 < 4 or cost(1, math.floor(d2 / rho) // 4 * 4) > allowed
        return
    assert nonzeros % 4 == 0
    assert 0 < nonzeros <= k * d2
    assert cost(k, nonzeros) == form.nbytes(d1, d2s, k, [nonzeros]).total <= allowed
    room = sum(k * width // 4 * 4 for width in d2s)
    assert nonzeros + 4 > room or cost(k, nonzeros + 4) > allowed  # no more nonzeros for this k
    assert nonzeros > min(k * d2 / rho - 4, room) - 0.001  # rho is kept, up to the unit
    assert cost(k + 1, math.ceil((k + 1) * d2 / rho)) > allowed  # and no more atoms at this rho


@given(st.lists(st.integers(1, 300), min_size=1, max_size=3), st.integers(1, 100), st.sampled_from([10, 12, 14, 16]))
def test_free_bytes_are_those_of_members_that_hold_multiples_of_four(fours: list[int], k: int, bits: int) -> None:
    """A sum of whole bytes: padding each member's values on its own costs nothing."""
    form = Form("stored", "mask", codec_of_bits(bits))
    apart = sum(len(packing.pack_values(torch.ones(4 * n), bits).view(torch.uint8)) for n in fours)
    assert form.nbytes(8, [40] * len(fours), k, [4 * sum(fours)]).values == apart


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_rounding_error_is_what_packing_does(bits: int) -> None:
    """Magnitudes of uniform logarithm over many binades, packed and unpacked."""
    generator = np.random.default_rng(4)
    values = torch.from_numpy(np.exp(generator.uniform(-8 * math.log(2), 8 * math.log(2), 400_000)).astype(np.float32))
    back = packing.unpack_values(packing.pack_values(values, bits), len(values), bits)
    relative = ((back.double() - values.double()) / values.double()).square().mean().sqrt()
    assert packing.rounding_error(bits) == pytest.approx(float(relative), rel=0.03 if bits == 10 else 0.01)

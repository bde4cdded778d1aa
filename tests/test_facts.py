"""Facts that two rooms of the package have to hold, since neither may import the other, are the same."""

from __future__ import annotations

from cospadi.format import rans
from cospadi.format.codecs import ec
from cospadi.format.codecs.integers import INTEGERS
from cospadi.solvers import rtn, trellis


def test_integers_that_solvers_know_are_those_of_the_format() -> None:
    assert sorted(rtn.CODECS) == sorted(INTEGERS)


def test_a_code_takes_every_step_that_the_solver_makes() -> None:
    assert trellis.MOST_QUARTERS <= ec.LARGEST


def test_lanes_that_are_chosen_can_be_decoded() -> None:
    assert set(ec.LANES) <= set(rans.LANES)

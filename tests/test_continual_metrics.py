"""The golden case, worked out by hand in docs/continual.md."""

from __future__ import annotations

import pytest

from graftory.continual.metrics import Summary, backward_transfer, forgetting, summarise, transfer
from graftory.errors import ShapeError

R = [[0.90, 0.30, 0.20, 0.10], [0.80, 0.85, 0.25, 0.15], [0.84, 0.70, 0.80, 0.20], [0.75, 0.78, 0.82, 0.88]]
UNTRAINED = [0.10, 0.25, 0.20, 0.10]
SINGLE = [0.91, 0.86, 0.83, 0.90]
JOINT = [0.89, 0.86, 0.84, 0.87]


def test_golden_case() -> None:
    got = summarise(R, untrained=UNTRAINED, single=SINGLE, joint=JOINT)
    assert got.acc == pytest.approx(0.8075)
    assert got.aaa == pytest.approx(0.828125)
    assert got.bwt == pytest.approx(-0.2 / 3)
    assert got.forgetting == pytest.approx(0.2 / 3)
    assert got.fwt == pytest.approx(0.2 / 3)
    assert got.transfer == pytest.approx(-0.0175)
    assert got.intransigence == pytest.approx(0.0075)


def test_forgetting_counts_from_the_best_score_before_the_end_and_bwt_from_the_first() -> None:
    rising = [[0.5, 0.0, 0.0], [0.9, 0.6, 0.0], [0.7, 0.6, 0.8]]
    assert forgetting(rising) == pytest.approx((0.2 + 0.0) / 2)
    assert backward_transfer(rising) == pytest.approx((0.2 + 0.0) / 2)
    gaining = [[0.5, 0.0], [0.8, 0.6]]
    assert forgetting(gaining) == pytest.approx(-0.3)
    assert backward_transfer(gaining) == pytest.approx(0.3)


def test_what_is_not_defined_is_none() -> None:
    assert summarise([[0.5]], untrained=[0.1]) == Summary(acc=0.5, aaa=0.5, bwt=None, forgetting=None)
    assert summarise(R).fwt is None


def test_shapes_are_checked() -> None:
    with pytest.raises(ShapeError, match="square"):
        summarise([[0.5, 0.5]])
    with pytest.raises(ShapeError, match="3 values for 4 tasks"):
        transfer(R, SINGLE[:3])
    with pytest.raises(ShapeError, match="at least two"):
        forgetting([[1.0]])

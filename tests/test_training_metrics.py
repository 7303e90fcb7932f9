"""Metrics on numbers worked out by hand."""

from __future__ import annotations

import pytest

from graftory.data import METRICS_OF_KIND
from graftory.errors import ConfigError
from graftory.training import METRICS, measure

TARGETS, OUTPUTS = [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("metric", "targets", "outputs", "value"),
    [
        ("accuracy", TARGETS, OUTPUTS, 0.6),
        ("f1", TARGETS, OUTPUTS, (0.5 + 2 / 3) / 2),
        ("matthews", TARGETS, OUTPUTS, (2 * 1 - 1 * 1) / 6),
        ("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.5], 4.5 / (2**0.5 * (61 / 6) ** 0.5)),
        ("spearman", [1.0, 2.0, 3.0, 4.0], [1.0, 9.0, 2.0, 10.0], 0.8),
        ("mse", [1.0, 2.0], [1.5, 4.0], 2.125),
        ("exact_match", ["a b", "c", "d"], [" a b\n", "C", "d"], 2 / 3),
        ("pearson", [1.0, 2.0], [3.0, 3.0], 0.0),
        ("spearman", [1.0], [3.0], 0.0),
        ("matthews", [1, 1], [1, 1], 0.0),
    ],
)
def test_values(metric: str, targets: list[object], outputs: list[object], value: float) -> None:
    assert measure(metric, targets, outputs) == pytest.approx(value)


def test_every_metric_that_a_task_may_name_exists() -> None:
    assert {name for names in METRICS_OF_KIND.values() for name in names} == {*METRICS, "loss", "likelihood"}


def test_misuse() -> None:
    with pytest.raises(ConfigError, match="metric: got 'bleu', wanted one of accuracy"):
        measure("bleu", [1], [1])
    with pytest.raises(ConfigError, match="got 1 targets and 2 outputs"):
        measure("accuracy", [1], [1, 0])

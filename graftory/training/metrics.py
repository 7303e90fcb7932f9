"""The metrics of tasks, from scikit-learn and SciPy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy import stats
from sklearn import metrics

from graftory.errors import ConfigError

Values = Sequence[Any]


def _f1(targets: Values, outputs: Values) -> float:
    """F1, the mean over the labels that occur."""
    return float(metrics.f1_score(targets, outputs, average="macro", zero_division=0))


def _equal(target: Any, output: Any) -> bool:
    return bool(target == output)


def _same_text(target: Any, output: Any) -> bool:
    """Equal but for space around them."""
    return str(target).strip() == str(output).strip()


def _exact_match(targets: Values, outputs: Values) -> float:
    """Share of texts that are equal but for space around them."""
    return sum(map(_same_text, targets, outputs)) / len(targets)


def _correlation(function: Callable[[Values, Values], Any]) -> Callable[[Values, Values], float]:
    """A correlation; 0 where it is undefined because one side is constant."""

    def correlate(targets: Values, outputs: Values) -> float:
        value = float(function(targets, outputs)[0]) if len(targets) > 1 else 0.0
        return value if math.isfinite(value) else 0.0

    return correlate


METRICS: Mapping[str, Callable[[Values, Values], float]] = {
    "accuracy": lambda targets, outputs: float(metrics.accuracy_score(targets, outputs)),
    "f1": _f1,
    "matthews": lambda targets, outputs: float(metrics.matthews_corrcoef(targets, outputs)),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
    "mse": lambda targets, outputs: float(metrics.mean_squared_error(targets, outputs)),
    "exact_match": _exact_match,
}
"""Every metric of outputs; `loss` is not one, it comes from the model."""
ROW_MEANS: Mapping[str, Callable[[Any, Any], bool]] = {"accuracy": _equal, "exact_match": _same_text}
"""Whether a row is right, of metrics that are the share of those; others cannot be put together from parts."""
LOWER_IS_BETTER = frozenset({"loss", "mse"})


def measure(metric: str, targets: Values, outputs: Values) -> float:
    """One metric of label numbers, numbers or texts.

    Raises:
        ConfigError: If there is no such metric or the two do not have the same length.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric: got {metric!r}, wanted one of {', '.join(METRICS)}")
    if len(targets) != len(outputs) or not targets:
        raise ConfigError(f"{metric}: got {len(targets)} targets and {len(outputs)} outputs, wanted as many, and some")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both libraries warn of constant outputs, which have a value here
        return METRICS[metric](targets, outputs)

"""The best linear head on given features: logistic or ridge regression by scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from graftory.adapter import TaskKind
from graftory.training.losses import row_losses

Probe = tuple[Tensor, Tensor]
"""z = W f + b: W [outputs, width] and b [outputs], fp32."""

_PARTS = 5
"""C is chosen by the loss of one part of the rows under what the others have fitted."""
_FEW = 500
"""Of fewer rows than that each part is held out in turn."""
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""C of the logistic regression on features of mean variance 1: a small one draws the weights to 0."""
_ALPHAS = tuple(10.0**power for power in range(-3, 4))


def linear_probe(kind: TaskKind, features: Tensor, targets: Tensor, outputs: int, *, intercept: bool) -> Probe | None:
    """The linear head with the least regularised loss of its kind of task.

    Classes: min_W,b Σ_i −log softmax(W f_i + b)_y + s² ‖W‖² / 2C, s² the features' mean variance, C of five by the loss
    of rows held out. A label that no row has is never the likeliest. Numbers: ridge regression, its strength by
    leaving out one row at a time. One s for all features: a feature that hardly changes, as where a tanh is saturated,
    would get weights that blow up whatever training then does to it.

    Args:
        kind: Kind of task, classification or regression.
        features: f, [rows, width].
        targets: Class or number of each row, [rows].
        outputs: Outputs of the head.
        intercept: Whether it has b; without, b is 0.

    Returns:
        W and b; None where the rows have one label alone, from which nothing follows.
    """
    return _FITS[kind](features.double(), targets, outputs, intercept)


def _classes(features: Tensor, targets: Tensor, outputs: int, intercept: bool) -> Probe | None:
    if len(torch.unique(targets)) < 2:
        return None
    part = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)) % _PARTS
    asked = range(_PARTS if len(targets) < _FEW else 1)
    turns = [turn for turn in asked if len(torch.unique(targets[part != turn])) > 1]

    def loss(strength: float) -> float:
        return sum(_held_out_loss(features, targets, outputs, strength, intercept, part == turn) for turn in turns)

    return _logistic(features, targets, outputs, min(_STRENGTHS, key=loss), intercept)


def _held_out_loss(
    features: Tensor, targets: Tensor, outputs: int, strength: float, intercept: bool, held: Tensor
) -> float:
    weight, bias = _logistic(features[~held], targets[~held], outputs, strength, intercept)
    logits = features[held].float() @ weight.T + bias
    return float(row_losses("classification", logits, targets[held]).total.sum())


def _logistic(features: Tensor, targets: Tensor, outputs: int, strength: float, intercept: bool) -> Probe:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, scale = _scale(features, intercept)
    # of two labels scikit-learn has the difference of the logits, whose square is twice that of the two rows of W
    twice = 2 if len(torch.unique(targets)) == 2 else 1
    regression = LogisticRegression(C=twice * strength, fit_intercept=intercept, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near the best is a start as good as the best
        regression.fit(((features - mean) / scale).numpy(), targets.numpy())
    weight, bias = torch.from_numpy(regression.coef_), torch.from_numpy(regression.intercept_)
    if twice == 2:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    # the mean logit of the labels that rows have is never below the least bias
    whole, biases = weight.new_zeros(outputs, weight.shape[1]), bias.min().expand(outputs).clone()
    own = torch.from_numpy(regression.classes_)
    whole[own], biases[own] = weight, bias
    return _unscaled(whole, biases, mean, scale)


def _numbers(features: Tensor, targets: Tensor, outputs: int, intercept: bool) -> Probe:
    from sklearn.linear_model import RidgeCV

    mean, scale = _scale(features, intercept)
    regression = RidgeCV(_ALPHAS, fit_intercept=intercept)
    regression.fit(((features - mean) / scale).numpy(), targets.double().numpy())
    weight = torch.from_numpy(regression.coef_).reshape(1, -1).expand(outputs, -1)
    return _unscaled(weight, torch.tensor([float(regression.intercept_)]).expand(outputs), mean, scale)


def _scale(features: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    """The features' means, which only an intercept can take up, and their common deviation s."""
    scale = features.var(0, correction=0).mean().sqrt().clamp(min=1e-12)
    return features.mean(0) if intercept else torch.zeros_like(features[0]), scale


def _unscaled(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> Probe:
    """The same head on the features as they are."""
    own = weight / scale
    return own.float().contiguous(), (bias - own @ mean).float().contiguous()


_FITS: Mapping[TaskKind, Callable[[Tensor, Tensor, int, bool], Probe | None]] = {
    "classification": _classes,
    "regression": _numbers,
}

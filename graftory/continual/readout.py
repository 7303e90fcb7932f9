"""A head of a strategy's own: it reads features of the base, where a head of the model reads its last states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.continual.passes import attached
from graftory.continual.ridge import projected
from graftory.data import Text
from graftory.training import LoadedBase
from graftory.training.features import depth_of, layer_features_of

OTHER = -1
"""The output for a class that another task has."""


@dataclass(frozen=True, slots=True, eq=False)
class Readout:
    """argmax over classes of Wᵀ h, h = ReLU(f P)."""

    layer: int
    """Which hidden state f is the mean of; −1: the last."""
    projection: Tensor | None
    """P [d, M]; None: h = f."""
    weights: Tensor
    """W [M, K], of the classes that may answer."""
    labels: tuple[int, ...]
    """The label number of each class in the task that is asked, OTHER where it is none of its."""

    def outputs(self, loaded: LoadedBase, body: Adapter | None, texts: Sequence[Text], batch_size: int) -> list[int]:
        """A label number for each text.

        Args:
            loaded: The base.
            body: The adapter that the features are taken with; None: the bare base.
            texts: The rows.
            batch_size: Rows at a time.
        """
        hidden = hidden_of(loaded, body, texts, self.layer, self.projection, batch_size)
        best = (hidden.to(self.weights.dtype) @ self.weights).argmax(1)
        return [self.labels[i] for i in best.tolist()]


def hidden_of(
    loaded: LoadedBase,
    body: Adapter | None,
    texts: Sequence[Text],
    layer: int,
    projection: Tensor | None,
    batch_size: int,
) -> Tensor:
    """h of every text, [rows, M] fp32."""
    number = layer + depth_of(loaded) + 1 if layer < 0 else layer
    if body is None:
        features = layer_features_of(loaded, texts, [number], batch_size=batch_size)[:, 0]
    else:
        with attached(loaded, body), torch.no_grad():
            features = layer_features_of(loaded, texts, [number], batch_size=batch_size)[:, 0]
    return features if projection is None else projected(features, projection)

"""Which task does a row belong to? A Mahalanobis classifier on features of the frozen base.

It looks at the base from several sides (views): the pooled states of single layers, and of four layers joined. The
view that has told most held-out rows right chooses. No training row is kept but, as features, the few farthest
validation rows of each task, from which the bound for abstention is taken anew as the pooled scatter grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from graftory.config import option
from graftory.continual.router_view import RoutedTask, View
from graftory.errors import ConfigError, ShapeError

ABSTAIN = -1
"""The choice for a row that looks like no task: it goes to the bare base."""
_MOST_LAYERS = 7
"""Single layers that are tried; of deeper models evenly spaced ones."""
_JOINED_LAYERS = 4
"""Of these, evenly spaced, the joined features are made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """How a router is fitted, and how it answers."""

    layers: tuple[int, ...] = option(
        "layers (0: embeddings, -1: the last) whose pooled states are the features, joined; none: by held-out rows",
        (),
    )
    centroids: int = option("k-means centroids of a task without labels; one with labels has a centroid for each", 5)
    smoothing: float = option("rows at its task's mean that each centroid counts beside its own", 5.0)
    shrinkage: float = option("share of the mean variance added to the scatter's diagonal", 0.1)
    quantile: float = option("share of a task's own rows inside its bound; 1 never abstains", 0.999)
    answer: Literal["best", "mixture"] = option(
        "what answers where tasks share their labels: the best task, or all by their posterior", "best"
    )
    seed: int = option("seed of k-means", 0)

    def __post_init__(self) -> None:
        if self.centroids < 1:
            raise ConfigError(f"centroids: got {self.centroids}, wanted 1 or more")
        for name in ("smoothing", "shrinkage"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted 0 or more")
        if not 0 < self.quantile <= 1:
            raise ConfigError(f"quantile: got {self.quantile}, wanted more than 0 and at most 1")

    def views(self, layers: int) -> tuple[tuple[int, ...], ...]:
        """Which layers each view of a base with so many layers joins, 0 being the embeddings.

        Raises:
            ConfigError: If a layer that is asked for is not there, or comes twice.
        """
        if self.layers:
            resolved = tuple(layer + layers + 1 if layer < 0 else layer for layer in self.layers)
            if any(not 0 <= layer <= layers for layer in resolved) or len(set(resolved)) < len(resolved):
                given = ", ".join(map(str, self.layers))
                raise ConfigError(f"router.layers: got {given}, wanted different ones of 0 to {layers}, or -1 and on")
            return (resolved,)
        count = min(layers + 1, _MOST_LAYERS)
        joined = _evenly(layers, min(layers + 1, _JOINED_LAYERS))
        return (*((layer,) for layer in _evenly(layers, count)), *([joined] if len(joined) > 1 else []))


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A router's answer for N rows."""

    task: Tensor
    """Index of the task, or ABSTAIN, [N] int64."""
    scores: Tensor
    """The log score of each task, [N, T]."""
    distance: Tensor
    """Squared Mahalanobis distance to the nearest centroid of the best task, [N]."""

    def split(self, sizes: Sequence[int]) -> list[Choice]:
        """The same of so many rows each."""
        parts = zip(self.task.split(sizes), self.scores.split(sizes), self.distance.split(sizes), strict=True)
        return [Choice(*part) for part in parts]

    @property
    def posterior(self) -> Tensor:
        """How probable each task is if it is one of them, all equally frequent, [N, T]."""
        return self.scores.softmax(1)


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """All that routing needs, as data."""

    settings: RouterSettings
    views: tuple[View, ...] = ()
    held_out: int = 0
    """Rows that `View.right` was counted on."""

    @classmethod
    def on(cls, settings: RouterSettings, layers: int) -> Router:
        """One that knows no task yet, for a base with so many layers.

        Raises:
            ConfigError: If the settings ask for a layer that is not there.
        """
        return cls(settings, tuple(View(joined) for joined in settings.views(layers)))

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks in order of arrival."""
        return tuple(task.name for task in self.views[0].tasks) if self.views else ()

    @property
    def view(self) -> View:
        """The view that chooses: the most held-out rows told right, but one of more layers if it is within a standard
        error of that; of equals the deeper.

        Raises:
            ConfigError: If there is none.
        """
        if not self.views:
            raise ConfigError("the router knows no task; add one first")
        best = max(view.right for view in self.views)
        error = (best * (1 - best / self.held_out)) ** 0.5 if self.held_out else 0.0
        near = [view for view in self.views if view.right >= best - error]
        return max(near, key=lambda view: (len(view.layers), view.right, view.layers))

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that the views look at, in order."""
        return tuple(sorted({layer for view in self.views for layer in view.layers}))

    def add(
        self, name: str, features: Tensor, validation: Tensor | None = None, *, labels: Tensor | None = None
    ) -> Router:
        """A router that knows one more task.

        Args:
            name: The task.
            features: Pooled states of its training rows at each of `layers`, [N, layers, width].
            validation: The same of rows kept apart, for the bound and the choice of the view.
            labels: Label number of each training row, [N] int64: a centroid for each label that occurs. Without them,
                k-means.

        Raises:
            ConfigError: If the task is known already.
            ShapeError: If the features are empty or of another form.
        """
        if name in self.names:
            raise ConfigError(f"the router knows task {name!r} already")
        self._check(features, f"features of {name!r}")
        settings = self.settings
        grown = []
        for view in self.views:
            own = self._of(view, features)
            groups = _clustered(own, settings) if labels is None else torch.unique(labels, return_inverse=True)[1]
            held = None if validation is None else self._of(view, validation)
            drawn, shrunk, inside = settings.smoothing, settings.shrinkage, settings.quantile
            grown.append(view.add(name, own, groups, held, smoothing=drawn, shrinkage=shrunk, quantile=inside))
        count = 0 if validation is None else len(validation)
        return replace(self, views=tuple(grown), held_out=self.held_out + count)

    def route(self, features: Tensor) -> Choice:
        """Choose a task for each row: the one with the highest score, or ABSTAIN beyond its bound.

        Args:
            features: Pooled states at each of `layers`, [N, layers, width].

        Raises:
            ShapeError: If they have another form.
        """
        view, shrinkage = self.view, self.settings.shrinkage
        self._check(features, "features")
        own = self._of(view, features)
        scores = view.scores(own, shrinkage)
        best = scores.argmax(1)
        distance = torch.empty(len(own), dtype=torch.float64)
        for task in best.unique().tolist():
            distance[best == task] = view.distances(task, own[best == task], shrinkage)
        # a row exactly on the bound is inside; the margin absorbs rounding of the same row computed twice
        foreign = distance > view.bounds(shrinkage, self.settings.quantile)[best] * (1 + 1e-9)
        return Choice(torch.where(foreign, torch.full_like(best, ABSTAIN), best), scores, distance)

    def _check(self, features: Tensor, what: str) -> None:
        if features.dim() != 3 or features.shape[1] != len(self.layers) or len(features) == 0:
            raise ShapeError(f"{what}: got {tuple(features.shape)}, wanted [rows, {len(self.layers)} layers, width]")

    def _of(self, view: View, features: Tensor) -> Tensor:
        """A view's own features, [N, d]."""
        return features[:, [self.layers.index(layer) for layer in view.layers]].flatten(1)


def _evenly(layers: int, count: int) -> tuple[int, ...]:
    """So many of the layers from 0 to the last."""
    return tuple(round(i * layers / max(1, count - 1)) for i in range(count))


def _clustered(features: Tensor, settings: RouterSettings) -> Tensor:
    from sklearn.cluster import KMeans

    distinct = len(torch.unique(features, dim=0))
    k = min(settings.centroids, distinct)
    fitted = KMeans(n_clusters=k, n_init=4, random_state=settings.seed).fit(features.double().numpy())
    # a centroid that lost its last row is left out
    groups: Tensor = torch.unique(torch.from_numpy(fitted.labels_).long(), return_inverse=True)[1]
    return groups


def check_names(names: Sequence[str]) -> None:
    """Refuse a task that comes twice.

    Raises:
        ConfigError: If one does.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"task {twice[0]!r} comes twice in the sequence; give each task once")


__all__ = ["ABSTAIN", "Choice", "RoutedTask", "Router", "RouterSettings", "View", "check_names"]

"""Which task does a row belong to? A Mahalanobis classifier on features of the frozen base.

Adding a task touches no other: its k-means centroids are appended and its scatter is added to a running
sum. No training row is kept but the few farthest validation rows of each task, from which the bound for
abstention is taken anew as the pooled scatter grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftory.config import option
from graftory.errors import ConfigError, ShapeError

ABSTAIN = -1
"""The choice for a row that looks like no task: it goes to the bare base."""
_TAIL_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """How a router is fitted."""

    centroids: int = option("k-means centroids per task", 5)
    shrinkage: float = option("share of the mean variance added to the scatter's diagonal", 1e-3)
    quantile: float = option("share of a task's validation rows inside its bound; 1 never abstains", 0.99)
    seed: int = option("seed of k-means", 0)

    def __post_init__(self) -> None:
        if self.centroids < 1:
            raise ConfigError(f"centroids: got {self.centroids}, wanted 1 or more")
        if self.shrinkage < 0:
            raise ConfigError(f"shrinkage: got {self.shrinkage}, wanted 0 or more")
        if not 0 < self.quantile <= 1:
            raise ConfigError(f"quantile: got {self.quantile}, wanted more than 0 and at most 1")


@dataclass(frozen=True, slots=True, eq=False)
class RoutedTask:
    """What is kept of one task."""

    name: str
    centroids: Tensor
    """[k, d]."""
    tail: Tensor
    """The farthest validation rows, farthest first when the task was added, [m, d]; empty = no bound."""
    outside: int
    """How many validation rows lie outside the bound."""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A router's answer for N rows."""

    task: Tensor
    """Index of the task, or ABSTAIN, [N] int64."""
    scores: Tensor
    """The best centroid's score of each task, [N, T]."""
    distance: Tensor
    """Squared Mahalanobis distance to the chosen centroid, [N]."""


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """All that routing needs, as data. All tensors are fp64."""

    settings: RouterSettings
    tasks: tuple[RoutedTask, ...] = ()
    scatter: Tensor | None = None
    """Σ over all training rows of (f − μ)(f − μ)ᵀ, μ the row's own centroid, [d, d]."""
    rows: int = 0
    """Rows in the scatter."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks in order of arrival."""
        return tuple(task.name for task in self.tasks)

    def add(self, name: str, features: Tensor, validation: Tensor | None = None) -> Router:
        """A router that knows one more task.

        Args:
            name: The task.
            features: Features of its training rows, [N, d].
            validation: Features of rows kept apart, for the bound; without them it never abstains here.

        Raises:
            ConfigError: If the task is known already.
            ShapeError: If the features are empty or of another width.
        """
        if name in self.names:
            raise ConfigError(f"the router knows task {name!r} already")
        features = features.double()
        width = None if self.scatter is None else self.scatter.shape[0]
        if features.dim() != 2 or len(features) == 0 or width not in (None, features.shape[1]):
            raise ShapeError(f"features of {name!r}: got {tuple(features.shape)}, wanted [rows, {width or 'width'}]")
        centroids, assigned = _kmeans(features, self.settings)
        residual = features - centroids[assigned]
        scatter = residual.T @ residual
        grown = replace(
            self,
            tasks=(*self.tasks, RoutedTask(name, centroids, features[:0], 0)),
            scatter=scatter if self.scatter is None else self.scatter + scatter,
            rows=self.rows + len(features),
        )
        if validation is None or len(validation) == 0 or self.settings.quantile == 1:
            return grown
        validation = validation.double()
        outside = int((1 - self.settings.quantile) * len(validation) + 1e-9)
        nearest = _distances(validation, centroids, grown.covariance()).amin(1)
        tail = validation[nearest.argsort(descending=True)[: max(_TAIL_ROWS, 2 * outside + 1)]]
        return replace(grown, tasks=(*self.tasks, RoutedTask(name, centroids, tail, outside)))

    def covariance(self) -> Tensor:
        """Σ = S/N + shrinkage · tr(S/N)/d · I, the pooled within-centroid scatter, shrunk, [d, d].

        Raises:
            ConfigError: If no task has been added.
        """
        if self.scatter is None:
            raise ConfigError("the router knows no task; add one first")
        pooled = self.scatter / self.rows
        mean_variance = pooled.diagonal().mean()
        return pooled + self.settings.shrinkage * mean_variance * torch.eye(len(pooled), dtype=pooled.dtype)

    def bounds(self) -> Tensor:
        """Each task's squared distance beyond which a row is foreign, under the scatter as it is now, [T].

        With n validation rows it is the distance of the (⌊(1 − quantile) n⌋ + 1)-th farthest.
        """
        covariance = self.covariance()
        bounds = []
        for task in self.tasks:
            if len(task.tail) == 0:
                bounds.append(float("inf"))
                continue
            distances = _distances(task.tail, task.centroids, covariance).amin(1).sort(descending=True).values
            bounds.append(float(distances[min(task.outside, len(distances) - 1)]))
        return torch.tensor(bounds, dtype=torch.float64)

    def route(self, features: Tensor) -> Choice:
        """Choose a task for each row: argmax over centroids of fᵀΣ⁻¹μ − ½ μᵀΣ⁻¹μ, or ABSTAIN beyond the bound.

        Args:
            features: [N, d].

        Raises:
            ShapeError: If the width is another.
        """
        covariance = self.covariance()
        if features.dim() != 2 or features.shape[1] != len(covariance):
            raise ShapeError(f"features: got {tuple(features.shape)}, wanted [rows, {len(covariance)}]")
        features = features.double()
        per_task, distance = [], []
        for task in self.tasks:
            weights = torch.linalg.solve(covariance, task.centroids.T)
            per_task.append((features @ weights - 0.5 * (task.centroids.T * weights).sum(0)).amax(1))
            distance.append(_distances(features, task.centroids, covariance).amin(1))
        scores, distances = torch.stack(per_task, 1), torch.stack(distance, 1)
        best = scores.argmax(1)
        chosen = distances.gather(1, best[:, None])[:, 0]
        # a row exactly on the bound is inside; the margin absorbs rounding of the same row computed twice
        foreign = chosen > self.bounds()[best] * (1 + 1e-9)
        return Choice(torch.where(foreign, torch.full_like(best, ABSTAIN), best), scores, chosen)


def _kmeans(features: Tensor, settings: RouterSettings) -> tuple[Tensor, Tensor]:
    from sklearn.cluster import KMeans

    distinct = len(torch.unique(features, dim=0))
    k = min(settings.centroids, distinct)
    fitted = KMeans(n_clusters=k, n_init=4, random_state=settings.seed).fit(features.numpy())
    assigned = torch.from_numpy(fitted.labels_).long()
    sums = torch.zeros(k, features.shape[1], dtype=features.dtype).index_add_(0, assigned, features)
    counts = torch.bincount(assigned, minlength=k)
    return sums / counts[:, None], assigned


def _distances(features: Tensor, centroids: Tensor, covariance: Tensor) -> Tensor:
    """(f − μ)ᵀ Σ⁻¹ (f − μ) of every row and centroid, [N, k]."""
    lower = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(lower, features.T, upper=False).T
    centres = torch.linalg.solve_triangular(lower, centroids.T, upper=False).T
    return torch.stack([(white - centre).square().sum(1) for centre in centres], 1)


def check_names(names: Sequence[str]) -> None:
    """Refuse a task that comes twice.

    Raises:
        ConfigError: If one does.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"task {twice[0]!r} comes twice in the sequence; give each task once")

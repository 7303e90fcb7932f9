"""A Mahalanobis classifier of tasks on one kind of features: centroids of every task, one scatter for all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from graftory.errors import ConfigError, ShapeError

_TAIL_ROWS = 16


@dataclass(frozen=True, slots=True, eq=False)
class RoutedTask:
    """What is kept of one task."""

    name: str
    centroids: Tensor
    """[k, d] fp64, each drawn towards the task's mean; see `View.add`."""
    shares: Tensor
    """Share of the task's rows at each centroid, [k] fp64."""
    tail: Tensor
    """The farthest validation rows, farthest first when the task was added, [m, d]; empty = no bound."""
    validated: int
    """Of how many validation rows."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """All that routing by these features needs. Adding a task touches no other: its centroids are appended and its
    scatter is added to a running sum.
    """

    layers: tuple[int, ...]
    """Layers of the base whose pooled states are the features, joined."""
    tasks: tuple[RoutedTask, ...] = ()
    scatter: Tensor | None = None
    """Σ over all training rows of (f − μ)(f − μ)ᵀ, μ the mean of the rows at the row's centroid, [d, d] fp64."""
    rows: int = 0
    """Rows in the scatter."""
    right: int = 0
    """How many held-out rows, each scored once, when its task arrived, went to their task."""
    _factors: dict[float, Tensor] = field(init=False, default_factory=dict, repr=False)
    """What `factor` has computed, by shrinkage."""

    def add(
        self,
        name: str,
        features: Tensor,
        groups: Tensor,
        validation: Tensor | None = None,
        *,
        smoothing: float,
        shrinkage: float,
        quantile: float,
    ) -> View:
        """A view that knows one more task.

        μ_c = (Σ f + κ m) / (n_c + κ), over the n_c rows f at centroid c, with m the mean of the task's rows: the
        posterior mean under the prior N(m, Σ/κ). A label with few rows lies near its task, not where they happen to.

        Args:
            name: The task.
            features: Features of its training rows, [N, d].
            groups: Which of the task's centroids a row is at, from 0 on and none left out, [N] int64.
            validation: Features of rows kept apart, for the bound and for `right`; without them it never abstains here.
            smoothing: κ.
            shrinkage: See `covariance`.
            quantile: Share of the validation rows inside the bound.

        Raises:
            ShapeError: If the features are empty or of another width.
        """
        width = None if self.scatter is None else self.scatter.shape[0]
        if features.dim() != 2 or len(features) == 0 or width not in (None, features.shape[1]):
            raise ShapeError(f"features of {name!r}: got {tuple(features.shape)}, wanted [rows, {width or 'width'}]")
        rows = features.double()
        counts = torch.bincount(groups)[:, None]
        sums = torch.zeros(len(counts), rows.shape[1], dtype=rows.dtype).index_add_(0, groups, rows)
        centroids = (sums + smoothing * rows.mean(0)) / (counts + smoothing)
        residual = rows - (sums / counts)[groups]
        scatter = residual.T @ residual
        scatter = (scatter + scatter.T) / 2  # equal to the last bit on both sides, as one of them is stored
        task = RoutedTask(name, centroids, counts[:, 0].double() / len(rows), features[:0], 0)
        grown = replace(
            self,
            tasks=(*self.tasks, task),
            scatter=scatter if self.scatter is None else self.scatter + scatter,
            rows=self.rows + len(rows),
        )
        if validation is None or len(validation) == 0:
            return grown
        newest = len(self.tasks)
        right = int((grown.scores(validation, shrinkage).argmax(1) == newest).sum())
        if quantile == 1:
            return replace(grown, right=self.right + right)
        kept = max(_TAIL_ROWS, 2 * _outside(quantile, len(validation)) + 1)
        farthest = grown.distances(newest, validation, shrinkage).argsort(descending=True)[:kept]
        bounded = replace(task, tail=validation[farthest], validated=len(validation))
        return replace(grown, tasks=(*self.tasks, bounded), right=self.right + right)

    def covariance(self, shrinkage: float) -> Tensor:
        """Σ = S/N + shrinkage · tr(S/N)/d · I, the pooled within-centroid scatter, shrunk, [d, d].

        Raises:
            ConfigError: If no task has been added.
        """
        if self.scatter is None:
            raise ConfigError("the router knows no task; add one first")
        pooled = self.scatter / self.rows
        pooled.diagonal().add_(shrinkage * pooled.diagonal().mean())
        return pooled

    def factor(self, shrinkage: float) -> Tensor:
        """L of Σ = L Lᵀ, lower triangular, [d, d]; computed once."""
        if shrinkage not in self._factors:
            self._factors[shrinkage] = torch.linalg.cholesky(self.covariance(shrinkage))
        return self._factors[shrinkage]

    def bounds(self, shrinkage: float, quantile: float) -> Tensor:
        """Each task's squared distance beyond which a row is foreign, under the present scatter, [T]; see `bound`."""
        bounds = []
        for number, task in enumerate(self.tasks):
            distances = self.distances(number, task.tail, shrinkage) if len(task.tail) else None
            bounds.append(float("inf") if distances is None else bound(distances, task.validated, quantile))
        return torch.tensor(bounds, dtype=torch.float64)

    def scores(self, features: Tensor, shrinkage: float) -> Tensor:
        """log Σ_c π_c exp(fᵀΣ⁻¹μ_c − ½ μ_cᵀΣ⁻¹μ_c) over the centroids c of each task, [N, T].

        Args:
            features: f, [N, d].
            shrinkage: See `covariance`.

        Raises:
            ShapeError: If the width is another.
        """
        lower = self.factor(shrinkage)
        if features.dim() != 2 or features.shape[1] != len(lower):
            raise ShapeError(f"features: got {tuple(features.shape)}, wanted [rows, {len(lower)}]")
        found = []
        for task in self.tasks:
            weights = torch.cholesky_solve(task.centroids.T, lower)
            linear = features.double() @ weights - 0.5 * (task.centroids.T * weights).sum(0)
            found.append((linear + task.shares.log()).logsumexp(1))
        return torch.stack(found, 1)

    def distances(self, task: int, features: Tensor, shrinkage: float) -> Tensor:
        """The least (f − μ)ᵀ Σ⁻¹ (f − μ) over the centroids of a task for every row, [N]."""
        lower = self.factor(shrinkage)
        white = torch.linalg.solve_triangular(lower, features.double().T, upper=False).T
        centres = torch.linalg.solve_triangular(lower, self.tasks[task].centroids.T, upper=False).T
        # the direct form: squared norms and products would cancel for rows that lie on a centroid
        return torch.stack([(white - centre).square().sum(1) for centre in centres], 1).amin(1)


def bound(tail: Tensor, rows: int, quantile: float) -> float:
    """The distance that a share `quantile` of a task's own rows stays within.

    With n validation rows it is the distance of the (⌊(1 − quantile) n⌋ + 1)-th farthest. Where (1 − quantile) n < 1 it
    lies beyond all of them: the farthest of n rows is passed by one new row in n. Then the tail goes on as an
    exponential one, u + μ ln(k / ((1 − quantile) n)), u the (k+1)-th largest distance and μ the mean excess over it of
    the k larger ones (Pickands 1975, with shape 0), and at least to the farthest row.

    Args:
        tail: The largest distances of n rows, in any order, [k + 1].
        rows: n.
        quantile: Below 1.
    """
    distances = tail.sort(descending=True).values
    outside = (1 - quantile) * rows
    if _outside(quantile, rows) >= 1 or len(distances) < 2:
        return float(distances[min(_outside(quantile, rows), len(distances) - 1)])
    threshold, count = distances[-1], len(distances) - 1
    excess = float((distances[:-1] - threshold).mean())
    return max(float(distances[0]), float(threshold) + excess * math.log(count / outside))


def _outside(quantile: float, rows: int) -> int:
    """How many validation rows lie outside the bound."""
    return int((1 - quantile) * rows + 1e-9)

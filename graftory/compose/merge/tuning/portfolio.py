"""The ways to merge that `auto` tries, and how each is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from graftory.adapter import Adapter, Parent
from graftory.compose.merge import METHODS, merge
from graftory.compose.merge.base import MergeParameters
from graftory.compose.record import record_examples
from graftory.schema import Json
from graftory.settings import SelectSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Floor = Literal["nothing", "single", "task arithmetic"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to merge.

    Attributes:
        name: What the table calls it.
        method: A row of `METHODS`.
        weight: The same for every adapter; None for the method's own.
        values: Parameters of the method that are not its defaults.
        floor: Whether it is one of what others are held against.
    """

    name: str
    method: str
    weight: float | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    floor: Floor | None = None


PORTFOLIO: tuple[Candidate, ...] = (
    Candidate("pico", "pico"),
    Candidate("regmean", "regmean"),
    Candidate("tsv", "tsv"),
    Candidate("linear, mean", "linear", floor="task arithmetic"),
    Candidate("ties", "ties"),
    Candidate("iso_c", "iso_c"),
    Candidate("core", "core"),
    Candidate("knots", "knots"),
    Candidate("ctm", "ctm"),
    Candidate("lego", "lego"),
    Candidate("linear, sum", "linear", 1.0, floor="task arithmetic"),
    Candidate("fisher", "fisher"),
)
"""What is tried. Of those that the rows cannot tell from the best the first is taken, so the order is what is known
without them: how the methods did on the merges of benchmarks/results/merging.md, about.
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a merge is made: what a record of it tells."""

    method: str
    weights: tuple[float, ...] | None
    parameters: MergeParameters


def recipe_of(candidate: Candidate, count: int, rank: int | None, seed: int) -> Recipe:
    """Of a candidate, for so many adapters."""
    kind = METHODS[candidate.method].params
    names = {each.name for each in fields(kind)}
    given = {"rank": rank, "seed": seed}
    parameters = kind(**{name: value for name, value in given.items() if name in names}, **candidate.values)
    weights = None if candidate.weight is None else (candidate.weight,) * count
    return Recipe(candidate.method, weights, parameters)


class Maker:
    """Makes merges of the same adapters; what some of them look at is recorded once."""

    def __init__(self, parts: Sequence[Adapter], base: PreTrainedModel | None, seed: int, rows: int) -> None:
        self._parts = parts
        self._base = base
        self._seed = seed
        self._rows = rows
        self._inputs: dict[bool, Sequence[Mapping[str, Tensor]]] = {}

    def examples(self, recipe: Recipe) -> dict[str, int]:
        """How many examples of each task a method looks at, where it is another number than elsewhere: a gradient of
        each costs a pass back through the model."""
        return {"per_domain": self._rows} if recipe.parameters.gradients else {}

    def make(self, recipe: Recipe, parents: Sequence[Parent] = (), notes: Mapping[str, Json] | None = None) -> Adapter:
        """The merge."""
        return merge(
            self._parts,
            recipe.method,
            weights=recipe.weights,
            parameters=recipe.parameters,
            inputs=self._looked_at(recipe) if recipe.parameters.reads == "own tasks" else (),
            base=self._base,
            parents=parents,
            notes=notes,
        )

    def _looked_at(self, recipe: Recipe) -> Sequence[Mapping[str, Tensor]]:
        """What the adapters read of their own tasks, as a merge from the record would have it."""
        gradients = recipe.parameters.gradients
        if gradients not in self._inputs:
            limit = self.examples(recipe).get("per_domain", SelectSettings().per_domain)
            self._inputs[gradients] = record_examples(
                self._parts, None, limit=limit, seed=self._seed, gradients=gradients
            )
        return self._inputs[gradients]

"""What a merge method is: a row with a name, a space, parameters, and one function on bodies.

A method sees only what it is about: the configurations and tensors of the adapters' bodies and one
weight each. Heads, bases, lineage and licence are the same for all methods and are done by `merge`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from graftory.adapter import Adapter
from graftory.compose.merge.originals import Originals, no_originals
from graftory.config import AdapterConfig
from graftory.errors import MergeError

Space = Literal["delta", "factor", "aligned"]
"""`delta`: on the update itself, exact. `factor`: on raw tensors, only for adapters of one initialisation.
`aligned`: on tensors brought into correspondence first."""


Reads = Literal["nothing", "examples", "own tasks"]
"""`examples`: the same for all adapters. `own tasks`: if no examples are given, of what each was trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeParameters:
    """Parameters of a method beside the weights; a subclass per method, its fields become CLI options."""

    @property
    def reads(self) -> Reads:
        """Whose examples the method wants to see the adapters' inputs of, `Body.inputs`."""
        return "nothing"

    @property
    def gradients(self) -> bool:
        """Whether it wants gradients beside the inputs, see `compose.record_gradients`."""
        return False


@dataclass(frozen=True, slots=True)
class Body:
    """An adapter without its head: what a method merges."""

    name: str
    """What error texts call it."""
    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """What it reads at each site, [tokens, d_in], for methods that look at it; see `compose.record_inputs`."""
    originals: Originals = no_originals
    """The base's own modules, for adapters whose update depends on them."""
    weight_at: Mapping[str, float] = field(default_factory=dict)
    """Its weight at modules where that is not the one that it has everywhere."""


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A row of the table of merge methods."""

    name: str
    title: str
    paper: str
    space: Space
    accepts: tuple[str, ...]
    """Adapter methods it can merge."""
    params: type[MergeParameters]
    default_weight: Callable[[int], float]
    """The weight of each of n adapters if none are given."""
    fn: Callable[[Sequence[Body], Sequence[float], Any], Body]
    """(bodies, weights, parameters of type `params`) -> merged body; in delta space the bodies may be of several linear
    methods, else they are all of one."""


def body_of(
    adapter: Adapter,
    position: int,
    inputs: Mapping[str, Tensor] | None = None,
    originals: Originals = no_originals,
) -> Body:
    """An adapter's body, named by its task where it has one."""
    task = adapter.spec.task
    label = f"adapter {position + 1}" + (f" ({task.name})" if task else "")
    return Body(label, adapter.spec.config, adapter.body_tensors(), inputs or {}, originals)


def check_not_negative(method: str, bodies: Sequence[Body], weights: Sequence[float], why: str) -> None:
    """Refuse weights below 0, everywhere or at a module.

    Raises:
        MergeError: If there is one.
    """
    for body, weight in zip(bodies, weights, strict=True):
        least = min([weight, *body.weight_at.values()])
        if least < 0:
            raise MergeError(f"{method}: got the weight {least:g} of {body.name}, wanted none below 0, as {why}")


def check_keys(body: Body, expected: Sequence[str]) -> None:
    """Refuse tensors that a method would not look at, and miss none.

    Raises:
        MergeError: If the body has other tensors than the configuration says.
    """
    strange = sorted(set(body.tensors) ^ set(expected))
    if strange:
        verb = "has" if strange[0] in body.tensors else "lacks"
        raise MergeError(
            f"{body.name} {verb} the tensor {strange[0]!r}, which its configuration does not explain; "
            "only what a method itself trains can be merged"
        )


def union_of_targets(bodies: Sequence[Body]) -> tuple[str, ...]:
    """Every site of any of the bodies, in order of first appearance."""
    return tuple(dict.fromkeys(path for body in bodies for path in body.config.targets))


def most_common(values: Sequence[int]) -> int:
    """The most frequent value, the larger one of equals: what a pattern leaves out."""
    return max(set(values), key=lambda value: (values.count(value), value))


def check_rank(rank: int | None) -> None:
    """Refuse ranks that no adapter can have.

    Raises:
        MergeError: If it is below 1.
    """
    if rank is not None and rank < 1:
        raise MergeError(f"rank: got {rank}, wanted 1 or more")


def check_scaling(scaling: float) -> None:
    """Refuse factors that are no numbers.

    Raises:
        MergeError: If it is not finite.
    """
    if not math.isfinite(scaling):
        raise MergeError(f"scaling: got {scaling}, wanted a finite number")

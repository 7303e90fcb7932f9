"""Merges chosen by trying: the greedy soup, and the best anchor of MerA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from graftory.adapter import Adapter
from graftory.compose.merge import merge
from graftory.compose.merge.base import MergeParameters
from graftory.compose.merge.mera import MeraParameters
from graftory.compose.select.base import Choice, Selection
from graftory.errors import MergeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Score = Callable[[Adapter], float]
"""How good an adapter is on held-out rows; higher is better."""


def best_anchor(
    adapters: Sequence[Adapter], score: Score, parameters: MeraParameters, inputs: Sequence[Mapping[str, Tensor]] = ()
) -> tuple[MeraParameters, list[float]]:
    """Try each adapter as the anchor of `mera`, and keep the one whose merge scores best, the first of equals.

    Args:
        adapters: What is merged.
        score: Measures a merged adapter.
        parameters: The other parameters.
        inputs: As in `merge`.

    Returns:
        The parameters with that anchor, and the score with each.
    """
    tried = [replace(parameters, anchor=number + 1) for number in range(len(adapters))]
    scores = [score(merge(adapters, "mera", parameters=one, inputs=inputs)) for one in tried]
    return tried[scores.index(max(scores))], scores


def greedy_soup(
    adapters: Mapping[str, Adapter],
    score: Score,
    *,
    method: str = "soup",
    parameters: MergeParameters | None = None,
    base: PreTrainedModel | None = None,
    inputs: Mapping[str, Mapping[str, Tensor]] | None = None,
    most: int = 5,
) -> Selection:
    """Add adapters in the order of their own scores, and keep each that does not make the merge worse.

    The recipe of Wortsman et al. 2022 (arXiv:2203.05482): the best first; each next one stays if the merge
    with it scores at least as much as the merge without it.

    Args:
        adapters: By name.
        score: Measures an adapter. It is called for each alone, and for each merge that is tried.
        method: The merge method, with equal weights.
        parameters: Of that method.
        base: The base model, for adapters whose update depends on its weights, as in `merge`.
        inputs: What each adapter reads, by its name, for methods that look at it.
        most: At most so many.

    Raises:
        MergeError: If there are no adapters, or they cannot be merged.
    """
    if not adapters:
        raise MergeError("greedy: no adapters to select from; give at least one")
    alone = {name: score(adapter) for name, adapter in adapters.items()}
    order = sorted(alone, key=lambda name: -alone[name])
    taken, best = [order[0]], alone[order[0]]
    reasons = {order[0]: f"{best:.4f} alone, the best"}
    for name in order[1:]:
        if len(taken) == most:
            reasons[name] = f"{alone[name]:.4f} alone; there are {most} already"
            continue
        parts = (*taken, name)
        read = [inputs[one] for one in parts] if inputs else ()
        merged = merge([adapters[one] for one in parts], method, parameters=parameters, inputs=read, base=base)
        tried = score(merged)
        better = tried >= best
        reasons[name] = f"{alone[name]:.4f} alone; with it {tried:.4f}, without {best:.4f}"
        if better:
            taken.append(name)
            best = tried
    return Selection("greedy", tuple(Choice(name, alone[name], name in taken, reasons[name]) for name in order))

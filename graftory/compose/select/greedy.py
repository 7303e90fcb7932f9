"""The greedy soup: adapters are added as long as a measure on held-out rows does not fall."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from graftory.adapter import Adapter
from graftory.compose.merge import merge
from graftory.compose.select.base import Choice, Selection
from graftory.errors import MergeError

Score = Callable[[Adapter], float]
"""How good an adapter is on held-out rows; higher is better."""


def greedy_soup(adapters: Mapping[str, Adapter], score: Score, *, method: str = "soup", most: int = 5) -> Selection:
    """Add adapters in the order of their own scores, and keep each that does not make the merge worse.

    The recipe of Wortsman et al. 2022 (arXiv:2203.05482): the best first; each next one stays if the merge
    with it scores at least as much as the merge without it.

    Args:
        adapters: By name.
        score: Measures an adapter. It is called for each alone, and for each merge that is tried.
        method: The merge method, with equal weights.
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
        tried = score(merge([adapters[one] for one in (*taken, name)], method))
        better = tried >= best
        reasons[name] = f"{alone[name]:.4f} alone; with it {tried:.4f}, without {best:.4f}"
        if better:
            taken.append(name)
            best = tried
    return Selection("greedy", tuple(Choice(name, alone[name], name in taken, reasons[name]) for name in order))

"""Where the nodes of a directed graph go in a picture: in layers, with few crossings, neighbours close together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import networkx

_SWEEPS = 12
_BEND = 0.5
"""Room for an edge that passes a layer, where a node has 1."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A graph in layers.

    Attributes:
        layers: How many layers there are.
        span: How wide the widest is, in nodes.
        nodes: Layer, 0 for the first ancestors, and place in it of every node; places start at 0.
        edges: The layers and places that each edge passes, from its first node to its second.
    """

    layers: int
    span: float
    nodes: Mapping[str, tuple[int, float]]
    edges: Mapping[tuple[str, str], tuple[tuple[int, float], ...]]


def place(graph: networkx.DiGraph[str]) -> Placed:
    """Put the nodes in layers: each as late as its children permit, no edge within a layer."""
    layer_of = _layers_of(graph)
    chains = {(u, v): _chain(u, v, layer_of) for u, v in graph.edges}
    rows = _rows(graph, layer_of, chains.values())
    near = _neighbours(chains.values())
    rows = _with_few_crossings(rows, near)
    places = _places(rows, near)
    first = min(places.values(), default=0.0)
    spots = {node: (number, places[node] - first) for number, row in enumerate(rows) for node in row}
    return Placed(
        layers=len(rows),
        span=max(places.values(), default=0.0) - first + 1,
        nodes={node: spots[node] for node in graph},
        edges={edge: tuple(spots[node] for node in chain) for edge, chain in chains.items()},
    )


_Node = Hashable
_Chain = tuple[_Node, ...]
_Near = Mapping[_Node, tuple[list[_Node], list[_Node]]]
"""The neighbours of a node in the layer before and in the layer after."""


def _layers_of(graph: networkx.DiGraph[str]) -> dict[str, int]:
    """Layers counted from the last; a cycle, which only a forged record can have, is cut somewhere."""
    import networkx

    plain: networkx.DiGraph[str] = networkx.DiGraph(graph.edges)
    plain.add_nodes_from(graph)
    while not networkx.is_directed_acyclic_graph(plain):
        plain.remove_edge(*networkx.find_cycle(plain)[0][:2])
    generations = list(networkx.topological_generations(plain.reverse()))
    return {node: len(generations) - 1 - number for number, nodes in enumerate(generations) for node in nodes}


def _chain(first: str, last: str, layer_of: Mapping[str, int]) -> _Chain:
    """The two nodes of an edge with a bend for each layer between them."""
    step = 1 if layer_of[last] >= layer_of[first] else -1
    between = range(layer_of[first] + step, layer_of[last], step)
    return (first, *((first, last, layer) for layer in between), last)


def _rows(graph: networkx.DiGraph[str], layer_of: Mapping[str, int], chains: Iterable[_Chain]) -> list[list[_Node]]:
    rows: list[list[_Node]] = [[] for _ in range(max(layer_of.values(), default=-1) + 1)]
    for node in graph:
        rows[layer_of[node]].append(node)
    for chain in chains:
        for bend in chain[1:-1]:
            rows[bend[2]].append(bend)  # type: ignore[index]
    return rows


def _neighbours(chains: Iterable[_Chain]) -> _Near:
    near: dict[_Node, tuple[list[_Node], list[_Node]]] = {}
    for chain in chains:
        for before, after in pairwise(chain):
            near.setdefault(before, ([], []))[1].append(after)
            near.setdefault(after, ([], []))[0].append(before)
    return near


def _with_few_crossings(rows: list[list[_Node]], near: _Near) -> list[list[_Node]]:
    """Order each layer by the mean place of its neighbours, down and up again, and keep the best order."""
    best, least = rows, _crossings(rows, near)
    for sweep in range(_SWEEPS):
        if least == 0:
            break
        side = sweep % 2
        order = rows if side == 0 else rows[::-1]
        new = [list(order[0])]
        for row in order[1:]:
            spots = {node: float(number) for number, node in enumerate(new[-1])}
            old = {node: float(number) for number, node in enumerate(row)}
            new.append(sorted(row, key=_mean_place(near, side, spots, old)))
        rows = new if side == 0 else new[::-1]
        if (count := _crossings(rows, near)) < least:
            best, least = rows, count
    return best


def _mean_place(
    near: _Near, side: int, spots: Mapping[_Node, float], otherwise: Mapping[_Node, float]
) -> Callable[[_Node], float]:
    def key(node: _Node) -> float:
        known = [spots[other] for other in near.get(node, ([], []))[side] if other in spots]
        return sum(known) / len(known) if known else otherwise[node]

    return key


def _crossings(rows: Sequence[Sequence[_Node]], near: _Near) -> int:
    count = 0
    for row, after in pairwise(rows):
        spots = {node: number for number, node in enumerate(after)}
        passed: list[int] = []
        for node in row:
            ends = sorted(spots[other] for other in near.get(node, ([], []))[1] if other in spots)
            count += sum(1 for end in ends for other in passed if other > end)
            passed += ends
    return count


def _places(rows: Sequence[Sequence[_Node]], near: _Near) -> dict[_Node, float]:
    """Draw each node towards its neighbours, as far as the order and the room of the others permit."""
    places: dict[_Node, float] = {}
    for row in rows:
        places.update(_spread(row, dict.fromkeys(row, 0.0)))
    for sweep in range(2 * _SWEEPS):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            wanted = {}
            for node in row:
                others = [places[other] for side in near.get(node, ([], [])) for other in side]
                wanted[node] = sum(others) / len(others) if others else places[node]
            places.update(_spread(row, wanted))
    return places


def _spread(row: Sequence[_Node], wanted: Mapping[_Node, float]) -> dict[_Node, float]:
    """Places near the wanted ones with enough room: the middle of the leftmost and the rightmost choice."""
    room = [(_width(before) + _width(after)) / 2 for before, after in pairwise(row)]
    right = [wanted[node] for node in row]
    left = list(right)
    for number, gap in enumerate(room):
        right[number + 1] = max(right[number + 1], right[number] + gap)
    for number, gap in reversed(list(enumerate(room))):
        left[number] = min(left[number], left[number + 1] - gap)
    return {node: (a + b) / 2 for node, a, b in zip(row, left, right, strict=True)}


def _width(node: Any) -> float:
    return 1.0 if isinstance(node, str) else _BEND

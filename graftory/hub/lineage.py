"""The family of an adapter: a graph that follows its parents by digest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftory.hub.depot import Depot
from graftory.hub.records import Record

if TYPE_CHECKING:
    import networkx


def lineage_graph(depot: Depot, record: Record) -> networkx.DiGraph[str]:
    """Every ancestor that a hub knows of an adapter.

    Returns:
        A graph of digests. Nodes have `ref` (str) and `known` (whether the hub holds it); known ones
        also `record`. Edges lead from parent to child and have `relation` and `weight`.
    """
    import networkx

    graph: networkx.DiGraph[str] = networkx.DiGraph()
    todo = [record]
    while todo:
        child = todo.pop()
        if graph.nodes.get(child.digest, {}).get("record") is not None:
            continue
        graph.add_node(child.digest, ref=str(child.ref), known=True, record=child)
        for parent in child.spec.lineage.parents:
            found = depot.records.find(parent.digest, _name(parent.ref))
            if parent.digest not in graph:
                graph.add_node(parent.digest, ref=parent.ref, known=False)
            graph.add_edge(parent.digest, child.digest, relation=parent.relation, weight=parent.weight)
            if found is not None:
                todo.append(found)
    return graph


def _name(ref: str) -> str:
    return ref.partition("@")[0].partition(":")[0]

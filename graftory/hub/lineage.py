"""The family of an adapter: a graph that follows its parents by digest."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from graftory.adapter import AdapterRef, Parent
from graftory.errors import InvalidNameError
from graftory.hub.depot import Depot
from graftory.hub.records import Record, is_name

if TYPE_CHECKING:
    import networkx

_DIGEST = re.compile(rb"sha256:[0-9a-f]{64}")


def lineage_graph(depot: Depot, record: Record, *, children: bool = False) -> networkx.DiGraph[str]:
    """Every ancestor that a hub knows of an adapter.

    Args:
        depot: The hub.
        record: The adapter.
        children: Whether what was made from it, and from that, is wanted as well; all records are read.

    Returns:
        A graph of digests. Nodes have `ref` (str) and `known` (whether the hub holds it); known ones
        also `record`. Edges lead from parent to child and have `links`, every part that the parent has in
        the child as pairs of relation and weight, and of the first of them `relation` and `weight`.

    Raises:
        CorruptAdapterError: If a record of the family is damaged.
    """
    import networkx

    graph: networkx.DiGraph[str] = networkx.DiGraph()
    relatives = _Relatives(depot)
    _add(graph, record)
    todo = [record]
    while todo:
        child = todo.pop()
        for parent in child.spec.lineage.parents:
            found = None if parent.digest in graph else relatives.parent(parent)
            if found is not None:
                _add(graph, found)
                todo.append(found)
            elif parent.digest not in graph:
                graph.add_node(parent.digest, ref=parent.ref, known=False)
            _link(graph, parent.digest, child)
    if children:
        _add_descendants(graph, relatives, record)
    return graph


def _add_descendants(graph: networkx.DiGraph[str], relatives: _Relatives, record: Record) -> None:
    """Add what was made from an adapter; of its other parents only those that are in the family anyway."""
    added: list[Record] = []
    todo = [record.digest]
    while todo:
        for child in relatives.children(todo.pop()):
            if child.digest not in graph:
                _add(graph, child)
                added.append(child)
                todo.append(child.digest)
    for child in added:
        for parent in child.spec.lineage.parents:
            if parent.digest in graph:
                _link(graph, parent.digest, child)


def _add(graph: networkx.DiGraph[str], record: Record) -> None:
    graph.add_node(record.digest, ref=str(record.ref), known=True, record=record)


def _link(graph: networkx.DiGraph[str], digest: str, child: Record) -> None:
    """One edge, though an adapter may be a parent twice, as in a merge of it with itself."""
    if not graph.has_edge(digest, child.digest):
        parts = [parent for parent in child.spec.lineage.parents if parent.digest == digest]
        links = tuple((part.relation, part.weight) for part in parts)
        graph.add_edge(digest, child.digest, links=links, relation=links[0][0], weight=links[0][1])


class _Relatives:
    """Finds records by what they have to do with a digest; the whole hub is read at most once, and only if
    an adapter does not lie where its child says."""

    def __init__(self, depot: Depot) -> None:
        self._records = depot.records

    def parent(self, parent: Parent) -> Record | None:
        """The record of a parent; None if it is not in this hub."""
        for ref in self._likely(parent):
            record = self._read(ref)
            if record is not None and record.digest == parent.digest:
                return record
        return None

    def children(self, digest: str) -> Iterator[Record]:
        """The records that name a digest among their parents."""
        for ref in self._mentions.get(digest, ()):
            record = self._read(ref)
            if record is not None and any(parent.digest == digest for parent in record.spec.lineage.parents):
                yield record

    def _likely(self, parent: Parent) -> Iterator[AdapterRef]:
        try:
            ref = AdapterRef.parse(parent.ref)
        except InvalidNameError:
            ref = None
        if ref is not None and ref.version and is_name(ref.name):
            yield ref
        yield from self._mentions.get(parent.digest, ())

    def _read(self, ref: AdapterRef) -> Record | None:
        try:
            return self._records.read(ref.name, ref.version or 0)
        except FileNotFoundError:
            return None

    @cached_property
    def _mentions(self) -> Mapping[str, list[AdapterRef]]:
        """Which records mention a digest: the adapter's own, and those of its children. They are not parsed."""
        mentions: defaultdict[str, list[AdapterRef]] = defaultdict(list)
        for name in self._records.names():
            for version in reversed(self._records.versions(name)):
                data = self._records.path(name, version).read_bytes()
                for digest in set(_DIGEST.findall(data)):
                    mentions[digest.decode()].append(AdapterRef(name, version=version))
        return mentions

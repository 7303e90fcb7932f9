"""The family of an adapter: found by digest, wherever it lies, each member once, in little time."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import networkx
import pytest

from graftory.adapter import Parent
from graftory.errors import CorruptAdapterError
from graftory.hub import Hub
from graftory.hub.depot import Depot
from graftory.hub.lineage import lineage_graph
from graftory.hub.records import Record, RecordStore
from tests.hub_samples import lora

GONE = "sha256:" + "1" * 64


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub.create(tmp_path / "hub")


def keep(hub: Hub, name: str, *parents: Parent) -> Record:
    """A version made from others; its bytes are those of all the others here, so that many are quick."""
    sample = lora(1, parents)
    seed = 1 + sum(len(hub.versions(row.name)) for row in hub.index())
    spec = replace(sample.spec, lineage=replace(sample.spec.lineage, seed=seed))
    return hub.record(hub.put(name, replace(sample, spec=spec)))


def part(record: Record, relation: str = "merged", weight: float | None = 0.5) -> Parent:
    return Parent(str(record.ref), record.digest, relation, weight)  # type: ignore[arg-type]


def graph_of(hub: Hub, ref: str, *, children: bool = False) -> networkx.DiGraph[str]:
    return lineage_graph(Depot(hub.root), hub.record(ref), children=children)


def edges(graph: networkx.DiGraph[str]) -> set[tuple[str, str]]:
    return {(graph.nodes[parent]["ref"], graph.nodes[child]["ref"]) for parent, child in graph.edges}


def spy(monkeypatch: pytest.MonkeyPatch, method: str) -> list[tuple[object, ...]]:
    """The arguments of every call of a method of the record store from now on."""
    calls: list[tuple[object, ...]] = []
    original = getattr(RecordStore, method)

    def call(store: RecordStore, *arguments: object) -> object:
        calls.append(arguments)
        return original(store, *arguments)

    monkeypatch.setattr(RecordStore, method, call)
    return calls


def test_a_parent_where_its_child_says_costs_one_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = keep(hub, "one")
    for number in range(20):
        keep(hub, f"other-{number}")
    keep(hub, "two", part(first, "continued", None))
    scans = spy(monkeypatch, "names")
    record = hub.record("two")
    reads = spy(monkeypatch, "read")
    assert edges(lineage_graph(Depot(hub.root), record)) == {("one@1", "two@1")}
    assert (reads, scans) == ([("one", 1)], [])


def test_parents_elsewhere_and_missing_ones_cost_one_scan(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = keep(hub, "moved")
    gone = [Parent(f"gone-{number}@1", f"sha256:{number:064x}", "merged", 0.1) for number in range(5)]
    keep(hub, "odd", Parent("not a reference!", GONE, "merged", 0.1), *gone, replace(part(first), ref="before@7"))
    scans = spy(monkeypatch, "names")
    graph = graph_of(hub, "odd@1")
    assert ("moved@1", "odd@1") in edges(graph)
    assert {graph.nodes[node]["ref"] for node in graph if not graph.nodes[node]["known"]} == {
        "not a reference!",
        *(f"gone-{number}@1" for number in range(5)),
    }
    assert len(scans) == 1


def test_another_adapter_under_the_name_of_a_parent_is_not_the_parent(hub: Hub) -> None:
    other = keep(hub, "one")
    keep(hub, "two", Parent(str(other.ref), GONE, "continued"))
    graph = graph_of(hub, "two")
    assert set(graph) == {GONE, hub.record("two").digest}
    assert not graph.nodes[GONE]["known"]


def test_a_parent_that_takes_part_twice_is_one_edge_with_two_links(hub: Hub) -> None:
    first = keep(hub, "one")
    child = keep(hub, "two", part(first, weight=0.25), part(first, "distilled", None))
    edge = graph_of(hub, "two").edges[first.digest, child.digest]
    assert edge["links"] == (("merged", 0.25), ("distilled", None))
    assert (edge["relation"], edge["weight"]) == ("merged", 0.25)


def test_children_are_found_with_their_links_to_the_family_alone(hub: Hub) -> None:
    top, stranger = keep(hub, "top"), keep(hub, "stranger")
    middle = keep(hub, "middle", part(top, "continued", None))
    both = keep(hub, "both", part(middle), part(stranger), part(top))
    keep(hub, "last", part(both, "distilled", None))
    keep(hub, "aside", part(stranger))
    assert edges(graph_of(hub, "middle")) == {("top@1", "middle@1")}
    assert edges(graph_of(hub, "middle", children=True)) == {
        ("top@1", "middle@1"),
        ("middle@1", "both@1"),
        ("top@1", "both@1"),
        ("both@1", "last@1"),
    }
    assert edges(graph_of(hub, "last", children=True)) == {
        ("top@1", "middle@1"),
        ("middle@1", "both@1"),
        ("stranger@1", "both@1"),
        ("top@1", "both@1"),
        ("both@1", "last@1"),
    }


def test_thirty_layers_of_diamonds_are_read_once_each(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of each layer from both of the layer before: 2^30 paths."""
    layer = [keep(hub, "left"), keep(hub, "right")]
    for _ in range(29):
        layer = [keep(hub, name, *map(part, layer)) for name in ("left", "right")]
    keep(hub, "end", *map(part, layer))
    reads = spy(monkeypatch, "read")
    start = time.perf_counter()
    graph = graph_of(hub, "end")
    assert time.perf_counter() - start < 5
    assert (len(graph), graph.number_of_edges(), len(reads)) == (61, 118, 61)
    whole = graph_of(hub, "left@1", children=True)
    assert (len(whole), whole.number_of_edges()) == (60, 116)


def test_a_damaged_record_in_the_family_is_a_typed_error(hub: Hub) -> None:
    first = keep(hub, "one")
    keep(hub, "two", part(first))
    path = Depot(hub.root).records.path("one", 1)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"seed": 1', b'"seed": 3'))
    with pytest.raises(CorruptAdapterError, match="one"):
        graph_of(hub, "two")

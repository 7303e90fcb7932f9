"""The commands that look into a hub: log, show, diff."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import networkx
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from graftory.adapter import Metric, Parent, Relation
from graftory.cli import cli
from graftory.commands.log import branches
from graftory.errors import ConfigError
from graftory.hub import Hub, Record
from graftory.hub.depot import Depot
from graftory.hub.keys import PrivateKey
from graftory.hub.layers import place
from graftory.hub.picture import MOST, draw_family
from tests.hub_samples import lora

GONE = "sha256:" + "1" * 64
KEY = "ab" * 32
HOSTILE = "evil\x1b[31m\r\n$\\frac{$@1"
Run = Callable[..., Result]


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub.create(tmp_path / "hub")


@pytest.fixture
def run(hub: Hub) -> Run:
    """`hub --registry ...`; its error lines are part of the output."""

    def call(*arguments: str | Path) -> Result:
        return CliRunner().invoke(cli, ["--registry", str(hub.root), *map(str, arguments)])

    return call


def as_json(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout, parse_constant=pytest.fail)


def keep(hub: Hub, name: str, seed: int, *parents: Parent, metrics: tuple[Metric, ...] | None = None) -> Record:
    sample = lora(seed, parents)
    spec = sample.spec if metrics is None else replace(sample.spec, metrics=metrics)
    return hub.record(hub.put(name, replace(sample, spec=spec)))


def part(record: Record, relation: Relation = "merged", weight: float | None = None) -> Parent:
    return Parent(str(record.ref), record.digest, relation, weight)


@pytest.fixture
def family(hub: Hub) -> dict[str, Record]:
    """two@1 is in both@1 by two ways, lost@3 is not here, last@1 was made from both@1."""
    one = keep(hub, "one", 1)
    two = keep(hub, "two", 2)
    more = keep(hub, "two", 3, part(two, "continued"))
    lost = Parent("lost@3", GONE, "distilled")
    both = keep(hub, "both", 4, part(one, "merged", 0.25), part(more, "composed"), lost, part(two, "merged", -2.0))
    last = keep(hub, "last", 5, part(both, "composed"), part(both, "merged", 0.5))
    return {str(record.ref): record for record in (one, two, more, both, last)}


def graph_of(edges: Iterable[tuple[str, str]]) -> networkx.DiGraph[str]:
    """A family that is not in a hub, from parents and children."""
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    for edge in edges:
        for node in edge:
            graph.add_node(node, ref=f"{node}@1", known=False)
        graph.add_edge(*edge, links=(("merged", 0.5),))
    return graph


def diamonds(layers: int) -> networkx.DiGraph[str]:
    """Two adapters in each layer, each made from both of the layer before: 2^layers paths to the end."""
    edges = [(f"{a}{n}", f"{b}{n + 1}") for n in range(layers - 1) for a in "lr" for b in "lr"]
    return graph_of([*edges, *((f"{a}{layers - 1}", "end") for a in "lr")])


# --- log: text and JSON


def test_log_shows_each_adapter_once_and_refers_to_it_afterwards(run: Run, family: dict[str, Record]) -> None:
    lines = run("log", "both").output.splitlines()
    date = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
    facts = rf"  sha256:[0-9a-f]{{12}}  train  {date}  accuracy 0\.9000 \(trec test\)"
    wanted = [
        rf"both@1{facts}",
        rf"├─ one@1{facts}  \(merged, weight 0\.25\)",
        rf"├─ two@2{facts}  \(composed\)",
        rf"│  └─ two@1{facts}  \(continued\)",
        r"├─ lost@3  sha256:111111111111  not in this hub  \(distilled\)",
        r"└─ two@1  see above  \(merged, weight -2\)",
    ]
    assert len(lines) == len(wanted)
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(pattern, line), line
    assert family["two@1"].digest[:19] in lines[3]


def test_log_as_json_has_every_node_and_every_link_once(run: Run, family: dict[str, Record]) -> None:
    found = as_json(run("log", "last@1", "--json"))
    assert (found["ref"], found["digest"]) == ("last@1", family["last@1"].digest)
    nodes = {node["digest"]: node for node in found["nodes"]}
    assert len(nodes) == len(found["nodes"]) == 6
    assert {node["ref"] for node in nodes.values()} == {*family, "lost@3"}
    assert nodes[GONE] == {
        "ref": "lost@3",
        "digest": GONE,
        "present": False,
        **dict.fromkeys(("process", "created", "method", "task", "metric")),
    }
    two = nodes[family["two@1"].digest]
    assert (two["present"], two["process"], two["method"], two["task"]) == (True, "train", "lora", "trec")
    assert two["metric"] == {"name": "accuracy", "value": 0.9, "data": "trec", "split": "test", "n": 100}
    edges = [
        (nodes[edge["parent"]]["ref"], nodes[edge["child"]]["ref"], edge["relation"], edge["weight"])
        for edge in found["edges"]
    ]
    assert sorted(edges, key=str) == [
        ("both@1", "last@1", "composed", None),
        ("both@1", "last@1", "merged", 0.5),
        ("lost@3", "both@1", "distilled", None),
        ("one@1", "both@1", "merged", 0.25),
        ("two@1", "both@1", "merged", -2.0),
        ("two@1", "two@2", "continued", None),
        ("two@2", "both@1", "composed", None),
    ]


def test_log_joins_the_ways_in_which_one_parent_takes_part(run: Run, family: dict[str, Record]) -> None:
    assert run("log", "last").output.splitlines()[1].endswith("  (composed; merged, weight 0.5)")


def test_log_of_children(run: Run, family: dict[str, Record]) -> None:
    lines = run("log", "two@1", "--children").output.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == [lines[0].split("  ")[0], "", "made from it"]
    below = [re.sub("[ │├└─]*", "", line.split("@1  ")[0].split("@2  ")[0]) for line in lines[3:]]
    assert sorted(below) == ["both", "both", "last", "two"]
    assert sum("see above" in line for line in lines) == 1
    assert run("log", "last", "--children").output.splitlines()[-1] == "nothing in this hub was made from it"
    nodes = as_json(run("log", "two@1", "--children", "--json"))["nodes"]
    assert {node["ref"] for node in nodes} == {"two@1", "two@2", "both@1", "last@1"}


def test_thirty_layers_of_diamonds_take_no_time() -> None:
    graph = diamonds(30)
    start = time.perf_counter()
    lines = list(branches(graph, "end"))
    down = list(branches(graph, "l0", down=True))
    draw_family(graph, "end", "png")
    assert time.perf_counter() - start < 10
    assert len(lines) == graph.number_of_edges() == 118
    assert sum("see above" not in line for line in lines) == 60
    assert len(down) == 2 * 2 * 28 + 2 + 2


def test_a_cycle_ends_and_a_long_chain_is_no_recursion() -> None:
    """No digest can be its own ancestor's; records made by hand and a broken hash must still not hang."""
    graph = graph_of([("a", "b"), ("b", "c"), ("c", "a"), ("a", "a"), ("c", "end")])
    assert len(list(branches(graph, "end"))) == graph.number_of_edges()
    for form in ("png", "svg"):
        assert draw_family(graph, "end", form)
    chain = graph_of((str(number), str(number + 1)) for number in range(1500))
    assert len(list(branches(chain, "1500"))) == 1500


def test_texts_of_a_record_are_shown_without_what_a_terminal_obeys(run: Run, hub: Hub, tmp_path: Path) -> None:
    metrics = (Metric(HOSTILE, 0.5, "\x1b]0;data\x07", "test", 3),)
    keep(hub, "one", 1, Parent(HOSTILE, GONE, "merged"), metrics=metrics)
    keep(hub, "two", 2, Parent(HOSTILE, GONE.replace("1", "2"), "merged"))
    commands = [("log", "one"), ("log", "one", "--history"), ("show", "one"), ("diff", "one", "two")]
    for command in commands:
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert "evil?[31m" in result.output
        assert not set(result.output) & set("\x1b\r\x07")
    for form in ("png", "svg"):
        assert run("log", "one", "--picture", tmp_path / f"family.{form}").exit_code == 0


# --- log: history


def test_history_has_all_versions_of_the_name(run: Run, hub: Hub, family: dict[str, Record]) -> None:
    keep(hub, "two", 9, metrics=())
    for alias, version in (("prod", 1), ("best", 1), ("test", 3)):
        hub.set_alias("two", alias, version)
    head, *lines = run("log", "two@1", "--history").output.splitlines()
    assert head.split() == ["version", "created", "made", "by", "method", "metric", "aliases", "digest"]
    rows = [re.split("  +", line) for line in lines]
    assert [(row[0], row[4], row[5]) for row in rows] == [
        ("two@3", "-", "test"),
        ("two@2", "accuracy 0.9000 (trec test)", "-"),
        ("two@1", "accuracy 0.9000 (trec test)", "best prod"),
    ]
    found = as_json(run("log", "two:prod", "--history", "--json"))
    assert [(row["version"], row["aliases"]) for row in found] == [(3, ["test"]), (2, []), (1, ["best", "prod"])]
    assert [row["digest"] for row in found[1:]] == [family[ref].digest for ref in ("two@2", "two@1")]


@pytest.mark.parametrize("arguments", [("--children",), ("--picture", "x.png")])
def test_history_is_of_names_alone(run: Run, family: dict[str, Record], arguments: tuple[str, ...]) -> None:
    result = run("log", "two", "--history", *arguments)
    assert result.exit_code == 2
    assert "--history" in result.output


# --- log: picture


def test_picture_as_svg_has_every_adapter_and_every_link(run: Run, family: dict[str, Record], tmp_path: Path) -> None:
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in pictures:
        result = run("log", "last", "--picture", path)
        assert result.exit_code == 0, result.output
        assert (result.stderr, result.stdout.count("\n")) == (f"picture: {path}\n", 7)
    text = pictures[0].read_text()
    assert text == pictures[1].read_text()
    ElementTree.fromstring(text)
    labels = re.findall("<!-- (.*?) -->", text, re.DOTALL)
    for ref in (*family, "lost@3"):
        assert labels.count(ref) == 1
    assert labels.count("lora, train") == 5
    assert labels.count("accuracy 0.9000 (trec test)") == 5
    assert labels.count("not in this hub") == 1
    for link in ("merged 0.25", "merged -2", "distilled", "continued"):
        assert labels.count(link) == 1
    assert text.count("stroke-dasharray") == 1  # the missing one


def test_picture_as_png(run: Run, family: dict[str, Record], tmp_path: Path) -> None:
    path = tmp_path / "family.png"
    assert len(as_json(run("log", "last", "--json", "--picture", path))["nodes"]) == 6
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert path.stat().st_size > 10_000


def test_picture_that_cannot_be(run: Run, family: dict[str, Record], tmp_path: Path) -> None:
    result = run("log", "both", "--picture", tmp_path / "family.jpg")
    assert (result.exit_code, result.stdout) == (2, "")
    assert ".png or .svg" in result.stderr
    result = run("log", "both", "--picture", tmp_path / "nowhere" / "family.png")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("error: ")
    with pytest.raises(ConfigError, match="--json"):
        draw_family(graph_of((str(number), "end") for number in range(MOST)), "end", "png")


def test_every_relation_has_a_colour_of_its_own() -> None:
    from graftory.hub.picture import _COLOURS

    assert set(_COLOURS) == set(get_args(Relation))
    assert len(set(_COLOURS.values())) == len(_COLOURS)


@pytest.mark.parametrize(
    "edges",
    [
        [("a", "b")],
        [(f"p{number}", "end") for number in range(39)],
        [(str(number), str(number + 1)) for number in range(39)],
        list(diamonds(6).edges),
        [(f"n{a}", f"n{b}") for a in range(12) for b in range(a + 1, 12)],
        [("top", "a"), ("top", "b"), ("a", "c"), ("c", "d"), ("b", "d"), ("top", "d")],
    ],
    ids=["pair", "merge", "chain", "diamonds", "all to all", "skipping"],
)
def test_layers_lead_from_parents_to_children_and_nothing_lies_on_anything(edges: list[tuple[str, str]]) -> None:
    placed = place(graph_of(edges))
    for (parent, child), spots in placed.edges.items():
        assert [layer for layer, _ in spots] == list(range(placed.nodes[parent][0], placed.nodes[child][0] + 1))
        assert len(spots) >= 2
        assert (spots[0], spots[-1]) == (placed.nodes[parent], placed.nodes[child])
    for layer in range(placed.layers):
        row = sorted(place for number, place in placed.nodes.values() if number == layer)
        assert row
        assert all(after - before >= 1 - 1e-9 for before, after in pairwise(row))
        bends = {spot[1] for spots in placed.edges.values() for spot in spots[1:-1] if spot[0] == layer}
        assert all(abs(bend - node) >= 0.7 for bend in bends for node in row)
    assert min(place for _, place in placed.nodes.values()) >= 0
    assert max(place for _, place in placed.nodes.values()) <= placed.span - 1 + 1e-9


def test_a_family_that_can_be_drawn_without_crossings_is() -> None:
    """Two separate ladders, given in an order that crosses."""
    edges = [("a0", "b0"), ("x0", "y0"), ("b0", "end"), ("y0", "end"), ("x1", "y0"), ("a1", "b0")]
    placed = place(graph_of(edges))
    for (a, b), (c, d) in ((e, f) for e in edges for f in edges if placed.nodes[e[0]][0] == placed.nodes[f[0]][0]):
        sides = [placed.nodes[a][1] - placed.nodes[c][1], placed.nodes[b][1] - placed.nodes[d][1]]
        assert sides[0] * sides[1] >= 0


# --- show


def test_show_tells_what_the_record_lacks_and_what_others_say_of_it(run: Run, hub: Hub) -> None:
    record = keep(hub, "one", 1)
    text = run("show", "one").output
    assert re.search(r"^licence +mit$", text, re.MULTILINE)
    assert "aliases" not in text
    assert "signed by" not in text
    for version in (1, 2):
        keep(hub, "one", version)
        hub.set_alias("one", f"v{version}", version)
    hub.set_alias("one", "prod", 1)
    key = hub.sign(record.ref, PrivateKey(Ed25519PrivateKey.generate())).key
    text = run("show", "one@1").output
    assert re.search(r"^aliases +one:prod, one:v1$", text, re.MULTILINE)
    assert re.search(rf"^signed by +{key[:16]}  \(unchecked; hub verify one@1 --key FILE\)$", text, re.MULTILINE)
    (line,) = (line for line in text.splitlines() if line.startswith("record "))
    gaps = as_json(run("verify", "one@1", "--complete", "--json"))["report"]["gaps"]["one@1"]
    assert gaps
    assert line.endswith(
        f" facts known; missing: {', '.join(gap['field'] for gap in gaps)} "
        "(how to fill it: hub verify one@1 --complete)"
    )


def test_show_as_json_adds_to_the_record(run: Run, hub: Hub) -> None:
    record = keep(hub, "one", 1)
    hub.set_alias("one", "prod", 1)
    Depot(hub.root).add_signature(record, KEY, b"{}")
    found = as_json(run("show", "one", "--json"))
    known = found.pop("completeness")
    assert found.pop("aliases") == ["prod"]
    assert found.pop("signatures") == [KEY]
    assert found == json.loads(record.source)
    assert known["known"] + len(known["gaps"]) == known["wanted"]
    assert "tokenizer hash" in [gap["field"] for gap in known["gaps"]]
    assert all(gap["remedy"] for gap in known["gaps"])


def test_show_of_a_record_without_licence(run: Run, hub: Hub) -> None:
    sample = lora(1)
    hub.put("one", replace(sample, spec=replace(sample.spec, licence=None)))
    assert re.search(r"^licence +not recorded$", run("show", "one").output, re.MULTILINE)


# --- diff


@pytest.fixture
def pair(hub: Hub) -> None:
    """trec@1 and trec@2: another alpha, licence, seed, two metrics and one tensor."""
    sample = lora(1)
    hub.put("trec", sample)
    spec = replace(
        sample.spec,
        config=replace(sample.spec.config, alpha=64.0),  # type: ignore[call-arg]
        licence=None,
        lineage=replace(sample.spec.lineage, seed=7),
        metrics=(Metric("accuracy", 0.95, "trec", "test", 100), Metric("loss", 0.25, "trec", "test", 100)),
    )
    tensors = {**sample.tensors, "classifier.bias": 2 * sample.tensors["classifier.bias"]}
    hub.put("trec", replace(sample, spec=spec, tensors=tensors))


def test_diff_in_tables(run: Run, pair: None) -> None:
    result = run("diff", "trec@1", "trec@2")
    assert result.exit_code == 0, result.output
    tables = [table.splitlines() for table in result.output.split("\n\n")]
    assert [re.split("  +", line) for line in tables[0]] == [
        ["recorded", "trec@1", "trec@2"],
        ["config.alpha", "16.0", "64.0"],
        ["lineage.seed", "1", "7"],
        ["licence", "mit", "-"],
    ]
    assert [re.split("  +", line) for line in tables[1]] == [
        ["metric", "trec@1", "trec@2", "difference"],
        ["accuracy on trec (test)", "0.9", "0.95", "+0.05"],
        ["loss on trec (test)", "-", "0.25", "-"],
    ]
    updates = {line.split("  ")[0]: line.split()[-2:] for line in tables[2][1:]}
    assert updates["m.1.q"] == ["3", "1"]  # 64 / 16 of it: three times its size away, in the same direction
    assert updates["m.0.q"][1] == "1"  # which has an alpha of its own
    assert float(updates["m.0.q"][0]) == pytest.approx(0, abs=1e-6)
    bias = tables[3][1].split()
    assert (bias[0], bias[4], bias[5]) == ("classifier.bias", "1", "1")
    assert tables[4] == ["tensors: 1 changed, 5 equal byte for byte"]


def test_diff_as_json(run: Run, pair: None) -> None:
    found = as_json(run("diff", "trec@1", "trec", "--json"))
    assert (found["left"], found["right"], found["same"], found["unchanged"]) == ("trec@1", "trec@2", False, 5)
    fields = {row["field"]: (row["left"], row["right"]) for row in found["fields"]}
    assert fields == {"config.alpha": (16.0, 64.0), "licence": ("mit", None), "lineage.seed": (1, 7)}
    accuracy, loss = found["metrics"]
    assert (accuracy["left"], accuracy["right"]) == (0.9, 0.95)
    assert accuracy["difference"] == pytest.approx(0.05)
    assert (loss["left"], loss["right"], loss["difference"]) == (None, 0.25, None)
    (tensor,) = found["tensors"]
    assert tensor["name"] == "classifier.bias"
    assert tensor["change"]["relative"] == pytest.approx(1)
    assert tensor["change"]["distance"] == pytest.approx(tensor["change"]["left"])
    assert {row["module"] for row in found["updates"]} == {"", "m.0.q", "m.1.q"}


def test_diff_of_one_adapter(run: Run, pair: None) -> None:
    assert run("diff", "trec@1", "trec@1").output == "trec@1 and trec@1 are the same adapter\n"
    assert as_json(run("diff", "trec@1", "trec@1", "--json"))["same"] is True


def test_diff_of_what_is_not_there(run: Run, pair: None) -> None:
    result = run("diff", "trec@1", "sms")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "sms" in result.stderr


def rows_of(output: str) -> dict[str, tuple[str, str]]:
    """The recorded values in a difference."""
    rows = (re.split("  +", line) for line in output.split("\n\n")[0].splitlines()[1:])
    return {row[0]: (row[1], row[2]) for row in rows}


def test_diff_shows_where_long_values_differ(run: Run, hub: Hub) -> None:
    """Not their common beginnings."""
    sample = lora(1)
    labels = [tuple(f"label number {number}" for number in (*range(40), last)) for last in (41, 42)]
    for end, names in zip("xy", labels, strict=True):
        assert sample.spec.task is not None
        task = replace(sample.spec.task, labels=names, head=(), template="word " * 40 + end + " {text}")
        tensors = {key: value for key, value in sample.tensors.items() if not key.startswith("classifier")}
        hub.put("trec", replace(sample, spec=replace(sample.spec, task=task), tensors=tensors))
    rows = rows_of(run("diff", "trec@1", "trec@2").output)
    assert rows["task.labels"] == ("41: label number 41", "41: label number 42")
    left, right = rows["task.template"]
    assert left.startswith("…")
    assert left.replace("x {text}", "y {text}") == right
    assert len(left) <= 44
    whole = rows_of(run("diff", "trec@1", "trec@2", "--all").output)
    assert whole["task.labels"] == tuple(", ".join(names) for names in labels)


def test_diff_of_parents(run: Run, hub: Hub) -> None:
    """By name and weight; by digest where only that differs."""
    one, two = GONE, GONE.replace("1", "2")
    for number, (digest, weight) in enumerate([(one, 0.5), (one, 0.25), (two, 0.25)]):
        keep(hub, f"m{number}", 1, Parent("p@1", digest, "merged", weight))
    assert rows_of(run("diff", "m0", "m1").output)["lineage.parents"] == ("p@1 merged 0.5", "p@1 merged 0.25")
    left, right = rows_of(run("diff", "m1", "m2").output)["lineage.parents"]
    assert "1111" in left
    assert "2222" in right

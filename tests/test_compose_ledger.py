"""Merges made again from their records, bit for bit, and without one of their parents; from Python and as commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from graftory.adapter import Adapter, Lineage, Parent
from graftory.cli import cli
from graftory.compose import METHODS, merge
from graftory.compose.merge.ledger import merge_again, merge_without
from graftory.compose.merge.mera import MeraParameters
from graftory.config import BottleneckConfig
from graftory.errors import AdapterNotFoundError, ConfigError, MergeError
from graftory.hub import Hub
from tests.test_compose_merge import bottleneck, lora, task, with_head

NAMES = ("one", "two", "three")
DATA_FREE = [name for name, row in METHODS.items() if row.params().reads == "nothing"]


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """Three adapters of different ranks, with heads of the same labels."""
    made = Hub.create(tmp_path / "hub")
    for seed, name in enumerate(NAMES):
        made.put(name, with_head(seed + 1, task(name, "xy")))
    return made


def parents_of(hub: Hub, names: tuple[str, ...]) -> list[Parent]:
    return [Parent(str(hub.record(name).ref), hub.record(name).digest, "merged") for name in names]


def stored(hub: Hub, name: str, parts: tuple[str, ...], method: str, **arguments: Any) -> str:
    made = merge([hub.get(part) for part in parts], method, parents=parents_of(hub, parts), **arguments)
    return str(hub.put(name, made))


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.3]], ids=["default", "given"])
def test_a_record_makes_the_same_bits_again_on_any_number_of_threads(
    method: str, weights: list[float] | None, hub: Hub
) -> None:
    ref = stored(hub, "merged", NAMES, method, weights=weights)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = merge_again(hub, ref)
            assert found.same
            assert found.libraries == {}
            assert found.adapter.spec == hub.record(ref).spec
    finally:
        torch.set_num_threads(before)
    assert hub.put("merged", found.adapter) == hub.resolve(ref), "the same digest, so no new version"


@pytest.mark.parametrize("method", [name for name in DATA_FREE if name != "mera"])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.3]], ids=["default", "given"])
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_left_out_is_never_merged(method: str, weights: list[float] | None, gone: int, hub: Hub) -> None:
    ref = stored(hub, "merged", NAMES, method, weights=weights)
    others = tuple(name for number, name in enumerate(NAMES) if number != gone)
    kept = None if weights is None else [w for number, w in enumerate(weights) if number != gone]
    never = hub.record(stored(hub, "never", others, method, weights=kept))
    made = hub.record(hub.put("without", merge_without(hub, ref, [NAMES[gone]])))
    assert made.digest == never.digest


def test_parameters_and_seeds_come_from_the_record(hub: Hub) -> None:
    for method, parameters in (
        ("dare", {"density": 0.3, "seed": 7, "rank": 4, "scaling": 0.5}),
        ("knots", {"inner": "della", "window": 0.1, "density": 0.6, "seed": 3}),
        ("iso_cts", {"common": 0.4, "rank": 5}),
    ):
        kind: Any = METHODS[method].params
        ref = stored(hub, method.replace("_", "-"), NAMES, method, parameters=kind(**parameters))
        assert merge_again(hub, ref).same
        told = hub.record(ref).spec.lineage.parameters
        assert {key: told[key] for key in parameters} == parameters
    assert not torch.equal(
        merge_again(hub, "dare").adapter.tensors["layer.0.query.lora_B.weight"],
        merge([hub.get(name) for name in NAMES], "dare", rank=4).tensors["layer.0.query.lora_B.weight"],
    )


def test_new_weights_may_be_given(hub: Hub) -> None:
    ref = stored(hub, "merged", NAMES, "linear", weights=[0.5, 2.0, 0.3])
    made = merge_without(hub, ref, ["two@1"], weights=[3.0, 4.0])
    assert [parent.weight for parent in made.spec.lineage.parents] == [3.0, 4.0]
    assert [parent.ref for parent in made.spec.lineage.parents] == ["one@1", "three@1"]


def test_soups_and_bottlenecks_too(hub: Hub) -> None:
    for seed in (1, 2, 3):
        hub.put(f"neck{seed}", bottleneck(seed))
    necks = ("neck1", "neck2", "neck3")
    for method in ("soup", "linear", "mera"):
        ref = stored(hub, f"{method}-necks", necks, method)
        assert merge_again(hub, ref).same
        made = hub.record(hub.put("left", merge_without(hub, ref, ["neck3"])))
        assert made.digest == hub.record(stored(hub, "never", necks[:2], method)).digest
    assert isinstance(hub.get("left").spec.config, BottleneckConfig)


def test_the_anchor_of_mera_keeps_its_place(hub: Hub) -> None:
    ref = stored(hub, "aligned", NAMES, "mera", parameters=MeraParameters(anchor=3))
    made = merge_without(hub, ref, ["one"])
    assert made.spec.lineage.parameters["anchor"] == 2
    direct = merge([hub.get("two"), hub.get("three")], "mera", parameters=MeraParameters(anchor=2))
    assert all(torch.equal(value, direct.tensors[key]) for key, value in made.tensors.items())
    with pytest.raises(MergeError, match="the anchor"):
        merge_without(hub, ref, ["three"])


def forged(hub: Hub, **changes: Any) -> None:
    """A version whose record tells something else than what was done."""
    made = merge([hub.get(name) for name in NAMES], parents=parents_of(hub, NAMES))
    hub.put("forged", replace(made, spec=replace(made.spec, lineage=replace(made.spec.lineage, **changes))))


def test_a_record_that_tells_something_else_is_found_out(hub: Hub) -> None:
    forged(hub, parameters={"method": "linear", "weights": [1.0, 1.0, 1.0], "rank": None}, libraries={"torch": "1"})
    found = merge_again(hub, "forged")
    assert not found.same
    assert found.largest is not None
    assert found.largest > 0.1
    assert found.libraries["torch"][0] == "1"
    forged(hub, parameters={"method": "linear", "weights": [1.0, 1.0, 1.0], "rank": 2})
    assert merge_again(hub, "forged").largest is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"process": "train"}, "forged@1 is no merge: its record says 'train'"),
        ({"parameters": {"method": "magic"}}, "merged by 'magic', which is unknown here; known: linear"),
        ({"parameters": {"method": "linear"}}, "does not name the parents and their weights"),
        ({"parents": ()}, "does not name the parents and their weights"),
        ({"parameters": {"method": "linear", "weights": ["a", 1, 2]}}, r"forged@1: weights\[0\]: got str 'a'"),
        ({"parameters": {"method": "linear", "weights": [0, 0, 0]}}, "all weights are 0"),
        ({"parameters": {"method": "ties", "weights": [1, 1, 2], "density": 7}}, "density: got 7"),
        ({"parameters": {"method": "ties", "weights": [1, 1, 2], "rank": "x"}}, r"forged@1\.rank: got str"),
        ({"parameters": {"method": "mera", "weights": [1, 1, 2], "by": "activations"}}, "does not name; merge anew"),
        ({"parameters": {"method": "regmean", "weights": [1, 1, 2], "examples": 3}}, "does not name; merge anew"),
        ({"parameters": {"method": "regmean", "weights": [1, 1, 2], "seed": "x"}}, "seed: got str"),
        ({"parameters": {"method": "regmean", "weights": [1, 1, 2]}}, "its record names no task to take examples of"),
    ],
)
def test_records_that_do_not_tell_enough_are_refused(changes: dict[str, Any], reason: str, hub: Hub) -> None:
    forged(hub, **changes)
    with pytest.raises((MergeError, ConfigError), match=reason):
        merge_again(hub, "forged")


def test_what_cannot_be_left_out_is_said(hub: Hub) -> None:
    ref = stored(hub, "merged", NAMES, "tsv")
    hub.put("stranger", lora(9))
    with pytest.raises(MergeError, match="stranger is no parent of merged@1; its parents are one@1, two@1, three@1"):
        merge_without(hub, ref, ["stranger"])
    with pytest.raises(MergeError, match="no parent is left without one, two, three"):
        merge_without(hub, ref, NAMES)
    with pytest.raises(AdapterNotFoundError, match="nobody"):
        merge_without(hub, ref, ["nobody"])


def test_a_parent_that_is_gone_is_named(hub: Hub) -> None:
    made = merge(
        [lora(1), lora(2)], parents=[*parents_of(hub, ("one",)), Parent("lost@4", "sha256:" + "0" * 64, "merged")]
    )
    ref = hub.put("merged", made)
    with pytest.raises(AdapterNotFoundError, match="lost"):
        merge_again(hub, ref)


def run(hub: Hub, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(hub.root), "merge", *arguments])


def test_the_command_merges_again_and_without(hub: Hub) -> None:
    options = ("--method", "dare_ties", "--density", "0.4", "--seed", "5", "--rank", "4")
    assert run(hub, *NAMES, *options, "--name", "merged").exit_code == 0
    told = hub.record("merged").spec.lineage.parameters
    assert (told["seed"], told["density"], told["rank"]) == (5, 0.4, 4)
    result = run(hub, "merged", "--again")
    assert result.exit_code == 0, result.output
    tensors = len(hub.get("merged").tensors)
    assert result.output == (
        f"merged@1 made again from one@1, two@1, three@1: all {tensors} tensors are the same, bit for bit\n"
    )
    found = json.loads(run(hub, "merged", "--again", "--json").output)
    assert found["same"] is True
    assert found["digest"] == hub.record("merged").digest
    assert run(hub, "merged", "--without", "two", "--name", "left").output.startswith("merged into left@1")
    assert run(hub, "one", "three", *options, "--name", "never").exit_code == 0
    assert hub.record("left").digest == hub.record("never").digest
    given = run(hub, "merged", "--without", "two", "--without", "one", "--weights", "2", "--name", "last", "--json")
    assert json.loads(given.output)["ref"] == "last@1"
    assert [parent.weight for parent in hub.record("last").spec.lineage.parents] == [2.0]


def test_the_command_says_what_differs(hub: Hub) -> None:
    forged(hub, parameters={"method": "linear", "weights": [1.0, 1.0, 1.0], "rank": None})
    result = run(hub, "forged", "--again")
    assert result.exit_code == 1
    assert "tensors differ, by at most" in result.output
    assert "the processor may be another one" in result.output
    forged(hub, parameters={"method": "linear", "weights": [1.0, 1.0, 1.0], "rank": 2}, libraries={"torch": "1.0"})
    text = run(hub, "forged", "--again").output
    assert "their shapes too" in text
    assert "torch 1.0 then, " in text
    assert json.loads(run(hub, "forged", "--again", "--json").output)["largest_difference"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["merged", "--again", "--method", "linear"], 1, "--method and --again do not go together"),
        (["merged", "--again", "--rank", "3"], 1, "--rank and --again do not go together"),
        (["merged", "--again", "--name", "x"], 1, "--name and --again do not go together"),
        (["merged", "--again", "--without", "one"], 1, "--without and --again do not go together"),
        (["merged", "--without", "one", "--seed", "2", "--name", "x"], 1, "--seed and --without do not go together"),
        (["merged", "one", "--again"], 1, "--again takes one adapter, the merge; got 2"),
        (["merged", "--without", "one"], 2, "Missing option '--name'"),
        (["one", "two"], 2, "Missing option '--name'"),
        (["one", "--again"], 1, "one@1 is no merge"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], code: int, text: str, hub: Hub) -> None:
    stored(hub, "merged", NAMES, "linear")
    result = run(hub, *arguments)
    assert result.exit_code == code
    assert text in result.stderr


def test_imported_adapters_are_no_merges(hub: Hub) -> None:
    plain: Adapter = lora(3)
    hub.put("plain", replace(plain, spec=replace(plain.spec, lineage=Lineage())))
    with pytest.raises(MergeError, match="'imported'"):
        merge_again(hub, "plain")

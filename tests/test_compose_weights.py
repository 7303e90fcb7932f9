"""Weights module by module, from Python, as a command, from a file, and in the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from graftory.adapter import Adapter
from graftory.cli import cli
from graftory.compose import METHODS, merge, merge_again, merge_without
from graftory.compose.merge.weighting import fits
from graftory.errors import AdapterNotFoundError, MergeError
from graftory.hub import Hub
from tests.merge_oracles import deltas, weighted
from tests.test_compose_merge import SITES, bottleneck, delta, lora, output, relative

DATA_FREE = sorted(name for name, row in METHODS.items() if row.space == "delta" and row.params().reads == "nothing")
TWO = (lora(1), lora(2, rank=5))
THREE = (*TWO, lora(3, rank=1, targets=SITES[:1]))


@pytest.mark.parametrize(
    ("pattern", "path", "fit"),
    [
        ("*", "a.layer.3.query", True),
        ("layer.3.*", "bert.encoder.layer.3.attention.query", True),
        ("layer.3.*", "bert.encoder.layer.13.attention.query", False),
        ("layer.3", "bert.encoder.layer.3.attention.query", False),
        ("query", "bert.layer.3.query", True),
        ("uery", "bert.layer.3.query", False),
        ("*query", "bert.layer.3.query", True),
        ("layer.[12].*", "layer.2.value", True),
        ("bert.layer.3.query", "bert.layer.3.query", True),
    ],
)
def test_a_pattern_is_a_path_or_the_end_of_one(pattern: str, path: str, fit: bool) -> None:
    assert fits(pattern, path) is fit


def test_every_module_has_the_weights_of_the_last_pattern_that_fits() -> None:
    merged = merge(TWO, weights={"*": [0.5, 2.0], "layer.0.*": 3.0, "*.value": [0.0, -1.0]})
    wanted = {SITES[0]: [3.0, 3.0], SITES[1]: [0.0, -1.0], SITES[2]: [0.5, 2.0]}
    for path, weights in wanted.items():
        assert relative(delta(merged, path), weighted(deltas(TWO, path), weights)) < 1e-6
    config: Any = merged.spec.config
    assert config.rank_of(SITES[1]) == 5, "an adapter of weight 0 takes no part there"
    assert merged.spec.lineage.parameters["weights"] == [0.5, 2.0]
    assert merged.spec.lineage.parameters["weights_at"] == [["layer.0.*", 3.0, 3.0], ["*.value", 0.0, -1.0]]


@pytest.mark.parametrize("method", DATA_FREE)
def test_each_method_merges_each_module_as_with_those_weights_alone(method: str) -> None:
    by_module = {"*": [1.0, 0.5], "layer.1.*": [0.25, 2.0]}
    merged = merge(TWO, method, weights=by_module)
    for paths, weights in ((SITES[:2], by_module["*"]), (SITES[2:], by_module["layer.1.*"])):
        alone = merge(TWO, method, weights=weights)
        for path in paths:
            assert torch.equal(delta(merged, path), delta(alone, path))


def test_modules_where_all_weights_are_0_stay_as_they_are() -> None:
    merged = merge(TWO, weights={"layer.0.*": 0.0})
    assert merged.spec.config.targets == SITES[2:]
    alone = merge(TWO, weights={"*": 0.0, "layer.1.query": [1.0, 0.0]})
    assert relative(delta(alone, SITES[2]), delta(TWO[0], SITES[2])) < 1e-6
    with pytest.raises(MergeError, match="all weights are 0"):
        merge(TWO, weights={"*": 0.0})


def test_bottlenecks_have_them_too() -> None:
    parts = [bottleneck(1), bottleneck(2, size=6)]
    merged = merge(parts, weights={"layer.1.*": [1.0, -2.0]})
    h = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for site, (one, two) in {"layer.0.output": (0.5, 0.5), "layer.1.output": (1.0, -2.0)}.items():
        wanted = one * output(parts[0], site, h) + two * output(parts[1], site, h)
        assert relative(output(merged, site, h), wanted) < 1e-6


@pytest.mark.parametrize(
    ("weights", "method", "reason"),
    [
        ({"layer.7.*": 1.0}, "linear", r"'layer\.7\.\*' fits no module of the adapters, such as layer\.0\.query"),
        ({"layer.1.*": [1.0]}, "linear", r"got 1 weights for 2 adapters at 'layer\.1\.\*', wanted one each"),
        ({"layer.1.*": float("nan")}, "linear", r"weights at 'layer\.1\.\*': got \[nan, nan\]"),
        ({"layer.1.*": 1.0}, "soup", "soup takes one weight for each adapter"),
        ([1.0, float("inf")], "linear", "wanted finite numbers"),
    ],
)
def test_what_makes_no_sense_is_refused(weights: Any, method: str, reason: str) -> None:
    with pytest.raises(MergeError, match=reason):
        merge(TWO, method, weights=weights)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A hub with three adapters."""
    hub = Hub.create(tmp_path / "hub")
    for name, adapter in zip(("one", "two", "three"), THREE, strict=True):
        hub.put(name, adapter)
    return tmp_path


def run(home: Path, *arguments: object) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(home / "hub"), *map(str, arguments)])


def stored(home: Path, name: str, refs: str, weights: object) -> Adapter:
    result = run(home, "merge", *refs.split(), "--weights", weights, "--name", name)
    assert result.exit_code == 0, result.output
    return Hub.open(home / "hub").get(name)


def test_the_command_takes_patterns_and_files_and_the_record_makes_it_again(home: Path) -> None:
    wanted = merge(TWO, weights={"*": [0.5, 2.0], "layer.0.*": 3.0, "value": [0.0, -1.0]})
    for ending, text in {
        "yaml": "'*': [0.5, 2]\nlayer.0.*: 3\nvalue: [0, -1]\n",
        "json": '{"*": [0.5, 2.0], "layer.0.*": 3.0, "value": [0, -1]}',
    }.items():
        (home / f"weights.{ending}").write_text(text)
    for name, given in {
        "typed": "0.5,2; layer.0.*=3; value=0,-1",
        "yaml": home / "weights.yaml",
        "json": home / "weights.json",
    }.items():
        found = stored(home, name, "one two", given)
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in wanted.tensors.items())
        assert merge_again(Hub.open(home / "hub"), name).same
    assert "bit for bit" in run(home, "merge", "typed", "--again").output


def test_left_out_is_never_merged(home: Path) -> None:
    stored(home, "all", "one two three", "0.5,2,1;layer.0.query=1,2,3;layer.1.*=1,0,0")
    never = stored(home, "never", "one two", "0.5,2;layer.0.query=1,2;layer.1.*=1,0")
    hub = Hub.open(home / "hub")
    without = merge_without(hub, "all", ["three"])
    assert without.spec.lineage.parameters == never.spec.lineage.parameters
    assert hub.record(hub.put("without", without)).digest == hub.record("never").digest
    alone = merge_without(hub, "all", ["one", "two"])
    assert alone.spec.lineage.parameters["weights_at"] == [["layer.0.query", 3.0]], "the other fits nothing of it"
    result = run(home, "merge", "all", "--without", "three", "--weights", "1,1;layer.1.*=2", "--name", "new")
    assert result.exit_code == 0, result.output
    assert hub.get("new").spec.lineage.parameters["weights_at"] == [["layer.1.*", 2.0, 2.0]]


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("0.5,x", "wanted numbers separated by commas"),
        ("0.5,1;0.5,1", "got weights twice for '*'"),
        (";", "wanted a number for each adapter"),
        ("absent.yaml", "absent.yaml: cannot be read"),
    ],
)
def test_bad_options_are_refused_in_one_line(home: Path, weights: str, reason: str) -> None:
    result = run(home, "merge", "one", "two", "--weights", weights, "--name", "x")
    assert result.exit_code != 0
    assert reason in result.stderr
    with pytest.raises(AdapterNotFoundError):
        Hub.open(home / "hub").resolve("x")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("- 1\n", "wanted patterns of modules"), ("a: x\n", "'a': got 'x', wanted a number"), ("a: [true]\n", "got")],
)
def test_bad_files_are_refused(home: Path, text: str, reason: str) -> None:
    (home / "bad.yaml").write_text(text)
    result = run(home, "merge", "one", "two", "--weights", home / "bad.yaml", "--name", "x")
    assert result.exit_code == 1
    assert reason in result.stderr

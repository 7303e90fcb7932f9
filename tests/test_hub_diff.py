"""What differs between two versions: against dense torch in float64, and whatever factors an update has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from graftory.adapter import Adapter, Metric, Parent
from graftory.cli import cli
from graftory.config import AdapterConfig, LoraConfig
from graftory.errors import CorruptAdapterError
from graftory.hub import Hub
from graftory.hub.depot import Depot
from graftory.hub.diff import Difference, UpdateChange, diff
from graftory.hub.norms import Distance
from tests.hub_samples import bottleneck, lora

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub.create(tmp_path / "hub")


def difference(hub: Hub, left: Adapter, right: Adapter) -> Difference:
    records = [hub.record(hub.put(name, adapter)) for name, adapter in (("one", left), ("two", right))]
    return diff(Depot(hub.root), *records)


def changed(adapter: Adapter, tensors: Mapping[str, Tensor], **config: Any) -> Adapter:
    spec = replace(adapter.spec, config=replace(adapter.spec.config, **config))
    return Adapter(spec, {**adapter.tensors, **tensors})


def delta(adapter: Adapter, path: str) -> Tensor:
    """The update as the model sees it, dense."""
    config = adapter.spec.config
    assert isinstance(config, LoraConfig)
    down, up = (adapter.tensors[f"{path}.lora_{part}.weight"].double() for part in "AB")
    return config.scale_of(path) * up @ down


def assert_close(got: Distance, left: Tensor, right: Tensor, tolerance: float = 1e-12) -> None:
    """The distance is the one that torch finds between dense tensors in float64."""
    left, right = left.double().ravel(), right.double().ravel()
    wanted = [left.norm(), right.norm(), (left - right).norm(), (left - right).norm() / left.norm()]
    wanted.append(left @ right / left.norm() / right.norm())
    for mine, theirs in zip((got.left, got.right, got.distance, got.relative, got.cosine), wanted, strict=True):
        assert mine == pytest.approx(float(theirs), rel=tolerance, abs=tolerance)


def by_module(found: Difference) -> dict[str, UpdateChange]:
    return {row.module: row for row in found.updates}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_norms_of_tensors_are_those_of_torch_in_every_dtype(hub: Hub, dtype: torch.dtype) -> None:
    one, two = (Adapter(a.spec, {k: v.to(dtype) for k, v in a.tensors.items()}) for a in (lora(1), lora(2)))
    found = difference(hub, one, two)
    assert {row.name for row in found.tensors} == set(one.tensors)
    for row in found.tensors:
        assert row.change is not None
        assert_close(row.change, one.tensors[row.name], two.tensors[row.name])
    sizes = [row.change.relative for row in found.tensors if row.change and row.change.relative is not None]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("rslora", [False, True])
def test_updates_are_those_of_dense_matrices_across_ranks_and_scales(hub: Hub, rslora: bool) -> None:
    one, two = lora(1), lora(2)
    generator = torch.Generator().manual_seed(5)
    wide = {
        "m.0.q.lora_A.weight": torch.randn(7, 4, generator=generator),
        "m.0.q.lora_B.weight": torch.randn(5, 7, generator=generator),
    }
    two = changed(two, wide, rank=7, alpha=3.0, rslora=rslora, alpha_pattern={"m.1.q": 0.5})
    found = difference(hub, one, two)
    rows = by_module(found)
    assert set(rows) == {"", "m.0.q", "m.1.q"}
    assert (rows["m.0.q"].left_rank, rows["m.0.q"].right_rank) == (2, 7)
    for path in ("m.0.q", "m.1.q"):
        assert_close(rows[path].change, delta(one, path), delta(two, path))
    everything = [torch.cat([delta(a, path).ravel() for path in ("m.0.q", "m.1.q")]) for a in (one, two)]
    assert_close(rows[""].change, everything[0], everything[1])
    assert found.updates[0].module == ""
    assert not {"m.0.q.lora_A.weight", "m.0.q.lora_B.weight"} - {r.name for r in found.tensors if r.change is None}


def test_other_factors_of_the_same_update_are_no_distance(hub: Hub) -> None:
    """(B G, G^-1 A) for any invertible G: the factors are far apart, the updates are one."""
    one = Adapter(lora(1).spec, {key: tensor.double() for key, tensor in lora(1).tensors.items()})
    gauged = {}
    for path, rank in (("m.0.q", 2), ("m.1.q", 3)):
        gauge = torch.randn(rank, rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        gauged[f"{path}.lora_A.weight"] = torch.linalg.solve(gauge, one.tensors[f"{path}.lora_A.weight"])
        gauged[f"{path}.lora_B.weight"] = one.tensors[f"{path}.lora_B.weight"] @ gauge
    found = difference(hub, one, changed(one, gauged))
    assert {row.name for row in found.tensors} == set(gauged)
    assert all(row.change and row.change.relative and row.change.relative > 0.1 for row in found.tensors)
    for update in found.updates:
        assert update.change.relative is not None
        assert update.change.cosine is not None
        assert update.change.relative < 1e-13
        assert update.change.cosine == pytest.approx(1, abs=1e-14)


def test_a_small_change_of_an_update_keeps_its_digits(hub: Hub) -> None:
    """Squares and their differences would have none left."""
    one = Adapter(lora(1).spec, {key: tensor.double() for key, tensor in lora(1).tensors.items()})
    key = "m.0.q.lora_B.weight"
    two = changed(one, {key: one.tensors[key] * (1 + 1e-10)})
    row = by_module(difference(hub, one, two))["m.0.q"]
    assert row.change.relative == pytest.approx(1e-10, rel=1e-4)


def test_another_scale_is_another_update_of_equal_tensors(hub: Hub) -> None:
    one = lora(1)
    found = difference(hub, one, changed(one, {}, alpha=32.0))
    assert (found.tensors, found.unchanged) == ((), len(one.tensors))
    rows = by_module(found)
    assert rows["m.0.q"].change.relative == pytest.approx(0, abs=1e-15)  # it has an alpha of its own
    assert rows["m.1.q"].change.relative == pytest.approx(1, rel=1e-12)
    assert [row.field for row in found.fields] == ["config.alpha"]


def test_a_module_that_only_one_has_counts_as_a_change_of_its_size(hub: Hub) -> None:
    one = lora(1)
    config: AdapterConfig = replace(one.spec.config, targets=("m.0.q",))
    tensors = {key: tensor for key, tensor in one.tensors.items() if not key.startswith("m.1.")}
    found = difference(hub, one, Adapter(replace(one.spec, config=config), tensors))
    assert found.only_left == ("m.1.q.lora_A.weight", "m.1.q.lora_B.weight")
    assert found.only_right == ()
    row = by_module(found)["m.1.q"]
    norm = float(delta(one, "m.1.q").norm())
    assert (row.left_rank, row.right_rank, row.change.right, row.change.cosine) == (3, 0, 0.0, None)
    assert row.change.distance == pytest.approx(norm, rel=1e-6)
    assert row.change.relative == pytest.approx(1)
    both = torch.cat([delta(one, path).ravel() for path in ("m.0.q", "m.1.q")]).norm()
    assert by_module(found)[""].change.relative == pytest.approx(norm / float(both), rel=1e-6)


def test_recorded_values_and_metrics(hub: Hub) -> None:
    one, two = lora(1), lora(2, (Parent("one@1", "sha256:" + "0" * 64, "merged", 0.5),))
    metrics = (Metric("accuracy", 0.95, "trec", "test", 100), Metric("loss", 0.1, "trec", "test", 100))
    assert two.spec.task is not None
    two = Adapter(replace(two.spec, metrics=metrics, task=replace(two.spec.task, max_length=64)), two.tensors)
    found = difference(hub, one, two)
    assert not found.same
    assert {row.field: (row.left, row.right) for row in found.fields} == {
        "task.max_length": (128, 64),
        "lineage.parents": (
            [],
            [{"ref": "one@1", "digest": "sha256:" + "0" * 64, "relation": "merged", "weight": 0.5}],
        ),
        "lineage.seed": (1, 2),
    }
    accuracy, loss = found.metrics
    assert (accuracy.left, accuracy.right) == (0.9, 0.95)
    assert accuracy.difference == pytest.approx(0.05)
    assert (loss.name, loss.left, loss.right, loss.difference) == ("loss", None, 0.1, None)


def test_equal_tensors_are_not_read(hub: Hub) -> None:
    one = lora(1)
    records = [hub.record(hub.put("one", one)), hub.record(hub.put("two", changed(one, {}, dropout=0.5)))]
    for sha256 in Depot(hub.root).blobs.all():
        Depot(hub.root).blobs.remove(sha256)
    found = diff(Depot(hub.root), *records)
    assert (found.tensors, found.updates, found.unchanged) == ((), (), 6)
    other = hub.record(hub.put("three", lora(2)))
    with pytest.raises(CorruptAdapterError, match=r"one@1 adapter_model\.safetensors: blob"):
        diff(Depot(hub.root), records[0], other)


def test_adapters_of_two_methods_share_nothing(hub: Hub) -> None:
    found = difference(hub, lora(1), bottleneck(1))
    assert (len(found.only_left), len(found.only_right), found.updates) == (6, 8, ())
    assert ("config.method", "lora", "bottleneck") in [(row.field, row.left, row.right) for row in found.fields]
    again = diff(Depot(hub.root), hub.record("two"), hub.record(hub.put("three", bottleneck(2))))
    for row in again.tensors:
        assert row.change is not None
        assert_close(row.change, bottleneck(1).tensors[row.name], bottleneck(2).tensors[row.name])
    assert len(again.tensors) == 8


def test_no_number_is_none_and_json_stays_json(hub: Hub) -> None:
    one, two = lora(1), lora(1)
    bad, zero = two.tensors["m.0.q.lora_A.weight"].clone(), torch.zeros(3, 4)
    bad[0, 0] = float("nan")
    two = changed(two, {"m.0.q.lora_A.weight": bad, "classifier.weight": zero})
    hub.put("one", one)
    hub.put("two", two, allow_nonfinite=True)
    result = CliRunner().invoke(cli, ["--registry", str(hub.root), "diff", "two", "one", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    rows = {row["name"]: row["change"] for row in found["tensors"]}
    assert rows["m.0.q.lora_A.weight"]["left"] is None
    assert (rows["classifier.weight"]["left"], rows["classifier.weight"]["relative"]) == (0.0, None)
    assert {row["module"]: row["change"]["distance"] for row in found["updates"]}["m.0.q"] is None


def test_the_command_shows_the_largest_changes_first(hub: Hub) -> None:
    hub.put("one", lora(1))
    hub.put("two", lora(2))

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["--registry", str(hub.root), "diff", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    lines = run("one", "two").splitlines()
    assert lines[0].split() == ["recorded", "one@1", "two@1"]
    assert "lineage.seed" in lines[1]
    assert any(line.split()[:4] == ["accuracy", "on", "trec", "(test)"] for line in lines)
    start = next(number for number, line in enumerate(lines) if line.startswith("update s B A"))
    assert lines[start + 1].startswith("all modules")
    sizes = [float(line.split()[-2]) for line in lines[start + 2 : start + 4]]
    assert sizes == sorted(sizes, reverse=True)
    assert lines[-1] == "tensors: 6 changed, 0 equal byte for byte"
    assert run("one@1", "one") == "one@1 and one@1 are the same adapter\n"
    found = json.loads(run("one", "two", "--json"))
    assert (found["left"], found["right"], found["same"], found["unchanged"]) == ("one@1", "two@1", False, 0)
    assert {row["name"] for row in found["tensors"]} == set(lora(1).tensors)


def test_the_command_leaves_rows_out_and_says_so(hub: Hub) -> None:
    paths = tuple(f"m.{number}.q" for number in range(20))

    def many(seed: int) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for path in paths:
            tensors[f"{path}.lora_A.weight"] = torch.randn(1, 4, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(5, 1, generator=generator)
        return Adapter(replace(lora().spec, config=LoraConfig(targets=paths, rank=1), task=None), tensors)

    hub.put("one", many(1))
    hub.put("two", many(2))
    arguments = ["--registry", str(hub.root), "diff", "one", "two"]
    short = CliRunner().invoke(cli, arguments).output
    assert "... and 9 more (--all)" in short
    assert "... and 28 more (--all)" in short
    whole = CliRunner().invoke(cli, [*arguments, "--all"]).output
    assert "more (--all)" not in whole
    assert all(whole.count(f"{path} ") == 1 and whole.count(f"{path}.lora_A") == 1 for path in paths)

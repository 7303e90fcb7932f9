"""Adapters in fewer bits, ranks and layers: what is stored, what it decodes to, what it loses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from graftory import Adapter, AdapterConfig, BottleneckConfig, Hub, LoraConfig, attach
from graftory.adapter import Lineage, Parent, Storage, spec_from_json, spec_to_json
from graftory.compose.compress import compress
from graftory.config import BitfitConfig, CodaConfig, CompacterConfig, DoraConfig, Ia3Config, KronaConfig, PrefixConfig
from graftory.errors import ConfigError, CorruptAdapterError, UnsupportedAdapterError
from graftory.hub.codecs import codec_of
from graftory.hub.codecs.packed import PACKERS, rows_of
from tests.adapter_samples import logits, make
from tests.conftest import tiny_batch, tiny_model
from tests.test_cli_train import TASK, as_json, assert_error, call, make_base

CONFIGS: tuple[AdapterConfig, ...] = (
    LoraConfig(rank=3, targets=("all",)),
    BottleneckConfig(size=6),
    CompacterConfig(size=8),
    KronaConfig(factor=8),
    DoraConfig(rank=2),
    PrefixConfig(length=3),
    CodaConfig(size=6),
)
PACKED: tuple[Storage, ...] = ("8bit", "1bit", "bitdelta")


def expected(storage: Storage, tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor packed and unpacked, by the formulas, in numpy and fp64."""
    x = tensor.double().numpy()
    if storage == "8bit":
        rows = rows_of(tensor).double().numpy()
        scale = np.abs(rows).max(1, keepdims=True) / 127
        return np.asarray((np.round(rows / scale) * scale).reshape(x.shape))
    if storage == "bitdelta":
        return np.asarray(np.where(x >= 0, 1, -1) * np.abs(x).mean())
    above = x >= x.mean()
    return np.asarray(np.where(above, x[above].mean(), x[~above].mean()))


@pytest.mark.parametrize("storage", PACKED)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_what_is_stored_decodes_to_the_formula(config: AdapterConfig, storage: Storage, tmp_path: Path) -> None:
    """And comes back the same from a hub, fits the model, and is smaller."""
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapter = make(model, config, labels=2)
    hub = Hub.create(tmp_path / "hub")
    made = compress(adapter, storage=storage)
    ref = hub.put("small", made.recorded())
    back = hub.get(ref)
    assert back.tensors.keys() == adapter.tensors.keys()
    for key, tensor in adapter.tensors.items():
        packed = not adapter.is_head(key) and PACKERS[storage].takes(tensor)
        wanted = torch.from_numpy(expected(storage, tensor)).float() if packed else tensor
        torch.testing.assert_close(back.tensors[key], wanted, atol=1e-6, rtol=1e-5)
        assert torch.equal(back.tensors[key], made.decoded.tensors[key])
    assert 0 < made.after < made.before or sum(value.numel() for value in adapter.tensors.values()) < 500
    record = hub.record(ref)
    assert record.spec.storage == storage
    assert record.size == made.after == record.spec.lineage.parameters["bytes"]["after"]
    assert [(entry.name, entry.shape) for entry in record.tensors] == sorted(
        (key, tuple(tensor.shape)) for key, tensor in adapter.tensors.items()
    )
    adapted = attach(model, {"small": back, "whole": adapter})
    with adapted.route(["small", "whole", None, "small"] * 2), torch.no_grad():
        assert torch.isfinite(logits(adapted, batch)).all()
    folder = hub.materialize(ref, tmp_path / "out")
    again = Hub.create(tmp_path / "again")
    assert again.record(again.add(folder, name="small")).digest == record.digest
    assert not hub.verify().problems


def test_the_loss_is_that_of_the_product() -> None:
    model = tiny_model("bert")
    adapter = make(model, LoraConfig(rank=3, alpha=5.0))
    made = compress(adapter, storage="8bit")
    lost, whole, off, norm = 0.0, 0.0, 0.0, 0.0
    for path in adapter.spec.config.targets:
        (a, b), (c, d) = (
            [each.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB"] for each in (adapter, made.decoded)
        )
        lost += float((d @ c - b @ a).square().sum())
        whole += float((b @ a).square().sum())
        off += float((c - a).square().sum() + (d - b).square().sum())
        norm += float(a.square().sum() + b.square().sum())
    assert made.loss.update == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert made.loss.weights == pytest.approx((off / norm) ** 0.5, rel=1e-4)
    assert made.loss.outputs is None
    assert 0 < (made.loss.update or 0) < 0.05


def test_fewer_bits_lose_more() -> None:
    model = tiny_model("bert")
    neck = make(model, BottleneckConfig(size=6), labels=2)
    losses = [compress(neck, storage=storage).loss for storage in PACKED]
    assert all(loss.outputs is not None and loss.update is None for loss in losses)
    assert losses[0].outputs < 0.05 < losses[1].outputs < 1  # type: ignore[operator]
    sizes = [compress(neck, storage=storage).after for storage in PACKED]
    assert sizes[0] > sizes[1] >= sizes[2]


def dylora(model: Any) -> Adapter:
    adapter = make(model, LoraConfig(rank=4, alpha=6.0), labels=2)
    lineage = Lineage("train", parameters={"trained_as": {"method": "dylora"}})
    return replace(adapter, spec=replace(adapter.spec, lineage=lineage))


def test_a_rank_is_cut_out_and_its_scale_is_alpha_by_rank() -> None:
    adapter = dylora(tiny_model("bert"))
    made = compress(adapter, rank=2)
    config = made.adapter.spec.config
    assert isinstance(config, LoraConfig)
    for path in config.targets:
        a, b = (adapter.tensors[f"{path}.lora_{side}.weight"] for side in "AB")
        left, right = (made.adapter.tensors[f"{path}.lora_{side}.weight"] for side in "BA")
        torch.testing.assert_close(config.scale_of(path) * left @ right, 3.0 * b[:, :2] @ a[:2])
    assert made.adapter.head_tensors().keys() == adapter.head_tensors().keys()
    assert made.adapter.spec.lineage.parameters["trained_as"] == {"method": "dylora"}
    both = compress(adapter, rank=1, storage="8bit")
    assert both.loss.update is not None
    assert both.after < made.after


@pytest.mark.parametrize("config", [BottleneckConfig(size=4, placement="houlsby"), LoraConfig(rank=2)])
def test_layers_go_and_the_rest_stays(config: AdapterConfig) -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapter = make(model, config, labels=2)
    made = compress(adapter, drop_layers=1)
    assert 0 < len(made.adapter.spec.config.targets) < len(adapter.spec.config.targets)
    assert all(".layer.1." in path for path in made.adapter.spec.config.targets)
    silent = {
        key: torch.zeros_like(value) if ".layer.0." in key and ("lora_B" in key or "adapter_up" in key) else value
        for key, value in adapter.tensors.items()
    }
    adapted = attach(model, {"less": made.adapter, "silent": replace(adapter, tensors=silent)})
    found = {}
    for name in adapted.names:
        with adapted.route(name), torch.no_grad():
            found[name] = logits(adapted, batch)
    torch.testing.assert_close(found["less"], found["silent"], atol=1e-6, rtol=1e-6)
    loss = made.loss.update if isinstance(config, LoraConfig) else made.loss.outputs
    assert loss is not None
    assert 0 < loss < 1


def test_a_specification_says_its_storage_only_where_it_has_one() -> None:
    spec = make(tiny_model("bert"), LoraConfig()).spec
    assert "storage" not in spec_to_json(spec)
    for storage in PACKED:
        packed = replace(spec, storage=storage)
        assert spec_from_json(json.loads(json.dumps(spec_to_json(packed))), "x") == packed
    with pytest.raises(ConfigError, match="storage"):
        spec_from_json({**spec_to_json(spec), "storage": "2bit"}, "x")


def test_what_is_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(ConfigError, match="nothing to compress"):
        compress(make(model, LoraConfig()))
    with pytest.raises(UnsupportedAdapterError, match="dylora"):
        compress(make(model, LoraConfig()), rank=2)
    with pytest.raises(ConfigError, match="wanted 1 to 4"):
        compress(dylora(model), rank=5)
    with pytest.raises(ConfigError, match="drop_layers: got 2"):
        compress(dylora(model), drop_layers=2)
    with pytest.raises(UnsupportedAdapterError, match="lora and bottleneck"):
        compress(make(model, PrefixConfig()), drop_layers=1)
    for config in (BitfitConfig(), Ia3Config()):
        with pytest.raises(UnsupportedAdapterError, match="take 8bit"):
            compress(make(model, config), storage="1bit")
        assert compress(make(model, config), storage="8bit").loss.weights is not None


def changed(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Ways to break a file."""
    codes, levels, index = (tensors[f"::{part}"] for part in ("codes", "levels", "index"))
    rows = json.loads(bytes(index.numpy()))

    def indexed(listed: Any) -> dict[str, Tensor]:
        return {"::index": torch.frombuffer(bytearray(json.dumps(listed).encode()), dtype=torch.uint8)}

    first, rest = rows[0], rows[1:]
    return [
        indexed([[first[0], [10**9, *first[1]]], *rest]),
        indexed([[first[0], [-size for size in first[1]]], *rest]),
        indexed([[first[0], [float(size) for size in first[1]]], *rest]),
        indexed([first, first, *rest[1:]]),
        indexed([["other", first[1]], *rest]),
        indexed([]),
        indexed({}),
        {"::index": index[:-1].clone()},
        {"::codes": codes[:-1].clone()},
        {"::levels": torch.cat([levels, levels])},
        {"::levels": levels.double()},
        {first[0]: torch.zeros(3)},
        {"::more": torch.zeros(3)},
    ]


@pytest.mark.parametrize("storage", PACKED)
def test_a_file_that_breaks_the_format_is_refused(storage: Storage) -> None:
    adapter = compress(make(tiny_model("bert"), LoraConfig(), labels=2), storage=storage).adapter
    codec = codec_of(adapter.spec)
    ((name, data),) = codec.encode(adapter).items()
    codec.check({name: data}, adapter.spec)
    for change in changed(load(data)):
        with pytest.raises((CorruptAdapterError, UnsupportedAdapterError)):
            codec.check({name: save({**load(data), **change})}, adapter.spec)
    with pytest.raises(CorruptAdapterError):
        codec.check({name: data}, replace(adapter.spec, storage=PACKED[PACKED.index(storage) - 1]))


def test_by_the_command_line(tmp_path: Path) -> None:
    """Trained, compressed and measured, shown, pushed and pulled; in PEFT's layout it is PEFT's again."""
    hub, base = tmp_path / "hub", make_base(tmp_path / "base", seed=0)
    Hub.create(hub)
    common = (
        "train",
        TASK,
        "--base",
        base,
        "--max-steps",
        "4",
        "--batch-size",
        "8",
        "--method",
        "dylora",
        "--rank",
        "4",
    )
    assert call(hub, *common, "--name", "elastic").exit_code == 0
    found = as_json(call(hub, "compress", "elastic", "--storage", "8bit", "--measure", "--task", TASK, "--json"))
    assert found["ref"] == "elastic@2"
    assert found["bytes"]["after"] < found["bytes"]["before"]
    assert found["metrics"][1]["after"]["value"] == pytest.approx(found["metrics"][1]["before"]["value"], abs=0.05)
    lineage = Hub.open(hub).record("elastic@2").spec.lineage
    assert lineage.parents == (Parent("elastic@1", Hub.open(hub).record("elastic@1").digest, "compressed"),)
    assert "8bit: " in call(hub, "show", "elastic@2").output
    said = call(hub, "compress", "elastic@1", "--rank", "1", "--name", "thin")
    assert "relative error of updates" in said.output
    assert Hub.open(hub).record("thin").spec.config.rank == 1  # type: ignore[attr-defined]
    (tmp_path / "there").mkdir()
    there = (tmp_path / "there").as_uri()
    assert call(hub, "push", "elastic@2", there).exit_code == 0
    other = tmp_path / "other"
    Hub.create(other)
    result = call(other, "pull", f"{there}/elastic@2", "--layout", "peft", "--to", tmp_path / "peft")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "peft" / "elastic" / "adapter_config.json").is_file()
    assert call(other, "verify").exit_code == 0
    result = call(hub, "export", "elastic@2", tmp_path / "files", "--format", "peft")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "files" / "adapter_model.safetensors").is_file()
    change = as_json(call(hub, "diff", "elastic@1", "elastic@2", "--json"))
    (overall,) = (row for row in change["updates"] if row["module"] == "")
    assert overall["change"]["relative"] == pytest.approx(found["loss"]["update"], rel=1e-4)
    assert_error(call(hub, "compress", "elastic@1"), "nothing to compress")

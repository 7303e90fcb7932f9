"""Sparse updates, alone and beside LoRA, against models whose weights are written out entry by entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graftory import Adapter, Hub, LoraConfig, attach, export, merge, new_adapter
from graftory.adapters.architectures import linear_widths
from graftory.adapters.route import Row
from graftory.adapters.targets import linear_targets
from graftory.compose.convert import to_lora
from graftory.compose.merge.base import body_of
from graftory.compose.merge.kinds import delta_at
from graftory.config import BottleneckConfig, SparsePlace, SparseUpdateConfig
from graftory.errors import (
    BaseMismatchError,
    ConfigError,
    CorruptAdapterError,
    MergeError,
    ShapeError,
    UnsupportedAdapterError,
)
from graftory.hub.base_check import base_shapes, check_fits
from graftory.hub.codecs import codec_of
from graftory.hub.depot import Depot
from graftory.hub.norms import Values
from tests.adapter_samples import logits, make, mixed_as_single, task
from tests.conftest import tiny_batch, tiny_model

PATH = "bert.encoder.layer.0.output.dense"


def sparse(
    model: Any, counts: Sequence[int] = (7,), seed: int = 0, labels: int = 2, lora: Sequence[str] = (), rank: int = 2
) -> Adapter:
    """An adapter with so many entries at the linear layers in turn (0: none), and LoRA at some; all weights random."""
    generator = torch.Generator().manual_seed(seed)
    places, values = [], {}
    for number, path in enumerate(linear_targets(model, ("all",))):
        inputs, outputs = linear_widths(model.get_submodule(path))
        if count := min(counts[number % len(counts)], inputs * outputs):
            places.append(SparsePlace(path=path, count=count, inputs=inputs, outputs=outputs))
            chosen = torch.randperm(inputs * outputs, generator=generator)[:count].sort().values
            values[f"{path}.sparse_index"] = chosen.to(torch.int32)
    factors = LoraConfig(targets=linear_targets(model, lora), rank=rank, alpha=3.0) if lora else None
    paths = [*(place.path for place in places), *(factors.targets if factors else ())]
    config = SparseUpdateConfig(targets=tuple(dict.fromkeys(paths)), sparse=tuple(places), low_rank=factors)
    fresh = new_adapter(model, config, task=task(labels) if labels else None)
    for key, value in fresh.tensors.items():
        if key not in values:
            values[key] = value + 0.3 * torch.randn(value.shape, generator=generator)
    return replace(fresh, tensors=values)


def doubled(adapter: Adapter) -> Adapter:
    wide = {key: value.double() if value.is_floating_point() else value for key, value in adapter.tensors.items()}
    return replace(adapter, tensors=wide)


def written_out(adapter: Adapter, path: str) -> Tensor:
    """ΔW in fp64, one entry after the other."""
    config = adapter.spec.config
    assert isinstance(config, SparseUpdateConfig)
    tensors, place, factors = adapter.tensors, config.place_of(path), config.low_rank
    update = torch.zeros(())
    if place is not None:
        update = torch.zeros(place.outputs, place.inputs, dtype=torch.double)
        for at, value in zip(
            tensors[f"{path}.sparse_index"].tolist(), tensors[f"{path}.sparse_value"].tolist(), strict=True
        ):
            update[at // place.inputs, at % place.inputs] = value
    if factors is not None and path in factors.targets:
        a, b = (tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
        update = update + 3.0 / factors.rank * b @ a
    return update


def moved(kind: str, adapter: Adapter) -> Any:
    """The oracle, transformers alone: a model in fp64 with W + ΔW, and the adapter's head."""
    model = tiny_model(kind).double()
    with torch.no_grad():
        for path in adapter.spec.config.targets:
            module: Any = model.get_submodule(path)
            update = written_out(adapter, path)
            module.weight.add_(update if isinstance(module, nn.Linear) else update.T)
        for key, value in adapter.head_tensors().items():
            path, _, name = key.rpartition(".")
            model.get_submodule(path).register_parameter(name, nn.Parameter(value.double()))
    return model


def some(model: Any) -> dict[str, Adapter]:
    return {
        "few": sparse(model, (3, 0, 1), seed=1),
        "many": sparse(model, (40, 200), seed=2, labels=3),
        "both": sparse(model, (0, 30), seed=3, lora=("qv",)),
        "all": sparse(model, (1024,), seed=4),
    }


def test_each_row_has_its_own_update_with_gradients(kind: str) -> None:
    """Mixed rows are single ones, and single ones a plain model in fp64 with W + ΔW."""
    model = tiny_model(kind).double()
    adapters = {name: doubled(each) for name, each in some(model).items()}
    rows: list[Row] = ["few", None, "many", "both", {"few": 0.5, "many": -2.0, "both": 1.5}, "all", "many"]
    heads = [row if isinstance(row, str | None) else "both" for row in rows]
    batch = {
        key: value.double() if value.is_floating_point() else value
        for key, value in tiny_batch(kind, len(rows)).items()
    }
    adapted = attach(model, adapters, check_base=False)
    bare = logits(model, batch)
    with adapted.route(rows, heads), torch.no_grad():
        mixed = logits(adapted, batch)
    for number, row in enumerate(rows):
        if isinstance(row, str):
            wanted = logits(moved(kind, adapters[row]), batch)[number]
            assert (wanted - bare[number, :1]).abs().max() > 1e-3
            torch.testing.assert_close(mixed[number, : len(wanted)], wanted, atol=1e-9, rtol=1e-9)
    assert torch.equal(mixed[1, : bare.shape[1]], bare[1])


def test_beside_others_gradients_too() -> None:
    model, batch = tiny_model("bert").double(), tiny_batch("bert", rows=7)
    adapters = {**some(model), "lora": make(model, LoraConfig(rank=3)), "neck": make(model, BottleneckConfig(size=4))}
    headless = {
        name: doubled(replace(each, spec=replace(each.spec, task=None), tensors=each.body_tensors()))
        for name, each in adapters.items()
    }
    adapted = attach(model, headless, check_base=False)
    adapted.train_only(*adapted.names)
    grads = mixed_as_single(
        adapted, [*headless, {"few": 0.3, "many": 1.0, "lora": -1.0, "neck": 0.5, "both": 2.0}], batch, 1e-9
    )
    assert sum("sparse_value" in name and bool(grad.abs().max() > 1e-6) for name, grad in grads.items()) > 20
    assert not any("sparse_index" in name for name in grads)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_no_matrix_for_each_row() -> None:
    model = tiny_model("bert")
    adapters = {f"a{number}": sparse(model, (20,), seed=number, labels=0) for number in range(3)}
    adapted = attach(model, adapters)
    batch = tiny_batch("bert", rows=32)
    rows: list[Row] = [f"a{number % 3}" for number in range(32)]
    with torch.no_grad(), _Largest() as bare:
        logits(model, batch)
    with adapted.route(rows), torch.no_grad(), _Largest() as mixed:
        logits(adapted, batch)
    assert mixed.numel <= max(bare.numel, 48 * 32)
    assert mixed.numel < 32 * 32 * 32


def test_fresh_it_is_the_base_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, batch = tiny_model("gpt2"), tiny_batch("gpt2")
    bare, stored = logits(model, batch), sparse(model, (0, 30), lora=("qv",))
    fresh = new_adapter(model, replace(stored.spec.config, init_seed=3))
    hub = Hub.create(tmp_path / "hub")
    back = hub.get(hub.put("one", stored))
    assert back.spec == stored.spec
    out = hub.materialize("one@1", tmp_path / "out")
    again = Hub.create(tmp_path / "other")
    assert again.record(again.add(out, name="one")).digest == hub.record("one@1").digest
    adapted = attach(model, {"fresh": fresh, "stored": back})
    with adapted.route("fresh"), torch.no_grad():
        torch.testing.assert_close(logits(adapted, batch), bare, atol=2e-6, rtol=2e-6)
    extracted = adapted.extract("stored")
    for found in (back, extracted):
        assert found.tensors.keys() == stored.tensors.keys()
        assert all(torch.equal(found.tensors[key], value) for key, value in stored.tensors.items())
        assert {value.dtype for key, value in found.tensors.items() if "index" in key} == {torch.int32}
    adapted.remove("stored")
    assert torch.equal(logits(adapted.detach(), batch), bare)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_folded_into_the_base_it_gives_the_same_logits(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    adapter = sparse(model, (5, 60, 0), seed=5, lora=("ffn",))
    wanted = logits(moved(kind, adapter), batch)
    torch.testing.assert_close(logits(export(model, adapter), batch).double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 9, 900])
def test_its_delta_is_exact_and_no_wider_than_its_rows_or_columns(count: int) -> None:
    adapter = sparse(tiny_model("bert"), (count,), seed=count)
    delta, wanted = delta_at(body_of(adapter, 0), PATH), written_out(adapter, PATH)
    assert torch.equal(delta.dense().double(), wanted)
    assert delta.rank == min(int((wanted != 0).any(dim).sum()) for dim in (0, 1))


def test_one_alone_merges_to_itself_and_several_stay_sparse() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    one, two = sparse(model, (9, 0), seed=1), sparse(model, (12,), seed=2)
    same, both = merge([one]), merge([one, two], weights=[0.5, -2.0])
    assert same.spec.method == both.spec.method == "sparse_update"
    assert all(torch.equal(same.tensors[key], value) for key, value in one.body_tensors().items())
    for path in both.spec.config.targets:
        update = -2.0 * written_out(two, path)
        if path in one.spec.config.targets:
            update = update + 0.5 * written_out(one, path)
        torch.testing.assert_close(written_out(both, path), update, atol=1e-6, rtol=1e-6)
    adapted = attach(model, {"one": one, "same": same})
    with torch.no_grad():
        with adapted.route("one"):
            wanted = logits(adapted, batch)
        with adapted.route("same"):
            torch.testing.assert_close(logits(adapted, batch), wanted, atol=1e-5, rtol=1e-5)


def test_it_merges_with_lora_and_by_other_methods() -> None:
    model = tiny_model("bert")
    one, split, lora = sparse(model, (9,), seed=1), sparse(model, (0, 30), lora=("qv",)), make(model, LoraConfig(), 2)
    whole = merge([one, split, lora], weights=[1.0, 2.0, 0.5])
    assert whole.spec.method == "lora"
    query = next(path for path in lora.spec.config.targets if "query" in path)
    a, b = (lora.tensors[f"{query}.lora_{side}.weight"].double() for side in "AB")
    wanted = written_out(one, query) + 2.0 * written_out(split, query) + 0.5 * 2.0 * b @ a
    torch.testing.assert_close(delta_at(body_of(whole, 0), query).dense().double(), wanted, atol=1e-5, rtol=1e-5)
    alone = merge([split])
    config = alone.spec.config
    assert isinstance(config, SparseUpdateConfig)
    assert config.low_rank is not None
    for path in config.targets:
        found = delta_at(body_of(alone, 0), path).dense().double()
        torch.testing.assert_close(found, written_out(split, path), atol=1e-6, rtol=1e-6)
    assert merge([one, one], "ties").spec.method == "sparse_update"
    assert to_lora(one, rank=None).error <= 1e-6


def test_it_is_stored_in_8_bits_with_its_positions_as_they_are(tmp_path: Path) -> None:
    adapter = sparse(tiny_model("bert"), (64,), seed=1)
    hub = Hub.create(tmp_path)
    ref = hub.put("small", replace(adapter, spec=replace(adapter.spec, storage="8bit")))
    back = hub.get(ref).tensors
    for key, value in adapter.body_tensors().items():
        if key.endswith("index"):
            assert torch.equal(back[key], value)
        else:
            assert 0 < (back[key] - value).abs().max() <= value.abs().max() / 254 + 1e-6
    values = Values(Depot(hub.root), hub.record(ref))
    assert values[f"{PATH}.sparse_index"].tolist() == adapter.tensors[f"{PATH}.sparse_index"].tolist()
    with pytest.raises(UnsupportedAdapterError, match="only vectors"):
        hub.put("bits", replace(adapter, spec=replace(adapter.spec, storage="1bit")))


def with_index(adapter: Adapter, change: Any) -> Adapter:
    key = f"{PATH}.sparse_index"
    return replace(adapter, tensors={**adapter.tensors, key: change(adapter.tensors[key])})


BAD: Mapping[str, Any] = {
    "falling": lambda index: index.flip(0),
    "twice": lambda index: torch.zeros_like(index),
    "outside": lambda index: index + 48 * 32,
    "below": lambda index: index - 48 * 32,
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_positions_are_refused(name: str) -> None:
    model = tiny_model("bert")
    bad = with_index(sparse(model), BAD[name])
    codec = codec_of(bad.spec)
    with pytest.raises(CorruptAdapterError, match="rising positions from 0 to 1535"):
        codec.check(codec.encode(bad), bad.spec)
    with pytest.raises(ShapeError, match="wanted rising int32 positions"):
        attach(model, {"bad": bad})


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    adapter = sparse(model, lora=("qv",))
    codec, config = codec_of(adapter.spec), adapter.spec.config
    assert isinstance(config, SparseUpdateConfig)
    for change in (lambda index: index.long(), lambda index: index.float()):
        other = with_index(adapter, change)
        with pytest.raises(UnsupportedAdapterError, match="save it as I32"):
            codec.check(codec.encode(other), other.spec)
    short = with_index(adapter, lambda index: index[:-1])
    with pytest.raises(CorruptAdapterError, match="has the shapes"):
        codec.check(codec.encode(short), short.spec)
    wider = tuple(replace(place, inputs=place.inputs + 1) for place in config.sparse)
    with pytest.raises(ShapeError, match="this base's is"):
        attach(model, {"wide": replace(adapter, spec=replace(adapter.spec, config=replace(config, sparse=wider)))})
    model.save_pretrained(tmp_path)
    entries, shapes = codec.check(codec.encode(adapter), adapter.spec), base_shapes(tmp_path)
    check_fits(adapter.spec, entries, shapes)
    with pytest.raises(BaseMismatchError, match="wide"):
        check_fits(replace(adapter.spec, config=replace(config, sparse=wider)), entries, shapes)
    with pytest.raises(MergeError, match="train the adapter first"):
        merge([new_adapter(model, SparseUpdateConfig(targets=("qv",)))])
    for wrong in (
        lambda: SparsePlace(path="x", count=5, inputs=2, outputs=2),
        lambda: SparsePlace(path="x", count=1, inputs=1 << 16, outputs=1 << 16),
        lambda: replace(config, targets=config.targets[1:]),
        lambda: replace(config, sparse=(*config.sparse, config.sparse[0])),
    ):
        with pytest.raises(ConfigError):
            wrong()

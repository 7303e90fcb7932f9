"""ProPETL against bottlenecks whose masks are applied by hand, its masks' bits, their gradients, and its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from graftory import Adapter, AdapterConfig, BottleneckConfig, Hub, LoraConfig, attach, merge, new_adapter
from graftory.adapters.expansions import as_bottleneck
from graftory.adapters.masked import packed, unpacked
from graftory.compose.compress import compress
from graftory.compose.fusion import new_fusion
from graftory.config import CompacterConfig, Placement, PropetlConfig
from graftory.errors import BaseMismatchError, ConfigError, CorruptAdapterError, UnsupportedAdapterError
from graftory.hub.base_check import base_shapes, check_fits
from graftory.hub.codecs import codec_of
from graftory.hub.safetensors_header import read_header
from graftory.settings import TrainSettings
from graftory.training import LoadedBase, train
from graftory.training.recipes.propetl import StraightThrough, mask_of, scores_of
from graftory.training.trainer import Hooks
from tests.adapter_samples import PLACEMENTS, logits, make, mixed_as_single
from tests.conftest import tiny_batch, tiny_model
from tests.training_samples import tiny_base, tiny_rows, tiny_task

QUICK = TrainSettings(max_steps=6, batch_size=8, learning_rate=1e-2)


def doubled(adapter: Adapter) -> Adapter:
    return replace(
        adapter,
        tensors={key: value.double() if value.is_floating_point() else value for key, value in adapter.tensors.items()},
    )


def bits_of(adapter: Adapter, path: str, side: str, shape: tuple[int, ...]) -> Tensor:
    """A mask by numpy."""
    codes = adapter.tensors[f"{path}.mask_{side}"].numpy()
    count = shape[0] * shape[1]
    return torch.from_numpy(np.unpackbits(codes)[:count].reshape(shape))


def written_out(adapter: Adapter) -> Adapter:
    """The bottlenecks by the paper's formula: a mask times the prototype at every site."""
    config, tensors = adapter.spec.config, adapter.tensors
    assert isinstance(config, PropetlConfig)
    dense: dict[str, Tensor] = dict(adapter.head_tensors())
    for path in config.targets:
        for side in ("down", "up"):
            whole = tensors[f"{config.targets[0]}.prototype_{side}.weight"]
            dense[f"{path}.adapter_{side}.weight"] = whole * bits_of(adapter, path, side, tuple(whole.shape))
            dense[f"{path}.adapter_{side}.bias"] = tensors[f"{config.targets[0]}.prototype_{side}.bias"]
    plain = BottleneckConfig(
        targets=config.targets,
        placement=config.placement,
        size=config.size,
        activation=config.activation,
        scale=config.scale,
    )
    return Adapter(replace(adapter.spec, config=plain), dense)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_it_is_the_bottleneck_of_its_masks(placement: Placement, kind: str) -> None:
    """In fp64, also where the weights of a layer are not a whole number of bytes."""
    model, batch = tiny_model(kind).double(), tiny_batch(kind)
    config = PropetlConfig(size=5, placement=placement, activation="gelu", scale=1.5, kept=0.3)
    adapter = doubled(make(model, config, labels=3))
    adapters = {"masked": adapter, "dense": written_out(adapter), "made": as_bottleneck(adapter)}
    adapted = attach(model, adapters, check_base=False)
    found = {}
    for name in adapters:
        with adapted.route(name), torch.no_grad():
            found[name] = logits(adapted, batch)
    assert (found["dense"] - logits(model, batch)[:, :1]).abs().max() > 1e-3
    torch.testing.assert_close(found["masked"], found["dense"], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found["made"], found["dense"], atol=1e-10, rtol=1e-10)


def test_mixed_batch_beside_others_equals_single_runs_with_gradients() -> None:
    model, batch = tiny_model("bert").double(), tiny_batch("bert", rows=7)
    configs: dict[str, AdapterConfig] = {
        "masked": PropetlConfig(size=6, activation="gelu"),
        "behind": PropetlConfig(size=4, placement="houlsby", kept=0.25),
        "neck": BottleneckConfig(size=6, activation="gelu"),
        "compact": CompacterConfig(size=8, spread=1.0),
        "lora": LoraConfig(rank=2),
    }
    made = {name: doubled(make(model, config, seed=seed)) for seed, (name, config) in enumerate(configs.items())}
    adapted = attach(model, made, check_base=False)
    adapted.train_only(*adapted.names)
    found = mixed_as_single(adapted, [*made, None, {"masked": 0.3, "neck": 0.5, "behind": -1.0}], batch, 1e-9)
    prototypes = [name for name in found if "prototype" in name]
    assert len(prototypes) == 8, "each prototype once, not once a layer"


def test_bits_are_numpys_and_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (3, 5), (2, 8), (7, 9)):
        mask = (torch.rand(shape, generator=generator) < 0.5).float()
        codes = packed(mask)
        assert codes.dtype == torch.uint8
        assert codes.numpy().tobytes() == np.packbits(mask.numpy().astype(bool)).tobytes()
        assert torch.equal(unpacked(codes, shape), mask.to(torch.uint8))


def test_a_mask_keeps_the_largest_scores_and_its_gradient_goes_straight_through() -> None:
    """By hand: W₀ = (2, -1, 4, 3), s = (.1, .4, -.3, .2), half kept: m = (0, 1, 0, 1); L = Σ g m W₀, ∂L/∂s = g W₀."""
    config = PropetlConfig(kept=0.5)
    scores = torch.tensor([0.1, 0.4, -0.3, 0.2], requires_grad=True)
    weights = torch.tensor([2.0, -1.0, 4.0, 3.0], requires_grad=True)
    g = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    mask = mask_of(config, scores)
    assert mask.tolist() == [0, 1, 0, 1]
    (g * mask * weights).sum().backward()
    assert scores.grad is not None
    assert weights.grad is not None
    assert scores.grad.tolist() == [2, -10, 400, 3000]
    assert weights.grad.tolist() == [0, 10, 0, 1000]
    everything: Tensor = StraightThrough.apply(torch.zeros(6), 4)  # type: ignore[no-untyped-call]
    assert everything.sum() == 4, "scores that are equal too"


def test_scores_start_with_the_masks_that_are_there() -> None:
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(40, generator=generator) < 0.3).to(torch.uint8)
    scores = scores_of(mask, 0.25, generator)
    assert scores.abs().max() <= 0.25
    assert scores[mask == 1].min() >= scores[mask == 0].max()
    assert not torch.equal(scores[mask == 1], scores[mask == 1].sort(descending=True).values)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return tiny_base("classification", tmp_path_factory.mktemp("base"))


def test_masks_and_prototype_learn_and_masks_keep_their_share(loaded: LoadedBase) -> None:
    task, rows = tiny_task("classification"), tiny_rows("classification")
    config = PropetlConfig(size=6, kept=0.25, mask_learning_rate=0.1)
    start = new_adapter(loaded.model, config, task=rows.info(task), base=loaded.base)
    first = start.spec.config.targets[0]
    learnt = train(loaded, task, rows, config, QUICK, name="it")
    assert learnt.spec.method == "propetl"
    assert learnt.tensors.keys() == start.tensors.keys()
    for key, value in learnt.tensors.items():
        assert not torch.equal(value, start.tensors[key]), key
        if ".mask_" in key:
            assert int(unpacked(value, (6, 32)).sum()) == round(0.25 * 6 * 32)
    codes = [learnt.tensors[f"{path}.mask_down"] for path in learnt.spec.config.targets]
    assert not torch.equal(*codes[:2]), "each layer has its own"
    # another task on the same prototype: only its masks and its head learn
    frozen = Hooks(frozen=tuple(part for part in config.parts if part.startswith("prototype")))
    other = train(loaded, task, rows, config, QUICK, name="it", init=learnt, hooks=frozen)
    for key, value in other.tensors.items():
        assert torch.equal(value, learnt.tensors[key]) is key.startswith(f"{first}.prototype"), key
    # with scores that do not learn, masks stay, from wherever they come
    still = train(loaded, task, rows, replace(config, mask_learning_rate=0.0), QUICK, name="it")
    kept = {key: value for key, value in still.tensors.items() if ".mask_" in key}
    assert all(torch.equal(value, start.tensors[key]) for key, value in kept.items())
    assert not torch.equal(still.tensors[f"{first}.prototype_up.weight"], start.tensors[f"{first}.prototype_up.weight"])


def test_it_comes_back_from_a_hub_in_a_bit_a_weight(tmp_path: Path) -> None:
    model = tiny_model("bert")
    hub = Hub.create(tmp_path / "hub")
    adapter = make(model, PropetlConfig(size=48, placement="houlsby"), labels=2)
    hub.put("one", adapter)
    back = hub.get("one")
    assert back.spec == adapter.spec
    assert back.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(back.tensors[key], value) for key, value in adapter.tensors.items())
    # a prototype in floats, two bits for each of its weights at the four sites, a head; beside four bottlenecks
    config, size, width = adapter.spec.config, 48, 32
    head = sum(value.numel() for value in adapter.head_tensors().values())
    (data,) = codec_of(adapter.spec).encode(adapter).values()
    stored = {tensor.name: tensor for tensor in read_header(data, "file")}
    assert len(config.targets) == 4
    bits = 4 * 2 * size * width // 8
    assert sum(each.end - each.begin for each in stored.values()) == bits + 4 * (2 * size * width + size + width + head)
    (dense,) = codec_of(as_bottleneck(adapter).spec).encode(as_bottleneck(adapter)).values()
    assert len(data) < len(dense) / 3
    adapted = attach(model, {"one": back})
    out = adapted.extract("one")
    assert all(torch.equal(out.tensors[key], value) for key, value in adapter.tensors.items())
    adapted.detach()
    # another version whose masks differ in three bits
    path = f"{config.targets[1]}.mask_up"
    codes = adapter.tensors[path].clone()
    codes[0] ^= 0b10000011
    hub.put("one", replace(adapter, tensors={**adapter.tensors, path: codes}))
    (change,) = hub.diff("one@1", "one@2").tensors
    assert change.change is not None
    assert change.name == path
    assert change.change.distance == pytest.approx(3**0.5)
    # in fewer bits the prototype alone is packed
    small = compress(adapter, storage="8bit")
    masks = [key for key in adapter.tensors if ".mask" in key]
    assert all(torch.equal(small.decoded.tensors[key], adapter.tensors[key]) for key in masks)
    assert small.loss.weights is not None
    assert 0 < small.loss.weights < 0.01
    model.save_pretrained(tmp_path / "base")
    check_fits(adapter.spec, hub.record("one").tensors, base_shapes(tmp_path / "base"))
    wide = type(model)(type(model.config).from_dict({**model.config.to_dict(), "hidden_size": 64}))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(BaseMismatchError, match="wide"):
        check_fits(adapter.spec, hub.record("one").tensors, base_shapes(tmp_path / "wide"))


def test_fresh_it_is_the_base_and_a_merge_takes_it_as_the_bottleneck_it_is() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    pair = [make(model, PropetlConfig(size=8), labels=2, seed=seed) for seed in (1, 2)]
    merged = merge(pair, weights=[0.5, 2.0])
    assert merged.spec.method == "bottleneck"
    bare = logits(model, batch)
    fresh = new_adapter(model, PropetlConfig(size=8))
    adapted = attach(model, {"merged": merged, "a": pair[0], "b": pair[1], "fresh": fresh})
    with torch.no_grad():
        with adapted.route("fresh"):
            torch.testing.assert_close(logits(adapted, batch), bare, atol=2e-6, rtol=2e-6)
        with adapted.route([{"a": 0.5, "b": 2.0}] * 8, heads="merged"):
            mixed = logits(adapted, batch)
        with adapted.route("merged"):
            torch.testing.assert_close(logits(adapted, batch), mixed, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(adapted.detach(), batch), bare)


def test_a_fusion_refuses_it_by_name() -> None:
    model = tiny_model("bert")
    one = make(model, PropetlConfig(size=8))
    with pytest.raises(UnsupportedAdapterError, match="a propetl adapter cannot be fused"):
        new_fusion(model, [one, as_bottleneck(one)])


def test_what_is_refused() -> None:
    for fields, said in (
        ({"kept": 0.0}, "kept"),
        ({"kept": 1.5}, "kept"),
        ({"size_pattern": {"x": 3}}, "share one bottleneck"),
        ({"mask_learning_rate": -1.0}, "mask_learning_rate"),
    ):
        with pytest.raises(ConfigError, match=said):
            PropetlConfig(**fields)
    adapter = new_adapter(tiny_model("bert"), PropetlConfig(size=8))
    codec, first = codec_of(adapter.spec), adapter.spec.config.targets[0]
    key = f"{first}.mask_down"
    for wrong, kind, said in (
        (adapter.tensors[key].float(), UnsupportedAdapterError, "pack it to bits"),
        (unpacked(adapter.tensors[key], (8, 32)).flatten(), CorruptAdapterError, "shapes"),
    ):
        broken = replace(adapter, tensors={**adapter.tensors, key: wrong})
        with pytest.raises(kind, match=said):
            codec.check(codec.encode(broken), adapter.spec)
    twice = {**adapter.tensors, f"{adapter.spec.config.targets[1]}.prototype_down.bias": torch.zeros(8)}
    with pytest.raises(CorruptAdapterError, match="shapes"):
        codec.check(codec.encode(replace(adapter, tensors=twice)), adapter.spec)

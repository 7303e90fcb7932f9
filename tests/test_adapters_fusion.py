"""AdapterFusion in a model, against the textbook formula written out in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from graftory import Adapter, AdapterConfig, BottleneckConfig, LoraConfig, attach
from graftory.adapters import Row
from graftory.adapters.fusion_math import Attention, Source, Sources, fuse
from graftory.compose.fusion import new_fusion, without
from graftory.config import FusionConfig, Placement
from graftory.errors import AdapterNotFoundError, BaseMismatchError, ShapeError, UnsupportedAdapterError
from tests.adapter_samples import PLACEMENTS, logits, make, shaken
from tests.conftest import tiny_batch, tiny_model

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
}


def textbook(u: Tensor, outputs: Sequence[Tensor], q: Tensor, b: Tensor, k: Tensor, bk: Tensor, v: Tensor) -> Tensor:
    """Section 3.2 of the paper, one token and one adapter at a time, with the bias of K that its code has."""
    rows = []
    for token in range(len(u)):
        query = q @ u[token] + b
        scores = torch.stack([query @ (k @ z[token] + bk) for z in outputs])
        weights = scores.exp() / scores.exp().sum()
        rows.append(sum((w * (v @ z[token]) for w, z in zip(weights, outputs, strict=True)), torch.zeros_like(b)))
    return torch.stack(rows)


def output_of(adapter: Adapter, path: str, u: Tensor) -> Tensor:
    """z of one adapter at one module, for inputs [tokens, d]."""
    config, tensors = adapter.spec.config, adapter.tensors
    if isinstance(config, LoraConfig):
        scale = config.alpha / config.rank
        return scale * (u @ tensors[f"{path}.lora_A.weight"].T @ tensors[f"{path}.lora_B.weight"].T)
    assert isinstance(config, BottleneckConfig)
    down = u @ tensors[f"{path}.adapter_down.weight"].T + tensors[f"{path}.adapter_down.bias"]
    hidden = ACTS[config.activation](down)
    return config.scale * (hidden @ tensors[f"{path}.adapter_up.weight"].T + tensors[f"{path}.adapter_up.bias"])


def doubled(adapter: Adapter) -> Adapter:
    return replace(
        adapter,
        tensors={key: value.double() for key, value in adapter.tensors.items()},
        sources=tuple(map(doubled, adapter.sources)),
    )


def sources(model: Any, placement: Placement = "pfeiffer") -> list[Adapter]:
    """Two bottlenecks of unequal size, activation and scale, and two LoRAs of unequal rank and targets."""
    return [
        make(model, BottleneckConfig(placement=placement, size=6, activation="gelu"), labels=2, seed=1),
        make(model, BottleneckConfig(placement=placement, size=3, activation="tanh", scale=2.0), seed=2),
        make(model, LoraConfig(rank=2), labels=3, seed=3),
        make(model, LoraConfig(rank=5, alpha=7, targets=("all",)), seed=4),
    ]


def fusion(model: Any, parents: Sequence[Adapter], seed: int = 0, head: int | None = 0) -> Adapter:
    """A fusion far from its start."""
    fresh = new_fusion(model, parents, head=None if head is None else parents[head])
    return shaken(fresh, seed + 10)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("biased", [True, False])
def test_the_update_is_the_textbook_s_in_either_order_of_products(tokens: int, biased: bool) -> None:
    """40 tokens outnumber the 11 hidden units, so weights are multiplied first; 3 do not."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    inputs, width = 5, 7
    kinds = [(2, 1.0, None), (4, 0.5, ACTS["gelu"]), (5, 3.0, ACTS["gelu"])]
    listed = [
        Source(draw(rank, inputs), draw(width, rank), scale, draw(rank), draw(width), act)
        if biased
        else Source(draw(rank, inputs), draw(width, rank), scale, activation=act)
        for rank, scale, act in kinds
    ]
    attention = Attention(draw(width, inputs) / 5, draw(width), draw(width, width) / 5, draw(width, width))
    u = draw(tokens, inputs)
    outputs = []
    for source in listed:
        hidden = u @ source.down.T + (0.0 if source.down_bias is None else source.down_bias)
        hidden = hidden if source.activation is None else source.activation(hidden)
        up_bias = torch.zeros(width) if source.up_bias is None else source.up_bias
        outputs.append(source.scale * (hidden @ source.up.T + up_bias))
    got, weights = fuse(u, Sources(listed, torch.float64), attention)
    wanted = textbook(
        u, outputs, attention.query, attention.query_bias, attention.key, draw(width), attention.value
    )  # any bias of K
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(weights.sum(-1), torch.ones(tokens, dtype=torch.float64))
    assert weights.max() > 0.6  # a test of nothing if every source weighed the same


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_in_a_model_the_update_is_the_textbook_s_at_every_place(placement: Placement) -> None:
    model = tiny_model("bert").double()
    parents = [doubled(each) for each in sources(tiny_model("bert"), placement)]
    fused = doubled(fusion(tiny_model("bert"), parents))
    adapted = attach(model, {"f": fused}, check_base=False)
    seen: list[tuple[Any, Tensor, Tensor]] = []
    holders: list[Any] = list(adapted.sites.values())
    for site in holders:
        inner = site.fused_update

        def spy(x: Tensor, selection: Any, site: Any = site, inner: Any = inner) -> Tensor:
            out: Tensor = inner(x, selection)
            seen.append((site.fusions[selection.slots[0]][0], x, out))
            return out

        site.fused_update = spy
    with adapted.route("f"), torch.no_grad():
        logits(adapted, tiny_batch("bert", rows=2))
    config = fused.spec.config
    assert isinstance(config, FusionConfig)
    assert [place for place, _, _ in seen] != []
    assert {(place.path, place.track) for place, _, _ in seen} == {(p.path, p.track) for p in config.places}
    for place, x, out in seen:
        u = x.reshape(-1, x.shape[-1])
        zs = [output_of(parents[n], place.path, u) for n in place.sources]
        names = [f"{place.path}.fusion_{place.track}_{p}" for p in ("query.weight", "query.bias", "key.weight")]
        q, b, k = (fused.tensors[name] for name in names)
        v = fused.tensors[f"{place.path}.fusion_{place.track}_value.weight"]
        wanted = textbook(u, zs, q, b, k, torch.zeros_like(b), v)
        torch.testing.assert_close(out.reshape(wanted.shape), wanted, atol=1e-10, rtol=1e-10)


def test_gradients_are_the_textbook_s() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(6, 6), (6,), (6, 6), (6, 6)]
    ours = [torch.randn(shape, generator=random, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs = [each.detach().clone().requires_grad_() for each in ours]
    source = [
        Source(torch.randn(r, 6, generator=random).double(), torch.randn(6, r, generator=random).double() / 9)
        for r in (2, 3)
    ]
    for tokens in (4, 30):
        u = torch.randn(tokens, 6, generator=random).double()
        fuse(u, Sources(source, torch.float64), Attention(*ours))[0].square().sum().backward()
        zs = [u @ each.down.T @ each.up.T for each in source]
        q, b, k, v = theirs
        textbook(u, zs, q, b, k, torch.zeros(6).double(), v).square().sum().backward()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-9, rtol=1e-9)


CONFIGS: list[AdapterConfig] = [
    LoraConfig(rank=3),
    *(BottleneckConfig(placement=each, size=5, scale=0.5) for each in PLACEMENTS),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_fusion_of_one_adapter_with_the_identity_is_that_adapter(kind: str, config: AdapterConfig) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    one = make(model, config, labels=3)
    fused = new_fusion(model, [one], head=one)
    exact = {
        key: torch.eye(len(value))
        if key.endswith("_value.weight")
        else value
        if one.is_head(key)
        else torch.randn_like(value)
        for key, value in fused.tensors.items()
    }
    adapted = attach(model, {"one": one, "fresh": fused, "fused": replace(fused, tensors=exact)})
    outputs = []
    for name in ("one", "fused", "fresh", None):
        with adapted.route(name), torch.no_grad():
            outputs.append(logits(adapted, batch))
    alone, same, fresh, bare = outputs
    torch.testing.assert_close(same, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fresh, alone, atol=1e-3, rtol=1e-3)
    assert (alone[:, :2] - bare).abs().max() > 1e-2


def test_a_fresh_fusion_is_nearly_the_mean() -> None:
    """Q and K are small, so all weigh alike: at one linear layer the update is the mean of the updates."""
    model = tiny_model("bert")
    target = "bert.encoder.layer.0.attention.self.query"
    a, b = (make(model, LoraConfig(rank=r, targets=(target,)), seed=r) for r in (2, 3))
    adapted = attach(model, {"a": a, "b": b, "f": new_fusion(model, [a, b])})
    with adapted.route(["f", {"a": 0.5, "b": 0.5}] * 4), torch.no_grad():
        batch = {key: value[:1].expand(8, -1) for key, value in tiny_batch("bert").items()}
        fused, mean = logits(adapted, batch)[:2]
    torch.testing.assert_close(fused, mean, atol=1e-3, rtol=1e-3)


MIXED: Sequence[Row] = ("f", None, "g", "lora", "neck", {"f": 0.5, "neck": 0.5}, {"g": 0.3, "lora": 0.6}, "f")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_with_fusions_adapters_mixtures_and_the_bare_base_go_in_one_batch(kind: str, placement: Placement) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    parents = sources(model, placement)
    adapters = {
        "f": fusion(model, parents),
        "g": fusion(model, parents[1:], seed=1, head=1),
        "lora": parents[2],
        "neck": parents[0],
    }
    with torch.no_grad():
        bare = logits(model, batch)
    adapted = attach(model, adapters)
    heads = ["f", None, "lora", None, None, "neck", "lora", None]
    with adapted.route(MIXED, heads), torch.no_grad():
        mixed = logits(adapted, batch)
    for i, (row, head) in enumerate(zip(MIXED, heads, strict=True)):
        with adapted.route([row], [head]), torch.no_grad():
            single = logits(adapted, {key: value[i : i + 1] for key, value in batch.items()})[0]
        torch.testing.assert_close(mixed[i, : len(single)], single, atol=1e-5, rtol=1e-5)
        if row is None:
            assert torch.equal(mixed[i, : len(single)], bare[i])
        else:
            assert (single[:2] - bare[i]).abs().max() > 1e-3


def test_a_mixture_with_a_fusion_is_the_weighted_sum_of_updates() -> None:
    model = tiny_model("bert")
    target = "bert.encoder.layer.0.attention.self.query"
    a, b = (make(model, LoraConfig(rank=r, targets=(target,)), seed=r) for r in (2, 3))
    query, seen = model.get_submodule(target), []
    adapted = attach(model, {"a": a, "f": fusion(model, [a, b], head=None)})
    query.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    batch = {key: value[:1].expand(4, -1) for key, value in tiny_batch("bert").items()}
    with adapted.route(["a", "f", {"a": 0.7, "f": 0.3}, None]), torch.no_grad():
        logits(adapted, batch)
    ((_, out),) = seen
    torch.testing.assert_close(out[2] - out[3], 0.7 * (out[0] - out[3]) + 0.3 * (out[1] - out[3]), atol=1e-5, rtol=1e-5)


def test_leaving_one_out_is_fusing_fewer() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    parents = sources(model)
    whole = fusion(model, parents)
    fewer = without(whole, 1)
    assert fewer.sources == (parents[0], *parents[2:])
    direct = new_fusion(model, fewer.sources, head=parents[0])
    assert direct.spec.config == fewer.spec.config
    assert set(direct.tensors) == set(fewer.tensors)
    assert all(fewer.tensors[key] is whole.tensors[key] for key in fewer.tensors)
    adapted = attach(model, {"whole": whole, "fewer": fewer, "direct": replace(direct, tensors=fewer.tensors)})
    outputs = {}
    for name in adapted.names:
        with adapted.route(name), torch.no_grad():
            outputs[name] = logits(adapted, batch)
    assert torch.equal(outputs["fewer"], outputs["direct"])
    assert (outputs["fewer"] - outputs["whole"]).abs().max() > 1e-3
    neckless = without(without(whole, 0), 0)
    assert {key for key in whole.tensors if "serial" in key} & set(neckless.tensors) == set()
    with pytest.raises(UnsupportedAdapterError, match="of 4, wanted one of several"):
        without(whole, 4)
    with pytest.raises(UnsupportedAdapterError, match="wanted a fusion"):
        without(parents[0], 0)


def test_what_learns_is_the_fusion_and_never_a_source() -> None:
    model = tiny_model("bert")
    parents = sources(model)
    adapted = attach(model, {"f": fusion(model, parents)})
    adapted.train_only("f")
    assert len(adapted.trainable()) == len(fusion(model, parents).tensors)
    before = {name: buffer.clone() for name, buffer in adapted.sites.named_buffers()}
    optimizer = torch.optim.SGD(adapted.trainable(), lr=0.5)
    with adapted.route("f"):
        logits(adapted, tiny_batch("bert")).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(before[name], buffer) for name, buffer in adapted.sites.named_buffers())
    moved = adapted.extract("f")
    assert all(
        not torch.equal(moved.tensors[k], v)
        for k, v in fusion(model, parents).tensors.items()
        if k.endswith("_value.weight")
    )
    assert moved.sources == tuple(parents)
    adapted.remove("f")
    assert len(adapted.sites) == 0


def test_dropout_acts_on_logits_in_training_only() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    parents = sources(model)[:2]
    wet = new_fusion(model, parents, FusionConfig(dropout=0.5), head=parents[0])
    dry = new_fusion(model, parents, head=parents[0])
    adapted = attach(model, {"wet": shaken(wet), "dry": shaken(dry)})
    with adapted.route(["dry", "wet"] * 4), torch.no_grad():
        still = logits(adapted, batch)
        for site in adapted.sites.values():
            site.train()
        moving = logits(adapted, batch)
    assert torch.equal(moving[::2], still[::2])
    assert (moving[1::2] - still[1::2]).abs().max() > 0


def test_a_fusion_fits_the_bare_backbone_and_half_precision() -> None:
    whole = tiny_model("bert")
    fused = fusion(whole, sources(whole), head=None)
    batch = tiny_batch("bert")
    outputs = []
    for model in (whole, whole.bert):
        adapted = attach(model, {"f": fused})
        with adapted.route("f"), torch.no_grad():
            outputs.append(adapted(**batch, output_hidden_states=True).hidden_states[-1])
        adapted.detach()
    assert torch.equal(*outputs)
    adapted = attach(whole.to(torch.bfloat16), {"f": fused}, check_base=False)
    with adapted.route("f"), torch.no_grad():
        half = adapted(**batch, output_hidden_states=True).hidden_states[-1]
    assert half.dtype == torch.bfloat16
    assert (half.float() - outputs[0]).abs().mean() < 0.05


def test_what_cannot_be_fused_is_refused() -> None:
    model = tiny_model("bert")
    parents = sources(model)
    fused = fusion(model, parents)
    for few in ((), parents[:3]):
        with pytest.raises(AdapterNotFoundError, match=f"works on 4 adapters and has {len(few)} with it"):
            attach(model, {"f": replace(fused, sources=tuple(few))})
    with pytest.raises(ShapeError, match="no weights at"):
        attach(model, {"f": replace(fused, sources=tuple(reversed(parents)))})
    with pytest.raises(UnsupportedAdapterError, match="a fusion adapter cannot be fused"):
        new_fusion(model, [fused])
    with pytest.raises(UnsupportedAdapterError, match="at least one"):
        new_fusion(model, [])
    with pytest.raises(UnsupportedAdapterError, match="'nowhere' is no place"):
        new_fusion(model, parents, FusionConfig(targets=("nowhere",)))
    with pytest.raises(BaseMismatchError, match="source 1 was trained on"):
        new_fusion(tiny_model("bert", seed=1), parents)
    some = new_fusion(model, parents, FusionConfig(targets=("LayerNorm",)))
    assert all(path.endswith("LayerNorm") for path in some.spec.config.targets)

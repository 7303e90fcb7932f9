"""MerA against copies whose hidden units were permuted, doubled or dropped, and against trying every permutation."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from graftory.adapter import Adapter, TaskInfo
from graftory.compose import merge, record_inputs
from graftory.compose.merge.align import align, distances
from graftory.compose.merge.mera import MeraParameters, canonical
from graftory.config import Activation, BottleneckConfig, LoraConfig, Placement
from graftory.errors import MergeError
from graftory.training import LoadedBase
from tests.adapter_samples import make
from tests.test_compose_merge import SITES, bottleneck, delta, lora
from tests.training_samples import tiny_base

DOWN, DOWN_BIAS, UP, UP_BIAS = BottleneckConfig.parts
SINKHORN = [0.001, 0.01, 0.1, 1.0]


def with_units(adapter: Adapter, choose: Any, share: float = 1.0) -> Adapter:
    """The adapter with other hidden units: those that `choose` gives for each site, each writing a share."""
    config = adapter.spec.config
    assert isinstance(config, BottleneckConfig)
    tensors, sizes = dict(adapter.tensors), {}
    for number, site in enumerate(config.targets):
        units = choose(config.size_of(site), number)
        tensors[f"{site}.{DOWN}"] = adapter.tensors[f"{site}.{DOWN}"][units]
        tensors[f"{site}.{DOWN_BIAS}"] = adapter.tensors[f"{site}.{DOWN_BIAS}"][units]
        tensors[f"{site}.{UP}"] = adapter.tensors[f"{site}.{UP}"][:, units] * share
        sizes[site] = len(units)
    changed = replace(config, size_pattern={site: size for site, size in sizes.items() if size != config.size})
    return Adapter(replace(adapter.spec, config=changed), tensors)


def permuted(size: int, number: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(number + 7))


def apart(left: Adapter, right: Adapter) -> float:
    """The largest relative difference of any tensor."""
    assert left.tensors.keys() == right.tensors.keys()
    return max(
        float((value.double() - right.tensors[key].double()).norm() / right.tensors[key].double().norm())
        for key, value in left.tensors.items()
    )


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("placement", get_args(Placement))
def test_a_permuted_copy_merges_back_to_the_original(activation: Activation, placement: Placement) -> None:
    one = bottleneck(1, activation=activation, placement=placement, size=16)
    copy = with_units(one, permuted)
    for cost_of in ("down", "all"):
        merged = merge([one, copy], "mera", parameters=MeraParameters(cost_of=cost_of))
        assert apart(merged, one) <= 1e-6
    plain = {key: (value + copy.tensors[key]) / 2 for key, value in one.tensors.items()}
    assert apart(Adapter(one.spec, plain), one) > 0.1, "the mean without alignment is another adapter"


def test_a_permuted_copy_merges_back_by_activations() -> None:
    one = bottleneck(1, size=16, activation="gelu")
    copy = with_units(one, permuted)
    inputs = {site: torch.randn(50, 9, generator=torch.Generator().manual_seed(3)) for site in one.spec.config.targets}
    merged = merge([one, copy], "mera", parameters=MeraParameters(by="activations"), inputs=[inputs, inputs])
    assert apart(merged, one) <= 1e-6


def test_several_copies_and_any_anchor() -> None:
    one = bottleneck(2, size=8, scale=2.0)
    copies = [one, with_units(one, permuted), with_units(one, lambda size, number: permuted(size, number + 5))]
    for anchor in (1, 2, 3):
        merged = merge(copies, "mera", weights=[1.0, 2.0, 0.5], parameters=MeraParameters(anchor=anchor))
        x = torch.randn(20, 9, generator=torch.Generator().manual_seed(1))
        for site in one.spec.config.targets:
            torch.testing.assert_close(output(merged, site, x), output(one, site, x), atol=1e-4, rtol=1e-5)


def output(adapter: Adapter, site: str, x: Tensor) -> Tensor:
    config = adapter.spec.config
    assert isinstance(config, BottleneckConfig)
    part = {name: adapter.tensors[f"{site}.{name}"] for name in config.parts}
    hidden = torch.relu(x @ part[DOWN].T + part[DOWN_BIAS])
    return config.scale * (hidden @ part[UP].T + part[UP_BIAS])


@pytest.mark.parametrize("times", [2, 3])
def test_a_copy_with_each_unit_several_times_merges_back_exactly(times: int) -> None:
    """Each writes its share, so the copy does what the original does; only the widths differ."""
    one = bottleneck(3, size=6)
    wide = with_units(one, lambda size, number: permuted(size * times, number) % size, share=1 / times)
    assert apart(merge([one, wide], "mera"), one) <= 1e-6
    narrow = merge([one, wide], "mera", parameters=MeraParameters(anchor=2))
    x = torch.randn(20, 9, generator=torch.Generator().manual_seed(1))
    for site in one.spec.config.targets:
        torch.testing.assert_close(output(narrow, site, x), output(one, site, x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (4, 4), (7, 2), (1, 6)])
@pytest.mark.parametrize("transport", ["emd", "sinkhorn"])
def test_marginals_of_unequal_widths(sizes: tuple[int, int], transport: Any) -> None:
    """All units of both sides take part alike: what is read is a mean, what is written is kept in sum."""
    cost = torch.rand(*sizes, generator=torch.Generator().manual_seed(1))
    plan = align(cost, transport, 0.05)
    ones = torch.ones(sizes[0], dtype=torch.float64), torch.ones(sizes[1], dtype=torch.float64)
    torch.testing.assert_close(plan.down.sum(0), ones[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.up.sum(1), ones[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.down.sum(1), ones[0] * sizes[1] / sizes[0], atol=1e-4, rtol=0)


def test_dropped_units_leave_every_other_where_it_was() -> None:
    """Four of eight units are dropped: each that is left is carried to its own place and one other."""
    one = bottleneck(4, size=8)
    half = with_units(one, lambda size, number: torch.arange(0, size, 2))
    site = one.spec.config.targets[0]
    cost = distances(half.tensors[f"{site}.{DOWN}"], one.tensors[f"{site}.{DOWN}"])
    plan = align(cost, "emd", 1.0)
    assert [float(row[2 * number]) for number, row in enumerate(plan.up)] == pytest.approx([0.5] * 4)
    assert all(sorted(row[row > 0].tolist()) == pytest.approx([0.5, 0.5]) for row in plan.up)


@pytest.mark.parametrize("seed", range(5))
def test_the_transport_is_the_best_of_all_permutations(seed: int) -> None:
    cost = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = min(itertools.permutations(range(5)), key=lambda p: sum(float(cost[i, j]) for i, j in enumerate(p)))
    plan = align(cost, "emd", 1.0)
    assert plan.up.round(decimals=9).argmax(1).tolist() == list(best)
    assert torch.equal(plan.up, plan.down)
    torch.testing.assert_close(plan.up.max(1).values, torch.ones(5, dtype=torch.float64))


def test_sinkhorn_comes_near_it_as_its_entropy_shrinks() -> None:
    one = bottleneck(5, size=16)
    copy = with_units(one, permuted)
    errors = [
        apart(merge([one, copy], "mera", parameters=MeraParameters(transport="sinkhorn", epsilon=epsilon)), one)
        for epsilon in SINKHORN
    ]
    assert errors == sorted(errors)
    assert errors[0] < 1e-3
    assert errors[-1] > 0.2


def test_lora_does_not_depend_on_the_choice_of_factors() -> None:
    """B G and G⁻¹ A are the same update; another adapter is aligned to it all the same."""
    one, other = lora(1), lora(2)
    generator = torch.Generator().manual_seed(9)
    changed = dict(one.tensors)
    for path in SITES:
        g = torch.randn(3, 3, generator=generator)
        changed[f"{path}.lora_B.weight"] = one.tensors[f"{path}.lora_B.weight"] @ g
        changed[f"{path}.lora_A.weight"] = torch.linalg.inv(g) @ one.tensors[f"{path}.lora_A.weight"]
    again = Adapter(one.spec, changed)
    assert updates_apart(merge([one, again], "mera"), one) < 1e-5
    assert updates_apart(merge([other, again], "mera"), merge([other, one], "mera")) < 1e-5


def updates_apart(left: Adapter, right: Adapter) -> float:
    return max(float((delta(left, path) - delta(right, path)).norm() / delta(right, path).norm()) for path in SITES)


@pytest.mark.parametrize("fields", [{}, {"rslora": True}, {"rank_pattern": {SITES[0]: 2}}, {"rank": 1}])
def test_a_lora_merges_with_itself_and_keeps_the_rank_of_the_anchor(fields: dict[str, Any]) -> None:
    one = lora(1, **fields)
    merged = merge([one, one], "mera")
    assert updates_apart(merged, one) < 1e-5
    config, own = merged.spec.config, one.spec.config
    assert isinstance(config, LoraConfig)
    assert isinstance(own, LoraConfig)
    assert all(config.rank_of(path) == own.rank_of(path) for path in SITES)
    wider = merge([one, lora(5, rank=6)], "mera").spec.config
    assert isinstance(wider, LoraConfig)
    assert all(wider.rank_of(path) == own.rank_of(path) for path in SITES)


def test_canonical_factors_are_orthogonal_and_balanced() -> None:
    b, a = torch.randn(12, 4, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    up, down = canonical(b, a)
    torch.testing.assert_close(up @ down, b @ a)
    torch.testing.assert_close(up.T @ up, down @ down.T)
    assert float((up.T @ up).fill_diagonal_(0).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("adapters", "fields", "text"),
    [
        ([bottleneck(1), bottleneck(2, activation="gelu")], {}, "differ in activation"),
        ([bottleneck(1), bottleneck(2, placement="parallel")], {}, "differ in placement"),
        ([bottleneck(1), bottleneck(2, targets=("layer.0.output",))], {}, "different targets"),
        ([bottleneck(1), bottleneck(2, width=5)], {}, "different widths"),
        ([bottleneck(1), lora(2)], {}, "different methods"),
        ([bottleneck(1), bottleneck(2)], {"parameters": MeraParameters(anchor=3)}, "anchor 3 of 2"),
        ([bottleneck(1), bottleneck(2)], {"parameters": MeraParameters(by="activations")}, "give --examples"),
        ([bottleneck(1), bottleneck(2)], {"weights": [1.0, -1.0]}, "sum to 0"),
        ([bottleneck(1)], {"rank": 3}, "mera takes no rank"),
    ],
)
def test_what_cannot_be_aligned(adapters: list[Adapter], fields: dict[str, Any], text: str) -> None:
    with pytest.raises(MergeError, match=text):
        merge(adapters, "mera", **fields)


def test_units_that_are_no_numbers_are_named() -> None:
    broken = bottleneck(2)
    broken = Adapter(broken.spec, {key: value * float("nan") for key, value in broken.tensors.items()})
    with pytest.raises(MergeError, match="NaN or infinite"):
        merge([bottleneck(1), broken], "mera")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return tiny_base("classification", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("config", [BottleneckConfig(size=6, activation="tanh"), LoraConfig(rank=3)])
def test_inputs_are_recorded_from_the_model_that_runs(config: Any, loaded: LoadedBase) -> None:
    """The inputs of the first site are the base's own states; padding is left out."""
    texts = ["w1 w2 w3", "w4 w5 w6 w7 w8", "w9"]
    one = make(loaded.model, config, seed=1)
    inputs = record_inputs(loaded, one, texts)
    assert set(inputs) == set(one.spec.config.targets)
    assert {x.shape for x in inputs.values()} == {(3 + 5 + 1 + 2 * 3, 32)}
    again = record_inputs(loaded, one, texts, batch_size=1)
    assert all(torch.allclose(x, again[path], atol=1e-5) for path, x in inputs.items())
    merged = merge([one, one], "mera", parameters=MeraParameters(by="activations"), inputs=[inputs, inputs])
    if isinstance(config, BottleneckConfig):
        assert apart(merged, one) <= 1e-6
    first = next(iter(inputs.values()))
    bare = make(loaded.model, config, seed=2)
    torch.testing.assert_close(next(iter(record_inputs(loaded, bare, texts).values())), first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_the_same_tokens_are_recorded_for_adapters_of_other_lengths_and_templates(kind: Any, tmp_path: Path) -> None:
    base = tiny_base(kind, tmp_path)
    texts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w4 w5"]
    adapters = []
    for seed, (length, template) in enumerate([(4, "{text}"), (64, "w7 w8 {text}")]):
        info = TaskInfo("t", kind, max_length=length, template=template)
        one = make(base.model, BottleneckConfig(size=6), seed=seed)
        adapters.append(replace(one, spec=replace(one.spec, task=info)))
    inputs = [record_inputs(base, adapter, texts) for adapter in adapters]
    first, second = (next(iter(each.values())) for each in inputs)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    merge(adapters, "mera", parameters=MeraParameters(by="activations"), inputs=inputs)

"""Merging against sums of full matrices and of adapters' outputs, which know nothing of factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Parent, TaskInfo
from graftory.compose import METHODS, merge
from graftory.config import AdapterConfig, BottleneckConfig, LoraConfig
from graftory.errors import BaseMismatchError, MergeError

BASE = BaseModel("tiny", config_hash="sha256:" + "c" * 64, weights_hash="sha256:" + "a" * 64)
SITES = ("layer.0.query", "layer.0.value", "layer.1.query")
WIDTHS = {"layer.0.query": (12, 10), "layer.0.value": (7, 10), "layer.1.query": (12, 10)}


def lora(
    seed: int, *, task: TaskInfo | None = None, head: Mapping[str, Tensor] | None = None, **fields: Any
) -> Adapter:
    config = LoraConfig(**{"targets": SITES, "rank": 3, "alpha": 6.0, **fields})
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in config.targets:
        d_out, d_in = WIDTHS[path]
        tensors[f"{path}.lora_A.weight"] = torch.randn(config.rank_of(path), d_in, generator=generator)
        tensors[f"{path}.lora_B.weight"] = torch.randn(d_out, config.rank_of(path), generator=generator)
    return Adapter(AdapterSpec(BASE, config, task=task), {**tensors, **(head or {})})


def bottleneck(seed: int, width: int = 9, **fields: Any) -> Adapter:
    config = BottleneckConfig(**{"targets": ("layer.0.output", "layer.1.output"), "size": 4, **fields})
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in config.targets:
        size = config.size_of(site)
        for part, shape in {
            "down.weight": (size, width),
            "down.bias": (size,),
            "up.weight": (width, size),
            "up.bias": (width,),
        }.items():
            tensors[f"{site}.adapter_{part}"] = torch.randn(*shape, generator=generator)
    return Adapter(AdapterSpec(BASE, config), tensors)


def delta(adapter: Adapter, path: str) -> Tensor:
    config = adapter.spec.config
    assert isinstance(config, LoraConfig)
    if path not in config.targets:
        return torch.zeros(*WIDTHS[path], dtype=torch.float64)
    a, b = (adapter.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
    assert a.shape[0] == config.rank_of(path)
    return config.scale_of(path) * b @ a


def output(adapter: Adapter, site: str, h: Tensor) -> Tensor:
    config = adapter.spec.config
    assert isinstance(config, BottleneckConfig)
    if site not in config.targets:
        return torch.zeros_like(h)
    down, c, up, e = (
        adapter.tensors[f"{site}.adapter_{part}"].double()
        for part in ("down.weight", "down.bias", "up.weight", "up.bias")
    )
    assert c.shape[0] == config.size_of(site)
    function = {"relu": torch.relu, "gelu": torch.nn.functional.gelu}[config.activation]
    return config.scale * (function(h @ down.T + c) @ up.T + e)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


MIXED = (
    lora(1),
    lora(2, rank=5, alpha=7.0, rslora=True, rank_pattern={SITES[0]: 2}, alpha_pattern={SITES[2]: 3.0}),
    lora(3, rank=1, targets=SITES[:1], dropout=0.1),
)


def test_linear_is_the_sum_of_the_updates_over_ranks_scales_and_targets() -> None:
    weights = [0.5, -1.25, 2.0]
    merged = merge(MIXED, weights=weights)
    for path in SITES:
        wanted = sum(weight * delta(adapter, path) for weight, adapter in zip(weights, MIXED, strict=True))
        assert isinstance(wanted, Tensor)
        assert relative(delta(merged, path), wanted) < 1e-6
    config = merged.spec.config
    assert isinstance(config, LoraConfig)
    assert [config.rank_of(path) for path in SITES] == [6, 8, 8]
    assert [config.scale_of(path) for path in SITES] == [1.0, 1.0, 1.0]
    assert config.init_seed is None
    assert config.dropout == 0.1


def test_default_weights_are_the_mean() -> None:
    merged = merge([MIXED[0], MIXED[1]])
    assert relative(delta(merged, SITES[1]), (delta(MIXED[0], SITES[1]) + delta(MIXED[1], SITES[1])) / 2) < 1e-6


@pytest.mark.parametrize("index", [0, 1, 2])
def test_identity_merge_keeps_every_update(index: int) -> None:
    merged = merge([MIXED[index]], weights=[1.0])
    for path in merged.spec.config.targets:
        assert relative(delta(merged, path), delta(MIXED[index], path)) < 1e-6


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_rank_gives_the_best_approximation_that_a_full_svd_finds(rank: int) -> None:
    merged = merge(MIXED, weights=[1.0, 0.5, 1.5], rank=rank)
    for path in SITES:
        wanted = sum(w * delta(adapter, path) for w, adapter in zip([1.0, 0.5, 1.5], MIXED, strict=True))
        u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
        assert relative(delta(merged, path), u[:, :rank] * s[:rank] @ vh[:rank]) < 1e-5
        assert merged.tensors[f"{path}.lora_A.weight"].shape[0] == min(rank, 6 if path == SITES[0] else 8)


def test_rank_never_makes_a_square_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = 300_000  # a d x d matrix would be 720 GB
    monkeypatch.setitem(WIDTHS, SITES[0], (wide, wide))
    merged = merge([lora(seed, targets=SITES[:1], rank=1) for seed in (1, 2)], rank=1)
    assert merged.tensors[f"{SITES[0]}.lora_B.weight"].shape == (wide, 1)


def test_weight_zero_takes_no_part() -> None:
    merged = merge(MIXED, weights=[1.0, 0.0, 0.0])
    assert merged.tensors[f"{SITES[0]}.lora_A.weight"].shape[0] == 3
    with pytest.raises(MergeError, match="all weights are 0"):
        merge(MIXED, weights=[0, 0, 0])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bottleneck_linear_is_the_weighted_sum_of_outputs(activation: str) -> None:
    parts = [
        bottleneck(1, activation=activation, scale=2.0, dropout=0.2),
        bottleneck(2, activation=activation, size=6, size_pattern={"layer.1.output": 3}),
        bottleneck(3, activation=activation, targets=("layer.1.output",), size=1),
    ]
    weights = [0.7, -0.2, 1.1]
    merged = merge(parts, weights=weights)
    h = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for site, size in (("layer.0.output", 10), ("layer.1.output", 8)):
        wanted = sum(weight * output(part, site, h) for weight, part in zip(weights, parts, strict=True))
        assert isinstance(wanted, Tensor)
        assert relative(output(merged, site, h), wanted) < 1e-6
        config = merged.spec.config
        assert isinstance(config, BottleneckConfig)
        assert config.size_of(site) == size
    config = merged.spec.config
    assert isinstance(config, BottleneckConfig)
    assert (config.scale, config.dropout, config.init_seed) == (1.0, 0.2, None)


def test_soup_is_the_mean_of_raw_tensors_and_keeps_the_configuration() -> None:
    a, b = lora(1), lora(2)
    merged = merge([a, b], "soup", weights=[1, 3])
    key = f"{SITES[0]}.lora_A.weight"
    assert torch.allclose(merged.tensors[key], (a.tensors[key] + 3 * b.tensors[key]) / 4, atol=1e-6)
    assert merged.spec.config == a.spec.config
    assert relative(delta(merged, SITES[0]), (delta(a, SITES[0]) + 3 * delta(b, SITES[0])) / 4) > 0.1


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lora(2, init_seed=1), "different seeds"),
        (lora(2, init_seed=None), "is unknown"),
        (lora(2, rank=4), "differ in rank"),
        (lora(2, alpha=1.0), "differ in alpha"),
        (lora(2, targets=SITES[:2]), "different targets"),
    ],
)
def test_soup_refuses_what_did_not_start_together_and_names_linear(other: Adapter, reason: str) -> None:
    with pytest.raises(MergeError, match=rf"{reason}.*'linear'"):
        merge([lora(1), other], "soup")


def task(name: str, labels: Sequence[str]) -> TaskInfo:
    return TaskInfo(name, "classification", tuple(labels), head=("classifier",))


def with_head(seed: int, info: TaskInfo) -> Adapter:
    n = len(info.labels)
    return lora(
        seed, task=info, head={"classifier.weight": torch.full((n, 2), float(seed)), "classifier.bias": torch.ones(n)}
    )


@pytest.mark.parametrize("method", ["linear", "soup"])
def test_heads_of_the_same_labels_are_averaged_normalised(method: str) -> None:
    merged = merge([with_head(1, task("a", "xy")), with_head(4, task("b", "xy"))], method, weights=[2.0, 1.0])
    assert torch.allclose(merged.tensors["classifier.weight"], torch.full((2, 2), 2.0))
    assert torch.allclose(merged.tensors["classifier.bias"], torch.ones(2))
    assert merged.spec.task == task("a+b", "xy")


@pytest.mark.parametrize("labels", ["yx", "xyz"])
def test_heads_of_other_labels_are_left_out(labels: str) -> None:
    merged = merge([with_head(1, task("a", "xy")), with_head(2, task("b", labels))])
    assert merged.spec.task is None
    assert not [key for key in merged.tensors if key.startswith("classifier")]


def test_lineage_says_what_was_merged_how() -> None:
    digest = "sha256:" + "0" * 64
    parents = [Parent("a@1", digest, "continued"), Parent("b@2", digest, "composed")]
    merged = merge([lora(1), lora(2)], weights=[0.25, 0.75], rank=2, parents=parents)
    assert merged.spec.lineage.process == "merge"
    assert merged.spec.lineage.parents == (
        Parent("a@1", digest, "merged", 0.25),
        Parent("b@2", digest, "merged", 0.75),
    )
    assert merged.spec.lineage.parameters == {"method": "linear", "weights": [0.25, 0.75], "rank": 2}
    assert {"torch", "peft", "transformers"} <= set(merged.spec.lineage.libraries)


def other_base(**fields: Any) -> Adapter:
    adapter = lora(2)
    return replace(adapter, spec=replace(adapter.spec, base=replace(BASE, **fields)))


def test_bases_must_agree_by_fingerprint_not_by_name() -> None:
    assert merge([lora(1), other_base(id="elsewhere")]).spec.base == BASE
    assert merge([other_base(weights_hash=None, config_hash=None), lora(1)]).spec.base == BASE
    with pytest.raises(BaseMismatchError, match="different base models"):
        merge([lora(1), other_base(weights_hash="sha256:" + "b" * 64)])
    with pytest.raises(BaseMismatchError, match="weights unknown"):
        merge([lora(1), other_base(weights_hash=None, config_hash=None, id="elsewhere")])


def odd(config: AdapterConfig, **tensors: Tensor) -> Adapter:
    return Adapter(AdapterSpec(BASE, config), {**lora(1).tensors, **tensors})


@pytest.mark.parametrize(
    ("adapters", "arguments", "reason"),
    [
        ([lora(1)], {"method": "average"}, "unknown merge method 'average'; known: linear, soup"),
        ([], {}, "at least one"),
        ([lora(1)], {"weights": [1, 2]}, "2 weights for 1 adapters"),
        ([lora(1)], {"weights": [float("nan")]}, "finite"),
        ([lora(1)], {"rank": 0}, "wanted 1 or more"),
        ([lora(1)], {"method": "soup", "rank": 2}, "takes no rank; methods that do: linear"),
        ([lora(1), bottleneck(1)], {}, "different methods"),
        ([bottleneck(1), bottleneck(2, placement="houlsby")], {}, "different placement"),
        ([bottleneck(1), bottleneck(2, activation="tanh")], {}, "different activation"),
        ([bottleneck(1), bottleneck(2, width=8)], {}, "widths"),
        ([bottleneck(1)], {"rank": 2}, "no SVD can cut"),
        ([lora(1), lora(2)], {"method": "soup", "weights": [1, -1]}, "sum to 0"),
        ([lora(1)], {"parents": [Parent("a@1", "x", "merged")] * 2}, "2 parents"),
        ([odd(lora(1).spec.config, bias=torch.zeros(1))], {}, "has the tensor 'bias'"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line(
    adapters: list[Adapter], arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(MergeError, match=reason) as caught:
        merge(adapters, **arguments)
    assert "\n" not in str(caught.value)


def test_rows_of_the_table_are_complete() -> None:
    for name, row in METHODS.items():
        assert row.name == name
        assert row.paper.startswith("https://")
        assert row.accepts

"""Merging in the space of updates against dense matrices (tests/merge_oracles.py), and what must not matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.compose import METHODS, merge
from graftory.compose.merge.base import MergeParameters
from graftory.compose.merge.core import CoreSpaceParameters
from graftory.compose.merge.ctm import CtmParameters, shared_bases
from graftory.compose.merge.delta import Delta, total
from graftory.compose.merge.iso import IsoCtsParameters
from graftory.compose.merge.knots import KnotsParameters
from graftory.compose.merge.pico import PicoParameters
from graftory.compose.merge.spectrum import core_of, polar, spectrum
from graftory.compose.merge.svd import SvdParameters
from graftory.compose.merge.ties import TiesParameters
from graftory.compose.merge.tsv import TsvParameters
from graftory.config import LoraConfig
from graftory.errors import MergeError
from tests import test_compose_merge
from tests.merge_oracles import (
    ORACLES,
    best_of_rank,
    core,
    deltas,
    iso_cts,
    knots,
    pico,
    regauged,
    ties,
    tsv,
    weighted,
)
from tests.test_compose_merge import SITES, delta, lora, relative

COUNTS_TASKS = {"iso_cts", "ctm", "pico"}
"""Methods for which a task that changes nothing is a task all the same."""
CHOOSES_FIRST = {"iso_c", "iso_cts", "svd", "ctm", "lego"}
"""Methods that choose as many directions as there shall be before they weigh them; svd has no other."""
IN_DELTA_SPACE = sorted(
    name for name, row in METHODS.items() if row.space == "delta" and row.params().reads == "nothing"
)


@pytest.fixture(autouse=True)
def wider(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that are wider than all ranks together, tall and flat."""
    widths = {SITES[0]: (24, 20), SITES[1]: (18, 26), SITES[2]: (16, 16)}
    monkeypatch.setattr(test_compose_merge, "WIDTHS", widths)


def mixed() -> tuple[Adapter, ...]:
    """Ranks, scales, rsLoRA, patterns and targets differ."""
    return (
        lora(1),
        lora(2, rank=5, alpha=7.0, rslora=True, rank_pattern={SITES[0]: 2}, alpha_pattern={SITES[2]: 3.0}),
        lora(3, rank=1, targets=SITES[:1], dropout=0.1),
        lora(4, rank=2, targets=SITES[1:]),
    )


WEIGHTS = [0.5, -1.25, 2.0, 0.75]


def here(weights: list[float], adapters: tuple[Adapter, ...], path: str) -> list[float]:
    return [w for w, one in zip(weights, adapters, strict=True) if path in one.spec.config.targets]


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["default", "given"])
@pytest.mark.parametrize("method", sorted(ORACLES))
def test_every_method_is_what_dense_matrices_give(method: str, weights: list[float] | None) -> None:
    adapters = mixed()
    merged = merge(adapters, method, weights=weights)
    used = weights or [METHODS[method].default_weight(len(adapters))] * len(adapters)
    for path in SITES:
        wanted = ORACLES[method](deltas(adapters, path), here(used, adapters, path))
        assert relative(delta(merged, path), wanted) < (1e-6 if method == "linear" else 1e-5)


@pytest.mark.parametrize("method", IN_DELTA_SPACE)
def test_how_an_update_is_written_down_does_not_matter(method: str) -> None:
    adapters = mixed()
    merged = merge(adapters, method, weights=WEIGHTS)
    other = merge([regauged(adapter, seed) for seed, adapter in enumerate(adapters)], method, weights=WEIGHTS)
    for path in SITES:
        assert relative(delta(other, path), delta(merged, path)) < 1e-4
    means = [
        torch.stack([one.tensors[f"{SITES[2]}.lora_A.weight"][0] for one in many]).mean(0)
        for many in (adapters[:2], [regauged(adapter, 5) for adapter in adapters[:2]])
    ]
    assert relative(means[1], means[0]) > 0.1, "the factors themselves are others"


@pytest.mark.parametrize("method", IN_DELTA_SPACE)
@pytest.mark.parametrize("rank", [1, 4])
def test_rank_is_the_rank_of_the_result_and_the_best_one(method: str, rank: int) -> None:
    adapters = mixed()
    parameters = METHODS[method].params()
    merged = merge(adapters, method, rank=rank)
    for path in SITES:
        assert merged.tensors[f"{path}.lora_A.weight"].shape[0] <= rank
    if method not in CHOOSES_FIRST:
        whole = merge(adapters, method, parameters=parameters)
        for path in SITES:
            assert relative(delta(merged, path), best_of_rank(delta(whole, path), rank)) < 1e-5


@pytest.mark.parametrize("method", IN_DELTA_SPACE)
def test_scaling_is_a_factor_and_a_missing_update_is_none(method: str) -> None:
    adapters = mixed()
    once = merge(adapters, method)
    if method != "linear":
        parameters: Any = METHODS[method].params
        twice = merge(adapters, method, parameters=parameters(scaling=-2.0))
        assert relative(delta(twice, SITES[1]), -2 * delta(once, SITES[1])) < 1e-6
    fresh = lora(5, targets=SITES[:1])
    fresh = replace(fresh, tensors={**fresh.tensors, f"{SITES[0]}.lora_B.weight": torch.zeros(24, 3)})
    nothing = merge([fresh, fresh], method)
    assert torch.count_nonzero(delta(nothing, SITES[0])) == 0
    with_nothing = merge([lora(6, targets=SITES[:1]), fresh], method, weights=[1.0, 1.0])
    alone = merge([lora(6, targets=SITES[:1])], method, weights=[1.0])
    if method not in COUNTS_TASKS:
        assert relative(delta(with_nothing, SITES[0]), delta(alone, SITES[0])) < 1e-5


@pytest.mark.parametrize("method", ["linear", "svd", "tsv", "knots", "core", "ctm", "pico"])
def test_one_adapter_at_weight_one_is_that_adapter(method: str) -> None:
    for adapter in mixed():
        parameters: dict[str, MergeParameters] = {
            "knots": KnotsParameters(density=1.0),
            "core": CoreSpaceParameters(density=1.0),
            "ctm": CtmParameters(density=1.0),
        }
        merged = merge([adapter], method, weights=[1.0], parameters=parameters.get(method))
        for path in adapter.spec.config.targets:
            assert relative(delta(merged, path), delta(adapter, path)) < 1e-6


def test_mixed_ranks_are_exact_in_core_space_and_under_knots() -> None:
    adapters = mixed()
    for method, kind in (("core", CoreSpaceParameters), ("knots", KnotsParameters)):
        merged = merge(adapters, method, weights=WEIGHTS, parameters=kind(inner="linear"))
        for path in SITES:
            wanted = weighted(deltas(adapters, path), here(WEIGHTS, adapters, path))
            assert relative(delta(merged, path), wanted) < 1e-6
    parts = [Delta(torch.randn(40, r, dtype=torch.float64), torch.randn(r, 30, dtype=torch.float64)) for r in (1, 3, 7)]
    found = core_of(parts)
    for part, small in zip(parts, found.cores, strict=True):
        assert small.shape == (11, 11)
        assert relative(found.left @ small @ found.right, part.dense()) < 2e-14


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_density_is_taken_by_ties_knots_and_core(density: float) -> None:
    adapters = mixed()
    for method, kind, oracle in (
        ("ties", TiesParameters, ties),
        ("knots", KnotsParameters, knots),
        ("core", CoreSpaceParameters, core),
    ):
        merged = merge(adapters, method, weights=[1.0] * 4, parameters=kind(density=density))
        for path in SITES:
            matrices = deltas(adapters, path)
            assert relative(delta(merged, path), oracle(matrices, [1.0] * len(matrices), density)) < 1e-5


@pytest.mark.parametrize("common", [0.0, 0.5, 1.0])
def test_iso_cts_shares_the_directions(common: float) -> None:
    adapters = (lora(1), lora(2), lora(3))
    merged = merge(adapters, "iso_cts", parameters=IsoCtsParameters(common=common))
    for path in SITES:
        wanted = iso_cts(deltas(adapters, path), [1.0] * 3, common)
        assert relative(delta(merged, path), wanted) < 1e-5
        s = torch.linalg.svdvals(delta(merged, path))[:9]
        torch.testing.assert_close(s, s.mean().expand(9), rtol=1e-5, atol=0)
    if common == 1.0:
        assert relative(delta(merged, SITES[0]), delta(merge(adapters, "iso_c"), SITES[0])) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_ctm_keeps_more_of_the_updates_than_any_bases_near_its_own(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    matrices = torch.randn(3, 14, 11, generator=generator, dtype=torch.float64)
    u, v = shared_bases(matrices, rank)
    torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(v.T @ v, torch.eye(rank, dtype=torch.float64))
    best = float((u.T @ matrices @ v).square().sum())
    for _ in range(50):
        near = [
            torch.linalg.qr(one + 0.03 * torch.randn(one.shape, generator=generator, dtype=torch.float64))[0]
            for one in (u, v)
        ]
        assert float((near[0].T @ matrices @ near[1]).square().sum()) < best


def test_ctm_is_exact_where_the_subspaces_are_shared() -> None:
    """Updates B M_t A with one B and A lie in its bases whatever they are, so nothing is lost at their rank."""
    first = lora(1, rank=4, targets=SITES[:1])
    key = f"{SITES[0]}.lora_B.weight"
    parts = []
    for seed in range(3):
        mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        parts.append(replace(first, tensors={**first.tensors, key: first.tensors[key] @ mix}))
    parameters = CtmParameters(inner="linear", own_norm=1.0)
    merged = merge(parts, "ctm", weights=[1.0, -2.0, 0.5], parameters=parameters)
    assert relative(delta(merged, SITES[0]), weighted(deltas(parts, SITES[0]), [1.0, -2.0, 0.5])) < 1e-6
    levelled = merge(parts, "ctm", weights=[1.0, 0.0, 1.0], parameters=CtmParameters(inner="linear", own_norm=0.0))
    one, _, other = deltas(parts, SITES[0])
    mean = (one.norm() + other.norm()) / 2
    assert relative(delta(levelled, SITES[0]), (one / one.norm() + other / other.norm()) * mean) < 1e-6


def test_pico_by_tsv_is_tsv_of_what_is_held_back() -> None:
    adapters = mixed()[:2]
    merged = merge(adapters, "pico", weights=WEIGHTS[:2], parameters=PicoParameters(sum_by="tsv"))
    for path in SITES:
        matrices = deltas(adapters, path)
        wanted = pico(matrices, WEIGHTS[:2], tsv)
        assert relative(delta(merged, path), wanted) < 1e-5
        mean = torch.stack([matrix.norm() for matrix in matrices]).mean()
        assert float(delta(merged, path).norm()) == pytest.approx(float(mean), rel=1e-6)


def test_tsv_of_orthogonal_tasks_is_their_sum_and_of_overlapping_ones_is_not() -> None:
    q = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0].float()
    w = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0].float()
    apart = [lora(seed, targets=SITES[:1]) for seed in (1, 2)]
    for number, adapter in enumerate(apart):
        columns = slice(3 * number, 3 * number + 3)
        adapter.tensors[f"{SITES[0]}.lora_B.weight"].copy_(q[:, columns] * torch.tensor([3.0, 2.0, 1.0]))
        adapter.tensors[f"{SITES[0]}.lora_A.weight"].copy_(w[columns])
    merged = merge(apart, "tsv")
    assert relative(delta(merged, SITES[0]), weighted(deltas(apart, SITES[0]), [1.0, 1.0])) < 1e-6
    near = mixed()[:2]
    assert relative(delta(merge(near, "tsv"), SITES[2]), weighted(deltas(near, SITES[2]), [1.0, 1.0])) > 0.05


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "knots", "core", "svd"])
def test_copies_of_one_adapter_have_no_more_directions_than_it(method: str) -> None:
    """Directions that are there twice are dependent; noise must not become one more of them."""
    one = lora(1, targets=SITES[:1])
    kind: Any = METHODS[method].params
    parameters = kind(density=1.0) if method in ("knots", "core") else kind()
    merged = merge([one, regauged(one), one], method, parameters=parameters)
    assert merged.tensors[f"{SITES[0]}.lora_A.weight"].shape[0] == 3
    again = merge([one, one, one], method, parameters=parameters)
    assert relative(delta(merged, SITES[0]), delta(again, SITES[0])) < 1e-4


@pytest.mark.parametrize("method", IN_DELTA_SPACE)
def test_updates_that_cancel_leave_nothing(method: str) -> None:
    one = lora(1, targets=SITES[:1])
    merged = merge([one, one], method, weights=[1.0, -1.0])
    if method not in ("tsv", "lego", "dare", "dare_ties", "della"):  # the last three drop other entries of each
        assert float(delta(merged, SITES[0]).norm() / delta(one, SITES[0]).norm()) < 1e-6
    assert bool(torch.isfinite(delta(merged, SITES[0])).all())


def test_svd_takes_the_largest_rank_of_the_adapters() -> None:
    adapters = mixed()
    merged = merge(adapters, "svd", parameters=SvdParameters(scaling=2.0))
    config = merged.spec.config
    assert isinstance(config, LoraConfig)
    assert [config.rank_of(path) for path in SITES] == [3, 5, 5]
    for path in SITES:
        wanted = best_of_rank(
            weighted(deltas(adapters, path), [0.5] * len(deltas(adapters, path))), config.rank_of(path)
        )
        assert relative(delta(merged, path), wanted) < 1e-5


def test_svd_is_pefts_on_a_model_of_its_own() -> None:
    """PEFT 0.21 multiplies each update out and takes its whole SVD."""
    adapters = [lora(seed, rank=4, alpha=8.0) for seed in (1, 2, 3)]
    d_out, d_in = test_compose_merge.WIDTHS[SITES[0]]
    model: Any = peft.get_peft_model(
        torch.nn.ModuleDict({"query": torch.nn.Linear(d_in, d_out)}),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query"]),
        adapter_name="0",
    )
    for number in (1, 2):
        model.add_adapter(str(number), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query"]))
    layer = model.base_model.model["query"]
    for number, adapter in enumerate(adapters):
        for side, linear in (("A", layer.lora_A), ("B", layer.lora_B)):
            linear[str(number)].weight.data.copy_(adapter.tensors[f"{SITES[0]}.lora_{side}.weight"])
    for rank in (3, 6, 12):
        weights = [0.5, -1.0, 2.0]
        model.base_model.add_weighted_adapter(
            ["0", "1", "2"], weights, f"svd{rank}", combination_type="svd", svd_rank=rank
        )
        merged = merge(adapters, "svd", weights=weights, rank=rank)
        peer = layer.get_delta_weight(f"svd{rank}").detach().double()
        assert relative(delta(merged, SITES[0]), peer) < 1e-4


def test_spectrum_and_polar_by_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    one = Delta(torch.randn(30, 4, generator=generator), torch.randn(4, 50, generator=generator))
    found = spectrum(total([one, one.scaled(2.0)], [1.0, 3.0]))
    torch.testing.assert_close(found.s, torch.linalg.svdvals(7 * one.double().dense())[:4])
    assert relative(found.delta().dense(), 7 * one.double().dense()) < 1e-7
    torch.testing.assert_close(found.u.T @ found.u, torch.eye(4, dtype=torch.float64))
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    y = polar(x)
    torch.testing.assert_close(y.T @ y, torch.eye(5, dtype=torch.float64))
    symmetric = y.T @ x  # x = y h with h symmetric and positive is the polar form, and there is only one
    torch.testing.assert_close(symmetric, symmetric.T)
    assert bool((torch.linalg.eigvalsh(symmetric) > 0).all())


def test_factor_methods_never_make_a_square_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = 100_000  # a d x d matrix would be 40 GB
    monkeypatch.setitem(test_compose_merge.WIDTHS, SITES[0], (wide, wide))
    for method in ("svd", "tsv", "iso_c", "iso_cts", "knots", "core", "ctm", "pico"):
        merged = merge([lora(seed, targets=SITES[:1], rank=1) for seed in (1, 2)], method)
        assert merged.tensors[f"{SITES[0]}.lora_B.weight"].shape[0] == wide


def odd(value: float) -> Adapter:
    adapter = lora(1)
    adapter.tensors[f"{SITES[1]}.lora_A.weight"][0, 0] = value
    return adapter


@pytest.mark.parametrize(
    ("method", "parameters", "reason"),
    [
        ("ties", {"density": 0.0}, "density: got 0, wanted above 0 and at most 1"),
        ("dare", {"density": 1.5}, "density: got 1.5"),
        ("della", {"density": 0.9, "window": 0.3}, "shares of 0.75 to 1.05"),
        ("della", {"window": -0.1}, "window"),
        ("tsv", {"scaling": float("inf")}, "scaling: got inf"),
        ("svd", {"rank": 0}, "rank: got 0"),
        ("iso_cts", {"common": 1.1}, "common: got 1.1"),
        ("core", {"density": -1.0}, "density"),
        ("knots", {"rank": -1}, "rank: got -1"),
        ("ctm", {"own_norm": 2.0}, "own_norm: got 2, wanted 0 to 1"),
    ],
)
def test_impossible_parameters_are_refused(method: str, parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(MergeError, match=reason):
        METHODS[method].params(**parameters)


@pytest.mark.parametrize("method", ["linear", "tsv", "ties"])
def test_weights_that_are_no_numbers_are_refused_with_their_place(method: str) -> None:
    with pytest.raises(MergeError, match=rf"{SITES[1]}: adapter 2 has NaN or infinite weights"):
        merge([lora(1), odd(float("nan"))], method)


def test_bottlenecks_are_no_matrices() -> None:
    with pytest.raises(MergeError, match="tsv cannot merge bottleneck adapters; it takes lora"):
        merge([test_compose_merge.bottleneck(1)], "tsv")


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    merge(mixed(), "ties", rank=2)
    assert torch.get_num_threads() == before


def test_tsv_weights_scale_each_task() -> None:
    one, other = mixed()[:2]
    merged = merge([one, other], "tsv", weights=[2.0, 1e-9], parameters=TsvParameters())
    u, _, vt = torch.linalg.svd(delta(merged, SITES[0]))
    assert float(torch.linalg.svdvals(u[:, :3] * 1.0)[0]) == pytest.approx(1.0)
    s: Tensor = torch.linalg.svdvals(delta(merged, SITES[0]))[:3]
    torch.testing.assert_close(s, 2 * torch.linalg.svdvals(delta(one, SITES[0]))[:3], rtol=1e-4, atol=0)
    assert vt.shape == (20, 20)

"""Merges entry by entry: what is dropped, in blocks of any size, and against PEFT's on dense matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from graftory.adapter import Adapter
from graftory.compose import METHODS, merge
from graftory.compose.merge import dense
from graftory.compose.merge.core import CoreSpaceParameters
from graftory.compose.merge.dare import DareParameters
from graftory.compose.merge.della import DellaParameters
from graftory.compose.merge.dense import low_rank, stack_of_tensor
from graftory.compose.merge.elementwise import RECIPES, elected_mean
from graftory.compose.merge.sparsify import SPARSIFIERS, Sparsity, kth_largest
from graftory.compose.merge.ties import TiesParameters
from tests.merge_oracles import best_of_rank, deltas, weighted
from tests.test_compose_merge import SITES, delta, lora, relative

THREE = (lora(1), lora(2, rank=4), lora(3, rank=2))
DRAWN: Mapping[str, Any] = {"dare": DareParameters, "dare_ties": DareParameters, "della": DellaParameters}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [1, 40, 1 << 22])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_kth_largest_is_what_sorting_finds(block: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK", block)
    matrices = random(3, 7, 11) * scale
    matrices[1, 2:4] = 0
    matrices[2] = matrices[2].round(decimals=0) if scale == 1 else matrices[2]  # many equals
    descending = matrices.abs().flatten(1).sort(descending=True).values
    for k in (1, 2, 20, 70, 77):
        assert torch.equal(kth_largest(stack_of_tensor(matrices), k), descending[:, k - 1])


@pytest.mark.parametrize("method", ["ties", "magnitude", "dare", "dare_ties", "della"])
@pytest.mark.parametrize("rank", [None, 3])
def test_blocks_do_not_matter(method: str, rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = merge(THREE, method, rank=rank)
    monkeypatch.setattr(dense, "BLOCK", 70)
    parts = merge(THREE, method, rank=rank)
    for path in SITES:
        assert relative(delta(parts, path), delta(whole, path)) < 1e-6


@pytest.mark.parametrize("density", [0.1, 0.5, 0.99])
def test_ties_and_magnitude_are_pefts_on_dense_matrices(density: float) -> None:
    for method, peer in (("ties", merge_utils.ties), ("magnitude", merge_utils.magnitude_prune)):
        merged = merge(THREE, method, weights=[1.0] * 3, parameters=TiesParameters(density=density))
        for path in SITES:
            wanted = peer([one.float() for one in deltas(THREE, path)], torch.ones(3), density)
            assert relative(delta(merged, path), wanted.double()) < 1e-5


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare_is_pefts_when_the_same_entries_are_dropped(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws of the global generator, so it is given the entries that ours kept."""
    sparsity = DareParameters(density=0.3, seed=5)
    merged = merge(THREE, method, weights=[1.0] * 3, parameters=sparsity)
    for path in SITES:
        matrices = [one.float() for one in deltas(THREE, path)]
        drop = SPARSIFIERS["random"](stack_of_tensor(torch.stack(matrices)), sparsity.sparsity(path))
        masks = iter((drop(torch.ones(3, *matrices[0].shape)) != 0).float())
        monkeypatch.setattr(torch, "bernoulli", lambda _, masks=masks: next(masks))
        peer = merge_utils.dare_ties if method == "dare_ties" else merge_utils.dare_linear
        wanted = peer(matrices, torch.ones(3), 0.3)
        assert relative(delta(merged, path), wanted.double()) < 1e-5


def test_an_election_of_three() -> None:
    block = torch.tensor([[[3.0, 1.0, 0.0, 2.0]], [[-1.0, 1.0, 0.0, -2.0]], [[-1.0, -4.0, 5.0, 0.0]]])
    equal = torch.ones(3)[:, None, None]
    assert elected_mean(block, equal).tolist() == [[3.0, -4.0, 5.0, 0.0]]
    unequal = torch.tensor([1.0, 3.0, 1.0])[:, None, None]
    assert elected_mean(block, unequal).tolist() == [[-1.0, 0.0, 5.0, -2.0]]
    against = torch.tensor([1.0, 1.0, -1.0])[:, None, None]
    assert elected_mean(block, against).tolist() == [[2.0, 2.0, -5.0, 0.0]]


@pytest.mark.parametrize("method", sorted(DRAWN))
def test_a_seed_repeats_what_is_dropped_and_another_drops_other_entries(method: str) -> None:
    kind = DRAWN[method]
    one, again, other = (merge(THREE, method, parameters=kind(seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one.tensors[key], again.tensors[key]) for key in one.tensors)
    assert relative(delta(other, SITES[0]), delta(one, SITES[0])) > 0.1


def zeros(adapter: Adapter, path: str) -> Tensor:
    return delta(adapter, path) == 0


def test_adapters_and_modules_do_not_drop_alike() -> None:
    same = merge([lora(1, targets=SITES[:1])], "dare")
    twice = SPARSIFIERS["random"](stack_of_tensor(torch.ones(2, 40, 40)), Sparsity(0.5))(torch.ones(2, 40, 40))
    assert 0.4 < float((twice[0] == twice[1]).float().mean()) < 0.6
    elsewhere = SPARSIFIERS["random"](stack_of_tensor(torch.ones(1, 40, 40)), Sparsity(0.5, where="b"))
    assert 0.4 < float((twice[0] == elsewhere(torch.ones(1, 40, 40))[0]).float().mean()) < 0.6
    assert 0.2 < float(zeros(same, SITES[0]).float().mean()) < 0.8


@pytest.mark.parametrize("sparsifier", ["random", "rank"])
def test_what_is_dropped_is_made_up_for_in_the_mean(sparsifier: Any) -> None:
    """The mean over many draws is the matrix: each entry within five standard errors of the mean."""
    matrix = random(1, 6, 50)
    draws = 2000
    kept = 0.4
    sums, squares = torch.zeros(6, 50, dtype=torch.float64), torch.zeros(6, 50, dtype=torch.float64)
    for seed in range(draws):
        drop = SPARSIFIERS[sparsifier](stack_of_tensor(matrix), Sparsity(kept, 0.2, seed))
        (one,) = drop(matrix).double()
        sums += one
        squares += one.square()
    mean = sums / draws
    error = ((squares / draws - mean.square()) / draws).sqrt()
    assert bool(((mean - matrix[0]).abs() <= 5 * error + 1e-12).all())


def test_della_keeps_large_entries_more_often_by_their_rank_in_the_row() -> None:
    matrix = torch.arange(1.0, 12.0).repeat(4, 1)[None] * torch.tensor([1.0, -1.0, 1e-3, 7.0])[:, None]
    draws, counts = 3000, torch.zeros(11)
    for seed in range(draws):
        (one,) = SPARSIFIERS["rank"](stack_of_tensor(matrix), Sparsity(0.5, 0.4, seed))(matrix)
        counts += (one != 0).float().mean(0)
        if seed == 0:
            factor = (one / matrix[0])[one != 0]
    wanted = torch.linspace(0.3, 0.7, 11)
    assert float((counts / draws - wanted).abs().max()) < 5 * float((0.25 / (4 * draws)) ** 0.5)
    assert bool(torch.isin((1 / factor).round(decimals=4), wanted.round(decimals=4)).all())


def test_della_without_a_window_is_dare_ties() -> None:
    one = merge(THREE, "della", parameters=DellaParameters(density=0.4, window=0.0, seed=3))
    other = merge(THREE, "dare_ties", parameters=DareParameters(density=0.4, seed=3))
    assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)


@pytest.mark.parametrize("method", ["dare", "magnitude"])
def test_nothing_dropped_is_linear(method: str) -> None:
    kind: Any = METHODS[method].params
    merged = merge(THREE, method, weights=[1.0, -2.0, 0.5], parameters=kind(density=1.0))
    for path in SITES:
        assert relative(delta(merged, path), weighted(deltas(THREE, path), [1.0, -2.0, 0.5])) < 1e-6


def test_inner_recipes_are_all_taken() -> None:
    found = {}
    for inner in RECIPES:
        parameters = CoreSpaceParameters(inner=inner, density=0.4)
        found[inner] = delta(merge(THREE, "core", parameters=parameters), SITES[0])
    for one in found:
        for other in found:
            assert one == other or relative(found[one], found[other]) > 1e-2


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (8, 8)])
def test_low_rank_is_the_best_and_balanced(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK", 30)
    matrix = random(*shape).double()
    for rank in (1, 5):
        found = low_rank(matrix, rank)
        assert relative(found.dense(), best_of_rank(matrix, rank)) < 1e-7
        torch.testing.assert_close(found.left.T @ found.left, found.right @ found.right.T)
    whole = low_rank(matrix, None)
    assert torch.equal(whole.dense(), matrix)
    assert whole.rank == min(shape)
    assert torch.count_nonzero(low_rank(torch.zeros(shape), 2).dense()) == 0

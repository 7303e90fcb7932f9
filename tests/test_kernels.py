"""The batched operations against a plain loop over rows in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graftory.kernels import Routing, batched_bottleneck, batched_lora
from graftory.kernels.shapes import stack_padded
from graftory.kernels.tiles import cut

INDEX = torch.tensor([2, -1, 0, 0, 1, -1, 2])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("middle", [(), (1,), (5,), (2, 3)])
def test_batched_lora_equals_a_loop_over_rows(middle: tuple[int, ...]) -> None:
    ranks, scale = (1, 3, 8), torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    a = [randn(rank, 6, seed=rank) for rank in ranks]
    b = [randn(4, rank, seed=10 + rank) for rank in ranks]
    x = randn(len(INDEX), *middle, 6, seed=0)
    got = batched_lora(x, stack_padded(a, 0), stack_padded(b, 1), scale, INDEX)
    for row, k in enumerate(INDEX.tolist()):
        want = torch.zeros(*middle, 4, dtype=torch.float64) if k < 0 else scale[k] * (x[row] @ a[k].T) @ b[k].T
        torch.testing.assert_close(got[row], want, atol=1e-12, rtol=1e-12)
        assert k >= 0 or not got[row].any()


def test_batched_lora_gradients() -> None:
    inputs = [randn(4, 2, 3, seed=1), randn(2, 2, 3, seed=2), randn(2, 3, 2, seed=3)]
    index, scale = torch.tensor([1, -1, 0, 1]), torch.tensor([1.0, 3.0], dtype=torch.float64)
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: batched_lora(x, a, b, scale, index), inputs)


def test_batched_bottleneck_equals_a_loop_over_rows() -> None:
    sizes, scale = (2, 5, 3), torch.tensor([1.0, 0.5, 4.0], dtype=torch.float64)
    down = [randn(size, 6, seed=size) for size in sizes]
    down_bias = [randn(size, seed=20 + size) for size in sizes]
    up = [randn(6, size, seed=30 + size) for size in sizes]
    up_bias = randn(3, 6, seed=40)
    x = randn(len(INDEX), 4, 6, seed=0)
    stacked = (stack_padded(down, 0), stack_padded(down_bias, 0), stack_padded(up, 1), up_bias)
    got = batched_bottleneck(x, *stacked, scale, INDEX, activation="silu")
    for row, k in enumerate(INDEX.tolist()):
        want = torch.zeros(4, 6, dtype=torch.float64)
        if k >= 0:
            want = scale[k] * (functional.silu(x[row] @ down[k].T + down_bias[k]) @ up[k].T + up_bias[k])
        torch.testing.assert_close(got[row], want, atol=1e-12, rtol=1e-12)


def test_a_broken_adapter_reaches_no_other_row() -> None:
    x, scale = randn(len(INDEX), 2, 6, seed=0), torch.ones(3, dtype=torch.float64)
    a, b = randn(3, 4, 6, seed=1), randn(3, 6, 4, seed=2)
    bias, out_bias = randn(3, 4, seed=3), randn(3, 6, seed=4)
    for broken in range(3):
        hurt = a.clone()
        hurt[broken] = float("nan")
        fine = broken != INDEX
        for one, other in (
            (batched_lora(x, a, b, scale, INDEX), batched_lora(x, hurt, b, scale, INDEX)),
            (
                batched_bottleneck(x, a, bias, b, out_bias, scale, INDEX, activation="relu"),
                batched_bottleneck(x, hurt, bias, b, out_bias, scale, INDEX, activation="relu"),
            ),
        ):
            assert torch.equal(one[fine], other[fine])
            assert other[~fine].isnan().all()


def test_wrong_shapes_are_named() -> None:
    x, a, b = randn(2, 3, seed=0), randn(1, 2, 3, seed=1), randn(1, 4, 2, seed=2)
    scale, index = torch.ones(1), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"a \(1, 2, 3\) and b \(1, 4, 1\) do not fit each other"):
        batched_lora(x, a, b[:, :, :1], scale, index)
    with pytest.raises(ValueError, match="index"):
        batched_lora(x, a, b, scale, index[:1])
    bias = torch.ones(1, 2)
    with pytest.raises(ValueError, match="up_bias"):
        batched_bottleneck(x, a, bias, a.transpose(1, 2), bias, scale, index, activation="relu")


@pytest.mark.parametrize("adapters", [1, 3])
def test_gradients_are_the_same_bits_every_time(adapters: int) -> None:
    """On two threads too: a gradient that is summed in any order would train another adapter each time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 16, 128, generator=generator)
    weights = [torch.randn(adapters, *shape, generator=generator) for shape in ((16, 128), (16,), (128, 16), (128,))]
    index, scale = torch.arange(32) % adapters, torch.ones(adapters)

    def gradients() -> list[Tensor]:
        leaves = [weight.clone().requires_grad_() for weight in weights]
        down, down_bias, up, up_bias = leaves
        neck = batched_bottleneck(x, down, down_bias, up, up_bias, scale, index, activation="relu")
        (neck + batched_lora(x, down, up, scale, index)).square().sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradients()
        assert all(torch.equal(a, b) for _ in range(30) for a, b in zip(first, gradients(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_routing_knows_a_batch_of_one_adapter() -> None:
    """On the CPU it looks; what it is told, as on a GPU, it takes without looking."""
    ones, some, mixed = torch.zeros(3, dtype=torch.long), torch.tensor([0, -1]), torch.zeros(3, 2, dtype=torch.long)
    assert Routing(ones).one_for_all(1)
    assert not Routing(ones).one_for_all(2)
    assert not Routing(some).one_for_all(1)
    assert not Routing(mixed).one_for_all(1)
    there = Routing(ones.to("meta"))
    assert not there.one_for_all(1)
    assert Routing(ones.to("meta"), full=True).one_for_all(1)


def test_a_routing_keeps_the_tiles_of_few_shapes_and_gives_the_same_again() -> None:
    routing = Routing(torch.tensor([1, -1, 0]))
    first = routing.tiles(4, 2, 16)
    assert routing.tiles(4, 2, 16) is first
    assert torch.equal(first.order, cut(torch.tensor([1, -1, 0]).repeat_interleave(4), 2, 16).order)
    shapes = [routing.tiles(tokens, 2, 16) for tokens in range(5, 40)]
    assert routing.tiles(39, 2, 16) is shapes[-1]
    assert len(routing._tiles) == 16
    assert torch.equal(routing.tiles(4, 2, 16).order, first.order)

"""`batched_head` in torch's products: against the formula row by row in fp64, forward and every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graftory.kernels import batched_head
from graftory.kernels.backend import Backend
from graftory.kernels.batched_head.reference import reference
from tests.kernel_samples import error


@dataclass(frozen=True)
class Heads:
    """Inputs of `batched_head`, x [N, T, D], and a gradient of the logits."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    index: Tensor
    sizes: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Heads:
        bias = None if self.bias is None else self.bias.to(dtype)
        x, weight, grad = (each.to(dtype) for each in (self.x, self.weight, self.grad))
        return replace(self, x=x, weight=weight, bias=bias, grad=grad)

    def learning(self) -> Heads:
        """Copies that take gradients."""
        x, weight = (each.detach().clone().requires_grad_() for each in (self.x, self.weight))
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_()
        return replace(self, x=x, weight=weight, bias=bias)

    def leaves(self) -> list[Tensor]:
        """What can learn."""
        return [each for each in (self.x, self.weight, self.bias) if each is not None]

    def padding(self) -> Tensor:
        """Which logits are padding, [N, T, O]."""
        sizes = torch.where(self.index < 0, 0, self.sizes[self.index])
        mask = torch.arange(self.weight.shape[1]) >= sizes[:, None]
        return mask[:, None].expand(self.grad.shape)


def heads(
    index: Sequence[int], sizes: Sequence[int], *, tokens: int = 3, width: int = 20, outputs: int = 0, bias: bool = True
) -> Heads:
    """Signed normal numbers in fp64; NaN in weights, biases and gradients behind a head's size."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    most = outputs or max(sizes)
    weight, vectors = randn(len(sizes), most, width), randn(len(sizes), most)
    for k, size in enumerate(sizes):
        weight[k, size:] = vectors[k, size:] = float("nan")
    made = Heads(
        x=randn(len(index), tokens, width),
        weight=weight,
        bias=vectors if bias else None,
        index=torch.tensor(index, dtype=torch.long),
        sizes=torch.tensor(sizes),
        grad=randn(len(index), tokens, most),
    )
    return replace(made, grad=made.grad.masked_fill(made.padding(), float("nan")))


CASES: dict[str, Heads] = {
    "each its own": heads([0, 1, 2], (2, 3, 5)),
    "some none": heads([2, -1, 0, 0, 1, -1, 2], (4, 17, 2, 9)),
    "one for all": heads([0] * 5, (7,)),
    "none at all": heads([-1, -1], (2, 3)),
    "no rows": heads([], (2, 3)),
    "no tokens": heads([0, 1], (2, 3), tokens=0),
    "no bias": heads([0, -1, 1], (6, 1), bias=False),
    "room": heads([0, -1, 1], (6, 1), outputs=12),
    "skewed": heads([1] * 9 + [0], (2, 64, 3), tokens=1),
    "many": heads(list(range(0, 257, 9)), [1 + k % 5 for k in range(257)], tokens=1, width=8),
}


def run(given: Heads, backend: Backend = "torch", fill: float = float("-inf")) -> Tensor:
    return batched_head(given.x, given.weight, given.bias, given.index, given.sizes, fill=fill, backend=backend)


def results(given: Heads, backend: Backend = "torch") -> list[Tensor]:
    """The logits, and the gradients of x, the weights and the biases."""
    learning = given.learning()
    logits = run(learning, backend)
    return [logits.detach(), *torch.autograd.grad(logits, learning.leaves(), given.grad)]


def expected(given: Heads) -> list[Tensor]:
    """The same by the formula, in fp64."""
    exact = given.to(torch.float64).learning()
    logits = reference(exact.x, exact.weight, exact.bias, exact.index, exact.sizes)
    grad = exact.grad.masked_fill(given.padding(), 0.0)
    found: Sequence[Tensor | None] = [None] * len(exact.leaves())
    if logits.requires_grad:
        found = torch.autograd.grad(logits, exact.leaves(), grad, allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in exact.leaves())
    return [logits.detach(), *(zero if each is None else each for each, zero in zip(found, zeros, strict=True))]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_the_formula_s(name: str) -> None:
    for got, want in zip(results(CASES[name]), expected(CASES[name]), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_loses_no_more_than_torch_s_own_products(dtype: torch.dtype) -> None:
    given = heads([0, 1, -1, 1] * 4, (16, 16), width=96, tokens=5).to(dtype)
    assert given.bias is not None
    used = given.index >= 0
    naive = torch.stack([
        functional.linear(x, given.weight[k], given.bias[k])
        for x, k in zip(given.x[used], given.index[used].tolist(), strict=True)
    ])  # fmt: skip
    want = expected(given)[0][used]
    assert error(run(given)[used], want) <= 2 * error(naive, want)


@pytest.mark.parametrize("fill", [float("-inf"), 0.0, -1e4])
def test_padding_holds_the_fill_and_nothing_else_does(fill: float) -> None:
    given = CASES["some none"]
    logits, padding = run(given, fill=fill), given.padding()
    assert bool((logits[padding] == fill).all())
    assert logits[~padding].isfinite().all()
    assert not bool((logits[~padding] == fill).any())


def test_it_trains_through_a_softmax_of_padded_rows() -> None:
    """The rows without a head give NaN losses there; nothing of them comes back."""
    given = CASES["some none"].learning()
    losses = functional.cross_entropy(run(given).flatten(0, 1), torch.zeros(21, dtype=torch.long), reduction="none")
    assert losses.view(7, 3)[given.index < 0].isnan().all()
    grad_x, grad_weight, grad_bias = torch.autograd.grad(losses.sum(), given.leaves())
    assert not grad_x[given.index < 0].any()
    for grad in (grad_x, grad_weight, grad_bias):
        assert grad.isfinite().all()
        assert grad.any()


def test_gradients_that_nothing_asks_for_are_exactly_zero() -> None:
    """Of rows without a head, heads without a row, and outputs behind a head's size."""
    given = CASES["some none"]
    _, grad_x, grad_weight, grad_bias = results(given)
    assert not grad_x[given.index < 0].any()
    assert not grad_weight[3].any()
    assert not grad_bias[3].any()
    for k, size in enumerate((4, 17, 2)):
        assert grad_weight[k, :size].any(1).all()
        assert not grad_weight[k, size:].any()
        assert not grad_bias[k, size:].any()


@pytest.mark.parametrize("name", ["some none", "each its own", "skewed"])
def test_numbers_that_are_none_reach_no_row_of_others(name: str) -> None:
    """Of a head, its rows and their gradients: the logits and the gradients of others are the same bits."""
    given = CASES[name]
    assert given.bias is not None
    fine = results(given)
    for broken in range(len(given.weight)):
        uses = given.index == broken
        weight, bias, x, grad = given.weight.clone(), given.bias.clone(), given.x.clone(), given.grad.clone()
        weight[broken] = bias[broken] = x[uses] = grad[uses] = float("nan")
        hurt = results(replace(given, weight=weight, bias=bias, x=x, grad=grad))
        others = [k for k in range(len(weight)) if k != broken]
        for one, other in zip(fine[:2], hurt[:2], strict=True):
            assert torch.equal(one[~uses], other[~uses])
        for one, other in zip(fine[2:], hurt[2:], strict=True):
            assert torch.equal(one[others], other[others])


def test_rows_without_a_head_may_hold_anything() -> None:
    given = CASES["some none"]
    x = given.x.clone()
    x[given.index < 0] = float("nan")
    for one, other in zip(results(given), results(replace(given, x=x)), strict=True):
        assert torch.equal(one, other)


def test_it_takes_tensors_that_are_not_contiguous() -> None:
    given = CASES["some none"]
    assert given.bias is not None
    turned = replace(
        given,
        x=given.x.transpose(1, 2).contiguous().transpose(1, 2),
        weight=given.weight.transpose(0, 2).contiguous().transpose(0, 2),
        bias=given.bias.T.contiguous().T,
        grad=given.grad.transpose(0, 2).contiguous().transpose(0, 2),
    )
    for got, want in zip(results(turned), expected(given), strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("middle", [(), (3, 1), (1, 3)])
def test_rows_may_have_any_shape(middle: tuple[int, ...]) -> None:
    given = CASES["some none"]
    x = given.x.view(7, *middle, 20) if middle else given.x[:, 0]
    want = run(given).view(7, *middle, 17) if middle else run(given)[:, 0]
    got = batched_head(x, given.weight, given.bias, given.index, given.sizes)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["some none", "no bias"])
def test_gradients_pass_gradcheck(name: str) -> None:
    given = CASES[name].learning()
    with torch.no_grad():
        for leaf in given.leaves():
            leaf.nan_to_num_()
    assert torch.autograd.gradcheck(
        lambda x, weight, bias=None: batched_head(x, weight, bias, given.index, given.sizes, fill=0.0), given.leaves()
    )


def test_under_autocast_products_are_made_in_its_type() -> None:
    given = CASES["some none"].to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits, *grads = results(given)
    half = results(given.to(torch.bfloat16))
    assert torch.equal(logits, half[0])
    for grad, other, leaf in zip(grads, half[1:], given.leaves(), strict=True):
        assert grad.dtype == leaf.dtype
        assert torch.equal(grad, other.float())


def test_only_what_is_asked_for_is_derived() -> None:
    given = CASES["some none"]
    want = expected(given)
    for place, name in enumerate(("x", "weight", "bias")):
        leaf = getattr(given, name).clone().requires_grad_()
        (found,) = torch.autograd.grad(run(replace(given, **{name: leaf})), leaf, given.grad)
        torch.testing.assert_close(found, want[1 + place], atol=1e-11, rtol=1e-11)
    assert not run(given).requires_grad


def test_run_to_run_the_bits_are_the_same() -> None:
    """On two threads too."""
    given = heads([k % 3 for k in range(24)], (8, 16, 3), tokens=8, width=64).to(torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = results(given)
        assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, results(given), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["some none", "no bias"])
def test_it_is_one_operation_for_compilers(name: str) -> None:
    """Its shapes without running it, its derivative, and its trace, as torch checks them."""
    given = CASES[name].to(torch.float32).learning()
    with torch.no_grad():
        for leaf in given.leaves():
            leaf.nan_to_num_()
    arguments = (given.x, given.weight, given.bias, given.index, given.sizes, -1.0, "torch")
    torch.library.opcheck(torch.ops.graftory.batched_head.default, arguments)
    seen: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    assert torch.equal(compiled(given), run(given))
    assert [target for target in seen if "graftory" in target] == ["graftory.batched_head.default"]


def test_the_compiled_operation_has_the_same_gradients() -> None:
    for name in ("some none", "no bias"):
        given = CASES[name].learning()
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(given), given.leaves(), given.grad)
        for got, want in zip(found, results(CASES[name])[1:], strict=True):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_what_does_not_fit_is_named() -> None:
    given = CASES["some none"]
    for wrong, match in (
        ({"x": given.x[..., 1:]}, r"x: got \(7, 3, 19\), wanted \(7, 3, 20\)"),
        ({"x": given.x[0, 0]}, "two at least"),
        ({"bias": given.x}, r"bias: got .*, wanted \(4, 17\)"),
        ({"index": given.index[1:]}, r"index: got \(6,\), wanted \(7,\)"),
        ({"sizes": given.sizes[1:]}, r"sizes: got \(3,\), wanted \(4,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            run(replace(given, **wrong))
    with pytest.raises(ValueError, match="float64 on cpu"):
        run(given, "triton")

"""`batched_scale` in torch's products: against the formula row by row in fp64, forward and both gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from graftory.kernels import batched_scale
from graftory.kernels.backend import Backend
from graftory.kernels.batched_scale.reference import reference


@dataclass(frozen=True)
class Scaling:
    """Inputs of `batched_scale`, and a gradient of what it gives."""

    x: Tensor
    vectors: Tensor
    index: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Scaling:
        return replace(self, x=self.x.to(dtype), vectors=self.vectors.to(dtype), grad=self.grad.to(dtype))

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Copies of what can learn, that do."""
        return self.x.detach().clone().requires_grad_(), self.vectors.detach().clone().requires_grad_()


def scaling(
    index: Sequence[int], adapters: int, *, middle: tuple[int, ...] = (3,), width: int = 20, seed: int = 0
) -> Scaling:
    generator = torch.Generator().manual_seed(seed)
    x, vectors, grad = (
        torch.randn(*shape, generator=generator).double()
        for shape in ((len(index), *middle, width), (adapters, width), (len(index), *middle, width))
    )
    return Scaling(x, vectors, torch.tensor(index, dtype=torch.long), grad)


CASES: dict[str, Scaling] = {
    "each its own": scaling([0, 1, 2], 3),
    "some none": scaling([2, -1, 0, 0, 1, -1, 2], 4),
    "one for all": scaling([0] * 5, 1),
    "none at all": scaling([-1, -1], 2),
    "no rows": scaling([], 2),
    "no tokens": scaling([0, 1], 2, middle=(0,)),
    "no positions": scaling([1, -1, 0], 2, middle=()),
    "images": scaling([1, -1, 0], 2, middle=(2, 3)),
    "skewed": scaling([1] * 9 + [0], 3, middle=(1,)),
    "long": scaling([1, 0, 1], 2, middle=(37,), width=130),
    "many": scaling(list(range(0, 257, 9)), 257, middle=(1,), width=8),
}


def results(given: Scaling, backend: Backend = "torch") -> list[Tensor]:
    """The scaled rows, and the gradients of x and the vectors."""
    x, vectors = given.leaves()
    scaled = batched_scale(x, vectors, given.index, backend=backend)
    return [scaled.detach(), *torch.autograd.grad(scaled, (x, vectors), given.grad)]


def expected(given: Scaling) -> list[Tensor]:
    """The same by the formula, in fp64."""
    exact = given.to(torch.float64)
    x, vectors = exact.leaves()
    scaled = reference(x, vectors, given.index)
    found = torch.autograd.grad(scaled, (x, vectors), exact.grad, allow_unused=True)
    made = [torch.zeros_like(leaf) if each is None else each for each, leaf in zip(found, (x, vectors), strict=True)]
    return [scaled.detach(), *made]


@pytest.mark.parametrize("name", CASES)
def test_rows_and_gradients_are_the_formula_s(name: str) -> None:
    for got, want in zip(results(CASES[name]), expected(CASES[name]), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_rounded_once(dtype: torch.dtype) -> None:
    """Half a unit in the last place of the product, whatever the type of the vectors; a sum by its largest term."""
    half = torch.finfo(dtype).eps / 2
    for given in (CASES["long"].to(dtype), replace(CASES["long"].to(dtype), vectors=CASES["long"].vectors.float())):
        scaled, grad_x, grad_vectors = results(given)
        assert (scaled.dtype, grad_x.dtype, grad_vectors.dtype) == (dtype, dtype, given.vectors.dtype)
        want = expected(given)
        for got, exact in zip((scaled, grad_x), want, strict=False):
            assert bool(((got.double() - exact).abs() <= 1.001 * half * exact.abs() + 1e-7).all())
        torch.testing.assert_close(grad_vectors.double(), want[2], atol=2e-5 + half, rtol=2 * half)


NAN = torch.tensor([0x7FC1, 0x7F81, -1, 0x7F80, -0x8000], dtype=torch.int16).view(torch.bfloat16)
"""Numbers of which a product with one changes the bits, or might: quiet and signalling NaN, inf, -0."""


def test_rows_without_an_adapter_pass_bit_for_bit() -> None:
    """The row and its gradient, NaN included."""
    given = CASES["some none"].to(torch.bfloat16)
    x, grad = given.x.clone(), given.grad.clone()
    x[1, 0, :5], grad[1, 1, :5] = NAN, NAN
    scaled, grad_x, grad_vectors = results(replace(given, x=x, grad=grad))
    free = given.index < 0
    assert torch.equal(scaled[free].view(torch.int16), x[free].view(torch.int16))
    assert torch.equal(grad_x[free].view(torch.int16), grad[free].view(torch.int16))
    assert torch.equal(grad_vectors, results(given)[2])


def test_gradients_of_adapters_that_no_row_uses_are_exactly_zero() -> None:
    grad = results(CASES["some none"])[2]
    assert not grad[3].any()
    assert grad[:3].any(1).all()


@pytest.mark.parametrize("name", ["some none", "skewed", "images"])
def test_numbers_that_are_none_reach_no_row_of_others(name: str) -> None:
    given = CASES[name]
    for broken in range(len(given.vectors)):
        vectors, x, uses = given.vectors.clone(), given.x.clone(), given.index == broken
        vectors[broken] = x[uses] = float("nan")
        others = [k for k in range(len(vectors)) if k != broken]
        fine, hurt = results(given), results(replace(given, vectors=vectors, x=x))
        for one, other in zip(fine[:2], hurt[:2], strict=True):
            assert torch.equal(one[~uses], other[~uses])
            assert other[uses].isnan().all()
        assert torch.equal(fine[2][others], hurt[2][others])


def test_a_row_depends_on_no_other_row() -> None:
    given = CASES["some none"].to(torch.float32)
    whole = batched_scale(given.x, given.vectors, given.index)
    for row in range(len(whole)):
        alone = batched_scale(given.x[row : row + 1], given.vectors, given.index[row : row + 1])
        assert torch.equal(alone[0], whole[row])


def test_it_takes_tensors_that_are_not_contiguous() -> None:
    given = CASES["some none"]
    strided = replace(
        given,
        x=given.x.transpose(1, 2).contiguous().transpose(1, 2),
        vectors=given.vectors.T.contiguous().T,
        grad=given.grad[:1, :1].expand_as(given.grad),
    )
    for got, want in zip(results(strided), expected(strided), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_gradients_pass_gradcheck() -> None:
    given = CASES["some none"]
    assert torch.autograd.gradcheck(lambda x, vectors: batched_scale(x, vectors, given.index), given.leaves())


def test_only_what_is_asked_for_is_derived() -> None:
    given = CASES["some none"]
    want = expected(given)
    for place in (0, 1):
        leaf = (given.x, given.vectors)[place].clone().requires_grad_()
        x, vectors = (leaf, given.vectors) if place == 0 else (given.x, leaf)
        (found,) = torch.autograd.grad(batched_scale(x, vectors, given.index), leaf, given.grad)
        torch.testing.assert_close(found, want[1 + place], atol=1e-12, rtol=1e-12)
    assert not batched_scale(given.x, given.vectors, given.index).requires_grad


def test_run_to_run_the_bits_are_the_same() -> None:
    """On two threads too."""
    given = scaling([k % 3 for k in range(32)], 3, middle=(16,), width=128).to(torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = results(given)
        assert all(torch.equal(a, b) for _ in range(10) for a, b in zip(first, results(given), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_it_is_one_operation_for_compilers() -> None:
    """Its shapes without running it, its derivative, and its trace, as torch checks them."""
    given = CASES["some none"].to(torch.float32)
    x, vectors = given.leaves()
    torch.library.opcheck(torch.ops.graftory.batched_scale.default, (x, vectors, given.index, "torch"))
    seen: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(batched_scale, backend=compiler, fullgraph=True)
    assert torch.equal(compiled(x, vectors, given.index), batched_scale(x, vectors, given.index))
    assert [target for target in seen if "graftory" in target] == ["graftory.batched_scale.default"]


def test_the_compiled_operation_has_the_same_gradients() -> None:
    given = CASES["some none"]
    x, vectors = given.leaves()
    compiled = torch.compile(batched_scale, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x, vectors, given.index), (x, vectors), given.grad)
    for got, want in zip(found, results(given)[1:], strict=True):
        assert torch.equal(got, want)


def test_what_does_not_fit_is_named() -> None:
    given = CASES["some none"]
    with pytest.raises(ValueError, match=r"x: got \(7, 3, 20\), wanted \(7, 3, 19\)"):
        batched_scale(given.x, given.vectors[:, 1:], given.index)
    with pytest.raises(ValueError, match=r"index: got \(6,\), wanted \(7,\)"):
        batched_scale(given.x, given.vectors, given.index[1:])
    with pytest.raises(ValueError, match="two at least"):
        batched_scale(given.x[0, 0], given.vectors, given.index)
    with pytest.raises(ValueError, match="float64 on cpu"):
        batched_scale(given.x, given.vectors, given.index, backend="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        batched_scale(given.x, given.vectors, given.index, backend="cuda")  # type: ignore[arg-type]

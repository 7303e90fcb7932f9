"""`batched_lora_slices` in torch's products: against the formula row by row in fp64, forward and every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from graftory.kernels import batched_lora, batched_lora_slices
from graftory.kernels.backend import Backend
from graftory.kernels.batched_lora_slices.reference import reference
from graftory.kernels.shapes import stack_padded


@dataclass(frozen=True)
class Sliced:
    """Inputs of `batched_lora_slices`, x [N, T, D] and index [N, M], and a gradient of all it gives."""

    x: Tensor
    a: Tensor
    b: Tensor
    weight: Tensor | None
    widths: tuple[int, ...]
    scale: Tensor
    index: Tensor
    ranks: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Sliced:
        weight = None if self.weight is None else self.weight.to(dtype)
        x, a, b, grad = (each.to(dtype) for each in (self.x, self.a, self.b, self.grad))
        return replace(self, x=x, a=a, b=b, grad=grad, weight=weight)

    def learning(self) -> Sliced:
        """Copies that take gradients."""
        x, a, b = (each.clone().requires_grad_() for each in (self.x, self.a, self.b))
        return replace(
            self, x=x, a=a, b=b, weight=self.weight if self.weight is None else self.weight.clone().requires_grad_()
        )

    def leaves(self) -> list[Tensor]:
        """What can learn."""
        return [each for each in (self.x, self.a, self.b, self.weight) if each is not None]


def sliced(
    index: Sequence[Sequence[int]],
    ranks: Sequence[Sequence[int]],
    *,
    widths: tuple[int, ...] = (20, 9, 9),
    tokens: int = 3,
    inputs: int = 24,
    weighted: bool = False,
) -> Sliced:
    """Ranks are those of each slice and adapter; numbers are signed and normal, in fp64 what they are in fp32."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    places = torch.tensor(index, dtype=torch.long).view(len(index), -1)
    adapters, most = len(ranks[0]), max(max(each) for each in ranks)
    # the last is as long as any, so that slices have one rank, and is taken off
    a = torch.stack([stack_padded([*(randn(r, inputs) for r in each), randn(most, inputs)], 0)[:-1] for each in ranks])
    b = torch.cat(
        [
            stack_padded([*(randn(width, r) for r in each), randn(width, most)], 1)[:-1]
            for each, width in zip(ranks, widths, strict=True)
        ],
        1,
    )
    return Sliced(
        x=randn(len(index), tokens, inputs),
        a=a,
        b=b,
        weight=randn(*places.shape) if weighted else None,
        widths=widths,
        scale=randn(adapters),
        index=places,
        ranks=torch.tensor(ranks),
        grad=randn(len(index), tokens, sum(widths)),
    )


SOME = ((4, 17, 3), (2, 16, 0), (4, 1, 3))
"""The last adapter has nothing for the second slice."""
CASES: dict[str, Sliced] = {
    "some none": sliced([[2], [-1], [0], [0], [1], [-1], [2]], SOME),
    "one for all": sliced([[0]] * 4, ((3,), (5,)), widths=(16, 32)),
    "none at all": sliced([[-1], [-1]], ((2, 3), (2, 3)), widths=(8, 4)),
    "no tokens": sliced([[0], [1]], ((2, 3), (2, 3)), widths=(8, 4), tokens=0),
    "one slice": sliced([[1], [-1], [0]], ((2, 3),), widths=(20,)),
    "mixtures": sliced([[0, 2], [1, -1], [-1, -1], [2, 2], [-1, 0]], SOME, weighted=True),
    "skewed": sliced([[1]] * 9 + [[0]], SOME, tokens=2),
}


def run(given: Sliced, backend: Backend = "torch") -> list[Tensor]:
    return batched_lora_slices(
        given.x, given.a, given.b, given.widths, given.scale, given.index, given.weight,
        ranks=given.ranks, backend=backend,
    )  # fmt: skip


def results(given: Sliced, backend: Backend = "torch") -> list[Tensor]:
    """The updates side by side, and the gradients of what can learn."""
    learning = given.learning()
    updates = run(learning, backend)
    assert [each.shape[-1] for each in updates] == list(given.widths)
    found = torch.autograd.grad(updates, learning.leaves(), given.grad.split(list(given.widths), -1))
    return [torch.cat(updates, -1).detach(), *found]


def expected(given: Sliced) -> list[Tensor]:
    """The same by the formula, in fp64."""
    exact = given.to(torch.float64).learning()
    updates = torch.cat(reference(exact.x, exact.a, exact.b, exact.widths, exact.scale, exact.index, exact.weight), -1)
    found: Sequence[Tensor | None] = [None] * len(exact.leaves())
    if updates.requires_grad:
        found = torch.autograd.grad(updates, exact.leaves(), exact.grad, allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in exact.leaves())
    return [updates.detach(), *(zero if each is None else each for each, zero in zip(found, zeros, strict=True))]


@pytest.mark.parametrize("name", CASES)
def test_updates_and_gradients_are_the_formula_s(name: str) -> None:
    for got, want in zip(results(CASES[name]), expected(CASES[name]), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", ["some none", "mixtures"])
def test_each_slice_is_what_batched_lora_gives_of_it(name: str) -> None:
    given = CASES[name]
    for update, a, b in zip(run(given), given.a, given.b.split(list(given.widths), 1), strict=True):
        alone = batched_lora(given.x, a, b, given.scale, given.index, given.weight, backend="torch")
        assert torch.equal(update, alone)


def test_no_rows_give_no_rows() -> None:
    given = CASES["some none"]
    none = replace(given, x=given.x[:0], index=given.index[:0], grad=given.grad[:0])
    update, grad_x, *rest = results(none)
    assert update.shape == (0, 3, 38)
    assert grad_x.shape == (0, 3, 24)
    assert not any(each.any() for each in rest)


@pytest.mark.parametrize("name", ["some none", "mixtures"])
def test_numbers_that_are_none_reach_no_row_of_others(name: str) -> None:
    """Forward, and the gradients of the other rows and adapters, to the bit."""
    given = CASES[name]
    for broken in range(given.a.shape[1]):
        fine = ~(given.index == broken).any(1)
        others = [k for k in range(given.a.shape[1]) if k != broken]
        a, b = given.a.clone(), given.b.clone()
        a[:, broken] = b[broken] = float("nan")
        grad = given.grad * fine[:, None, None]
        found = []
        for each in (given, replace(given, a=a, b=b)):
            learning = each.learning()
            kept = torch.cat(run(learning), -1)[fine]
            grads = torch.autograd.grad(kept, learning.leaves()[:3], grad[fine])
            found.append([kept, grads[0][fine], grads[1][:, others], grads[2][others]])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
            assert not one.isnan().any()


def test_rows_without_an_adapter_and_adapters_without_a_row_get_exact_zeros() -> None:
    given = CASES["some none"]
    x = given.x.clone()
    x[1] = float("nan")
    index = torch.where(given.index == 2, -1, given.index)
    update, grad_x, grad_a, grad_b = results(replace(given, x=x, index=index))
    free = index[:, 0] < 0
    assert not update[free].any()
    assert not grad_x[free].any()
    assert not grad_a[:, 2].any()
    assert not grad_b[2].any()
    assert grad_a[:, :2].flatten(2).any(2).all()


def test_it_takes_tensors_that_are_not_contiguous() -> None:
    given = CASES["some none"]
    turned = replace(
        given,
        x=given.x.transpose(1, 2).contiguous().transpose(1, 2),
        a=given.a.transpose(0, 1).contiguous().transpose(0, 1),
        b=given.b.transpose(0, 2).contiguous().transpose(0, 2),
    )
    for got, want in zip(results(turned), expected(given), strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


def test_rows_of_any_shape_and_an_index_of_rows() -> None:
    given = CASES["some none"]
    x, flat = given.x.view(7, 3, 1, 24), given.index[:, 0]
    updates = batched_lora_slices(x, given.a, given.b, given.widths, given.scale, flat, ranks=given.ranks[0])
    for got, want in zip(updates, run(given), strict=True):
        assert torch.equal(got, want.view(7, 3, 1, -1))


def test_gradients_pass_gradcheck() -> None:
    given = sliced([[0, 1], [1, -1], [-1, -1]], ((2, 1), (1, 2)), widths=(4, 3), tokens=2, inputs=5, weighted=True)
    learning = given.learning()
    assert torch.autograd.gradcheck(
        lambda x, a, b, weight: batched_lora_slices(x, a, b, given.widths, given.scale, given.index, weight),
        learning.leaves(),
    )


def test_under_autocast_products_are_made_in_its_type() -> None:
    given = CASES["mixtures"].to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        updates, *grads = results(given)
    half = results(replace(given.to(torch.bfloat16), weight=given.weight))
    assert torch.equal(updates, half[0])
    for grad, other, leaf in zip(grads, half[1:], given.leaves(), strict=True):
        assert grad.dtype == leaf.dtype
        assert torch.equal(grad, other.float())


def test_only_what_is_asked_for_is_derived() -> None:
    given = CASES["mixtures"]
    want = expected(given)
    for place, name in enumerate(("x", "a", "b", "weight")):
        leaf = getattr(given, name).clone().requires_grad_()
        updates = run(replace(given, **{name: leaf}))
        (found,) = torch.autograd.grad(updates, leaf, given.grad.split(list(given.widths), -1))
        torch.testing.assert_close(found, want[1 + place], atol=1e-11, rtol=1e-11)
    assert not run(given)[0].requires_grad


def test_run_to_run_the_bits_are_the_same() -> None:
    given = sliced([[k % 3] for k in range(24)], SOME, tokens=16, inputs=64).to(torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = results(given)
        assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, results(given), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["some none", "mixtures"])
def test_it_is_one_operation_for_compilers(name: str) -> None:
    """Its shapes without running it, its derivative, and its trace, as torch checks them."""
    given = CASES[name].to(torch.float32).learning()
    arguments = (given.x, given.a, given.b, given.scale.float(), given.index, given.weight, given.ranks)
    torch.library.opcheck(torch.ops.graftory.batched_lora_slices.default, (*arguments, list(given.widths), "torch"))
    seen: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    assert all(torch.equal(one, other) for one, other in zip(compiled(given), run(given), strict=True))
    assert [target for target in seen if "graftory" in target] == ["graftory.batched_lora_slices.default"]


def test_the_compiled_operation_has_the_same_gradients() -> None:
    given = CASES["mixtures"].learning()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(given), given.leaves(), given.grad.split(list(given.widths), -1))
    for got, want in zip(found, results(CASES["mixtures"])[1:], strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_what_does_not_fit_is_named() -> None:
    given = CASES["some none"]
    for wrong, match in (
        ({"widths": (20, 9)}, r"widths: got \(20, 9\), wanted 3"),
        ({"widths": (20, 9, 8)}, "wanted 3 that are 38 in all"),
        ({"widths": (29, 0, 9)}, "widths"),
        ({"a": given.a[0]}, "four dimensions and three"),
        ({"b": given.b[:, :, 1:]}, "do not fit"),
        ({"b": given.b[1:]}, "do not fit"),
        ({"scale": given.scale[1:]}, "scale"),
        ({"index": given.index[1:]}, "index"),
        ({"weight": given.scale}, "weight"),
        ({"ranks": given.ranks[1:]}, r"ranks: got \(2, 3\), wanted \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=match):
            run(replace(given, **wrong))
    with pytest.raises(ValueError, match="float64 on cpu"):
        run(given, "triton")

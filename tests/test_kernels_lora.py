"""`batched_lora` in torch's products: against the formula row by row in fp64, forward and every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graftory.kernels import Routing, batched_lora, inlet
from graftory.kernels.backend import Backend
from tests.kernel_samples import Batch, batch, error, expected

CASES: dict[str, Batch] = {
    "each its own": batch([[0], [1], [2]], (1, 3, 8)),
    "some none": batch([[2], [-1], [0], [0], [1], [-1], [2]], (4, 17, 16)),
    "one for all": batch([[0]] * 5, (8,)),
    "one and none": batch([[0], [-1], [0]], (8,)),
    "none at all": batch([[-1], [-1]], (2, 3)),
    "no rows": replace(batch([[0]], (2, 3)), x=torch.zeros(0, 3, 24).double(), index=torch.zeros(0, 1).long()),
    "no tokens": batch([[0], [1]], (2, 3), tokens=0),
    "skewed": batch([[1]] * 9 + [[0]], (2, 64, 3), tokens=1),
    "mixtures": batch([[0, 2], [1, -1], [-1, -1], [2, 2], [-1, 0]], (2, 5, 3), weighted=True),
    "mixtures unweighted": batch([[0, 1, 2], [2, -1, 1]], (2, 5, 3)),
    "weighted": batch([[1], [0], [-1], [1]], (2, 5), weighted=True),
    "many": batch([[k] for k in range(0, 257, 3)], [1 + k % 5 for k in range(257)], tokens=1, inputs=8, outputs=8),
}


def run(given: Batch, backend: Backend = "torch") -> Tensor:
    return batched_lora(
        given.x, given.a, given.b, given.scale, given.index, given.weight, ranks=given.ranks, backend=backend
    )


@pytest.mark.parametrize("name", CASES)
def test_update_and_gradients_are_the_formula_s(name: str) -> None:
    given = CASES[name].learning()
    update = run(given)
    grad = torch.randn(update.shape, generator=torch.Generator().manual_seed(7)).double()
    found = [update.detach(), *torch.autograd.grad(update, given.leaves(), grad)]
    for got, want in zip(found, expected(given, grad), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


ALIKE = {
    "two": batch([[2, 0]] * 3, (2, 5, 3), weighted=True),
    "unweighted": batch([[1, 2, 0]] * 2, (4, 1, 3)),
    "twice the same": batch([[1, 1]] * 3, (2, 5), weighted=True),
    "one of several": batch([[1]] * 3, (2, 5, 3)),
    "one": batch([[0]] * 3, (4,), weighted=True),
    "no rows": replace(batch([[0, 1]], (2, 3)), x=torch.zeros(0, 3, 24).double(), index=torch.zeros(0, 2).long()),
}


@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("ranks", [False, True])
@pytest.mark.parametrize("name", ALIKE)
def test_adapters_that_all_rows_share_are_one_of_all_their_units(name: str, ranks: bool, onto: bool) -> None:
    """The formula again, without gathering; numbers behind a true rank are not read if it is told."""
    given = ALIKE[name].learning()
    leaves = given.nan_behind_ranks() if ranks else given
    layer = torch.ones(*given.x.shape[:2], given.b.shape[1]).double() if onto else None
    update = batched_lora(
        *(leaves.x, leaves.a, leaves.b, given.scale, Routing(given.index, alike=True), leaves.weight),
        ranks=given.ranks if ranks else None, onto=layer,
    )  # fmt: skip
    grad = torch.randn(update.shape, generator=torch.Generator().manual_seed(7)).double()
    found = [update.detach() - int(onto), *torch.autograd.grad(update, given.leaves(), grad)]
    for got, want in zip(found, expected(given, grad), strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_loses_no_more_than_torch_s_own_products(dtype: torch.dtype) -> None:
    given = batch([[0], [1], [-1], [1]], (8, 16), inputs=96, outputs=64, tokens=5).to(dtype)
    naive = torch.stack([
        given.scale[k].to(dtype) * ((x @ given.a[k].T) @ given.b[k].T) if k >= 0 else x.new_zeros(5, 64)
        for x, k in zip(given.x, given.index[:, 0].tolist(), strict=True)
    ])  # fmt: skip
    (want,) = expected(given)
    assert error(run(given), want) <= 2 * error(naive, want)


def test_only_what_is_asked_for_is_derived() -> None:
    given = CASES["mixtures"]
    x = given.x.clone().requires_grad_()
    grad = torch.ones(5, 3, 20).double()
    (found,) = torch.autograd.grad(run(replace(given, x=x)), [x], grad)
    torch.testing.assert_close(found, expected(given, grad)[1], atol=1e-11, rtol=1e-11)
    assert not run(given).requires_grad


def test_gradients_of_adapters_that_no_row_uses_are_exactly_zero() -> None:
    given = batch([[0], [2]], (2, 3, 4)).learning()
    _, grad_a, grad_b = torch.autograd.grad(run(given).square().sum(), given.leaves())
    assert not grad_a[1].any()
    assert not grad_b[1].any()
    assert grad_a[0].any()


@pytest.mark.parametrize("name", ["some none", "one and none", "mixtures", "mixtures unweighted"])
def test_numbers_that_are_none_reach_no_row_of_others(name: str) -> None:
    """Forward, and the gradients of the other rows and adapters, to the bit."""
    given = CASES[name]
    for broken in range(len(given.a)):
        uses = (given.index == broken).any(1)
        a, b = given.a.clone(), given.b.clone()
        a[broken] = b[broken] = float("nan")
        results = []
        for each in (given, replace(given, a=a, b=b)):
            each = each.learning()
            update = run(each)
            kept = update[~uses]
            found = torch.autograd.grad(kept.square().sum(), each.leaves()[:3], allow_unused=True)
            others = [k for k in range(len(a)) if k != broken]
            results.append([kept, found[0][~uses], found[1][others], found[2][others]])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_rows_without_an_adapter_get_zeros_whatever_they_hold() -> None:
    given = CASES["some none"]
    x = given.x.clone()
    x[1] = float("nan")
    assert torch.equal(run(replace(given, x=x))[1], torch.zeros(3, 20).double())


def test_it_takes_tensors_that_are_not_contiguous() -> None:
    given = CASES["some none"]
    strided = replace(
        given,
        x=given.x.transpose(1, 2).contiguous().transpose(1, 2),
        a=given.a.transpose(1, 2).contiguous().transpose(1, 2),
        b=given.b.transpose(0, 1).contiguous().transpose(0, 1),
    )
    torch.testing.assert_close(run(strided), run(given), atol=1e-12, rtol=1e-12)


def test_gradients_pass_gradcheck() -> None:
    given = CASES["mixtures"].learning()
    leaves = given.leaves()
    assert torch.autograd.gradcheck(
        lambda x, a, b, weight: batched_lora(x, a, b, given.scale, given.index, weight), leaves
    )


@pytest.mark.parametrize("name", ["some none", "mixtures"])
def test_it_is_one_operation_for_compilers(name: str) -> None:
    """Its shapes without running it, its derivative, and its trace, as torch checks them."""
    given = CASES[name].to(torch.float32).learning()
    arguments = (given.x, given.a, given.b, given.scale.float(), given.index, given.weight, None, "torch")
    torch.library.opcheck(torch.ops.graftory.batched_lora.default, arguments)
    seen: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    assert torch.equal(compiled(given), run(given))
    assert [target for target in seen if "graftory" in target] == ["graftory.batched_lora.default"]


def test_the_compiled_operation_has_the_same_gradients() -> None:
    given = CASES["mixtures"].learning()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    one = torch.autograd.grad(run(given).square().sum(), given.leaves())
    other = torch.autograd.grad(compiled(given).square().sum(), given.leaves())
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_a_backend_that_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="float64 on cpu"):
        run(CASES["weighted"], "triton")
    with pytest.raises(ValueError, match="'cuda'"):
        run(CASES["weighted"], "cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight"):
        run(replace(CASES["weighted"], weight=torch.ones(3)))


# --- beside a layer: `onto` and `inlet` ------------------------------------------------------------------------------


def beside(given: Batch, layer: Tensor, *, shared: bool) -> Tensor:
    """W x + the update, with one gradient of x for both or with two that autograd adds."""
    x = inlet(given.x) if shared else given.x
    plain, index = functional.linear(x, layer), given.index
    if not shared:
        return plain + batched_lora(x, given.a, given.b, given.scale, index, given.weight)
    return batched_lora(x, given.a, given.b, given.scale, index, given.weight, onto=plain)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_and_its_update_in_one_piece_of_memory(name: str) -> None:
    given = CASES[name].learning()
    layer = torch.randn(given.b.shape[1], given.x.shape[2], generator=torch.Generator().manual_seed(3)).double()
    results = []
    for shared in (True, False):
        y = beside(given, layer, shared=shared)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), given.leaves())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("learns", [False, True])
def test_what_it_is_added_to_gives_its_memory(learns: bool) -> None:
    given = CASES["each its own"].learning() if learns else CASES["each its own"]
    plain = torch.randn(3, 3, 20, generator=torch.Generator().manual_seed(1)).double()
    want = plain + run(given)
    y = batched_lora(given.x, given.a, given.b, given.scale, given.index, onto=plain)
    assert y.data_ptr() == plain.data_ptr()
    torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-12)


def test_what_it_is_added_to_keeps_its_dtype() -> None:
    given = CASES["some none"]
    plain = torch.randn(7, 3, 20, generator=torch.Generator().manual_seed(1))
    y = batched_lora(given.x, given.a, given.b, given.scale, given.index, onto=plain.clone())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), plain.double() + run(given), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"onto: got \(7, 3, 19\), wanted \(7, 3, 20\)"):
        batched_lora(given.x, given.a, given.b, given.scale, given.index, onto=plain[..., :19])


def test_a_layer_that_kept_what_is_written_to_is_told() -> None:
    given = CASES["each its own"].learning()
    kept = torch.tanh(functional.linear(given.x, torch.ones(20, 24).double()))  # tanh looks at its output again
    y = batched_lora(given.x, given.a, given.b, given.scale, given.index, onto=kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["each its own", "one for all"])
def test_an_inlet_is_right_in_every_pass(name: str) -> None:
    """Passes that end before they come to x, twice through one graph, and twice through one inlet."""
    given = CASES[name].learning()
    layer = torch.ones(20, 24).double()
    y = beside(given, layer, shared=True)
    x, a, _ = given.leaves()
    want = torch.autograd.grad(beside(given, layer, shared=False).sum(), [x, a])
    torch.autograd.grad(y.sum(), [a], retain_graph=True)
    for _ in range(2):
        for got, each in zip(torch.autograd.grad(y.sum(), [x, a], retain_graph=True), want, strict=True):
            torch.testing.assert_close(got, each, atol=1e-10, rtol=1e-10)
    entered = inlet(x)
    parts = [given.a, given.b, given.scale, given.index]
    twice = functional.linear(entered, layer) + batched_lora(entered, *parts) + batched_lora(entered, *parts)
    plain = functional.linear(x, layer) + 2 * batched_lora(x, *parts)
    (got,), (each,) = (torch.autograd.grad(total.sum(), [x]) for total in (twice, plain))
    torch.testing.assert_close(got, each, atol=1e-10, rtol=1e-10)


def test_an_inlet_is_nothing_where_nothing_is_gained() -> None:
    x = torch.ones(2, 3, 4)
    assert inlet(x) is x
    flat = torch.ones(2, 4, requires_grad=True)
    assert inlet(flat) is flat
    with torch.no_grad():
        assert inlet(learning := torch.ones(2, 3, 4, requires_grad=True)) is learning


def test_an_inlet_lets_gradients_through_gradients_that_are_not_contiguous() -> None:
    given = CASES["one for all"].learning()
    entered = inlet(given.x)
    layer = torch.randn(24, 24, generator=torch.Generator().manual_seed(3)).double()
    turned = torch.einsum("ntd,de->nte", entered.transpose(1, 2).transpose(1, 2), layer)
    parts = [given.a, given.b, given.scale, given.index]
    got = torch.autograd.grad(turned.sum() + batched_lora(entered, *parts).sum(), [given.x])[0]
    want = torch.autograd.grad((given.x @ layer).sum() + batched_lora(given.x, *parts).sum(), [given.x])[0]
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)

"""`batched_bottleneck` in torch's products: against the formula row by row in fp64, forward and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN

from graftory import config
from graftory.kernels import activations, batched_bottleneck
from graftory.kernels.activations import ACTIVATIONS, Activation
from graftory.kernels.batched_bottleneck import op
from tests.bottleneck_samples import CASES, Neck, expected, neck, results
from tests.kernel_samples import error

NAN = float("nan")


@pytest.mark.parametrize("name", CASES)
def test_update_and_gradients_are_the_formula_s(name: str) -> None:
    for got, want in zip(results(CASES[name]), expected(CASES[name]), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


def test_the_names_are_those_of_the_configuration() -> None:
    assert get_args(activations.Activation) == get_args(config.Activation) == tuple(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_transformers_to_the_bit(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        z = (4 * torch.randn(1000, generator=generator)).to(dtype)
        assert torch.equal(ACTIVATIONS[name].function(z), ACT2FN[name](z))
    # what is behind an adapter's size stays zero
    assert ACTIVATIONS[name].function(torch.zeros(1)) == 0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_chain_rules_are_what_autograd_derives(name: str) -> None:
    z = torch.linspace(-12, 12, 500, dtype=torch.float64).requires_grad_()
    grad = torch.randn(500, generator=torch.Generator().manual_seed(0)).double()
    (want,) = torch.autograd.grad(ACT2FN[name](z), [z], grad)
    torch.testing.assert_close(ACTIVATIONS[name].chain(grad, z.detach()), want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_pass_gradcheck(name: Activation, weighted: bool) -> None:
    index = [[0, 2], [1, -1], [-1, -1]] if weighted else [[0], [2], [-1]]
    given = neck(index, (2, 5, 3), name, tokens=2, width=4, weighted=weighted, dropped=weighted).learning()

    def update(*leaves: Tensor) -> Tensor:
        x, down, down_bias, up, up_bias, *weight = leaves
        moved = replace(given, x=x, down=down, down_bias=down_bias, up=up, up_bias=up_bias)
        return replace(moved, weight=weight[0] if weight else None).run()

    assert torch.autograd.gradcheck(update, given.leaves())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lower_precision_loses_no_more_than_torch_s_own_products(name: Activation, dtype: torch.dtype) -> None:
    given = neck([[0], [1], [-1], [1]], (8, 16), name, width=96, tokens=5).to(dtype)
    act = ACTIVATIONS[name].function
    naive = torch.stack([
        given.scale[k].to(dtype)
        * functional.linear(
            act(functional.linear(x, given.down[k], given.down_bias[k])), given.up[k], given.up_bias[k]
        )
        if k >= 0
        else torch.zeros_like(x)
        for x, k in zip(given.x, given.index[:, 0].tolist(), strict=True)
    ])  # fmt: skip
    want = expected(given)[0]
    assert error(given.run(), want) <= 2 * error(naive, want)


@pytest.mark.parametrize("name", ["mixtures", "one for all", "some none"])
def test_only_what_is_asked_for_is_derived(name: str) -> None:
    given = CASES[name]
    for number, field in enumerate(("x", "down", "down_bias", "up", "up_bias")):
        leaf = getattr(given, field).clone().requires_grad_()
        update = replace(given, **{field: leaf}).run()
        update.backward(given.grad)
        torch.testing.assert_close(leaf.grad, expected(given)[1 + number], atol=1e-11, rtol=1e-11)


def test_without_gradients_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = CASES["mixtures"].learning()
    wanted = given.run()
    assert wanted.requires_grad
    # straight to the numbers, not through autograd
    monkeypatch.setattr(op, "BatchedBottleneck", None)
    with torch.no_grad():
        assert torch.equal(given.run(), wanted)
    update = CASES["mixtures"].run()
    assert torch.equal(update, wanted)
    assert not update.requires_grad


def test_gradients_of_adapters_that_no_row_uses_are_exactly_zero() -> None:
    given = neck([[0], [2], [-1]], (2, 3, 4), dropped=True)
    for grad in results(given)[2:]:
        assert not grad[1].any()
        assert grad[0].any()


@pytest.mark.parametrize("name", ["some none", "one and none", "weighted", "mixtures", "mixtures unweighted"])
def test_numbers_that_are_none_reach_no_row_of_others(name: str) -> None:
    """Forward, and the gradients of the other rows and adapters, to the bit."""
    given = CASES[name]
    for broken in range(len(given.down)):
        uses = (given.index == broken).any(1)
        hurt = {field: getattr(given, field).clone() for field in ("down", "down_bias", "up", "up_bias")}
        for each in hurt.values():
            each[broken] = NAN
        others = [k for k in range(len(given.down)) if k != broken]
        found = []
        for each in (given, replace(given, **hurt)):
            each = each.learning()
            kept = each.run()[~uses]
            grads = torch.autograd.grad(kept.square().sum(), each.leaves(), allow_unused=True)
            by_row, by_adapter = (grads[0], *grads[5:]), grads[1:5]
            found.append([kept, *(grad[~uses] for grad in by_row), *(grad[others] for grad in by_adapter)])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
        assert replace(given, **hurt).run()[uses].isnan().all()


def test_rows_without_an_adapter_get_zeros_whatever_they_hold() -> None:
    """And take no part in any gradient, whatever theirs are."""
    for name, row in (("some none", 1), ("weighted", 2), ("mixtures", 2)):
        given = CASES[name]
        x, grad = given.x.clone(), given.grad.clone()
        x[row] = grad[row] = NAN
        update, grad_x, *grads = results(replace(given, x=x, grad=grad))
        assert torch.equal(update[row], torch.zeros(3, 20).double())
        assert torch.equal(grad_x[row], torch.zeros(3, 20).double())
        for one, other in zip(grads, results(given)[2:], strict=True):
            assert torch.equal(one, other)


def test_what_is_behind_a_size_adds_nothing() -> None:
    """A bias there is read, but its unit goes nowhere."""
    given = CASES["each its own"]
    bias = given.down_bias.clone()
    for k, size in enumerate(given.sizes.tolist()):
        bias[k, size:] = 1.0
    assert not torch.equal(bias, given.down_bias)
    torch.testing.assert_close(replace(given, down_bias=bias).run(), given.run(), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("name", ["some none", "mixtures"])
def test_a_row_depends_on_no_other_row(name: str) -> None:
    """Alone, in another order, and with the adapters in another order; in whole numbers, which are added exactly.

    In others torch's own products round by where a row lies in memory.
    """
    given = CASES[name].whole()
    together = given.run()
    assert together.unique().numel() > 20
    order = torch.randperm(len(given.x), generator=torch.Generator().manual_seed(1))
    assert torch.equal(given.picked(order).run(), together[order])
    for row in range(len(given.x)):
        assert torch.equal(given.picked(torch.tensor([row])).run()[0], together[row])
    assert torch.equal(given.renamed([2, 0, 1]).run(), together)


@pytest.mark.parametrize("name", ["mixtures", "one for all", "some none"])
def test_run_to_run_the_bits_are_the_same(name: str) -> None:
    given = CASES[name].to(torch.float32)
    first = results(given)
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, results(given), strict=True))


@pytest.mark.parametrize("middle", [(), (1,), (2, 3)])
def test_rows_may_have_any_dimensions(middle: tuple[int, ...]) -> None:
    given = neck([[2], [-1], [0], [1]], (2, 5, 3), tokens=6, dropped=True)
    assert given.keep is not None
    tokens = torch.Size(middle).numel()
    x, keep = (each[:, :tokens].reshape(4, *middle, -1) for each in (given.x, given.keep))
    flat = replace(given, x=x, keep=keep, index=given.index[:, 0]).run()
    torch.testing.assert_close(flat, given.run()[:, :tokens].reshape(x.shape), atol=1e-13, rtol=1e-13)


def test_it_takes_tensors_that_are_not_contiguous() -> None:
    given = CASES["mixtures"]
    assert given.keep is not None
    strided = replace(
        given,
        x=given.x.transpose(1, 2).contiguous().transpose(1, 2),
        down=given.down.transpose(1, 2).contiguous().transpose(1, 2),
        down_bias=given.down_bias.T.contiguous().T,
        up=given.up.transpose(0, 1).contiguous().transpose(0, 1),
        up_bias=given.up_bias.T.contiguous().T,
        keep=given.keep.transpose(1, 2).contiguous().transpose(1, 2),
        grad=given.grad.transpose(1, 2).contiguous().transpose(1, 2),
    )
    for one, other in zip(results(strided), results(given), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["some none", "mixtures"])
def test_it_is_one_operation_for_compilers(name: str) -> None:
    """Its shapes without running it, its derivative, and its trace, as torch checks them."""
    given = CASES[name].to(torch.float32).learning()
    arguments = (
        given.x, given.down, given.down_bias, given.up, given.up_bias, given.scale.float(), given.index, given.weight,
        given.keep, None, given.activation, "torch",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.graftory.batched_bottleneck.default, arguments)
    seen: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(Neck.run, backend=compiler, fullgraph=True)
    assert torch.equal(compiled(given), given.run())
    assert [target for target in seen if "graftory" in target] == ["graftory.batched_bottleneck.default"]


def test_it_is_exported_as_one_operation() -> None:
    given = CASES["mixtures"]

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return replace(given, x=x).run()

    exported = torch.export.export(Module(), (given.x,))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert [target for target in targets if "graftory" in target] == ["graftory.batched_bottleneck.default"]
    assert torch.equal(exported.module()(given.x), given.run())


def test_the_compiled_operation_has_the_same_gradients() -> None:
    for name in ("mixtures", "some none"):
        given = CASES[name].learning()
        compiled = torch.compile(Neck.run, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(given), given.leaves(), given.grad)
        for mine, theirs in zip(found, results(given)[1:], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_a_backend_that_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="float64 on cpu"):
        CASES["weighted"].run("triton")
    wide = neck([[0]], (257,)).to(torch.float32)
    with pytest.raises(ValueError, match="256 hidden units at most"):
        wide.run("triton")
    assert wide.run("auto").shape == wide.x.shape


@pytest.mark.parametrize(
    ("field", "shape", "said"),
    [
        ("x", (4, 3, 19), r"x: got \(4, 3, 19\), wanted \(4, 3, 20\)"),
        ("down", (5, 20), "down: wanted 3 dimensions"),
        ("down_bias", (2, 4), "down_bias: got"),
        ("up", (2, 20, 4), "up: got"),
        ("up_bias", (2, 19), "up_bias: got"),
        ("scale", (3,), "scale: got"),
        ("weight", (4,), "weight: got"),
        ("keep", (4, 3, 4), r"keep: .*wanted \(4, 3, 5\)"),
        ("sizes", (3,), "sizes: got"),
    ],
)
def test_wrong_shapes_are_named(field: str, shape: tuple[int, ...], said: str) -> None:
    changed: Any = {field: torch.ones(shape)}
    with pytest.raises(ValueError, match=said):
        replace(CASES["weighted"], **changed).run()


def test_other_wrong_inputs_are_named() -> None:
    given = CASES["weighted"]
    with pytest.raises(ValueError, match="index: got"):
        replace(given, index=given.index[:1]).run()
    with pytest.raises(ValueError, match="activation: got 'sigmoid', wanted one of relu, "):
        replace(given, activation="sigmoid").run()  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="activation"):
        batched_bottleneck(  # type: ignore[call-arg]
            given.x, given.down, given.down_bias, given.up, given.up_bias, given.scale, given.index
        )
